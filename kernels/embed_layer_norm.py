"""dropout(LayerNorm(word + token type + position)): rows of three tables, read where they lie.

The backward pass gathers them again, writes the gradient of their sum [tokens, E], and keeps in registers what needs no
more than sums over all tokens: the gradients of the LayerNorm's vectors, and of up to two token types. Those of the
other tables are sums by id (`segment_sum`).

Ids beyond their table, which cannot be looked at without waiting for the GPU, read nothing: they stand for zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels import dropout
from albert_fast.kernels.column_sum import column_sum, strips
from albert_fast.kernels.dropout_add_layer_norm import contiguous_columns
from albert_fast.kernels.launch import cdiv, launch
from albert_fast.kernels.layer_norm_backward import (
    block_of,
    gradient_of_sum,
    row_statistics,
    row_tiles,
    warps_of,
)
from albert_fast.kernels.segment_sum import segment_sum, sparse_segment_sum

# More token types than this have their gradient from `segment_sum`.
_FEW_TYPES = 2


@triton.jit
def table_rows(table, ids, stride, table_size, column, mask):
    """Rows `ids` [rows] of the table, float32 [rows, BLOCK]: 0 where an id is beyond it."""
    inside = (ids >= 0) & (ids < table_size)
    pointers = table + ids.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=mask & inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def summed_rows(
    inputs,
    position_ids,
    type_ids,
    word,
    position,
    token_type,
    words,
    positions,
    types,
    stride_inputs,
    stride_word,
    stride_position,
    stride_type,
    token,
    row_inside,
    column,
    mask,
    EMBEDS: tl.constexpr,
):
    """The sum of the three rows, rounded to the dtype of the tables: float32 [rows, BLOCK]; and the types [rows]."""
    place = tl.load(position_ids + token, mask=row_inside, other=0)
    kind = tl.load(type_ids + token, mask=row_inside, other=0)
    if EMBEDS:
        vectors = inputs + token.to(tl.int64)[:, None] * stride_inputs + column[None, :]
        summed = tl.load(vectors, mask=mask, other=0.0).to(tl.float32)
    else:
        ids = tl.load(inputs + token, mask=row_inside, other=0)
        summed = table_rows(word, ids, stride_word, words, column, mask)
    summed += table_rows(token_type, kind, stride_type, types, column, mask)
    summed += table_rows(position, place, stride_position, positions, column, mask)
    return summed.to(word.dtype.element_ty).to(tl.float32), kind


@triton.jit(do_not_specialize=["tokens", "batch", "eps", "scale", "keep_limit", "site"])
def embed_layer_norm_kernel(
    inputs,  # ids [tokens], or [tokens, size] where EMBEDS
    position_ids,  # [tokens]
    type_ids,  # [tokens]
    word,  # [words, size]
    position,  # [positions, size]
    token_type,  # [types, size]
    weight,  # [size]
    bias,  # [size]
    y,  # [tokens, size]
    seed,
    cu_seqlens,  # [batch + 1] or None
    tokens,
    batch,
    size,
    words,
    positions,
    types,
    stride_inputs,
    stride_word,
    stride_position,
    stride_type,
    stride_y,
    eps,
    scale,
    keep_limit,
    site,
    BLOCK: tl.constexpr,
    EMBEDS: tl.constexpr,
    DROPOUT: tl.constexpr,
    OFFSETS: tl.constexpr,
    MORE_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_inside = token < tokens
    column_inside = column < size
    mask = row_inside[:, None] & column_inside[None, :]
    summed, _ = summed_rows(
        inputs,
        position_ids,
        type_ids,
        word,
        position,
        token_type,
        words,
        positions,
        types,
        stride_inputs,
        stride_word,
        stride_position,
        stride_type,
        token,
        row_inside,
        column,
        mask,
        EMBEDS,
    )  # [ROWS, BLOCK]
    w = tl.load(weight + column, mask=column_inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)
    mean, rstd = row_statistics(summed, column_inside, size, eps)
    normed = (summed - mean) * rstd * w[None, :] + shift[None, :]
    if DROPOUT:
        end, step = 0, 0
        if cu_seqlens is not None:
            end, step = dropout.row_ends(cu_seqlens, batch, 0, OFFSETS)
        keep = dropout.token_keep_mask(
            token, cu_seqlens, batch, end, step, tl.load(seed), site, keep_limit, BLOCK, OFFSETS, MORE_OFFSETS
        )
        normed = tl.where(keep, normed * scale, 0.0)
    tl.store(y + token.to(tl.int64)[:, None] * stride_y + column[None, :], normed, mask=mask)


@triton.jit(do_not_specialize=["tokens", "strip", "batch", "eps", "scale", "keep_limit", "site"])
def embed_layer_norm_backward_kernel(
    grad_output,  # [tokens, size]
    inputs,  # ids [tokens], or [tokens, size] where EMBEDS
    position_ids,  # [tokens]
    type_ids,  # [tokens]
    word,  # [words, size]
    position,  # [positions, size]
    token_type,  # [types, size]
    weight,  # [size]
    grad_sum,  # [tokens, size]
    partials,  # float32 [programs, 2 + TYPES, size]
    seed,
    cu_seqlens,  # [batch + 1] or None
    tokens,
    strip,
    batch,
    size,
    words,
    positions,
    types,
    stride_grad,
    stride_inputs,
    stride_word,
    stride_position,
    stride_type,
    stride_grad_sum,
    eps,
    scale,
    keep_limit,
    site,
    BLOCK: tl.constexpr,
    EMBEDS: tl.constexpr,
    TYPES: tl.constexpr,  # how many have their gradient summed here: 0, 1 or 2
    DROPOUT: tl.constexpr,
    OFFSETS: tl.constexpr,
    MORE_OFFSETS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    column_inside = column < size
    w = tl.load(weight + column, mask=column_inside, other=0.0).to(tl.float32)
    end, step = 0, 0
    if DROPOUT:
        key = tl.load(seed)
        if cu_seqlens is not None:
            end, step = dropout.row_ends(cu_seqlens, batch, 0, OFFSETS)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_type0 = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_type1 = tl.zeros((ROWS, BLOCK), tl.float32)

    last = tl.minimum(program * strip + strip, tokens)
    for start in tl.range(program * strip, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        row_inside = token < last
        mask = row_inside[:, None] & column_inside[None, :]
        row = token.to(tl.int64)[:, None]
        grad = tl.load(grad_output + row * stride_grad + column[None, :], mask=mask, other=0.0).to(tl.float32)
        summed, kind = summed_rows(
            inputs,
            position_ids,
            type_ids,
            word,
            position,
            token_type,
            words,
            positions,
            types,
            stride_inputs,
            stride_word,
            stride_position,
            stride_type,
            token,
            row_inside,
            column,
            mask,
            EMBEDS,
        )  # [ROWS, BLOCK]
        if DROPOUT:
            keep = dropout.token_keep_mask(
                token, cu_seqlens, batch, end, step, key, site, keep_limit, BLOCK, OFFSETS, MORE_OFFSETS
            )
            grad = tl.where(keep, grad * scale, 0.0)
        mean, rstd = row_statistics(summed, column_inside, size, eps)
        unit = (summed - mean) * rstd
        gradient = gradient_of_sum(grad, unit, w, rstd, size)
        tl.store(grad_sum + row * stride_grad_sum + column[None, :], gradient, mask=mask)
        sum_weight += grad * unit
        sum_bias += grad
        if TYPES > 0:
            sum_type0 += tl.where((kind == 0)[:, None], gradient, 0.0)
        if TYPES > 1:
            sum_type1 += tl.where((kind == 1)[:, None], gradient, 0.0)

    partial = partials + program.to(tl.int64) * (2 + TYPES) * size + column
    tl.store(partial, tl.sum(sum_weight, axis=0), mask=column_inside)
    tl.store(partial + size, tl.sum(sum_bias, axis=0), mask=column_inside)
    if TYPES > 0:
        tl.store(partial + 2 * size, tl.sum(sum_type0, axis=0), mask=column_inside)
    if TYPES > 1:
        tl.store(partial + 3 * size, tl.sum(sum_type1, axis=0), mask=column_inside)


def _sources(
    inputs: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor
) -> tuple[list[Tensor], list[int], list[int]]:
    """What the sum is read from, as the kernels take it: tensors, sizes of the tables, strides between rows."""
    tables = [contiguous_columns(table) for table in (word, position, token_type)]
    inputs = contiguous_columns(inputs) if inputs.is_floating_point() else inputs.contiguous()
    tensors = [inputs, position_ids.contiguous(), token_type_ids.contiguous(), *tables]
    return tensors, [len(table) for table in tables], [tensor.stride(0) for tensor in (inputs, *tables)]


def embed_layer_norm(
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
    padding_idx: int | None,
) -> Tensor:
    tokens, size = inputs.shape[0], word.shape[1]
    y = torch.empty(tokens, size, dtype=word.dtype, device=word.device)
    tensors, sizes, strides = _sources(inputs, position_ids, token_type_ids, word, position, token_type)
    block = block_of(size)
    launch(
        embed_layer_norm_kernel,
        lambda blocks: (cdiv(tokens, blocks["ROWS"]),),
        *tensors,
        weight.contiguous(),
        bias.contiguous(),
        y,
        seed if dropout_p else None,
        cu_seqlens.contiguous() if cu_seqlens is not None and dropout_p else None,
        tokens,
        0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        size,
        *sizes,
        *strides,
        y.stride(0),
        eps,
        1.0 / (1.0 - dropout_p),
        dropout.limit(dropout_p),
        site,
        tiles=row_tiles(block, half=((16, 1), (16, 2)), single=((8, 1), (16, 1))),
        dtype=word.dtype,
        key=(block, dropout_p > 0),
        BLOCK=block,
        EMBEDS=inputs.is_floating_point(),
        DROPOUT=dropout_p > 0,
        **dropout.offsets_block(cu_seqlens, dropout_p),
    )
    return y


def embed_layer_norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of inputs, where they are vectors, and of word, position, token_type, weight and bias.

    The arguments are those of `_backward`, and padding_idx.
    """
    grad_output, inputs, _, _, word, *_, padding_idx = arguments
    grad_sum, *others = _backward(*arguments[:-1])
    if inputs.is_floating_point():
        return grad_sum, torch.zeros(word.shape, dtype=word.dtype, device=word.device), *others
    return grad_output.new_empty(0), segment_sum(inputs, grad_sum, len(word), skip=padding_idx), *others


