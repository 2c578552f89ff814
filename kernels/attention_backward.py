"""Attention, backward, from the logsumexp of the forward: nothing of size [queries, keys] is stored, no atomics.

    P  = exp(scores - logsumexp)            dV = Pᵀ dO
    dS = P (dO Vᵀ - rowsum(dO O))           dQ = scale dS K,  dK = scale dSᵀ Q

(Dao et al., arXiv 2205.14135, appendix B.) One kernel goes over the keys for a tile of queries (dQ, and rowsum(dO O)
for the other kernel), one over the queries for a tile of keys (dK, dV): 7 products of tiles where 5 would do, and no
sums across programs. Where rows are short a tile of keys is all of the row: the second kernel then computes dQ as well,
with 5 products, and is the only one.

Precision: P, dS and all sums in float32; P and dS are rounded to the inputs' dtype before their products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels import dropout
from albert_fast.kernels.attention_tile import (
    LOG2E,
    add_bias,
    add_product,
    bias_layout,
    first_beyond,
    keep_tile,
    load_tile,
    product,
    row_range,
    rows,
    slots,
    store_tile,
    store_zeros,
    table_key,
    tile_of,
    tiles,
    visible,
)
from albert_fast.kernels.launch import cdiv, dot_precision, launch, next_power_of_2
from albert_fast.ops.attention import AttentionOptions, logsumexp_shape

_NOT_SPECIALIZED = ["tokens_q", "tokens_k", "batch", "heads", "max_seqlen_q", "max_seqlen_k", "site", "keep_limit"]


# In `exponent` and `delta` each row begins at a multiple of this, for aligned reads, and its last tile is filled: no
# tile of queries may be larger.
PADDING = tl.constexpr(128)


@triton.jit
def _padded_begin(begin, row):
    """Of a row in `exponent` and `delta`: as `tile_of` counts slots, of PADDING tokens."""
    return (begin // PADDING + row) * PADDING


@triton.jit
def _exponent(logsumexp, begin, queries, length):
    """What is subtracted from the scores, in units of ln 2: infinity, for P = 0, where no query sees a key."""
    loaded = tl.load(logsumexp + begin + queries, mask=queries < length, other=float("-inf"))
    return tl.where(loaded == float("-inf"), float("inf"), loaded * LOG2E)


@triton.jit
def _exponents(logsumexp, heads, head, tokens_q, begin, queries, length):
    """With a bias, whose logsumexp is in two parts: as `_exponent`, and what is subtracted after that."""
    logsumexp += head * tokens_q + begin
    largest = tl.load(logsumexp + queries, mask=queries < length, other=float("-inf"))
    of_sum = tl.load(logsumexp + heads * tokens_q + queries, mask=queries < length, other=0.0)
    none = largest == float("-inf")
    return tl.where(none, float("inf"), largest), tl.where(none, 0.0, of_sum)


@triton.jit
def _probabilities_in_parts(scores, exponent, of_sum):
    """A score may be more than the largest where products were added up in another order than in the forward: by one
    rounding of it, which of a large one is not little."""
    return tl.exp2(tl.minimum(scores - exponent, 0.0) - of_sum)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def grad_query_kernel(
    query,
    key,
    value,
    output,
    grad_output,
    logsumexp,  # [heads, tokens_q], with a bias [2, heads, tokens_q], float32
    exponent,  # [heads, padded_q], with a bias [2, heads, padded_q], float32, written: what `_exponent(s)` gives
    delta,  # [heads, padded_q], float32, written: rowsum(dO O)
    grad_query,
    cu_seqlens_q,
    cu_seqlens_k,
    bias,
    seed,
    tokens_q,
    tokens_k,
    batch,
    heads,
    max_seqlen_q,
    max_seqlen_k,
    padded_q,
    query_stride,
    query_stride_head,
    key_stride,
    key_stride_head,
    value_stride,
    value_stride_head,
    output_stride,
    output_stride_head,
    grad_output_stride,
    grad_output_stride_head,
    grad_query_stride,
    grad_query_stride_head,
    bias_columns,
    bias_stride_row,
    bias_stride_head,
    bias_stride_q,
    bias_stride_k,
    scale,
    site,
    keep_limit,
    dropout_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot = tl.program_id(0) // heads
    head = tl.program_id(0) - slot * heads
    head64 = head.to(tl.int64)
    grad_query += head64 * grad_query_stride_head

    row, tile = tile_of(cu_seqlens_q, slot, tokens_q, batch, max_seqlen_q, BLOCK_M)
    begin_q, length_q = row_range(cu_seqlens_q, row, tokens_q, batch, max_seqlen_q)
    begin_k, length_k = row_range(cu_seqlens_k, row, tokens_k, batch, max_seqlen_k)
    beyond = first_beyond(cu_seqlens_q, slot, tokens_q, batch, BLOCK_M)
    if beyond < tokens_q:
        store_zeros(grad_query, beyond, tokens_q, grad_query_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    first_q = tile * BLOCK_M
    if first_q >= length_q:
        return

    query += head64 * query_stride_head
    key += head64 * key_stride_head
    value += head64 * value_stride_head
    output += head64 * output_stride_head
    grad_output += head64 * grad_output_stride_head
    if bias is not None:
        bias += row.to(tl.int64) * bias_stride_row + head64 * bias_stride_head
    q = load_tile(query, begin_q, first_q, length_q, query_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    grad_o = load_tile(grad_output, begin_q, first_q, length_q, grad_output_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    o = load_tile(output, begin_q, first_q, length_q, output_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), axis=1)  # [M]
    queries = first_q + tl.arange(0, BLOCK_M)
    padded_begin = head64 * padded_q + _padded_begin(begin_q, row)
    if bias is not None:
        heads64 = tl.cast(heads, tl.int64)
        row_exponent, row_of_sum = _exponents(logsumexp, heads64, head64, tokens_q, begin_q, queries, length_q)
        of_sum = exponent + heads64 * padded_q
        tl.store(of_sum + padded_begin + queries, row_of_sum)
    else:
        row_exponent = _exponent(logsumexp, head64 * tokens_q + begin_q, queries, length_q)
    tl.store(exponent + padded_begin + queries, row_exponent)
    tl.store(delta + padded_begin + queries, row_delta)
    if first_q + BLOCK_M >= length_q:
        # The other kernel's tiles may end later.
        others = first_q + BLOCK_M + tl.arange(0, PADDING)
        inside = others < tl.cdiv(length_q, PADDING) * PADDING
        tl.store(exponent + padded_begin + others, tl.full((PADDING,), float("inf"), tl.float32), mask=inside)
        tl.store(delta + padded_begin + others, tl.zeros((PADDING,), tl.float32), mask=inside)
        if bias is not None:
            tl.store(of_sum + padded_begin + others, tl.zeros((PADDING,), tl.float32), mask=inside)

    # All queries of the tile see the keys before `full`, some see those before `end`.
    full = length_k
    end = length_k
    if CAUSAL:
        full = tl.minimum(tl.maximum(first_q + 1 + length_k - length_q, 0), length_k)
        end = tl.minimum(first_q + BLOCK_M, length_q) + (length_k - length_q)
    if seed is not None:
        dropout_key = tl.load(seed)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_k in range(0, end, BLOCK_N):
        keys = first_k + tl.arange(0, BLOCK_N)
        k = load_tile(key, begin_k, first_k, length_k, key_stride, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(value, begin_k, first_k, length_k, value_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        products = product(
            q,
            query,
            begin_q,
            first_q,
            length_q,
            query_stride,
            k,
            key,
            begin_k,
            first_k,
            length_k,
            key_stride,
            HEAD_DIM,
            PRECISION,
        )  # [M, N]
        unit = scale * LOG2E
        if bias is not None:
            products = add_bias(
                products,
                unit,
                bias,
                first_q,
                first_k,
                tl.arange(0, BLOCK_M)[:, None],
                tl.arange(0, BLOCK_N)[None, :],
                length_q,
                bias_columns,
                bias_stride_q,
                bias_stride_k,
            )
            unit = 1.0
        if bias is not None:
            probabilities = _probabilities_in_parts(products, row_exponent[:, None], row_of_sum[:, None])
        else:
            probabilities = tl.exp2(products * unit - row_exponent[:, None])
        if first_k + BLOCK_N > full:
            inside = visible(queries[:, None], keys[None, :], length_q, length_k, CAUSAL)
            probabilities = tl.where(inside, probabilities, 0.0)
        grad_probabilities = product(
            grad_o,
            grad_output,
            begin_q,
            first_q,
            length_q,
            grad_output_stride,
            v,
            value,
            begin_k,
            first_k,
            length_k,
            value_stride,
            HEAD_DIM,
            PRECISION,
        )  # [M, N]
        if seed is not None:
            keep = keep_tile(dropout_key, site, row * heads + head, first_q, first_k, keep_limit, BLOCK_M, BLOCK_N)
            grad_probabilities = tl.where(keep, grad_probabilities * dropout_scale, 0.0)
        grad_scores = probabilities * (grad_probabilities - row_delta[:, None])
        accumulator = add_product(accumulator, grad_scores.to(k.dtype), k, PRECISION)
    store_tile(
        grad_query, begin_q, first_q, length_q, grad_query_stride, accumulator * scale, BLOCK_M, HEAD_DIM, BLOCK_D
    )


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def grad_key_value_kernel(
    query,
    key,
    value,
    output,  # None without WHOLE_ROWS
    grad_output,
    logsumexp,  # [heads, tokens_q], float32; read with WHOLE_ROWS
    exponent,  # exponent and delta of grad_query_kernel; None with WHOLE_ROWS
    delta,
    grad_query,  # None without WHOLE_ROWS
    grad_key,
    grad_value,
    cu_seqlens_q,
    cu_seqlens_k,
    bias,
    seed,
    tokens_q,
    tokens_k,
    batch,
    heads,
    max_seqlen_q,
    max_seqlen_k,
    padded_q,
    query_stride,
    query_stride_head,
    key_stride,
    key_stride_head,
    value_stride,
    value_stride_head,
    output_stride,
    output_stride_head,
    grad_output_stride,
    grad_output_stride_head,
    grad_query_stride,
    grad_query_stride_head,
    grad_key_stride,
    grad_key_stride_head,
    grad_value_stride,
    grad_value_stride_head,
    bias_columns,
    bias_stride_row,
    bias_stride_head,
    bias_stride_q,
    bias_stride_k,
    scale,
    site,
    keep_limit,
    dropout_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,  # BLOCK_N >= max_seqlen_k, and no bias
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slot = tl.program_id(0) // heads
    head = tl.program_id(0) - slot * heads
    head64 = head.to(tl.int64)
    grad_key += head64 * grad_key_stride_head
    grad_value += head64 * grad_value_stride_head
    if WHOLE_ROWS:
        row = slot
        tile = 0
    else:
        row, tile = tile_of(cu_seqlens_k, slot, tokens_k, batch, max_seqlen_k, BLOCK_N)
    begin_q, length_q = row_range(cu_seqlens_q, row, tokens_q, batch, max_seqlen_q)
    begin_k, length_k = row_range(cu_seqlens_k, row, tokens_k, batch, max_seqlen_k)
    beyond = first_beyond(cu_seqlens_k, slot, tokens_k, batch, BLOCK_N)
    if beyond < tokens_k:
        store_zeros(grad_key, beyond, tokens_k, grad_key_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
        store_zeros(grad_value, beyond, tokens_k, grad_value_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    if WHOLE_ROWS:
        grad_query += head64 * grad_query_stride_head
        output += head64 * output_stride_head
        beyond = first_beyond(cu_seqlens_q, slot, tokens_q, batch, BLOCK_N)
        if beyond < tokens_q:
            store_zeros(grad_query, beyond, tokens_q, grad_query_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    first_k = tile * BLOCK_N
    # The gradient of a query is zero where its row has no keys.
    if first_k >= length_k and not (WHOLE_ROWS and length_q > 0):
        return

    query += head64 * query_stride_head
    key += head64 * key_stride_head
    value += head64 * value_stride_head
    grad_output += head64 * grad_output_stride_head
    if bias is not None:
        bias += row.to(tl.int64) * bias_stride_row + head64 * bias_stride_head
    k = load_tile(key, begin_k, first_k, length_k, key_stride, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, D]
    v = load_tile(value, begin_k, first_k, length_k, value_stride, BLOCK_N, HEAD_DIM, BLOCK_D)
    keys = first_k + tl.arange(0, BLOCK_N)
    if not WHOLE_ROWS:
        padded_begin = head64 * padded_q + _padded_begin(begin_q, row)
        exponent += padded_begin
        delta += padded_begin

    # Some queries from `first` on see keys of the tile, those from `full` on see all of them.
    first = 0
    full = 0
    if CAUSAL:
        full = first_k + BLOCK_N - 1 - (length_k - length_q)
        if not WHOLE_ROWS:
            first = tl.maximum(first_k - (length_k - length_q), 0) // BLOCK_M * BLOCK_M
    if seed is not None:
        dropout_key = tl.load(seed)
    key_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first_q in range(first, length_q, BLOCK_M):
        queries = first_q + tl.arange(0, BLOCK_M)
        q = load_tile(query, begin_q, first_q, length_q, query_stride, BLOCK_M, HEAD_DIM, BLOCK_D)  # [M, D]
        grad_o = load_tile(grad_output, begin_q, first_q, length_q, grad_output_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
        if WHOLE_ROWS:
            row_exponent = _exponent(logsumexp, head64 * tokens_q + begin_q, queries, length_q)
        else:
            row_exponent = tl.load(exponent + queries)
            if bias is not None:
                row_of_sum = tl.load(exponent + tl.cast(heads, tl.int64) * padded_q + queries)
        products = product(
            k,
            key,
            begin_k,
            first_k,
            length_k,
            key_stride,
            q,
            query,
            begin_q,
            first_q,
            length_q,
            query_stride,
            HEAD_DIM,
            PRECISION,
        )  # [N, M]
        unit = scale * LOG2E
        if bias is not None:
            products = add_bias(
                products,
                unit,
                bias,
                first_q,
                first_k,
                tl.arange(0, BLOCK_M)[None, :],
                tl.arange(0, BLOCK_N)[:, None],
                length_q,
                bias_columns,
                bias_stride_q,
                bias_stride_k,
            )
            unit = 1.0
        # Zero for queries beyond the row. Keys beyond it are not stored, but must not reach the queries' gradients.
        if bias is not None:
            probabilities = _probabilities_in_parts(products, row_exponent[None, :], row_of_sum[None, :])
        else:
            probabilities = tl.exp2(products * unit - row_exponent[None, :])
        if (CAUSAL and first_q < full) or (WHOLE_ROWS and length_k < BLOCK_N):
            inside = visible(queries[None, :], keys[:, None], length_q, length_k, CAUSAL)
            probabilities = tl.where(inside, probabilities, 0.0)
        grad_probabilities = product(
            v,
            value,
            begin_k,
            first_k,
            length_k,
            value_stride,
            grad_o,
            grad_output,
            begin_q,
            first_q,
            length_q,
            grad_output_stride,
            HEAD_DIM,
            PRECISION,
        )  # [N, M]
        dropped = probabilities
        if seed is not None:
            keep = keep_tile(dropout_key, site, row * heads + head, first_q, first_k, keep_limit, BLOCK_M, BLOCK_N)
            keep = tl.trans(keep)
            dropped = tl.where(keep, probabilities, 0.0)
            grad_probabilities = tl.where(keep, grad_probabilities * dropout_scale, 0.0)
        value_sum = add_product(value_sum, dropped.to(grad_o.dtype), grad_o, PRECISION)
        if WHOLE_ROWS:
            o = load_tile(output, begin_q, first_q, length_q, output_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
            row_delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), axis=1)
        else:
            row_delta = tl.load(delta + queries)
        grad_scores = (probabilities * (grad_probabilities - row_delta[None, :])).to(q.dtype)
        key_sum = add_product(key_sum, grad_scores, q, PRECISION)
        if WHOLE_ROWS:
            query_sum = tl.dot(tl.trans(grad_scores), k, input_precision=PRECISION) * scale  # [M, D]
            store_tile(grad_query, begin_q, first_q, length_q, grad_query_stride, query_sum, BLOCK_M, HEAD_DIM, BLOCK_D)
    if seed is not None:
        value_sum *= dropout_scale
    store_tile(grad_key, begin_k, first_k, length_k, grad_key_stride, key_sum * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(grad_value, begin_k, first_k, length_k, grad_value_stride, value_sum, BLOCK_N, HEAD_DIM, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------- the host


GRAD_QUERY_TILES = {
    (64, False): tiles(
        (64, 64),
        sm_80=[(64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
        sm_90=[(64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)],
        sm_100=[(128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 2)],
        single=[(16, 32, 4, 2), (32, 64, 8, 2)],
    ),
    (64, True): tiles(
        (64, 64),
        sm_80=[(64, 32, 4, 2), (128, 32, 8, 2)],
        sm_90=[(64, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)],
        sm_100=[(128, 64, 8, 2), (64, 64, 4, 2)],
        single=[(16, 32, 8, 2), (32, 64, 8, 2)],
    ),
    (128, False): tiles(
        (64, 64),
        sm_80=[(64, 32, 4, 2), (64, 64, 4, 2)],
        sm_90=[(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
        sm_100=[(128, 64, 8, 2), (64, 64, 4, 2)],
        single=[(16, 32, 4, 2), (32, 64, 8, 2), (32, 32, 8, 2)],
    ),
    (128, True): tiles(
        (64, 64),
        sm_80=[(64, 32, 4, 2), (64, 32, 8, 2)],
        sm_90=[(128, 32, 8, 2), (64, 32, 4, 2)],
        sm_100=[(64, 32, 4, 2), (128, 32, 8, 2)],
        single=[(16, 32, 4, 2), (32, 64, 8, 2), (32, 32, 8, 2)],
    ),
}
GRAD_KEY_VALUE_TILES = {
    (64, False): tiles(
        (64, 64),
        sm_80=[(32, 128, 8, 2), (32, 64, 4, 2), (64, 128, 8, 1)],
        sm_90=[(64, 64, 4, 3), (32, 64, 4, 3), (32, 128, 4, 3)],
        sm_100=[(64, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 2)],
        single=[(32, 32, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1)],
    ),
    (64, True): tiles(
        (64, 64),
        sm_80=[(16, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2)],
        sm_90=[(32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)],
        sm_100=[(64, 64, 8, 2), (64, 128, 8, 2)],
        single=[(32, 32, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1)],
    ),
    (128, False): tiles(
        (64, 64),
        sm_80=[(32, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2)],
        sm_90=[(32, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 2)],
        sm_100=[(64, 64, 8, 2), (64, 128, 8, 2)],
        single=[(32, 32, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1)],
    ),
    (128, True): tiles(
        (64, 64),
        sm_80=[(16, 64, 8, 2), (32, 64, 8, 2), (16, 64, 4, 2)],
        sm_90=[(16, 128, 8, 2), (32, 64, 8, 2), (32, 128, 8, 2)],
        sm_100=[(32, 64, 8, 2), (64, 64, 8, 2)],
        single=[(16, 32, 8, 1), (32, 32, 8, 1), (16, 64, 8, 1)],
    ),
}
# Of grad_key_value_kernel with WHOLE_ROWS: in half precision, without a bias; by BLOCK_N, the most keys of a row, too.
WHOLE_ROWS_TILES = {
    (64, False, 64): tiles(
        (64, 64),
        sm_80=[(32, 64, 4, 2)],
        sm_90=[(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 1)],
        sm_100=[(64, 64, 8, 2), (64, 64, 4, 2)],
    ),
    (64, True, 64): tiles(
        (64, 64),
        sm_80=[(32, 64, 8, 2), (16, 64, 4, 2)],
        sm_90=[(32, 64, 4, 2), (32, 64, 8, 2)],
        sm_100=[(64, 64, 8, 2), (32, 64, 8, 2)],
    ),
    (64, False, 128): tiles(
        (64, 128),
        sm_80=[(32, 128, 8, 2)],
        sm_90=[(32, 128, 4, 2), (32, 128, 4, 3), (64, 128, 8, 3)],
        sm_100=[(64, 128, 8, 2)],
    ),
    (64, True, 128): tiles(
        (64, 128),
        sm_80=[(16, 128, 8, 2), (32, 128, 8, 2)],
        sm_90=[(32, 128, 8, 2), (64, 128, 8, 2)],
        sm_100=[(32, 128, 8, 2), (64, 128, 8, 2)],
    ),
    (128, False, 64): tiles(
        (64, 64),
        sm_80=[(32, 64, 8, 2)],
        sm_90=[(32, 64, 8, 2)],
        sm_100=[(32, 64, 8, 2)],
    ),
}


def _padded(tokens_q: int, batch: int) -> int:
    return (tokens_q // PADDING.value + batch) * PADDING.value


def memory_between(query: Tensor, batch: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the first of two kernels leaves for the second: exponent and delta of each row of scores, float32."""
    tokens_q, heads, _ = query.shape
    padded = _padded(tokens_q, batch)
    exponent = query.new_empty(logsumexp_shape(heads, padded, bias), dtype=torch.float32)
    return exponent, query.new_empty(heads, padded, dtype=torch.float32)


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
    between: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; written to `grads` where they are given, of any strides but for the last
    dimension's. `between`: `memory_between` of the call, which otherwise is made here."""
    (tokens_q, heads, head_dim), tokens_k = query.shape, key.shape[0]
    batch = cu_seqlens_q.numel() - 1
    if grads is None:
        grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    grad_query, grad_key, grad_value = grads
    query, key, value, output, grad_output = map(rows, (query, key, value, output, grad_output))
    rest = (
        *bias_layout(options.bias),
        options.scale,
        options.site,
        dropout.limit(options.dropout_p),
        1.0 / (1.0 - options.dropout_p),
    )
    sizes = (tokens_q, tokens_k, batch, heads, max_seqlen_q, max_seqlen_k, _padded(tokens_q, batch))
    offsets = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    masks = (options.bias, options.seed if options.dropout_p > 0.0 else None)
    constants = {
        "dtype": query.dtype,
        "key": tuple(map(next_power_of_2, (tokens_q, max_seqlen_q, max_seqlen_k))),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "CAUSAL": options.causal,
        "PRECISION": dot_precision(query.dtype),
    }
    strides = (
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        output.stride(0),
        head_dim,
        grad_output.stride(0),
        head_dim,
        *grad_query.stride()[:2],
    )
    table = table_key(head_dim, options)
    whole_tiles = None
    if options.bias is None and query.dtype.itemsize == 2 and max_seqlen_q <= 4 * 128:
        whole_tiles = WHOLE_ROWS_TILES.get((*table, max(64, next_power_of_2(max_seqlen_k))))
    whole = whole_tiles is not None
    exponent = delta = None
    if not whole:
        exponent, delta = memory_between(query, batch, options.bias) if between is None else between
        launch(
            grad_query_kernel,
            lambda blocks: (heads * slots(tokens_q, batch, max_seqlen_q, blocks["BLOCK_M"]),),
            query,
            key,
            value,
            output,
            grad_output,
            logsumexp,
            exponent,
            delta,
            grad_query,
            *offsets,
            *masks,
            *sizes,
            *strides,
            *rest,
            tiles=GRAD_QUERY_TILES[table],
            **constants,
        )

    def grid(blocks: Mapping[str, int]) -> tuple[int]:
        if not whole:
            return (heads * slots(tokens_k, batch, max_seqlen_k, blocks["BLOCK_N"]),)
        return (heads * max(batch, cdiv(max(tokens_q, tokens_k), blocks["BLOCK_N"])),)

    launch(
        grad_key_value_kernel,
        grid,
        query,
        key,
        value,
        output if whole else None,
        grad_output,
        logsumexp,
        exponent,
        delta,
        grad_query if whole else None,
        grad_key,
        grad_value,
        *offsets,
        *masks,
        *sizes,
        *strides,
        *grad_key.stride()[:2],
        *grad_value.stride()[:2],
        *rest,
        tiles=whole_tiles or GRAD_KEY_VALUE_TILES[table],
        WHOLE_ROWS=whole,
        **constants,
    )
    return grad_query, grad_key, grad_value
