"""The options that all runs share; a run's own configuration is a dataclass that extends `RunOptions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from albert_fast.ops.checks import check
from albert_fast.training.parallel import ENGINES
from albert_fast.training.schedules import (
    BatchRamp,
    Budget,
    Constant,
    Cosine,
    Exponential,
    Polynomial,
    Schedule,
    Warmup,
    warmup_stable_decay,
)

OPTIMIZERS = ("lamb", "adamw")
SCHEDULES = ("albert", "constant", "polynomial", "exponential", "cosine", "stable_decay")
PRECISIONS = ("float32", "bfloat16")
ACTIONS = ("rollback", "stop")


def one_of(name: str, value: str, known: Sequence[str]) -> None:
    check(value in known, f"{name} is {value!r}; one of {', '.join(known)} was expected")


def share(name: str, value: float | None) -> None:
    check(value is None or 0 <= value <= 1, f"{name} is {value}; a share from 0 to 1 was expected")


def at_least(name: str, value: float | None, least: float) -> None:
    check(value is None or value >= least, f"{name} is {value}; at least {least} was expected")


@dataclass(frozen=True)
class BatchOptions:
    """How many rows make a step.

    Attributes:
        size: rows of an optimizer step, on all ranks together.
        micro: rows that a rank computes at once; a step accumulates the gradients of as many as it takes. None: all.
        start, ramp: the batch grows from `start` rows by a line over the first share `ramp` of the run (None: it does
            not grow).
    """

    size: int = 4096
    micro: int | None = None
    start: int | None = None
    ramp: float = 0.6

    def __post_init__(self) -> None:
        at_least("batch.size", self.size, 1)
        at_least("batch.micro", self.micro, 1)
        at_least("batch.start", self.start, 1)
        share("batch.ramp", self.ramp)

    def ramped(self, ranks: int) -> BatchRamp:
        """Rows of a step as a function of the progress, in whole micro-batches of all ranks."""
        check(
            self.size % ranks == 0,
            f"batch.size is {self.size}; a multiple of the {ranks} ranks was expected, each has as many rows",
        )
        of_rank, start = self.size // ranks, self.start or self.size
        micro = min(self.micro or of_rank, of_rank)
        check(
            of_rank % micro == 0,
            f"batch.micro is {micro} and each rank has {of_rank} rows of batch.size {self.size}; a number that divides "
            "them was expected",
        )
        check(
            start <= self.size and start % (micro * ranks) == 0,
            f"batch.start is {start}; a multiple of {micro * ranks}, the rows of all ranks' micro-batches, and at most "
            f"batch.size {self.size} was expected",
        )
        return BatchRamp(start, self.size, self.ramp, multiple=micro * ranks)


@dataclass(frozen=True)
class OptimizerOptions:
    """LAMB as the original's, or the original's AdamW.

    Attributes:
        learning_rate: the highest; the schedule multiplies it.
        clip: the gradient's global norm is at most this; None: no clipping.
        bias_correction: of the moments; neither of Google's optimizers has it.
        ema: decay of the moving average of the weights that is kept beside them, such as 0.999; None: none.
    """

    name: str = "lamb"
    learning_rate: float = 1.76e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float | None = 1.0
    bias_correction: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, OPTIMIZERS)
        for name in ("learning_rate", "eps", "weight_decay"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        check(
            all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas is {self.betas}; two in [0, 1) were expected"
        )
        check(
            self.clip is None or self.clip > 0, f"optimizer.clip is {self.clip}; a norm above 0 was expected, or null"
        )
        check(
            self.ema is None or 0 < self.ema < 1,
            f"optimizer.ema is {self.ema}; a decay between 0 and 1 was expected, such as 0.999, or null",
        )


@dataclass(frozen=True)
class ScheduleOptions:
    """How long the run is, and how the learning rate changes.

    Attributes:
        steps, seconds: the length, exactly one of them.
        shape: albert (a line down to 0 by the global step), polynomial, exponential, cosine, stable_decay or constant.
        warmup: share of the run over which the rate rises from 0.
        power: of `polynomial`.
        floor: what `polynomial`, `cosine` and `stable_decay` end at, and `exponential`, as a share of the highest rate.
        decay: share of the run over which `stable_decay` falls.
        decay_shape: of `stable_decay`: linear or sqrt.
    """

    steps: int | None = None
    seconds: float | None = None
    shape: str = "albert"
    warmup: float = 0.025
    power: float = 1.0
    floor: float | None = None
    decay: float = 0.1
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        one_of("schedule.shape", self.shape, SCHEDULES)
        one_of("schedule.decay_shape", self.decay_shape, ("linear", "sqrt"))
        share("schedule.floor", self.floor)
        check(0 <= self.warmup < 1, f"schedule.warmup is {self.warmup}; a share of the run in [0, 1) was expected")
        check(0 < self.decay <= 1, f"schedule.decay is {self.decay}; a share of the run in (0, 1] was expected")
        check(
            self.warmup + self.decay <= 1 or self.shape != "stable_decay",
            f"schedule.warmup is {self.warmup} and schedule.decay {self.decay}; together at most 1, the whole run, was "
            "expected",
        )
        check(
            self.floor != 0 or self.shape != "exponential",
            "schedule.floor is 0, which an exponential never reaches: give one above 0, such as 0.01",
        )
        check(self.power > 0, f"schedule.power is {self.power}; a number above 0 was expected")
        if self.steps is not None or self.seconds is not None:
            self.budget()
        self.rate()

    def budget(self) -> Budget:
        check(
            (self.steps is None) != (self.seconds is None),
            f"schedule.steps is {self.steps} and schedule.seconds is {self.seconds}; exactly one of them was expected, "
            "and null for the other",
        )
        at_least("schedule.steps", self.steps, 1)
        check(self.seconds is None or self.seconds > 0, f"schedule.seconds is {self.seconds}; more than 0 was expected")
        return Budget(steps=self.steps, seconds=self.seconds)

    def rate(self) -> Schedule:
        floor = self.floor or 0.0
        if self.shape == "stable_decay":
            return warmup_stable_decay(self.warmup, self.decay, floor, self.decay_shape)
        if self.shape == "albert":
            return Warmup(self.warmup, Polynomial())
        then: dict[str, Schedule] = {
            "constant": Constant(),
            "polynomial": Polynomial(self.power, floor),
            "exponential": Exponential(self.floor or 0.01),
            "cosine": Cosine(floor),
        }
        return Warmup(self.warmup, then[self.shape], restart=True)


@dataclass(frozen=True)
class ParallelOptions:
    """How several processes share the work; `torchrun` starts them.

    Attributes:
        engine: ddp (every rank has the whole model) or fsdp (weights, gradients and moments are divided).
        tensor: ranks that share the heads and the feed-forward network of one model.
        compress: gradients travel in bfloat16 (ddp).
    """

    engine: str = "ddp"
    tensor: int = 1
    compress: bool = False

    def __post_init__(self) -> None:
        one_of("parallel.engine", self.engine, ENGINES)
        at_least("parallel.tensor", self.tensor, 1)


@dataclass(frozen=True)
class SaveOptions:
    """Checkpoints.

    Attributes:
        every: steps between two; seconds: between two. Whatever is first; the last step is always saved.
        keep: how many of the last ones stay.
    """

    every: int | None = 1000
    seconds: float | None = 900.0
    keep: int = 3

    def __post_init__(self) -> None:
        at_least("save.every", self.every, 1)
        at_least("save.seconds", self.seconds, 0)
        at_least("save.keep", self.keep, 1)


@dataclass(frozen=True)
class LogOptions:
    """What is recorded.

    Attributes:
        every: steps that one record of the log is the mean of.
        tensorboard: event files, too.
        wandb: a project of Weights & Biases, too.
        quiet: nothing on the terminal.
        peak_flops: of one device, which MFU is a share of; None: of the data sheet, or measured on a CPU.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    quiet: bool = False
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        at_least("log.every", self.every, 1)


