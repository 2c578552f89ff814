"""Sums of rows that share an id: the gradient of an embedding table, always in the same order.

The ids are sorted, which brings the rows of each table row together. A program takes a chunk of consecutive sorted
positions; the sums of the segments in it are one small product, of zeros and ones (which positions have the same id)
with the gathered rows. A segment that lies inside one chunk is written straight to its place. Frequent ids ([MASK], a
comma) have segments of many chunks: each chunk leaves its piece in a buffer, and a second kernel, from the chunk where
such a segment begins, adds its pieces 16 at a time. Nowhere are rows added one by one.

A row that is not finite makes the sums of the other segments in its chunk NaN, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, launch

_KEY = Config({"BLOCK": 1024})
KEY_TILES = Tiles(
    interpreter=_KEY, half=dict.fromkeys(ARCHITECTURES, (_KEY,)), single=dict.fromkeys(ARCHITECTURES, (_KEY,))
)
SUM_TILES = Tiles(
    interpreter=Config({"COLUMNS": 128}),
    half=dict.fromkeys(ARCHITECTURES, (Config({"COLUMNS": 128}), Config({"COLUMNS": 64}))),
    # Products in full precision are not the tensor cores': more programs share them.
    single=dict.fromkeys(ARCHITECTURES, (Config({"COLUMNS": 64}), Config({"COLUMNS": 32}))),
)
_JOIN = Config({"PIECES": 16, "COLUMNS": 128})
JOIN_TILES = Tiles(
    interpreter=Config({"PIECES": 4, "COLUMNS": 128}),
    half=dict.fromkeys(ARCHITECTURES, (_JOIN,)),
    single=dict.fromkeys(ARCHITECTURES, (_JOIN,)),
)


@triton.jit(do_not_specialize=["count", "size", "skip"])
def sort_key_kernel(ids, keys, count, size, skip, BLOCK: tl.constexpr):
    """Ids in a narrow type, which takes a radix sort fewer passes; -1 in place of those that get nothing."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(ids + index, mask=index < count, other=-1)
    value = tl.where((value >= 0) & (value < size) & (value != skip), value, -1)
    tl.store(keys + index, value.to(keys.dtype.element_ty), mask=index < count)


@triton.jit
def _write(pointers, values, mask, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        values += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, values, mask=mask)


