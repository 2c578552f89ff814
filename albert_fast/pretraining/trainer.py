"""A pretraining run: the loop, its text, and what is looked at."""

from __future__ import annotations

import math
from typing import Any

from albert_fast.flops import flops
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.pretraining.config import PretrainConfig
from albert_fast.pretraining.evaluation import evaluate
from albert_fast.pretraining.examples import Batch
from albert_fast.pretraining.feed import Corpus, Feed
from albert_fast.pretraining.health import Watch
from albert_fast.pretraining.learner import make_learner
from albert_fast.pretraining.objective import Means
from albert_fast.training.loop import Finding, Loop
from albert_fast.training.parallel import World


class Trainer(Loop):
    """See `Loop`."""

    config: PretrainConfig
    feed: Feed

    def __init__(self, config: PretrainConfig, world: World) -> None:
        config.check_complete()
        corpus = Corpus(config.data)
        self.shape = config.shape_of(corpus.train.vocab_size)
        feed = Feed(corpus, config, rank=world.data_rank, ranks=world.data_ranks)
        evaluate_every = None if feed.held_out is None else config.evaluate.every
        super().__init__(config, world, feed, make_learner(config, corpus, world), evaluate_every)
        self.watch = Watch(collapse=config.health.collapse, smoothing=config.health.smoothing)

    def flops(self, batch: Batch) -> int:
        labelled = int((batch.labels != IGNORE_INDEX).sum())
        return flops(self.shape, batch.cu_seqlens.diff().tolist(), training=True, labelled=labelled).total

    def fields(self) -> dict[str, Any]:
        return {"length": self.feed.length}

    def examine(self, means: Means, gradient_norm: float) -> Finding | None:  # type: ignore[override]
        return self.watch.look(
            step=self.budget.step,
            progress=self.budget.progress,
            # Where there is something to learn of contexts; some strategies show no mask.
            masked_lm_loss=means.loss_at_masks or means.masked_lm_loss,
            unigram_loss=means.unigram_loss_at_masks or means.unigram_loss,
            # The second task's loss counts as well where it is not finite.
            gradient_norm=gradient_norm if math.isfinite(means.loss) else math.nan,
        )

    @property
    def suspicious(self) -> bool:
        return self.watch.suspicious

    def watch_state(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_watch_state(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)

    def evaluate(self) -> dict[str, Any]:
        held_out, rows = self.feed.held_out, self.config.evaluate.rows
        assert held_out is not None
        means = evaluate(self.learner, held_out, rows, self.micro, self.world, bfloat16=self.bfloat16)
        return {**means.record(), "rows": means.rows, "labels": means.labels}
