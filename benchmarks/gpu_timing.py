"""How long a call takes: by events on a GPU, by the clock on a CPU, where every line of the benchmarks is tried first.

Three questions, and who answers them on a GPU (on a CPU it is always `Wall`):

    "device"   how long the GPU works at it. `Queued`: the GPU is made to wait until the host has enqueued a burst of
               calls, each between two events, so that the time is never the host's. L2 is overwritten before each.
    "steps"    how long one training step after another takes. `Steps`: events between calls that follow each other.
    "latency"  how long who calls has to wait. `Wall`: the clock around a call and the wait for its end.

All of them are asked in turns (`Case.interleave` in gpu_stage.py), and medians are reported.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

Function = Callable[[], object]

# Of each function in each turn, in seconds; and how many calls that may be.
TURN = 0.02
MOST_CALLS = 10
STEPS_A_TURN = 3

# A launch queue holds about a thousand entries; beyond that the host waits, whatever the GPU does.
_LONGEST_WAIT = 0.2

# Larger than the L2 of any GPU.
_FLUSHED_BYTES = 256 * 2**20

HOW = (
    "device: events around single calls, enqueued behind a wait so that the host is ahead, L2 overwritten before each; "
    "one after the other: events around calls that follow each other; "
    "steps: events between steps that follow each other, the first of a turn apart; latency: the host's clock around "
    "a call and a synchronization. Peers in turns, medians. host us: of the host for a call, with ! where it was not "
    "ahead, because it waits for the GPU or has more to do: device times then hold some of the host's"
)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timed(ABC):
    """A function, and the seconds of its calls so far.

    Attributes:
        host_seconds: of each turn, what the host was busy with one call; empty where that is not asked.
        starved: whether the GPU may have waited for the host, as it does where a function waits for the GPU.
    """

    def __init__(self, function: Function, device: torch.device, most_calls: int = MOST_CALLS) -> None:
        self.function = function
        self.device = device
        self.most_calls = most_calls
        self.seconds: list[float] = []
        self.host_seconds: list[float] = []
        self.starved = False

    def warm_up(self) -> None:
        """Calls it a few times; later turns are planned by how long the last one takes."""
        for _ in range(2 if self.device.type == "cuda" else 1):
            self.function()
        synchronize(self.device)
        start = time.perf_counter()
        self.function()
        host = time.perf_counter() - start
        synchronize(self.device)
        self.plan(host, time.perf_counter() - start)

    def plan(self, host: float, total: float) -> None:
        """Told before the first turn: seconds of one call on the host, and until its end."""
        self.calls = max(1, min(self.most_calls, int(TURN / total)))

    @abstractmethod
    def turn(self) -> None:
        """Adds the seconds of a few calls."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def host(self) -> str | None:
        """Microseconds of the host for a table; with a mark where the GPU may have waited for it."""
        if not self.host_seconds:
            return None
        return f"{min(self.host_seconds) * 1e6:,.0f}" + (" !" if self.starved else "")


class Wall(Timed):
    def turn(self) -> None:
        for _ in range(self.calls):
            synchronize(self.device)
            start = time.perf_counter()
            self.function()
            synchronize(self.device)
            self.seconds.append(time.perf_counter() - start)


class Queued(Timed):
    def plan(self, host: float, total: float) -> None:
        super().plan(host, total)
        self.wait = min(_LONGEST_WAIT, 2.0 * self.calls * (host + 2e-5) + 5e-4)

    def turn(self) -> None:
        pairs = [(_event(), _event()) for _ in range(self.calls)]
        flush = _flushed(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(self.wait * _cycles_per_second(self.device)))
        start, inside = time.perf_counter(), 0.0
        for before, after in pairs:
            flush.zero_()
            before.record()
            called = time.perf_counter()
            self.function()
            inside += time.perf_counter() - called
            after.record()
        enqueued = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        self.seconds += [before.elapsed_time(after) / 1e3 for before, after in pairs]
        self.host_seconds.append(inside / self.calls)
        self.starved = self.starved or enqueued > self.wait


class Chained(Timed):
    """Calls that follow each other, and find in L2 what they left."""

    def turn(self) -> None:
        before, after = _event(), _event()
        self.function()
        before.record()
        for _ in range(self.calls):
            self.function()
        after.record()
        torch.cuda.synchronize(self.device)
        self.seconds.append(before.elapsed_time(after) / 1e3 / self.calls)


class Steps(Timed):
    def plan(self, host: float, total: float) -> None:
        self.calls = STEPS_A_TURN

    def turn(self) -> None:
        torch.cuda.empty_cache()  # what the others have left
        self.function()
        marks = [_event() for _ in range(self.calls + 1)]
        marks[0].record()
        for mark in marks[1:]:
            self.function()
            mark.record()
        torch.cuda.synchronize(self.device)
        self.seconds += [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def timed(how: str, function: Function, device: torch.device, most_calls: int = MOST_CALLS) -> Timed:
    """`how`: "device", "chained", "steps" or "latency". For "device" the launch queue has to hold the kernels of
    `most_calls`."""
    on_gpu: dict[str, type[Timed]] = {"device": Queued, "chained": Chained, "steps": Steps, "latency": Wall}
    return (on_gpu[how] if device.type == "cuda" else Wall)(function, device, most_calls)


def once(how: str, function: Function, device: torch.device, turns: int = 5) -> Timed:
    """Of a function without peers."""
    result = timed(how, function, device)
    result.warm_up()
    for _ in range(turns):
        result.turn()
    return result


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """The most GPU memory that a call holds beyond what was held before; None on a CPU."""
    if device.type != "cuda":
        function()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def matrix_tflops(device: torch.device, size: int = 8192) -> float:
    """The rate of a bfloat16 product size x size x size, as it goes on, not after a pause."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = once("steps", lambda: [torch.mm(a, b) for _ in range(10)], device, turns=3).median / 10
    return 2 * size**3 / seconds / 1e12


def held_bytes(device: torch.device) -> int:
    """GPU memory that tensors hold; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def recorded(function: Function, device: torch.device) -> Function:
    """The function as a CUDA graph; on a CPU the function."""
    if device.type != "cuda":
        return function
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


@functools.cache
def _flushed(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)


@functools.cache
def _cycles_per_second(device: torch.device) -> float:
    """Of the counter that `_sleep` counts to."""
    cycles, seconds = 20_000_000, 0.0
    for _ in range(2):
        before, after = _event(), _event()
        before.record()
        torch.cuda._sleep(cycles)
        after.record()
        torch.cuda.synchronize(device)
        seconds = before.elapsed_time(after) / 1e3
    return cycles / seconds
