"""The models against transformers': outputs, hidden states, attentions, losses and every gradient."""

import contextlib
import copy
import math
import pickle
import random

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertModel, PackedBatch
from albert_fast.activations import ACTIVATIONS

HEADS = (
    "AlbertModel",
    "AlbertForPreTraining",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertForQuestionAnswering",
    "AlbertForMultipleChoice",
)
TOLERANCE = 1e-5  # relative, float32


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    scale = expected.norm().item()
    error = (actual - expected).norm().item()
    return error / scale if scale > 0 else error


def random_shape(**overrides) -> dict:
    """The fields of a small config: groups, inner groups, activations, head sizes, tied or not."""
    heads = random.choice([1, 2, 3, 4])
    layers = random.randint(1, 4)
    shape = {
        "vocab_size": random.randint(50, 200),
        "embedding_size": random.choice([8, 16, 24]),
        # Not 4: twelve LayerNorms of four numbers, one after the other, magnify rounding a millionfold.
        "hidden_size": heads * random.choice([4, 8, 16, 20] if heads > 1 else [8, 16, 20]),
        "num_attention_heads": heads,
        "intermediate_size": random.choice([24, 32, 50]),
        "num_hidden_layers": layers,
        "num_hidden_groups": random.randint(1, layers),
        "inner_group_num": random.randint(1, 3),
        "hidden_act": random.choice(sorted(ACTIVATIONS)),
        "max_position_embeddings": 40,
        "type_vocab_size": random.randint(2, 4),
        "layer_norm_eps": random.choice([1e-12, 1e-5]),
        "classifier_dropout_prob": 0.0,
        "tie_word_embeddings": random.choice([True, False]),
        "pad_token_id": random.choice([0, 3]),
    }
    return {**shape, **overrides}


