"""What pretraining minimizes: transformers' losses, as sums, and the counts beside them."""

import numpy as np
import pytest
import torch
import transformers

from albert_fast import AlbertConfig, AlbertForMaskedLM
from albert_fast.pretraining.examples import Batch, Examples
from albert_fast.pretraining.initialization import build_model
from albert_fast.pretraining.objective import MaskedLMObjective, Means, unigram_losses
from albert_fast.pretraining.plan import ExampleOptions
from albert_fast.pretraining.store import TokenStore

from .test_examples import MASK, SIZE, VOCABULARY, random_store

SMALL = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "embedding_size": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def make_batch(rng, rows: int = 12, **options) -> tuple[TokenStore, Batch]:
    store = random_store(rng)
    options = ExampleOptions(length=64, short_probability=0.5, **options)
    return store, Examples(store, VOCABULARY, options).batch(0, range(rows))


def test_the_losses_are_those_of_transformers(rng):
    store, batch = make_batch(rng)
    model = build_model(AlbertConfig.base(**SMALL), second_task=True, seed=1).double()
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "dtype")}
    theirs = transformers.AlbertForPreTraining(transformers.AlbertConfig(**values)).double().eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    sums = MaskedLMObjective(model, unigram_losses(store), MASK).train()(batch)
    expected = theirs(**batch.padded())
    labels, rows = sums.counts[:2]
    assert rows == batch.rows == 12
    total = sums.losses[0] / labels + sums.losses[1] / rows
    torch.testing.assert_close(total, expected.loss.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        sums.losses[1] / rows,
        torch.nn.functional.cross_entropy(expected.sop_logits, batch.sentence_order_label),
        rtol=1e-6,
        atol=0,
        check_dtype=False,
    )
    total.backward()
    expected.loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        scale = max(float(other.grad.norm()), 1e-3)
        assert float((parameter.grad - other.grad).norm()) < 1e-5 * scale, name


def test_the_counts(rng):
    """By their definitions, from logits."""
    store, batch = make_batch(rng)
    model = build_model(AlbertConfig.base(**SMALL), second_task=True, seed=int(rng.integers(99))).eval()
    unigram = unigram_losses(store)
    objective = MaskedLMObjective(model, unigram, MASK).eval()
    with torch.no_grad():
        losses, counts = objective(batch)
        outputs = model(batch.packed())
    means = Means.of(losses, counts)
    labelled = batch.labels != -100
    logits, labels = outputs.prediction_logits[labelled], batch.labels[labelled]
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    shown = batch.input_ids[labelled] == MASK
    assert means.labels == len(labels)
    assert means.tokens == batch.tokens
    assert means.masked_lm_loss == pytest.approx(each.mean().item(), rel=1e-5)
    assert means.masked_accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert means.unigram_loss == pytest.approx(unigram[labels].mean().item(), rel=1e-5)
    assert means.loss_at_masks == pytest.approx(each[shown].mean().item(), rel=1e-5)
    assert means.unigram_loss_at_masks == pytest.approx(unigram[labels[shown]].mean().item(), rel=1e-5)
    told = (outputs.sop_logits.argmax(1) == batch.sentence_order_label).float().mean().item()
    assert means.sentence_order_accuracy == pytest.approx(told)
    assert means.loss == pytest.approx(means.masked_lm_loss + means.sentence_order_loss)


def test_sums_add_up(rng):
    """Of two halves of a batch: the whole's."""
    store, _ = make_batch(rng)
    examples = Examples(store, VOCABULARY, ExampleOptions(length=64, short_probability=0.5))
    model = build_model(AlbertConfig.base(**SMALL), second_task=True, seed=1)
    objective = MaskedLMObjective(model, unigram_losses(store), MASK)
    whole, first, second = (objective(examples.batch(0, rows)) for rows in (range(12), range(5), range(5, 12)))
    torch.testing.assert_close(first.losses + second.losses, whole.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.counts + second.counts, whole.counts, rtol=1e-5, atol=1e-3)


def test_smoothing_is_for_training_alone(rng):
    store, batch = make_batch(rng, sentence_order="none")
    model = build_model(AlbertConfig.base(**SMALL), second_task=False, seed=1)
    assert isinstance(model, AlbertForMaskedLM)
    plain = MaskedLMObjective(model, unigram_losses(store), MASK)
    other = MaskedLMObjective(model, unigram_losses(store), MASK, label_smoothing=0.2, z_loss=0.1)
    assert other.train()(batch).losses[0] > plain(batch).losses[0] * 1.001
    torch.testing.assert_close(other.eval()(batch).losses, plain.eval()(batch).losses)
    assert plain(batch).counts.shape == (9,)


def test_a_batch_without_labels(rng):
    means = Means.of(torch.zeros(2), torch.zeros(9))
    assert means.loss == means.unigram_loss == means.masked_accuracy == 0


def test_the_unigram_model(rng):
    """Its mean loss on the text that it counts is that text's entropy, but for the one that each count has more."""
    store = random_store(rng, documents=400)
    losses = unigram_losses(store)
    assert torch.exp(-losses.double()).sum().item() == pytest.approx(1, abs=1e-5)
    counts = np.bincount(np.asarray(store.tokens), minlength=SIZE)
    expected = -np.log((counts + 1) / (counts + 1).sum())
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
