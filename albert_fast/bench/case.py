"""A case: one piece of work that peers do, parity first: what `albert-fast bench` and `pytest benchmarks` run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from albert_fast import kept_memory, memory
from albert_fast.bench.parity import Results
from albert_fast.bench.work import Row, Work, time_rows
from albert_fast.bench.worker import CPU, TURN, Contender, WorkerError, time_call, with_threads


@dataclass(kw_only=True)
class Case(ABC):
    """What is asked of every peer. Cheap to make: what it computes on is made when it is first needed.

    Attributes:
        suite, group, mode, dtype, shape, varied, threads: as in `Work`.
        peers: who takes part, by name.
        device: where.
    """

    suite: str
    group: str
    mode: str
    dtype: str
    shape: str
    peers: tuple[str, ...]
    device: torch.device = CPU
    varied: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None

    @property
    def name(self) -> str:
        """In one word, for a test's id: attention-training-float32-8x128."""
        varied = (f"{key}={value}" for key, value in self.varied.items())
        return "-".join(filter(None, (self.group, self.mode, self.dtype, self.shape, *varied)))

    @abstractmethod
    def work(self) -> Work:
        """What it needs, and no rows yet."""

    @abstractmethod
    def refuses(self, peer: str) -> str | None:
        """Why a peer has no part in it here; None where it has."""

    @abstractmethod
    def open(self, peer: str) -> Contender:
        """A peer that does not refuse, to be asked for the work."""

    @abstractmethod
    def judge(self, peer: str, results: Results) -> tuple[float, float]:
        """The error of a peer's results, and the largest that passes."""

    def release(self) -> None:
        """Forgets what it has computed."""
        for kind in type(self).__mro__:
            for name, value in vars(kind).items():
                if isinstance(value, functools.cached_property):
                    self.__dict__.pop(name, None)

    def new_work(self, **values: Any) -> Work:
        """A `Work` with what the case knows of itself."""
        known = {"tokens": 0, "fill": 1.0, "labelled": 0, "gflop": 0.0, "attention_gflop": 0.0}
        own = ("suite", "group", "mode", "dtype", "shape", "varied", "threads")
        return Work(
            **{**known, **values}, **{name: getattr(self, name) for name in own}, floor_milliseconds=None, rows=[]
        )


class Here:
    """A contender in this process, beside others that have no threads of their own but PyTorch's.

    Args:
        results: what the work gives, for the parity check.
        call: the work; `results` itself when None.
        turn: seconds that a turn repeats short calls for.
    """

    def __init__(
        self,
        results: Callable[[], Results],
        call: Callable[[], object] | None = None,
        device: torch.device = CPU,
        turn: float = TURN,
    ) -> None:
        self._results, self.call = results, call or results
        self._device, self._turn = device, turn
        self._peak: int | None = None

    def results(self) -> Results:
        with measured_memory(self._device) as taken:
            results = self._results()
        self._peak = taken[0]
        return results

    def seconds(self) -> float:
        return time_call(self.call, self._device, self._turn)

    def peak_bytes(self) -> int | None:
        return self._peak

    def close(self) -> None:
        pass


@contextlib.contextmanager
def measured_memory(device: torch.device) -> Iterator[list[int | None]]:
    """A list that then has the most memory that what runs inside held, beyond what lay there before; [None] where the
    system does not tell."""
    taken: list[int | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield taken
        taken.append(torch.cuda.max_memory_allocated(device) - before)
        return
    # What others have left behind is given back first: else it would be used again, and not be seen.
    kept_memory.release()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    memory.reset_peak()
    resident, peak = memory.resident_bytes(), memory.peak_resident_bytes()
    # Where the peak does not begin anew, it tells of what was before.
    known = resident is not None and peak is not None and peak - resident < 1 << 20
    yield taken
    after = memory.peak_resident_bytes()
    taken.append(max(0, after - resident) if known and after is not None and resident is not None else None)


def examine(case: Case, row: Row, contender: Contender) -> None:
    """The parity check: fills in the row's error, limit, whether that passes, and why not."""
    try:
        results = contender.results()
    except Exception as error:
        # Whatever a peer raises is its row's, not the end of the run.
        text = str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"
        row.passed, row.reason = False, " ".join(text.split())
        return
    row.error, row.limit = case.judge(row.peer, results)
    row.passed = row.error <= row.limit
    if not row.passed:
        row.reason = f"wrong: its error is {row.error:.1e}, and at most {row.limit:.1e} was expected"


def run_case(case: Case, repeats: int, say: Callable[[str], None] = lambda text: None) -> Work:
    """Every peer of the case: who is right is timed, in turn."""
    with with_threads(case.threads), contextlib.ExitStack() as stack:
        # Processes begin while the rest is prepared.
        contenders: dict[str, Contender] = {}
        rows = [Row(peer, reason=case.refuses(peer)) for peer in case.peers]
        for row in rows:
            if row.reason is None:
                contenders[row.peer] = stack.enter_context(contextlib.closing(case.open(row.peer)))
        say("the oracle, in float64")
        work = case.work()
        work.rows = rows
        for row in rows:
            if row.peer in contenders:
                say(f"parity of {row.peer}")
                examine(case, row, contenders[row.peer])
                if not row.passed:
                    contenders.pop(row.peer).close()
        time_rows(work, contenders, repeats, say)
    case.release()
    return work
