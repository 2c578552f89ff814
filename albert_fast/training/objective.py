"""What a run minimizes, as sums over a batch.

A mean over a micro-batch is a mean of means in the end: labels are unevenly spread, and accumulation, ranks and ragged
rows would each give another gradient. So losses are summed, and the loop divides each once by the count of the whole
step:

    loss = sum over the losses i of weights[i] * sum(losses[i]) / sum(divisors[i])
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Sums(NamedTuple):
    """Of one batch, or added up over several.

    Attributes:
        losses: [losses], with gradients.
        counts: float64 [counts], without: whatever the objective's `means` are made of.
    """

    losses: Tensor
    counts: Tensor


class Means(Protocol):
    """What the sums of a step or of an evaluation come to."""

    @property
    def loss(self) -> float: ...

    @property
    def tokens(self) -> int: ...

    def record(self) -> dict[str, float]:
        """The fields of a record of the run's log."""
        ...


class Rows(Protocol):
    """A batch, as far as the loop knows it."""

    @property
    def rows(self) -> int: ...

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Any: ...


class Objective(nn.Module, ABC):
    """A model with what it is trained for.

    Attributes:
        model: an nn.Module: what a checkpoint has.
        weights: of the losses.
    """

    model: Any
    weights: tuple[float, ...] = (1.0,)

    @abstractmethod
    def forward(self, batch: Any) -> Sums: ...

    @abstractmethod
    def divisors(self, batch: Any) -> list[float]:
        """What each of the batch's summed losses is a sum of: labels, rows. Known on the host."""

    @abstractmethod
    def means(self, losses: Tensor, counts: Tensor) -> Means:
        """Of the sums of all micro-batches and ranks; reads them from the device."""

    @abstractmethod
    def with_model(self, model: nn.Module) -> Objective:
        """The same for another model, to evaluate it: a moving average."""
