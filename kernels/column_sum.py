"""Sums over the first axis: gradients of vectors, from the partial sums that the programs of another kernel left.

Every program of a backward kernel walks a strip of rows and keeps the sums of its columns in registers; it writes
them once, as one row of `partials`. Here those rows are added, always in the same order: no atomics.

Where several launches have one sum, as the passes of a shared layer do, each program adds to the row that it wrote in
the launch before, and the rows are added once, after the last. No two programs meet in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, launch, multiprocessors

# Columns are few (a row of partial sums has some thousands), rows some hundreds: 16 columns, 64 bytes, a program are
# enough programs to fill the machine, and a tile has most rows in flight at once.
_CONFIG = Config({"ROWS": 256, "COLUMNS": 16}, num_warps=8)
_EACH = dict.fromkeys(ARCHITECTURES, (_CONFIG,))
TILES = Tiles(interpreter=Config({"ROWS": 8, "COLUMNS": 256}), half=_EACH, single=_EACH)


def strips(device: torch.device, rows: int, per_multiprocessor: int, sharing: int = 1) -> int:
    """How many strips `rows` rows are cut into, each for so many programs that share its columns: so many programs on
    each multiprocessor, fewer where each would get less than 4 rows."""
    programs = min(cdiv(rows * sharing, 4), multiprocessors(device) * per_multiprocessor)
    return min(rows, max(1, programs // sharing))


@triton.jit
def first_sums(partial, column_inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACCUMULATE: tl.constexpr):
    """Where a program's sums [ROWS, COLUMNS] start: at zero, or one row of them at what the program left in `partial`.

    It is read then while the first tile is, and nothing is waited for at the end.
    """
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if ACCUMULATE:
        left = tl.load(partial, mask=column_inside, other=0.0)
        sums = tl.where(tl.arange(0, ROWS)[:, None] == 0, left[None, :], sums)
    return sums


@triton.jit(do_not_specialize=["programs"])
def column_sum_kernel(
    partials,  # [programs, columns]
    first,  # [end_first]
    second,  # [end_second - end_first]
    third,  # [columns - end_second]
    programs,
    columns,
    end_first,
    end_second,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (column < columns)[None, :]
        sums += tl.load(partials + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, axis=0)
    # [COLUMNS], which may lie in two of the outputs
    in_first = column < end_first
    in_second = (column >= end_first) & (column < end_second)
    in_third = (column >= end_second) & (column < columns)
    tl.store(first + column, total, mask=in_first & (column < columns))
    if second is not None:
        tl.store(second + (column - end_first), total, mask=in_second)
    if third is not None:
        tl.store(third + (column - end_second), total, mask=in_third)


def column_sum(partials: Tensor, outputs: Sequence[Tensor]) -> None:
    """Writes the column sums of `partials` to `outputs`, one after the other.

    Args:
        partials: float32 [programs, columns], contiguous.
        outputs: one to three contiguous tensors of any shape and dtype with `columns` elements together.
    """
    programs, columns = partials.shape
    ends = [outputs[0].numel()]
    ends.append(ends[0] + (outputs[1].numel() if len(outputs) > 1 else 0))
    pointers = [*outputs, None, None][:3]
    launch(
        column_sum_kernel,
        lambda blocks: (cdiv(columns, blocks["COLUMNS"]),),
        partials,
        *pointers,
        programs,
        columns,
        *ends,
        tiles=TILES,
        dtype=partials.dtype,
        key=(columns,),
    )


# --------------------------------------------------------------------------------------------- of what no kernel summed


# 16 bytes of a row a thread. As many programs as run at once.
STRIP_TILES = Tiles(
    interpreter=Config({"ROWS": 8, "COLUMNS": 16}),
    half=dict.fromkeys(ARCHITECTURES, tuple(Config({"ROWS": rows, "COLUMNS": 256}) for rows in (16, 32))),
    single=dict.fromkeys(ARCHITECTURES, tuple(Config({"ROWS": rows, "COLUMNS": 128}) for rows in (16, 32))),
)
_STRIP_PROGRAMS = 8


@triton.jit(do_not_specialize=["rows", "strip"])
def strip_sum_kernel(
    x,  # [rows, parts, columns]
    partials,  # float32 [strips, parts, columns], added to
    rows,
    strip,
    columns,
    stride_row,
    stride_part,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Programs that follow one another share rows: pages of memory are read in order.
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part, program = tl.program_id(1), tl.program_id(2)
    column_inside = column < columns
    start_of_part = x + part.to(tl.int64) * stride_part + column
    partial = partials + (program * tl.num_programs(1) + part).to(tl.int64) * columns + column
    sums = first_sums(partial, column_inside, ROWS, COLUMNS, True)
    last = tl.minimum(program * strip + strip, rows)
    for start in tl.range(program * strip, last, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & column_inside[None, :]
        values = tl.load(start_of_part[None, :] + row.to(tl.int64)[:, None] * stride_row, mask=mask, other=0.0)
        sums += values.to(tl.float32)
    tl.store(partial, tl.sum(sums, axis=0), mask=column_inside)


def programs_of(device: torch.device, rows: int, parts: int, columns: int) -> int:
    """How many strips of rows `add_strip_sums` is best given."""
    return strips(device, rows, _STRIP_PROGRAMS, sharing=parts * cdiv(columns, 256))


def add_strip_sums(x: Tensor, partials: Tensor) -> None:
    """Adds the sums over strips of rows of x to `partials`.

    Args:
        x: [rows, parts, columns], columns contiguous.
        partials: float32 [strips, parts, columns], contiguous.
    """
    rows, parts, columns = x.shape
    programs = len(partials)
    launch(
        strip_sum_kernel,
        lambda blocks: (cdiv(columns, blocks["COLUMNS"]), parts, programs),
        x,
        partials,
        rows,
        cdiv(rows, max(programs, 1)),
        columns,
        x.stride(0),
        x.stride(1),
        tiles=STRIP_TILES,
        dtype=x.dtype,
        key=(columns,),
    )