@dataclass(frozen=True)
class HealthOptions:
    """What happens when the loss is not finite.

    Attributes:
        action: rollback (to the last checkpoint, and on with other examples) or stop.
        most_rollbacks: in one run; then it stops.
        rate_factor: the learning rate is multiplied by this with each rollback.
    """

    action: str = "rollback"
    most_rollbacks: int = 3
    rate_factor: float = 0.5

    def __post_init__(self) -> None:
        one_of("health.action", self.action, ACTIONS)
        at_least("health.most_rollbacks", self.most_rollbacks, 0)
        check(
            0 < self.rate_factor <= 1,
            f"health.rate_factor is {self.rate_factor}; a factor above 0, and at most 1, was expected",
        )


@dataclass(frozen=True)
class RunOptions:
    """What every run has.

    Attributes:
        output: its directory: checkpoints, log and configuration. A run that is there already is gone on with.
        seed: of the weights, the examples and dropout.
        device: cpu, cuda …; None: a GPU where there is one.
        precision: float32, or bfloat16 by autocast (float32 weights).
    """

    output: str = ""
    seed: int = 12345
    device: str | None = None
    precision: str = "float32"
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    log: LogOptions = field(default_factory=LogOptions)
    health: HealthOptions = field(default_factory=HealthOptions)

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
