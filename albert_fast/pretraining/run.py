"""`albert-fast pretrain`: one process of a run, from its start to its exit status."""

from __future__ import annotations

import torch

from albert_fast.ops.checks import check
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.pretraining.batch_size import find_batch_size, memory_of
from albert_fast.pretraining.config import PretrainConfig
from albert_fast.pretraining.examples import Batch
from albert_fast.pretraining.feed import Corpus
from albert_fast.pretraining.learner import make_learner
from albert_fast.pretraining.trainer import Trainer
from albert_fast.training import parallel
from albert_fast.training.loop import run_to_status


def train(config: PretrainConfig) -> int:
    """Trains; the exit status: 0, 1 for a run that failed, 128 + the number of a signal that stopped it."""
    config.check_complete()
    return run_to_status(Trainer, config, "albert-fast pretrain")


def find_micro_batch(config: PretrainConfig) -> int:
    """Prints what micro-batches of full rows take of time and memory, and which one to choose; the exit status."""
    check(bool(config.data.train), "data.train is not given: the token store, whose vocabulary sizes the model")
    with parallel.start(config.device) as world:
        check(world.size == 1, f"--find-batch-size runs in one process, and there are {world.size}")
        corpus = Corpus(config.data)
        learner = make_learner(config, corpus, world)
        learner.optimizer.allocate()
        longest = max(length for _, length in config.stages.stages)
        share = config.examples.masking.rate

        def run(rows: int) -> int:
            batch = full_rows(rows, longest, share, corpus.train.vocab_size, config.examples.has_second_task)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                losses = learner.module(batch.to(world.device)).losses
            losses.sum().backward()
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
            return batch.tokens

        run(1)  # makes the gradients
        print(find_batch_size(run, memory=memory_of(world.device), most=config.batch.size))
        return 0


def full_rows(rows: int, length: int, labelled: float, vocab_size: int, second_task: bool) -> Batch:
    """Random ids in rows of full length, with a share of labels: what a batch takes at most."""
    ids = torch.randint(vocab_size, (rows * length,))
    return Batch(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        position_ids=torch.arange(length).repeat(rows),
        labels=torch.where(torch.rand(len(ids)) < labelled, ids, IGNORE_INDEX),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        pad_id=0,
        sentence_order_label=torch.randint(2, (rows,)) if second_task else None,
    )
