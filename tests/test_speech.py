"""AlbertForCTC: padding does not matter, the loss is PyTorch's, and decoding against a search through everything."""

import itertools
import math

import numpy as np
import pytest
import torch

from albert_fast import AlbertConfig, AlbertForCTC
from albert_fast.speech import BLANK, SpeechBatch, encoded_length, greedy, needed_length, prefix_beam

SHAPE = {
    "vocab_size": 5,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_labels": 6,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
}


def make_model(seed: int) -> AlbertForCTC:
    torch.manual_seed(seed)
    config = AlbertConfig.from_dict({**AlbertConfig(**SHAPE).to_dict(), "num_mel_bins": 10})
    model = AlbertForCTC(config).eval()
    with torch.no_grad():
        model.pass_weights.copy_(torch.randn(4))
    return model


def features(rng: np.random.Generator, lengths: list[int]) -> list[torch.Tensor]:
    return [torch.from_numpy(rng.normal(size=[length, 10])).float() for length in lengths]


def test_padding_does_not_matter(rng, seed):
    model, utterances = make_model(seed % 1000), features(rng, [40, 7, 25, 1])
    together = model(SpeechBatch.of(utterances))
    assert together.lengths == tuple(encoded_length(len(each)) for each in utterances)
    for row, (utterance, length) in enumerate(zip(utterances, together.lengths, strict=True)):
        alone = model(SpeechBatch.of([utterance])).log_probs
        assert alone.shape[1] == length
        torch.testing.assert_close(together.log_probs[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_the_loss(rng, seed):
    model, utterances = make_model(seed % 1000), features(rng, [40, 17, 25])
    labels = [[1, 2, 2, 5], [3], []]
    output = model(SpeechBatch.of(utterances), labels)
    expected = sum(
        torch.nn.functional.ctc_loss(
            output.log_probs[i, :length][:, None],
            torch.tensor([each]),
            torch.tensor([length]),
            torch.tensor([len(each)]),
            reduction="sum",
        )
        for i, (length, each) in enumerate(zip(output.lengths, labels, strict=True))
    )
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert float(model.pass_weights.grad.abs().sum()) > 0


def test_labels_that_do_not_fit(rng, seed):
    assert needed_length([1, 1, 2, 2, 2]) == 8
    model = make_model(seed % 1000)
    batch = SpeechBatch.of(features(rng, [40, 16]))
    model(batch, [[1], [1, 2, 3, 4]])
    with pytest.raises(ValueError, match="utterance 1 has 4 encoded frames and its 3 labels need 5"):
        model(batch, [[1], [1, 1, 1]])
    with pytest.raises(ValueError, match="the features have 4 bins; 10 were expected"):
        model(SpeechBatch.of([torch.zeros(20, 4)]))


def test_stripes_in_training_alone(rng, seed):
    model, batch = make_model(seed % 1000), SpeechBatch.of(features(rng, [60]))
    assert torch.equal(model(batch).log_probs, model(batch).log_probs)
    model.train()
    torch.manual_seed(1)
    first = model(batch).log_probs
    assert not torch.equal(first, model(batch).log_probs)
    torch.manual_seed(1)
    assert torch.equal(first, model(batch).log_probs)


def test_saved_and_loaded(tmp_path, rng, seed):
    model, batch = make_model(seed % 1000), SpeechBatch.of(features(rng, [30, 12]))
    model.save_pretrained(tmp_path)
    assert torch.equal(AlbertForCTC.from_pretrained(tmp_path)(batch).log_probs, model(batch).log_probs)


def collapsed(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, before in zip(path, (BLANK, *path), strict=False) if label not in (BLANK, before))


def test_greedy(rng):
    for _ in range(50):
        scores = torch.from_numpy(rng.normal(size=[12, 4])).log_softmax(-1)
        assert tuple(greedy(scores)) == collapsed(tuple(scores.argmax(-1).tolist()))


def test_the_likeliest_labels(rng):
    """Summed over all alignments of 6 frames of 3 labels."""
    for _ in range(20):
        scores = torch.from_numpy(2 * rng.normal(size=[6, 3])).log_softmax(-1)
        sums: dict[tuple[int, ...], float] = {}
        for path in itertools.product(range(3), repeat=6):
            total = math.exp(sum(float(scores[i, label]) for i, label in enumerate(path)))
            sums[collapsed(path)] = sums.get(collapsed(path), 0.0) + total
        found = tuple(prefix_beam(scores, 1000, least=-1e9))
        assert sums[found] == pytest.approx(max(sums.values()), rel=1e-9)
