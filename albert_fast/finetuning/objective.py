"""A task's loss as the training loop takes it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from albert_fast.finetuning.rows import Batch
from albert_fast.finetuning.task import Task
from albert_fast.training.objective import Objective, Sums


class Means(NamedTuple):
    """Of a step: the loss for each target, the share of targets that came out right (nan where the task does not count
    it), and the tokens of all rows."""

    loss: float
    accuracy: float
    tokens: int

    def record(self) -> dict[str, float]:
        return {"loss": self.loss, **({} if math.isnan(self.accuracy) else {"accuracy": self.accuracy})}


class TaskObjective(Objective):
    """The counts are targets, those that came out right, and tokens."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch, say: bool = False) -> Any:
        """The batch's Sums; with `say` what the model says of each row: through this door, as FSDP gathers here."""
        if say:
            return self.task.outputs(self.model, batch)
        loss, right = self.task.loss(self.model, batch)
        counts = [loss.new_tensor(self.task.targets(batch)), right, loss.new_tensor(batch.tokens)]
        return Sums(loss[None], torch.stack([count.double() for count in counts]))

    def divisors(self, batch: Batch) -> list[float]:
        return [float(self.task.targets(batch))]

    def means(self, losses: Tensor, counts: Tensor) -> Means:
        loss, targets, right, tokens = torch.cat([losses.double(), counts]).tolist()
        return Means(loss / max(targets, 1), right / max(targets, 1), int(tokens))

    def with_model(self, model: Any) -> TaskObjective:
        return TaskObjective(model, self.task)
