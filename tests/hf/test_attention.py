"""`attn_implementation="albert_fast"` beside transformers' own attention, in several encoders."""

import copy

import pytest
import torch

from albert_fast import ops
from albert_fast.hf import attention as hf_attention
from albert_fast.hf.guards import TRANSFORMERS_5
from hf.albert import LENGTHS, MASK, SIZES, config, ids, relative_error, results, transformers, transformers_5

ENCODERS = {"SplinterModel": "SplinterConfig"}  # in transformers 4 few models of text ask the interface
if TRANSFORMERS_5:
    ENCODERS |= {"AlbertModel": "AlbertConfig", "BertModel": "BertConfig", "ElectraModel": "ElectraConfig"}
    ENCODERS |= {"RobertaModel": "RobertaConfig", "ModernBertModel": "ModernBertConfig"}


def encoder(name: str = "AlbertModel", **changes) -> torch.nn.Module:
    if name == "AlbertModel":
        chosen = config(**changes)
    else:
        # ModernBERT: every other layer sees three tokens to either side.
        special = {"pad_token_id": 0, "local_attention": 6, "global_attn_every_n_layers": 2, "attention_dropout": 0.0}
        chosen = getattr(transformers, ENCODERS[name])(
            **{**SIZES, **(special if "Modern" in name else {"hidden_dropout_prob": 0.0}), **changes}
        )
        chosen.attention_probs_dropout_prob = changes.get("attention_probs_dropout_prob", 0.0)
    implementation = "eager" if name == "SplinterModel" else "sdpa"
    made = getattr(transformers, name)._from_config(chosen, attn_implementation=implementation)
    return made.double().eval()


