"""Models as CUDA graphs: padding to a shape and back. On a CPU with a stand-in for the graph, which runs the model on
the same static tensors; on a GPU with graphs."""

from collections.abc import Callable
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
        step = lambda model, inputs, options: lambda: model(**inputs, **options, return_dict=True).loss  # noqa: E731
        monkeypatch.setattr(graphs, "_training_step", watched(step))
    return made


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
