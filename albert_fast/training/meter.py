"""What a record of the log is the mean of: a few steps, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from albert_fast.memory import resident_bytes


@dataclass
class Meter:
    """Sums over the steps since the last record.

    Attributes:
        seconds: of training; evaluation and saving do not count.
        flops: that this rank's rows needed.
        losses, counts: over all ranks, on the CPU; 0 before the first step.
    """

    steps: int = 0
    seconds: float = 0.0
    flops: int = 0
    gradient_norms: float = 0.0
    losses: Tensor | float = 0.0
    counts: Tensor | float = 0.0

    def add(self, losses: Tensor, counts: Tensor, gradient_norm: float, seconds: float, flops: int) -> None:
        """A step: its sums over all ranks."""
        self.losses = self.losses + losses.cpu()
        self.counts = self.counts + counts.cpu()
        self.steps += 1
        self.gradient_norms += gradient_norm
        self.seconds += seconds
        self.flops += flops

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.flops / max(self.seconds, 1e-9)

    def record(self, tokens: int, peak_flops: float | None) -> dict[str, float | None]:
        """The fields of the log that are about speed. `peak_flops`: of the devices that did `flops` together."""
        return {
            "gradient_norm": self.gradient_norms / max(self.steps, 1),
            "tokens_per_second": tokens / max(self.seconds, 1e-9),
            "mfu": None if peak_flops is None else self.rate / peak_flops,
        }


def memory_in_use(device: torch.device) -> int | None:
    """Bytes: the most that PyTorch had on a GPU, or what the process holds; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes()
