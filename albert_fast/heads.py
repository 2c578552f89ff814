"""AlbertModel with a head and its loss: transformers' classes, with their parameter names, arguments and outputs.

What differs from transformers, on purpose, beside what `albert_fast.model` names:

- The masked-LM loss reads the labelled positions only. With labels there are no logits, unless `return_logits=True`.
- A question's answer cannot begin or end in the padding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.model import AlbertMLMHead, AlbertModel, AlbertPreTrainedModel, pad_extras
from albert_fast.ops.checks import check, describe, values_can_be_read
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.outputs import (
    AlbertForPreTrainingOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from albert_fast.packing import PackedBatch


class AlbertSOPHead(nn.Module):
    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.classifier(self.dropout(pooled))


class AlbertForPreTraining(AlbertPreTrainedModel):
    """Masked language model and sentence order: what ALBERT is pretrained with."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    }
    _newly_initialized: ClassVar[tuple[str, ...]] = ("predictions.*", "sop_classifier.*", "albert.pooler.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.albert = AlbertModel(config)
        self.predictions = AlbertMLMHead(config)
        self.sop_classifier = AlbertSOPHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_logits: bool | None = None,
        unpad: bool = True,
    ) -> AlbertForPreTrainingOutput:
        """As `AlbertModel.forward`, and:

        Args:
            labels: int64 [batch, seq], the masked tokens' ids, -100 elsewhere.
            sentence_order_label: int64 [batch], 0 in order, 1 swapped.
            return_logits: whether prediction_logits are returned; None: only without labels.

        Returns:
            AlbertForPreTrainingOutput; the loss is the sum of those whose labels were given.
        """
        packed = isinstance(input_ids, PackedBatch)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        batch, outputs = _encode(self, inputs, unpad, output_attentions, output_hidden_states)
        logits, loss = _masked_lm(self.predictions, batch, outputs, labels, return_logits, packed)
        sop_logits = self.sop_classifier(outputs.pooler_output)
        if sentence_order_label is not None:
            sop_loss = F.cross_entropy(sop_logits.view(-1, 2), sentence_order_label.view(-1))
            loss = sop_loss if loss is None else loss + sop_loss
        return self._outputs(
            AlbertForPreTrainingOutput(loss, logits, sop_logits, **_extras(batch, outputs, packed)),
            return_dict,
        )


class AlbertForMaskedLM(AlbertPreTrainedModel):
    """Masked language model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = AlbertForPreTraining._tied_weights_keys
    _newly_initialized: ClassVar[tuple[str, ...]] = ("predictions.*",)

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.predictions = AlbertMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_logits: bool | None = None,
        unpad: bool = True,
    ) -> MaskedLMOutput:
        """As `AlbertModel.forward`, and:

        Args:
            labels: int64 [batch, seq], the masked tokens' ids, -100 elsewhere.
            return_logits: whether logits are returned; None: only without labels.

        Returns:
            MaskedLMOutput; the loss is the mean over the labelled tokens.
        """
        packed = isinstance(input_ids, PackedBatch)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        batch, outputs = _encode(self, inputs, unpad, output_attentions, output_hidden_states)
        logits, loss = _masked_lm(self.predictions, batch, outputs, labels, return_logits, packed)
        return self._outputs(MaskedLMOutput(loss, logits, **_extras(batch, outputs, packed)), return_dict)


class AlbertForSequenceClassification(AlbertPreTrainedModel):
    """One label, several, or a number for each text or pair, on the pooled output."""

    _newly_initialized: ClassVar[tuple[str, ...]] = ("classifier.*", "albert.pooler.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = AlbertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpad: bool = True,
    ) -> SequenceClassifierOutput:
        """As `AlbertModel.forward`, and:

        Args:
            labels: [batch] or [batch, num_labels]. config.problem_type says which loss; when it is None, num_labels
                == 1 means regression, integer labels one class each, and floating ones several.
        """
        packed = isinstance(input_ids, PackedBatch)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        batch, outputs = _encode(self, inputs, unpad, output_attentions, output_hidden_states)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None if labels is None else self._loss(logits, labels)
        return self._outputs(SequenceClassifierOutput(loss, logits, **_extras(batch, outputs, packed)), return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None:
            if self.num_labels == 1:
                problem = "regression"
            else:
                problem = "multi" if labels.is_floating_point() else "single"
                problem += "_label_classification"
        if problem == "regression":
            if self.num_labels == 1:
                logits, labels = logits.view(-1), labels.view(-1)
            return F.mse_loss(logits, labels.to(logits.dtype))
        if problem == "single_label_classification":
            return F.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


class AlbertForTokenClassification(AlbertPreTrainedModel):
    """A label for each token: entities, parts of speech."""

    _newly_initialized: ClassVar[tuple[str, ...]] = ("classifier.*",)

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpad: bool = True,
    ) -> TokenClassifierOutput:
        """As `AlbertModel.forward`, and:

        Args:
            labels: int64 [batch, seq], -100 where a token has none.
        """
        packed = isinstance(input_ids, PackedBatch)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        batch, outputs = _encode(self, inputs, unpad, output_attentions, output_hidden_states)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, _packed_labels(batch, labels, packed), ignore_index=IGNORE_INDEX)
        logits = logits if packed else batch.pad(logits)
        return self._outputs(TokenClassifierOutput(loss, logits, **_extras(batch, outputs, packed)), return_dict)


class AlbertForQuestionAnswering(AlbertPreTrainedModel):
    """Where an answer begins and ends."""

    _newly_initialized: ClassVar[tuple[str, ...]] = ("qa_outputs.*",)

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        check(config.num_labels == 2, f"config.num_labels is {config.num_labels}; 2 was expected: start and end")
        self.num_labels = config.num_labels
        self.albert = AlbertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpad: bool = True,
    ) -> QuestionAnsweringModelOutput:
        """As `AlbertModel.forward`, and:

        Args:
            start_positions, end_positions: int64 [batch], columns of the padded row; those outside it do not count.

        Returns:
            QuestionAnsweringModelOutput. Logits are [batch, seq] also for a PackedBatch: their softmax is over a row.
        """
        packed = isinstance(input_ids, PackedBatch)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        batch, outputs = _encode(self, inputs, unpad, output_attentions, output_hidden_states)
        logits = self.qa_outputs(outputs.last_hidden_state)
        start, end = batch.pad(logits, fill=torch.finfo(logits.dtype).min).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_position_loss(start, start_positions) + _position_loss(end, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss, start.contiguous(), end.contiguous(), **_extras(batch, outputs, packed)
        )
        return self._outputs(output, return_dict)


class AlbertForMultipleChoice(AlbertPreTrainedModel):
    """Which of several choices: inputs are [batch, choices, seq]."""

    _newly_initialized: ClassVar[tuple[str, ...]] = ("classifier.*", "albert.pooler.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.albert = AlbertModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpad: bool = True,
    ) -> MultipleChoiceModelOutput:
        """As `AlbertModel.forward` with one dimension more, [batch, choices, seq]; choices become rows.

        Args:
            labels: int64 [batch], the right choice.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        check(
            isinstance(tokens, Tensor) and tokens.dim() == (3 if input_ids is not None else 4),
            "input_ids [batch, choices, seq] or inputs_embeds [batch, choices, seq, E] was expected",
        )
        assert isinstance(tokens, Tensor)
        choices = tokens.shape[1]
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        rows = tuple(None if tensor is None else tensor.flatten(0, 1) for tensor in inputs)
        batch, outputs = _encode(self, rows, unpad, output_attentions, output_hidden_states)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, choices)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self._outputs(MultipleChoiceModelOutput(loss, logits, **_extras(batch, outputs, False)), return_dict)


