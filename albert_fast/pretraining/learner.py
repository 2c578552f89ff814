"""The model of a pretraining run, ready to learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from albert_fast.heads import AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.pretraining.config import PretrainConfig
from albert_fast.pretraining.feed import Corpus
from albert_fast.pretraining.initialization import build_model, look_at_neighbors
from albert_fast.pretraining.objective import MaskedLMObjective, unigram_losses
from albert_fast.training.learner import Learner
from albert_fast.training.parallel import World


def make_learner(config: PretrainConfig, corpus: Corpus, world: World) -> Learner:
    """A new model, or the one to start from, with its optimizer, on the world's device."""
    options, second_task = config.model, config.examples.has_second_task
    shape = config.shape_of(corpus.train.vocab_size)
    unigram = unigram_losses(corpus.train)
    model: AlbertForPreTraining | AlbertForMaskedLM
    if options.start_from is None:
        model = build_model(shape, second_task, config.seed)
        if options.initialization == "neighbors":
            look_at_neighbors(model, unigram, config.seed)
    else:
        kind: Any = AlbertForPreTraining if second_task else AlbertForMaskedLM
        model = kind.from_pretrained(options.start_from, config=shape, dtype=torch.float32)
    model.set_recompute(options.recompute)
    objective = MaskedLMObjective(
        model,
        unigram,
        corpus.vocabulary.mask_id,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        sentence_order_weight=config.sentence_order_weight,
    )

    def write_rest(directory: Path) -> None:
        replace(shape, architectures=[type(model).__name__], dtype=torch.float32).save_pretrained(directory)
        corpus.tokenizer.save_pretrained(directory)

    return Learner(objective, config, world, write_rest)
