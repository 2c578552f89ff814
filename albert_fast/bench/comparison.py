"""Two results held against each other: what changed beyond noise.

Calls scatter, so a median is known within an interval only: the one that holds it with 95 %, whatever the distribution
(between two of the ordered calls; all of them where there are fewer than six). A change counts where the intervals of
the two medians do not overlap and the medians differ by at least `LEAST`, because two runs of the same code differ by
some percent that no interval of one run shows. With fewer than `FEWEST` calls nothing is said: three calls and three
others are apart by chance once in ten times.

Times are judged where the two runs had the same machine to themselves, as far as can be seen: its name, its threads and
the rate at which it multiplied matrices. Ratios of two peers of one run are judged in any case: calls of one turn
follow each other, so that the machine is the same for both.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from albert_fast.bench.checkout import short
from albert_fast.bench.results import Result, Row, Work

OURS = "albert_fast"

CONFIDENCE = 0.95
FEWEST = 4  # calls
LEAST = 0.05
RATES = 0.05  # may differ so much

UP, DOWN, NOISE, FEW, NOT_JUDGED = "up", "down", "within noise", "too few calls", "not judged"


@dataclass(frozen=True)
class Change:
    """Of a figure from A to B.

    Attributes:
        before, after: medians.
        low, high: of the ratio after / before, by the ends of the two intervals.
        verdict: UP, DOWN, NOISE, FEW or NOT_JUDGED.
    """

    before: float
    after: float
    low: float
    high: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass(frozen=True)
class Line:
    """One peer at one piece of work.

    Attributes:
        time: of its milliseconds; None where one of the two has none.
        speedup: of the yardstick over it, in the same run; None for the yardstick, and where there is none.
        memory: its peak's ratio; one figure a run, so nothing is said of noise.
        note: why there is nothing to compare.
    """

    peer: str
    time: Change | None = None
    speedup: Change | None = None
    memory: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Common:
    """A piece of work that A and B have both done.

    Attributes:
        yardstick: the peer that the others are held against in their own run: albert_fast, or the first that both have.
    """

    work: Work
    yardstick: str | None
    lines: list[Line]


@dataclass(frozen=True)
class Comparison:
    """Of A and B.

    Attributes:
        works: what both have done.
        alone: works that one of them has: "A" or "B", and which.
        differences: what the runs differ in: a name, A's value, B's value.
        obstacle: why times are not judged; None where they are.
    """

    works: list[Common]
    alone: list[tuple[str, str]]
    differences: list[tuple[str, str, str]]
    obstacle: str | None


def compare(a: Result, b: Result) -> Comparison:
    """Works are the same where their names, tokens and operations are."""
    obstacle = _obstacle(a, b)
    ours, theirs = _by_identity(a.works), _by_identity(b.works)
    works = [_common(work, theirs[key], obstacle is None) for key, work in ours.items() if key in theirs]
    alone = [("A", work.title) for key, work in ours.items() if key not in theirs]
    alone += [("B", work.title) for key, work in theirs.items() if key not in ours]
    return Comparison(works, alone, list(_differences(a, b)), obstacle)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two of the samples, between which the median lies with `CONFIDENCE`; the least and the greatest of few."""
    ordered, count = sorted(samples), len(samples)
    left_out, missed = 0, 0.0
    while True:
        # The median is outside where at most `left_out` samples are below it, or above it.
        missed += 2 * math.comb(count, left_out) / 2**count
        if missed > 1 - CONFIDENCE:
            break
        left_out += 1
    left_out = max(left_out - 1, 0)
    return ordered[left_out], ordered[count - 1 - left_out]


