"""The first weights of a new model: as the original draws them, or such that it looks at its neighbors from the start.

A transformer with learned positions has no idea at first of what is next to what. Each head averages over the whole
row, the average tells nothing of the word that is missing, and until a head finds its neighbors by chance, the loss
stays at the unigram model's. With many steps of thousands of rows that passes; with an hour of a CPU it does not, and
it is what most reports of failed ALBERTs describe.

So `neighbors` sets what such a model would have to learn first, in weights that every ALBERT has:

- The position table holds waves, cos(f p) and sin(f p) of many frequencies f, turned at random. To look d places on is
  then a rotation, which a linear map can be: query and key of a head project onto the waves, the key's turned by d, and
  the scores peak at the key that is d places from the query; d is -1, 1, -2, 2 in the first heads, at most in half of
  them. As the layer is shared, each pass looks at neighbors, and the next one at theirs.
- Two more heads average over one segment each, by its token type, and write aloud what they read: sentence order is a
  comparison of the segments, and [CLS] would else be the same in all rows but for some hundredths.
- What the layer adds to its input is divided by sqrt(2 L) (Radford et al. 2019, section 2.3), so that words and
  positions are still there in the later passes.
- The prediction head reads the word table through the transpose of the map behind the embeddings.
- The bias of the scores is the logarithm of each piece's frequency: the model begins as the unigram model.

Related: heads whose first weights imitate trained ones (Trockman & Kolter 2023, "Mimetic initialization").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.heads import AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.model import AlbertAttention, AlbertLayer
from albert_fast.ops.checks import check

INITIALIZATIONS = ("original", "neighbors")
OFFSETS = (-1, 1, -2, 2)
_PEAK = 5.0  # the score at the offset, in the first pass; other places have about 0
_SIDE = 2.0  # the score of a token of the head's segment; the other segment's have as much less than 0
_LOUD = 1.0  # how many times longer what such a head writes is than the mean that it reads

Model = AlbertForPreTraining | AlbertForMaskedLM


def build_model(config: AlbertConfig, second_task: bool, seed: int) -> Model:
    """A new model, its weights drawn as the original's: normal, cut off at two standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    kind: Any = AlbertForPreTraining if second_task else AlbertForMaskedLM
    model = kind(config)
    spread = config.initializer_range
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in done:
            done.add(id(module.weight))
            nn.init.trunc_normal_(module.weight, std=spread, a=-2 * spread, b=2 * spread, generator=generator)
    return model


@torch.no_grad()
def look_at_neighbors(model: Model, unigram_losses: Tensor, seed: int) -> None:
    """Changes the weights of a new model, see above.

    Args:
        unigram_losses: [vocab], -log of each piece's share of the text.

    Raises:
        ValueError: hidden_size is smaller than embedding_size: positions would not fit through the map between them.
    """
    config = model.config
    hidden, embedding, head = (
        config.hidden_size,
        config.embedding_size,
        config.hidden_size // config.num_attention_heads,
    )
    check(
        hidden >= embedding,
        f"hidden_size is {hidden} and embedding_size {embedding}: initialization 'neighbors' needs a hidden_size that "
        "is not smaller; choose 'original'",
    )
    generator = torch.Generator().manual_seed(seed)
    waves = min(head, embedding // 2) // 2  # half of the embedding is left to the words alone
    turned = _orthonormal(embedding, 2 * waves, generator)  # where the waves are among the embedding's dimensions
    into = _orthonormal(hidden, embedding, generator)
    # One frequency from each part of 0 to pi, so that no other distance has all of them in phase.
    frequencies = math.pi * (torch.arange(waves) + torch.rand(waves, generator=generator)) / waves

    embeddings, encoder, prediction = model.albert.embeddings, model.albert.encoder, model.predictions
    positions = embeddings.position_embeddings.weight
    angles = torch.arange(len(positions))[:, None] * frequencies
    size = embeddings.word_embeddings.weight.std() * math.sqrt(embedding / waves)  # a row is as long as a word's
    positions.copy_(size * torch.cat([angles.cos(), angles.sin()], dim=1) @ turned.T)
    encoder.embedding_hidden_mapping_in.weight.copy_(into * math.sqrt(hidden / embedding))
    prediction.dense.weight.copy_(into.T * math.sqrt(embedding / hidden))
    prediction.bias.copy_(-unigram_losses)
    types = embeddings.token_type_embeddings.weight
    if len(types) > 1:
        types[1] = -types[0]  # what is common to all tokens would be all that an average tells
    segment = into @ types[0] / types[0].norm()
    # Behind the LayerNorm, a third each of words, positions and token types.
    scale = math.sqrt(_PEAK * math.sqrt(head) / (hidden / 3))
    for module in model.modules():
        if isinstance(module, AlbertLayer):
            for branch in (module.attention.dense, module.ffn_output):
                branch.weight.div_(math.sqrt(2 * config.num_hidden_layers))
            local = max(1, config.num_attention_heads // 2)
            _look_beside(module.attention, OFFSETS[:local], scale * (into @ turned).T, frequencies, head)
            if config.num_attention_heads - local > 1 and len(types) > 1:
                for number, sign in ((local, 1.0), (local + 1, -1.0)):
                    _read_segment(module.attention, number, head, sign * segment, generator)


def _look_beside(
    attention: AlbertAttention, offsets: Sequence[int], waves: Tensor, frequencies: Tensor, size: int
) -> None:
    """The first heads. waves: [2 * len(frequencies), hidden], the cosines', then the sines'."""
    cosines, sines = waves.chunk(2)
    for head, offset in enumerate(offsets):
        rows = slice(head * size, head * size + len(waves))
        turn = (frequencies * offset)[:, None]
        attention.query.weight[rows] = waves
        # The waves at p - offset: cos(f p - f offset), sin(f p - f offset).
        attention.key.weight[rows] = torch.cat(
            [turn.cos() * cosines + turn.sin() * sines, turn.cos() * sines - turn.sin() * cosines]
        )


def _read_segment(
    attention: AlbertAttention, head: int, size: int, segment: Tensor, generator: torch.Generator
) -> None:
    """One head averages the tokens of a segment, whoever asks. segment: [hidden], the direction of its token type."""
    hidden = len(segment)
    rows = slice(head * size, (head + 1) * size)
    asked = _orthonormal(size, 1, generator)[:, 0] * math.sqrt(_SIDE * math.sqrt(size) / math.sqrt(hidden / 3))
    attention.query.bias[rows] = asked
    attention.key.weight[rows] += asked[:, None] * segment
    # What all tokens of the segment have in common is not read: a constant would drown the rest.
    chosen = torch.linalg.qr(torch.cat([segment[:, None], torch.randn(hidden, size, generator=generator)], dim=1))[0]
    attention.value.weight[rows] = chosen[:, 1:].T
    attention.dense.weight[:, rows] = _LOUD * _orthonormal(hidden, size, generator)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