def pair(head: str, shape: dict, attention: str = "eager"):
    """transformers' model and ours, with the same, larger weights: at 0.02 the attention would be close to uniform.

    Not so large that the pooler's tanh saturates: its gradient would be nothing but rounding."""
    transformers = pytest.importorskip("transformers")
    peer = getattr(transformers, head)(transformers.AlbertConfig(**shape, attn_implementation=attention))
    for name, parameter in peer.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.8 * parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("orm.weight")), std=0.2)
    model = getattr(albert_fast, head)(AlbertConfig(**shape))
    missing = model.load_state_dict(peer.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return peer, model


def random_inputs(head: str, shape: dict, ragged: bool) -> dict[str, Tensor]:
    batch, seq, choices = random.randint(1, 4), random.randint(2, 33), random.randint(2, 3)
    size = (batch, choices, seq) if head == "AlbertForMultipleChoice" else (batch, seq)
    inputs = {
        "input_ids": torch.randint(shape["vocab_size"], size),
        "token_type_ids": torch.randint(shape["type_vocab_size"], size),
    }
    if random.random() < 0.5:
        inputs["position_ids"] = torch.randint(shape["max_position_embeddings"], size)
    if ragged:
        lengths = torch.randint(1, seq + 1, (*size[:-1], 1))
        inputs["attention_mask"] = (torch.arange(seq) < lengths).long()
    return inputs


def random_labels(head: str, shape: dict, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batch, seq = inputs["input_ids"].shape[0], inputs["input_ids"].shape[-1]
    if head in ("AlbertForMaskedLM", "AlbertForPreTraining", "AlbertForTokenClassification"):
        classes = 2 if head == "AlbertForTokenClassification" else shape["vocab_size"]
        labels = torch.randint(classes, (batch, seq))
        ignored = torch.rand(batch, seq) < 0.6
        ignored[0, 0] = False
        ignored |= inputs.get("attention_mask", torch.ones(batch, seq)) == 0
        labels[ignored] = -100
        extra = {"sentence_order_label": torch.randint(2, (batch,))} if head == "AlbertForPreTraining" else {}
        return {"labels": labels, **extra}
    if head == "AlbertForQuestionAnswering":
        return {name: torch.randint(seq, (batch,)) for name in ("start_positions", "end_positions")}
    if head == "AlbertModel":
        return {}
    return {"labels": torch.randint(2, (batch,))}


def outputs_of(output) -> dict[str, Tensor]:
    """Every tensor of an output, hidden states and attentions stacked."""
    return {
        name: torch.stack(value) if isinstance(value, tuple) else value
        for name in output
        if (value := output[name]) is not None
    }


def scalar_of(output) -> Tensor:
    """The loss, or for a bare encoder a scalar in which every output counts differently."""
    if "loss" in output:
        return output["loss"]
    hidden = output["last_hidden_state"]
    weights = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return (output["last_hidden_state"] * weights).sum() + (output["pooler_output"] * weights).sum()


def nudged(model, peer) -> tuple:
    """Copies of both, every weight moved to a neighbouring number of its format, the same in both: models that float32
    cannot tell from these, with other roundings."""
    model, peer = copy.deepcopy(model), copy.deepcopy(peer)
    for parameter in peer.parameters():
        upwards = torch.rand_like(parameter) < 0.5
        parameter.data = torch.nextafter(parameter.data, torch.where(upwards, torch.inf, -torch.inf))
    model.load_state_dict(peer.state_dict())
    return model, peer


def outputs(model, inputs) -> dict[str, Tensor]:
    with torch.no_grad():
        return outputs_of(model(**inputs))


def gradients(model, inputs) -> dict[str, Tensor | None]:
    model.train().zero_grad()
    scalar_of(model(**inputs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(results, model, peer, inputs, tolerance=TOLERANCE, **ours_alone) -> None:
    """Each tensor of results(model, inputs) equals transformers' to the tolerance.

    Where float32 does not determine one so well (key.bias's gradient is nothing but rounding, two logits may cancel),
    ours is at most twice as far from the float64 one as transformers' own, and two epsilon of it, or of all gradients.
    One rounding beside one lies beyond that by chance, also the median of five beside the worst of five in 0.6 % of
    cases (where a model magnifies one direction, how far a rounding lies is the size of one normal number). Of 25 of
    each, then, the median is held to the five sixths of transformers', which is where the worst of five lies, and the
    root mean square to three times theirs: of a million such cases one fails, and of roundings four times as large
    92 % do. In float64, which has no finer oracle, a hundredth of the tolerance of the whole takes the place of that.
    """
    ours, theirs = results(model, inputs | ours_alone), results(peer, inputs)
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name] is None] == [name for name in theirs if theirs[name] is None]
    expected = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    assert all(ours[name].shape == expected[name].shape for name in expected)
    loose = [name for name in expected if not relative_error(ours[name], expected[name]) <= tolerance]
    if not loose:
        return
    size = {name: tensor.norm().item() for name, tensor in expected.items()}
    if results is gradients:
        size = dict.fromkeys(size, math.hypot(*size.values()))
    if next(iter(expected.values())).dtype == torch.float64:
        for name in loose:
            assert (ours[name] - expected[name]).norm().item() <= 0.01 * tolerance * size[name], name
        return

    def off(model, peer) -> Tensor:
        """(2, loose): how far ours and transformers' lie from the float64 ones."""
        exact = results(copy.deepcopy(peer).double(), inputs)
        found = (results(model, inputs | ours_alone), results(peer, inputs))
        return torch.stack([torch.stack([(one[name] - exact[name]).norm() for name in loose]) for one in found])

    floor = 2 * torch.finfo(torch.float32).eps * expected[loose[0]].new_tensor([size[name] for name in loose])
    one_of_ours, one_of_theirs = off(model, peer)
    if (one_of_ours <= 2 * one_of_theirs + floor).all():
        return
    if results is gradients:
        # PyTorch's fused function takes the softmax's backward from the output, as ours does: that rounds the
        # gradients of query and key up to three times as much as the eager one.
        peer = copy.deepcopy(peer)
        peer.set_attn_implementation("sdpa")
    ours, theirs = torch.stack([off(*nudged(model, peer)) for _ in range(25)], 1)
    median, most = ours.median(0).values, theirs.quantile(5 / 6, 0)
    spread, their_spread = (one.square().mean(0).sqrt() for one in (ours, theirs))
    for i, name in enumerate(loose):
        found = f"{name}: median {median[i]:.3g}, rms {spread[i]:.3g}; theirs: {most[i]:.3g}, rms {their_spread[i]:.3g}"
        assert median[i] <= 2 * most[i] + floor[i], found
        assert spread[i] <= 3 * their_spread[i] + floor[i], found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("trial", [*range(10), *[pytest.param(i, marks=pytest.mark.slow) for i in range(10, 30)]])
def test_equals_transformers(head, trial, device):
    """Fresh configurations for each head: eval outputs, train loss and every gradient, without dropout."""
    shape = random_shape()
    peer, model = (m.to(device) for m in pair(head, shape, random.choice(["eager", "sdpa"])))
    inputs = {k: v.to(device) for k, v in random_inputs(head, shape, ragged=False).items()}
    labels = {k: v.to(device) for k, v in random_labels(head, shape, inputs).items()}
    eager = peer.config._attn_implementation == "eager"
    wanted = {"output_hidden_states": True, "output_attentions": eager}
    assert_equal(outputs, model.eval(), peer.eval(), inputs | wanted)
    inputs |= labels
    extra = {"return_logits": True} if head in ("AlbertForMaskedLM", "AlbertForPreTraining") else {}
    doubles = (copy.deepcopy(model).double(), copy.deepcopy(peer).double(), 1e-10)
    for ours, theirs, tolerance in ((model, peer, TOLERANCE), doubles):
        wanted = {"output_hidden_states": True}
        assert_equal(outputs, ours.train(), theirs.train(), inputs | wanted, tolerance, **extra)
        assert_equal(gradients, ours, theirs, inputs, tolerance)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("unpad", [True, False])
def test_ragged_batch_equals_transformers(head, unpad, device):
    """Real positions, and with unpad=False the padding, too; the loss and its gradients."""
    shape = random_shape(hidden_act="gelu_new")
    peer, model = (m.to(device) for m in pair(head, shape, "sdpa" if unpad else "eager"))
    inputs = {k: v.to(device) for k, v in random_inputs(head, shape, ragged=True).items()}
    labels = {k: v.to(device) for k, v in random_labels(head, shape, inputs).items()}
    extra = {"return_logits": True} if head in ("AlbertForMaskedLM", "AlbertForPreTraining") else {}
    mask = inputs["attention_mask"].flatten(0, -2).bool()
    padding_counts = unpad and head in ("AlbertModel", "AlbertForQuestionAnswering")  # in transformers' scalars

    def real_outputs(model, inputs) -> dict[str, Tensor]:
        everywhere = outputs(model, inputs | {"output_hidden_states": True})
        if not unpad:
            return everywhere
        everywhere["hidden_states"] = everywhere["hidden_states"][:, mask]
        per_token = [name for name, tensor in everywhere.items() if tensor.shape[:2] == mask.shape]
        real = {name: everywhere[name][mask] for name in per_token if name != "pooler_output"}
        return {name: tensor for name, tensor in (everywhere | real).items() if name != "loss" or not padding_counts}

    inputs |= labels
    assert_equal(real_outputs, model.train(), peer.train(), inputs, unpad=unpad, **extra)
    if unpad:
        assert not outputs(model, inputs | {"output_hidden_states": True})["hidden_states"][:, ~mask].any()
    if not padding_counts:
        assert_equal(gradients, model, peer, inputs, unpad=unpad)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_four_dimensional_mask_equals_transformers(kind):
    shape = random_shape()
    peer, model = pair("AlbertModel", shape, "sdpa")
    inputs = random_inputs("AlbertModel", shape, ragged=False)
    batch, seq = inputs["input_ids"].shape
    keep = torch.rand(batch, 1, seq, seq) < 0.7
    keep |= torch.eye(seq, dtype=torch.bool)
    mask = keep if kind == "boolean" else torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    assert_equal(outputs, model.eval(), peer.eval(), inputs | {"attention_mask": mask})


def test_attentions_of_a_ragged_batch():
    """Padding anywhere in the row: probabilities are where transformers has them, zero at the padding."""
    shape = random_shape()
    peer, model = pair("AlbertModel", shape)
    ids = torch.randint(shape["vocab_size"], (3, 9))
    mask = torch.tensor([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 0, 0]])
    wanted = {"attention_mask": mask, "output_attentions": True}
    real = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    for actual, expected in zip(
        model.eval()(ids, **wanted).attentions, peer.eval()(ids, **wanted).attentions, strict=True
    ):
        real_everywhere = real.expand(actual.shape)
        assert relative_error(actual[real_everywhere], expected[real_everywhere]) <= TOLERANCE
        assert not actual[~real_everywhere].any()


@pytest.mark.parametrize("head", HEADS[:-1])
def test_packed_batch_gives_what_the_padded_gives(head):
    shape = random_shape()
    model = getattr(albert_fast, head)(AlbertConfig(**shape)).eval()
    inputs = random_inputs(head, shape, ragged=True)
    packed = PackedBatch.from_padded(**inputs)
    expected, actual = outputs_of(model(**inputs)), outputs_of(model(packed))
    assert list(expected) == list(actual)
    for name, tensor in actual.items():
        of_rows = ("pooler_output", "sop_logits", "start_logits", "end_logits", "hidden_states", "attentions")
        per_token = name not in of_rows and head != "AlbertForSequenceClassification"
        torch.testing.assert_close(packed.pad(tensor) if per_token else tensor, expected[name], rtol=0, atol=0)


def test_packed_batch_of_lists():
    model = AlbertForMaskedLM(AlbertConfig(**random_shape())).eval()
    rows = [[2, 7, 8, 3], [2, 3], [2, 9, 3]]
    logits = model(PackedBatch.from_sequences(rows)).logits
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
    torch.testing.assert_close(logits, alone)


def test_inputs_embeds():
    shape = random_shape()
    peer, model = pair("AlbertModel", shape)
    embeds = torch.randn(2, 7, shape["embedding_size"])

    def gradient(model, inputs) -> dict[str, Tensor]:
        embeds = inputs["inputs_embeds"].to(model.dtype).requires_grad_()
        scalar_of(model(inputs_embeds=embeds)).backward()
        return {"inputs_embeds": embeds.grad}

    assert_equal(gradient, model.eval(), peer.eval(), {"inputs_embeds": embeds})


def test_fully_masked_row_is_zero_and_harms_no_other():
    model = AlbertForMaskedLM(AlbertConfig(**random_shape()))
    ids = torch.randint(50, (3, 6))
    mask = torch.tensor([[1] * 6, [0] * 6, [1, 1, 1, 0, 0, 0]])
    output = model.albert(ids, mask)
    assert not output.last_hidden_state[1].any()
    labels = torch.full((3, 6), -100)
    labels[0, 2] = 5
    model(ids, mask, labels=labels).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_work_is_proportional_to_real_tokens():
    """FLOPs of a ragged batch are those of its rows alone, forward and backward."""
    model = AlbertForMaskedLM(AlbertConfig(**random_shape(hidden_act="gelu_new", max_position_embeddings=64)))

    def flops(ids: Tensor, mask: Tensor | None) -> int:
        labels = torch.full_like(ids, -100)
        labels[:, 0] = 5
        with FlopCounterMode(display=False) as counter:
            model(ids, mask, labels=labels).loss.backward()
        return counter.get_total_flops()

    lengths = [64, 5, 17, 1]
    ids = torch.randint(50, (len(lengths), 64))
    mask = torch.arange(64) < torch.tensor(lengths)[:, None]
    ragged = flops(ids, mask)
    alone = sum(flops(ids[i : i + 1, :length], None) for i, length in enumerate(lengths))
    full = flops(ids, None)
    assert ragged == alone
    assert ragged < 0.45 * full


def test_dropout_is_reproducible_and_independent_of_padding():
    shape = random_shape(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    model = AlbertModel(AlbertConfig(**shape)).train()
    ids, state = torch.randint(50, (3, 8)), torch.get_rng_state()

    def run(ids: Tensor, mask: Tensor | None, **kwargs) -> Tensor:
        torch.set_rng_state(state)
        return model(ids, mask, **kwargs).last_hidden_state

    mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
    first = run(ids, mask)
    assert torch.equal(first, run(ids, mask))
    wider = torch.nn.functional.pad(ids, (0, 4))
    torch.testing.assert_close(first, run(wider, torch.nn.functional.pad(mask, (0, 4)))[:, :8])
    torch.testing.assert_close(first[mask], run(ids, mask, unpad=False)[mask])
    assert not torch.equal(first, model(ids, mask).last_hidden_state)


@pytest.mark.parametrize("recompute", ["ffn", "layer"])
def test_recompute_changes_no_gradient(recompute):
    shape = random_shape(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = AlbertForMaskedLM(AlbertConfig(**shape)).train()
    ids, state = torch.randint(50, (2, 8)), torch.get_rng_state()
    grads = []
    for mode in ("none", recompute):
        model.set_recompute(mode)
        model.zero_grad()
        torch.set_rng_state(state)
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype, autocast):
    """bfloat16 and float16 stay as close to the exact logits as transformers does, by autocast and by conversion."""
    ours, theirs = [], []
    for _ in range(5):  # one model alone is a matter of luck
        shape = random_shape(hidden_act="gelu_new", layer_norm_eps=1e-5)
        peer, model = pair("AlbertForMaskedLM", shape, "sdpa")
        ids = torch.randint(shape["vocab_size"], (2, 16))
        exact = copy.deepcopy(model).double()(ids).logits
        context = torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext()
        if not autocast:
            peer, model = peer.to(dtype), model.to(dtype)
        with context:
            loss = model(ids, labels=torch.where(torch.rand(2, 16) < 0.5, ids, -100)).loss
            ours.append(relative_error(model(ids).logits.double(), exact))
            theirs.append(relative_error(peer(ids).logits.double(), exact))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(ours) <= 1.5 * sum(theirs), (ours, theirs)


@pytest.mark.parametrize("ragged", [False, True])
def test_compiles_without_a_break(ragged):
    """torch.compile(fullgraph=True): loss and gradients as in eager mode, for several shapes."""
    sizes = {"num_hidden_layers": 2, "num_hidden_groups": random.randint(1, 2), "inner_group_num": random.randint(1, 2)}
    shape = random_shape(hidden_act="gelu_new", **sizes)
    model = AlbertForMaskedLM(AlbertConfig(**shape))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for seq in (5, 8, 13):
        ids = torch.randint(shape["vocab_size"], (3, seq))
        mask = (torch.arange(seq) < torch.randint(1, seq + 1, (3, 1))).long() if ragged else None
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
        for m in (model, compiled):
            m.zero_grad()
            m(ids, mask, labels=labels).loss.backward()
        for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_outputs_behave_as_transformers():
    model = albert_fast.AlbertForSequenceClassification(AlbertConfig(**random_shape())).eval()
    ids = torch.randint(50, (2, 5))
    output = model(ids, labels=torch.tensor([0, 1]), output_hidden_states=True)
    loss, logits, states = model(ids, labels=torch.tensor([0, 1]), output_hidden_states=True, return_dict=False)
    assert output[0] is output.loss is output["loss"]
    assert list(output) == ["loss", "logits", "hidden_states"]
    torch.testing.assert_close((output.loss, output.logits, output.hidden_states), (loss, logits, states))
    with pytest.raises(KeyError):
        output["attentions"]


def test_initialisation():
    config = AlbertConfig(**random_shape(vocab_size=5000, hidden_size=64, num_attention_heads=4, initializer_range=0.1))
    model = albert_fast.AlbertForPreTraining(config)
    word = model.albert.embeddings.word_embeddings.weight
    assert not word[config.pad_token_id].any()
    assert word.std().item() == pytest.approx(0.1, rel=0.05)
    assert model.albert.pooler.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not model.albert.pooler.bias.any()
    assert (model.albert.embeddings.LayerNorm.weight == 1).all()
    tied = model.predictions.decoder.weight is word
    assert tied == config.tie_word_embeddings


def test_base_has_the_published_number_of_parameters():
    assert AlbertModel(AlbertConfig.base()).num_parameters() == 11_683_584


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_go_both_ways(head, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer, model = pair(head, random_shape(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    back = getattr(transformers, head).from_pretrained(tmp_path / "ours")
    loaded = getattr(albert_fast, head).from_pretrained(tmp_path / "theirs")
    for mine, other in ((model, back), (loaded, peer)):
        state = other.state_dict()
        assert state.keys() == mine.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items())
    assert not loaded.training
    assert back.config.architectures == [head]


def test_pretrained_encoder_under_a_new_head(tmp_path):
    model = albert_fast.AlbertForPreTraining(AlbertConfig(**random_shape()))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"classifier\.weight"):
        classifier = albert_fast.AlbertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier.classifier.weight.shape[0] == 5
    assert classifier.classifier.weight.std() > 0
    encoder = AlbertModel.from_pretrained(tmp_path)
    for a, b in zip(classifier.albert.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = AlbertModel(AlbertConfig(**random_shape()))
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("albert_fast.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resize_token_embeddings():
    model = AlbertForMaskedLM(AlbertConfig(**random_shape(vocab_size=60)))
    old = model.albert.embeddings.word_embeddings.weight.detach().clone()
    for size in (70, 50):
        model.resize_token_embeddings(size)
        assert model(torch.randint(size, (1, 4))).logits.shape[-1] == size
        assert torch.equal(model.albert.embeddings.word_embeddings.weight[:50], old[:50])
        assert model.config.vocab_size == size
    tied = model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight
    assert tied == model.config.tie_word_embeddings


def test_copies_and_pickles():
    model = AlbertForMaskedLM(AlbertConfig(**random_shape(tie_word_embeddings=True))).eval()
    ids = torch.randint(50, (2, 5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert other.predictions.decoder.weight is other.albert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "input_ids and inputs_embeds"),
        ({"input_ids": torch.ones(5, dtype=torch.long)}, ValueError, "input_ids"),
        ({"input_ids": torch.tensor([[1, 999]])}, IndexError, "input_ids has values from 1 to 999"),
        ({"input_ids": torch.tensor([[-1, 4]])}, IndexError, "input_ids"),
        ({"input_ids": torch.ones(1, 3)}, TypeError, "input_ids"),
        ({"input_ids": torch.ones(1, 41, dtype=torch.long)}, ValueError, "max_position_embeddings is 40"),
        ({"attention_mask": torch.ones(2, 6)}, ValueError, r"attention_mask is float32\[2, 6\]"),
        ({"attention_mask": torch.ones(2, 5, 5)}, ValueError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.long)}, TypeError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 4)}, ValueError, "bias"),
        ({"token_type_ids": torch.full((2, 5), 9)}, IndexError, "token_type_ids"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "token_type_ids"),
        ({"position_ids": torch.full((2, 5), 40)}, IndexError, "position_ids"),
        ({"position_ids": torch.zeros(3, 5, dtype=torch.long)}, ValueError, "position_ids"),
        ({"labels": torch.full((2, 5), 500)}, IndexError, "labels"),
        ({"labels": torch.zeros(2, 4, dtype=torch.long)}, ValueError, "labels"),
        (
            {
                "labels": torch.zeros(2, 5, dtype=torch.long),
                "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]),
            },
            ValueError,
            "3 labels in the padding",
        ),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    model = AlbertForMaskedLM(AlbertConfig(**random_shape(vocab_size=60)))
    if arguments and "input_ids" not in arguments:
        arguments = {"input_ids": torch.ones(2, 5, dtype=torch.long), **arguments}
    with pytest.raises(error, match=message):
        model(**arguments)


def test_config_of_transformers_is_refused_with_the_way_out():
    transformers = pytest.importorskip("transformers")
    with pytest.raises(TypeError, match="from_dict"):
        AlbertModel(transformers.AlbertConfig(**random_shape()))


# ------------------------------------------------------------------------------------------- modules inside the layer


class Adapted(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_module_that_would_not_be_called_is_refused():
    model = AlbertModel(AlbertConfig(**random_shape())).eval()
    ids = torch.randint(1, 50, (2, 5))
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    query = layer.attention.query
    layer.attention.query = Adapted(query.in_features, query.out_features)
    with pytest.raises(
        TypeError, match=r"attention\.query of the shared layer is a .*Adapted, whose forward would not"
    ):
        model(ids)
    layer.attention.query = query
    before = model(ids)[0]
    prune.l1_unstructured(layer.ffn, "weight", 0.5)
    with pytest.raises(TypeError, match=r"ffn of the shared layer is a .*Linear, whose weight a hook computes"):
        model(ids)
    prune.remove(layer.ffn, "weight")
    assert not torch.equal(model(ids)[0], before)


def test_parametrized_tensors_are_what_their_attributes_give():
    class Half(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    model = AlbertModel(AlbertConfig(**random_shape())).eval()
    ids = torch.randint(1, 50, (2, 5))
    halved = copy.deepcopy(model)
    for group in halved.encoder.albert_layer_groups:
        for layer in group.albert_layers:
            parametrize.register_parametrization(layer.ffn, "weight", Half())
    for group in model.encoder.albert_layer_groups:
        for layer in group.albert_layers:
            layer.ffn.weight.data /= 2
    torch.testing.assert_close(halved(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-5)


def test_an_expanded_baseline():
    """One vector for all positions, as integrated gradients begin with."""
    config = AlbertConfig(**random_shape())
    model = AlbertModel(config).eval()
    baseline = torch.randn(1, 1, config.embedding_size)
    expected = model(inputs_embeds=baseline.expand(2, 5, -1).contiguous())[0]
    torch.testing.assert_close(model(inputs_embeds=baseline.expand(2, 5, -1))[0], expected, rtol=1e-4, atol=1e-5)