@triton.jit(do_not_specialize=["count"])
def segment_sum_kernel(
    rows,  # [count, columns]
    ids,  # [count], sorted
    order,  # int64 [count]: which row is at a sorted position
    out,  # [size, columns]
    pieces,  # float32 [chunks, 2, columns]: of the segment that came from the chunk before, of the one that goes on
    count,
    columns,
    stride_rows,
    stride_out,
    ACCUMULATE: tl.constexpr,
    SPARSE: tl.constexpr,  # whether a sum goes to its segment's first sorted position, in place of its id
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = position < count
    column_inside = (column < columns)[None, :]
    index = tl.load(order + position, mask=inside, other=0)
    values = tl.load(
        rows + index[:, None] * stride_rows + column[None, :], mask=inside[:, None] & column_inside, other=0.0
    )
    id = tl.load(ids + position, mask=inside, other=-1)
    before = tl.load(ids + position - 1, mask=inside & (position > 0), other=-1)
    end = chunk * CHUNK + CHUNK
    last_of_previous = tl.load(ids + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    first_of_next = tl.load(ids + end, mask=end < count, other=-1)

    same = (id[:, None] == id[None, :]).to(values.dtype)  # [CHUNK, CHUNK]
    sums = tl.dot(same, values, input_precision="ieee")  # [CHUNK, COLUMNS]: at each position, of its whole segment
    # Written from the segment's first position in this chunk.
    first = (id >= 0) & ((id != before) | (position == chunk * CHUNK))
    came = id == last_of_previous
    goes_on = id == first_of_next
    target = position if SPARSE else id
    _write(
        out + target.to(tl.int64)[:, None] * stride_out + column[None, :],
        sums,
        (first & ~came & ~goes_on)[:, None] & column_inside,
        ACCUMULATE,
    )
    piece = 2 * chunk + tl.where(came, 0, 1)
    tl.store(
        pieces + piece.to(tl.int64)[:, None] * columns + column[None, :],
        sums,
        mask=(first & (came | goes_on))[:, None] & column_inside,
    )


@triton.jit(do_not_specialize=["count", "chunks"])
def segment_join_kernel(
    pieces,  # float32 [chunks, 2, columns]
    ids,  # [count], sorted
    out,  # [size, columns]
    count,
    chunks,
    columns,
    stride_out,
    ACCUMULATE: tl.constexpr,
    SPARSE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = chunk * CHUNK + CHUNK
    id = tl.load(ids + tl.minimum(end, count) - 1).to(tl.int32)
    last_of_previous = tl.load(ids + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    first_of_next = tl.load(ids + end, mask=end < count, other=-1)
    if (id >= 0) & (id == first_of_next) & (id != last_of_previous):
        # A segment begins in this chunk and goes on. Of the chunks that follow it has the first position.
        column_inside = column < columns
        total = tl.load(pieces + (2 * chunk.to(tl.int64) + 1) * columns + column, mask=column_inside, other=0.0)
        found = tl.full((), PIECES, tl.int32)
        following = chunk + 1 + tl.arange(0, PIECES)
        while found == PIECES:
            mine = tl.load(ids + following * CHUNK, mask=following < chunks, other=-1) == id
            piece = pieces + 2 * following.to(tl.int64)[:, None] * columns + column[None, :]
            total += tl.sum(tl.load(piece, mask=mine[:, None] & column_inside[None, :], other=0.0), axis=0)
            found = tl.sum(mine.to(tl.int32), axis=0)
            following += PIECES
        target = id
        if SPARSE:
            position = chunk * CHUNK + tl.arange(0, CHUNK)
            target = tl.min(tl.where(tl.load(ids + position) == id, position, end), axis=0)
        _write(out + target.to(tl.int64) * stride_out + column, total, column_inside, ACCUMULATE)


def segment_sum(
    ids: Tensor,
    rows: Tensor,
    size: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    skip: int | None = None,
) -> Tensor:
    """For each id, the sum of the rows that have it.

    Args:
        ids: integers [count]; those outside [0, size) are left out.
        rows: [count, columns], columns contiguous.
        size: how many rows the result has.
        out: [size, columns], columns contiguous, any floating dtype; None: a new tensor of the dtype of rows.
        accumulate: whether to add to what `out` holds.
        skip: an id that is left out.

    Returns:
        `out`, summed in float32 and rounded once; zero, or as it was, where an id does not occur.
    """
    if out is None:
        out = torch.zeros(size, rows.shape[1], dtype=rows.dtype, device=rows.device)
    elif not accumulate:
        out.zero_()
    if rows.numel() > 0:
        _sum(ids, rows, size, out, accumulate, skip, sparse=False)
    return out


def sparse_segment_sum(ids: Tensor, rows: Tensor, size: int, *, skip: int | None = None) -> tuple[Tensor, Tensor]:
    """The same, without a tensor of `size` rows.

    Returns:
        the ids, sorted, int64 [count], and [count, columns]: the sum of an id's rows where it comes first, zero where
        it comes again. Ids that are left out are 0, with zeros.
    """
    sums = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    if rows.numel() == 0:
        return ids.to(torch.int64), sums
    keys = _sum(ids, rows, size, sums, False, skip, sparse=True)
    return keys.to(torch.int64).clamp_(min=0), sums


def _sum(ids: Tensor, rows: Tensor, size: int, out: Tensor, accumulate: bool, skip: int | None, sparse: bool) -> Tensor:
    """Launches the kernels; the sorted ids, -1 in place of those that are left out."""
    count, columns = rows.shape
    keys = torch.empty(count, dtype=torch.int16 if size <= 2**15 else torch.int32, device=ids.device)
    launch(
        sort_key_kernel,
        lambda blocks: (cdiv(count, blocks["BLOCK"]),),
        ids.contiguous(),
        keys,
        count,
        size,
        -1 if skip is None else skip,
        tiles=KEY_TILES,
        dtype=keys.dtype,
    )
    keys, order = torch.sort(keys, stable=True)
    # In float32 a product of 64 rows takes many registers, and Triton 3.6 makes it one in tf32 on 10.0.
    chunk = 32 if rows.dtype == torch.float32 else 64
    chunks = cdiv(count, chunk)
    pieces = torch.empty(chunks, 2, columns, dtype=torch.float32, device=rows.device)
    launch(
        segment_sum_kernel,
        lambda blocks: (chunks, cdiv(columns, blocks["COLUMNS"])),
        rows,
        keys,
        order,
        out,
        pieces,
        count,
        columns,
        rows.stride(0),
        out.stride(0),
        tiles=SUM_TILES,
        dtype=rows.dtype,
        key=(columns, sparse),
        ACCUMULATE=accumulate,
        SPARSE=sparse,
        CHUNK=chunk,
    )
    launch(
        segment_join_kernel,
        lambda blocks: (chunks, cdiv(columns, blocks["COLUMNS"])),
        pieces,
        keys,
        out,
        count,
        chunks,
        columns,
        out.stride(0),
        tiles=JOIN_TILES,
        dtype=pieces.dtype,
        key=(columns, sparse),
        ACCUMULATE=accumulate,
        SPARSE=sparse,
        CHUNK=chunk,
    )
    return keys