def embed_layer_norm_backward_sparse(*arguments: Any) -> tuple[Tensor, ...]:
    """The same for ids, with the gradient of word as the ids and rows of `sparse_segment_sum`."""
    _, inputs, _, _, word, *_, padding_idx = arguments
    grad_sum, *others = _backward(*arguments[:-1])
    return *sparse_segment_sum(inputs, grad_sum, len(word), skip=padding_idx), *others


def _backward(
    grad_output: Tensor,
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum [tokens, E], of `position`, `token_type`, `weight` and `bias`."""
    tokens, size = inputs.shape[0], word.shape[1]
    embeds = inputs.is_floating_point()
    few_types = len(token_type) if len(token_type) <= _FEW_TYPES else 0
    grad_sum = torch.empty(tokens, size, dtype=word.dtype, device=word.device)
    grad_weight, grad_bias = (torch.empty(size, dtype=word.dtype, device=word.device) for _ in range(2))
    tensors, sizes, strides = _sources(inputs, position_ids, token_type_ids, word, position, token_type)
    block = block_of(size)
    programs = strips(word.device, tokens, max(1, 8 // warps_of(block)))
    partials = torch.empty(programs, (2 + few_types) * size, dtype=torch.float32, device=word.device)
    grad_output = contiguous_columns(grad_output)
    launch(
        embed_layer_norm_backward_kernel,
        lambda blocks: (programs,),
        grad_output,
        *tensors,
        weight.contiguous(),
        grad_sum,
        partials,
        seed if dropout_p else None,
        cu_seqlens.contiguous() if cu_seqlens is not None and dropout_p else None,
        tokens,
        cdiv(tokens, max(programs, 1)),
        0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        size,
        *sizes,
        grad_output.stride(0),
        *strides,
        grad_sum.stride(0),
        eps,
        1.0 / (1.0 - dropout_p),
        dropout.limit(dropout_p),
        site,
        tiles=row_tiles(block, half=((8, 2), (16, 1)), single=((8, 2), (16, 1)), stages=2),
        dtype=word.dtype,
        key=(block, dropout_p > 0),
        BLOCK=block,
        EMBEDS=embeds,
        TYPES=few_types,
        DROPOUT=dropout_p > 0,
        **dropout.offsets_block(cu_seqlens, dropout_p),
    )
    if few_types:
        grad_type = torch.empty(token_type.shape, dtype=word.dtype, device=word.device)
        column_sum(partials, (grad_weight, grad_bias, grad_type))
    else:
        column_sum(partials, (grad_weight, grad_bias))
        grad_type = segment_sum(token_type_ids, grad_sum, len(token_type))
    grad_position = segment_sum(position_ids, grad_sum, len(position))
    return grad_sum, grad_position, grad_type, grad_weight, grad_bias
