"""Beam search against a search through everything, where there is little of it."""

import itertools
import math

import numpy as np
import pytest
import torch

from albert_fast.beam_search import beam_search

BEGIN, END = 0, 1


class Table:
    """Log-probabilities of what follows a prefix, drawn anew for each; rows follow `reorder`."""

    def __init__(self, rng: np.random.Generator, batch_size: int, beams: int, vocab: int, spread: float = 2.0) -> None:
        self.rng, self.vocab, self.spread = rng, vocab, spread
        self.beams = beams
        self.known: dict[tuple[int, ...], torch.Tensor] = {}
        self.prefixes: list[tuple[int, ...]] = [() for _ in range(batch_size * beams)]
        self.calls = 0

    def of(self, batch: int, prefix: tuple[int, ...]) -> torch.Tensor:
        key = (batch, *prefix)
        if key not in self.known:
            drawn = torch.from_numpy(self.rng.normal(scale=self.spread, size=self.vocab))
            drawn[BEGIN] = -torch.inf
            self.known[key] = torch.log_softmax(drawn, dim=0)
        return self.known[key]

    def scores(self, ids: torch.Tensor, place: int) -> torch.Tensor:
        assert place == self.calls
        self.calls += 1
        self.prefixes = [(*prefix, int(i)) for prefix, i in zip(self.prefixes, ids, strict=True)]
        return torch.stack([self.of(row // self.beams, prefix) for row, prefix in enumerate(self.prefixes)])

    def reorder(self, rows: torch.Tensor) -> None:
        self.prefixes = [self.prefixes[int(row)] for row in rows]

    def total(self, batch: int, tokens: list[int]) -> float:
        """Of a sequence with END behind it."""
        prefix, total = (BEGIN,), 0.0
        for token in [*tokens, END]:
            total += float(self.of(batch, prefix)[token])
            prefix = (*prefix, token)
        return total


def search(table: Table, batch_size: int, limits: list[int], penalty: float = 0.0) -> list[list[int]]:
    return beam_search(
        table.scores,
        table.reorder,
        batch_size=batch_size,
        num_beams=table.beams,
        begin=BEGIN,
        end=END,
        length_penalty=penalty,
        max_lengths=limits,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_the_best_of_all(penalty, rng):
    """With as many beams as there are prefixes, nothing is lost. Sequences of at most 3 tokens end within 4."""
    table = Table(rng, 2, 27, 5)
    found = search(table, 2, [4, 4], penalty)
    for batch, tokens in enumerate(found):
        ended = [
            (table.total(batch, list(words)) / ((5 + len(words) + 1) / 6) ** penalty, list(words))
            for length in range(4)
            for words in itertools.product(range(2, 5), repeat=length)
        ]
        assert len(tokens) > 3 or tokens == max(ended)[1]  # an open one of 4 tokens may score higher


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, []), (1.0, []), (2.0, [2])])
def test_the_penalty_of_length(penalty, expected, rng):
    """log 0.4 after one token, log 0.33 after two: the longer one wins where it is divided by (7 / 6) ** 2."""
    table = Table(rng, 1, 2, 3)
    table.known = {
        (0, BEGIN): torch.tensor([-torch.inf, math.log(0.4), math.log(0.6)]),
        (0, BEGIN, 2): torch.tensor([-torch.inf, math.log(0.55), math.log(0.45)]),
        (0, BEGIN, 2, 2): torch.tensor([-torch.inf, math.log(0.01), math.log(0.99)]),
    }
    assert search(table, 1, [3], penalty) == [expected]


def test_greedy(rng):
    table = Table(rng, 3, 1, 9)
    found = search(table, 3, [6, 2, 1])
    for batch, (tokens, limit) in enumerate(zip(found, [6, 2, 1], strict=True)):
        prefix, expected = (BEGIN,), []
        while len(expected) < limit:
            best = int(table.of(batch, prefix).argmax())
            if best == END:
                break
            expected.append(best)
            prefix = (*prefix, best)
        assert tokens == expected


def test_a_row_does_not_see_the_others(rng):
    """Found together or alone: the same."""
    table = Table(rng, 4, 3, 8)
    together = search(table, 4, [7] * 4, 0.6)
    for batch in range(4):
        alone = Table(rng, 1, 3, 8)
        alone.of = lambda _, prefix, batch=batch: table.of(batch, prefix)  # type: ignore[method-assign]
        assert search(alone, 1, [7], 0.6) == [together[batch]]


def test_more_beams_are_not_worse_than_greedy_in_the_mean(rng):
    gains = []
    for _ in range(30):
        table = Table(rng, 1, 1, 12)
        (greedy,) = search(table, 1, [8])
        wide = Table(rng, 1, 6, 12)
        wide.known = table.known
        (better,) = search(wide, 1, [8])
        if len(greedy) < 8 and len(better) < 8:
            gains.append(wide.total(0, better) - wide.total(0, greedy))
    assert not gains or math.fsum(gains) >= -1e-9
