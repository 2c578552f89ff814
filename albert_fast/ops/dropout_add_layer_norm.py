"""LayerNorm(residual + dropout(x + bias)): what ends each half of the layer (Ba et al., arXiv 1607.06450).

Shapes: x and residual [tokens, hidden], bias, weight and ln_bias [hidden]. x and residual may differ in dtype (a
bfloat16 product added to a float32 stream); the output has the wider of the two.

Precision: the sum is rounded to the output's dtype, mean and variance are in float32 at least, and the result is
rounded once. The variance is of the rounded sum, so that backward can rebuild it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops.checks import FLOATS, check_cu_seqlens, check_tensor, has_no_derivative
from albert_fast.ops.dropout import check_dropout, dropout


def _summed(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return residual + dropout((x + bias).to(x.dtype), dropout_p, seed, site, cu_seqlens)


def dropout_add_layer_norm_reference(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    summed = _summed(x, bias, residual, dropout_p, seed, site, cu_seqlens)
    return F.layer_norm(summed, weight.shape, weight.to(summed.dtype), ln_bias.to(summed.dtype), eps)


@backends.reference("dropout_add_layer_norm")
def _forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return dropout_add_layer_norm_reference(
        x,
        bias,
        residual,
        weight,
        ln_bias,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        cu_seqlens=cu_seqlens,
    )


@backends.reference("dropout_add_layer_norm_backward")
def _backward(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    summed = _summed(x, bias, residual, dropout_p, seed, site, cu_seqlens)
    grad_residual, grad_weight, grad_ln_bias = layer_norm_backward(grad_output, summed, weight, ln_bias, eps)
    grad_x = dropout(grad_residual, dropout_p, seed, site, cu_seqlens).to(x.dtype)
    accumulator = torch.promote_types(x.dtype, torch.float32)
    grad_bias = grad_x.sum(dim=0, dtype=accumulator).to(bias.dtype)
    # Without dropout the two gradients are one tensor; an operator's outputs must not share memory.
    grad_residual = grad_residual.to(residual.dtype)
    grad_residual = grad_residual.clone() if grad_residual is grad_x else grad_residual
    return grad_x, grad_bias, grad_residual, grad_weight, grad_ln_bias


def layer_norm_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of F.layer_norm(x, weight.shape, weight, bias, eps): of x, of weight and of bias."""
    w, b = weight.to(x.dtype), bias.to(x.dtype)
    _, mean, rstd = torch.native_layer_norm(x, weight.shape, w, b, eps)
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_output.to(x.dtype), x, weight.shape, mean, rstd, w, b, [True, True, True]
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _call(x: Tensor) -> backends.Call:
    return backends.Call("dropout_add_layer_norm", x.device, x.dtype)


@torch.library.custom_op("albert_fast::dropout_add_layer_norm", mutates_args=())
def _op(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    function = backends.implementation("dropout_add_layer_norm", _call(x))
    return function(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens)


@_op.register_fake
def _(x, bias, residual, *args):  # type: ignore[no-untyped-def]
    return residual.new_empty(residual.shape, dtype=torch.promote_types(x.dtype, residual.dtype))


@torch.library.custom_op("albert_fast::dropout_add_layer_norm_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    function = backends.implementation("dropout_add_layer_norm_backward", _call(x))
    return function(
        grad_output.contiguous(), x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens
    )


@_backward_op.register_fake
def _(grad_output, x, bias, residual, weight, ln_bias, *args):  # type: ignore[no-untyped-def]
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, bias, residual, weight, ln_bias))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.dropout_p, seed, ctx.site, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, seed, cu_seqlens)


def _autograd(ctx, grad_output):  # type: ignore[no-untyped-def]
    *tensors, seed, cu_seqlens = ctx.saved_tensors
    grads = _backward_op(grad_output, *tensors, ctx.eps, ctx.dropout_p, seed, ctx.site, cu_seqlens)
    return *grads, *([None] * 5)


_op.register_autograd(_autograd, setup_context=_setup_context)
has_no_derivative(_backward_op)


def dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)).

    Args:
        x, residual: [tokens, hidden], floating point.
        bias, weight, ln_bias: [hidden], the dtype of x, of residual, or float32.
        eps: added to the variance; ALBERT uses 1e-12.
        dropout_p: probability of dropping an element of x + bias; needs `seed`.
        seed: int64 tensor with one element, on the device.
        site: which dropout of the forward pass this is (see `albert_fast.ops.dropout`).
        cu_seqlens: int32 [batch + 1], the packed rows: they name the elements to the dropout. Without them all tokens
            are of one row.

    Returns:
        [tokens, hidden], the wider dtype of x and residual.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names it.
    """
    check_tensor("x", x, (None, None), dtype=FLOATS)
    check_tensor("residual", residual, tuple(x.shape), like=x, dtype=FLOATS)
    for name, vector in (("bias", bias), ("weight", weight), ("ln_bias", ln_bias)):
        check_tensor(name, vector, (x.shape[1],), like=x, dtype=(x.dtype, residual.dtype, torch.float32))
    check_dropout(dropout_p, seed, x.device)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[0], x.shape[0], x)
    if backends.uses_reference(_call(x)):
        return dropout_add_layer_norm_reference(
            x,
            bias,
            residual,
            weight,
            ln_bias,
            eps=eps,
            dropout_p=dropout_p,
            seed=seed,
            site=site,
            cu_seqlens=cu_seqlens,
        )
    return _op(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens)
