"""Sums over the first axis: gradients of vectors, from the partial sums that the programs of another kernel left.

Every program of a backward kernel walks a strip of rows and keeps the sums of its columns in registers; it writes
them once, as one row of `partials`. Here those rows are added, always in the same order: no atomics.
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


def strips(device: torch.device, rows: int, per_multiprocessor: int) -> int:
    """How many programs share `rows` rows: so many on each multiprocessor, fewer where each would get less than 4."""
    return min(cdiv(rows, 4), multiprocessors(device) * per_multiprocessor)


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
    ACCUMULATE: tl.constexpr,
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
    _write(first + column, total, in_first & (column < columns), ACCUMULATE)
    if second is not None:
        _write(second + (column - end_first), total, in_second, ACCUMULATE)
    if third is not None:
        _write(third + (column - end_second), total, in_third, ACCUMULATE)


@triton.jit
def _write(pointers, values, mask, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        values += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, values, mask=mask)


def column_sum(partials: Tensor, outputs: Sequence[Tensor], *, accumulate: bool = False) -> None:
    """Writes the column sums of `partials` to `outputs`, one after the other.

    Args:
        partials: float32 [programs, columns], contiguous.
        outputs: one to three contiguous tensors of any shape and dtype with `columns` elements together.
        accumulate: whether to add to what `outputs` hold.
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
        ACCUMULATE=accumulate,
    )
