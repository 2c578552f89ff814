"""The loss on held-out text: the same examples each time, divided over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from albert_fast.pretraining.examples import Examples
from albert_fast.pretraining.objective import COUNTS, Means
from albert_fast.pretraining.parallel import World


@torch.no_grad()
def evaluate(
    module: nn.Module, examples: Examples, rows: int, micro: int, world: World, *, bfloat16: bool = False
) -> Means:
    """Means over the first `rows` examples, or as many as there are.

    Args:
        module: an Objective, or what `parallelize` made of one.
        micro: rows that a rank computes at once.
        bfloat16: by autocast.
    """
    rows = min(rows, examples.size(0))
    losses = torch.zeros(2, dtype=torch.float64, device=world.device)
    counts = torch.zeros(COUNTS, dtype=torch.float64, device=world.device)
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
            if mine:
                losses += sums.losses
                counts += sums.counts
    finally:
        module.train(was_training)
    world.sum(losses)
    world.sum(counts)
    return Means.of(losses, counts)
