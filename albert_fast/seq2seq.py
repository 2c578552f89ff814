"""AlbertForSeq2SeqLM: an ALBERT that reads, and a decoder of one shared block that writes.

The decoder's block is used `num_decoder_layers` times (a key of config.json; as often as the encoder's when missing).
Sharing a decoder's layers costs little (Dabre & Fujita 2019, arXiv 1807.05353), and buys what others cannot have: the
memory and the projections that read it are the same in each pass, so that cross-attention's keys and values are
computed once for a source, not once a pass. Only self-attention needs a cache for each pass.

Embeddings, and the head that predicts words, are those of the encoder. Rows are packed on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast import ops
from albert_fast.activations import ACTIVATIONS
from albert_fast.beam_search import beam_search
from albert_fast.config import AlbertConfig
from albert_fast.heads import AlbertForMaskedLM
from albert_fast.model import AlbertAttention, AlbertMLMHead, AlbertModel, AlbertPreTrainedModel
from albert_fast.ops.checks import check
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.outputs import ModelOutput
from albert_fast.packing import PackedBatch

DECODER_LAYERS = "num_decoder_layers"
_FUSED = {"gelu_new": "tanh", "gelu": "none", "relu": "relu"}


@dataclass
class Seq2SeqLMOutput(ModelOutput):
    """`logits` [batch, target, vocab] (of a packed target [tokens, vocab]); the loss is the mean over the labels."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


class Memory(NamedTuple):
    """What the decoder reads, for all passes.

    Attributes:
        key, value: [source tokens, heads, head_dim].
        cu_seqlens: int32 [batch + 1].
        max_seqlen: an upper bound of the sources' lengths.
    """

    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class AlbertDecoderLayer(nn.Module):
    """The shared block: self-attention, attention to the source, feed-forward, each with a LayerNorm behind it."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.attention = AlbertAttention(config)
        self.cross_attention = AlbertAttention(config)
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.full_layer_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class AlbertDecoder(nn.Module):
    """The loop over the shared block."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.config = config
        self.passes = int(config.extra.get(DECODER_LAYERS, config.num_hidden_layers))
        check(self.passes >= 1, f"config.{DECODER_LAYERS} is {self.passes}; at least 1 was expected")
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.layer = AlbertDecoderLayer(config)

    def memory(self, encoded: Tensor, source: PackedBatch) -> Memory:
        """Keys and values of the encoder's output [source tokens, hidden]."""
        attention = self.layer.cross_attention
        key, value = (self._heads(linear(encoded)) for linear in (attention.key, attention.value))
        return Memory(key, value, source.cu_seqlens, source.max_seqlen)

    def forward(self, embedded: Tensor, batch: PackedBatch, memory: Memory, seed: Tensor | None) -> Tensor:
        """All target tokens at once: [tokens, E] -> [tokens, hidden]."""
        config, hidden = self.config, self.embedding_hidden_mapping_in(embedded)
        dropout_p = config.attention_probs_dropout_prob if self.training else 0.0

        for number in range(self.passes):
            site = 1 + 5 * number

            def attend(qkv: Tensor, site: int = site) -> Tensor:
                qkv = qkv.unflatten(1, (3, config.num_attention_heads, -1))
                return ops.attention(
                    qkv, batch.cu_seqlens, batch.max_seqlen, causal=True, dropout_p=dropout_p, seed=seed, site=site
                )

            def read(query: Tensor, site: int = site) -> Tensor:
                return self._read(query, memory, batch.cu_seqlens, batch.max_seqlen, dropout_p, seed, site + 1)

            hidden = self._layer(hidden, attend, read, batch.cu_seqlens, seed, site + 2)
        return hidden

    def step(self, embedded: Tensor, cache: list[tuple[Tensor, Tensor]], memory: Memory, beams: int) -> Tensor:
        """One token of each row, after those in the cache, which takes it in: [rows, E] -> [rows, hidden].

        Args:
            cache: for each pass keys and values [rows, earlier tokens, heads, head_dim]; empty before the first token.
            memory: of rows / beams sources; a source's beams are neighbors.
        """
        hidden, config = self.embedding_hidden_mapping_in(embedded), self.config
        rows = len(hidden)
        device = hidden.device
        first = not cache
        ones = torch.arange(rows + 1, dtype=torch.int32, device=device)
        for number in range(self.passes):

            def attend(qkv: Tensor, number: int = number) -> Tensor:
                query, key, value = qkv.unflatten(1, (3, config.num_attention_heads, -1)).unbind(1)
                if first:
                    cache.append((key[:, None], value[:, None]))
                else:
                    keys, values = cache[number]
                    cache[number] = torch.cat([keys, key[:, None]], 1), torch.cat([values, value[:, None]], 1)
                keys, values = cache[number]
                length = keys.shape[1]
                return ops.cross_attention(
                    query, keys.flatten(0, 1), values.flatten(0, 1), ones, ones * length, 1, length
                )

            def read(query: Tensor) -> Tensor:
                return self._read(query, memory, ones[: rows // beams + 1] * beams, beams, 0.0, None, 0)

            hidden = self._layer(hidden, attend, read, ones, None, 0)
        return hidden

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.config.num_attention_heads, -1))

    def _read(
        self,
        query: Tensor,
        memory: Memory,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_p: float,
        seed: Tensor | None,
        site: int,
    ) -> Tensor:
        return ops.cross_attention(
            self._heads(query),
            memory.key,
            memory.value,
            cu_seqlens,
            memory.cu_seqlens,
            max_seqlen,
            memory.max_seqlen,
            dropout_p=dropout_p,
            seed=seed,
            site=site,
        )

    def _layer(
        self,
        x: Tensor,
        attend: Callable[[Tensor], Tensor],
        read: Callable[[Tensor], Tensor],
        cu_seqlens: Tensor,
        seed: Tensor | None,
        site: int,
    ) -> Tensor:
        """One pass.

        Args:
            attend: fused projection [tokens, 3 hidden] -> [tokens, hidden].
            read: queries [tokens, hidden] -> [tokens, hidden].
        """
        layer, own, cross = self.layer, self.layer.attention, self.layer.cross_attention
        projections = (own.query, own.key, own.value)
        weight = torch.cat([each.weight for each in projections])
        bias = torch.cat([each.bias for each in projections])

        def add(y: Tensor, dense: nn.Linear, residual: Tensor, norm: nn.LayerNorm, place: int) -> Tensor:
            return ops.dropout_add_layer_norm(
                F.linear(y, dense.weight),
                dense.bias,
                residual,
                norm.weight,
                norm.bias,
                eps=norm.eps,
                dropout_p=self.config.hidden_dropout_prob if self.training else 0.0,
                seed=seed,
                site=site + place,
                cu_seqlens=cu_seqlens,
            )

        x = add(attend(F.linear(x, weight, bias)), own.dense, x, own.LayerNorm, 0)
        x = add(read(cross.query(x)), cross.dense, x, cross.LayerNorm, 1)
        form = _FUSED.get(self.config.hidden_act)
        if form is None:
            wide = ACTIVATIONS[self.config.hidden_act](layer.ffn(x))
        else:
            wide = ops.bias_gelu(F.linear(x, layer.ffn.weight), layer.ffn.bias, approximate=form)
        return add(wide, layer.ffn_output, x, layer.full_layer_layer_norm, 2)


