"""What a task has to say: its files, its rows, its model, its loss and its figures. One file implements each.

A task is read from training data once (`learn`) and is plain values from then on (`state`), which stand beside the
weights in task.json, so that a model that was saved knows what it does.
"""

from __future__ import annotations

import importlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.config import CONFIGURATION, TASKS, FinetuneConfig
from albert_fast.finetuning.reading import DataError, Place
from albert_fast.finetuning.rows import Batch, Row, pack
from albert_fast.flops import flops
from albert_fast.ops.checks import check
from albert_fast.tokenizer import AlbertTokenizer

TASK = "task.json"
ENCODER = ("albert.*", "predictions.*")
_KEPT = ("task", "length", "data", "decoding", "exit")  # of a run's configuration, with a model


class Task(ABC):
    """One task with its options.

    Args:
        config: of the run, or with how files are read.
        tokenizer: of the model.
        state: of a model that was saved, in place of `learn`.

    Attributes:
        name: what the command line calls it.
        best: the figure that the best checkpoint is chosen by.
        larger_is_better: whether it is to be large.
        model_class: what is trained.
        reads_text: whether it has a tokenizer.
        measures: modules that `metrics` needs.
        config_keys: of a config.json, what its model reads beside the fields of AlbertConfig.
    """

    name: ClassVar[str]
    best: str
    larger_is_better: ClassVar[bool] = True
    model_class: Any
    reads_text: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ()
    config_keys: ClassVar[tuple[str, ...]] = ()
    tokenizer: AlbertTokenizer

    def __init__(
        self, config: FinetuneConfig, tokenizer: AlbertTokenizer | None, state: dict[str, Any] | None = None
    ) -> None:
        self.config, self.data, self.length = config, config.data, config.length
        if tokenizer is not None:
            self.tokenizer = tokenizer
        if state is not None:
            self.restore(state)

    # ------------------------------------------------------------------------------------------------------- the data

    @abstractmethod
    def read(self, path: Path, *, labelled: bool) -> Iterator[Any]:
        """The examples of a file, each with a `place`. Raises DataError."""

    @abstractmethod
    def from_line(self, place: Place, line: str) -> Any:
        """An example without a label from a line that somebody typed."""

    @abstractmethod
    def learn(self, examples: Sequence[Any]) -> None:
        """What the training data tells: the set of labels."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """That, as JSON values."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """As `learn`, from `state`."""

    @abstractmethod
    def rows(self, examples: Sequence[Any], *, labelled: bool) -> list[Row]:
        """The examples as the model gets them. Raises DataError where a label is not in the set."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The targets of rows."""

    def pack(self, rows: Sequence[Row]) -> Batch:
        """Rows as the model takes them."""
        return pack(rows, self.collate)

    # ------------------------------------------------------------------------------------------------------ the model

    @abstractmethod
    def configure(self, config: AlbertConfig) -> None:
        """Sets what the head needs in a model's config."""

    def with_new_head(self, directory: str, config: AlbertConfig) -> Any:
        """The model with the encoder of a checkpoint that has another head."""
        return self.model_class.from_pretrained(directory, config=config, dtype=torch.float32, parts=ENCODER)

    def begin(self, model: Any) -> None:
        """What is done with a model of which a checkpoint had the encoder alone: nothing more for most tasks."""
        return

    @abstractmethod
    def targets(self, batch: Batch) -> int:
        """How many targets the batch's loss is a sum over."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss over a batch, and how many of its targets came out right, a tensor of no dimensions: nan
        where that is not counted."""

    def flops(self, shape: AlbertConfig, batch: Batch) -> int:
        """That a batch needs, forward and backward."""
        return flops(shape, batch.lengths, training=True, labelled=0).total

    # -------------------------------------------------------------------------------------------------- what it says

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """What the model says of each row, plain values."""

    @abstractmethod
    def predictions(self, examples: Sequence[Any], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        """One for each example, as JSON values: what `albert-fast predict` writes."""

    @abstractmethod
    def metrics(self, examples: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Figures of predictions, beside the labels that the examples have."""

    # ------------------------------------------------------------------------------------------------------ in common

    def read_all(self, paths: Sequence[str], *, labelled: bool = True) -> list[Any]:
        """The examples of several files.

        Raises:
            DataError: a file cannot be read, or has none.
        """
        examples = []
        for path in map(Path, paths):
            found = list(self.read(path, labelled=labelled))
            if not found:
                raise DataError(f"{path} has no example")
            examples += found
        return examples

    def check_measures(self) -> None:
        """Raises ValueError where a package is missing that the figures need."""
        for module in self.measures:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(
                    f"the figures of {self.name} need {module}, which cannot be imported ({error}): "
                    "pip install 'albert_fast[finetune]'"
                ) from None

    def is_better(self, figure: float, than: float | None) -> bool:
        """Whether a figure is better than another one. What is no number is not better than anything."""
        if math.isnan(figure):
            return False
        return than is None or math.isnan(than) or (figure > than if self.larger_is_better else figure < than)

    def save(self, directory: Path) -> None:
        """The vocabulary, and task.json: what it takes to read files and outputs again."""
        if self.reads_text:
            self.tokenizer.save_pretrained(directory)
        how = {key: value for key, value in self.config.to_dict().items() if key in _KEPT}
        how["data"] = {key: value for key, value in how["data"].items() if key not in ("train", "dev")}
        known = {"config": how, "state": self.state()}
        (directory / TASK).write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def number_of(label: str, labels: dict[str, int], place: Place) -> int:
    """A label's number, or an error that says which ones there are."""
    if label not in labels:
        known = ", ".join(sorted(labels)[:20]) + (" …" if len(labels) > 20 else "")
        place.refuse(f"the label {label!r} is not among those of the training data: {known}")
    return labels[label]


def task_class(name: str) -> type[Task]:
    """By the name that the command line has."""
    module, kind = TASKS[name].rsplit(".", 1)
    return getattr(importlib.import_module(f"albert_fast.finetuning.{module}"), kind)


def check_length(length: int, shape: AlbertConfig) -> None:
    """Raises ValueError where a model has not so many positions."""
    check(
        length <= shape.max_position_embeddings,
        f"length is {length} and the model has {shape.max_position_embeddings} positions: lower it, or "
        "lengthen the model by `albert-fast extend`",
    )


def tokenizer_of(config: FinetuneConfig) -> AlbertTokenizer:
    source = Path(config.vocab or config.model)
    if source.name == "spiece.model" and (source.parent / "tokenizer_config.json").exists():
        source = source.parent  # which says whether there are capitals and accents
    return AlbertTokenizer(source) if source.suffix == ".model" else AlbertTokenizer.from_pretrained(source)


def read_known(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `Task.save` wrote: of the configuration, and the state.

    Raises:
        ValueError: the directory has no such file.
    """
    try:
        known = json.loads((directory / TASK).read_text(encoding="utf-8"))
        return dict(known["config"]), dict(known["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} has no {TASK} that can be read ({error}): a directory that `albert-fast finetune` wrote was "
            "expected, such as OUT/best"
        ) from None


def load_task(directory: Path, overrides: Sequence[str] = ()) -> Task:
    """The task of a model that `albert-fast finetune` saved.

    Args:
        overrides: of how files are read and texts written, such as "data.text=sentence".

    Raises:
        ValueError: the directory has none, or an override is none.
    """
    how, state = read_known(directory)
    for override in overrides:
        check(
            override.partition("=")[0] != "task",
            f"{override!r} was given, and {directory} was trained for {how.get('task')!r}: leave it out, or train "
            "another model",
        )
    saved = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in how.items()]
    config = CONFIGURATION.parse(None, [*saved, *overrides])
    kind = task_class(config.task)
    return kind(config, AlbertTokenizer.from_pretrained(directory) if kind.reads_text else None, state)


def softmax_rows(logits: Tensor) -> list[list[float]]:
    return torch.softmax(logits.float(), dim=-1).tolist()
