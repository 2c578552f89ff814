"""Models as CUDA graphs: padding to a shape and back. On a CPU with a stand-in for the graph, which runs the model on
the same static tensors; on a GPU with graphs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import albert_fast
from albert_fast import AlbertConfig, backends, graphs

SHAPES = [(2, 16), (1, 8), (4, 32)]


def config(**changed: Any) -> AlbertConfig:
    sizes = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 40}
    return AlbertConfig(**sizes, **changed)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[dict[str, Tensor]]:
    """The static inputs of each graph that was recorded."""
    made: list[dict[str, Tensor]] = []

    def watched(record: Callable[..., Any]) -> Callable[..., Any]:
        def watch(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> Any:
            made.append(inputs)
            assert backends.are_for_graphs()
            autocast = torch.is_autocast_enabled(model.device.type)
            assert not (autocast and torch.is_autocast_cache_enabled())  # it would hold casts of the parameters
            return record(model, inputs, options)

        return watch

    def stand_in(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> Any:
        with torch.no_grad():
            outputs = model(**inputs, **options, return_dict=True)

        def replay() -> Any:
            with torch.no_grad():
                again = model(**inputs, **options, return_dict=True)
            # Into the same memory, as a graph.
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            return outputs

        return replay

    if device.type == "cuda":
        monkeypatch.setattr(graphs, "_inference", watched(graphs._inference))
        monkeypatch.setattr(graphs, "_training_step", watched(graphs._training_step))
    else:
        monkeypatch.setattr(graphs, "check_on_gpu", lambda model: None)
        monkeypatch.setattr(graphs, "_inference", watched(stand_in))
        monkeypatch.setattr(graphs, "_training_step", watched(graphs._training_step))
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", callable_in_memory)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def callable_in_memory(
    module: torch.nn.Module, arguments: tuple[Tensor, ...], num_warmup_iters: int, allow_unused_input: bool
) -> Callable[..., Tensor]:
    """PyTorch's `make_graphed_callables` without a GPU: which parameters have gradients is known from the start; the
    loss and the gradients always lie in the same memory, of which autograd gets views."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    static_loss, gradients = torch.zeros(()), [torch.zeros_like(parameter) for parameter in parameters]
    replayed: list[Tensor] = []

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *_: Tensor) -> Tensor:
            with torch.enable_grad():
                replayed[:] = [module(*arguments)]
            return static_loss.copy_(replayed[0].detach()).detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
            found = torch.autograd.grad(replayed, parameters, gradient, allow_unused=allow_unused_input)
            pairs = zip(gradients, found, strict=True)
            return tuple(new if new is None else static.copy_(new).detach() for static, new in pairs)

    def replay(*given: Tensor) -> Tensor:
        assert all(static is tensor for static, tensor in zip(arguments, given, strict=True))
        return Replay.apply(*parameters)

    return replay


def batch(rows: int, columns: int, device: torch.device) -> dict[str, Tensor]:
    lengths = torch.randint(1, columns + 1, (rows,))
    lengths[0] = columns
    mask = (torch.arange(columns) < lengths[:, None]).long()
    ids = torch.randint(2, 99, (rows, columns))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize(
    "kind", ["AlbertModel", "AlbertForMaskedLM", "AlbertForSequenceClassification", "AlbertForQuestionAnswering"]
)
def test_equals_the_model(kind, recorded, device):
    model = getattr(albert_fast, kind)(config()).to(device).eval()
    graphed = albert_fast.graphed(model, SHAPES)
    earlier = []
    for rows, columns in ((1, 8), (2, 5), (1, 16), (3, 20), (2, 16), (4, 32)):
        inputs = batch(rows, columns, device)
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True)
        actual = graphed(**inputs, output_hidden_states=True)
        assert type(actual) is type(expected)
        assert actual.keys() == expected.keys()
        earlier.append((actual, expected))
    for actual, expected in earlier:  # the later calls have not written into the earlier results
        for name in expected.keys():  # noqa: SIM118
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)
    assert [tuple(inputs["input_ids"].shape) for inputs in recorded] == [(1, 8), (2, 16), (4, 32)]


def test_a_smaller_batch_leaves_nothing_of_the_last(recorded, device):
    model = albert_fast.AlbertModel(config()).to(device).eval()
    graphed = albert_fast.graphed(model, [(3, 12)])
    graphed(**batch(3, 12, device))
    inputs = batch(1, 4, device)
    graphed(**inputs)
    static = recorded[0]
    assert static["attention_mask"].sum() == inputs["attention_mask"].sum()
    assert static["input_ids"][0, 4:].eq(model.config.pad_token_id).all()


