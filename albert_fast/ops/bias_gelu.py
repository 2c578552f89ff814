"""gelu(x + bias) in one pass (Hendrycks and Gimpel, arXiv 1606.08415).

`approximate="tanh"` is 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))), which ALBERT's configuration calls `gelu_new`;
`"none"` is the exact form with erf; `"relu"` is max(x, 0), for models that use it.

Precision: one rounding, to the dtype of x, at the end of each direction; the inside is in float32 at least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops.checks import check, check_tensor, describe, has_no_derivative

FORMS = ("tanh", "none", "relu")


def bias_gelu_reference(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    pre_activation = x + bias
    y = F.relu(pre_activation) if approximate == "relu" else F.gelu(pre_activation, approximate=approximate)
    return y.to(x.dtype)


@backends.reference("bias_gelu")
def _forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return bias_gelu_reference(x, bias, approximate=approximate)


@backends.reference("bias_gelu_backward")
def _backward(grad_output: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    pre_activation = x + bias
    if approximate == "relu":
        grad = grad_output * (pre_activation > 0)
    else:
        grad = torch.ops.aten.gelu_backward(grad_output, pre_activation, approximate=approximate)
    grad = grad.to(x.dtype)
    accumulator = torch.promote_types(x.dtype, torch.float32)
    return grad, grad.reshape(-1, x.shape[-1]).sum(dim=0, dtype=accumulator).to(bias.dtype)


def _call(x: Tensor) -> backends.Call:
    return backends.Call("bias_gelu", x.device, x.dtype)


@torch.library.custom_op("albert_fast::bias_gelu", mutates_args=())
def _bias_gelu_op(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return backends.implementation("bias_gelu", _call(x))(x, bias, approximate)


@_bias_gelu_op.register_fake
def _(x, bias, approximate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("albert_fast::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward_op(grad_output: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return backends.implementation("bias_gelu_backward", _call(x))(grad_output, x, bias, approximate)


@_bias_gelu_backward_op.register_fake
def _(grad_output, x, bias, approximate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx, grad_output):  # type: ignore[no-untyped-def]
    return *_bias_gelu_backward_op(grad_output, *ctx.saved_tensors, ctx.approximate), None


_bias_gelu_op.register_autograd(_autograd, setup_context=_setup_context)
has_no_derivative(_bias_gelu_backward_op)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias).

    Args:
        x: [..., columns], floating point.
        bias: [columns], the dtype of x or float32.
        approximate: "tanh" (ALBERT's `gelu_new`), "none" (erf) or "relu".

    Returns:
        the shape and dtype of x.

    Raises:
        ValueError, TypeError: a shape, dtype, device or form does not fit; the message names it.
    """
    check(x.dim() >= 1 and x.is_floating_point(), f"x is {describe(x)}; [..., columns] of floats was expected")
    check_tensor("bias", bias, (x.shape[-1],), like=x, dtype=(x.dtype, torch.float32))
    check(approximate in FORMS, f"approximate is {approximate!r}; one of {', '.join(FORMS)} was expected")
    if backends.uses_reference(_call(x)):
        return bias_gelu_reference(x, bias, approximate=approximate)
    return _bias_gelu_op(x, bias, approximate)
