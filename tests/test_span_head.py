"""The original's head for SQuAD v2, spelled out row by row."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from albert_fast import AlbertConfig
from albert_fast.packing import PackedBatch
from albert_fast.span_head import BEAMS, AlbertForSpanQuestionAnswering

SHAPE = {
    "vocab_size": 60,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.25,
}


@pytest.fixture
def model(seed) -> AlbertForSpanQuestionAnswering:
    torch.manual_seed(seed)
    return AlbertForSpanQuestionAnswering(AlbertConfig(**SHAPE)).eval()


def batch_of(rng: np.random.Generator, lengths: list[int]) -> PackedBatch:
    """Rows of [CLS], a question token, [SEP], a paragraph and [SEP]."""
    return PackedBatch.from_sequences(
        [[2, 5, 3, *rng.integers(5, 60, length - 4).tolist(), 3] for length in lengths],
        [[0, 0, 0, *[1] * (length - 3)] for length in lengths],
    )


def parts(model, batch: PackedBatch, row: int):
    """States, start logits, and a function of a start that gives the end logits; the logit of no answer. Question and
    [SEP] have logits of -inf."""
    ids, types = batch.rows(batch.input_ids)[row], batch.rows(batch.token_type_ids)[row]
    states = model.albert(ids[None], token_type_ids=types[None], return_dict=True).last_hidden_state[0]
    outside = torch.zeros(len(ids))
    outside[[1, 2, len(ids) - 1]] = -torch.inf
    starts = model.start(states)[:, 0] + outside

    def ends(start: int) -> torch.Tensor:
        both = torch.cat([states, states[start].expand_as(states)], dim=1)
        return model.end_score(model.end_norm(torch.tanh(model.end_dense(both))))[:, 0] + outside

    expected = starts.softmax(0) @ states
    none = model.answerable_score(torch.tanh(model.answerable_dense(torch.cat([expected, states[0]]))))[0]
    return starts, ends, none


def test_losses(model, rng):
    batch = batch_of(rng, [9, 5, 17])
    starts, ends = torch.tensor([3, 0, 10]), torch.tensor([5, 0, 10])  # the second has no answer
    absent = starts == 0
    loss, right = model.losses(batch, starts, ends, absent)
    expected, hits = 0.0, 0
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        first, last_of, none = parts(model, batch, row)
        last = last_of(start)
        expected += (F.cross_entropy(first, starts[row]) + F.cross_entropy(last, ends[row])) / 2
        expected += F.binary_cross_entropy_with_logits(none, absent[row].float()) / 2
        hits += int(first.argmax() == start and last.argmax() == end)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert int(right) == hits


def test_spans(model, rng):
    """The best span of the five likeliest starts, among the allowed columns."""
    batch = batch_of(rng, [12, 7, 20])
    allowed = torch.zeros(3, batch.seq_length, dtype=torch.bool)
    for row, length in enumerate([12, 7, 20]):
        allowed[row, 3 : length - 1] = True
    found = model.spans(batch, allowed)
    for row, length in enumerate([12, 7, 20]):
        first, last_of, none = parts(model, batch, row)
        columns = range(3, length - 1)
        firsts = sorted(columns, key=lambda i: float(first[i]), reverse=True)[:BEAMS]
        scores = {
            (start, end): float(first.log_softmax(0)[start] + last_of(start).log_softmax(0)[end])
            for start in firsts
            for end in columns
            if end >= start
        }
        best = int(found.scores[row].flatten().argmax())
        place = (int(found.starts[row].flatten()[best]), int(found.ends[row].flatten()[best]))
        assert scores[place] == pytest.approx(max(scores.values()), abs=1e-4)
        assert float(found.scores[row].max()) == pytest.approx(max(scores.values()), abs=1e-4)
        torch.testing.assert_close(found.absent[row], none, rtol=1e-4, atol=1e-5)
