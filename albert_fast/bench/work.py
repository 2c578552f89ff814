"""A line of the table, and the section that it stands in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from albert_fast.bench.worker import Contender, interleave, median


@dataclass
class Row:
    """One peer at one piece of work.

    Attributes:
        passed: whether its error is within the limit; None where nothing was computed.
        reason: why there is no figure.
        milliseconds: median of the timed calls, `all_milliseconds`.
        speedup: how many times as fast albert_fast is in the same run; above 1 where it is faster.
        times_floor: milliseconds over the floor's.
        peak_bytes: most memory that its process held, or allocated on the GPU; where all peers are in one process, what
            building it and its first call took beyond what lay there before.
    """

    peer: str
    error: float | None = None
    limit: float | None = None
    passed: bool | None = None
    reason: str | None = None
    milliseconds: float | None = None
    all_milliseconds: list[float] | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    times_floor: float | None = None
    peak_bytes: int | None = None


@dataclass
class Work:
    """What was asked of every peer, and what it needs at least.

    Attributes:
        gflop: operations that the real tokens need, `attention_gflop` of them products of activations.
        floor_milliseconds: of them, at the rates of the whole run, or of the megabytes where those take longer; None
            where neither is known.
        suite, group: of `albert-fast bench --suite`: where it stands, such as "ops" and "attention".
        varied: what that suite changes from one piece of work to the next, such as {"length": 512}.
        megabytes: that must be moved at least.
        threads: of the CPU; None: as many as the whole run has.
    """

    mode: str
    dtype: str
    shape: str
    tokens: int
    fill: float
    labelled: int
    gflop: float
    attention_gflop: float
    floor_milliseconds: float | None
    rows: list[Row]
    suite: str = ""
    group: str = ""
    varied: dict[str, Any] = field(default_factory=dict)
    megabytes: float = 0.0
    threads: int | None = None

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.group, self.dtype, self.mode, self.shape)))


def time_rows(work: Work, workers: Mapping[str, Contender], repeats: int, say: Callable[[str], None]) -> None:
    """Times the peers that have a worker, in turn, and fills in the figures of their rows."""
    seconds = interleave(workers, repeats, lambda name: say(f"timing {name}"))
    fastest = median(seconds["albert_fast"]) if "albert_fast" in seconds else None
    for row in work.rows:
        if row.peer not in seconds:
            continue
        middle = median(seconds[row.peer])
        row.milliseconds = middle * 1e3
        row.all_milliseconds = [second * 1e3 for second in seconds[row.peer]]
        row.tokens_per_second = work.tokens / middle
        row.speedup = middle / fastest if fastest is not None else None
        row.peak_bytes = workers[row.peer].peak_bytes()
