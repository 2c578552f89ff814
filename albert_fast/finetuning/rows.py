"""Rows of a task, packed into batches, and where a run is among them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from albert_fast.ops.checks import check
from albert_fast.packing import PackedBatch


@dataclass(frozen=True)
class Row:
    """One input of the model, or several that belong together: the choices of a question.

    Attributes:
        input_ids, token_type_ids: [CLS] … [SEP], as many of both; several sequences one after the other.
        target: what the model is to say, as the task has it; None: not known.
        example: the number of the example that it comes from, which may have several rows.
        extra: what the task needs to read the model's output.
        sizes: the lengths of the sequences; None: there is one.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    target: Any
    example: int
    extra: Any = None
    sizes: tuple[int, ...] | None = None

    @property
    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """The ids and the types of each."""
        ends = list(itertools.accumulate(self.sizes or (len(self.input_ids),)))
        parts = [slice(end - size, end) for end, size in zip(ends, self.sizes or ends, strict=True)]
        return [(self.input_ids[part], self.token_type_ids[part]) for part in parts]


class Inputs(Protocol):
    """What a model takes: a PackedBatch, or features of sound."""

    @property
    def tokens(self) -> int: ...

    def to(self, device: torch.device | str, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """Rows as the model takes them.

    Attributes:
        inputs: of the model.
        targets: tensors, as the task's collation makes them; empty where they are not known.
        source: the rows.
    """

    inputs: Any  # Inputs
    targets: dict[str, Tensor]
    source: Sequence[Row]

    @property
    def rows(self) -> int:
        return len(self.source)

    @property
    def tokens(self) -> int:
        return self.inputs.tokens

    @property
    def lengths(self) -> list[int]:
        """Of the sequences."""
        return [size for row in self.source for size in row.sizes or (len(row.input_ids),)]

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        targets = {name: tensor.to(device, **options) for name, tensor in self.targets.items()}
        return replace(self, inputs=self.inputs.to(device, **options), targets=targets)


def pack(rows: Sequence[Row], collate: Callable[[Sequence[Row]], dict[str, Tensor]]) -> Batch:
    """Packed texts. collate: makes tensors of the targets, where they are known."""
    ids, types = zip(*(sequence for row in rows for sequence in row.sequences), strict=True)
    return Batch(PackedBatch.from_sequences(ids, types), {} if rows[0].target is None else collate(rows), rows)


class Feed:
    """The rows of each step: all of them once in each epoch, in an order that is drawn anew.

    A step may take the end of one epoch and the beginning of the next. The position is kept in rows of all ranks
    together, so that another number of ranks goes on with the same rows.

    Attributes:
        epoch: number of the pass through the rows.
        tokens: given out so far, on all ranks.
    """

    def __init__(
        self, rows: Sequence[Row], pack: Callable[[Sequence[Row]], Batch], seed: int, *, rank: int = 0, ranks: int = 1
    ) -> None:
        check(len(rows) > 0, "data.train has no example")
        self.rows, self.pack, self.seed, self.rank, self.ranks = rows, pack, seed, rank, ranks
        self.row = self.tokens = 0
        self._order: tuple[int, np.ndarray] | None = None  # of an epoch

    @property
    def epoch(self) -> int:
        return self.row // len(self.rows)

    def take(self, progress: float, rows: int, micro: int) -> list[Batch]:
        """The next `rows` rows, this rank's, in micro-batches of `micro` rows."""
        of_all = micro * self.ranks
        starts = range(self.row, self.row + rows, of_all)
        return [
            self.pack([self._at(place) for place in range(start + self.rank, start + of_all, self.ranks)])
            for start in starts
        ]

    def done(self, rows: int, tokens: int) -> None:
        self.row += rows
        self.tokens += tokens

    def give_back(self) -> None:
        """Nothing is prepared beforehand."""

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.row, self.tokens = state["row"], state["tokens"]

    def _at(self, place: int) -> Row:
        epoch, number = divmod(place, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self.rows[self._order[1][number]]
