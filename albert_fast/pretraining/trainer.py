"""The training loop: from a configuration to a trained checkpoint, in one process or many.

A step takes `batch.size` rows in micro-batches. Its labels are counted over all ranks before the first backward, so
that each micro-batch's sums are divided once by the counts of the whole step: accumulation, ranks and ragged rows give
the gradient of one big batch. What a step computes is a function of the weights and of (seed, epoch, row, step): the
examples, the masks and dropout's seeds are drawn from these and from no generator's state, so that a run that goes on
from a checkpoint gives the same bits as one that was never interrupted (with the same number of processes and threads,
and a budget of steps: seconds are not the same twice).
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from albert_fast.config import AlbertConfig
from albert_fast.flops import flops, peak_flops
from albert_fast.ops.checks import check
from albert_fast.pretraining import parallel
from albert_fast.pretraining.checkpoints import Checkpoints, CheckpointWriteError, load_tensors, read_state
from albert_fast.pretraining.config import PretrainConfig, write
from albert_fast.pretraining.evaluation import evaluate
from albert_fast.pretraining.examples import Batch
from albert_fast.pretraining.feed import Corpus, Feed
from albert_fast.pretraining.health import Finding, Watch
from albert_fast.pretraining.learner import Learner
from albert_fast.pretraining.masking import IGNORE_INDEX
from albert_fast.pretraining.meter import Meter, memory_in_use
from albert_fast.pretraining.objective import COUNTS, Means
from albert_fast.pretraining.randomness import example_keys
from albert_fast.pretraining.signals import StopSignals
from albert_fast.pretraining.tracking import Recorder

CONFIG = "config.yaml"


class TrainingFailed(RuntimeError):
    """The run cannot go on; its checkpoints are whole."""


class _GivenUp(Exception):
    """A signal came in the middle of a step."""


class _Flags(NamedTuple):
    """What all ranks do after a step."""

    stop: bool
    save: bool


class Trainer:
    """A run.

    Args:
        config: what it is.
        world: this process among the others.

    Raises:
        ValueError: something of the configuration does not fit; nothing was written.
    """

    def __init__(self, config: PretrainConfig, world: parallel.World) -> None:
        config.check_complete()
        self.config, self.world = config, world
        self.output = Path(config.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.save.keep)
        corpus = Corpus(config.data)
        self.feed = Feed(corpus, config, rank=world.data_rank, ranks=world.data_ranks)
        self.rows, self.rate = config.batch.ramped(world.data_ranks), config.schedule.rate()
        self.budget = config.schedule.budget()
        self.micro = self.rows.multiple // world.data_ranks  # rows that a rank computes at once
        self.learner = Learner(config, corpus, world)
        longest, most = max(length for _, length in self.feed.lengths.stages), self.shape.max_position_embeddings
        check(
            longest <= most,
            f"examples are of {longest} tokens and the model has {most} positions: lower examples.length, or lengthen "
            "the model by `albert-fast extend`",
        )
        self.bfloat16 = config.precision == "bfloat16"
        self.peak = config.log.peak_flops
        if self.peak is None and world.is_main:
            self.peak = peak_flops(world.device, torch.bfloat16 if self.bfloat16 else torch.float32)
        self.watch = Watch(collapse=config.health.collapse, smoothing=config.health.smoothing)
        self.rollbacks = 0
        self.signals = StopSignals()
        self.meter = Meter()
        self.saved_at = time.monotonic()

    @property
    def shape(self) -> AlbertConfig:
        """Of the model."""
        return self.learner.config

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
        means, gradient_norm = Means.of(losses, counts), float(norm)
        finding = self.watch.look(
            step=self.budget.step,
            progress=progress,
            # Where there is something to learn of contexts; some strategies show no mask.
            masked_lm_loss=means.loss_at_masks or means.masked_lm_loss,
            unigram_loss=means.unigram_loss_at_masks or means.unigram_loss,
            # The second task's loss counts as well where it is not finite.
            gradient_norm=gradient_norm if math.isfinite(means.loss) else math.nan,
        )
        ill = finding is not None and finding.kind != "plateau"
        rate = config.optimizer.learning_rate * self.rate(progress) * config.health.rate_factor**self.rollbacks
        if not ill:
            if config.optimizer.clip is not None:
                parallel.clip(self.learner.parameters, norm, config.optimizer.clip)
            self.learner.update(rate)
        self.feed.done(rows, means.tokens)
        self.budget.advance()
        if world.size > 1:  # clocks differ, and the schedule must not
            self.budget.elapsed = world.broadcast(self.budget.elapsed)
        self.meter.add(losses, counts, gradient_norm, self.budget.elapsed - before, self._flops(batches))
        if finding is not None:
            self.recorder.event(self.budget.step, finding.kind, finding.message)
        step, done = self.budget.step, self.budget.done
        if step % config.log.every == 0 or done or ill:
            self._log(rate, rows)
        if ill:
            assert finding is not None
            self._go_back(finding)
        if self.feed.held_out is not None and (step % config.evaluate.every == 0 or done):
            self._evaluate()

    def _gradients(self, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all ranks' rows of a step; the sums of their losses and counts."""
        world, device = self.world, self.world.device
        sizes = [sum(_labels(batch) for batch in batches), sum(batch.rows for batch in batches)]
        of_all = world.sum(torch.tensor(sizes, dtype=torch.float64, device=device))
        weights = of_all.new_tensor([1.0, self.config.sentence_order_weight])
        # parallelize() takes the mean over the ranks.
        factors = (world.data_ranks * weights / of_all.clamp(min=1)).float()
        losses, counts = (torch.zeros(size, dtype=torch.float64, device=device) for size in (2, COUNTS))
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
            counts += sums.counts
        return world.sum(losses), world.sum(counts)

    def _dropout_seed(self, micro_batch: int) -> int:
        """Of one micro-batch: a function of where it is in the run. Ranks that share one model draw the same."""
        place = (self.budget.step * self.world.data_ranks + self.world.data_rank) << 20 | micro_batch
        return int(example_keys(self.config.seed, self.feed.epoch, np.array([place]))[0] >> np.uint64(1))

    def _flops(self, batches: list[Batch]) -> int:
        """That this rank's rows of a step need."""
        return sum(
            flops(self.shape, batch.cu_seqlens.diff().tolist(), training=True, labelled=_labels(batch)).total
            for batch in batches
        )

    # ------------------------------------------------------------------------------------------ stopping, going back

    def _flags(self) -> _Flags:
        """What all ranks do now: a signal may have come to one of them, and clocks differ."""
        save = self.config.save
        due = save.every is not None and self.budget.step % save.every == 0
        if save.seconds is not None:
            due = due or time.monotonic() - self.saved_at >= save.seconds
        due = due and not self.watch.suspicious  # the checkpoint before is the one to go back to
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
        self.watch.load_state_dict(state["watch"])
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
        self.watch.load_state_dict(state["watch"])
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
            "watch": self.watch.state_dict(),
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

    def _log(self, rate: float, rows: int) -> None:
        budget, meter = self.budget, self.meter
        left = None if budget.seconds is None else max(0.0, budget.seconds - budget.elapsed)
        if budget.steps is not None:
            left = (budget.steps - budget.step) * meter.seconds / meter.steps
        # All ranks do alike: the first one's share of its device stands for all.
        peak = None if self.peak is None else self.peak * self.world.tensor_ranks
        self.recorder.train(
            {
                "step": budget.step,
                "epoch": self.feed.epoch,
                "progress": budget.progress,
                "seconds": budget.elapsed,
                "tokens": self.feed.tokens,
                **meter.means.record(self.config.examples.has_second_task),
                "learning_rate": rate,
                "batch_size": rows,
                "length": self.feed.length,
                **meter.record(peak),
                "memory": memory_in_use(self.world.device),
                "seconds_left": left,
            }
        )
        self.meter = Meter()

    def _evaluate(self) -> None:
        examples, budget = self.feed.held_out, self.budget
        assert examples is not None
        rows, micro = self.config.evaluate.rows, self.micro
        means = evaluate(self.learner.evaluated, examples, rows, micro, self.world, bfloat16=self.bfloat16)
        self.recorder.evaluation(
            {
                "step": budget.step,
                "seconds": budget.elapsed,
                "tokens": self.feed.tokens,
                **means.record(self.config.examples.has_second_task),
                "rows": means.rows,
                "labels": means.labels,
                "weights": "model" if self.learner.average is None else "ema",
            }
        )


def _labels(batch: Batch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`a.b` and its value for each leaf."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
