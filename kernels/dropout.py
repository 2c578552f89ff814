"""The masks of `albert_fast.ops.dropout` inside a kernel: the same bits, four elements to a call of Philox."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def limit(dropout_p: float) -> int:
    """The largest 32-bit integer whose element is kept: what kernels take as `keep_limit`."""
    return max(round((1.0 - dropout_p) * 2**32), 1) - 1


@triton.jit
def keep_mask(seed, site, outer, inner, group, keep_limit):
    """Which elements survive, bool [rows, 4 * groups].

    Args:
        seed: int64 scalar, the key.
        site: int32 scalar; outer, inner: int32 [rows, 1] or scalar; group: int32 [1, groups], column // 4: the
            counters. They have to be int32: with int64 ones Triton computes another Philox.
        keep_limit: uint32 scalar, `limit(dropout_p)`.
    """
    word0, word1, word2, word3 = tl.philox(seed, site, outer, inner, group)
    # The column takes integer column % 4: the last axis is the lower bit of it.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = words.reshape(word0.shape[0], 4 * word0.shape[1])
    return words.to(tl.uint32, bitcast=True) <= keep_limit.to(tl.uint32)


def offsets_block(cu_seqlens: Tensor | None, dropout_p: float) -> dict[str, int | bool]:
    """Constants of the kernels that draw masks: how many offsets they hold, and whether there are more than that.

    A loop over offsets would keep the loop over rows around it from being pipelined; up to 512 rows have none.
    """
    batch = 0 if cu_seqlens is None or dropout_p == 0.0 else cu_seqlens.numel() - 1
    return {"OFFSETS": 128 if batch <= 128 else 512, "MORE_OFFSETS": batch > 512}


@triton.jit
def row_ends(cu_seqlens, batch, first, OFFSETS: tl.constexpr):
    """Ends of the packed rows from `first` on, int32 [OFFSETS], and what each adds: see `token_coordinates`."""
    index = first + tl.arange(0, OFFSETS)
    inside = index < batch
    end = tl.load(cu_seqlens + index + 1, mask=inside, other=2147483647)
    length = end - tl.load(cu_seqlens + index, mask=inside, other=0)
    # One sum counts rows in its high word and their tokens in its low word.
    return end, length.to(tl.int64) + 4294967296


@triton.jit
def token_coordinates(token, cu_seqlens, batch, end, step, OFFSETS: tl.constexpr, MORE_OFFSETS: tl.constexpr):
    """Row and position of packed tokens [rows], as `albert_fast.ops.dropout.token_coordinates` has them, int32.

    `end, step` are `row_ends` of the first OFFSETS rows: they are loaded once, before the loop over tokens.
    """
    before = tl.sum(tl.where(end[None, :] <= token[:, None], step[None, :], 0), axis=1)
    if MORE_OFFSETS:
        for first in tl.range(OFFSETS, batch, OFFSETS):
            end, step = row_ends(cu_seqlens, batch, first, OFFSETS)
            before += tl.sum(tl.where(end[None, :] <= token[:, None], step[None, :], 0), axis=1)
    return (before >> 32).to(tl.int32), token - before.to(tl.int32)


@triton.jit
def token_keep_mask(
    token,
    cu_seqlens,
    batch,
    end,
    step,
    seed,
    site,
    keep_limit,
    BLOCK: tl.constexpr,
    OFFSETS: tl.constexpr,
    MORE_OFFSETS: tl.constexpr,
):
    """Which elements of packed tokens [rows] survive, bool [rows, BLOCK]. `seed` is the key itself."""
    if cu_seqlens is None:
        row, position = tl.zeros_like(token), token
    else:
        row, position = token_coordinates(token, cu_seqlens, batch, end, step, OFFSETS, MORE_OFFSETS)
    group = tl.arange(0, BLOCK // 4)
    return keep_mask(seed, site, row[:, None], position[:, None], group[None, :], keep_limit)
