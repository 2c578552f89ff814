"""The masked-LM loss, backward: gradients of the word table and of the bias, without a tensor of logits and without
atomics.

A program owns a tile of the vocabulary and goes over all labelled tokens, as the keys and values of attention do in its
backward: it computes their logits again, from them dz = (1 + 2 c L) exp(z - L) - (1 - s) [label] - s / V times the
gradient of the token's loss, and sums dz x. The forward has left the gradient of x, up to that factor. A first kernel
applies it, and lays the labelled tokens' rows and numbers side by side: every tile of the vocabulary reads them. Where
the loss was a mean it also divides by how many labels there were, which the device alone knows.

Precision: all in float32, but dz is rounded to the dtype of x before its product with x. In float16, where a
probability times 1 / tokens would vanish, dz is scaled by what makes the largest gradient of a loss 2**14.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast import backends
from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, dot_precision, launch, next_power_of_2
from albert_fast.kernels.masked_lm_loss import (
    LOG2E,
    MOST_COLUMNS,
    gather_rows,
    load_rows,
    masked_lm_loss,
    rows_of,
    store_rows,
    tiles_of,
)

# The labelled rows are filled up to a multiple of it: no tile of theirs is larger.
_PADDING = tl.constexpr(128)
_ROWS = tl.constexpr(32)  # of a program that gathers


@triton.jit(do_not_specialize=["tokens", "ignore_index", "z_loss", "grad_loss_stride"])
def gather_kernel(
    x,  # [tokens, SIZE]
    labels,  # int64 [tokens]
    positions,  # int32 [tokens]: the labelled ones
    count,  # int32 [1]: how many they are
    grad_loss,  # float32 [tokens]; of a sum or mean of the losses [1], with stride 0
    logsumexp,  # float32 [tokens]
    token_grads,  # [tokens, SIZE]
    grad_x,  # [tokens, SIZE]
    labelled_x,  # [tokens rounded up, BLOCK_E]; the others are [tokens rounded up], too
    target,  # int32: the label, -1 for none of the vocabulary
    exponent,  # float32: the logsumexp; unless EXACT in units of ln 2
    factor,  # float32: gradient of the loss, times 1 + 2 c L
    weight,  # float32: gradient of the loss; None without z-loss
    largest,  # float32 [programs], of |factor| and |weight|; None but in float16
    tokens,
    vocabulary,
    ignore_index,
    z_loss,
    x_stride,
    grad_loss_stride,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EXACT: tl.constexpr,
    MEAN: tl.constexpr,
):
    """_ROWS tokens for grad_x, and as many labelled ones for the rest."""
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    inside = row < tokens
    labelled = inside & (tl.load(labels + row, mask=inside, other=0) != ignore_index)
    rows = tl.load(count)
    if MEAN:
        share = tl.div_rn(tl.load(grad_loss), tl.maximum(rows, 1).to(tl.float32))
        grad = tl.where(labelled, share, 0.0)
    else:
        grad = tl.load(grad_loss + row.to(tl.int64) * grad_loss_stride, mask=labelled, other=0.0)
    grads = gather_rows(token_grads, row, labelled, SIZE, SIZE, BLOCK_E).to(tl.float32) * grad[:, None]
    store_rows(grad_x, row, inside, grads, SIZE)

    if tl.program_id(0) * _ROWS >= tl.cdiv(rows, _PADDING) * _PADDING:
        return
    exists = row < rows
    token = tl.load(positions + row, mask=exists, other=0)
    label = tl.load(labels + token, mask=exists, other=-1)
    tl.store(target + row, tl.where((label >= 0) & (label < vocabulary), label, -1).to(tl.int32))
    total_log = tl.load(logsumexp + token, mask=exists, other=0.0)
    # A row that is none: exp(logit - infinity) is 0.
    scaled_log = total_log if EXACT else total_log * LOG2E
    tl.store(exponent + row, tl.where(exists, scaled_log, float("inf")))
    if MEAN:
        grad = tl.where(exists, share, 0.0)
    else:
        grad = tl.load(grad_loss + token.to(tl.int64) * grad_loss_stride, mask=exists, other=0.0)
    slope = 1.0 + 2.0 * z_loss * total_log
    tl.store(factor + row, grad * slope)
    if weight is not None:
        tl.store(weight + row, grad)
    if largest is not None:
        tl.store(largest + tl.program_id(0), tl.max(tl.abs(grad) * tl.maximum(tl.abs(slope), 1.0)))
    x_rows = gather_rows(x, token, exists, x_stride, SIZE, BLOCK_E)
    tl.store(labelled_x + row.to(tl.int64)[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :], x_rows)


@triton.jit
def _scale(largest, rows):
    """What brings |dz| near 2**15 and not beyond."""
    maxima = tl.zeros([512], tl.float32)
    programs = tl.cdiv(rows, _ROWS)
    for first in range(0, programs, 512):
        index = first + tl.arange(0, 512)
        maxima = tl.maximum(maxima, tl.load(largest + index, mask=index < programs, other=0.0))
    return 16384.0 / tl.maximum(tl.max(maxima), 1e-30)


@triton.jit(do_not_specialize=["label_smoothing"])
def table_gradient_kernel(
    labelled_x,
    table,
    bias,
    count,
    target,
    exponent,
    factor,
    weight,
    largest,
    grad_table,  # [vocabulary, SIZE]
    grad_bias,  # [vocabulary]
    vocabulary,
    label_smoothing,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SMOOTHED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_V
    word = tl.arange(0, BLOCK_V)
    inside = word < vocabulary - first
    rows = tl.load(count)
    scale = 1.0
    if largest is not None:
        scale = _scale(largest, rows)
    off = label_smoothing / vocabulary
    table_rows = load_rows(table, first, vocabulary, BLOCK_V, SIZE, BLOCK_E)  # [V, E]
    bias_v = tl.load(bias + first + word, mask=inside, other=float("-inf")).to(tl.float32)
    gradient = tl.zeros([BLOCK_V, BLOCK_E], tl.float32)
    bias_gradient = tl.zeros([BLOCK_V], tl.float32)
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    for start in range(0, rows, BLOCK_N):
        x_rows = tl.load(labelled_x + (row[:, None] * BLOCK_E + column[None, :]))  # [N, E]
        labelled_x += BLOCK_N * BLOCK_E
        total_log = tl.load(exponent + start + row)[None, :]
        token_factor = tl.load(factor + start + row)[None, :] * scale
        token_weight = token_factor
        if weight is not None:
            token_weight = tl.load(weight + start + row)[None, :] * scale
        is_label = (first + word)[:, None] == tl.load(target + start + row)[None, :]  # [V, N]
        expected = tl.where(is_label, token_weight, 0.0)
        if SMOOTHED:
            expected = tl.where(is_label, (1.0 - label_smoothing + off) * token_weight, off * token_weight)
        logits = tl.dot(table_rows, tl.trans(x_rows), input_precision=PRECISION) + bias_v[:, None]  # [V, N]
        probabilities = tl.exp2((logits - total_log) * LOG2E if EXACT else logits * LOG2E - total_log)
        grad_logits = probabilities * token_factor - expected
        bias_gradient += tl.sum(grad_logits, axis=1)
        gradient = tl.dot(grad_logits.to(x_rows.dtype), x_rows, gradient, input_precision=PRECISION)
    back = 1.0 / scale
    tl.store(grad_bias + first + word, (bias_gradient * back).to(grad_bias.dtype.element_ty), mask=inside)
    pointers = grad_table + first.to(tl.int64) * SIZE + (word[:, None] * SIZE + column[None, :])
    mask = inside[:, None] & (column < SIZE)[None, :]
    tl.store(pointers, (gradient * back).to(grad_table.dtype.element_ty), mask=mask)


_GATHER = (Config({}, num_warps=4),)
GATHER_TILES = Tiles(
    Config({}), half=dict.fromkeys(ARCHITECTURES, _GATHER), single=dict.fromkeys(ARCHITECTURES, _GATHER)
)


def _config(block_v: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_V": block_v, "BLOCK_N": block_n}, num_warps, num_stages)


_INTERPRETER = _config(64, 32, 4, 2)

# By BLOCK_E, up to it.
TILES = {
    128: Tiles(
        _INTERPRETER,
        half={
            80: (_config(64, 64, 4, 3), _config(128, 64, 8, 2), _config(64, 32, 4, 3)),
            90: (_config(64, 64, 4, 3), _config(128, 32, 4, 3), _config(128, 64, 8, 3)),
            100: (_config(128, 64, 8, 3), _config(64, 64, 4, 3)),
        },
        single=dict.fromkeys(ARCHITECTURES, (_config(32, 64, 8, 1), _config(32, 64, 8, 2), _config(64, 64, 8, 2))),
    ),
    256: Tiles(
        _INTERPRETER,
        half=dict.fromkeys(ARCHITECTURES, (_config(64, 32, 8, 2),)),
        single=dict.fromkeys(ARCHITECTURES, (_config(32, 16, 8, 2),)),
    ),
    512: Tiles(
        _INTERPRETER,
        half=dict.fromkeys(ARCHITECTURES, (_config(32, 16, 8, 2),)),
        single=dict.fromkeys(ARCHITECTURES, (_config(16, 16, 8, 1),)),
    ),
}


def masked_lm_loss_backward(
    grad_loss: Tensor,
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    token_grads: Tensor,
    positions: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, table and bias, each in its own dtype."""
    tokens, size = x.shape
    options = (ignore_index, label_smoothing, z_loss)
    if size > MOST_COLUMNS:
        reference = backends.REFERENCE.load()["masked_lm_loss_backward"]
        kept = (logsumexp, token_grads, positions, count)
        return reference(grad_loss, x, table, bias, labels, *kept, *options, reduction)
    if tokens == 0:
        return tuple(torch.zeros_like(tensor) for tensor in (x, table, bias))
    x, labels, bias = rows_of(x), labels.contiguous(), bias.contiguous()
    if token_grads.shape != x.shape:  # of a forward that was told that no gradients would be asked for
        *_, token_grads, positions, count = masked_lm_loss(x, table, bias, labels, *options, "none", True)
    vocabulary = table.shape[0]
    block_e = max(16, next_power_of_2(size))
    grad_x = x.new_empty(tokens, size)
    grad_table, grad_bias = table.new_empty(table.shape), bias.new_empty(vocabulary)
    table = table.to(x.dtype).contiguous()

    padded = cdiv(tokens, _PADDING.value) * _PADDING.value
    programs = padded // _ROWS.value
    labelled_x = x.new_empty(padded, block_e)
    target = labels.new_empty(padded, dtype=torch.int32)
    exponent, factor = (x.new_empty(padded, dtype=torch.float32) for _ in range(2))
    weight = x.new_empty(padded, dtype=torch.float32) if z_loss > 0.0 else None
    largest = x.new_empty(programs, dtype=torch.float32) if x.dtype == torch.float16 else None
    launch(
        gather_kernel,
        lambda blocks: (programs,),
        x,
        labels,
        positions,
        count,
        grad_loss,
        logsumexp.contiguous(),
        token_grads.contiguous(),
        grad_x,
        labelled_x,
        target,
        exponent,
        factor,
        weight,
        largest,
        tokens,
        vocabulary,
        ignore_index,
        z_loss,
        x.stride(0),
        grad_loss.stride(0) if reduction == "none" else 0,
        tiles=GATHER_TILES,
        dtype=x.dtype,
        SIZE=size,
        BLOCK_E=block_e,
        EXACT=x.dtype == torch.float32,
        MEAN=reduction == "mean",
    )
    launch(
        table_gradient_kernel,
        lambda blocks: (cdiv(vocabulary, blocks["BLOCK_V"]),),
        labelled_x,
        table,
        bias,
        count,
        target,
        exponent,
        factor,
        weight,
        largest,
        grad_table,
        grad_bias,
        vocabulary,
        label_smoothing,
        tiles=tiles_of(TILES, block_e),
        dtype=x.dtype,
        key=(next_power_of_2(tokens), vocabulary),
        SIZE=size,
        BLOCK_E=block_e,
        SMOOTHED=label_smoothing > 0.0,
        EXACT=x.dtype == torch.float32,
        PRECISION=dot_precision(x.dtype),
    )
    return grad_x, grad_table, grad_bias
