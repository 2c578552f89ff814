"""Early exit: each row's logits are those of the pass after which it left, in any company."""

import numpy as np
import pytest
import torch

from albert_fast import AlbertConfig
from albert_fast.early_exit import AlbertForEarlyExit
from albert_fast.packing import PackedBatch

SHAPE = {
    "vocab_size": 60,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "max_position_embeddings": 48,
    "initializer_range": 0.25,
    "num_labels": 3,
}


@pytest.fixture
def model(seed) -> AlbertForEarlyExit:
    torch.manual_seed(seed)
    return AlbertForEarlyExit(AlbertConfig(**SHAPE)).eval()


def batch_of(rng: np.random.Generator, lengths: list[int]) -> PackedBatch:
    return PackedBatch.from_sequences([[2, *rng.integers(5, 60, length - 2).tolist(), 3] for length in lengths])


def test_without_a_rule_it_is_the_classifier(model, rng):
    batch = batch_of(rng, [9, 3, 20])
    found = model.exit_early(batch)
    assert found.passes.tolist() == [6, 6, 6]
    torch.testing.assert_close(found.logits, model(batch).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.all_logits(batch)[-1], found.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [{"patience": 2}, {"patience": 1}, {"confidence": 0.6}], ids=["two", "one", "sure"])
def test_rules(rule, model, rng):
    """By their definitions, on the logits of every pass."""
    batch = batch_of(rng, rng.integers(3, 30, 16).tolist())
    everything = model.all_logits(batch).detach()
    found = model.exit_early(batch, **rule)
    for row in range(16):
        labels = everything[:, row].argmax(-1).tolist()
        leaves = 6
        for number in range(5):
            if "patience" in rule:
                last = labels[max(0, number + 1 - rule["patience"]) : number + 1]
                done = len(last) == rule["patience"] and len(set(last)) == 1
            else:
                done = float(everything[number, row].softmax(-1).max()) >= rule["confidence"]
            if done:
                leaves = number + 1
                break
        assert int(found.passes[row]) == leaves
        torch.testing.assert_close(found.logits[row], everything[leaves - 1, row], rtol=1e-4, atol=1e-5)


def test_company_does_not_matter(model, rng):
    lengths = [9, 3, 20, 7]
    batch = batch_of(rng, lengths)
    together = model.exit_early(batch, confidence=0.5)
    for row, ids in enumerate(batch.rows(batch.input_ids)):
        alone = model.exit_early(PackedBatch.from_sequences([ids]), confidence=0.5)
        assert alone.passes.tolist() == [int(together.passes[row])]
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-4, atol=1e-5)


def test_bad_arguments(model, rng):
    batch = batch_of(rng, [5])
    with pytest.raises(ValueError, match="patience and confidence are both given"):
        model.exit_early(batch, patience=1, confidence=0.5)
    with pytest.raises(ValueError, match="patience is 0"):
        model.exit_early(batch, patience=0)
    with pytest.raises(ValueError, match=r"confidence is 1\.5"):
        model.exit_early(batch, confidence=1.5)
    with pytest.raises(ValueError, match="the model is in training"):
        model.train().exit_early(batch, patience=1)
    with pytest.raises(ValueError, match="num_hidden_groups is 2"):
        AlbertForEarlyExit(AlbertConfig(**{**SHAPE, "num_hidden_groups": 2}))


def test_in_int8(model, rng):
    """Each pass is the quantized model's own, with the biases that were found for it."""
    batch = batch_of(rng, [9, 3, 20])
    exact = model.exit_early(batch).logits
    model.quantize(calibration=batch)
    found = model.exit_early(batch).logits
    torch.testing.assert_close(found, model(batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, exact)


def test_one_score_has_no_label():
    model = AlbertForEarlyExit(AlbertConfig(**{**SHAPE, "num_labels": 1})).eval()
    with pytest.raises(ValueError, match="the model has one score"):
        model.exit_early(PackedBatch.from_sequences([[2, 5, 3]]))
