"""How many rows a micro-batch should have here: what `albert-fast pretrain --find-batch-size` measures.

Rows are doubled from 1 on until more would not fit into memory or bring nothing. What a size will need is foretold from
the one before, twice what that took, so that a size that cannot be meant is not tried: a CPU's system would answer by
killing a process, this one or another. A GPU's allocator answers with an exception, which is caught as well.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from albert_fast import kept_memory
from albert_fast import memory as host
from albert_fast.ops.checks import check

SHARE_OF_MEMORY = 0.85  # batches differ, allocators leave gaps, and evaluation wants some
AS_GOOD = 0.03  # of the best rate: less is not worth the memory
TURN = 0.5  # short calls are repeated for so long, in seconds


class Memory(Protocol):
    """The memory that a training step takes, in bytes."""

    def reset(self) -> None:
        """Gives back what is free, and lets the peak begin anew."""

    def used(self) -> int:
        """What is in use now."""

    def peak(self) -> int:
        """The most that was in use since `reset`."""

    def limit(self) -> int:
        """The most that may be in use, as things stand now."""


@dataclass(frozen=True)
class Size:
    """One number of rows, and what came of it.

    Attributes:
        rows: full rows of the micro-batch.
        tokens_per_second: None where it did not run.
        peak: bytes at most in use; expected, where it was not tried; None where memory ran out.
        verdict: what is to be said of it.
    """

    rows: int
    tokens_per_second: float | None
    peak: int | None
    verdict: str


@dataclass(frozen=True)
class Found:
    """What `find_batch_size` recommends, and why.

    Attributes:
        rows: of the micro-batch.
        tokens_per_second: with it.
        table: all sizes, ascending.
        limit: bytes that may be in use.
    """

    rows: int
    tokens_per_second: float
    table: tuple[Size, ...]
    limit: int

    def __str__(self) -> str:
        lines = [f"{'rows':>6}{'tokens/s':>12}{'peak':>12}{'of memory':>11}"]
        for size in self.table:
            rate = "-" if size.tokens_per_second is None else f"{size.tokens_per_second:,.0f}"
            peak = "-" if size.peak is None else f"{size.peak / 1e9:,.2f} GB"
            share = "-" if size.peak is None else f"{size.peak / self.limit:.0%}"
            lines.append(f"{size.rows:>6}{rate:>12}{peak:>12}{share:>11}  {size.verdict}".rstrip())
        lines.append(
            f"micro-batch: {self.rows} rows, {self.tokens_per_second:,.0f} tokens/s; memory: {self.limit / 1e9:,.2f} GB"
        )
        return "\n".join(lines)


class _Measured(NamedTuple):
    rows: int
    rate: float
    peak: int


def find_batch_size(
    run: Callable[[int], int],
    *,
    memory: Memory,
    most: int = 4096,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """Measures micro-batches of 1, 2, 4 … rows, and recommends the smallest whose rate is within 3 % of the best; of
    those that need at most 85 % of the memory.

    Larger ones are not tried when two doublings together brought less than 3 %.

    Args:
        run: does the forward and backward of so many full rows, waits until they are done, and returns their tokens.
            What a step needs besides must be there before: gradients, and the optimizer's state.
        memory: `memory_of(device)`.
        most: rows that are not exceeded.
        repeats: timed calls of each size, at least, after one that is not; their median counts.
        clock: seconds.

    Raises:
        ValueError: an argument does not fit, or not even one row fits into memory.
    """
    check(most >= 1, f"most is {most}; at least 1 row was expected")
    check(repeats >= 1, f"repeats is {repeats}; at least 1 was expected")
    memory.reset()
    before = memory.used()
    measured: list[_Measured] = []
    beyond: list[Size] = []
    rows = 1
    while rows <= most and not _has_levelled_off(measured):
        limit = memory.limit()
        if measured:
            expected = before + 2 * max(measured[-1].peak - before, 0)
            if expected > SHARE_OF_MEMORY * limit:
                beyond.append(Size(rows, None, expected, "not tried: too much memory"))
                break
        rate = _rate(run, rows, memory, repeats, clock)
        if rate is None:
            beyond.append(Size(rows, None, None, "out of memory"))
            break
        measured.append(_Measured(rows, rate, memory.peak()))
        rows *= 2
    memory.reset()
    check(bool(measured), "not even one row fits into memory: choose shorter rows, a smaller model, or recompute more")
    # Where one row takes more than its share, it is still the least there is.
    fitting = [size for size in measured if size.peak <= SHARE_OF_MEMORY * limit] or measured[:1]
    best = max(size.rate for size in fitting)
    chosen = next(size for size in fitting if size.rate >= (1 - AS_GOOD) * best)
    table = [Size(*size, _verdict(size, chosen, limit)) for size in measured]
    return Found(chosen.rows, chosen.rate, (*table, *beyond), limit)


def _has_levelled_off(measured: list[_Measured]) -> bool:
    rates = [size.rate for size in measured]
    return len(rates) > 2 and max(rates[-2:]) <= (1 + AS_GOOD) * max(rates[:-2])


def _verdict(size: _Measured, chosen: _Measured, limit: int) -> str:
    too_much = "takes too much memory" if size.peak > SHARE_OF_MEMORY * limit else ""
    if size is not chosen:
        return too_much
    return f"chosen, {too_much}" if too_much else "chosen"


def _rate(
    run: Callable[[int], int], rows: int, memory: Memory, repeats: int, clock: Callable[[], float]
) -> float | None:
    """Tokens a second; None where memory ran out."""
    memory.reset()
    try:
        run(rows)
        seconds: list[float] = []
        while len(seconds) < repeats or sum(seconds) < TURN:
            start = clock()
            tokens = run(rows)
            seconds.append(clock() - start)
        return tokens / statistics.median(seconds)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
    # Not in the handler: there the error's frames still hold what was allocated.
    memory.reset()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU PyTorch's allocator raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# -------------------------------------------------------------------------------------------------------- the memories


def memory_of(device: torch.device) -> Memory:
    """Raises ValueError where the system does not tell how much memory there is."""
    if device.type == "cuda":
        return CudaMemory(device)
    check(
        host.resident_bytes() is not None and host.available_bytes() is not None,
        "this system does not tell how much memory is free, so no batch size can be found: choose one",
    )
    return HostMemory()


class CudaMemory:
    """What PyTorch has allocated on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def used(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def limit(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)


class HostMemory:
    """What this process holds, all of it; the limit is the system's or the container's."""

    def reset(self) -> None:
        gc.collect()
        kept_memory.release()
        host.reset_peak()

    def used(self) -> int:
        return host.resident_bytes() or 0

    def peak(self) -> int:
        return host.peak_resident_bytes() or 0

    def limit(self) -> int:
        return self.used() + (host.available_bytes() or 0)
