"""What pretraining minimizes: the masked-LM loss and the second task's, divided by the labels and the rows of a step.

(google-research/albert, run_pretraining.py: weights 1 to 1, no dropout before the sentence-order classifier; it divides
per shard.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.heads import AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX, masked_lm_loss_with_statistics
from albert_fast.pretraining.examples import Batch
from albert_fast.pretraining.store import TokenStore
from albert_fast.training.objective import Objective, Sums

_BLOCK, _MOST_BLOCKS = 1 << 20, 128  # tokens that unigram_losses counts at a time, and how often


class Means(NamedTuple):
    """What the sums of a step or of an evaluation come to; losses in nats, `loss` is their
    total, whatever their weights.

    A tenth of the labelled tokens are shown as they are, and a model that has learned to copy them alone is about half
    a nat below the unigram model. What it has learned of contexts shows at the masks: `loss_at_masks`.
    """

    loss: float
    masked_lm_loss: float
    sentence_order_loss: float
    unigram_loss: float
    masked_accuracy: float
    sentence_order_accuracy: float
    loss_at_masks: float
    unigram_loss_at_masks: float
    labels: int
    rows: int
    tokens: int
    second_task: bool

    @classmethod
    def of(cls, losses: Tensor, counts: Tensor, *, second_task: bool = True) -> Means:
        """Of the sums of all micro-batches and ranks; reads them from the device."""
        masked, order, *of = torch.cat([losses.double(), counts]).tolist()
        labels, rows, correct, told, tokens, unigram, masks, at_masks, unigram_at_masks = of
        masked, order = masked / max(labels, 1), order / max(rows, 1)
        return cls(
            loss=masked + order,
            masked_lm_loss=masked,
            sentence_order_loss=order,
            unigram_loss=unigram / max(labels, 1),
            masked_accuracy=correct / max(labels, 1),
            sentence_order_accuracy=told / max(rows, 1),
            loss_at_masks=at_masks / max(masks, 1),
            unigram_loss_at_masks=unigram_at_masks / max(masks, 1),
            labels=int(labels),
            rows=int(rows),
            tokens=int(tokens),
            second_task=second_task,
        )

    def record(self) -> dict[str, float]:
        """The fields of a record of the run's log."""
        record = {
            "loss": self.loss,
            "masked_lm_loss": self.masked_lm_loss,
            "unigram_loss": self.unigram_loss,
            "below_unigram": self.unigram_loss - self.masked_lm_loss,
            "below_unigram_at_masks": self.unigram_loss_at_masks - self.loss_at_masks,
            "masked_accuracy": self.masked_accuracy,
        }
        if self.second_task:
            record["sentence_order_loss"] = self.sentence_order_loss
            record["sentence_order_accuracy"] = self.sentence_order_accuracy
        return record


class MaskedLMObjective(Objective):
    """Masked-LM loss, and that of the second task.

    Its counts are float64 [9]: labelled tokens, rows, labelled tokens whose label came first, rows whose order was
    told, tokens, and the summed loss of the unigram model on the same labels; then labelled tokens that show [MASK],
    and the summed losses there, the model's and the unigram model's.

    Args:
        model: AlbertForPreTraining, or AlbertForMaskedLM where there is no second task: a head that nothing is asked of
            would have no gradients.
        unigram_losses: [vocab], `unigram_losses` of the training text.
        mask_id: of [MASK].
        label_smoothing, z_loss: as in `ops.masked_lm_loss`; in training alone.
        sentence_order_weight: of the second task's gradient.
    """

    model: AlbertForPreTraining | AlbertForMaskedLM
    unigram_losses: Tensor

    def __init__(
        self,
        model: AlbertForPreTraining | AlbertForMaskedLM,
        unigram_losses: Tensor,
        mask_id: int,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        sentence_order_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.mask_id = model, mask_id
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.weights = (1.0, sentence_order_weight)
        self.register_buffer("unigram_losses", unigram_losses, persistent=False)

    def forward(self, batch: Batch) -> Sums:
        model = self.model
        outputs = model.albert(batch.packed(), return_dict=True)
        head = model.predictions
        masked, statistics = masked_lm_loss_with_statistics(
            head.transform(outputs.last_hidden_state),
            head.decoder.weight,
            head.decoder.bias,
            batch.labels,
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
            reduction="sum",
        )
        order, told = masked.new_zeros(()), masked.new_zeros(())
        if isinstance(model, AlbertForPreTraining):
            assert batch.sentence_order_label is not None
            # Without the head's dropout, which is transformers' and not the original's.
            scores = model.sop_classifier.classifier(outputs.pooler_output).float()
            order = F.cross_entropy(scores, batch.sentence_order_label, reduction="sum")
            told = (scores.argmax(dim=1) == batch.sentence_order_label).sum()
        labelled = statistics.labelled
        at_mask = labelled & (batch.input_ids == self.mask_id)
        unigram = self.unigram_losses[batch.labels.clamp(min=0)]
        rows, tokens = (masked.new_tensor(float(size)) for size in (batch.rows, batch.tokens))
        counts = [labelled.sum(), rows, statistics.correct.sum(), told, tokens, (unigram * labelled).sum()]
        counts += [at_mask.sum(), (statistics.loss * at_mask).sum(), (unigram * at_mask).sum()]
        return Sums(torch.stack([masked, order]), torch.stack([count.double() for count in counts]))

    def divisors(self, batch: Batch) -> list[float]:
        return [float((batch.labels != IGNORE_INDEX).sum()), float(batch.rows)]

    def means(self, losses: Tensor, counts: Tensor) -> Means:
        return Means.of(losses, counts, second_task=isinstance(self.model, AlbertForPreTraining))

    def with_model(self, model: nn.Module) -> MaskedLMObjective:
        assert isinstance(model, AlbertForPreTraining | AlbertForMaskedLM)
        return MaskedLMObjective(model, self.unigram_losses, self.mask_id)


def unigram_losses(store: TokenStore) -> Tensor:
    """-log of each piece's share of the text, float32 [vocab]: the loss of a model that knows frequencies alone.

    Each count is raised by one, so that a piece the text lacks has a finite loss. The mean of these over the labels is
    where training stands that has learned nothing of contexts. Of a large store, blocks that are evenly spread are
    counted.
    """
    counts = torch.ones(store.vocab_size, dtype=torch.float64)
    blocks = -(-len(store.tokens) // _BLOCK)
    for block in sorted({i * blocks // _MOST_BLOCKS for i in range(_MOST_BLOCKS)}):
        ids = torch.from_numpy(store.tokens[block * _BLOCK : (block + 1) * _BLOCK].astype("int64"))
        counts += torch.bincount(ids, minlength=store.vocab_size)
    return -(counts / counts.sum()).log().float()
