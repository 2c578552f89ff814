"""What the suites have in common: how thorough they are, the text, its vocabulary, and models of random weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from albert_fast import AlbertConfig, AlbertForMaskedLM
from albert_fast.bench.arguments import Shape
from albert_fast.bench.data import LABELLED_SHARE, Batch, Text, load_tokenizer, make_batch, read_text
from albert_fast.bench.worker import CPU
from albert_fast.tokenizer import AlbertTokenizer


@dataclass(frozen=True)
class Setting:
    """Attributes:
    quick: fewer and smaller cases, shorter turns.
    device: where the work is done.
    text, vocab: as `albert-fast bench` takes them.
    changes: fields of ALBERT-base's config in place of its own; the tests' models are tiny.
    """

    quick: bool = False
    device: torch.device = CPU
    text: tuple[str, ...] = ()
    vocab: str | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def turn(self) -> float:
        """Seconds that a turn of an operation repeats it for."""
        return 0.05 if self.quick else 0.2

    @functools.cached_property
    def read(self) -> Text:
        return read_text(self.text)

    @functools.cached_property
    def tokenizer(self) -> AlbertTokenizer:
        return load_tokenizer(self.vocab, self.read)

    @property
    def config(self) -> AlbertConfig:
        """ALBERT-base without dropout, for masks that are drawn differently have no parity."""
        config = AlbertConfig.base(
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0
        )
        return replace(config, **{"num_hidden_layers": 2 if self.quick else 12, **dict(self.changes)})

    def batch(self, shape: Shape) -> Batch:
        """Real text."""
        return make_batch(self.tokenizer, self.read, shape).to(self.device)

    def weights(self, config: AlbertConfig, kind: Any = AlbertForMaskedLM) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return kind(config).state_dict()


def lengths_of(shape: Shape, fill: float = 0.4) -> list[int]:
    """Of the rows: all the same, or, where the shape is ragged, drawn with that mean fill; the same ones each time."""
    if not shape.ragged:
        return [shape.length] * shape.rows
    draw = torch.rand(shape.rows, generator=torch.Generator().manual_seed(0))
    # As far on either side of the mean as there is room.
    spread = min(fill, 1.0 - fill)
    shares = fill + spread * (2.0 * draw - 1.0)
    return [max(3, min(shape.length, round(float(share) * shape.length))) for share in shares]


def random_batch(config: AlbertConfig, shape: Shape, lengths: list[int], labelled: float = LABELLED_SHARE) -> Batch:
    """Tokens that mean nothing: for lengths that no text has."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (shape.rows, shape.length), generator=draw)
    mask = torch.arange(shape.length) < torch.tensor(lengths)[:, None]
    chosen = mask & (torch.rand(ids.shape, generator=draw) < labelled)
    chosen[0, 0] = True
    labels = torch.where(chosen, ids, -100)
    return Batch(ids.where(mask, torch.tensor(0)), mask.long(), torch.zeros_like(ids), labels, lengths)
