"""The loss on held-out text: the same examples each time, divided over the ranks."""

from __future__ import annotations

from typing import cast

import torch

from albert_fast.pretraining.examples import Examples
from albert_fast.pretraining.objective import Means
from albert_fast.training.learner import Learner
from albert_fast.training.parallel import World


@torch.no_grad()
def evaluate(
    learner: Learner, examples: Examples, rows: int, micro: int, world: World, *, bfloat16: bool = False
) -> Means:
    """Means over the first `rows` examples, or as many as there are.

    Args:
        micro: rows that a rank computes at once.
        bfloat16: by autocast.
    """
    rows, module = min(rows, examples.size(0)), learner.evaluated
    losses = counts = torch.zeros((), dtype=torch.float64, device=world.device)
    was_training = module.training
    module.eval()
    try:
        for start in range(0, rows, micro * world.data_ranks):
            of_all = range(start, min(start + micro * world.data_ranks, rows))
            # Ranks without a row left compute one for the others' sake (FSDP's gathering), which is not counted.
            mine = of_all[world.data_rank :: world.data_ranks]
            batch = examples.batch(0, mine or of_all[:1]).to(world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
                sums = module(batch)
            share = float(bool(mine))
            losses, counts = losses + share * sums.losses, counts + share * sums.counts
    finally:
        module.train(was_training)
    return cast(Means, learner.objective.means(world.sum(losses.contiguous()), world.sum(counts.contiguous())))
