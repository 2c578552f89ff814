"""Questions and answers: windows, targets, the best span by hand, and the official figures."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForQuestionAnswering
from albert_fast.finetuning.answering import (
    MOST_ANSWER,
    Answering,
    Question,
    _best_spans,
    _window_starts,
    normalize,
    scores_of,
)
from albert_fast.finetuning.config import DataOptions, FinetuneConfig
from albert_fast.finetuning.reading import DataError, Place
from albert_fast.finetuning.rows import pack
from albert_fast.tokenizer import AlbertTokenizer

from .conftest import GOOD, sentence

HERE = Place(Path("here"), 1)


def task_of(directory, length=32, stride=8, **data) -> Answering:
    return Answering(
        FinetuneConfig(length=length, data=DataOptions(stride=stride, **data)),
        AlbertTokenizer.from_pretrained(directory),
    )


def questions(draw, count: int) -> list[Question]:
    """With long contexts; every fourth has no answer."""
    found = []
    for number in range(count):
        context = " ".join(sentence(draw, bool(i % 2)) for i in range(draw.randint(1, 12)))
        words = [word for word in context.split() if word in GOOD]
        answer = draw.choice(words) if words and number % 4 else None
        start = 0 if answer is None else context.index(answer)
        texts = () if answer is None else (answer,)
        found.append(Question(HERE, str(number), "what was the film", context, texts, start))
    return found


def model_of(directory) -> AlbertForQuestionAnswering:
    return AlbertForQuestionAnswering.from_pretrained(directory, config=AlbertConfig.from_pretrained(directory)).eval()


def test_windows(model_directory, draw):
    """Each token of the context is one window's own; the answer stands where the target says."""
    task, examples = task_of(model_directory), questions(draw, 24)
    task.learn(examples)
    assert task.nulls
    rows = task.rows(examples, labelled=True)
    assert len(rows) > 40
    for number, example in enumerate(examples):
        mine = [row for row in rows if row.example == number]
        spans = task.tokenizer(example.context, return_offsets_mapping=True)["offset_mapping"][1:-1]
        assert sorted(t.characters for row in mine for t in row.extra[0] if t.first) == sorted(spans)
        for row in mine:  # all of the context that is in the row can end an answer
            assert [t.column for t in row.extra[0]] == list(range(row.token_type_ids.index(1), len(row.input_ids) - 1))
        held = 0
        for row in mine:
            assert len(row.input_ids) == len(row.token_type_ids) <= 32
            start, end = row.target[0]
            if (start, end) == (0, 0):
                continue
            held += 1
            said = task.tokenizer.decode(row.input_ids[start : end + 1])
            assert said == example.answers[0]
        assert (held > 0) == bool(example.answers)


def test_losses_are_the_models(model_directory, draw):
    task, examples = task_of(model_directory), questions(draw, 5)
    task.learn(examples)
    model, rows = model_of(model_directory), task.rows(examples, labelled=True)
    batch = pack(rows, task.collate)
    loss, _ = task.loss(model, batch)
    torch.testing.assert_close(loss / batch.rows, model(batch.inputs, **batch.targets).loss)


def test_a_softmax_over_all_windows(model_directory, draw):
    """Of a question: loss and hits by hand, from what the model says of each window; and it answers as before."""
    examples = questions(draw, 12)
    apart, together = (task_of(model_directory, normalize=normalize) for normalize in ("window", "question"))
    model = model_of(model_directory)
    for task in (apart, together):
        task.learn(examples)
    windows, rows = apart.rows(examples, labelled=True), together.rows(examples, labelled=True)
    assert len(rows) == len(examples) < len(windows)
    batch = pack(rows, together.collate)
    assert together.targets(batch) == len(examples)
    loss, right = together.loss(model, batch)
    (gradient,) = torch.autograd.grad(loss, model.qa_outputs.weight)
    assert gradient.any()
    outputs = model(pack(windows, apart.collate).inputs)
    expected, hits = 0.0, 0
    for number in range(len(examples)):
        mine = [i for i, window in enumerate(windows) if window.example == number]
        answered = any(windows[i].target != [(0, 0)] for i in mine)
        found = True
        for side, scores in enumerate((outputs.start_logits, outputs.end_logits)):
            wanted = [(i, windows[i].target[0][side]) for i in mine]
            wanted = [(i, place) for i, place in wanted if place > 0 or not answered]
            every = [(float(score), (i, place)) for i in mine for place, score in enumerate(scores[i])]
            total = sum(math.exp(score) for score, _ in every)
            expected -= math.log(sum(math.exp(scores[i, place]) for i, place in wanted) / total) / 2
            found &= max(every)[1] in wanted
        hits += found
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert int(right) == hits
    said = [
        task.predictions(examples, each, task.outputs(model, pack(each, task.collate)))
        for task, each in ((apart, windows), (together, rows))
    ]
    for one, other in zip(*said, strict=True):
        assert one["answer"] == other["answer"]
        assert one["null_score"] == pytest.approx(other["null_score"], abs=1e-4)


