"""Texts and pairs of texts: one label each, several, or a number.

The head is one linear map of the pooled output behind a dropout (google-research/albert, classifier_utils.py); a
number is learned by the squared error, several labels by the cross-entropy of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.early_exit import AlbertForEarlyExit
from albert_fast.finetuning.config import ExitOptions
from albert_fast.finetuning.reading import DataError, Place, Record, read_table
from albert_fast.finetuning.rows import Batch, Row
from albert_fast.finetuning.task import Task, number_of, softmax_rows
from albert_fast.heads import AlbertForSequenceClassification
from albert_fast.ops.checks import check

_PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
THRESHOLD = 0.5  # of a label's probability, with `multi`


@dataclass(frozen=True)
class Example:
    """A text or a pair.

    Attributes:
        label: a str, a list of them (`multi`), a float (`regression`), or None.
    """

    place: Place
    text: str
    pair: str | None
    label: Any


class Classification(Task):
    """See this file's docstring."""

    name = "classification"
    measures = ("scipy", "sklearn")
    model_class: Any = AlbertForSequenceClassification
    labels: list[str]

    # ------------------------------------------------------------------------------------------------------- the data

    def read(self, path: Path, *, labelled: bool) -> Iterator[Example]:
        data = self.data
        columns = [data.text, *([data.pair] if data.pair is not None else []), *([data.label] if labelled else [])]
        for record in read_table(path, columns):
            pair = None if data.pair is None else record.text(data.pair)
            label = self._label(record) if labelled else None
            yield Example(record.place, record.text(data.text), pair, label)

    def _label(self, record: Record) -> Any:
        value, kind = record.get(self.data.label), self.data.kind
        if kind == "regression":
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                record.place.refuse(f"the label is {value!r}; a number was expected (data.kind=regression)")
            return number
        if kind == "multi":
            parts = value.split(self.data.separator) if isinstance(value, str) else value
            if not isinstance(parts, list):
                record.place.refuse(
                    f"the label is {value!r}; a list, or a text with {self.data.separator!r}, was expected"
                )
            return [str(part).strip() for part in parts if str(part).strip()]
        if isinstance(value, list | dict) or value is None or not str(value).strip():
            record.place.refuse(f"the label is {value!r}; a text was expected")
        return str(value).strip()

    def from_line(self, place: Place, line: str) -> Example:
        """A text, or a pair apart by a tab, as in the files of the model."""
        text, tab, pair = line.partition("\t")
        if self.data.pair is None and tab:
            place.refuse("it has a tab, and the model takes single texts: a text alone was expected")
        if self.data.pair is not None and line.count("\t") != 1:
            count = line.count("\t")
            place.refuse(f"it has {count} tabs, and the model takes pairs: two texts with one between were expected")
        return Example(place, text, pair if tab else None, None)

    def learn(self, examples: Sequence[Example]) -> None:
        if self.data.kind == "regression":
            self.restore({"kind": "regression", "labels": [], "early_exit": False})
            return
        found = {label for e in examples for label in (e.label if isinstance(e.label, list) else [e.label])}
        if len(found) < 2 and self.data.kind == "single":
            examples[0].place.refuse(f"all labels are {', '.join(found)!r}; at least two were expected")
        if not found:
            raise DataError(
                f"{examples[0].place.path}: no line has a label; one at least was expected in {self.data.label!r} "
                "(data.label names the column)"
            )
        self.restore({"kind": self.data.kind, "labels": sorted(found), "early_exit": self.config.early_exit})

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "labels": self.labels, "early_exit": self.early_exit}

    def restore(self, state: dict[str, Any]) -> None:
        self.kind, self.labels, self.early_exit = state["kind"], state["labels"], state["early_exit"]
        check(
            self.early_exit or self.config.exit == ExitOptions(),
            "exit is given, and the model has no early exits: train it with early_exit=true",
        )
        self.model_class = AlbertForEarlyExit if self.early_exit else AlbertForSequenceClassification
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.best = {"single": "accuracy", "multi": "f1", "regression": "spearman"}[self.kind]

    def rows(self, examples: Sequence[Example], *, labelled: bool) -> list[Row]:
        pairs = None if not examples or examples[0].pair is None else [example.pair or "" for example in examples]
        for example in examples:
            if (example.pair is None) != (pairs is None):
                example.place.refuse("a text and a pair of texts are mixed; either was expected in all lines")
        encoded = self.tokenizer([e.text for e in examples], pairs, truncation=True, max_length=self.length)
        return [
            Row(ids, types, self._target(example) if labelled else None, number)
            for number, (ids, types, example) in enumerate(
                zip(encoded["input_ids"], encoded["token_type_ids"], examples, strict=True)
            )
        ]

    def _target(self, example: Example) -> Any:
        if self.kind == "regression":
            return example.label
        if self.kind == "single":
            return number_of(example.label, self.numbers, example.place)
        chosen = {number_of(label, self.numbers, example.place) for label in example.label}
        return [float(number in chosen) for number in range(len(self.labels))]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        dtype = torch.int64 if self.kind == "single" else torch.float32
        return {"labels": torch.tensor([row.target for row in rows], dtype=dtype)}

    # ------------------------------------------------------------------------------------------------------ the model

    def configure(self, config: AlbertConfig) -> None:
        names = self.labels or ["score"]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type = _PROBLEMS[self.kind]
        drops = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout_prob)
        check(
            not self.config.r_drop or any(drops),
            f"r_drop is {self.config.r_drop} and nothing is dropped, so that two answers are always the same: give "
            "dropout=0.1, or r_drop=0",
        )

    def targets(self, batch: Batch) -> int:
        return batch.rows * (len(self.labels) if self.kind == "multi" else 1)

    def flops(self, shape: AlbertConfig, batch: Batch) -> int:
        return super().flops(shape, batch) * (2 if self.config.r_drop else 1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.targets["labels"]
        if not self.config.r_drop or not model.training:
            return self._losses(self._all_logits(model, batch), labels)
        first, second = (self._all_logits(model, batch) for _ in range(2))
        (loss, right), (other, _) = (self._losses(logits, labels) for logits in (first, second))
        apart = _weighted(torch.stack([_divergence(a, b) for a, b in zip(first, second, strict=True)]))
        return (loss + other) / 2 + self.config.r_drop * apart, right

    def _all_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[heads, rows, labels]: one head, or one behind each pass."""
        if isinstance(model, AlbertForEarlyExit):
            return model.all_logits(batch.inputs).float()
        return model(batch.inputs).logits.float()[None]

    def _losses(self, all_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, rights = zip(*(self._loss(logits, labels) for logits in all_logits), strict=True)
        return _weighted(torch.stack(losses)), rights[-1]

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "single":
            return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()
        if self.kind == "multi":
            right = ((logits > 0) == (labels > THRESHOLD)).sum()
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), right
        return F.mse_loss(logits[:, 0], labels, reduction="sum"), labels.new_full((), math.nan)

    # -------------------------------------------------------------------------------------------------- what it says

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        if isinstance(model, AlbertForEarlyExit):
            rule = self.config.exit
            found = model.exit_early(batch.inputs, patience=rule.patience, confidence=rule.confidence)
            return [*zip(softmax_rows(found.logits), found.passes.tolist(), strict=True)]
        logits = model(batch.inputs).logits
        if self.kind == "single":
            return softmax_rows(logits)
        return (logits.float().sigmoid() if self.kind == "multi" else logits.float()).tolist()

    def predictions(self, examples: Sequence[Example], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        if self.kind == "regression":
            return [{"score": output[0]} for output in outputs]
        if self.kind == "single":
            passes = [{"passes": output[1]} for output in outputs] if self.early_exit else [{}] * len(outputs)
            outputs = [output[0] for output in outputs] if self.early_exit else outputs
            best = [max(range(len(output)), key=output.__getitem__) for output in outputs]
            return [
                {"label": self.labels[number], "probability": output[number], **taken}
                for number, output, taken in zip(best, outputs, passes, strict=True)
            ]
        return [{"labels": {self.labels[i]: p for i, p in enumerate(output) if p > THRESHOLD}} for output in outputs]

    def metrics(self, examples: Sequence[Example], predictions: Sequence[Any]) -> dict[str, float]:
        from sklearn import metrics

        if self.kind == "regression":
            from scipy import stats

            wanted = np.array([example.label for example in examples])
            found = np.array([prediction["score"] for prediction in predictions])
            varies = len(wanted) > 1 and np.ptp(wanted) > 0 and np.ptp(found) > 0  # else there is no correlation
            return {
                "pearson": float(stats.pearsonr(wanted, found).statistic) if varies else 0.0,
                "spearman": float(stats.spearmanr(wanted, found).statistic) if varies else 0.0,
                "mean_squared_error": float(np.mean((wanted - found) ** 2)),
            }
        if self.kind == "single":
            labels = [example.label for example in examples]
            said = [prediction["label"] for prediction in predictions]
            passes = [prediction["passes"] for prediction in predictions if "passes" in prediction]
            return {
                **({"passes": sum(passes) / len(passes)} if passes else {}),
                "accuracy": float(metrics.accuracy_score(labels, said)),
                "f1_macro": float(metrics.f1_score(labels, said, average="macro", zero_division=0.0)),
                "matthews": float(metrics.matthews_corrcoef(labels, said)),
            }
        of = lambda chosen: [float(label in chosen) for label in self.labels]  # noqa: E731
        truth = np.array([of(example.label) for example in examples])
        chosen = np.array([of(prediction["labels"]) for prediction in predictions])
        averages = {"f1": "micro", "f1_macro": "macro"}
        if len(self.labels) == 1:  # which sklearn takes for two classes, with and without it
            averages = dict.fromkeys(averages, "binary")
        return {
            **{
                name: float(metrics.f1_score(truth, chosen, average=average, zero_division=0.0))
                for name, average in averages.items()
            },
            "accuracy": float(metrics.accuracy_score(truth, chosen)),
        }


def _weighted(of_heads: Tensor) -> Tensor:
    """The mean over the passes, each weighted by its number, as later heads can do more (Zhou et al. 2020)."""
    numbers = torch.arange(1, len(of_heads) + 1, device=of_heads.device)
    return (of_heads * numbers).sum() / numbers.sum()


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Kullback-Leibler's between two distributions for each row, the mean of both directions; summed over rows."""
    one, other = first.log_softmax(1), second.log_softmax(1)
    return ((one.exp() - other.exp()) * (one - other)).sum() / 2
