"""What a kernel is started on and with, asked for in each call and so as cheaply as can be."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: a handle of CUDA's belongs to one device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def allows_tf32() -> bool:
    """Whether products of float32 may round to TF32 on a GPU, by either of PyTorch's settings: where the newer one,
    `torch.backends.fp32_precision`, was used, the older one cannot be read."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def stream_of(device: torch.device) -> int | None:
    """The current stream of a GPU; None elsewhere."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