def test_follows_the_parameters(recorded, device):
    model = albert_fast.AlbertModel(config()).to(device).eval()
    graphed = albert_fast.graphed(model, SHAPES)
    inputs = batch(2, 9, device)
    before = graphed(**inputs)[0]
    with torch.no_grad():
        model.encoder.embedding_hidden_mapping_in.weight.mul_(2.0)
        expected = model(**inputs)[0]
    after = graphed(**inputs)[0]
    assert len(recorded) == 1
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    # In other memory: another graph.
    model.encoder.embedding_hidden_mapping_in.weight = torch.nn.Parameter(
        torch.randn_like(model.encoder.embedding_hidden_mapping_in.weight)
    )
    with torch.no_grad():
        expected = model(**inputs)[0]
    torch.testing.assert_close(graphed(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(recorded) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "pooler", torch.nn.Linear(32, 32)),
        lambda model: setattr(model, "pooler", None),
        lambda model: setattr(model.encoder, "input_means", torch.zeros(3, 3 * 32 + 64)),
        lambda model: model.embeddings.register_buffer("more", torch.zeros(1)),
        lambda model: model.encoder.embedding_hidden_mapping_in.register_parameter("bias", None),
    ],
    ids=["another module", "no module", "a buffer that was None", "one more buffer", "no parameter"],
)
def test_another_model_is_recorded_again(change, recorded, device):
    model = albert_fast.AlbertModel(config()).to(device).eval()
    graphed = albert_fast.graphed(model, SHAPES)
    inputs = batch(2, 9, device)
    graphed(**inputs)
    change(model)
    model.to(device)
    with torch.no_grad():
        expected = model(**inputs)
    for _ in range(2):
        actual = graphed(**inputs)
        assert actual.keys() == expected.keys()
        for name in expected.keys():  # noqa: SIM118
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)
    assert len(recorded) == 2


def test_a_mask_of_any_kind_or_none(recorded, device):
    model = albert_fast.AlbertModel(config()).to(device).eval()
    graphed = albert_fast.graphed(model, [(3, 12)])
    ids, mask = batch(2, 9, device).values()
    with torch.no_grad():
        masked, full = model(ids, mask)[0], model(ids)[0]
    for given, expected in ((mask, masked), (None, full), (None, full), (mask.bool(), masked), (mask * 0.5, masked)):
        torch.testing.assert_close(graphed(ids, given)[0], expected, rtol=1e-4, atol=1e-5)
    ids = ids[:1, :4].contiguous()
    with torch.no_grad():
        expected = model(ids)[0]
    torch.testing.assert_close(graphed(ids)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(recorded) == 1


def test_whole_rows_without_a_mask_pack_nothing(recorded, device):
    model = albert_fast.AlbertModel(config()).to(device).eval()
    graphed = albert_fast.graphed(model, [(3, 12)])
    for ids, mask in (batch(3, 12, device).values() for _ in range(2)):
        for given in (None, mask):
            with torch.no_grad():
                expected = model(ids, given)[0]
            torch.testing.assert_close(graphed(ids, given)[0], expected, rtol=1e-4, atol=1e-5)
    assert ["attention_mask" in inputs for inputs in recorded] == [False, True]


def test_autocast_follows_the_parameters(recorded, device):
    model = albert_fast.AlbertModel(config()).to(device).eval()
    graphed = albert_fast.graphed(model, [(2, 9)])
    inputs = batch(2, 9, device)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16):
            actual = graphed(**inputs)[0]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            expected = model(**inputs)[0]
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
        with torch.no_grad():
            model.encoder.embedding_hidden_mapping_in.weight.mul_(-1.0)
    assert len(recorded) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_trains(autocast, recorded, device):
    torch.manual_seed(0)
    model = albert_fast.AlbertForMaskedLM(config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).to(device)
    graphed = albert_fast.graphed(model.train(), [(4, 16)])
    for rows, columns in ((4, 16), (2, 11)):
        inputs = batch(rows, columns, device)
        labels = inputs["input_ids"].masked_fill(torch.rand(rows, columns, device=device) < 0.5, -100)
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        labels[0, 0] = 5
        graphed.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = graphed(**inputs, labels=labels)
        loss.backward()
        actual = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            expected = model(**inputs, labels=labels).loss
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-2 if autocast else 1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            bounds = {"rtol": 5e-2, "atol": 2e-3} if autocast else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(actual[name], parameter.grad, **bounds)
    assert len(recorded) == 1


def labelled(rows: int, columns: int, device: torch.device) -> dict[str, Tensor]:
    inputs = batch(rows, columns, device)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels}


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-5, msg=f"{name}: {{}}".format)


def without_dropout(kind: str, device: torch.device, **changed: Any) -> Any:
    sizes = config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, **changed)
    return getattr(albert_fast, kind)(sizes).to(device).train()


