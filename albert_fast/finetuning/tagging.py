"""A label for each word: entities (BIO, BIOES), parts of speech.

A word's label is learned and read at its first piece (Devlin et al. 2019, section 5.3); its other pieces have none.
A sentence that is longer than a row becomes several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.reading import Place, Sentence, read_columns
from albert_fast.finetuning.rows import Batch, Row
from albert_fast.finetuning.task import Task, number_of
from albert_fast.heads import AlbertForTokenClassification
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX


class Tagging(Task):
    """See this file's docstring.

    Attributes:
        scheme: BIO or BIOES, where the labels are entities; None: each word's label stands for itself.
    """

    name = "tagging"
    measures = ("seqeval",)
    model_class = AlbertForTokenClassification
    labels: list[str]

    # ------------------------------------------------------------------------------------------------------- the data

    def read(self, path: Path, *, labelled: bool) -> Iterator[Sentence]:
        universal = ".conllu" in path.suffixes
        word = self.data.word if self.data.word is not None else int(universal)
        tag = self.data.tag if self.data.tag is not None else (3 if universal else -1)
        return read_columns(path, word, tag if labelled else None)

    def from_line(self, place: Place, line: str) -> Sentence:
        """Words apart by blanks."""
        return Sentence(place, line.split(), None)

    def learn(self, examples: Sequence[Sentence]) -> None:
        self.restore({"labels": sorted({label for sentence in examples for label in sentence.labels or ()})})

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def restore(self, state: dict[str, Any]) -> None:
        self.labels = state["labels"]
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.scheme = scheme_of(self.labels)
        self.best = "accuracy" if self.scheme is None else "f1"

    def rows(self, examples: Sequence[Sentence], *, labelled: bool) -> list[Row]:
        if labelled and self.scheme is not None:
            for _, sentences in itertools.groupby(examples, key=lambda sentence: sentence.place.path):
                _refuse_iob1(sentences)
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = []
        for number, sentence in enumerate(examples):
            numbers = (
                [number_of(each, self.numbers, sentence.place_of(i)) for i, each in enumerate(sentence.labels or ())]
                if labelled
                else None
            )
            encoded = self.tokenizer(
                sentence.words, is_split_into_words=True, add_special_tokens=False, return_word_ids=True
            )
            ids, words_of = encoded["input_ids"], encoded["word_ids"]
            for start, end in _windows(words_of, self.length - 2):
                pieces, words = ids[start:end], words_of[start:end]
                first = [i for i, word in enumerate(words) if start + i == 0 or word != words_of[start + i - 1]]
                target = None
                if numbers is not None:
                    target = [IGNORE_INDEX] * (len(pieces) + 2)
                    for i in first:
                        target[i + 1] = numbers[words[i]]
                extra = [(i + 1, words[i]) for i in first]  # where each word is read
                rows.append(Row([cls, *pieces, sep], [0] * (len(pieces) + 2), target, number, extra))
        return rows

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([label for row in rows for label in row.target])}

    # ------------------------------------------------------------------------------------------------------ the model

    def configure(self, config: AlbertConfig) -> None:
        config.id2label = dict(enumerate(self.labels))
        config.label2id = dict(self.numbers)

    def targets(self, batch: Batch) -> int:
        return int((batch.targets["labels"] != IGNORE_INDEX).sum())

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = model(batch.inputs).logits.float(), batch.targets["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss, (logits.argmax(1) == labels).sum()

    # -------------------------------------------------------------------------------------------------- what it says

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The label's number at each token."""
        chosen = batch.inputs.rows(model(batch.inputs).logits.argmax(-1))
        return [row.tolist() for row in chosen]

    def predictions(self, examples: Sequence[Sentence], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        missing = "O" if self.scheme is not None else self.labels[0]  # for a word of no piece
        found = [[missing] * len(sentence.words) for sentence in examples]
        for row, output in zip(rows, outputs, strict=True):
            for place, word in row.extra:
                found[row.example][word] = self.labels[output[place]]
        return [{"words": sentence.words, "labels": labels} for sentence, labels in zip(examples, found, strict=True)]

    def metrics(self, examples: Sequence[Sentence], predictions: Sequence[Any]) -> dict[str, float]:
        wanted = [sentence.labels or [] for sentence in examples]
        found = [prediction["labels"] for prediction in predictions]
        pairs = [(a, b) for left, right in zip(wanted, found, strict=True) for a, b in zip(left, right, strict=True)]
        figures = {"accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}
        if self.scheme is not None:
            from seqeval import metrics
            from seqeval.scheme import IOB2, IOBES

            rules: dict[str, Any] = {"mode": "strict", "scheme": IOB2 if self.scheme == "BIO" else IOBES}
            for name in ("precision", "recall", "f1"):
                figures[name] = float(getattr(metrics, f"{name}_score")(wanted, found, zero_division=0, **rules))
        return figures


def scheme_of(labels: Sequence[str]) -> str | None:
    """BIO or BIOES where the labels are written so, else None."""
    prefixes = {label.partition("-")[0] for label in labels if label != "O"}
    entities = all("-" in label for label in labels if label != "O")
    if not entities or "O" not in labels or not prefixes <= set("BIOES"):
        return None
    return "BIOES" if prefixes & {"E", "S"} else "BIO"


def _refuse_iob1(sentences: Iterable[Sentence]) -> None:
    """Where most entities of a file begin with I-, B- only parts neighbors: few of them would be counted."""
    begun: dict[str, int] = {"B": 0, "I": 0, "S": 0}
    first = None
    for sentence in sentences:
        before = "O"
        for word, label in enumerate(sentence.labels or ()):
            starts_inside = label.startswith("I-") and before.partition("-")[2] != label.partition("-")[2]
            if starts_inside or label.startswith(("B-", "S-")):
                begun[label[0]] += 1
                first = first or (sentence.place_of(word) if starts_inside else None)
            before = label
    if first is not None and begun["I"] > begun["B"] + begun["S"]:
        first.refuse("entities begin with I- (IOB1); BIO or BIOES was expected: begin each with B-")


def _windows(words: list[int], room: int) -> Iterator[tuple[int, int]]:
    """Parts [start, end) of at most `room` pieces that end with a word, where a word fits at all.

    Args:
        words: the word of each piece.
    """
    start = 0
    while start < len(words):
        end = min(start + room, len(words))
        cut = end
        while end < len(words) and cut > start and words[cut] == words[cut - 1]:
            cut -= 1
        end = cut if cut > start else end
        yield start, end
        start = end
