"""AlbertForSeq2SeqLM against plain PyTorch, and its generation against its own forward."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import AlbertConfig
from albert_fast.beam_search import beam_search
from albert_fast.packing import PackedBatch
from albert_fast.seq2seq import AlbertForSeq2SeqLM

SHAPE = {
    "vocab_size": 60,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make_model(seed: int, **changes: object) -> AlbertForSeq2SeqLM:
    torch.manual_seed(seed)
    config = AlbertConfig.from_dict({**AlbertConfig(**SHAPE).to_dict(), "num_decoder_layers": 3, **changes})
    return AlbertForSeq2SeqLM(config).eval()


def rows(rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [[2, *rng.integers(5, 60, length - 2).tolist(), 3] for length in lengths]


def plain(model: AlbertForSeq2SeqLM, source: list[int], target: list[int]) -> Tensor:
    """Logits [target, vocab] of one pair, spelled out."""
    encoded = model.albert(torch.tensor([source]), return_dict=True).last_hidden_state[0]
    tables, decoder = model.albert.embeddings, model.decoder
    ids = torch.tensor(target)
    x = (
        tables.word_embeddings(ids)
        + tables.position_embeddings.weight[: len(ids)]
        + tables.token_type_embeddings.weight[0]
    )
    x = decoder.embedding_hidden_mapping_in(tables.LayerNorm(x))
    layer, heads = decoder.layer, model.config.num_attention_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (each.unflatten(1, (heads, -1)).transpose(0, 1) for each in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for _ in range(decoder.passes):
        own, cross = layer.attention, layer.cross_attention
        x = own.LayerNorm(x + own.dense(attend(own.query(x), own.key(x), own.value(x), later)))
        x = cross.LayerNorm(x + cross.dense(attend(cross.query(x), cross.key(encoded), cross.value(encoded), None)))
        x = layer.full_layer_layer_norm(x + layer.ffn_output(F.gelu(layer.ffn(x), approximate="tanh")))
    return model.predictions(x)


def test_logits_and_gradients(rng, seed):
    model = make_model(seed % 1000).double()
    sources, targets = rows(rng, [7, 3, 12]), rows(rng, [5, 9, 2])
    decoder = PackedBatch.from_sequences([target[:-1] for target in targets])
    labels = torch.tensor([token for target in targets for token in target[1:]])
    output = model(PackedBatch.from_sequences(sources), None, decoder, labels, return_logits=True)
    expected = torch.cat([plain(model, s, t[:-1]) for s, t in zip(sources, targets, strict=True)])
    torch.testing.assert_close(output.logits, expected, rtol=1e-9, atol=1e-9)
    loss = F.cross_entropy(expected, labels)
    torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=1e-9)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad(output.loss, parameters)
    theirs = torch.autograd.grad(loss, parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_padded_is_packed(rng, seed):
    model = make_model(seed % 1000)
    sources, targets = rows(rng, [7, 3, 12]), rows(rng, [5, 9, 2])
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    labels = torch.full((3, 8), -100)
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        ids[i, : len(source)], mask[i, : len(source)] = torch.tensor(source), 1
        labels[i, : len(target) - 1] = torch.tensor(target[1:])
    output = model(ids, mask, labels=labels, return_logits=True)
    decoder = PackedBatch.from_sequences([target[:-1] for target in targets])
    flat = torch.tensor([token for target in targets for token in target[1:]])
    packed = model(PackedBatch.from_sequences(sources), None, decoder, flat, return_logits=True)
    torch.testing.assert_close(output.loss, packed.loss)
    torch.testing.assert_close(output.logits[labels != -100], packed.logits)


def test_smoothing_is_pytorchs(rng, seed):
    model = make_model(seed % 1000)
    sources, targets = rows(rng, [6, 4]), rows(rng, [5, 3])
    decoder = PackedBatch.from_sequences([target[:-1] for target in targets])
    labels = torch.tensor([token for target in targets for token in target[1:]])
    arguments = (PackedBatch.from_sequences(sources), None, decoder, labels)
    logits = model(*arguments, return_logits=True).logits
    smoothed = model.train()(*arguments, label_smoothing=0.1, reduction="sum").loss
    torch.testing.assert_close(smoothed, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum"))


@pytest.mark.parametrize("beams", [1, 4])
def test_generation_says_what_forward_says(beams, rng, seed):
    """Step by step with the cache, each token's score is what the whole target gives."""
    model = make_model(seed % 1000)
    sources = rows(rng, [7, 3, 12, 5])
    found = model.generate(PackedBatch.from_sequences(sources), num_beams=beams, max_length=9, length_penalty=0.0)
    assert len(found) == 4
    for source, tokens in zip(sources, found, strict=True):
        assert len(tokens) <= 9
        assert 3 not in tokens
        with torch.no_grad():
            scores = plain(model, source, [2, *tokens]).log_softmax(-1)
        if beams == 1:
            assert scores[: len(tokens)].argmax(-1).tolist() == tokens
            assert len(tokens) == 9 or int(scores[-1].argmax()) == 3
        alone = model.generate(torch.tensor([source]), num_beams=beams, max_length=9, length_penalty=0.0)
        assert alone == [tokens]


