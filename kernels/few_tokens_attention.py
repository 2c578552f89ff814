"""Attention for few tokens: a program holds a tile of queries and the keys and values of all tokens.

For few tokens time goes by in trips to L2, one after the other: to find a row, to load its keys, its values. Here no
load waits for another one. Which sequence a token is of follows from all offsets, counted: scores between sequences
are -inf, and the softmax is taken in one go. What is computed for nothing costs less than a second trip.

Values of another sequence never reach a sum, not even multiplied with 0, which would make NaN of what is not finite.
Precision: as in `albert_fast.kernels.attention_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.attention_tile import LOG2E
from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, dot_precision, launch, next_power_of_2
from albert_fast.ops.attention import AttentionOptions

MOST_TOKENS = 256
MOST_SEQUENCES = 63  # every token is compared with every offset


def _shape(qkv: Tensor, heads: int) -> tuple[int, int, int]:
    """Size of a head, and the tile that has the keys, and that which has the values, of all tokens."""
    tokens, columns = qkv.shape
    head_dim = columns // (3 * heads)
    return head_dim, max(16, next_power_of_2(tokens)), max(16, next_power_of_2(head_dim))


def serves(qkv: Tensor, cu_seqlens: Tensor, heads: int, options: AttentionOptions) -> bool:
    """Whether qkv [tokens, 3 * heads * head_dim] is small enough, and nothing is asked for that is missing here."""
    if options.causal or options.dropout_p > 0.0 or options.bias is not None:
        return False
    # Registers hold the values, and in float32 what the FMA units multiply, too: larger tiles spill.
    _, keys, block_d = _shape(qkv, heads)
    most_keys, most = (MOST_TOKENS, 16384) if qkv.dtype.itemsize == 2 else (64, 4096)
    return keys <= most_keys and keys * block_d <= most and cu_seqlens.numel() - 1 <= MOST_SEQUENCES


@triton.jit
def _load(pointer, token, column, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zero beyond HEAD_DIM."""
    if HEAD_DIM < BLOCK_D:
        tile = tl.load(pointer + (token + column), mask=column < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointer + (token + column))
    return tile


@triton.jit(do_not_specialize=["tokens", "batch", "scale"])
def few_tokens_attention_kernel(
    qkv,  # [tokens, 3, HEADS, HEAD_DIM]
    cu_seqlens,  # [batch + 1]
    context,  # [tokens, HEADS, HEAD_DIM]
    tokens,
    batch,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,  # at least the tokens
    OFFSETS: tl.constexpr,  # at least batch + 1
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    first_token = tl.program_id(0) * BLOCK_M
    query_token = first_token + tl.arange(0, BLOCK_M)[:, None]
    key_token = tl.arange(0, KEYS)
    column = tl.arange(0, BLOCK_D)
    qkv += tl.program_id(1) * HEAD_DIM
    # What lies beyond is read from the last token, and is of no sequence.
    query_row, key_row = tl.minimum(query_token, tokens - 1), tl.minimum(key_token, tokens - 1)
    offset = tl.arange(0, OFFSETS)
    offsets = tl.load(cu_seqlens + offset, mask=offset <= batch, other=2**30)
    v = _load(qkv + 2 * WIDTH, key_row[:, None] * (3 * WIDTH), column[None, :], HEAD_DIM, BLOCK_D)
    tl.debug_barrier()  # loads go on; without it ptxas puts off those of v until k has come (seen in SASS of sm_90)
    q = _load(qkv, query_row * (3 * WIDTH), column[None, :], HEAD_DIM, BLOCK_D)
    k = _load(qkv + WIDTH, key_row[None, :] * (3 * WIDTH), column[:, None], HEAD_DIM, BLOCK_D)  # [D, KEYS]

    # Of each token: 1 for the first, batch for the last one; what is before or beyond is of none.
    query_sequence = tl.sum((offsets[None, :] <= query_token).to(tl.int32), axis=1, keep_dims=True)
    key_sequence = tl.sum((offsets[:, None] <= key_token[None, :]).to(tl.int32), axis=0, keep_dims=True)
    value_sequence = tl.sum((offsets[None, :] <= key_token[:, None]).to(tl.int32), axis=1, keep_dims=True)
    first = tl.maximum(tl.sum((offsets <= first_token).to(tl.int32)), 1)
    last = tl.minimum(tl.sum((offsets < first_token + BLOCK_M).to(tl.int32)), batch)
    scores = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)  # [M, KEYS]
    scores = tl.where(query_sequence == key_sequence, scores, float("-inf"))
    probabilities = tl.exp2(scores - tl.max(scores, axis=1, keep_dims=True))
    row_sum = tl.sum(probabilities, axis=1, keep_dims=True)

    result = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for sequence in range(first, last + 1):  # mostly one; each row takes the sums of its own
        values = tl.where(value_sequence == sequence, v, 0.0)
        total = tl.dot(probabilities.to(v.dtype), values, input_precision=PRECISION)
        result = tl.where(query_sequence == sequence, total / row_sum, result)

    at = context + (tl.program_id(1) * HEAD_DIM + query_row * WIDTH + column[None, :])
    tl.store(at, result.to(context.dtype.element_ty), mask=(query_token < tokens) & (column < HEAD_DIM)[None, :])


def _tiles(*half: tuple[int, int]) -> Tiles:
    """Of BLOCK_M and warps, on every architecture."""
    configs = [Config({"BLOCK_M": m}, warps) for m, warps in half]
    single = [Config({"BLOCK_M": 16}, 8)]
    return Tiles(
        interpreter=Config({"BLOCK_M": 16}),
        half=dict.fromkeys(ARCHITECTURES, configs),
        single=dict.fromkeys(ARCHITECTURES, single),
    )


SMALL = _tiles((16, 4), (32, 4), (16, 2), (16, 8), (64, 4))
LARGE = _tiles((16, 8), (32, 8), (16, 4), (64, 8))  # keys of more than 8192 elements, which take 4 warps' registers


def few_tokens_attention(qkv: Tensor, cu_seqlens: Tensor, heads: int, scale: float, context: Tensor) -> None:
    """context [tokens, heads * head_dim] = attention of qkv [tokens, 3 * heads * head_dim]; both contiguous."""
    tokens, batch = qkv.shape[0], cu_seqlens.numel() - 1
    head_dim, keys, block_d = _shape(qkv, heads)
    launch(
        few_tokens_attention_kernel,
        lambda blocks: (cdiv(tokens, blocks["BLOCK_M"]), heads),
        qkv,
        cu_seqlens.contiguous(),
        context,
        tokens,
        batch,
        scale,
        tiles=LARGE if keys * block_d > 8192 else SMALL,
        dtype=qkv.dtype,
        in_cache=True,  # the product before it wrote what it reads
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        KEYS=keys,
        OFFSETS=next_power_of_2(batch + 1),
        PRECISION=dot_precision(qkv.dtype),
    )
