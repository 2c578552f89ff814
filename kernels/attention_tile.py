"""What the kernels of attention share: which tile of which row a program has, and what is done to a tile of scores.

A program serves one head and one tile of a row's tokens; the tiles of all rows are numbered one after the other, and
that number is its slot. The host knows how many tokens and rows there are and how long rows may be, not how long they
are, so there may be more slots than tiles: a program whose tile lies beyond its row returns.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.dropout import keep_mask
from albert_fast.kernels.launch import Config, Tiles, cdiv
from albert_fast.ops.attention import AttentionOptions

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

Cut = tuple[int, int, int, int]  # BLOCK_M queries, BLOCK_N keys, warps, stages


def tiles(
    interpreter: tuple[int, int],
    *,
    sm_80: Sequence[Cut],
    sm_90: Sequence[Cut],
    sm_100: Sequence[Cut],
    single: Sequence[Cut] = (),
) -> Tiles:
    """A table. `single` is for float32, whose products run on the FMA units, on every architecture."""

    def configs(cuts: Sequence[Cut]) -> list[Config]:
        return [Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages) for m, n, warps, stages in cuts]

    # On 10.0 Triton 3.6 computes products of 64 rows and more in tf32, whatever it is asked for.
    small = [cut for cut in single if max(cut[:2]) < 64]
    return Tiles(
        Config({"BLOCK_M": interpreter[0], "BLOCK_N": interpreter[1]}),
        half={80: configs(sm_80), 90: configs(sm_90), 100: configs(sm_100)},
        single={80: configs(single), 90: configs(single), 100: configs(small)},
    )


def table_key(head_dim: int, options: AttentionOptions) -> tuple[int, bool]:
    """Which table serves a call: head size rounded up, and whether there is more in a tile of scores than products."""
    return 64 if head_dim <= 64 else 128, options.bias is not None or options.dropout_p > 0.0


def slots(tokens: int, batch: int, max_seqlen: int, block: int) -> int:
    """Number of slots for tiles of `block` tokens: what `tile_of` counts on, and enough to zero every token."""
    packed, padded = tokens // block + batch, batch * cdiv(max_seqlen, block)
    return max(min(packed, padded), cdiv(tokens, block))


def rows(x: Tensor) -> Tensor:
    """Columns contiguous, any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def bias_layout(bias: Tensor | None) -> tuple[int, int, int, int, int]:
    """Columns and strides of [batch or 1, heads or 1, queries, keys]; 0 where it repeats."""
    if bias is None:
        return 0, 0, 0, 0, 0
    row, head, query, key = bias.stride()
    return bias.shape[3], row if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0, query, key


