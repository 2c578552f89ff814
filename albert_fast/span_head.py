"""The original's head for SQuAD v2: where an answer begins, where it ends given that, and whether there is one.

(google-research/albert, squad_utils.py, after XLNet.) The start is a score of [CLS] and of each token of the
paragraph. The end is scored from the token and the start's state together; in training the start is the right one,
later each of the likeliest is tried. Whether there is an answer comes from [CLS] and the state that is expected at the
start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.model import AlbertModel, AlbertPreTrainedModel
from albert_fast.ops.checks import check
from albert_fast.packing import PackedBatch

BEAMS = 5  # starts, and ends of each
ABSENT_WEIGHT = 0.5  # of the loss for whether there is an answer


@dataclass(frozen=True)
class Spans:
    """The likeliest spans of each row, and how surely there is none.

    Attributes:
        starts, ends: int64 [batch, starts, ends], columns of the row.
        scores: [batch, starts, ends], log-probability of the start plus that of the end given it.
        absent: [batch], the logit of there being no answer.
    """

    starts: Tensor
    ends: Tensor
    scores: Tensor
    absent: Tensor


class AlbertForSpanQuestionAnswering(AlbertPreTrainedModel):
    """See this file's docstring."""

    _newly_initialized: ClassVar[tuple[str, ...]] = ("start.*", "end_*.*", "answerable_*.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.start = nn.Linear(hidden, 1)
        self.end_dense = nn.Linear(2 * hidden, hidden)
        self.end_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.end_score = nn.Linear(hidden, 1)
        self.answerable_dense = nn.Linear(2 * hidden, hidden)
        self.answerable_dropout = nn.Dropout(config.classifier_dropout_prob)
        self.answerable_score = nn.Linear(hidden, 1, bias=False)
        self.post_init()

    def losses(self, batch: PackedBatch, starts: Tensor, ends: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss, and the rows whose likeliest start and whose end after the right start are the right ones.

        Args:
            starts, ends: int64 [batch], columns; [CLS], column 0, where a row has no answer.
            absent: bool [batch].
        """
        states = self._states(batch)
        start_logits = self._start_logits(batch, states)
        at_start = states[torch.arange(len(starts), device=states.device), starts]
        end_logits = self._end_logits(batch, states, at_start[:, None])[:, 0]
        loss = F.cross_entropy(start_logits, starts, reduction="sum") + F.cross_entropy(
            end_logits, ends, reduction="sum"
        )
        none = self._absent(states, start_logits)
        loss = loss / 2 + ABSENT_WEIGHT * F.binary_cross_entropy_with_logits(none, absent.float(), reduction="sum")
        return loss, ((start_logits.argmax(1) == starts) & (end_logits.argmax(1) == ends)).sum()

    def spans(self, batch: PackedBatch, first: Tensor) -> Spans:
        """The likeliest spans that begin at the columns `first`, bool [batch, seq], and end in the paragraph."""
        states = self._states(batch)
        start_logits = self._start_logits(batch, states)
        starts = start_logits.log_softmax(1).masked_fill(~first, -torch.inf)
        best = starts.topk(min(BEAMS, starts.shape[1]), dim=1)  # [batch, starts]
        at = torch.gather(states, 1, best.indices[:, :, None].expand(-1, -1, states.shape[2]))
        end_logits = self._end_logits(batch, states, at).log_softmax(2)  # [batch, starts, seq]
        columns = torch.arange(states.shape[1], device=states.device)
        possible = ~self._outside(batch)[:, None] & (columns >= best.indices[:, :, None]) & (columns > 0)
        last = end_logits.masked_fill(~possible, -torch.inf).topk(min(BEAMS, states.shape[1]), dim=2)
        return Spans(
            starts=best.indices[:, :, None].expand_as(last.indices),
            ends=last.indices,
            scores=best.values[:, :, None] + last.values,
            absent=self._absent(states, start_logits),
        )

    def _states(self, batch: PackedBatch) -> Tensor:
        """[batch, seq, hidden], zeros at padding: what follows is a softmax over rows."""
        return batch.pad(self.albert(batch, return_dict=True).last_hidden_state)

    def _outside(self, batch: PackedBatch) -> Tensor:
        """[batch, seq]: whether a column is neither [CLS] nor of the paragraph."""
        columns = torch.arange(batch.seq_length, device=batch.device)
        check(batch.token_type_ids is not None, "token_type_ids is None; 1 was expected at the paragraph, and 0 before")
        assert batch.token_type_ids is not None
        types = batch.pad(batch.token_type_ids)
        paragraph = (types == 1) & (columns < batch.cu_seqlens.diff()[:, None] - 1)
        return ~(paragraph | (columns == 0))

    def _start_logits(self, batch: PackedBatch, states: Tensor) -> Tensor:
        return self.start(states)[:, :, 0].float().masked_fill(self._outside(batch), torch.finfo(torch.float32).min)

    def _end_logits(self, batch: PackedBatch, states: Tensor, at_start: Tensor) -> Tensor:
        """[batch, starts, seq], for the states [batch, starts, hidden] of starts."""
        shape = (-1, at_start.shape[1], states.shape[1], -1)
        both = torch.cat([states[:, None].expand(shape), at_start[:, :, None].expand(shape)], dim=3)
        scores = self.end_score(self.end_norm(torch.tanh(self.end_dense(both))))[..., 0].float()
        return scores.masked_fill(self._outside(batch)[:, None], torch.finfo(torch.float32).min)

    def _absent(self, states: Tensor, start_logits: Tensor) -> Tensor:
        expected = torch.einsum("bs,bsh->bh", start_logits.softmax(1).to(states.dtype), states)
        both = torch.cat([expected, states[:, 0]], dim=1)
        return self.answerable_score(self.answerable_dropout(torch.tanh(self.answerable_dense(both))))[:, 0].float()
