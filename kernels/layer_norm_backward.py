"""Backward of LayerNorm(residual + dropout(x + bias)), in one pass over the rows.

With s the (rounded) sum, x̂ = (s - mean) / std and g the gradient of the output, the gradient of s is

    (w g - mean(w g) - x̂ mean(w g x̂)) / std

and those of weight, bias of the LayerNorm and bias of x are the column sums of g x̂, g and of the gradient of x. Each
program walks a strip of rows and keeps the three column sums in registers; `column_sum` adds those of all programs.

s, mean and std are read where the forward pass kept them; otherwise they are computed again from x, bias, residual.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels import dropout
from albert_fast.kernels.column_sum import first_sums, strips
from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, launch, next_power_of_2


def block_of(columns: int) -> int:
    """The width of a tile that holds a row."""
    return max(16, next_power_of_2(columns))


def warps_of(block: int) -> int:
    """A row of up to 1024 columns is spread over two warps: with more of them sums take more instructions (each warp
    shuffles, and they meet at a barrier), with one there are too few registers."""
    return min(max(block // 512, 2), 16)


@functools.cache
def row_tiles(
    block: int, half: tuple[tuple[int, int], ...], single: tuple[tuple[int, int], ...], stages: int | None = None
) -> Tiles:
    """Tiles of whole rows for rows of `block` columns.

    Args:
        half, single: for elements of 2 bytes and of 4, the configurations: how many elements of a tensor a thread holds
            and how many times `warps_of` warps a program has.
        stages: those of the loop over rows; None where there is none.
    """
    loop = {} if stages is None else {"STAGES": stages}

    def config(elements: int, times: int) -> Config:
        warps = min(warps_of(block) * times, 16)
        return Config({"ROWS": max(1, elements * 32 * warps // block), **loop}, warps)

    def each(choices: Sequence[tuple[int, int]]) -> dict[int, list[Config]]:
        return {architecture: [config(*choice) for choice in choices] for architecture in ARCHITECTURES}

    return Tiles(interpreter=Config({"ROWS": 16, **loop}), half=each(half), single=each(single))


# ------------------------------------------------------------------------------------------------------------ LayerNorm


@triton.jit
def row_statistics(summed, column_inside, columns, eps):
    """Mean and 1 / std of each row of float32 [rows, BLOCK], which is 0 beyond its columns: [rows, 1].

    In two passes over registers: mean(s²) - mean(s)² would lose everything where the mean is large.
    """
    mean = tl.sum(summed, axis=1, keep_dims=True) / columns
    centred = tl.where(column_inside[None, :], summed - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / columns
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def gradient_of_sum(grad, normed, weight, rstd, columns):
    """The formula above, [rows, BLOCK]. grad and weight are 0 beyond the columns."""
    weighted = grad * weight[None, :]
    # [rows, BLOCK, 2]: both means in one exchange between the warps
    means = tl.sum(tl.join(weighted, weighted * normed), axis=1) / columns
    mean, mean_normed = tl.split(means)
    return (weighted * rstd - mean[:, None] * rstd) - normed * (mean_normed[:, None] * rstd)


@triton.jit(do_not_specialize=["tokens", "strip", "batch", "eps", "scale", "keep_limit", "site"])
def layer_norm_backward_kernel(
    grad_output,  # [tokens, hidden]
    more,  # [tokens, hidden], contiguous: is added to grad_output; or None
    x,  # [tokens, hidden]; the sum where SAVED
    bias,  # [hidden] or None
    residual,  # [tokens, hidden]; None where SAVED
    weight,  # [hidden]
    ln_bias,  # [hidden], where `normed` is wanted
    statistics,  # float32 [2, tokens], where SAVED
    grad_residual,  # [tokens, hidden]
    grad_x,  # [tokens, hidden], or None: it is grad_residual
    normed,  # [tokens, hidden] or None
    partials,  # float32 [programs, 3, hidden]
    seed,
    cu_seqlens,  # [batch + 1] or None
    tokens,
    strip,
    batch,
    hidden,
    stride_grad,
    stride_x,
    stride_residual,
    stride_grad_residual,
    stride_grad_x,
    stride_normed,
    eps,
    scale,
    keep_limit,
    site,
    BLOCK: tl.constexpr,
    SAVED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    OFFSETS: tl.constexpr,
    MORE_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    column_inside = column < hidden
    w = tl.load(weight + column, mask=column_inside, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)
    if normed is not None:
        shift = tl.load(ln_bias + column, mask=column_inside, other=0.0).to(tl.float32)
    end, step = 0, 0
    if DROPOUT:
        key = tl.load(seed)
        if cu_seqlens is not None:
            end, step = dropout.row_ends(cu_seqlens, batch, 0, OFFSETS)
    partial = partials + program.to(tl.int64) * 3 * hidden + column
    sum_weight = first_sums(partial, column_inside, ROWS, BLOCK, ACCUMULATE)
    sum_ln_bias = first_sums(partial + hidden, column_inside, ROWS, BLOCK, ACCUMULATE)
    sum_bias = first_sums(partial + 2 * hidden, column_inside, ROWS, BLOCK, ACCUMULATE)

    last = tl.minimum(program * strip + strip, tokens)
    for start in tl.range(program * strip, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        row_inside = token < last
        mask = row_inside[:, None] & column_inside[None, :]
        row = token.to(tl.int64)[:, None]
        grad = tl.load(grad_output + row * stride_grad + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if more is not None:
            grad += tl.load(more + row * hidden + column[None, :], mask=mask, other=0.0).to(tl.float32)
        summed = tl.load(x + row * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = dropout.token_keep_mask(
                token, cu_seqlens, batch, end, step, key, site, keep_limit, BLOCK, OFFSETS, MORE_OFFSETS
            )
        if SAVED:
            mean = tl.load(statistics + token, mask=row_inside, other=0.0)[:, None]
            rstd = tl.load(statistics + tokens + token, mask=row_inside, other=0.0)[:, None]
        else:
            if bias is not None:
                summed += b[None, :]
            if DROPOUT:
                summed = tl.where(keep, summed * scale, 0.0)
            summed += tl.load(residual + row * stride_residual + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if x.dtype.element_ty == residual.dtype.element_ty:
                summed = summed.to(x.dtype.element_ty).to(tl.float32)
            mean, rstd = row_statistics(summed, column_inside, hidden, eps)
        unit = (summed - mean) * rstd
        gradient = gradient_of_sum(grad, unit, w, rstd, hidden)
        tl.store(grad_residual + row * stride_grad_residual + column[None, :], gradient, mask=mask)
        if DROPOUT:
            gradient = tl.where(keep, gradient * scale, 0.0)
        if grad_x is not None:
            tl.store(grad_x + row * stride_grad_x + column[None, :], gradient, mask=mask)
        if normed is not None:
            tl.store(normed + row * stride_normed + column[None, :], unit * w[None, :] + shift[None, :], mask=mask)
        sum_weight += grad * unit
        sum_ln_bias += grad
        sum_bias += gradient

    tl.store(partial, tl.sum(sum_weight, axis=0), mask=column_inside)
    tl.store(partial + hidden, tl.sum(sum_ln_bias, axis=0), mask=column_inside)
    tl.store(partial + 2 * hidden, tl.sum(sum_bias, axis=0), mask=column_inside)


def programs_of(device: torch.device, tokens: int, hidden: int, dropout_p: float) -> int:
    """As many as run at once: with masks a thread has about 220 registers, without about 160."""
    return strips(device, tokens, max(1, (8 if dropout_p else 12) // warps_of(block_of(hidden))))


def run(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor | None,
    statistics: Tensor | None,
    grad_residual: Tensor,
    grad_x: Tensor | None,
    normed: Tensor | None,
    partials: Tensor,
    *,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
    more: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """`partials`: float32 [programs, 3 hidden], written or added to, whose column sums are the gradients of weight,
    ln_bias and bias; `more`: contiguous, is added to grad_output."""
    tokens, hidden = grad_output.shape
    block, programs = block_of(hidden), len(partials)
    outputs = (grad_residual, grad_x, normed)
    launch(
        layer_norm_backward_kernel,
        lambda blocks: (programs,),
        grad_output,
        more,
        x,
        bias,
        residual,
        weight,
        ln_bias,
        statistics,
        *outputs,
        partials,
        seed if dropout_p else None,
        cu_seqlens if dropout_p else None,
        tokens,
        cdiv(tokens, max(programs, 1)),
        0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        hidden,
        *(0 if tensor is None else tensor.stride(0) for tensor in (grad_output, x, residual, *outputs)),
        eps,
        1.0 / (1.0 - dropout_p),
        dropout.limit(dropout_p),
        site,
        tiles=row_tiles(block, half=((16, 1), (8, 2)), single=((8, 2), (16, 1)), stages=3),
        dtype=grad_output.dtype,
        key=(block, statistics is not None, dropout_p > 0),
        BLOCK=block,
        SAVED=statistics is not None,
        DROPOUT=dropout_p > 0,
        ACCUMULATE=accumulate,
        **dropout.offsets_block(cu_seqlens, dropout_p),
    )
