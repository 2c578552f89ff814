"""Attention, forward: a program holds a tile of queries and goes over the keys of their row, with the online softmax
(Dao et al., arXiv 2205.14135, algorithm 1; 2307.08691, section 3).

Only a tile with keys beyond the row, or beyond what a causal query sees, is masked. Precision: statistics,
probabilities and the sum over keys in float32; the probabilities are rounded to the dtype of `value` before their
product with it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels import dropout
from albert_fast.kernels.attention_tile import (
    LN2,
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
from albert_fast.kernels.launch import dot_precision, launch, next_power_of_2
from albert_fast.ops.attention import AttentionOptions, logsumexp_shape


@triton.jit(
    do_not_specialize=["tokens_q", "tokens_k", "batch", "heads", "max_seqlen_q", "max_seqlen_k", "site", "keep_limit"]
)
def attention_kernel(
    query,
    key,
    value,
    output,
    logsumexp,  # [heads, tokens_q], with a bias [2, heads, tokens_q], float32
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
    query_stride,
    query_stride_head,
    key_stride,
    key_stride_head,
    value_stride,
    value_stride_head,
    output_stride,
    output_stride_head,
    bias_columns,
    bias_stride_row,
    bias_stride_head,
    bias_stride_q,
    bias_stride_k,
    scale,  # not negative
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
    # The heads of a tile run side by side: together they read whole tokens.
    slot = tl.program_id(0) // heads
    head = tl.program_id(0) - slot * heads
    head64 = head.to(tl.int64)
    output += head64 * output_stride_head
    logsumexp += head64 * tokens_q

    row, tile = tile_of(cu_seqlens_q, slot, tokens_q, batch, max_seqlen_q, BLOCK_M)
    begin_q, length_q = row_range(cu_seqlens_q, row, tokens_q, batch, max_seqlen_q)
    begin_k, length_k = row_range(cu_seqlens_k, row, tokens_k, batch, max_seqlen_k)
    beyond = first_beyond(cu_seqlens_q, slot, tokens_q, batch, BLOCK_M)
    if beyond < tokens_q:
        store_zeros(output, beyond, tokens_q, output_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
        tokens = beyond + tl.arange(0, BLOCK_M)
        no_key = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        tl.store(logsumexp + tokens, no_key, mask=tokens < tokens_q)
        if bias is not None:
            tl.store(logsumexp + tl.cast(heads, tl.int64) * tokens_q + tokens, no_key, mask=tokens < tokens_q)
    first_q = tile * BLOCK_M
    if first_q >= length_q:
        return

    query += head64 * query_stride_head
    key += head64 * key_stride_head
    value += head64 * value_stride_head
    if bias is not None:
        bias += row.to(tl.int64) * bias_stride_row + head64 * bias_stride_head
    q = load_tile(query, begin_q, first_q, length_q, query_stride, BLOCK_M, HEAD_DIM, BLOCK_D)
    # Next to nothing in place of 0, which would make NaN of -inf.
    scale = tl.maximum(scale * LOG2E, 1e-30)

    # All queries of the tile see the keys before `full`, some see those before `end`.
    full = length_k
    end = length_k
    if CAUSAL:
        full = tl.minimum(tl.maximum(first_q + 1 + length_k - length_q, 0), length_k)
        end = tl.minimum(first_q + BLOCK_M, length_q) + (length_k - length_q)
    queries = first_q + tl.arange(0, BLOCK_M)
    if seed is not None:
        dropout_key = tl.load(seed)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the scores, in units of ln 2
    row_sum = tl.zeros((BLOCK_M,), tl.float32)  # of exp2(score - row_max)
    for first_k in range(0, end, BLOCK_N):
        keys = first_k + tl.arange(0, BLOCK_N)
        k = load_tile(key, begin_k, first_k, length_k, key_stride, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, D]
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
        unit = scale
        if bias is not None:
            products = add_bias(
                products,
                scale,
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
        if first_k + BLOCK_N > full:
            inside = visible(queries[:, None], keys[None, :], length_q, length_k, CAUSAL)
            products = tl.where(inside, products, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(products, axis=1) * unit)
        origin = new_max
        if CAUSAL or bias is not None:
            # A query that has seen no key yet: -inf - -inf would be NaN.
            origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        probabilities = tl.exp2(products * unit - origin[:, None])
        correction = tl.exp2(row_max - origin)
        row_sum = row_sum * correction + tl.sum(probabilities, axis=1)
        row_max = new_max
        if seed is not None:
            keep = keep_tile(dropout_key, site, row * heads + head, first_q, first_k, keep_limit, BLOCK_M, BLOCK_N)
            probabilities = tl.where(keep, probabilities, 0.0)
        v = load_tile(value, begin_k, first_k, length_k, value_stride, BLOCK_N, HEAD_DIM, BLOCK_D)  # [N, D]
        accumulator = accumulator * correction[:, None]
        accumulator = add_product(accumulator, probabilities.to(v.dtype), v, PRECISION)

    # Without a key the sum is 0: the output is 0, too, and the logsumexp -inf.
    factor = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
    if seed is not None:
        factor *= dropout_scale
    accumulator = accumulator * factor[:, None]
    store_tile(output, begin_q, first_q, length_q, output_stride, accumulator, BLOCK_M, HEAD_DIM, BLOCK_D)
    of_sum = tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))
    if bias is not None:
        tl.store(logsumexp + begin_q + queries, row_max, mask=queries < length_q)
        result = tl.where(row_sum == 0.0, float("-inf"), of_sum)
        logsumexp += tl.cast(heads, tl.int64) * tokens_q
    else:
        # Not of the sum of both: it would be rounded, too.
        of_sum *= LN2
        result = tl.where(row_sum == 0.0, float("-inf"), row_max * LN2 + of_sum)
    tl.store(logsumexp + begin_q + queries, result, mask=queries < length_q)


# Small tiles leave room for several programs a multiprocessor: the softmax of one then hides behind the products of
# another. Those of 9.0 for head sizes up to 64 were the fastest of 48 on an H200 (benchmarks/NOTES.md).
FORWARD_TILES = {
    (64, False): tiles(
        (64, 64),
        sm_80=[(128, 64, 4, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
        sm_90=[(64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2)],
        sm_100=[(128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
        single=[(32, 32, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)],
    ),
    (64, True): tiles(
        (64, 64),
        sm_80=[(128, 32, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
        sm_90=[(64, 32, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)],
        sm_100=[(128, 64, 8, 2), (128, 32, 4, 2)],
        single=[(32, 64, 8, 2), (16, 32, 4, 2), (64, 64, 8, 2)],
    ),
    (128, False): tiles(
        (64, 64),
        sm_80=[(128, 32, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)],
        sm_90=[(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2)],
        sm_100=[(128, 64, 8, 2), (128, 128, 8, 2)],
        single=[(16, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
    ),
    (128, True): tiles(
        (64, 64),
        sm_80=[(128, 32, 8, 2), (64, 32, 4, 2)],
        sm_90=[(64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2)],
        sm_100=[(128, 32, 8, 2), (128, 64, 8, 2)],
        single=[(16, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
    ),
}


# Up to here the product before it has left all that it reads in L2.
_FEW_TOKENS = 1024


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    out: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; written to `out` [tokens_q, heads * head_dim], any row stride, and `logsumexp`,
    contiguous, where they are given."""
    tokens_q, heads, head_dim = query.shape
    batch = cu_seqlens_q.numel() - 1
    output = query.new_empty(tokens_q, heads * head_dim) if out is None else out
    if logsumexp is None:
        logsumexp = query.new_empty(logsumexp_shape(heads, tokens_q, options.bias), dtype=torch.float32)
    # The kernel takes the largest score to be that of the largest product.
    query, key, value = rows(-query if options.scale < 0.0 else query), rows(key), rows(value)
    launch(
        attention_kernel,
        lambda blocks: (heads * slots(tokens_q, batch, max_seqlen_q, blocks["BLOCK_M"]),),
        query,
        key,
        value,
        output,
        logsumexp,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        options.bias,
        options.seed if options.dropout_p > 0.0 else None,
        tokens_q,
        key.shape[0],
        batch,
        heads,
        max_seqlen_q,
        max_seqlen_k,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        output.stride(0),
        head_dim,
        *bias_layout(options.bias),
        abs(options.scale),
        options.site,
        dropout.limit(options.dropout_p),
        1.0 / (1.0 - options.dropout_p),
        tiles=FORWARD_TILES[table_key(head_dim, options)],
        dtype=query.dtype,
        key=tuple(map(next_power_of_2, (tokens_q, max_seqlen_q, max_seqlen_k))),
        in_cache=tokens_q <= _FEW_TOKENS,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        CAUSAL=options.causal,
        PRECISION=dot_precision(query.dtype),
    )
    return output, logsumexp
