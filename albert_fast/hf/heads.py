"""What is different around the calls of transformers' head models: losses, and answers in the padding.

Their class must stay, so hooks go around their call, and a `Call` travels with the other arguments to the encoder, on
its output to the masked-LM head, and out again:

- The masked-LM loss: the labels' place is empty during the call; the head computes the loss of the labelled positions
  from packed hidden states, inside of whatever autocast there is; the hook after the call puts it into the output.
  Where the way is broken (a module in between was replaced, a guard refused) it computes transformers' own loss from
  the logits that came; where a `Call` cannot go at all, transformers does.
- `num_items_in_batch`: Trainer gives the number of labels over all accumulation steps, and then divides nothing. Each
  loss becomes the sum over its labels by that number. transformers' heads ignore it, so that with four steps the
  gradient is four times too large (transformers issue 47688).
- Answers: a softmax over all positions must not see those that were left out.

In transformers 4 a head model takes no further arguments: there, answers alone are looked after.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.models.albert import modeling_albert

from albert_fast import ops
from albert_fast.hf import guards
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.packing import PackedBatch

_MLM_HEADS = (modeling_albert.AlbertForMaskedLM, modeling_albert.AlbertForPreTraining)
_LABELLED_HEADS = (
    modeling_albert.AlbertForSequenceClassification,
    modeling_albert.AlbertForTokenClassification,
    modeling_albert.AlbertForMultipleChoice,
)
_ANSWERING_HEAD = modeling_albert.AlbertForQuestionAnswering
# The names of what they are called with, in their order.
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    head: tuple(name for name in inspect.signature(head.forward).parameters if name not in ("self", "kwargs"))
    for head in (*_MLM_HEADS, *_LABELLED_HEADS, _ANSWERING_HEAD)
}


class Call:
    """One call of a head model, on its way through it.

    Attributes:
        labels: [batch, seq] of a masked-LM head, or None.
        num_items: what the sum of the losses is divided by; None: the number of labels.
        as_dict: `return_dict` of the call; None where it says nothing of it.
        batch, padded: where the encoder's tokens are, and its output; None until there is one.
        loss: once the masked-LM head has computed it.
    """

    _NAME = "albert_fast_call"

    def __init__(self, labels: Tensor | None, num_items: Tensor | int | None, as_dict: bool | None) -> None:
        self.labels, self.num_items, self.as_dict = labels, num_items, as_dict
        self.batch: PackedBatch | None = None
        self.padded: Tensor | None = None
        self.loss: Tensor | None = None

    def among(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, self._NAME: self}

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Call | None:
        return kwargs.get(cls._NAME)

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> Call | None:
        return kwargs.pop(cls._NAME, None)

    def goes_with(self, padded: Tensor, batch: PackedBatch) -> None:
        """Ties itself to the encoder's output: whoever puts another tensor in its place cuts the way."""
        self.ends()  # on an earlier output of the same call
        self.batch, self.padded = batch, padded
        setattr(padded, self._NAME, self)

    def ends(self) -> None:
        """Nothing of it stays on the tensor, which the caller may have received."""
        if self.padded is None:
            return
        if torch.compiler.is_compiling():  # which cannot delete it
            setattr(self.padded, self._NAME, None)
        else:
            delattr(self.padded, self._NAME)
        self.padded = None

    @classmethod
    def that_came_with(cls, padded: Tensor) -> Call | None:
        return getattr(padded, cls._NAME, None)

    def part_of_the_whole(self, mean: Tensor, labels: Tensor) -> Tensor:
        """What a mean over these labels adds to the mean over the labels of all steps."""
        return mean if self.num_items is None else mean * (labels != IGNORE_INDEX).sum() / self.num_items


class AlbertMLMHead(modeling_albert.AlbertMLMHead):
    """transformers' head on the packed tokens, with the loss where there are labels."""

    _albert_fast: Any

    def forward(self, hidden_states: Tensor) -> Any:
        call = Call.that_came_with(hidden_states)
        if call is None:
            return super().forward(hidden_states)
        if (refusal := guards.refusal_of_mlm_head(self)) is not None:
            if self._albert_fast.strict:
                raise guards.NotAcceleratedError(
                    f"transformers' own masked-LM head would have to serve this call: {refusal}. "
                    "Mend that, or accelerate the model with strict=False"
                )
            return super().forward(hidden_states)
        batch = call.batch
        assert batch is not None
        # Not the tokens that the encoder had: what was done to its output in place, or hung on it, counts.
        x = self.LayerNorm(self.activation(self.dense(batch.pack(hidden_states))))
        if call.labels is not None:
            labels = batch.pack(call.labels.reshape(batch.batch_size, batch.seq_length)).to(torch.int64)
            call.loss = self._loss(x, labels, call.num_items)
            if self._albert_fast.skip_logits:
                return None
        return batch.pad(self.decoder(x))

    def _loss(self, x: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        arguments = (x, self.decoder.weight, self.decoder.bias, labels)
        if num_items is None:
            return ops.masked_lm_loss(*arguments, ignore_index=IGNORE_INDEX)
        return ops.masked_lm_loss(*arguments, ignore_index=IGNORE_INDEX, reduction="sum") / num_items


# ------------------------------------------------------------------------------------------------------------ the hooks


def surround(model: nn.Module, unpad: str | bool) -> list[Any]:
    """Puts the hooks around the calls of a head model.

    Args:
        model: any module.
        unpad: of `accelerate`: with False no position is left out.

    Returns:
        The hooks' handles; none where there is nothing to put them around.
    """
    head = head_of(model)
    if head is None or (head is _ANSWERING_HEAD and unpad is False):
        return []
    if head is _ANSWERING_HEAD:
        after = _leave_out_padding
    elif guards.TRANSFORMERS_5:
        after = _give_loss if head in _MLM_HEADS else _scale_loss
    else:
        return []
    # Before hooks that were there: what they see is what transformers would have given.
    hooks = [model.register_forward_hook(after, with_kwargs=True, prepend=True)]
    if guards.TRANSFORMERS_5:
        hooks.append(model.register_forward_pre_hook(_begin, with_kwargs=True))
    return hooks


def head_of(model: Any) -> type[nn.Module] | None:
    """Which head's forward the model has. A subclass with one of its own computes what it likes."""
    return next((head for head in _ARGUMENTS if isinstance(model, head) and type(model).forward is head.forward), None)


def _named(head: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_ARGUMENTS[head], args, strict=False)), **kwargs}


