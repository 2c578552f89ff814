"""Time and memory against one thing at a time, the rest as it was: `varied` says which.

Models of few passes, random tokens, all peers in this process: memory is what building a peer and its first call took.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from albert_fast.bench.arguments import Shape
from albert_fast.bench.case import Case
from albert_fast.bench.suites.model import ModelCase, Subject
from albert_fast.bench.suites.ops import operation_case
from albert_fast.bench.suites.setting import Setting, lengths_of, random_batch

PEERS = ("albert_fast", "reference", "transformers-sdpa")
LOSS_PEERS = ("albert_fast", "reference", "pytorch", "liger", "cut-cross-entropy")
PASSES = 2

_FULL: dict[str, Sequence[float]] = {
    "length": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "rows": (1, 2, 4, 8, 16, 32, 64),
    "fill": (0.1, 0.25, 0.5, 0.75, 1.0),
    "passes": (1, 2, 4, 8, 12, 24),
    "vocabulary": (2000, 8000, 30000, 120000),
    "labelled": (0.05, 0.15, 0.3, 0.6, 1.0),
}
_QUICK: dict[str, Sequence[float]] = {
    "length": (64, 512),
    "rows": (1, 8),
    "fill": (0.25, 1.0),
    "passes": (1, 4),
    "vocabulary": (2000, 30000),
    "labelled": (0.05, 0.6),
}


def cases(setting: Setting) -> list[Case]:
    points = _QUICK if setting.quick else _FULL
    return [*_of_models(setting, points), *_of_the_loss(setting, points)]


def _of_models(setting: Setting, points: dict[str, Sequence[float]]) -> Iterator[Case]:
    rows, length = (4, 128) if setting.quick else (16, 128)
    for mode in ("inference", "training"):
        for value in points["length"]:
            yield _model(setting, mode, Shape(1, int(value)), {"length": int(value)})
    for value in points["rows"]:
        yield _model(setting, "inference", Shape(int(value), length), {"rows": int(value)})
    for value in points["fill"]:
        shape = Shape(rows, length, ragged=value < 1.0)
        yield _model(setting, "inference", shape, {"fill": float(value)}, fill=value)
    for value in points["passes"]:
        yield _model(setting, "inference", Shape(rows, length), {"passes": int(value)}, passes=int(value))
    if setting.device.type == "cpu":
        for threads in _threads():
            yield _model(setting, "inference", Shape(rows, length), {"threads": threads}, threads=threads)


def _of_the_loss(setting: Setting, points: dict[str, Sequence[float]]) -> Iterator[Case]:
    shape = Shape(4 if setting.quick else 16, 128)
    common: dict[str, Any] = {
        "suite": "scaling",
        "peers": LOSS_PEERS,
        "device": setting.device,
        "turn": setting.turn,
    }
    for value in points["vocabulary"]:
        config = replace(setting.config, vocab_size=int(value))
        size = {"vocabulary": int(value)}
        yield operation_case("masked_lm_loss", config, shape, "training", varied=size, **common)
    for value in points["labelled"]:
        share = {"labelled": float(value)}
        yield operation_case(
            "masked_lm_loss", setting.config, shape, "training", varied=share, labelled=value, **common
        )


def _model(
    setting: Setting,
    mode: str,
    shape: Shape,
    varied: dict[str, Any],
    *,
    fill: float = 1.0,
    passes: int = PASSES,
    threads: int | None = None,
) -> ModelCase:
    def make() -> Subject:
        longest = max(setting.config.max_position_embeddings, shape.length)
        config = replace(setting.config, num_hidden_layers=passes, max_position_embeddings=longest)
        batch = random_batch(config, shape, lengths_of(shape, fill)).to(setting.device)
        return Subject(config, setting.weights(config), batch)

    return ModelCase(
        suite="scaling",
        group="model",
        mode=mode,
        dtype="float32",
        shape=str(shape),
        peers=PEERS,
        device=setting.device,
        varied=varied,
        threads=threads,
        here=True,
        turn=setting.turn,
        make=make,
    )


def _threads() -> list[int]:
    """1, 2, 4 … and as many as there are cores."""
    cores = os.cpu_count() or 1
    return sorted({*(1 << i for i in range(cores.bit_length()) if 1 << i <= cores), cores})
