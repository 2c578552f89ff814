"""The first weights: the original's law, and heads that look at their neighbors."""

import math

import pytest
import torch
import torch.nn.functional as F

from albert_fast.config import AlbertConfig
from albert_fast.heads import AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.pretraining.initialization import OFFSETS, build_model, look_at_neighbors

SMALL = {
    "vocab_size": 800,
    "hidden_size": 96,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "embedding_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def neighborly(seed: int, **changes: object) -> AlbertForMaskedLM:
    config = AlbertConfig.base(**{**SMALL, **changes})
    model = build_model(config, second_task=False, seed=seed)
    look_at_neighbors(model, torch.full([config.vocab_size], math.log(config.vocab_size)), seed)
    assert isinstance(model, AlbertForMaskedLM)
    return model


def test_original_weights_are_cut_off_at_two_deviations():
    model = build_model(AlbertConfig.base(**SMALL), second_task=True, seed=4)
    assert isinstance(model, AlbertForPreTraining)
    table = model.albert.embeddings.word_embeddings.weight
    assert model.predictions.decoder.weight is table
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            assert module.weight.abs().max() <= 2 * 0.02
    # The standard deviation of a normal law cut off there is 0.88 of the whole one's.
    assert float(table.detach().std()) == pytest.approx(0.88 * 0.02, rel=0.02)
    again = build_model(AlbertConfig.base(**SMALL), second_task=True, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = build_model(AlbertConfig.base(**SMALL), second_task=True, seed=5)
    assert not torch.equal(table, other.albert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_size": 128, "num_attention_heads": 2},
        {"hidden_size": 384, "num_attention_heads": 4},  # a head larger than the embedding
        {"num_hidden_groups": 3},
    ],
    ids=["six_heads", "two_heads", "large_heads", "groups"],
)
def test_heads_look_at_their_neighbors(changes, rng):
    model = neighborly(int(rng.integers(99)), **changes).eval()
    ids = torch.from_numpy(rng.integers(5, 800, [2, 100]))
    with torch.no_grad():
        passes = model.albert(ids, output_attentions=True, return_dict=True).attentions
    heads = model.config.num_attention_heads
    for weights in passes[:2]:  # [2, heads, 100, 100]
        for head, offset in enumerate(OFFSETS[: max(1, heads // 2)]):
            there = weights[:, head].diagonal(offset, dim1=1, dim2=2)
            assert there.median() > 8 * weights[:, head].median()  # of 1 / 100 each, where a head is even
            largest = weights[:, head, 4:-4].argmax(dim=2) - torch.arange(4, 96)
            assert (largest == offset).double().mean() > 0.45  # of some models with groups no more than 0.58
    original = build_model(model.config, second_task=False, seed=1).eval()
    with torch.no_grad():
        passes = original.albert(ids, output_attentions=True, return_dict=True).attentions
    assert (passes[0][:, 0, 4:-4].argmax(dim=2) - torch.arange(4, 96) == OFFSETS[0]).double().mean() < 0.2


def test_two_heads_average_over_a_segment_each(rng):
    """And what [CLS] has of its row is no longer some hundredths."""
    model = neighborly(int(rng.integers(99))).eval()
    ids, types = torch.from_numpy(rng.integers(5, 800, [12, 60])), torch.zeros(12, 60, dtype=torch.long)
    types[:, 25:] = 1
    with torch.no_grad():
        output = model.albert(
            ids, token_type_ids=types, output_attentions=True, output_hidden_states=True, return_dict=True
        )
    first = output.attentions[0]  # [12, 6, 60, 60]: three heads look beside
    assert first[:, 3, :, :25].sum(-1).mean() > 0.9
    assert first[:, 4, :, 25:].sum(-1).mean() > 0.9
    assert 0.3 < first[:, 5, :, :25].sum(-1).mean() < 0.55  # 25 of 60
    ids[:, 0] = 2

    def of_its_row(model: torch.nn.Module) -> float:
        with torch.no_grad():
            states = model.albert(ids, token_type_ids=types, return_dict=True).last_hidden_state[:, 0]
        return float((states - states.mean(0)).norm(dim=1).mean() / states.norm(dim=1).mean())

    original = build_model(model.config, second_task=False, seed=1).eval()
    assert of_its_row(model) > 0.1
    assert of_its_row(original) < 0.05


def test_what_neighbors_leaves_as_it_was(rng):
    """The words, and most of the layer; what that adds is smaller by sqrt(2 L) but for the heads that read segments."""
    seed = int(rng.integers(99))
    model = neighborly(seed)
    before = dict(build_model(model.config, second_task=False, seed=seed).named_parameters())
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    parts = ("query.weight", "query.bias", "key.weight", "value.weight", "dense.weight")
    changed = {
        "albert.embeddings.position_embeddings.weight",
        "albert.embeddings.token_type_embeddings.weight",
        "albert.encoder.embedding_hidden_mapping_in.weight",
        "predictions.dense.weight",
        "predictions.bias",
        f"{layer}.ffn_output.weight",
    } | {f"{layer}.attention.{part}" for part in parts}
    for name, after in model.named_parameters():
        assert torch.equal(after, before[name]) == (name not in changed), name
    for name, columns in (("attention.dense", slice(0, 3 * 16)), ("ffn_output", slice(None))):
        key = f"{layer}.{name}.weight"
        torch.testing.assert_close(model.get_parameter(key)[:, columns] * math.sqrt(2 * 3), before[key][:, columns])
    for name, rows in (("query", slice(3 * 16, None)), ("key", slice(5 * 16, None)), ("value", slice(0, 3 * 16))):
        key = f"{layer}.attention.{name}.weight"
        assert torch.equal(model.get_parameter(key)[rows], before[key][rows]), name
    assert torch.allclose(model.predictions.bias, torch.tensor(-math.log(800)))


def test_a_hidden_state_too_small_for_the_positions():
    config = AlbertConfig.base(**{**SMALL, "hidden_size": 48})
    model = build_model(config, second_task=False, seed=1)
    with pytest.raises(ValueError, match="hidden_size is 48 and embedding_size 64"):
        look_at_neighbors(model, torch.zeros(800), 1)


def test_a_language_of_word_pairs_is_learned_sooner(rng):
    """Each word tells the next one. 100 steps: too few for the original's weights, enough for most neighbors'.

    One in fifty learns late: where that happens it is the mean of four.
    """
    size, mask = 25, 4
    follower = torch.from_numpy(rng.permutation(size - 5) + 5)

    def loss(model: AlbertForMaskedLM) -> torch.Tensor:
        ids = torch.empty(16, 32, dtype=torch.long)
        ids[:, 0] = torch.from_numpy(rng.integers(5, size, 16))
        for place in range(1, 32):
            stray = torch.from_numpy(rng.integers(5, size, 16))
            ids[:, place] = torch.where(torch.from_numpy(rng.random(16)) < 0.1, stray, follower[ids[:, place - 1] - 5])
        hidden = torch.from_numpy(rng.random([16, 32])) < 0.15
        logits = model(torch.where(hidden, mask, ids), return_dict=True).logits
        return F.cross_entropy(logits[hidden], ids[hidden])

    def end(neighbors: bool) -> float:
        changes = {"vocab_size": size, "num_hidden_layers": 2, "max_position_embeddings": 32}
        seed = int(rng.integers(99))
        model = build_model(AlbertConfig.base(**{**SMALL, **changes}), second_task=False, seed=seed)
        if neighbors:
            look_at_neighbors(model, torch.full([size], math.log(size)), seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=1.5e-3)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            losses.append(loss(model))
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses[-10:]).mean().item()

    gains = [end(False) - end(True)]
    if gains[0] <= 0.25:
        gains += [end(False) - end(True) for _ in range(3)]
    assert sum(gains) / len(gains) > 0.25, gains
