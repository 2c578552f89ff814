"""Multiple choice: rows of several sequences, any number of choices, a softmax over each question's."""

import json
from pathlib import Path

import pytest
import torch

from albert_fast import AlbertForMultipleChoice
from albert_fast.finetuning.choice import Choice, Question, sentence_of
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


def test_the_sentence_of_a_choice():
    context = "The dull film was long. Was it great? A dull actor was in the story. The end."
    assert sentence_of(context, "great", "the film") == "Was it great?"
    assert sentence_of(context, "dull", "who was in the story") == "A dull actor was in the story."
    assert sentence_of(context, "dull", "which film") == "The dull film was long."
    assert sentence_of(context, "the last end", "what") == "The end."
    assert sentence_of("", "x", "y") == ""


def test_what_is_read_of_a_context(model_directory):
    """The beginning, or a sentence; of a long one what is around the choice."""
    config = FinetuneConfig(length=20, data=DataOptions(passage="sentence"))
    task = Choice(config, AlbertTokenizer.from_pretrained(model_directory))
    encode = lambda text: task.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    example = Question(HERE, "The film was fine. " + "A story " * 20 + "great " + "a scene " * 20, "film", ("fine",), 0)
    assert task._context(example, "fine", 15) == encode("The film was fine.")[:15]
    kept = task._context(example, "great", 9)
    assert len(kept) == 9
    assert encode("great")[0] in kept
    plain = task_of(model_directory, length=20)
    assert plain._context(example, "great", 15) == encode(example.context)[:15]


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
        {"question": "q", "choices": ["x", "y"], "label": 0.0},
        {"context": None, "question": "q", "choices": ["x", "y"], "label": "1"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = task_of(model_directory)
    assert [(e.context, e.choices, e.label) for e in task.read_all([str(path)])] == [
        ("c", ("x", "y"), 1),
        ("", ("x", "y"), 0),
        ("", ("x", "y"), 1),
    ]


@pytest.mark.parametrize(
    ("columns", "entry", "message"),
    [
        ({"context": "contxt"}, {"context": "c", "question": "q"}, "no 'contxt'; it has .*'context', 'question': name"),
        ({"question": "asked"}, {"context": "c"}, "no 'asked'; .*data.question=null"),
        ({}, {"article": "c", "question": "q"}, "no 'context'; it has .*'article', 'question': .*data.context=null"),
        ({}, {}, "no 'context'"),
        ({"context": None}, {}, "no 'question'"),
        ({"context": None}, {"article": "c", "question": "q"}, None),
        ({"context": None, "question": None}, {}, None),
        ({}, {"context": "c"}, None),
    ],
    ids=["misspelt", "question", "race", "neither", "no_question", "no_context", "choices_alone", "default"],
)
def test_columns_that_are_missing(columns, entry, message, model_directory, tmp_path):
    """What is not there is not read as empty, but where that is what was meant."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"choices": ["x", "y"], "label": "A", **entry}))
    config = FinetuneConfig(data=DataOptions(**columns))
    task = Choice(config, AlbertTokenizer.from_pretrained(model_directory))
    if message is None:
        assert len(task.read_all([str(path)])) == 1
        return
    with pytest.raises(DataError, match=f"line 1: there is {message}"):
        task.read_all([str(path)])


def test_styles(model_directory, tmp_path):
    """RACE's lines, with a gap for the choice; SWAG's columns."""
    race, swag = tmp_path / "a.jsonl", tmp_path / "b.csv"
    entry = {"article": "the film", "question": "it was _ .", "options": ["fine", "dull"], "answer": "B"}
    race.write_text(json.dumps(entry))
    swag.write_text("sent1,sent2,ending0,ending1,label\nthe film,it was,fine,dull,0\n")
    tokenizer = AlbertTokenizer.from_pretrained(model_directory)
    texts = []
    for path, columns in (
        (race, {"context": "article", "choices": "options", "label": "answer"}),
        (swag, {"context": "sent1", "question": "sent2", "choices": "ending0,ending1"}),
    ):
        task = Choice(FinetuneConfig(length=32, data=DataOptions(**columns)), tokenizer)
        examples = task.read_all([str(path)])
        (row,) = task.rows(examples, labelled=True)
        texts.append((row.target, [ids[types.index(1) : -1] for ids, types in row.sequences]))
    said = lambda *lines: [tokenizer.encode(line, add_special_tokens=False) for line in lines]  # noqa: E731
    assert texts == [(1, said("it was fine .", "it was dull .")), (0, said("it was fine", "it was dull"))]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"choices": ["x"], "label": 0}, "a list of at least two texts"),
        ({"choices": "xy", "label": 0}, "a list of at least two texts"),
        ({"choices": ["x", "y"], "label": 2}, "the label is 2; 0 to 1"),
        ({"choices": ["x", "y"], "label": 0.9}, "the label is 0.9; a whole number"),
        ({"choices": ["x", "y"], "label": "C"}, "the label is 'C'|the label is 2"),
        ({"choices": ["x", "y"]}, "there is no 'label'"),
        ({"choices": ["x", "y"], "label": 0, "context": ["z"]}, "'context' is .*; a text was expected"),
    ],
    ids=["one", "text", "number", "share", "letter", "none", "context"],
)
def test_bad_files(entry, message, model_directory, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(entry))
    with pytest.raises(DataError, match=message):
        task_of(model_directory).read_all([str(path)])