@triton.jit
def tile_of(cu_seqlens, slot, tokens, batch, max_seqlen, BLOCK: tl.constexpr):
    """Row of a slot and which of the row's tiles it is; the row may be `batch` or more: none."""
    tiles_per_row = tl.cdiv(max_seqlen, BLOCK)
    if batch * tiles_per_row <= tokens // BLOCK + batch:
        # As many slots for each row: no padding to speak of.
        row = slot // tl.maximum(tiles_per_row, 1)
        tile = slot - row * tiles_per_row
    else:
        # Row r has the slots from cu_seqlens[r] // BLOCK + r: at least ceil(length / BLOCK) of them, whatever the
        # lengths. The slot is of the last row that begins at or before it.
        row = -1
        for first in range(0, batch, 512):
            candidates = first + tl.arange(0, 512)
            begins = tl.load(cu_seqlens + candidates, mask=candidates < batch, other=0) // BLOCK + candidates
            row += tl.sum(((begins <= slot) & (candidates < batch)).to(tl.int32))
        row = tl.maximum(row, 0)  # only offsets that are none have no such row, or begin later
        tile = tl.maximum(slot - (tl.load(cu_seqlens + row) // BLOCK + row), 0)
    return row, tile


@triton.jit
def row_range(cu_seqlens, row, tokens, batch, max_seqlen):
    """Where a row begins, int64, and its length; 0 for a row that is none.

    Offsets that no row can have never lead out of the tensors, nor lengths beyond max_seqlen out of the bias.
    """
    inside = row < batch
    begin = tl.load(cu_seqlens + row, mask=inside, other=0)
    end = tl.load(cu_seqlens + row + 1, mask=inside, other=0)
    begin = tl.minimum(tl.maximum(begin, 0), tokens)
    length = tl.minimum(tl.minimum(end, tokens) - begin, max_seqlen)
    return begin.to(tl.int64), tl.maximum(length, 0)


@triton.jit
def load_tile(pointer, begin, first, length, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D]: tokens from `first` on of a row that begins at token `begin`, int64; zero beyond its length."""
    tokens, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = tokens < length - first
    if HEAD_DIM < BLOCK_D:
        inside = inside & (columns < HEAD_DIM)
    return tl.load(pointer + (begin + first) * stride + (tokens * stride + columns), mask=inside, other=0.0)


@triton.jit
def store_tile(
    pointer,
    begin,
    first,
    length,
    stride,
    tile,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The reverse of `load_tile`."""
    tokens, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    pointers = pointer + (begin + first) * stride + (tokens * stride + columns)
    inside = tokens < length - first
    if HEAD_DIM < BLOCK_D:
        inside = inside & (columns < HEAD_DIM)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def first_beyond(cu_seqlens, slot, tokens, batch, BLOCK: tl.constexpr):
    """The slot's share of the tokens that belong to no row: BLOCK from this one on, int64; `tokens` or more: none."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), tokens).to(tl.int64) + slot.to(tl.int64) * BLOCK


@triton.jit
def store_zeros(pointer, begin, tokens, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros from token `begin` on, where there are any."""
    zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
    store_tile(pointer, begin, 0, tokens - begin, stride, zeros, ROWS, HEAD_DIM, BLOCK_D)


# Without tensor cores a product's sum is one chain of FMAs, and each rounds the sum so far: an error that grows with
# the root of the length. In float32 no chain is longer than this, or than a tile; cuBLAS splits its sums as well. On an
# H200 single chains made 2.1 times the error of PyTorch's products and softmax, over 128 columns and over 511 keys.
CHAIN = tl.constexpr(32)


@triton.jit
def _sum_apart(x, y):
    """x + y, which for two products compilers would make one chain."""
    return tl.fma(x, tl.full(x.shape, 1.0, tl.float32), y)


@triton.jit
def product(
    a,
    at_a,
    begin_a,
    first_a,
    length_a,
    stride_a,
    b,
    at_b,
    begin_b,
    first_b,
    length_b,
    stride_b,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a bᵀ, of two tiles and what `load_tile` read them with. In float32 it reads them again, in parts."""
    if a.dtype == tl.float32 and a.shape[1] > CHAIN:
        result = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
        for first in tl.static_range(0, a.shape[1], CHAIN):
            x = load_tile(at_a + first, begin_a, first_a, length_a, stride_a, a.shape[0], HEAD_DIM - first, CHAIN)
            y = load_tile(at_b + first, begin_b, first_b, length_b, stride_b, b.shape[0], HEAD_DIM - first, CHAIN)
            result = _sum_apart(tl.dot(x, tl.trans(y), input_precision=PRECISION), result)
    else:
        result = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return result


@triton.jit
def add_product(accumulator, a, b, PRECISION: tl.constexpr):
    """accumulator + a b."""
    if a.dtype == tl.float32:
        result = _sum_apart(tl.dot(a, b, input_precision=PRECISION), accumulator)
    else:
        result = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return result


@triton.jit
def add_bias(products, scale, bias, first_q, first_k, queries, keys, length_q, columns, stride_q, stride_k):
    """products * scale + bias, in units of ln 2, since the softmax is taken with exp2.

    Args:
        scale: times log2(e).
        bias: pointer to that of the row and head. Below -2.3e38 in float32 it counts as -inf.
        queries, keys: positions in the tile, in the orientation of products: [M, 1] and [1, N], or [1, M] and [N, 1].
        columns: of the bias, at least length_k. What stands beyond length_k is added, too: the caller masks it.
    """
    bias += tl.cast(first_q, tl.int64) * stride_q + tl.cast(first_k, tl.int64) * stride_k
    inside = (queries < length_q - first_q) & (keys < columns - first_k)
    tile = tl.load(bias + (queries * stride_q + keys * stride_k), mask=inside, other=0.0)
    return products * scale + tile.to(tl.float32) * LOG2E


@triton.jit
def visible(queries, keys, length_q, length_k, CAUSAL: tl.constexpr):
    """Which keys exist and, with CAUSAL, may be seen: the last query sees the last key."""
    inside = keys < length_k
    if CAUSAL:
        inside = inside & (keys <= queries + (length_k - length_q))
    return inside


@triton.jit
def keep_tile(seed, site, outer, first_q, first_k, keep_limit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which probabilities [BLOCK_M, BLOCK_N] the dropout keeps; first_k is a multiple of 4."""
    queries = first_q + tl.arange(0, BLOCK_M)
    groups = first_k // 4 + tl.arange(0, BLOCK_N // 4)
    return keep_mask(seed, site, outer, queries[:, None], groups[None, :], keep_limit)
