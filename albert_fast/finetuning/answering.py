"""Questions about a paragraph: where the answer begins and ends, or that there is none (SQuAD v1 and v2).

A paragraph that does not fit a row becomes windows, the next one `data.stride` tokens further (google-research/albert,
squad_utils.py: question at most 64 tokens, answer at most 30, stride 128, 20 candidates). A window without the whole
answer has its target at [CLS], and so has a question without one; over the windows the best span wins, and v2's null
score is the least that any window gives [CLS]. An answer may begin at a token only in the window where the token has
the most context on both sides.

With data.normalize=question one softmax goes over all windows of a question, and the answer is to win against every
other token of all of them (shared normalization, Clark & Gardner 2018): a window without it teaches where it is not,
and [CLS] is the target of questions alone that have none.

Figures are the official script's: exact match and F1 of the words of the best of the given answers, lower-cased,
without articles and punctuation.
"""

from __future__ import annotations

import collections
import json
import math
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.reading import DataError, Place, read_lines
from albert_fast.finetuning.rows import Batch, Row
from albert_fast.finetuning.task import Task
from albert_fast.heads import AlbertForQuestionAnswering
from albert_fast.span_head import AlbertForSpanQuestionAnswering

MOST_QUESTION, MOST_ANSWER, CANDIDATES = 64, 30, 20


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        answers: the texts that are right; none where the paragraph has no answer.
        start: the character of the context at which the first of them begins.
    """

    place: Place
    id: str
    question: str
    context: str
    answers: tuple[str, ...] = ()
    start: int = 0


class Shown(NamedTuple):
    """A token of the context in a window.

    Attributes:
        column: of the row.
        characters: of the context, from and to.
        first: whether an answer may begin here: in this window, and in no other.
    """

    column: int
    characters: tuple[int, int]
    first: bool


class Answering(Task):
    """See this file's docstring.

    Attributes:
        nulls: whether there are questions without an answer (v2).
    """

    name = "answering"
    best = "f1"
    model_class: Any = AlbertForQuestionAnswering
    nulls = False
    head = "plain"

    # ------------------------------------------------------------------------------------------------------- the data

    def read(self, path: Path, *, labelled: bool) -> Iterator[Question]:
        """SQuAD's JSON. An answer that does not stand where it says is an error."""
        text = "\n".join(line for _, line in read_lines(path))
        try:
            articles = json.loads(text)["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not SQuAD's JSON, an object with 'data': {error!r}") from None
        place = Place(path, "the first article")
        try:
            for article in articles:
                for paragraph in article["paragraphs"]:
                    place = Place(path, f"the paragraph {paragraph['context'][:40]!r}")
                    for entry in paragraph["qas"]:
                        place = Place(path, f"question {entry['id']}")
                        yield _question(place, paragraph["context"], entry, labelled)
        except (KeyError, TypeError, AttributeError) as error:
            place.refuse(f"there, or behind it, something is not as in SQuAD's JSON: {error!r}")

    def from_line(self, place: Place, line: str) -> Question:
        """A question and a context, apart by a tab."""
        question, tab, context = line.partition("\t")
        if not tab:
            place.refuse("a question and a text, with a tab between them, were expected")
        return Question(place, str(place.line), question, context)

    def learn(self, examples: Sequence[Question]) -> None:
        nulls = any(not example.answers for example in examples)
        self.restore({"nulls": nulls, "head": self.data.head})

    def state(self) -> dict[str, Any]:
        return {"nulls": self.nulls, "head": self.head}

    def restore(self, state: dict[str, Any]) -> None:
        self.nulls, self.head = state["nulls"], state["head"]
        self.model_class = AlbertForQuestionAnswering if self.head == "plain" else AlbertForSpanQuestionAnswering

    def rows(self, examples: Sequence[Question], *, labelled: bool) -> list[Row]:
        """A row for each window; with data.normalize=question one for each question, with a sequence for each window.
        `target` and `extra` have an entry for each sequence."""
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows: list[Row] = []
        for number, example in enumerate(examples):
            question = self.tokenizer.encode(example.question, add_special_tokens=False)[:MOST_QUESTION]
            encoded = self.tokenizer(example.context, add_special_tokens=False, return_offsets_mapping=True)
            context, spans = encoded["input_ids"], encoded["offset_mapping"]
            answer = _tokens_of(example, spans) if labelled and example.answers else None
            size, room = len(context), self.length - len(question) - 3
            before = len(question) + 2
            if room < 1:
                example.place.refuse(
                    f"its question has {len(question)} tokens and leaves no room for the paragraph: raise length, "
                    f"{self.length}"
                )
            starts = _window_starts(size, room, self.data.stride)
            windows = []
            for start in starts:
                end = min(start + room, size)
                row = [cls, *question, sep, *context[start:end], sep]
                types = [0] * before + [1] * (end - start + 1)
                inside = answer is not None and start <= answer[0] and answer[1] < end
                target = tuple(place - start + before for place in answer) if inside and answer else (0, 0)
                shown = [
                    Shown(place - start + before, spans[place], _best_window(place, starts, room, size) == start)
                    for place in range(start, end)
                ]
                windows.append(Row(row, types, [target] if labelled else None, number, [shown]))
            rows += [_joined(windows)] if self.data.normalize == "question" else windows
        return rows

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        starts, ends = zip(*(target for row in rows for target in row.target), strict=True)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}

    # ------------------------------------------------------------------------------------------------------ the model

    def configure(self, config: AlbertConfig) -> None:
        config.num_labels = 2

    def targets(self, batch: Batch) -> int:
        return batch.rows

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        start, end = batch.targets["start_positions"], batch.targets["end_positions"]
        if isinstance(model, AlbertForSpanQuestionAnswering):
            return model.losses(batch.inputs, start, end, start == 0)
        outputs = model(batch.inputs)
        starts, ends = outputs.start_logits.float(), outputs.end_logits.float()
        windows = [len(row.extra) for row in batch.source]
        loss_of_start, right_start = _over_windows(starts, start, windows)
        loss_of_end, right_end = _over_windows(ends, end, windows)
        return (loss_of_start + loss_of_end) / 2, (right_start & right_end).sum()

    # -------------------------------------------------------------------------------------------------- what it says

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The best spans of each row, as (score, start, end) in characters, and the score of [CLS]."""
        if isinstance(model, AlbertForSpanQuestionAnswering):
            return _read_spans(model, batch)
        outputs = model(batch.inputs)
        starts, ends = outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()
        said, scores = [], zip(starts, ends, strict=True)
        for row in batch.source:
            found = [_best_spans(shown, *next(scores)) for shown in row.extra]
            said.append(([span for spans, _ in found for span in spans], min(null for _, null in found)))
        return said

    def predictions(self, examples: Sequence[Question], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        spans: list[list[Any]] = [[] for _ in examples]
        nulls = [float("inf")] * len(examples)
        for row, (found, null) in zip(rows, outputs, strict=True):
            spans[row.example] += found
            nulls[row.example] = min(nulls[row.example], null)
        said = []
        for example, found, null in zip(examples, spans, nulls, strict=True):
            best = sorted(found, reverse=True)[:CANDIDATES]
            texts = [{"text": example.context[a:b], "score": score} for score, a, b in best]
            answer = texts[0]["text"] if texts else ""
            # The original's head tells by itself whether there is an answer.
            difference = null if self.head == "v2" else null - best[0][0] if best else 0.0
            if self.nulls and difference > self.data.null_threshold:
                answer = ""
            said.append({"id": example.id, "answer": answer, "null_score": difference, "candidates": texts})
        return said

    def metrics(self, examples: Sequence[Question], predictions: Sequence[Any]) -> dict[str, float]:
        scores = [
            (bool(example.answers), *scores_of(said["answer"], example.answers))
            for example, said in zip(examples, predictions, strict=True)
        ]
        of = lambda chosen, i: sum(score[i] for score in chosen) / max(1, len(chosen))  # noqa: E731
        figures = {"exact_match": of(scores, 1), "f1": of(scores, 2)}
        answered = [score for score in scores if score[0]]
        if len(answered) < len(scores):
            figures |= {"exact_match_answerable": of(answered, 1), "f1_answerable": of(answered, 2)}
            figures["no_answer"] = 1 - len(answered) / len(scores)  # what "always none" would get
        return figures


def _question(place: Place, context: str, entry: dict[str, Any], labelled: bool) -> Question:
    """An entry of SQuAD's `qas`."""
    found = []
    for name, text in (("context", context), ("question", entry["question"])):
        if not isinstance(text, str):
            place.refuse(f"its {name} is {text!r}; a text was expected")
    if labelled and not entry.get("is_impossible"):
        if "answers" not in entry:
            place.refuse("it has neither 'answers' nor 'is_impossible'")
        found = entry["answers"]
    for answer in found:
        start, text = answer["answer_start"], answer["text"]
        stands = context[start : start + len(text)]
        if stands != text:
            place.refuse(f"the answer {text!r} is to begin at character {start}, where {stands!r} stands")
    start = found[0]["answer_start"] if found else 0
    return Question(place, entry["id"], entry["question"], context, tuple(answer["text"] for answer in found), start)


