"""A label for each word: where it is read, long sentences, and strict entity figures."""

from pathlib import Path

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForTokenClassification
from albert_fast.finetuning.config import FinetuneConfig
from albert_fast.finetuning.reading import DataError, Place, Sentence
from albert_fast.finetuning.rows import pack
from albert_fast.finetuning.tagging import Tagging, scheme_of
from albert_fast.tokenizer import AlbertTokenizer

from .conftest import BAD, GOOD, OTHER

HERE = Place(Path("here"), 1)


def task_of(directory, length=32) -> Tagging:
    return Tagging(FinetuneConfig(length=length), AlbertTokenizer.from_pretrained(directory))


def sentences(draw, count: int) -> list[Sentence]:
    found = []
    for _ in range(count):
        words = draw.choices([*GOOD, *BAD, *OTHER, "unheardof"], k=draw.randint(1, 40))
        found.append(Sentence(HERE, words, ["G" if word in GOOD else "B" if word in BAD else "N" for word in words]))
    return found


def test_labels_stand_at_first_pieces(model_directory, draw):
    task, examples = task_of(model_directory, length=24), sentences(draw, 30)
    task.learn(examples)
    assert task.labels == ["B", "G", "N"]
    rows = task.rows(examples, labelled=True)
    assert len(rows) > 30  # long ones became several
    seen = [{} for _ in examples]
    for row in rows:
        assert len(row.input_ids) == len(row.token_type_ids) == len(row.target) <= 24
        assert (row.input_ids[0], row.input_ids[-1]) == (task.tokenizer.cls_token_id, task.tokenizer.sep_token_id)
        assert sum(label != -100 for label in row.target) == len(row.extra)
        for place, word in row.extra:
            pieces = task.tokenizer.encode(examples[row.example].words[word], add_special_tokens=False)
            assert row.input_ids[place : place + len(pieces)] == pieces
            seen[row.example][word] = task.labels[row.target[place]]
    for example, labels in zip(examples, seen, strict=True):
        assert [labels[i] for i in range(len(example.words))] == example.labels


def test_what_is_said_is_what_the_model_says(model_directory, draw):
    task, examples = task_of(model_directory), sentences(draw, 7)
    task.learn(examples)
    config = AlbertConfig.from_pretrained(model_directory)
    task.configure(config)
    assert config.id2label == {0: "B", 1: "G", 2: "N"}
    model = AlbertForTokenClassification.from_pretrained(model_directory, config=config).eval()
    rows = task.rows(examples, labelled=True)
    batch = pack(rows, task.collate)
    loss, right = task.loss(model, batch)
    expected = model(batch.inputs, labels=batch.targets["labels"])
    torch.testing.assert_close(loss / task.targets(batch), expected.loss)
    said = task.predictions(examples, rows, task.outputs(model, batch))
    hits = sum(a == b for e, p in zip(examples, said, strict=True) for a, b in zip(e.labels, p["labels"], strict=True))
    assert hits == int(right)
    assert task.metrics(examples, said)["accuracy"] == pytest.approx(hits / task.targets(batch))


def test_a_word_longer_than_a_row(model_directory):
    task = task_of(model_directory, length=8)
    word = "quite" * 9
    example = Sentence(HERE, ["a", word, "film"], ["X", "Y", "X"])
    task.learn([example])
    rows = task.rows([example], labelled=True)
    assert [word for row in rows for _, word in row.extra] == [0, 1, 2]
    assert all(len(row.input_ids) <= 8 for row in rows)


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (["O", "B-a", "I-a"], "BIO"),
        (["O", "B-a", "E-a", "S-b"], "BIOES"),
        (["NOUN", "VERB"], None),
        (["O", "NOUN-x"], None),
        (["B-a", "I-a"], None),
    ],
    ids=["bio", "bioes", "words", "other", "no_o"],
)
def test_schemes(labels, scheme):
    assert scheme_of(labels) == scheme


def test_entities_are_counted_strictly(model_directory):
    """One of two found, one of three said is right: an I without its B is none."""
    task = task_of(model_directory)
    task.restore({"labels": ["B-a", "B-b", "I-a", "I-b", "O"]})
    assert task.best == "f1"
    wanted = [["B-a", "I-a", "O", "B-b", "O"]]
    said = [["B-a", "I-a", "B-a", "I-b", "B-b"]]
    examples = [Sentence(HERE, list("vwxyz"), labels) for labels in wanted]
    figures = task.metrics(examples, [{"labels": labels} for labels in said])
    assert figures["recall"] == pytest.approx(1 / 2)
    assert figures["precision"] == pytest.approx(1 / 3)
    assert figures["f1"] == pytest.approx(2 / 5)
    assert figures["accuracy"] == pytest.approx(2 / 5)


def test_iob1_is_refused(model_directory):
    """Where B- only parts neighbors; but some entities that begin with I- are noise, as in real files."""
    task = task_of(model_directory)
    noise = Sentence(HERE, ["a", "b", "c", "d", "e"], ["B-x", "O", "I-x", "B-x", "I-y"], (1, 2, 3, 4, 5))
    good = [noise, Sentence(HERE, ["a"], ["B-y"], (7,))]
    task.learn(good)
    assert task.scheme == "BIO"
    assert len(task.rows(good, labelled=True)) == 2
    there = Place(Path("there"), 1)
    old = [Sentence(there, ["a", "b", "c"], ["I-x", "I-x", "O"], (1, 2, 3)), Sentence(there, ["d"], ["I-y"], (5,))]
    for examples in (old, [*good * 9, *old]):  # one file of several, or to evaluate on
        with pytest.raises(DataError, match=r"there, line 1: entities begin with I- \(IOB1\)"):
            task.rows(examples, labelled=True)
    assert len(task.rows(old, labelled=False)) == 2
    task.learn([*old, Sentence(there, ["a", "b"], ["I-x", "B-x"], (7, 8))])
    with pytest.raises(DataError, match="IOB1"):
        task.rows(old, labelled=True)


def test_a_label_that_is_not_known_is_named_with_its_line(model_directory):
    task = task_of(model_directory)
    task.learn([Sentence(HERE, ["a", "b"], ["X", "Y"])])
    with pytest.raises(DataError, match=r"here, line 9: the label 'Z' is not among"):
        task.rows([Sentence(HERE, ["a", "b"], ["X", "Z"], (8, 9))], labelled=True)