class AlbertForSeq2SeqLM(AlbertPreTrainedModel):
    """Translation and whatever else writes a text about a text. A target begins with [CLS] and ends with [SEP]."""

    _tied_weights_keys: ClassVar[dict[str, str]] = AlbertForMaskedLM._tied_weights_keys
    _newly_initialized: ClassVar[tuple[str, ...]] = ("predictions.*", "decoder.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.decoder = AlbertDecoder(config)
        self.predictions = AlbertMLMHead(config)
        self.post_init()

    @torch.no_grad()
    def begin_from_encoder(self) -> None:
        """The decoder's self-attention and feed-forward become the encoder's (Rothe et al. 2020, "BERTShare"); its
        attention to the source stays as it was drawn."""
        encoder, decoder = self.albert.encoder, self.decoder
        decoder.embedding_hidden_mapping_in.load_state_dict(encoder.embedding_hidden_mapping_in.state_dict())
        source = encoder.albert_layer_groups[0].albert_layers[0]  # type: ignore[index]
        for name in ("attention", "ffn", "ffn_output", "full_layer_layer_norm"):
            getattr(decoder.layer, name).load_state_dict(getattr(source, name).state_dict())

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | PackedBatch | None = None,
        labels: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_logits: bool | None = None,
    ) -> Seq2SeqLMOutput:
        """Of sources and targets.

        Args:
            input_ids: int64 [batch, source], or packed.
            attention_mask: [batch, source], 0 at padding.
            decoder_input_ids: int64 [batch, target], or packed: [CLS] and the target but for its last token. None:
                made of labels.
            labels: int64 [batch, target], or [tokens] for a packed target: the target with its [SEP], -100 elsewhere.
            label_smoothing, reduction: of the loss, as in `ops.masked_lm_loss`.
            return_logits: whether logits are returned; None: only without labels.

        Raises:
            ValueError: neither decoder_input_ids nor labels.
        """
        source, bias = self._packed_inputs(input_ids, attention_mask, None, None, None, True)
        check(bias is None, "attention_mask has more than two dimensions; [batch, source] was expected")
        target, packed = self._target(decoder_input_ids, labels)
        encoded = self.albert(source, return_dict=True).last_hidden_state
        seed = None
        if self.training:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=source.device)
        hidden = self.decoder(self.albert.embeddings(target, seed), target, self.decoder.memory(encoded, source), seed)
        loss = logits = None
        head = self.predictions
        if labels is not None:
            loss = ops.masked_lm_loss(
                head.transform(hidden),
                head.decoder.weight,
                head.decoder.bias,
                labels if packed else target.pack(labels),
                ignore_index=IGNORE_INDEX,
                label_smoothing=label_smoothing if self.training else 0.0,
                reduction=reduction,
            )
        if return_logits or (return_logits is None and labels is None):
            logits = head(hidden) if packed else target.pad(head(hidden))
        states = encoded if isinstance(input_ids, PackedBatch) else source.pad(encoded)
        return Seq2SeqLMOutput(loss, logits, states)

    def _target(
        self, decoder_input_ids: Tensor | PackedBatch | None, labels: Tensor | None
    ) -> tuple[PackedBatch, bool]:
        """The decoder's inputs, and whether they were packed."""
        if isinstance(decoder_input_ids, PackedBatch):
            return decoder_input_ids, True
        mask = None
        if decoder_input_ids is None:
            check(labels is not None, "decoder_input_ids and labels are both None; one of them was expected")
            assert labels is not None
            begin = labels.new_full((len(labels), 1), int(self.config.bos_token_id or 0))
            decoder_input_ids = torch.cat([begin, labels[:, :-1]], 1).clamp(min=0)
        if labels is not None:
            mask = (labels != IGNORE_INDEX).long()
        return PackedBatch.from_padded(decoder_input_ids, mask, shared=True), False

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int = 5,
        length_penalty: float = 1.0,
        max_length: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The best target of each source, without [CLS] and [SEP].

        Args:
            num_beams: kept in each step; 1 is greedy.
            length_penalty: a finished target's log-probability is divided by ((5 + length) / 6) to this power (Wu et
                al. 2016, section 7).
            max_length: most tokens of a target, or of each one; None: twice the source's and 10 more, and never beyond
                the model's positions.
        """
        check(num_beams >= 1, f"num_beams is {num_beams}; at least 1 was expected")
        source, _ = self._packed_inputs(input_ids, attention_mask, None, None, None, True)
        was_training = self.training
        self.eval()
        try:
            encoded = self.albert(source, return_dict=True).last_hidden_state
            memory = self.decoder.memory(encoded, source)
            most = self.config.max_position_embeddings - 1
            lengths = source.cu_seqlens.diff().tolist()
            if max_length is None:
                limits = [2 * length + 10 for length in lengths]
            else:
                limits = [max_length] * len(lengths) if isinstance(max_length, int) else list(max_length)
            cache: list[tuple[Tensor, Tensor]] = []

            def scores(ids: Tensor, place: int) -> Tensor:
                """Log-probabilities [rows, vocab] of what follows the rows' last tokens."""
                row = self._row(ids, place)
                hidden = self.decoder.step(self.albert.embeddings(row, None), cache, memory, num_beams)
                return torch.log_softmax(self.predictions(hidden).float(), dim=-1)

            def reorder(rows: Tensor) -> None:
                cache[:] = [(keys[rows], values[rows]) for keys, values in cache]

            return beam_search(
                scores,
                reorder,
                batch_size=source.batch_size,
                num_beams=num_beams,
                begin=int(self.config.bos_token_id or 0),
                end=self._end,
                length_penalty=length_penalty,
                max_lengths=[min(limit, most) for limit in limits],
                device=source.device,
            )
        finally:
            self.train(was_training)

    @property
    def _end(self) -> int:
        end = self.config.eos_token_id
        return int(end[0] if isinstance(end, list) else end or 0)

    def _row(self, ids: Tensor, place: int) -> PackedBatch:
        """One token of each row, at a place of its target."""
        batch = PackedBatch.from_padded(ids[:, None], shared=True)
        return replace(batch, position_ids=torch.full_like(ids, place))
