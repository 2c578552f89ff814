"""The activations that a config's `hidden_act` may name: functions of one tensor, of any floating dtype.

The names are those of transformers' table. Several of them are the same function computed in another order
(`gelu_new`, `gelu_pytorch_tanh`, `gelu_python_tanh`, `gelu_accurate` and `gelu_fast` are all the tanh
form): one fused PyTorch call serves each family, and differs from the spelled-out forms by rounding only.
Activations with parameters of their own (`prelu`, `xielu`) are not functions of a tensor and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: what ALBERT was trained with."""
    return F.gelu(x, approximate="tanh")


def gelu_clipped(x: Tensor) -> Tensor:
    """GELU (erf form) clipped to [-10, 10], for quantization (arXiv 2004.09602)."""
    return F.gelu(x).clamp(-10.0, 10.0)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by its sigmoid approximation."""
    return x * torch.sigmoid(1.702 * x)


def laplace(x: Tensor) -> Tensor:
    """The normal distribution function of mean sqrt(1/2), deviation sqrt(1/(4 pi)): MEGA (arXiv 2209.10655).

    The constants are rounded to six digits as in the published models.
    """
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def relu_squared(x: Tensor) -> Tensor:
    """relu(x) squared (arXiv 2109.08668)."""
    return F.relu(x).square()


def sqrt_softplus(x: Tensor) -> Tensor:
    """The square root of softplus(x)."""
    return F.softplus(x).sqrt()


def linear(x: Tensor) -> Tensor:
    """The identity."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": gelu_clipped,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu_squared,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}