@pytest.mark.parametrize("number", range(8))  # a cache that stays behind shows in every other model
def test_beams_without_a_cache_find_the_same(number, rng, seed):
    """The cache follows its beams when they change places."""
    model, beams = make_model(seed % 1000 + number), 4
    sources = rows(rng, [7, 3, 12, 5])
    prefixes: list[list[int]] = [[] for _ in range(len(sources) * beams)]

    @torch.no_grad()
    def scores(ids: Tensor, place: int) -> Tensor:
        prefixes[:] = [[*prefix, token] for prefix, token in zip(prefixes, ids.tolist(), strict=True)]
        found = [plain(model, sources[row // beams], prefix)[-1] for row, prefix in enumerate(prefixes)]
        return torch.stack(found).log_softmax(-1)

    def reorder(moved: Tensor) -> None:
        prefixes[:] = [prefixes[row] for row in moved.tolist()]

    expected = beam_search(
        scores,
        reorder,
        batch_size=len(sources),
        num_beams=beams,
        begin=2,
        end=3,
        length_penalty=1.0,
        max_lengths=[9] * len(sources),
        device=torch.device("cpu"),
    )
    found = model.generate(PackedBatch.from_sequences(sources), num_beams=beams, max_length=9, length_penalty=1.0)
    assert found == expected


def test_a_decoder_that_begins_as_the_encoder(seed):
    model = make_model(seed % 1000)
    model.begin_from_encoder()
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    assert torch.equal(model.decoder.layer.attention.query.weight, layer.attention.query.weight)
    assert torch.equal(model.decoder.layer.ffn.bias, layer.ffn.bias)
    assert not torch.equal(model.decoder.layer.cross_attention.query.weight, layer.attention.query.weight)
    assert model.decoder.layer.ffn.weight is not layer.ffn.weight


def test_saved_and_loaded(tmp_path, rng, seed):
    model = make_model(seed % 1000)
    model.save_pretrained(tmp_path)
    again = AlbertForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.decoder.passes == 3
    source = PackedBatch.from_sequences(rows(rng, [7, 4]))
    assert again.generate(source) == model.generate(source)


def test_bad_arguments(seed, rng):
    model = make_model(seed % 1000)
    with pytest.raises(ValueError, match="decoder_input_ids and labels are both None"):
        model(torch.tensor(rows(rng, [5])))
    with pytest.raises(ValueError, match="num_beams is 0"):
        model.generate(torch.tensor(rows(rng, [5])), num_beams=0)
    with pytest.raises(ValueError, match="num_decoder_layers is 0"):
        make_model(1, num_decoder_layers=0)
