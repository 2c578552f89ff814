"""Where the time inside the `cpu` backend's calls goes.

All passes of the encoder are one call, and PyTorch's profiler sees no further:

    with native_trace.record() as spans:
        model(**inputs)
    slowest = max(spans, key=lambda span: span.end - span.begin)

The recorder (csrc/cpu/trace.h) is the calling thread's own: what other threads compute meanwhile is not among the
spans, and any number of them may record at a time. The CPU's backward runs in the thread that calls `backward()`.
Results are the same with it and without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from albert_fast import native


class Span(NamedTuple):
    """A step of the native kernels.

    Attributes:
        name: what was done: "product", "weight gradient", "attention backward" … (csrc/cpu/trace.h).
        pass_index: of the encoder; -1 outside of it.
        begin, end: nanoseconds, as `time.perf_counter_ns` counts them on Linux.
        sizes: m, n and k: a product is [m, k] x [n, k]ᵀ; csrc/cpu/trace.h says of the others.
        operations: floating-point, that the matrix products of the result need; 0 where there are none.
    """

    name: str
    pass_index: int
    begin: int
    end: int
    sizes: tuple[int, int, int]
    operations: int


@contextmanager
def record(capacity: int = 2**18) -> Iterator[list[Span]]:
    """Records the native steps that this thread takes; the list is filled at the end.

    It stays empty where there is no native library, for then there are no such steps.

    Args:
        capacity: spans that there is room for, 64 bytes each.

    Raises:
        RuntimeError: this thread records already, or there was too little room.
    """
    spans: list[Span] = []
    if native.load() is not None:
        yield spans
        return
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; room for at least one span was expected")
    operators = torch.ops.albert_fast_native
    memory = torch.empty(capacity, 8, dtype=torch.int64)
    try:
        operators.trace_begin(memory)
    except RuntimeError:
        raise RuntimeError("this thread records already: one `native_trace.record()` at a time was expected") from None
    try:
        yield spans
    finally:
        count = operators.trace_end()
    if count > capacity:
        raise RuntimeError(f"{count} steps were taken, and capacity is {capacity}: give room for all of them")
    spans += _read(memory[:count])


def _read(rows: Tensor) -> Iterator[Span]:
    names = {kind: torch.ops.albert_fast_native.span_name(kind) for kind in rows[:, 0].unique().tolist()}
    for kind, pass_index, begin, end, m, n, k, operations in rows.tolist():
        yield Span(names[kind], pass_index, begin, end, (m, n, k), operations)
