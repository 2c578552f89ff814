"""The training loop, whatever is trained: in one process or many, from its start or from a checkpoint.

A step takes `batch.size` rows in micro-batches. What its losses are divided by is counted over all ranks before the
first backward, so that each micro-batch's sums are divided once by the counts of the whole step: accumulation, ranks
and ragged rows give the gradient of one big batch. What a step computes is a function of the weights and of (seed,
epoch, row, step): the examples and dropout's seeds are drawn from these and from no generator's state, so that a run
that goes on from a checkpoint gives the same bits as one that was never interrupted (with the same number of processes
and threads, and a budget of steps: seconds are not the same twice).
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from albert_fast.flops import peak_flops
from albert_fast.training import parallel
from albert_fast.training.checkpoints import Checkpoints, CheckpointWriteError, load_tensors, read_state
from albert_fast.training.configuration import write
from albert_fast.training.findings import Finding, not_finite
from albert_fast.training.learner import Learner
from albert_fast.training.meter import Meter, memory_in_use
from albert_fast.training.objective import Means
from albert_fast.training.options import RunOptions
from albert_fast.training.parallel import World
from albert_fast.training.randomness import example_keys
from albert_fast.training.signals import StopSignals
from albert_fast.training.tracking import Recorder

CONFIG = "config.yaml"


class TrainingFailed(RuntimeError):
    """The run cannot go on; its checkpoints are whole."""


def run_to_status(kind: Callable[[Any, World], Loop], config: RunOptions, program: str) -> int:
    """Trains in this process, which may be one of those that `torchrun` started.

    Returns:
        0, 1 for a run that failed (`program` says why), or 128 + the number of a signal that stopped it.
    """
    with parallel.start(config.device, config.parallel.tensor) as world:
        try:
            return kind(config, world).run()
        except TrainingFailed as error:
            if world.is_main:
                print(f"{program}: {error}", file=sys.stderr)
            return 1


class _GivenUp(Exception):
    """A signal came in the middle of a step."""


class _Flags(NamedTuple):
    """What all ranks do after a step."""

    stop: bool
    save: bool


class Feed(Protocol):
    """Where a run is in its data, and the rows of its next step.

    Attributes:
        epoch: number of the pass through the data.
        tokens: given out so far, on all ranks.
    """

    tokens: int

    @property
    def epoch(self) -> int: ...

    def take(self, progress: float, rows: int, micro: int) -> list[Any]:
        """The next `rows` rows of all ranks, this one's, in micro-batches of `micro` rows."""

    def done(self, rows: int, tokens: int) -> None:
        """The rows that were taken are trained on."""

    def give_back(self) -> None:
        """What was taken was not trained on: it comes again."""

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Loop(ABC):
    """A run.

    Args:
        config: what it is.
        world: this process among the others.
        feed, learner: what it learns, and from what.
        evaluate_every: steps between two evaluations; the last step is always evaluated. None: never.

    Raises:
        ValueError: something of the configuration does not fit; nothing was written.
    """

    def __init__(
        self, config: RunOptions, world: parallel.World, feed: Feed, learner: Learner, evaluate_every: int | None
    ) -> None:
        self.config, self.world, self.feed, self.learner = config, world, feed, learner
        self.evaluate_every = evaluate_every
        self.output = Path(config.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.save.keep)
        self.rows, self.rate = config.batch.ramped(world.data_ranks), config.schedule.rate()
        self.budget = config.schedule.budget()
        self.micro = self.rows.multiple // world.data_ranks  # rows that a rank computes at once
        self.bfloat16 = config.precision == "bfloat16"
        self.peak = config.log.peak_flops
        if self.peak is None and world.is_main:
            self.peak = self._peak()
        self.rollbacks = 0
        self.signals = StopSignals()
        self.meter = Meter()
        self.saved_at = time.monotonic()

    # --------------------------------------------------------------------------------- what depends on what is learned

    @abstractmethod
    def flops(self, batch: Any) -> int:
        """That a batch needs, forward and backward."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """The fields of an evaluation's record."""

    def examine(self, means: Means, gradient_norm: float) -> Finding | None:
        """What is wrong with a step, before its update."""
        return (
            None
            if math.isfinite(means.loss) and math.isfinite(gradient_norm)
            else not_finite(means.loss, gradient_norm)
        )

    def fields(self) -> dict[str, Any]:
        """More fields of a record of training."""
        return {}

    @property
    def suspicious(self) -> bool:
        """Whether the weights of a step before may be the better ones to keep."""
        return False

    def watch_state(self) -> dict[str, Any]:
        """Of what `examine` has seen, for a checkpoint."""
        return {}

    def load_watch_state(self, state: dict[str, Any]) -> None:
        """As it was when `watch_state` gave this."""
        assert not state

    # ------------------------------------------------------------------------------------------------------- the run

    def run(self) -> int:
        """Trains until the budget is used, or a signal comes.

        Returns:
            0, or 128 + the signal's number once everything is saved.

        Raises:
            TrainingFailed: the loss was not finite or collapsed, and going back is not allowed, or did not help.
            ValueError: the directory has the checkpoint of another model.
            CheckpointWriteError: the first or the last checkpoint could not be written.
        """
        latest = self.checkpoints.latest()
        if latest is not None:
            self._resume(latest)
        with self.signals, self._recorder(latest) as self.recorder:
            if latest is None:
                self._save()  # something to go back to, and a full disk shows now
            else:
                self.recorder.event(self.budget.step, "resumed", f"from {latest}{self._changes()}")
            if self.world.is_main:
                write(self.config, self.output / CONFIG)
            while not self.budget.done:
                self.budget.restart_clock()  # what is not training does not count
                try:
                    self._step()
                except _GivenUp:
                    self.feed.give_back()
                flags = self._flags()
                if flags.save or flags.stop or self.budget.done:
                    self._save_if_possible(last=flags.stop or self.budget.done)
                if flags.stop and not self.budget.done:
                    self.recorder.event(self.budget.step, "stopped", "by a signal; the same command goes on")
                    return 128 + (self.signals.number or signal.SIGTERM)
            return 0

    def _step(self) -> None:
        config, world, progress = self.config, self.world, self.budget.progress
        before, rows = self.budget.elapsed, self.rows(progress)
        batches = self.feed.take(progress, rows, self.micro)
        losses, counts = self._gradients(batches)
        norm = parallel.gradient_norm(self.learner.parameters)
        means, gradient_norm = self.learner.objective.means(losses, counts), float(norm)
        finding = self.examine(means, gradient_norm)
        ill = finding is not None and finding.fatal
        rate = config.optimizer.learning_rate * self.rate(progress) * config.health.rate_factor**self.rollbacks
        if not ill:
            if config.optimizer.clip is not None:
                parallel.clip(self.learner.parameters, norm, config.optimizer.clip)
            self.learner.update(rate)
        self.feed.done(rows, means.tokens)
        self.budget.advance()
        if world.size > 1:  # clocks differ, and the schedule must not
            self.budget.elapsed = world.broadcast(self.budget.elapsed)
        work = sum(map(self.flops, batches))
        self.meter.add(losses, counts, gradient_norm, self.budget.elapsed - before, work)
        if finding is not None:
            self.recorder.event(self.budget.step, finding.kind, finding.message)
        step, done = self.budget.step, self.budget.done
        if step % config.log.every == 0 or done or ill:
            self._log(rate, rows)
        if ill:
            assert finding is not None
            self._go_back(finding)
        if self.evaluate_every is not None and (step % self.evaluate_every == 0 or done):
            place = {"step": step, "seconds": self.budget.elapsed, "tokens": self.feed.tokens}
            weights = "model" if self.learner.average is None else "ema"
            self.recorder.evaluation({**place, **self.evaluate(), "weights": weights})

    def _gradients(self, batches: list[Any]) -> tuple[Tensor, Tensor]:
        """Of all ranks' rows of a step; the sums of their losses and counts."""
        world, device, objective = self.world, self.world.device, self.learner.objective
        own = torch.tensor([objective.divisors(batch) for batch in batches], dtype=torch.float64, device=device).sum(0)
        of_all = world.sum(own)
        # parallelize() takes the mean over the ranks.
        factors = (world.data_ranks * of_all.new_tensor(objective.weights) / of_all.clamp(min=1)).float()
        losses, counts = torch.zeros_like(of_all), None
        self.learner.optimizer.zero_grad()
        for number, batch in enumerate(batches):
            if self.signals.number and world.size == 1:
                raise _GivenUp
            torch.manual_seed(self._dropout_seed(number))
            with parallel.accumulate(self.learner.module, last=number == len(batches) - 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                    sums = self.learner.module(batch.to(device, non_blocking=True))
                (sums.losses * factors).sum().backward()
            losses += sums.losses.detach()
            counts = sums.counts if counts is None else counts + sums.counts
        assert counts is not None
        return world.sum(losses), world.sum(counts)

    def _dropout_seed(self, micro_batch: int) -> int:
        """Of one micro-batch: a function of where it is in the run. Ranks that share one model draw the same."""
        place = (self.budget.step * self.world.data_ranks + self.world.data_rank) << 20 | micro_batch
        return int(example_keys(self.config.seed, self.feed.epoch, np.array([place]))[0] >> np.uint64(1))

    # ------------------------------------------------------------------------------------------ stopping, going back

    def _flags(self) -> _Flags:
        """What all ranks do now: a signal may have come to one of them, and clocks differ."""
        save = self.config.save
        due = save.every is not None and self.budget.step % save.every == 0
        if save.seconds is not None:
            due = due or time.monotonic() - self.saved_at >= save.seconds
        due = due and not self.suspicious  # the checkpoint before is the one to go back to
        stop, due = (bool(self.world.largest(float(flag))) for flag in (self.signals.number != 0, due))
        return _Flags(stop, due)

    def _go_back(self, finding: Finding) -> None:
        """To the weights of the last checkpoint, and on with the examples that come now.

        Steps and time are not given back: the log has each step once, and the run ends when it should.
        """
        step, health, latest = self.budget.step, self.config.health, self.checkpoints.latest()
        if health.action == "stop" or self.rollbacks >= health.most_rollbacks or latest is None:
            tried = f", after {self.rollbacks} rollbacks" if self.rollbacks else ""
            raise TrainingFailed(f"step {step}{tried}: {finding.message}")
        state = read_state(latest)
        load_tensors(latest, self.learner.tensors(), self.world)
        self.load_watch_state(state["watch"])
        self.rollbacks += 1
        self.recorder.event(
            step,
            "rollback",
            f"weights and moments are those of step {state['budget']['step']} again, and the learning rate is "
            f"{health.rate_factor:g} times what it was; number {self.rollbacks} of at most {health.most_rollbacks}",
        )

    def _resume(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        load_tensors(checkpoint, self.learner.tensors(), self.world)
        self.budget.load_state_dict(state["budget"])
        self.feed.load_state_dict(state["feed"])
        self.load_watch_state(state["watch"])
        self.rollbacks = state["rollbacks"]

    def _changes(self) -> str:
        """What differs from the configuration that the run had so far, as words for its log."""
        try:
            before = dict(_flat(json.loads((self.output / CONFIG).read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            return ""
        now = dict(_flat(json.loads(json.dumps(self.config.to_dict()))))
        changed = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]
        return "; changed: " + ", ".join(changed) if changed else ""

    # ------------------------------------------------------------------------------------------------ what it leaves

    def _save(self) -> None:
        states = self.learner.whole_states()
        state = {
            "budget": self.budget.state_dict(),
            "feed": self.feed.state_dict(),
            "watch": self.watch_state(),
            "rollbacks": self.rollbacks,
        }
        tensors = self.learner.tensors()
        export = lambda directory: self.learner.export(directory, states)  # noqa: E731
        self.checkpoints.save(self.budget.step, state, tensors, export, self.world)
        self.saved_at = time.monotonic()

    def _save_if_possible(self, *, last: bool) -> None:
        """Where it is not, the run goes on and tries again later: somebody may make room. The last one must succeed."""
        try:
            self._save()
        except CheckpointWriteError as error:
            self.saved_at = time.monotonic()
            self.recorder.event(self.budget.step, "not_saved", str(error))
            if last:
                raise

    def _recorder(self, latest: Path | None) -> Recorder:
        """The log; only the first rank has one that writes."""
        log = self.config.log
        return Recorder(
            self.output if self.world.is_main else None,
            after_step=None if latest is None else self.budget.step,
            tensorboard=log.tensorboard,
            wandb=log.wandb,
            quiet=log.quiet,
            config=self.config.to_dict(),
        )

    def _peak(self, exceeded: float = 0.0) -> float | None:
        dtype = torch.bfloat16 if self.bfloat16 else torch.float32
        return peak_flops(self.world.device, dtype, exceeded=exceeded)

    def _log(self, rate: float, rows: int) -> None:
        budget, meter = self.budget, self.meter
        left = None if budget.seconds is None else max(0.0, budget.seconds - budget.elapsed)
        if budget.steps is not None:
            left = (budget.steps - budget.step) * meter.seconds / meter.steps
        # All ranks do alike: the first one's share of its device stands for all.
        ranks = self.world.tensor_ranks
        if self.config.log.peak_flops is None and self.peak is not None and meter.rate > self.peak * ranks:
            self.peak = self._peak(exceeded=meter.rate / ranks)
        peak = None if self.peak is None else self.peak * ranks
        assert isinstance(meter.losses, Tensor)
        assert isinstance(meter.counts, Tensor)
        means = self.learner.objective.means(meter.losses, meter.counts)
        self.recorder.train(
            {
                "step": budget.step,
                "epoch": self.feed.epoch,
                "progress": budget.progress,
                "seconds": budget.elapsed,
                "tokens": self.feed.tokens,
                **means.record(),
                "learning_rate": rate,
                "batch_size": rows,
                **self.fields(),
                **meter.record(means.tokens, peak),
                "memory": memory_in_use(self.world.device),
                "seconds_left": left,
            }
        )
        self.meter = Meter()


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b` and its value for each leaf."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