def test_the_originals_head_has_its_own_rule():
    with pytest.raises(ValueError, match=r"data\.normalize=question is for data\.head=plain"):
        DataOptions(normalize="question", head="v2")


def test_the_best_span_is_found(model_directory, draw):
    """Against a search through all spans of all windows."""
    task, examples = task_of(model_directory), questions(draw, 8)
    task.learn(examples)
    model, rows = model_of(model_directory), task.rows(examples, labelled=True)
    batch = pack(rows, task.collate)
    said = task.predictions(examples, rows, task.outputs(model, batch))
    with torch.no_grad():
        outputs = model(batch.inputs)
    for number, example in enumerate(examples):
        best, null = (-1e9, ""), 1e9
        for i, row in enumerate(rows):
            if row.example != number:
                continue
            starts, ends = outputs.start_logits[i], outputs.end_logits[i]
            null = min(null, float(starts[0] + ends[0]))
            for x, (a, (begin, _), first) in enumerate(row.extra[0]):
                for b, (_, end), _ in row.extra[0][x : x + MOST_ANSWER] if first else []:
                    best = max(best, (float(starts[a] + ends[b]), example.context[begin:end]))
        assert said[number]["candidates"][0]["score"] == pytest.approx(best[0], abs=1e-5)
        assert said[number]["null_score"] == pytest.approx(null - best[0], abs=1e-5)
        assert said[number]["answer"] == ("" if null > best[0] else best[1])
    json.dumps(said)


def test_the_threshold(model_directory, draw):
    examples = questions(draw, 8)
    model = model_of(model_directory)
    for threshold, empty in ((1e6, 0), (-1e6, 8)):
        task = task_of(model_directory, null_threshold=threshold)
        task.learn(examples)
        rows = task.rows(examples, labelled=False)
        said = task.predictions(examples, rows, task.outputs(model, pack(rows, task.collate)))
        assert sum(each["answer"] == "" for each in said) == empty


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("The Cat!", ["cat"], (1, 1)),
        ("a black cat", ["the cat", "dog"], (0, 2 / 3)),
        ("", [], (1, 1)),
        ("cat", [], (0, 0)),
        ("", ["cat"], (0, 0)),
        ("cat cat", ["cat"], (0, 2 / 3)),
        ("the", ["the"], (1, 1)),
    ],
    ids=["equal", "best", "none", "too_much", "too_little", "twice", "article"],
)
def test_the_official_figures(said, answers, expected):
    assert scores_of(said, answers) == pytest.approx(expected)


def test_normalize():
    assert normalize("  An apple, a  day: THE end. ") == "apple day end"


def test_figures(model_directory):
    task = task_of(model_directory)
    examples = [Question(HERE, "1", "", "", ("cat",)), Question(HERE, "2", "", "", ()), Question(HERE, "3", "", "", ())]
    figures = task.metrics(examples, [{"answer": "cat food"}, {"answer": ""}, {"answer": "x"}])
    assert figures == pytest.approx(
        {
            "exact_match": 1 / 3,
            "f1": (2 / 3 + 1) / 3,
            "exact_match_answerable": 0,
            "f1_answerable": 2 / 3,
            "no_answer": 2 / 3,
        }
    )


@pytest.mark.parametrize(("size", "room", "stride"), [(150, 113, 128), (300, 113, 40), (10, 20, 5), (41, 20, 20)])
def test_windows_begin_a_stride_apart(size, room, stride):
    starts = _window_starts(size, room, stride)
    assert starts == [number * min(stride, room) for number in range(len(starts))]
    assert starts[-1] + room >= size
    assert len(starts) == 1 or starts[-2] + room < size