def with_ours(stock: torch.nn.Module) -> torch.nn.Module:
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation("albert_fast")
    assert ours.config._attn_implementation == "albert_fast"
    return ours


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Whether each call of the attention had a bias."""
    seen = []

    def counted(*args, **options):
        seen.append(options["bias"] is not None)
        return ops.cross_attention(*args, **options)

    class Ops:
        cross_attention = staticmethod(counted)

    monkeypatch.setattr(hf_attention, "ops", Ops)
    return seen


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_equal_sdpa(name, calls):
    stock = encoder(name)
    inputs = {"input_ids": ids(), "attention_mask": MASK.long()}
    actual, expected = results(with_ours(stock), inputs), results(stock, inputs)
    assert len(calls) == 3
    if TRANSFORMERS_5:  # transformers 4 has no masks by the interface, and adds them to the scores
        assert calls == ([False, True, False] if name == "ModernBertModel" else [False] * 3)
    for key, value in expected.items():
        scale = value.abs().max().item() + 1.0 if "key.bias" in key else None
        # Splinter's eager attention has its softmax in float32.
        assert relative_error(actual[key], value, scale) < (1e-5 if name == "SplinterModel" else 1e-9), key
    # The first row has no padding; the second differs once what follows it is no padding, either.
    without = with_ours(stock)(input_ids=inputs["input_ids"]).last_hidden_state
    first, second = expected["last_hidden_state"].split([LENGTHS[0], sum(LENGTHS[1:])])
    assert relative_error(without[0], first) < 1e-6
    assert relative_error(without[1, : LENGTHS[1]], second[: LENGTHS[1]]) > 1e-3


@transformers_5
def test_padded_positions_are_as_in_sdpa():
    stock, input_ids = encoder(), ids()
    expected = stock(input_ids, MASK).last_hidden_state
    torch.testing.assert_close(with_ours(stock)(input_ids, MASK).last_hidden_state, expected, rtol=1e-9, atol=1e-9)


@transformers_5
@pytest.mark.parametrize("additive", [False, True])
def test_masks_between_tokens(additive):
    stock, input_ids = encoder(), ids()
    mask = torch.ones(3, 1, 11, 11, dtype=torch.bool).tril()
    if additive:
        mask = torch.randn(3, 1, 11, 11, dtype=torch.float64)
    expected = stock(input_ids, mask).last_hidden_state
    torch.testing.assert_close(with_ours(stock)(input_ids, mask).last_hidden_state, expected, rtol=1e-9, atol=1e-9)


@transformers_5
def test_packed_rows_do_not_see_each_other():
    stock, input_ids = encoder(), ids()
    rows = [row[:length] for row, length in zip(input_ids, LENGTHS, strict=True)]
    apart = torch.cat([stock(row[None]).last_hidden_state[0] for row in rows])
    together = {"input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    offsets = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 11, "max_length_k": 11}
    for inputs in (together, {**together, **offsets}):
        actual = with_ours(stock)(**inputs).last_hidden_state[0]
        torch.testing.assert_close(actual, apart, rtol=1e-9, atol=1e-9)


@transformers_5
def test_a_causal_model():
    made = transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": 1, "attention_dropout": 0.0, "num_hidden_layers": 2}
    )
    stock = transformers.LlamaModel._from_config(made, attn_implementation="sdpa").double().eval()
    input_ids = ids()
    for mask in (None, MASK.long()):
        expected = stock(input_ids, attention_mask=mask).last_hidden_state
        actual = with_ours(stock)(input_ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(actual[MASK], expected[MASK], rtol=1e-9, atol=1e-9)


@transformers_5
def test_cross_attention():
    stock = encoder("BertModel", is_decoder=True, add_cross_attention=True)
    seen = torch.randn(3, 11, 32, dtype=torch.float64)
    inputs = {"input_ids": ids()[:, :5], "encoder_hidden_states": seen, "encoder_attention_mask": MASK.long()}
    expected = stock(**inputs, use_cache=False).last_hidden_state
    actual = with_ours(stock)(**inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    # As many queries as keys, some of which are padding: every query is computed.
    inputs["input_ids"] = ids()
    expected = stock(**inputs, use_cache=False).last_hidden_state
    actual = with_ours(stock)(**inputs, use_cache=False).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_dropout():
    ours, input_ids = with_ours(encoder("SplinterModel", attention_probs_dropout_prob=0.3)), ids()
    assert torch.equal(ours(input_ids).last_hidden_state, ours(input_ids).last_hidden_state)
    ours.train()
    torch.manual_seed(3)
    first = ours(input_ids).last_hidden_state
    assert not torch.equal(ours(input_ids).last_hidden_state, first)
    torch.manual_seed(3)
    assert torch.equal(ours(input_ids).last_hidden_state, first)


@transformers_5
@pytest.mark.parametrize("padded", [False, True])
def test_compiles_to_one_graph(padded):
    stock, input_ids = encoder().float(), ids()
    inputs = {"input_ids": input_ids, **({"attention_mask": MASK.long()} if padded else {})}
    compiled = torch.compile(with_ours(stock), fullgraph=True, backend="aot_eager")
    expected = stock(**inputs).last_hidden_state
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


QUERY = torch.randn(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (None, {"softcap": 30.0}, "softcap was given.*take 'sdpa' or 'eager'"),
        (None, {"position_bias": torch.zeros(1, 3, 5, 5)}, "position_bias was given"),
        (torch.ones(2, 4), {}, r"attention_mask is float32\[2, 4\].*\[2, 5\] was expected"),
        (torch.ones(2, 1, 3, 5), {}, r"attention_mask is float32\[2, 1, 3, 5\].*5 or 1, 5\] was expected"),
    ],
)
def test_errors(mask, options, message):
    with pytest.raises(ValueError, match=message):
        hf_attention.attention_forward(torch.nn.Module(), QUERY, QUERY, QUERY, mask, **options)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@transformers_5
def test_a_trace_is_of_sdpa(dtype):
    """Of whichever rows it was made, in both dtypes: kernels serve the one alone."""
    ours = with_ours(encoder("BertModel")).to(dtype)
    ours.config.return_dict = False
    input_ids = ids()
    with torch.no_grad():
        traced = torch.jit.trace(ours, (input_ids, torch.ones_like(input_ids)), check_trace=False)
        actual, expected = (some(input_ids, MASK.long())[0][MASK] for some in (traced, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