def _encode(
    model: AlbertPreTrainedModel,
    inputs: tuple[Any, ...],
    unpad: bool,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
) -> tuple[PackedBatch, BaseModelOutputWithPooling]:
    """The packed batch of `AlbertModel.forward`'s first five arguments, and the encoder's packed outputs."""
    input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = inputs
    batch, bias = model._packed_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, unpad)
    outputs = model._base(
        batch,
        bias,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
        return_dict=True,
    )
    return batch, outputs


def _extras(
    batch: PackedBatch, outputs: BaseModelOutputWithPooling, packed: bool
) -> dict[str, tuple[Tensor, ...] | None]:
    """hidden_states and attentions as the caller gets them."""
    if packed:
        return {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
    return pad_extras(batch, outputs)


def _masked_lm(
    head: AlbertMLMHead,
    batch: PackedBatch,
    outputs: BaseModelOutputWithPooling,
    labels: Tensor | None,
    return_logits: bool | None,
    packed: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Logits, if wanted, and the loss, if there are labels."""
    hidden = outputs.last_hidden_state
    assert hidden is not None
    loss = None if labels is None else head.loss(hidden, _packed_labels(batch, labels, packed))
    logits = None
    if labels is None if return_logits is None else return_logits:
        logits = head(hidden)
        logits = logits if packed else batch.pad(logits)
    return logits, loss


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy over the row [batch, seq]; a position outside it is ignored, as in transformers."""
    outside = logits.shape[1]
    return F.cross_entropy(logits, positions.view(-1).clamp(0, outside), ignore_index=outside)


def _packed_labels(batch: PackedBatch, labels: Tensor, packed: bool) -> Tensor:
    """Labels of the packed tokens [tokens]. A label in the padding has no hidden state, and is refused."""
    if packed:
        check(
            labels.shape == (batch.tokens,),
            f"labels is {describe(labels)}; [{batch.tokens}] was expected, one for each packed token",
        )
        return labels
    shape = (batch.batch_size, batch.seq_length)
    check(labels.shape == shape, f"labels is {describe(labels)}; {list(shape)} was expected, one for each token")
    result = batch.pack(labels, fill=IGNORE_INDEX)
    if batch.indices is not None and values_can_be_read(labels):
        lost = int((labels != IGNORE_INDEX).sum() - (result != IGNORE_INDEX).sum())
        check(
            lost == 0,
            f"labels has {lost} labels in the padding, where attention_mask is 0: set them to {IGNORE_INDEX}, or pass "
            "unpad=False to compute the padding as well",
        )
    return result