def test_an_answer_across_windows(model_directory):
    """Its first token is one window's own, and its last the next one's."""
    task = task_of(model_directory, length=24, stride=8)
    context = " ".join(["film"] * 40)
    example = Question(HERE, "1", "the film", context, (), 0)
    task.learn([example])
    rows = task.rows([example], labelled=False)
    (shown,) = rows[1].extra
    last_own = [token.first for token in shown].index(False, 8) - 1
    starts, ends = torch.zeros(24), torch.zeros(24)
    starts[shown[last_own].column] = ends[shown[last_own + 2].column] = 5.0
    (score, begin, end), *_ = _best_spans(shown, starts, ends)[0]
    assert score == 10
    assert (begin, end) == (shown[last_own].characters[0], shown[last_own + 2].characters[1])


def test_no_room_for_the_paragraph(model_directory):
    task = task_of(model_directory, length=8)
    example = Question(HERE, "1", "what was the film with the actor", "the film", ("film",), 4)
    task.learn([example])
    with pytest.raises(DataError, match=r"here.*its question has \d+ tokens and leaves no room"):
        task.rows([example], labelled=True)


def squad(tmp_path, answer, **entry) -> Path:
    qa = {"id": "q7", "question": "who?", "answers": [answer], **entry}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "it was Ada.", "qas": [qa]}]}]}))
    return path


def test_files(model_directory, tmp_path):
    task = task_of(model_directory)
    (example,) = task.read_all([str(squad(tmp_path, {"text": "Ada", "answer_start": 7}))])
    assert (example.id, example.answers, example.start) == ("q7", ("Ada",), 7)
    (example,) = task.read_all([str(squad(tmp_path, {"text": "Ada", "answer_start": 7}, is_impossible=True))])
    assert example.answers == ()
    with pytest.raises(DataError, match=r"question q7: the answer 'Ada' is to begin at character 6, where ' Ad'"):
        task.read_all([str(squad(tmp_path, {"text": "Ada", "answer_start": 6}))])
    with pytest.raises(DataError, match=r"question q7: .*KeyError\('answer_start'\)"):
        task.read_all([str(squad(tmp_path, {"text": "Ada"}))])
    path = squad(tmp_path, {})
    path.write_text(path.read_text().replace('"answers"', '"said"'))
    with pytest.raises(DataError, match=r"question q7: it has neither 'answers' nor 'is_impossible'"):
        task.read_all([str(path)])
    assert len(task.read_all([str(path)], labelled=False)) == 1
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="is not SQuAD's JSON"):
        task.read_all([str(tmp_path / "a.json")])


def test_files_as_others_write_them(model_directory, tmp_path):
    """With a byte order mark, and compressed."""
    task = task_of(model_directory)
    path = squad(tmp_path, {"text": "Ada", "answer_start": 7})
    content = b"\xef\xbb\xbf" + path.read_bytes()
    path.write_bytes(content)
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(content))
    assert [e.id for e in task.read_all([str(path), str(packed)])] == ["q7", "q7"]


@pytest.mark.parametrize("question", [None, 7, ["who?"]])
def test_a_question_that_is_no_text(question, model_directory, tmp_path):
    with pytest.raises(DataError, match=r"question q7: its question is .*; a text was expected"):
        task_of(model_directory).read_all([str(squad(tmp_path, {}, question=question))], labelled=False)


def test_the_originals_head(model_directory, draw):
    """Its own logit decides whether there is an answer; what it says stands in the context."""
    task, examples = task_of(model_directory, head="v2"), questions(draw, 8)
    task.learn(examples)
    model = task.model_class.from_pretrained(model_directory).eval()
    rows = task.rows(examples, labelled=True)
    batch = pack(rows, task.collate)
    loss, _ = task.loss(model, batch)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    said = task.predictions(examples, rows, task.outputs(model, batch))
    for each, example in zip(said, examples, strict=True):
        assert (each["answer"] == "") == (each["null_score"] > 0)
        assert all(candidate["text"] in example.context for candidate in each["candidates"])
    again = type(task)(task.config, task.tokenizer, task.state())
    assert again.model_class is task.model_class
