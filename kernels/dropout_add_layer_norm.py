"""LayerNorm(residual + dropout(x + bias)): every row is read once and stays in registers until it is written.

`layer_norm_forward`, `layer_norm_apply` and `layer_norm_backward` are what the encoder's loop calls, with buffers of
its own; the two functions of the operation are thin callers of the same kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from albert_fast import backends
from albert_fast.kernels import dropout
from albert_fast.kernels import layer_norm_backward as rows
from albert_fast.kernels.column_sum import column_sum
from albert_fast.kernels.launch import cdiv, launch
from albert_fast.kernels.layer_norm_backward import row_statistics


@triton.jit(do_not_specialize=["tokens", "batch", "eps", "scale", "keep_limit", "site"])
def layer_norm_forward_kernel(
    x,  # [tokens, hidden]
    bias,  # [hidden] or None
    residual,  # [tokens, hidden] or None
    weight,  # [hidden]
    ln_bias,  # [hidden]
    y,  # [tokens, hidden]
    sums,  # [tokens, hidden] or None
    statistics,  # float32 [2, tokens] or None
    seed,
    cu_seqlens,  # [batch + 1] or None
    tokens,
    batch,
    hidden,
    stride_x,
    stride_residual,
    stride_y,
    stride_sums,
    eps,
    scale,
    keep_limit,
    site,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
    OFFSETS: tl.constexpr,
    MORE_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_inside = token < tokens
    column_inside = column < hidden
    mask = row_inside[:, None] & column_inside[None, :]
    row = token.to(tl.int64)[:, None]
    # Tokens are read once, vectors by every program: they stay in the first cache.
    summed = tl.load(x + row * stride_x + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )  # [ROWS, BLOCK]
    if residual is not None:
        other = tl.load(
            residual + row * stride_residual + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
    if bias is not None:
        summed += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    w = tl.load(weight + column, mask=column_inside, other=0.0).to(tl.float32)
    shift = tl.load(ln_bias + column, mask=column_inside, other=0.0).to(tl.float32)

    if DROPOUT:
        end, step = 0, 0
        if cu_seqlens is not None:
            end, step = dropout.row_ends(cu_seqlens, batch, 0, OFFSETS)
        keep = dropout.token_keep_mask(
            token, cu_seqlens, batch, end, step, tl.load(seed), site, keep_limit, BLOCK, OFFSETS, MORE_OFFSETS
        )
        summed = tl.where(keep, summed * scale, 0.0)
    if residual is not None:
        summed += other
    # The statistics are those of the rounded sum: it is what the backward pass finds again.
    if sums is not None:
        rounded = summed.to(sums.dtype.element_ty)
        tl.store(sums + row * stride_sums + column[None, :], rounded, mask=mask)
    else:
        rounded = summed.to(y.dtype.element_ty)
    summed = rounded.to(tl.float32)
    mean, rstd = row_statistics(summed, column_inside, hidden, eps)
    if statistics is not None:
        tl.store(statistics + token[:, None], mean, mask=row_inside[:, None])
        tl.store(statistics + tokens + token[:, None], rstd, mask=row_inside[:, None])
    normed = (summed - mean) * rstd * w[None, :] + shift[None, :]
    tl.store(y + row * stride_y + column[None, :], normed, mask=mask)


def layer_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    summed: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)).

    Args:
        x, residual: [tokens, hidden], columns contiguous. None as residual or bias is 0.
        bias, weight, ln_bias: [hidden], contiguous.
        out: [tokens, hidden], columns contiguous; may be x or residual. None: a new tensor of the wider dtype.
        summed: [tokens, hidden], columns contiguous, which receives the sum, or None. Mean and variance are of the sum
            as rounded to its dtype; without it, to that of the output.
        statistics: float32 [2, tokens], contiguous, which receives mean and 1 / std, or None.
    """
    tokens, hidden = x.shape
    if out is None:
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        out = torch.empty(tokens, hidden, dtype=dtype, device=x.device)
    block = rows.block_of(hidden)
    launch(
        layer_norm_forward_kernel,
        lambda blocks: (cdiv(tokens, blocks["ROWS"]),),
        x,
        bias,
        residual,
        weight,
        ln_bias,
        out,
        summed,
        statistics,
        seed if dropout_p else None,
        cu_seqlens if dropout_p else None,
        tokens,
        0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        hidden,
        *(0 if tensor is None else tensor.stride(0) for tensor in (x, residual, out, summed)),
        eps,
        1.0 / (1.0 - dropout_p),
        dropout.limit(dropout_p),
        site,
        tiles=rows.row_tiles(block, half=((32, 4), (32, 2), (32, 1)), single=((16, 1), (16, 2))),
        dtype=x.dtype,
        key=(block, dropout_p > 0),
        BLOCK=block,
        DROPOUT=dropout_p > 0,
        **dropout.offsets_block(cu_seqlens, dropout_p),
    )
    return out


