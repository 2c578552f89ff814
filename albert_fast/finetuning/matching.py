"""Heads that begin by looking for their token in the other segment.

In tasks of pairs, a question and a paragraph, most depends on which words of one stand in the other. A large model's
heads have learned to look in pretraining; a small one of little pretraining has none that does, and does not come upon
it in some thousand examples: its loss stays at chance. So `look_for_matches` sets a head's first weights so that

- query and key read what the embeddings say of the word, and neither of its place nor of its segment: a token's score
  is highest for itself, wherever it stands;
- the other segment has an advantage, so that a token looks at its like there, or where there is none at itself;
- the value is the token type that is seen, and written aloud: "there is one" or "there is none", for each token.

What is done with that is learned. Related: heads whose first weights imitate trained ones (Trockman & Kolter 2023,
"Mimetic initialization").
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from albert_fast.model import AlbertLayer, AlbertModel
from albert_fast.ops.checks import check

_PEAK = 14.0  # the score of the same word, in the first pass; other words have about 0
_SIDE = 3.0  # how much more the other segment has, and its own has less
_LOUD = 16.0  # how long what is written is; hidden states of 256 have a length of about 16
_WORDS = 3000  # that directions are found from, at most
_PLACES = 12


@torch.no_grad()
def look_for_matches(model: AlbertModel, heads: Sequence[int], words: Sequence[int], length: int, seed: int) -> None:
    """Changes some heads of each layer, see above.

    Args:
        heads: their numbers, from 0.
        words: ids that the task has; each once.
        length: of rows.

    Raises:
        ValueError: a head that the model does not have, or a model with one token type.
    """
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    check(
        all(0 <= head < config.num_attention_heads for head in heads),
        f"matching_heads is {list(heads)}; numbers from 0 to {config.num_attention_heads - 1} were expected",
    )
    check(config.type_vocab_size > 1, "matching_heads is given and the model has one token type: it tells no segments")
    generator = torch.Generator().manual_seed(seed)
    enough = torch.tensor(words)[torch.randperm(len(words), generator=generator)[:_WORDS]]
    states = _states(model, enough, length)
    word_of, type_of, middle = _readers(model, states, length, size - 1)
    longest = ((states - middle) @ word_of.T).square().sum(2).mean()
    word = word_of * math.sqrt(_PEAK * math.sqrt(size) / float(longest))
    side = type_of[None] * math.sqrt(_SIDE * math.sqrt(size))
    for layer in model.modules():
        if not isinstance(layer, AlbertLayer):
            continue
        attention = layer.attention
        for head in heads:
            rows = slice(head * size, (head + 1) * size)
            for linear, weight in (
                (attention.query, torch.cat([word, side])),
                (attention.key, torch.cat([word, -side])),
                (attention.value, torch.cat([type_of[None], torch.zeros_like(word)])),
            ):
                linear.weight[rows] = weight
                linear.bias[rows] = -weight @ middle
            written = torch.linalg.qr(torch.randn(config.hidden_size, size, generator=generator))[0]
            attention.dense.weight[:, rows] = _LOUD * math.sqrt(config.hidden_size / 256) * written


def _states(model: AlbertModel, words: Tensor, length: int) -> Tensor:
    """What the first pass reads: [places, words, hidden], of words at some places in both segments, by turns."""
    table = model.embeddings
    places = torch.linspace(1, length - 2, _PLACES // 2).long().repeat_interleave(2)
    types = torch.arange(_PLACES) % 2
    embedded = (
        table.word_embeddings.weight[words]
        + table.position_embeddings.weight[places][:, None]
        + table.token_type_embeddings.weight[types][:, None]
    )
    return model.encoder.embedding_hidden_mapping_in(table.LayerNorm(embedded))


def _readers(model: AlbertModel, states: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Linear maps of `_states`: to the word [size, hidden], and to the type [hidden], 1 and -1; both of states less
    their mean, the third."""
    table = model.embeddings
    places, types = table.position_embeddings.weight[:length], table.token_type_embeddings.weight
    back = torch.linalg.pinv(model.encoder.embedding_hidden_mapping_in.weight)  # [embedding, hidden]
    embedding = len(back)
    # Half of the dimensions may go to places, which use most of them when they are waves.
    directions = torch.linalg.svd(places - places.mean(0), full_matrices=False)[2][: embedding // 2]
    hidden_from = torch.linalg.qr(torch.cat([directions, (types[1] - types[0])[None]]).T)[0]
    only_words = torch.eye(embedding) - hidden_from @ hidden_from.T
    middle = states.mean((0, 1))
    chosen = torch.linalg.svd((states.mean(0) - middle) @ back.T @ only_words, full_matrices=False)[2][:size]
    word_of = torch.zeros(size, len(middle))
    word_of[: len(chosen)] = chosen @ only_words @ back
    flat = states.flatten(0, 1) - middle
    wanted = (2.0 * (torch.arange(_PLACES) % 2) - 1).repeat_interleave(states.shape[1])
    type_of = torch.linalg.lstsq(flat, wanted[:, None]).solution[:, 0]
    return word_of, type_of, middle
