"""Training: loss and gradients of the masked language model, and whole steps of pretraining beside the Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from albert_fast import AlbertConfig, AlbertForPreTraining
from albert_fast.bench import pretraining
from albert_fast.bench.arguments import PRETRAINING, TRAINERS, Shape
from albert_fast.bench.case import Case
from albert_fast.bench.parity import Results
from albert_fast.bench.suites.model import model_case
from albert_fast.bench.suites.setting import Setting
from albert_fast.bench.work import Work
from albert_fast.flops import flops
from albert_fast.pretraining.examples import Batch


class Subject(NamedTuple):
    config: AlbertConfig
    state_dict: dict[str, Tensor]
    batches: Sequence[Batch]


@dataclass(kw_only=True)
class StepCase(Case):
    """Steps of pretraining (`albert_fast.bench.pretraining`); the work is that of one."""

    make: Callable[[], Subject]

    @functools.cached_property
    def subject(self) -> Subject:
        return self.make()

    @functools.cached_property
    def expected(self) -> list[float]:
        """The loss of each step, in float64."""
        return pretraining.oracle_losses(*self.subject, self.device)

    def work(self) -> Work:
        config, _, batches = self.subject
        lengths, labelled = pretraining.lengths(batches), pretraining.labelled(batches)
        operations = flops(config, lengths, True, labelled)
        count = len(batches)
        return self.new_work(
            tokens=sum(lengths) // count,
            fill=sum(lengths) / sum(batch.rows * batch.max_seqlen for batch in batches),
            labelled=labelled // count,
            gflop=operations.total / count / 1e9,
            attention_gflop=operations.attention / count / 1e9,
        )

    def refuses(self, peer: str) -> str | None:
        return pretraining.refuses(peer)

    def open(self, peer: str) -> pretraining.Trained:
        config, state_dict, batches = self.subject
        return pretraining.Trained(peer, config, state_dict, batches, self.device)

    def judge(self, peer: str, results: Results) -> tuple[float, float]:
        """The first loss must be right; those after an update a tenth as exactly."""
        expected = torch.tensor(self.expected, dtype=torch.float64)
        first, *rest = ((results["losses"] - expected).abs() / expected).tolist()
        later = max(rest, default=0.0) * pretraining.LIMIT / pretraining.LIMIT_AFTER_STEPS
        return (max(first, later) if first == first and later == later else float("inf")), pretraining.LIMIT


def step_case(setting: Setting, shape: Shape) -> StepCase:
    def make() -> Subject:
        batches = pretraining.make_batches(setting.tokenizer, setting.read, shape)
        return Subject(setting.config, setting.weights(setting.config, AlbertForPreTraining), batches)

    return StepCase(
        suite="train",
        group="step",
        mode=PRETRAINING,
        dtype="float32",
        shape=str(shape),
        peers=TRAINERS,
        device=setting.device,
        make=make,
    )


def cases(setting: Setting) -> list[Case]:
    shape = Shape(4, 128, ragged=True) if setting.quick else Shape(8, 128)
    dtypes = ("float32",) if setting.quick else ("float32", "autocast")
    steps = (Shape(4, 128),) if setting.quick else (Shape(8, 128), Shape(8, 128, ragged=True))
    return [
        *(model_case(setting, "train", shape, "training", dtype) for dtype in dtypes),
        *(step_case(setting, shape) for shape in steps),
    ]
