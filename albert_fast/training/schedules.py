"""What changes in the course of a run: the learning rate, the batch size, the sequence length.

Each is a small frozen object that is called with the *progress*, the share of the run that is done, from 0 to 1, and
nothing else: the same schedule serves a budget of steps and one of seconds. `Budget` measures the progress and is what
a checkpoint keeps.

    budget = Budget(steps=125_000)
    rate = albert(warmup=3_125 / 125_000)
    while not budget.done:
        lr = 1.76e-3 * rate(budget.progress)
        …
        budget.advance()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from albert_fast.ops.checks import check


def _check_share(name: str, value: float, least: str = "") -> None:
    fits = 0 < value <= 1 if least else 0 <= value <= 1
    check(fits, f"{name} is {value}; a share from 0 to 1 was expected{least}")


# Learning rates: functions of the progress, from 0 to 1, that give a factor of the highest rate, from 0 to 1.


@dataclass(frozen=True)
class Schedule:
    """A factor of the highest learning rate. Calling it raises ValueError for a progress outside 0 to 1."""

    def __call__(self, progress: float) -> float:
        _check_share("progress", progress)
        return self.factor(progress)

    def factor(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """1 all the time."""

    def factor(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Polynomial(Schedule):
    """(1 - progress)^power, from 1 down to `floor`; a power of 1 is linear, and ALBERT's."""

    power: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        check(self.power > 0, f"power is {self.power}; a number above 0 was expected")
        _check_share("floor", self.floor)

    def factor(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * (1 - progress) ** self.power


@dataclass(frozen=True)
class Exponential(Schedule):
    """Down to `end` by the same ratio in each step: end^progress."""

    end: float = 0.01

    def __post_init__(self) -> None:
        _check_share("end", self.end, ", and not 0, which no ratio reaches")

    def factor(self, progress: float) -> float:
        return self.end**progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a wave of the cosine, from 1 down to `floor` (arXiv 1608.03983, without restarts)."""

    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_share("floor", self.floor)

    def factor(self, progress: float) -> float:
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class StableDecay(Schedule):
    """1, and over the last `decay` of the run down to `floor`, by a line or by 1 - sqrt (arXiv 2405.18392).

    With `Warmup` before it this is warm-up-stable-decay: a run can be prolonged from any point of the stable part.
    """

    decay: float = 0.1
    floor: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        _check_share("decay", self.decay, ", and not 0: use Constant")
        _check_share("floor", self.floor)
        check(self.shape in ("linear", "sqrt"), f'shape is {self.shape!r}; "linear" or "sqrt" was expected')

    def factor(self, progress: float) -> float:
        done = max(0.0, (progress - (1 - self.decay)) / self.decay)
        left = 1 - (math.sqrt(done) if self.shape == "sqrt" else done)
        return self.floor + (1 - self.floor) * max(0.0, left)


@dataclass(frozen=True)
class Warmup(Schedule):
    """A line from 0 over the first `share` of the run, and `then` another schedule.

    `then` sees the progress of the whole run, as in Google's code: ALBERT's rate falls by 2.4 % at once where the
    warm-up ends. With `restart` it sees the progress since the warm-up, and starts from its highest rate.
    """

    share: float
    then: Schedule
    restart: bool = False

    def __post_init__(self) -> None:
        check(0 <= self.share < 1, f"share is {self.share}; a share of the run in [0, 1) was expected")

    def factor(self, progress: float) -> float:
        if progress < self.share:
            return progress / self.share
        return self.then((progress - self.share) / (1 - self.share) if self.restart else progress)


def albert(warmup: float = 3125 / 125000) -> Schedule:
    """ALBERT's: linear warm-up, then linear decay by the global step (google-research/albert, optimization.py)."""
    return Warmup(warmup, Polynomial())


def warmup_stable_decay(
    warmup: float = 0.01, decay: float = 0.1, floor: float = 0.0, shape: str = "linear"
) -> Schedule:
    """Linear warm-up, the highest rate, and a decay over the last `decay` of the run (shares of the whole run)."""
    check(warmup + decay <= 1, f"warmup + decay is {warmup} + {decay}; at most 1, the whole run, was expected")
    return Warmup(warmup, StableDecay(decay, floor, shape))


# How much of the run is done.


class Budget:
    """A run's length, by optimizer steps or by seconds, and how much of it is used.

    The clock is read once a step, in `advance`: until the next one, all that asks for the progress sees the same. The
    ranks of a distributed run have to agree on it: `advance` on one rank, and give its `elapsed` to the others'. Time
    that must not count (evaluation, say) ends with `restart_clock`.

    Args:
        steps: the number of optimizer steps, or
        seconds: the time of training; the last step may end a little later.
        clock: seconds that never go back.

    Raises:
        ValueError: not exactly one of steps and seconds, or one that is not above 0.
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check(
            (steps is None) != (seconds is None),
            f"steps is {steps} and seconds is {seconds}; exactly one of them was expected",
        )
        total = seconds if steps is None else steps
        assert total is not None
        name = "seconds" if steps is None else "steps"
        check(0 < total < math.inf, f"{name} is {total}; a number above 0 was expected")
        self.steps, self.seconds = steps, seconds
        self.step = 0  # steps done
        self.elapsed = 0.0  # seconds used, of earlier processes too
        self._clock = clock
        self.restart_clock()

    def restart_clock(self) -> None:
        """The time since the last `advance` is not counted."""
        self._since = self._clock()

    def advance(self, elapsed: float | None = None) -> None:
        """A step is done. `elapsed`: the seconds used so far as another rank has measured them."""
        now = self._clock()
        self.step += 1
        self.elapsed = self.elapsed + now - self._since if elapsed is None else elapsed
        self._since = now

    @property
    def progress(self) -> float:
        """The share of the run that is done at the last `advance`, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        assert self.seconds is not None
        return min(1.0, self.elapsed / self.seconds)

    @property
    def done(self) -> bool:
        return self.progress >= 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved run was; the length stays this budget's, which may be another one.

        Raises:
            ValueError: not what `state_dict` gives.
        """
        check(
            state.keys() == {"step", "elapsed"} and all(value >= 0 for value in state.values()),
            f"the state of the budget is {state}; step and elapsed, both at least 0, were expected",
        )
        self.step, self.elapsed = int(state["step"]), float(state["elapsed"])
        self.restart_clock()


# Batches and sequences.


@dataclass(frozen=True)
class BatchRamp:
    """Sequences in a batch: from `start` by a line to `end` over the first `share` of the run, then `end`.

    Always a multiple of `multiple` (sequences of all ranks in one micro-batch), rounded down.
    """

    start: int
    end: int
    share: float = 0.6
    multiple: int = 1

    def __post_init__(self) -> None:
        check(self.multiple >= 1, f"multiple is {self.multiple}; at least 1 was expected")
        for name in ("start", "end"):
            value = getattr(self, name)
            fits = value >= 1 and value % self.multiple == 0
            check(fits, f"{name} is {value}; a number above 0 that {self.multiple} (multiple) divides was expected")
        check(self.start <= self.end, f"start is {self.start}; at most end ({self.end}) was expected")
        _check_share("share", self.share)

    def __call__(self, progress: float) -> int:
        _check_share("progress", progress)
        if progress >= self.share:
            return self.end
        # 1e-9: where the line meets a multiple, rounding must not lose a whole one.
        grown = (self.end - self.start) * progress / self.share / self.multiple
        return self.start + math.floor(grown + 1e-9) * self.multiple


@dataclass(frozen=True)
class LengthStages:
    """Sequence lengths one after another: pairs of a share of the run and a length, such as (0.9, 128), (0.1, 512)."""

    stages: Sequence[tuple[float, int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((share, length) for share, length in self.stages))
        for share, length in self.stages:
            check(share > 0, f"stages has a share of {share}; shares above 0 were expected")
            check(length >= 1, f"stages has a length of {length}; lengths of at least 1 were expected")
        total = math.fsum(share for share, _ in self.stages)
        check(abs(total - 1) < 1e-9, f"stages has shares that add up to {total}; 1, the whole run, was expected")

    def index(self, progress: float) -> int:
        """The number of the stage, from 0."""
        _check_share("progress", progress)
        ends = (math.fsum(share for share, _ in self.stages[: i + 1]) for i in range(len(self.stages)))
        # 1e-9: sums of shares are rounded, and a stage starts at the very step that they name.
        return min(sum(progress >= end - 1e-9 for end in ends), len(self.stages) - 1)

    def __call__(self, progress: float) -> int:
        return self.stages[self.index(progress)][1]
