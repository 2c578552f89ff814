"""Which of several choices fits: a context, a question and some answers (RACE, SWAG).

Each choice becomes a row, [CLS] context [SEP] question choice [SEP], whose pooled output gives one score; the softmax
is over a question's choices (google-research/albert, race_utils.py: question and choice at most 128 tokens together).
Rows have no padding, so that long and short choices cost what they are.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.config import DataOptions
from albert_fast.finetuning.reading import Place, Record, read_table
from albert_fast.finetuning.rows import Batch, Row
from albert_fast.finetuning.task import Task
from albert_fast.heads import AlbertForMultipleChoice
from albert_fast.pretraining.sentences import split

MOST_CHOICE = 128
_DEFAULT = DataOptions()
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Question:
    """A question; `label` is the number of the right choice, or None."""

    place: Place
    context: str
    question: str
    choices: tuple[str, ...]
    label: int | None


class Choice(Task):
    """See this file's docstring."""

    name = "choice"
    best = "accuracy"
    model_class = AlbertForMultipleChoice

    # ------------------------------------------------------------------------------------------------------- the data

    def read(self, path: Path, *, labelled: bool) -> Iterator[Question]:
        """A table of questions: context, question (one of them may be missing), choices (a list, or columns), label."""
        data = self.data
        columns = data.choices.split(",")
        for record in read_table(path, columns):
            choices = record.get(columns[0]) if len(columns) == 1 else [record.text(column) for column in columns]
            if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
                record.place.refuse(f"{data.choices!r} is {choices!r}; a list of at least two texts was expected")
            label = self._label(record, len(choices)) if labelled else None
            context, question = self._texts(record, columns)
            yield Question(record.place, context, question, tuple(choices), label)

    def _texts(self, record: Record, choices: Sequence[str]) -> tuple[str, str]:
        """Context and question, empty where there is none: never because a column has another name."""
        data, has = self.data, record.fields
        given = {"data.context": data.context, "data.question": data.question}
        given = {option: column for option, column in given.items() if column is not None}
        missing = {option: column for option, column in given.items() if column not in has}
        unread = [name for name, value in has.items() if isinstance(value, str)]
        unread = [name for name in unread if name not in (*given.values(), *choices, data.label)]
        for option, column in missing.items():
            named = column != getattr(_DEFAULT, option.removeprefix("data."))
            # An unread text is likely the passage: RACE has it as 'article'.
            if named or len(missing) == len(given) or (option == "data.context" and unread):
                record.place.refuse(
                    f"there is no {column!r}; it has {', '.join(map(repr, has))}: name the column, or say by "
                    f"{option}=null that there is none"
                )
        texts = [
            "" if column is None or has.get(column) is None else record.text(column)
            for column in (data.context, data.question)
        ]
        return texts[0], texts[1]

    def _label(self, record: Record, choices: int) -> int:
        value = record.get(self.data.label)
        if isinstance(value, float) and not value.is_integer():
            record.place.refuse(f"the label is {value!r}; a whole number, or a letter from A, was expected")
        if isinstance(value, str) and len(value) == 1 and value in string.ascii_uppercase:
            value = string.ascii_uppercase.index(value)
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < choices:
            record.place.refuse(f"the label is {value!r}; 0 to {choices - 1}, or a letter from A, was expected")
        return number

    def from_line(self, place: Place, line: str) -> Question:
        """A context, a question and the choices, apart by tabs."""
        fields = line.split("\t")
        if len(fields) < 4:
            place.refuse(f"it has {len(fields)} fields apart by tabs; context, question and two choices were expected")
        return Question(place, fields[0], fields[1], tuple(fields[2:]), None)

    def learn(self, examples: Sequence[Question]) -> None:
        """There are no labels but numbers."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def rows(self, examples: Sequence[Question], *, labelled: bool) -> list[Row]:
        """One row for each question, with a sequence for each choice."""
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = []
        for number, example in enumerate(examples):
            ids, types, sizes = [], [], []
            for choice in example.choices:
                asked = example.question
                # A question with a gap is read with the choice in it, as the original's race_utils.py.
                text = asked.replace("_", choice) if "_" in asked else f"{asked} {choice}".strip()
                said = self.tokenizer.encode(text, add_special_tokens=False)
                said = said[-min(MOST_CHOICE, self.length - 3) :]  # the choice, at the end, is what counts
                first = [cls, *self._context(example, choice, self.length - 3 - len(said)), sep]
                ids += [*first, *said, sep]
                types += [0] * len(first) + [1] * (len(said) + 1)
                sizes.append(len(first) + len(said) + 1)
            rows.append(Row(ids, types, example.label if labelled else None, number, sizes=tuple(sizes)))
        return rows

    def _context(self, example: Question, choice: str, room: int) -> list[int]:
        """What is read beside one choice, at most `room` tokens."""
        if self.data.passage == "beginning":
            return self.tokenizer.encode(example.context, add_special_tokens=False)[:room]
        sentence = sentence_of(example.context, choice, example.question)
        ids = self.tokenizer.encode(sentence, add_special_tokens=False)
        before = self.tokenizer.encode(sentence[: max(0, sentence.find(choice))], add_special_tokens=False)
        start = max(0, min(len(before) - room // 2, len(ids) - room))  # the choice in the middle of what is kept
        return ids[start : start + room]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([row.target for row in rows])}

    # ------------------------------------------------------------------------------------------------------ the model

    def configure(self, config: AlbertConfig) -> None:
        """The head has one score whatever the config says."""

    def targets(self, batch: Batch) -> int:
        return batch.rows

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        scores, labels = self._scores(model, batch), batch.targets["labels"]
        return F.cross_entropy(scores, labels, reduction="sum"), (scores.argmax(1) == labels).sum()

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """[rows, most choices], -inf where a question has fewer."""
        assert isinstance(model, AlbertForMultipleChoice)
        pooled = model.albert(batch.inputs, return_dict=True).pooler_output
        flat = model.classifier(model.dropout(pooled))[:, 0].float()
        counts = [len(row.sizes or ()) for row in batch.source]
        return nn.utils.rnn.pad_sequence(list(flat.split(counts)), batch_first=True, padding_value=-torch.inf)

    # -------------------------------------------------------------------------------------------------- what it says

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        chances = torch.softmax(self._scores(model, batch), dim=1).tolist()
        return [each[: len(row.sizes or ())] for each, row in zip(chances, batch.source, strict=True)]

    def predictions(self, examples: Sequence[Question], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        best = [max(range(len(output)), key=output.__getitem__) for output in outputs]
        return [
            {"label": number, "choice": example.choices[number], "probabilities": output}
            for number, example, output in zip(best, examples, outputs, strict=True)
        ]

    def metrics(self, examples: Sequence[Question], predictions: Sequence[Any]) -> dict[str, float]:
        right = [example.label == said["label"] for example, said in zip(examples, predictions, strict=True)]
        return {"accuracy": sum(right) / max(1, len(right))}


def sentence_of(context: str, choice: str, question: str) -> str:
    """The sentence in which a choice stands, of several the one with most words of the question; where it stands in
    none, the one with most words of both."""
    sentences = split(context) or [context]
    holding = [sentence for sentence in sentences if choice in sentence]
    wanted = set(_WORD.findall((question if holding else f"{question} {choice}").lower()))
    return max(holding or sentences, key=lambda sentence: len(wanted & set(_WORD.findall(sentence.lower()))))