def _begin(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    head = head_of(model)
    assert head is not None
    named = _named(head, args, kwargs)
    if len(named) < len(args) + len(kwargs):
        return args, kwargs  # the call will fail, and say why
    if not _takes_more(model.albert):
        return args, kwargs  # the loss is transformers' own
    labels = None
    if head in _MLM_HEADS:
        labels = named.get("labels")
        # Other hooks find each argument where it was.
        args = tuple(None if name == "labels" else value for name, value in zip(_ARGUMENTS[head], args, strict=False))
        kwargs = {name: None if name == "labels" else value for name, value in kwargs.items()}
    if head is modeling_albert.AlbertForPreTraining and named.get("sentence_order_label") is None:
        labels = None  # transformers has no loss without both
    call = Call(labels, named.get("num_items_in_batch"), named.get("return_dict"))
    return args, call.among({**kwargs, "return_dict": True})


def _takes_more(base: nn.Module) -> bool:
    """Whether a `Call` may go through it: a module that somebody put around the AlbertModel may not pass it on."""
    if type(base).forward is modeling_albert.AlbertModel.forward and "forward" not in base.__dict__:
        return True
    parameters = inspect.signature(base.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _end(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call | None, dict[str, Any]]:
    """The call that `_begin` began, and its arguments by name."""
    call = Call.of(kwargs)
    if call is not None:
        call.ends()
    return call, _named(head_of(model), args, kwargs)


def _give_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call, named = _end(model, args, kwargs)
    if call is None:
        return output
    if call.labels is None:
        return _as_wanted(model, call.as_dict, output)
    loss = call.loss
    if loss is None:
        logits = output["logits" if "logits" in output else "prediction_logits"]
        loss = call.part_of_the_whole(_mean(logits, call.labels), call.labels)
    if (order := named.get("sentence_order_label")) is not None:
        # How many rows all steps have is not known: a step's share of them is taken for that of the labels.
        loss = loss + call.part_of_the_whole(_mean(output["sop_logits"], order), call.labels)
    return _as_wanted(model, call.as_dict, output, loss=loss)


def _scale_loss(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call, named = _end(model, args, kwargs)
    if call is None:
        return output
    labels = named.get("labels")
    changes = {} if labels is None else {"loss": call.part_of_the_whole(output["loss"], labels)}
    return _as_wanted(model, call.as_dict, output, **changes)


def _leave_out_padding(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """An answer cannot begin or end in the padding, whether that was computed or not."""
    call, named = _end(model, args, kwargs)
    mask = named.get("attention_mask")
    as_dict = named.get("return_dict") if call is None else call.as_dict
    if mask is None or mask.dim() != 2:
        return _as_wanted(model, as_dict, output)
    starts, ends = named.get("start_positions"), named.get("end_positions")
    has_loss = starts is not None and ends is not None
    if isinstance(output, tuple):  # transformers 4
        names = ("loss", "start_logits", "end_logits", "hidden_states", "attentions")
        output = QuestionAnsweringModelOutput(**dict(zip(names if has_loss else names[1:], output, strict=False)))
    least = torch.finfo(output["start_logits"].dtype).min
    start, end = (output[f"{name}_logits"].masked_fill(mask == 0, least) for name in ("start", "end"))
    changes = {"start_logits": start, "end_logits": end}
    if starts is not None and ends is not None:
        changes["loss"] = (_of_answers(start, starts, mask) + _of_answers(end, ends, mask)) / 2
    return _as_wanted(model, as_dict, output, **changes)


def _as_wanted(model: Any, as_dict: bool | None, output: Any, **changes: Tensor) -> Any:
    """The output with changes: with the fields in their order, or a tuple of them."""
    if changes:
        output = type(output)(**{**output, **changes})
    as_dict = model.config.return_dict if as_dict is None else as_dict
    return output if as_dict or isinstance(output, tuple) else output.to_tuple()


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX)


def _of_answers(logits: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """As transformers, where positions beyond the text are not counted; nor are those in the padding. 0 without any."""
    beyond = logits.shape[1]
    positions = positions.flatten().clamp(0, beyond)
    counts = F.pad(mask != 0, (0, 1)).gather(1, positions[:, None])[:, 0]
    loss = F.cross_entropy(logits, positions.masked_fill(~counts, beyond), ignore_index=beyond, reduction="sum")
    return loss / counts.sum().clamp(min=1)
