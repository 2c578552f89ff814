"""Texts and pairs: rows, targets, losses against PyTorch's, figures against their definitions."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from albert_fast import AlbertConfig, AlbertForSequenceClassification
from albert_fast.finetuning.classification import Classification, Example
from albert_fast.finetuning.config import DataOptions, FinetuneConfig
from albert_fast.finetuning.reading import DataError, Place
from albert_fast.finetuning.rows import pack
from albert_fast.tokenizer import AlbertTokenizer

from .conftest import sentence

HERE = Place(Path("here"), 1)


def task_of(directory, **data) -> Classification:
    return Classification(
        FinetuneConfig(length=32, data=DataOptions(**data)), AlbertTokenizer.from_pretrained(directory)
    )


def examples_of(draw, labels, pair=False) -> list[Example]:
    return [Example(HERE, sentence(draw, True), sentence(draw, False) if pair else None, label) for label in labels]


def model_of(task: Classification, directory: Path) -> AlbertForSequenceClassification:
    config = AlbertConfig.from_pretrained(directory)
    task.configure(config)
    return AlbertForSequenceClassification.from_pretrained(directory, config=config).eval()


def test_rows_of_pairs(model_directory, draw):
    task = task_of(model_directory)
    examples = examples_of(draw, ["b", "a", "b"], pair=True)
    task.learn(examples)
    assert task.labels == ["a", "b"]
    rows = task.rows(examples, labelled=True)
    assert [row.target for row in rows] == [1, 0, 1]
    tokenizer = task.tokenizer
    for row, example in zip(rows, examples, strict=True):
        assert row.input_ids == tokenizer.encode(example.text, example.pair, truncation=True, max_length=32)
        assert row.input_ids.count(tokenizer.sep_token_id) == 2
        assert 0 < sum(row.token_type_ids) < len(row.token_type_ids)
    assert [row.target for row in task.rows(examples, labelled=False)] == [None] * 3


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_losses(kind, model_directory, draw, rng_torch):
    """Summed; divided by the number of targets, they are the model's own."""
    labels = {
        "single": ["x", "y", "z", "y"],
        "multi": [["x"], [], ["y", "z"], ["z"]],
        "regression": [1.0, -2.0, 0.5, 3.0],
    }
    task = task_of(model_directory, kind=kind)
    examples = examples_of(draw, labels[kind])
    task.learn(examples)
    model = model_of(task, model_directory)
    batch = pack(task.rows(examples, labelled=True), task.collate)
    loss, right = task.loss(model, batch)
    expected = model(batch.inputs, labels=batch.targets["labels"])
    torch.testing.assert_close(loss / task.targets(batch), expected.loss)
    if kind == "single":
        assert int(right) == int((expected.logits.argmax(1) == batch.targets["labels"]).sum())
        plain = F.cross_entropy(expected.logits, torch.tensor([0, 1, 2, 1]), reduction="sum")
        torch.testing.assert_close(loss, plain)
    outputs = task.outputs(model, batch)
    said = task.predictions(examples, batch.source, outputs)
    assert len(said) == 4
    json.dumps(said)
    if kind == "multi":
        chosen = [{task.labels[i] for i in range(3) if row[i] > 0} for row in expected.logits]
        assert [set(each["labels"]) for each in said] == chosen


@pytest.fixture
def rng_torch(seed):
    torch.manual_seed(seed)