# ---------------------------------------------------------------------------------------------------------- in tokens


def _tokens_of(example: Question, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token of the first answer."""
    begin, end = example.start, example.start + len(example.answers[0])
    inside = [i for i, (a, b) in enumerate(spans) if a < end and b > begin]
    if not inside:
        example.place.refuse(f"the answer {example.answers[0]!r} has no token")
    return inside[0], inside[-1]


def _joined(windows: Sequence[Row]) -> Row:
    """A question's windows as one row."""
    of_all = lambda name: [part for window in windows for part in getattr(window, name)]  # noqa: E731
    target = None if windows[0].target is None else of_all("target")
    sizes = tuple(len(window.input_ids) for window in windows)
    example = windows[0].example
    return Row(of_all("input_ids"), of_all("token_type_ids"), target, example, of_all("extra"), sizes)


def _window_starts(size: int, room: int, stride: int) -> list[int]:
    """Where windows of `room` tokens begin, each `stride` behind the one before, and never beyond its end."""
    starts = [0]
    while starts[-1] + room < size:
        starts.append(starts[-1] + min(room, stride))
    return starts


def _best_window(place: int, starts: Sequence[int], room: int, size: int) -> int:
    """Of the windows that hold a token, where the one begins that shows the most on its poorer side."""
    holding = [start for start in starts if start <= place < min(start + room, size)]
    return max(holding, key=lambda start: min(place - start, min(start + room, size) - 1 - place))


def _over_windows(scores: Tensor, places: Tensor, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The cross-entropy of rows of one window or several, and whether each row's highest score is where it is to be.

    Args:
        scores: [all windows, tokens].
        places: of each window's target; 0, [CLS], where there is none.
        windows: the number of each row.
    """
    by_row = lambda each, fill: nn.utils.rnn.pad_sequence(list(each.split(windows)), True, fill)  # noqa: E731
    answered = by_row(places, 0).amax(1) > 0
    # Where one window has the answer, only those that have it count; where none has it, all count, with [CLS].
    sizes = torch.tensor(windows, device=places.device)
    counts = (places > 0) | ~answered.repeat_interleave(sizes, output_size=len(places))
    wanted = scores.gather(1, places[:, None])[:, 0].masked_fill(~counts, -torch.inf)
    loss = by_row(scores.logsumexp(1), -torch.inf).logsumexp(1) - by_row(wanted, -torch.inf).logsumexp(1)
    highest, at = scores.max(1)
    right = by_row((at == places) & counts, False)
    return loss.sum(), right.gather(1, by_row(highest, -torch.inf).argmax(1, keepdim=True))[:, 0]


def _best_spans(shown: Sequence[Shown], starts: Tensor, ends: Tensor) -> tuple[list[Any], float]:
    null = float(starts[0] + ends[0])
    if not any(token.first for token in shown):
        return [], null
    columns = torch.tensor([token.column for token in shown])
    first, last = starts[columns], ends[columns]
    count = len(shown)
    distance = torch.arange(count)[None, :] - torch.arange(count)[:, None]
    allowed = (distance >= 0) & (distance < MOST_ANSWER) & torch.tensor([token.first for token in shown])[:, None]
    scores = torch.where(allowed, first[:, None] + last[None, :], -torch.inf).flatten()
    best = scores.topk(min(CANDIDATES, int(allowed.sum())))
    return [
        (score, shown[i // count].characters[0], shown[i % count].characters[1])
        for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ], null


def _read_spans(model: AlbertForSpanQuestionAnswering, batch: Batch) -> list[Any]:
    """As `_best_spans`, of the original's head: (score, start, end) in characters, and the logit of no answer."""
    first = torch.zeros(batch.rows, batch.inputs.seq_length, dtype=torch.bool, device=batch.inputs.device)
    for row, source in enumerate(batch.source):
        first[row, [token.column for token in source.extra[0] if token.first]] = True
    found = model.spans(batch.inputs, first)
    said = []
    for row, source in enumerate(batch.source):
        spans = {token.column: token.characters for token in source.extra[0]}
        columns = (each[row].flatten().tolist() for each in (found.scores, found.starts, found.ends))
        best = [
            (score, spans[start][0], spans[end][1])
            for score, start, end in zip(*columns, strict=True)
            if score > -math.inf and end - start < MOST_ANSWER
        ]
        said.append((sorted(best, reverse=True)[:CANDIDATES], float(found.absent[row])))
    return said


# ------------------------------------------------------------------------------------------------------------ figures

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """As the official script of SQuAD: lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def scores_of(said: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 beside the best of the answers; without any, whether nothing was said."""
    texts = [answer for answer in answers if normalize(answer)] or [""]
    return max(float(normalize(said) == normalize(text)) for text in texts), max(_f1(said, text) for text in texts)


def _f1(said: str, answer: str) -> float:
    words, wanted = normalize(said).split(), normalize(answer).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((collections.Counter(words) & collections.Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))