def change(before: Sequence[float], after: Sequence[float], judged: bool = True) -> Change:
    """Of the samples' medians."""
    middle, then = statistics.median(before), statistics.median(after)
    (low, high), (new_low, new_high) = interval(before), interval(after)
    if not judged:
        verdict = NOT_JUDGED
    elif min(len(before), len(after)) < FEWEST:
        verdict = FEW
    elif new_low > high and then >= middle * (1 + LEAST):
        verdict = UP
    elif new_high < low and then <= middle / (1 + LEAST):
        verdict = DOWN
    else:
        verdict = NOISE
    return Change(middle, then, new_low / high, new_high / low, verdict)


def _by_identity(works: Sequence[Work]) -> dict[tuple[Any, ...], Work]:
    """Where one is there more than once, by its number, too."""
    found: dict[tuple[Any, ...], Work] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for work in works:
        varied = tuple(work.varied.items())
        about = (work.suite, work.title, varied, work.threads, work.tokens, work.labelled, work.gflop)
        seen[about] += 1
        found[about, seen[about]] = work
    return found


def _common(a: Work, b: Work, judged: bool) -> Common:
    before, after = ({row.peer: row for row in work.rows} for work in (a, b))
    peers = list(dict.fromkeys([*before, *after]))
    timed = [peer for peer in peers if _calls(before.get(peer)) and _calls(after.get(peer))]
    yardstick = OURS if OURS in timed else next(iter(timed), None)
    lines = []
    for peer in peers:
        if peer not in timed:
            sides = (("A", before.get(peer)), ("B", after.get(peer)))
            notes = [f"{name}: {_why_none(row)}" for name, row in sides if not _calls(row)]
            lines.append(Line(peer, note="; ".join(notes)))
            continue
        old, new = before[peer], after[peer]
        speedup = None
        if yardstick is not None and peer != yardstick:
            speedups, then = _speedups(old, before[yardstick]), _speedups(new, after[yardstick])
            speedup = change(speedups, then) if speedups and then else None
        memory = new.peak_bytes / old.peak_bytes if old.peak_bytes and new.peak_bytes else None
        lines.append(Line(peer, change(_calls(old), _calls(new), judged), speedup, memory))
    return Common(a, yardstick, lines)


def _calls(row: Row | None) -> list[float]:
    return (row and row.all_milliseconds) or []


def _speedups(row: Row, yardstick: Row) -> list[float]:
    """Of the yardstick over the peer, turn by turn; none where the turns are not the same."""
    calls, others = _calls(row), _calls(yardstick)
    return [call / other for call, other in zip(calls, others, strict=True)] if len(calls) == len(others) else []


def _why_none(row: Row | None) -> str:
    if row is None:
        return "not asked"
    return f"{'failed' if row.passed is False else 'absent'}, {row.reason or 'without a reason'}"


def _obstacle(a: Result, b: Result) -> str | None:
    if a.machine != b.machine:
        return "the machines differ"
    for name in a.matrix_gflops.keys() & b.matrix_gflops.keys():
        before, after = a.matrix_gflops[name], b.matrix_gflops[name]
        if not 1 / (1 + RATES) <= after / before <= 1 + RATES:
            return f"the machine multiplied {name} matrices at {before:,.0f} GFLOP/s in A and {after:,.0f} in B"
    return None


def _differences(a: Result, b: Result) -> Iterator[tuple[str, str, str]]:
    """What may make a difference; not where the file was written, nor how fast the matrices were."""
    for name, before, after in (
        ("commit", {"": short(a.commit or "unknown")}, {"": short(b.commit or "unknown")}),
        ("machine", a.machine, b.machine),
        ("version", a.versions, b.versions),
        ("option", {**a.options, "json": None}, {**b.options, "json": None}),
        ("text", a.text, b.text),
        ("model", a.config, b.config),
        ("backends", a.backends, b.backends),
    ):
        for key in dict.fromkeys([*before, *after]):
            values = [_plain(values.get(key)) for values in (before, after)]
            if values[0] != values[1]:
                yield f"{name} {key}".strip(), values[0], values[1]


def _plain(value: Any) -> str:
    if value is None or value is False or value in ([], ""):
        return "not given"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    return str(value)