def layer_norm_backward(
    grad_output: Tensor,
    summed: Tensor,
    weight: Tensor,
    statistics: Tensor,
    partials: Tensor,
    *,
    more: Tensor | None = None,
    ln_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    cu_seqlens: Tensor | None = None,
    grad_residual: Tensor | None = None,
    grad_x: Tensor | None = None,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `layer_norm_forward`, from the sum and the statistics that it kept.

    Args:
        grad_output, summed: [tokens, hidden], columns contiguous.
        more: [tokens, hidden], contiguous, which is added to grad_output in float32; or None.
        weight, ln_bias: [hidden], contiguous; ln_bias for `normed` alone.
        statistics: float32 [2, tokens], contiguous.
        partials: float32 [programs, 3 hidden], contiguous, to which is added what has the gradients of weight, ln_bias
            and bias as its column sums; of `programs_of` rows.
        grad_residual, grad_x, normed: buffers [tokens, hidden], columns contiguous, or None; the first three tensors
            read or written may be one. `normed` receives LayerNorm(summed).

    Returns:
        gradients of residual and x; without dropout and without a buffer for the second, one tensor.
    """
    if grad_residual is None:
        grad_residual = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    if grad_x is None and dropout_p:
        grad_x = torch.empty(summed.shape, dtype=grad_residual.dtype, device=summed.device)
    rows.run(
        grad_output,
        summed,
        None,
        None,
        weight,
        ln_bias if normed is not None else None,
        statistics,
        grad_residual,
        grad_x,
        normed,
        partials,
        eps=0.0,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        cu_seqlens=cu_seqlens,
        more=more,
        accumulate=True,
    )
    return grad_residual, grad_residual if grad_x is None else grad_x


@triton.jit(do_not_specialize=["tokens"])
def layer_norm_apply_kernel(
    sums,  # [tokens, hidden]
    weight,
    ln_bias,
    statistics,  # float32 [2, tokens]
    y,  # [tokens, hidden]
    tokens,
    hidden,
    stride_sums,
    stride_y,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_inside = token < tokens
    column_inside = column < hidden
    mask = row_inside[:, None] & column_inside[None, :]
    row = token.to(tl.int64)[:, None]
    summed = tl.load(sums + row * stride_sums + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(statistics + token, mask=row_inside, other=0.0)[:, None]
    rstd = tl.load(statistics + tokens + token, mask=row_inside, other=0.0)[:, None]
    w = tl.load(weight + column, mask=column_inside, other=0.0).to(tl.float32)
    shift = tl.load(ln_bias + column, mask=column_inside, other=0.0).to(tl.float32)
    normed = (summed - mean) * rstd * w[None, :] + shift[None, :]
    tl.store(y + row * stride_y + column[None, :], normed, mask=mask)


def layer_norm_apply(
    summed: Tensor, weight: Tensor, ln_bias: Tensor, statistics: Tensor, out: Tensor | None = None
) -> Tensor:
    """LayerNorm(summed) [tokens, hidden] from the statistics that `layer_norm_forward` kept; `out` may be `summed`."""
    tokens, hidden = summed.shape
    out = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device) if out is None else out
    block = rows.block_of(hidden)
    launch(
        layer_norm_apply_kernel,
        lambda blocks: (cdiv(tokens, blocks["ROWS"]),),
        summed,
        weight,
        ln_bias,
        statistics,
        out,
        tokens,
        hidden,
        summed.stride(0),
        out.stride(0),
        tiles=rows.row_tiles(block, half=((32, 1), (32, 2)), single=((16, 1), (16, 2))),
        dtype=summed.dtype,
        key=(block,),
        BLOCK=block,
    )
    return out


# -------------------------------------------------------------------------------------------------------- the operation

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _serves(*tensors: Tensor) -> bool:
    """Whether the kernels can read them all: a call is chosen by the dtype of x alone."""
    interpreted = isinstance(layer_norm_forward_kernel, InterpretedFunction)
    return all(t.dtype in _DTYPES and not (interpreted and t.dtype == torch.bfloat16) for t in tensors)


def contiguous_columns(x: Tensor) -> Tensor:
    """[rows, columns] with any stride between rows."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def dropout_add_layer_norm(
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
    if not _serves(bias, residual, weight, ln_bias):
        reference = backends.REFERENCE.load()["dropout_add_layer_norm"]
        return reference(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens)
    return layer_norm_forward(
        contiguous_columns(x),
        bias.contiguous(),
        contiguous_columns(residual),
        weight.contiguous(),
        ln_bias.contiguous(),
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
    )


def dropout_add_layer_norm_backward(
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
    if not _serves(grad_output, bias, residual, weight, ln_bias):
        reference = backends.REFERENCE.load()["dropout_add_layer_norm_backward"]
        return reference(grad_output, x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens)
    grad_x, grad_bias, grad_residual, grad_weight, grad_ln_bias = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)
        for tensor in (x, bias, residual, weight, ln_bias)
    )
    tokens, hidden = x.shape
    programs = rows.programs_of(x.device, tokens, hidden, dropout_p)
    partials = torch.empty(programs, 3 * hidden, dtype=torch.float32, device=x.device)
    rows.run(
        contiguous_columns(grad_output),
        contiguous_columns(x),
        bias.contiguous(),
        contiguous_columns(residual),
        weight.contiguous(),
        None,
        None,
        grad_residual,
        grad_x,
        None,
        partials,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
    )
    column_sum(partials, (grad_weight, grad_ln_bias, grad_bias))
    return grad_x, grad_bias, grad_residual, grad_weight, grad_ln_bias