def test_figures():
    task = Classification.__new__(Classification)
    task.config = FinetuneConfig()
    task.restore({"kind": "single", "labels": ["n", "p"], "early_exit": False})
    examples = [Example(HERE, "", None, label) for label in "pppnn"]
    said = [{"label": label} for label in "ppnnp"]
    figures = task.metrics(examples, said)
    # 2 of 3, 1 of 2; (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2)
    assert figures == pytest.approx({"accuracy": 0.6, "f1_macro": (2 / 3 + 1 / 2) / 2, "matthews": 1 / 6})
    task.restore({"kind": "regression", "labels": [], "early_exit": False})
    examples = [Example(HERE, "", None, value) for value in (1.0, 2.0, 4.0)]
    figures = task.metrics(examples, [{"score": value} for value in (1.0, 3.0, 5.0)])
    assert figures["spearman"] == pytest.approx(1)
    assert figures["mean_squared_error"] == pytest.approx(2 / 3)
    task.restore({"kind": "multi", "labels": ["a", "b"], "early_exit": False})
    examples = [Example(HERE, "", None, labels) for labels in (["a"], ["a", "b"], [])]
    figures = task.metrics(examples, [{"labels": labels} for labels in ({"a"}, {"a"}, {"b"})])
    assert figures["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert figures["accuracy"] == pytest.approx(1 / 3)
    task.restore({"kind": "multi", "labels": ["a"], "early_exit": False})
    examples = [Example(HERE, "", None, labels) for labels in (["a"], ["a"], [], [], [])]
    figures = task.metrics(examples, [{"labels": labels} for labels in ({"a"}, {}, {}, {}, {})])
    assert figures == pytest.approx({"f1": 2 / 3, "f1_macro": 2 / 3, "accuracy": 4 / 5})
    assert task.metrics(examples[2:], [{"labels": {}}] * 3)["f1"] == 0


@pytest.mark.parametrize(
    ("data", "lines", "message"),
    [
        ({}, "text\tlabel\na\t1\nb\t1\n", "line 2: all labels are '1'"),
        ({}, "text\tlabel\na\t \n", "line 2: the label is ' '"),
        ({"kind": "regression"}, "text\tlabel\na\t1\nb\tmany\n", "line 3: the label is 'many'; a number was expected"),
        ({"kind": "regression"}, "text\tlabel\na\tnan\n", "line 2: the label is 'nan'"),
        ({"pair": "other"}, "text\tlabel\na\t1\n", "no 'other'"),
        ({"kind": "multi"}, "text\tlabel\na\t\nb\t,\n", "a.tsv: no line has a label; .* in 'label'"),
    ],
    ids=["one_label", "empty", "number", "nan", "pair", "no_label"],
)
def test_bad_labels(data, lines, message, model_directory, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(lines)
    task = task_of(model_directory, **data)
    with pytest.raises(DataError, match=message):
        task.learn(task.read_all([str(path)]))


def test_a_label_that_training_does_not_have(model_directory, draw):
    task = task_of(model_directory)
    task.learn(examples_of(draw, ["x", "y"]))
    with pytest.raises(DataError, match=r"here, line 1: the label 'w' is not among those of the training data: x, y"):
        task.rows(examples_of(draw, ["w"]), labelled=True)


def test_the_loss_of_early_exits(model_directory, draw):
    """Heads that are alike after passes that are alike would all count: here each by its number."""
    config = FinetuneConfig(length=32, early_exit=True)
    task = Classification(config, AlbertTokenizer.from_pretrained(model_directory))
    examples = examples_of(draw, ["x", "y", "z", "y"])
    task.learn(examples)
    shape = AlbertConfig.from_pretrained(model_directory)
    task.configure(shape)
    model = task.model_class.from_pretrained(model_directory, config=shape).eval()
    batch = pack(task.rows(examples, labelled=True), task.collate)
    loss, _ = task.loss(model, batch)
    first, second = (
        F.cross_entropy(logits, batch.targets["labels"], reduction="sum") for logits in model.all_logits(batch.inputs)
    )
    torch.testing.assert_close(loss, (first + 2 * second) / 3)
    said = task.predictions(examples, batch.source, task.outputs(model, batch))
    assert [each["passes"] for each in said] == [2] * 4
    assert task.metrics(examples, said)["passes"] == 2


@pytest.mark.parametrize("early_exit", [False, True], ids=["one_head", "exits"])
def test_the_loss_of_r_drop(model_directory, draw, seed, early_exit):
    """Of the two answers that two draws of dropout give; without training there is one answer."""
    config = FinetuneConfig(length=32, early_exit=early_exit, r_drop=0.7)
    task = Classification(config, AlbertTokenizer.from_pretrained(model_directory))
    examples = examples_of(draw, ["x", "y", "z", "y"])
    task.learn(examples)
    shape = AlbertConfig.from_pretrained(model_directory)
    with pytest.raises(ValueError, match=r"r_drop is 0.7 and nothing is dropped"):
        task.configure(shape)
    shape.classifier_dropout_prob = 0.3
    task.configure(shape)
    model = task.model_class.from_pretrained(model_directory, config=shape).train()
    batch = pack(task.rows(examples, labelled=True), task.collate)
    torch.manual_seed(seed)
    loss, _ = task.loss(model, batch)
    torch.manual_seed(seed)
    draws = [model.all_logits(batch.inputs) if early_exit else model(batch.inputs).logits[None] for _ in range(2)]
    expected, weights = torch.zeros(()), torch.arange(1, len(draws[0]) + 1) / sum(range(1, len(draws[0]) + 1))
    for weight, *both in zip(weights, *draws, strict=True):
        p, q = (logits.softmax(1) for logits in both)
        entropies = sum(F.cross_entropy(logits, batch.targets["labels"], reduction="sum") for logits in both)
        divergence = (p * (p / q).log()).sum() + (q * (q / p).log()).sum()
        expected = expected + weight * (entropies + 0.7 * divergence) / 2
    torch.testing.assert_close(loss, expected)
    model.eval()
    once = FinetuneConfig(length=32, early_exit=early_exit)
    without = Classification(once, task.tokenizer, task.state())
    torch.testing.assert_close(task.loss(model, batch)[0], without.loss(model, batch)[0])
    assert task.flops(shape, batch) == 2 * without.flops(shape, batch)


def test_texts_and_pairs_are_not_mixed(model_directory):
    task = task_of(model_directory)
    mixed = [Example(HERE, "a film", None, None), Example(HERE, "a film", "a story", None)]
    for examples in (mixed, mixed[::-1]):
        with pytest.raises(DataError, match="a text and a pair of texts are mixed"):
            task.rows(examples, labelled=False)


def test_lines_fit_the_model(model_directory):
    """A pair is none of a model of single texts, and its texts are none of a model of pairs."""
    single, pairs = task_of(model_directory), task_of(model_directory, pair="other")
    assert single.from_line(HERE, "a film").pair is None
    example = pairs.from_line(HERE, "a film\ta story")
    assert (example.text, example.pair) == ("a film", "a story")
    with pytest.raises(DataError, match="here, line 1: it has a tab, and the model takes single texts"):
        single.from_line(HERE, "good\ta film")
    for line in ("a film", "good\ta film\ta story"):
        with pytest.raises(DataError, match=r"here, line 1: it has \d tabs, and the model takes pairs"):
            pairs.from_line(HERE, line)
