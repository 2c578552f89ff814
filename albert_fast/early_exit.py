"""Classification that stops when it is sure: a head behind each pass of the shared layer.

Since every pass is the same layer, a row may leave after any of them: there is no part of the model that it has not
been through. Rows that have left are taken out of the packed batch, so that what they save is saved, in batches too.

Rules, for rows of one label each:

- `patience`: as many passes in a row as this give the same label (Zhou et al. 2020, "BERT loses patience").
- `confidence`: the probability of the label is at least this (Schwartz et al. 2020, "The right tool for the job").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.heads import AlbertForSequenceClassification
from albert_fast.ops.checks import check
from albert_fast.packing import PackedBatch


@dataclass(frozen=True)
class Exits:
    """What came out of a batch.

    Attributes:
        logits: [batch, num_labels], of the pass after which each row left.
        passes: int64 [batch], how many each row took.
    """

    logits: Tensor
    passes: Tensor


class AlbertForEarlyExit(AlbertForSequenceClassification):
    """AlbertForSequenceClassification with a head behind each pass; the last one is `classifier`.

    The pooler is common to all passes, and each has a linear map of its own.
    """

    _newly_initialized: ClassVar[tuple[str, ...]] = ("classifier.*", "exits.*", "albert.pooler.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        check(
            config.num_hidden_groups == 1,
            f"config.num_hidden_groups is {config.num_hidden_groups}; 1 was expected, the same layer in each pass",
        )
        passes = config.num_hidden_layers
        self.exits = nn.ModuleList([nn.Linear(config.hidden_size, config.num_labels) for _ in range(passes - 1)])
        self.exits.apply(self._init_weights)

    def heads(self) -> list[nn.Module]:
        """Of each pass, the first one's first."""
        return [*self.exits, self.classifier]

    def all_logits(self, batch: PackedBatch) -> Tensor:
        """[passes, batch, num_labels], of every row after every pass: what is trained."""
        states = self.albert(batch, output_hidden_states=True, return_dict=True).hidden_states
        assert states is not None
        return torch.stack([self._logits(number, state, batch) for number, state in enumerate(states[1:])])

    def _logits(self, number: int, state: Tensor, batch: PackedBatch) -> Tensor:
        assert self.albert.pooler is not None
        pooled = torch.tanh(self.albert.pooler(batch.first(state)))
        return self.heads()[number](self.dropout(pooled))

    @torch.no_grad()
    def exit_early(self, batch: PackedBatch, *, patience: int | None = None, confidence: float | None = None) -> Exits:
        """Lets each row go as soon as it may; without a rule all rows take all passes.

        Raises:
            ValueError: both rules, or a number out of its range; the model is training, or has regression's one score.
        """
        check(patience is None or confidence is None, "patience and confidence are both given; one rule was expected")
        check(patience is None or patience >= 1, f"patience is {patience}; at least 1 was expected")
        check(
            confidence is None or 0 < confidence <= 1,
            f"confidence is {confidence}; a probability above 0 was expected",
        )
        check(not self.training, "the model is in training: call eval() first, dropout is no reason to stay or to go")
        check(self.num_labels > 1, "the model has one score, regression's; rows of one label each were expected")
        encoder, passes = self.albert.encoder, self.config.num_hidden_layers
        hidden = encoder.embedding_hidden_mapping_in(self.albert.embeddings(batch, None))
        logits = hidden.new_empty(batch.batch_size, self.num_labels)
        taken = torch.full([batch.batch_size], passes, device=hidden.device)
        inside = torch.arange(batch.batch_size, device=hidden.device)  # the rows that are still in the batch
        before = torch.full_like(inside, -1)
        same = torch.zeros_like(inside)
        for number in range(passes):
            hidden = encoder.one_pass(hidden, batch, number)
            found = self._logits(number, hidden, batch)
            logits[inside] = found
            if number == passes - 1:
                break
            label = found.argmax(1)
            same = torch.where(label == before, same + 1, torch.ones_like(same))
            before = label
            go = torch.zeros_like(label, dtype=torch.bool)
            if patience is not None:
                go = same >= patience
            if confidence is not None:
                go = found.float().softmax(1).amax(1) >= confidence
            if not go.any():
                continue
            taken[inside[go]] = number + 1
            if go.all():
                break
            hidden, batch = _without(hidden, batch, go)
            inside, before, same = inside[~go], before[~go], same[~go]
        return Exits(logits, taken)


def _without(hidden: Tensor, batch: PackedBatch, gone: Tensor) -> tuple[Tensor, PackedBatch]:
    """The tokens of the rows that stay, and their layout."""
    lengths = batch.cu_seqlens.diff().long()
    stay = torch.repeat_interleave(~gone, lengths, output_size=batch.tokens)
    left = lengths[~gone]
    layout = PackedBatch.layout((len(left), batch.seq_length), hidden.device, lengths=left.tolist())
    return hidden[stay], replace(layout, max_seqlen=min(batch.max_seqlen, int(left.max())))
