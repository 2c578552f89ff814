"""Multiple choice: rows of several sequences, any number of choices, a softmax over each question's."""

import json
from pathlib import Path

import pytest
import torch

from albert_fast import AlbertForMultipleChoice
from albert_fast.finetuning.choice import Choice, Question
from albert_fast.finetuning.config import DataOptions, FinetuneConfig
from albert_fast.finetuning.reading import DataError, Place
from albert_fast.finetuning.rows import pack
from albert_fast.tokenizer import AlbertTokenizer

from .conftest import sentence

HERE = Place(Path("here"), 1)


def task_of(directory, length=48) -> Choice:
    return Choice(FinetuneConfig(length=length), AlbertTokenizer.from_pretrained(directory))


def question(draw, choices: int, label: int | None) -> Question:
    texts = tuple(sentence(draw, bool(i % 2)) for i in range(choices))
    return Question(HERE, sentence(draw, True), "what was it", texts, label)


def test_each_choice_is_a_sequence(model_directory, draw):
    task = task_of(model_directory, length=24)
    (row,) = task.rows([question(draw, 3, 1)], labelled=True)
    assert len(row.sizes) == 3
    assert sum(row.sizes) == len(row.input_ids) == len(row.token_type_ids)
    for ids, types in row.sequences:
        assert len(ids) == len(types) <= 24
        assert (ids[0], ids[-1]) == (task.tokenizer.cls_token_id, task.tokenizer.sep_token_id)
        assert ids.count(task.tokenizer.sep_token_id) == 2
        assert types.index(1) == ids.index(task.tokenizer.sep_token_id) + 1


def test_what_is_kept_of_a_long_context(model_directory):
    """Its beginning; or what is around the choice, where most of the question is; without the choice, most of both."""
    context, asked, chosen = list(range(100, 140)), [9], [7, 8]
    context[3:5] = context[28:30] = chosen
    context[25] = asked[0]
    task = task_of(model_directory)
    assert task._cut(context, 13, asked, chosen) == context[:13]
    config = FinetuneConfig(length=48, data=DataOptions(cut="around"))
    task = Choice(config, task.tokenizer)
    assert task._cut(context, 13, asked, chosen) == context[23:36]
    assert task._cut(context, 40, asked, chosen) == context
    found = task._cut(context, 13, asked, [7, 9])
    assert len(found) == 13
    assert {7, 9} <= set(found)
    (row,) = task.rows([Question(HERE, "the film was great " * 30, "dull", ("actor", "great"), 0)], labelled=True)
    assert [len(ids) for ids, _ in row.sequences] == [48, 48]


def test_losses_are_the_models(model_directory, draw):
    """With as many choices each, padded to [batch, choices, seq], the model's own head gives the same."""
    task = task_of(model_directory)
    examples = [question(draw, 4, label) for label in (2, 0, 3)]
    model = AlbertForMultipleChoice.from_pretrained(model_directory).eval()
    rows = task.rows(examples, labelled=True)
    batch = pack(rows, task.collate)
    loss, right = task.loss(model, batch)
    most = max(size for row in rows for size in row.sizes)
    ids, types, mask = (torch.zeros(3, 4, most, dtype=torch.long) for _ in range(3))
    for i, row in enumerate(rows):
        for j, (a, b) in enumerate(row.sequences):
            ids[i, j, : len(a)], types[i, j, : len(a)], mask[i, j, : len(a)] = torch.tensor(a), torch.tensor(b), 1
    expected = model(ids, mask, types, labels=torch.tensor([2, 0, 3]))
    torch.testing.assert_close(loss / 3, expected.loss)
    assert int(right) == int((expected.logits.argmax(1) == torch.tensor([2, 0, 3])).sum())


def test_questions_of_different_numbers_of_choices(model_directory, draw):
    task = task_of(model_directory)
    examples = [question(draw, count, count - 1) for count in (2, 5, 3)]
    model = AlbertForMultipleChoice.from_pretrained(model_directory).eval()
    together = pack(task.rows(examples, labelled=True), task.collate)
    loss, _ = task.loss(model, together)
    alone = [task.loss(model, pack(task.rows([example], labelled=True), task.collate))[0] for example in examples]
    torch.testing.assert_close(loss, sum(alone))
    said = task.predictions(examples, together.source, task.outputs(model, together))
    assert [len(each["probabilities"]) for each in said] == [2, 5, 3]
    assert all(sum(each["probabilities"]) == pytest.approx(1) for each in said)
    right = sum(each["label"] == example.label for each, example in zip(said, examples, strict=True))
    assert task.metrics(examples, said) == {"accuracy": right / 3}


def test_files(model_directory, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        {"context": "c", "question": "q", "choices": ["x", "y"], "label": "B"},
        {"choices": ["x", "y"], "label": 0},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = task_of(model_directory)
    assert [(e.context, e.choices, e.label) for e in task.read_all([str(path)])] == [
        ("c", ("x", "y"), 1),
        ("", ("x", "y"), 0),
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"choices": ["x"], "label": 0}, "a list of at least two texts"),
        ({"choices": "xy", "label": 0}, "a list of at least two texts"),
        ({"choices": ["x", "y"], "label": 2}, "the label is 2; 0 to 1"),
        ({"choices": ["x", "y"], "label": "C"}, "the label is 'C'|the label is 2"),
        ({"choices": ["x", "y"]}, "there is no 'label'"),
    ],
    ids=["one", "text", "number", "letter", "none"],
)
def test_bad_files(entry, message, model_directory, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(entry))
    with pytest.raises(DataError, match=message):
        task_of(model_directory).read_all([str(path)])
