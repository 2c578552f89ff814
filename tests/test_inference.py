"""A whole model in one native call: what it gives, when it serves, and that nothing is passed over in silence."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ops.parity import assert_as_accurate_as, judged_over_draws
from torch import Tensor, nn

from albert_fast import AlbertConfig, AlbertModel, PackedBatch, cpu, inference, native, ops, prepared

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no native library: {native.load()}")

VOCABULARY = 60


@pytest.fixture(autouse=True)
def served(monkeypatch) -> list[bool]:
    """Of each call of `inference.run` whether it was served."""
    monkeypatch.delenv("ALBERT_FAST_BACKEND", raising=False)
    prepared.forget()
    answers, run = [], inference.run

    def watched(*arguments, **options):
        found = run(*arguments, **options)
        answers.append(found is not None)
        return found

    monkeypatch.setattr(inference, "run", watched)
    return answers


def model(pooler: bool = True, **options) -> AlbertModel:
    heads = random.choice([1, 2, 3])
    shape = {
        "vocab_size": VOCABULARY,
        "embedding_size": random.choice([8, 20, 48]),
        "hidden_size": heads * random.choice([8, 20, 64]),
        "num_attention_heads": heads,
        "intermediate_size": random.choice([24, 100]),
        "num_hidden_layers": 3,
        "layer_norm_eps": random.choice([1e-12, 1e-5]),
        "initializer_range": 0.1,
    }
    made = AlbertModel(AlbertConfig(**{**shape, **options}), add_pooling_layer=pooler).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # else 0 and 1, which would hide much
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def padded() -> dict[str, Tensor]:
    rows, columns = random.randint(1, 4), random.randint(1, 33)
    ids = torch.randint(VOCABULARY, (rows, columns))
    mask = (torch.rand(rows, columns) < 0.7).long()
    types, positions = torch.randint(2, ids.shape), torch.randint(100, ids.shape)
    kinds = [
        {},
        {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": mask, "token_type_ids": types},
        {"attention_mask": mask, "position_ids": positions},
    ]
    return {"input_ids": ids, **random.choice(kinds)}


def step_by_step(m: AlbertModel, **inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "run", lambda *_: None)
        return m(**inputs)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@judged_over_draws
def test_as_accurate_as_pytorch(dtype, groups, served, monkeypatch):
    m = model(num_hidden_groups=groups, inner_group_num=groups).to(dtype)
    oracle = AlbertModel(m.config).eval().double()
    oracle.load_state_dict(m.state_dict())
    for _ in range(4):
        inputs = padded()
        with torch.inference_mode():
            actual = m(**inputs)
            assert served.pop()
            expected = oracle(**inputs)
            with monkeypatch.context() as patch:
                patch.setenv("ALBERT_FAST_BACKEND", "reference")
                peer = m(**inputs)
        for name in ("last_hidden_state", "pooler_output"):
            assert_as_accurate_as(getattr(actual, name), getattr(peer, name), getattr(expected, name), name=name)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("pooler", [True, False])
def test_as_step_by_step(kind, pooler, served):
    m = model(pooler, hidden_act=random.choice(["gelu_new", "gelu", "relu"]))
    m = m.quantize() if kind == "int8" else m.to(getattr(torch, kind))
    inputs = padded()
    with torch.no_grad():
        actual, expected = m(**inputs), step_by_step(m, **inputs)
    assert served == [True]
    assert (actual.pooler_output is None) == (not pooler)
    for name in ("last_hidden_state", "pooler_output")[: 1 + pooler]:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        # The projection's other rounding may put a few numbers of int8 on the next step.
        tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}[kind]
        assert (ours.float() - theirs.float()).norm() <= tolerance * theirs.float().norm(), name


def test_packed(served):
    m = model()
    rows = [torch.randint(VOCABULARY, (n,)) for n in (3, 1, 12)]
    batch = PackedBatch.from_sequences(rows)
    with torch.no_grad():
        actual, expected = m(batch), step_by_step(m, input_ids=batch)
    assert served == [True]
    assert actual.last_hidden_state.shape == (16, m.config.hidden_size)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_rows_without_tokens(served):
    m, ids = model(), torch.randint(VOCABULARY, (3, 5))
    mask = torch.tensor([[1] * 5, [0] * 5, [0, 1, 1, 0, 0]])
    for given in (mask, torch.zeros_like(mask)):
        with torch.no_grad():
            actual, expected = m(ids, given), step_by_step(m, input_ids=ids, attention_mask=given)
        assert served.pop()
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- edited weights


def edits() -> list[Callable[[Tensor], None]]:
    def in_place(tensor):
        with torch.no_grad():
            tensor.mul_(-2.0)

    def through_data(tensor):
        tensor.data.copy_(torch.randn(tensor.shape))

    def through_numpy(tensor):
        tensor.detach().numpy()[:] *= 3

    def new_data(tensor):
        tensor.data = torch.randn(tensor.shape)

    return [in_place, through_data, through_numpy, new_data]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_edits_are_seen(edit, served):
    m = model()
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (2, 9)), "token_type_ids": torch.ones(2, 9, dtype=torch.int64)}
    with torch.no_grad():
        before = m(**inputs)
        for name, parameter in m.named_parameters():
            if name.endswith("key.bias"):
                continue  # a softmax does not see it
            edit(parameter)
            after = m(**inputs)
            assert not torch.equal(before.pooler_output, after.pooler_output), name
            fresh = AlbertModel(m.config).eval()
            fresh.load_state_dict(m.state_dict())
            torch.testing.assert_close(after.pooler_output, fresh(**inputs).pooler_output, rtol=0, atol=0)
            before = after
    assert all(served)


def test_weights_of_training_serve(served):
    """Packed with their transposes."""
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    m(ids).last_hidden_state.sum().backward()
    with torch.no_grad():
        actual, expected = m(ids), step_by_step(m, input_ids=ids)
    assert served == [False, True]
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_weights_of_inference_mode(served):
    """They have no version counter."""
    with torch.inference_mode():
        m, ids = model(), torch.randint(VOCABULARY, (2, 7))
        before = m(ids).pooler_output
        weight = m.encoder.embedding_hidden_mapping_in.weight
        weight[0, 0] += 1.0
        assert not torch.equal(before, m(ids).pooler_output)
    assert served == [True, True]


# -------------------------------------------------------------------------------------------------- who is not served


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, _arguments, output: output * 2)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def replaced(m: AlbertModel, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    old = m.get_submodule(name)
    new = Scaled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    setattr(m.get_submodule(owner), attribute, new)


PROJECTION = "encoder.embedding_hidden_mapping_in"
CHANGES: dict[str, Callable[[AlbertModel], object]] = {
    "a hook of the embeddings": lambda m: hooked(m.embeddings),
    "a hook of the encoder": lambda m: hooked(m.encoder),
    "a hook of the projection": lambda m: hooked(m.encoder.embedding_hidden_mapping_in),
    "a hook of the pooler": lambda m: hooked(m.pooler),
    "another projection": lambda m: replaced(m, PROJECTION),
    "another pooler": lambda m: replaced(m, "pooler"),
    "an own forward": lambda m: setattr(m.pooler, "forward", lambda x: x * 0.5),
    "a parametrized projection": lambda m: nn.utils.parametrizations.weight_norm(m.get_submodule(PROJECTION)),
    "training": lambda m: m.train(),
    "embeddings in training": lambda m: m.embeddings.train(),
    "an encoder in training": lambda m: m.encoder.train(),
    "float64": lambda m: m.double(),
    "no bias": lambda m: setattr(m.pooler, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules(change, served):
    m, ids = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), torch.randint(VOCABULARY, (2, 7))
    CHANGES[change](m)
    with torch.no_grad():
        actual = m(ids)
        assert not any(served)
        expected = step_by_step(m, input_ids=ids)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=0)


def test_a_parametrized_layer(served):
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    nn.utils.parametrizations.weight_norm(m.encoder.albert_layer_groups[0].albert_layers[0].ffn)
    with torch.no_grad():
        before = m(ids).pooler_output
        m.encoder.albert_layer_groups[0].albert_layers[0].ffn.parametrizations.weight.original0.mul_(3.0)
        after = m(ids).pooler_output
        torch.testing.assert_close(after, step_by_step(m, input_ids=ids).pooler_output, rtol=1e-4, atol=1e-5)
    assert not torch.equal(before, after)


CALLS: dict[str, Callable[[AlbertModel, Tensor], object]] = {
    "hidden states": lambda m, ids: m(ids, output_hidden_states=True),
    "attentions": lambda m, ids: m(ids, output_attentions=True),
    "a 4-D mask": lambda m, ids: m(ids, torch.rand(2, 1, 7, 7) < 0.9),
    "vectors": lambda m, ids: m(inputs_embeds=m.embeddings.word_embeddings(ids)),
}


@pytest.mark.parametrize("call", CALLS)
def test_other_calls(call, served):
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    with torch.no_grad():
        CALLS[call](m, ids)
    assert not any(served)


def test_gradients(served):
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    m(ids).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for name, parameter in m.named_parameters() if "pooler" not in name)
    m.requires_grad_(False)
    m(ids)
    m.pooler.weight.requires_grad_(True)
    assert m(ids).pooler_output.requires_grad
    assert served == [False, True, False]


def test_autocast(served):
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert m(ids).last_hidden_state.dtype == torch.bfloat16
    assert served == [False]


def test_another_backend(served, monkeypatch):
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "reference")
    with torch.no_grad():
        m(ids)
    assert served == [False]


def test_global_hooks(served):
    m, ids, seen = model(), torch.randint(VOCABULARY, (2, 7)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, _arguments, _output: seen.append(module))
    try:
        with torch.no_grad():
            m(ids)
    finally:
        handle.remove()
    assert served == [False]
    assert m.pooler in seen


def test_torch_func(served):
    m, ids = model(), torch.randint(VOCABULARY, (3, 2, 7))
    with torch.no_grad():
        expected = torch.stack([m(part).last_hidden_state for part in ids])
        doubled = {name: parameter * 2 for name, parameter in m.named_parameters()}
        called = torch.func.functional_call(m, doubled, (ids[0],)).last_hidden_state
        assert not torch.equal(called, expected[0])
        m.load_state_dict(doubled)
        torch.testing.assert_close(called, m(ids[0]).last_hidden_state, rtol=0, atol=0)
    assert all(served)


def test_modes(served):
    from torch.utils.flop_counter import FlopCounterMode

    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    with torch.no_grad(), FlopCounterMode(display=False):
        m(ids)
    assert served == [False]


# ------------------------------------------------------------------------------------------------- what does not fit


def test_what_is_wrong_is_said(served):
    m, ids = model(), torch.randint(1, VOCABULARY, (2, 7))
    batch = PackedBatch.from_padded(ids)
    with torch.no_grad():
        m(ids)
        for wrong, error, match in (
            ({"input_ids": ids + VOCABULARY}, IndexError, "input_ids has values"),
            ({"input_ids": -ids}, IndexError, "input_ids has values"),
            ({"input_ids": ids, "token_type_ids": ids + 5}, IndexError, "token_type_ids has values"),
            ({"input_ids": ids, "position_ids": ids + 600}, IndexError, "position_ids has values"),
            ({"input_ids": replace(batch, cu_seqlens=batch.cu_seqlens.flip(0))}, ValueError, "cu_seqlens is"),
            ({"input_ids": replace(batch, cu_seqlens=batch.cu_seqlens * 2)}, ValueError, "cu_seqlens is"),
            ({"input_ids": replace(batch, cu_seqlens=batch.cu_seqlens.long())}, TypeError, "cu_seqlens is"),
            ({"input_ids": replace(batch, max_seqlen=3)}, ValueError, "max_seqlen is 3"),
            ({"input_ids": replace(batch, position_ids=batch.position_ids[1:])}, ValueError, "position_ids is"),
            ({"input_ids": replace(batch, token_type_ids=batch.token_type_ids.float())}, TypeError, "token_type_ids"),
            ({"input_ids": replace(batch, input_ids=batch.input_ids[:, None])}, ValueError, "input_ids is"),
        ):
            with pytest.raises(error, match=match):
                m(**wrong)
    assert not any(served[1:])


@pytest.mark.parametrize("place", range(16))
def test_parameters_that_do_not_fit(place):
    m, ids = model(embedding_size=8), torch.randint(VOCABULARY, (2, 7))
    layer = m.encoder.albert_layer_groups[0].albert_layers[0]
    parameter = list(layer.tensors())[place]
    good = parameter.data
    for wrong, error in ((good[..., :-1].contiguous(), ValueError), (good.double(), TypeError)):
        parameter.data = wrong
        with torch.no_grad(), pytest.raises(error, match=r"parameters\["):
            m(ids)
    parameter.data = good.clone()
    with torch.no_grad():
        m(ids)


def test_other_strides_serve_step_by_step(served):
    m, ids = model(), torch.randint(VOCABULARY, (2, 7))
    with torch.no_grad():
        expected = m(ids).last_hidden_state
        table = m.embeddings.word_embeddings.weight
        table.data = table.data.t().contiguous().t()
        torch.testing.assert_close(m(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert served == [True, False]


def test_nothing_is_written_before_the_weights_are_known(monkeypatch):
    """The first answer is that they are stale; the second is the result."""
    m, ids, answers = model(), torch.randint(VOCABULARY, (1, 4)), []
    native_model = torch.ops.albert_fast_native.model

    def watched(*arguments):
        output = arguments[-2]
        output.fill_(7.0)
        answers.append(native_model(*arguments))
        assert answers[-1] == cpu._DONE or bool((output == 7.0).all())
        return answers[-1]

    monkeypatch.setattr(torch.ops.albert_fast_native, "model", watched)
    with torch.no_grad():
        m(ids)
        m(ids)
    assert answers == [cpu._STALE, cpu._DONE, cpu._DONE]


def test_embedded_inputs(served):
    m, tokens = model(pooler=False), 11
    encoder, embedded = m.encoder, torch.randn(tokens, m.config.embedding_size)
    batch = PackedBatch(torch.tensor([0, 4, tokens], dtype=torch.int32), 7, 2, 7)
    projection, parameters = encoder.embedding_hidden_mapping_in, encoder.parameters_of_layers()
    options = encoder.inference_options()
    with torch.no_grad():
        batch = replace(batch, indices=torch.arange(tokens))
        found = inference.run(batch, embedded, None, projection, parameters, None, options)
        expected = ops.encoder(projection(embedded), parameters, batch.cu_seqlens, 7, **options._asdict())
    assert found is not None
    assert found[1] is None
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
