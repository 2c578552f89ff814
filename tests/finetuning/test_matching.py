"""Heads that look for their token in the other segment: where they look, and what they say of it."""

import math

import pytest
import torch
from torch import Tensor

from albert_fast import AlbertConfig
from albert_fast.finetuning.config import CONFIGURATION
from albert_fast.finetuning.matching import look_for_matches
from albert_fast.model import AlbertModel
from albert_fast.packing import PackedBatch

HIDDEN, HEADS = 128, 2


def model_of(**fields) -> AlbertModel:
    config = AlbertConfig.base(
        vocab_size=200,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        intermediate_size=64,
        num_hidden_layers=2,
        embedding_size=64,
        max_position_embeddings=48,
        initializer_range=0.08,
        **fields,
    )
    model = AlbertModel(config).eval()
    with torch.no_grad():  # as in a trained model, words differ more than places
        model.embeddings.word_embeddings.weight.mul_(3)
    return model


def look(model: AlbertModel, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of some words and a question: each token's weight on its like in the other segment, where there is one, and what
    is written for the question's tokens that have one, and for those that have none."""
    words = torch.randperm(195)[:24] + 5
    asked = torch.cat([words[torch.randperm(16)[:8]], torch.randperm(195)[:8] + 5])
    ids, types = torch.cat([words, asked]), torch.tensor([0] * 24 + [1] * 16)
    batch = PackedBatch.from_sequences([ids.tolist()], [types.tolist()])
    hidden = model.encoder.embedding_hidden_mapping_in(model.embeddings(batch, None))
    attention = model.encoder.albert_layer_groups[0].albert_layers[0].attention
    query, key, value = (linear(hidden)[:, rows] for linear in (attention.query, attention.key, attention.value))
    weights = torch.softmax(query @ key.T / math.sqrt(query.shape[1]), dim=1)
    like = (ids[:, None] == ids) & (types[:, None] != types)
    has, seen = like.any(1), (weights @ value)[24:, 0]
    return (weights * like).sum(1)[has], seen[has[24:]], seen[~has[24:]]


@torch.no_grad()
def test_where_it_looks(seed):
    """Over several models together, as eight words of one are few."""
    torch.manual_seed(seed)
    size = HIDDEN // HEADS
    other, rows = slice(0, size), slice(size, 2 * size)  # the head 0, and the head 1
    looks = []
    for _ in range(8):
        model = model_of()
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        look_for_matches(model, [1], range(5, 200), 48, 3)
        looks.append(look(model, rows))
    weights, found, missing = (torch.cat(each).mean() for each in zip(*looks, strict=True))
    assert weights > 0.7
    # What is written says whether there is one: of the segment that is asked, 1 of the other segment is -1.
    assert found < -0.4
    assert missing > found + 0.2
    # The other head is as it was.
    other = slice(0, size)
    for name in ("query", "key", "value"):
        path = f"encoder.albert_layer_groups.0.albert_layers.0.attention.{name}.weight"
        assert torch.equal(dict(model.named_parameters())[path][other], before[path][other])
        assert not torch.equal(dict(model.named_parameters())[path][rows], before[path][rows])


@pytest.mark.parametrize(
    ("heads", "fields", "message"),
    [([2], {}, r"matching_heads is \[2\]; numbers from 0 to 1"), ([0], {"type_vocab_size": 1}, "one token type")],
    ids=["number", "types"],
)
def test_mistakes(heads, fields, message):
    with pytest.raises(ValueError, match=message):
        look_for_matches(model_of(**fields), heads, range(5, 200), 48, 3)


def test_for_pairs_alone(tmp_path):
    given = ["task=tagging", "model=x", "data.train=[x]", f"output={tmp_path}", "matching_heads=[0]"]
    with pytest.raises(ValueError, match="matching_heads is for tasks of two segments"):
        CONFIGURATION.parse(None, given).check_complete()