def test_gradients_add_up(recorded, device):
    """Over batches of one shape and of several, into what was set to zero, and the losses stay what they were."""
    model = without_dropout("AlbertForMaskedLM", device)
    graphed = albert_fast.graphed(model, SHAPES)
    batches = [labelled(rows, columns, device) for rows, columns in ((2, 16), (4, 20), (2, 16), (1, 8))]

    def train(call: Callable[..., Any]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        losses = []
        for inputs in batches:
            loss = call(inputs)
            loss.backward()
            losses.append(loss.detach())
        return losses, gradients_of(model)

    expected_losses, expected = train(lambda inputs: model(**inputs).loss)
    for to_none in (True, False, False):
        model.zero_grad(set_to_none=to_none)
        losses, actual = train(lambda inputs: graphed(**inputs))
        torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
        assert_same_gradients(actual, expected)
    assert len(recorded) == 3


def test_what_is_frozen_and_thawed(recorded, device):
    model = without_dropout("AlbertForMaskedLM", device)
    graphed = albert_fast.graphed(model, SHAPES)
    inputs = labelled(2, 16, device)
    for frozen in (True, False, True):
        model.albert.encoder.requires_grad_(not frozen)
        model.zero_grad()
        model(**inputs).loss.backward()
        expected = gradients_of(model)
        model.zero_grad()
        graphed(**inputs).backward()
        assert any(gradient is None for gradient in expected.values()) == frozen
        assert_same_gradients(gradients_of(model), expected)
    assert len(recorded) == 2


def test_modes_of_parts_are_the_callers(recorded, device):
    """A part that is in eval mode, without its dropout, stays so; and has a graph of its own."""
    model = albert_fast.AlbertForMaskedLM(config(hidden_dropout_prob=0.5)).to(device).train()
    graphed = albert_fast.graphed(model, SHAPES)
    inputs = labelled(2, 16, device)
    with_dropout = graphed(**inputs)
    model.albert.eval()
    losses = [graphed(**inputs) for _ in range(2)]
    assert not model.albert.training
    assert not any(module.training for module in model.albert.modules())
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], model(**inputs).loss, rtol=1e-4, atol=1e-5)
    assert abs(with_dropout - losses[0]) > 1e-4
    assert len(recorded) == 2


def test_a_parameter_that_the_loss_does_not_need(recorded, device):
    model = without_dropout("AlbertForPreTraining", device)
    inputs = labelled(2, 16, device)
    albert_fast.graphed(model, SHAPES)(**inputs).backward()
    actual = gradients_of(model)
    model.zero_grad()
    model(**inputs).loss.backward()
    assert_same_gradients(actual, gradients_of(model))
    assert actual["albert.pooler.weight"] is None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("labels", [1, 3, 16])
def test_numbers_to_meet(labels, training, recorded, device):
    """A row beyond the batch's would count: the shape has exactly the batch's rows."""
    model = without_dropout("AlbertForSequenceClassification", device, num_labels=labels).train(training)
    graphed = albert_fast.graphed(model, [(8, 16), (5, 16), (1, 8)])
    inputs = batch(5, 16 if labels == 16 else 11, device)
    given = torch.rand(5, device=device) if labels == 1 else torch.rand(5, labels, device=device)
    loss = graphed(**inputs, labels=given) if training else graphed(**inputs, labels=given).loss
    torch.testing.assert_close(loss, model(**inputs, labels=given).loss, rtol=1e-4, atol=1e-5)
    assert recorded[0]["input_ids"].shape == (5, 16)
    inputs = batch(3, 16, device)
    with pytest.raises(ValueError, match=r"labels holds numbers that 3 rows .* no shape of .* has exactly 3 rows"):
        graphed(**inputs, labels=given[:3])
    if labels > 1:
        with pytest.raises(ValueError, match=r"labels is .*; floating-point numbers were expected for several a row"):
            graphed(**inputs, labels=given[:3].long())
        classes = torch.randint(labels, (3,), device=device)  # which can be ignored
        loss = graphed(**inputs, labels=classes) if training else graphed(**inputs, labels=classes).loss
        torch.testing.assert_close(loss, model(**inputs, labels=classes).loss, rtol=1e-4, atol=1e-5)


def test_refuses_what_it_cannot_do(recorded, device):
    model = albert_fast.AlbertForMaskedLM(config()).to(device)
    with pytest.raises(ValueError, match="shapes is empty"):
        albert_fast.graphed(model, [])
    with pytest.raises(ValueError, match=r"shapes holds \(1, 41\); at least one row of 1 to 40 tokens"):
        albert_fast.graphed(model, [(1, 41)])
    graphed = albert_fast.graphed(model.eval(), SHAPES)
    with pytest.raises(ValueError, match=r"input_ids has 5 rows of 8 and no shape of .* holds them"):
        graphed(**batch(5, 8, device))
    inputs = batch(2, 8, device)
    with pytest.raises(ValueError, match="attention_mask is"):
        graphed(inputs["input_ids"], inputs["attention_mask"][:1])
    with pytest.raises(ValueError, match="inputs_embeds is"):
        graphed(**inputs, inputs_embeds=torch.zeros(2, 8, 16))
    with pytest.raises(ValueError, match="output_attentions is True"):
        graphed(**inputs, output_attentions=True)
    model.train()
    with pytest.raises(ValueError, match="labels is None; in training mode"):
        graphed(**inputs)


def test_needs_a_gpu():
    with pytest.raises(ValueError, match=r"model is on cpu; CUDA graphs need a GPU: model.to\('cuda'\)"):
        albert_fast.graphed(albert_fast.AlbertModel(config()))
