"""What each name that `--dtype` takes stands for: the one place that turns it into dtypes."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """The numbers that a model computes with.

    Attributes:
        weights: dtype of the parameters.
        activations: dtype of what flows between the operations, by which a backend is chosen.
        products: of the operands of the products with weights: their rate is the floor's.
        attention: of scores and of probabilities times values, in the same sense.
        autocast: whether the forward pass runs under `torch.autocast` to `activations`.
    """

    weights: torch.dtype
    activations: torch.dtype
    products: torch.dtype
    attention: torch.dtype
    autocast: bool = False

    def forward(self, device: torch.device) -> AbstractContextManager[object]:
        """What a forward pass with its loss is to run under; backward is outside of it."""
        return torch.autocast(device.type, self.activations) if self.autocast else contextlib.nullcontext()


def _uniform(dtype: torch.dtype) -> Format:
    return Format(dtype, dtype, dtype, dtype)


# float64 is for the oracle alone.
FORMATS = {
    "float64": _uniform(torch.float64),
    "float32": _uniform(torch.float32),
    "bfloat16": _uniform(torch.bfloat16),
    "float16": _uniform(torch.float16),
    # Only the products with weights are in int8; of the formats that are left to attention, bfloat16 is the fastest.
    "int8": Format(torch.float32, torch.float32, torch.int8, torch.bfloat16),
    "autocast": Format(torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16, autocast=True),
}


def name_of(dtype: torch.dtype) -> str:
    """bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
