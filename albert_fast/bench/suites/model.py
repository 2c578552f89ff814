"""The whole model: inference, and in `train` loss and gradients; each peer in a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from albert_fast import AlbertConfig
from albert_fast.bench import parity
from albert_fast.bench.arguments import Shape
from albert_fast.bench.case import Case, Here
from albert_fast.bench.data import Batch
from albert_fast.bench.parity import Results
from albert_fast.bench.peers import PEERS, AlbertFast, call
from albert_fast.bench.suites.setting import Setting
from albert_fast.bench.work import Work
from albert_fast.bench.worker import TURN, Contender, Worker
from albert_fast.flops import flops


class Subject(NamedTuple):
    """What every peer is given; the weights in float32."""

    config: AlbertConfig
    state_dict: dict[str, Tensor]
    batch: Batch


@dataclass(kw_only=True)
class ModelCase(Case):
    """Attributes:
    make: what is given.
    here: all peers in this process, for those that have no threads of their own; starting others takes seconds.
    turn: as in `Here`.
    left_out: who is not asked, and why.
    """

    make: Callable[[], Subject]
    here: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    turn: float = TURN

    @functools.cached_property
    def subject(self) -> Subject:
        return self.make()

    @functools.cached_property
    def expected(self) -> Results:
        return parity.oracle(*self.subject, self.mode)

    @functools.cached_property
    def limits(self) -> tuple[float, float]:
        return parity.limits(*self.subject, self.mode, self.dtype, self.expected)

    def work(self) -> Work:
        config, _, batch = self.subject
        training = self.mode == "training"
        operations = flops(config, batch.lengths, training, batch.labelled if training else 0)
        return self.new_work(
            tokens=batch.tokens,
            fill=batch.fill,
            labelled=batch.labelled,
            gflop=operations.total / 1e9,
            attention_gflop=operations.attention / 1e9,
        )

    def refuses(self, peer: str) -> str | None:
        return self.left_out.get(peer) or PEERS[peer]().refuses(self.mode, self.dtype, self.device.type)

    def open(self, peer: str) -> Contender:
        config, state_dict, batch = self.subject
        if not self.here:
            return Worker(peer, config, state_dict, batch, self.mode, self.dtype)
        model = PEERS[peer]()

        def results() -> Results:
            model.build(config, state_dict, self.dtype, self.device, batch)
            return parity.results(model, batch, self.mode)

        return Here(results, lambda: call(model, batch, self.mode), self.device, self.turn)

    def judge(self, peer: str, results: Results) -> tuple[float, float]:
        ours, theirs = self.limits
        limit = ours if issubclass(PEERS[peer], AlbertFast) else theirs
        return parity.error(results, self.expected), limit


def model_case(setting: Setting, suite: str, shape: Shape, mode: str, dtype: str) -> ModelCase:
    """Of every peer."""

    def make() -> Subject:
        return Subject(setting.config, setting.weights(setting.config), setting.batch(shape))

    return ModelCase(
        suite=suite,
        group="model",
        mode=mode,
        dtype=dtype,
        shape=str(shape),
        peers=tuple(PEERS),
        left_out={"transformers-compile": "it takes a minute: without --quick"} if setting.quick else {},
        device=setting.device,
        make=make,
    )


def cases(setting: Setting) -> list[Case]:
    shapes: tuple[Shape, ...] = (Shape(4, 128, ragged=True),)
    if not setting.quick:
        shapes = (Shape(1, 16), Shape(8, 128), Shape(32, 128, ragged=True))
    dtypes = ("float32", "bfloat16") + (("int8",) if setting.device.type == "cpu" else ())
    return [
        model_case(setting, "model", shape, "inference", dtype)
        for dtype in (dtypes if not setting.quick else [d for d in dtypes if d != "bfloat16"])
        for shape in shapes
    ]
