"""Models as CUDA graphs: the kernels of a whole forward (or forward and backward) started by one call.

A batch of one short text is a few dozen kernels of a few microseconds each, and starting them one after the other costs
more than running them. A graph is recorded for fixed shapes: `graphed` has a set of them, pads each batch to the
smallest that holds it, and cuts the outputs. While a graph is recorded the models pack with fixed capacity
(`albert_fast.packing`): attention does no work for the padding, the matrix products do. Choose shapes near those of the
batches. Batches that fill a shape and come without a mask have a graph of their own, which packs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from albert_fast import backends
from albert_fast.heads import AlbertForSequenceClassification
from albert_fast.model import AlbertPreTrainedModel
from albert_fast.ops.checks import check, check_tensor, describe
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX

DEFAULT_SHAPES = tuple((1, length) for length in (16, 32, 64, 128, 256, 512))

# What the places beyond the batch hold.
_FILL = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": IGNORE_INDEX}

_WARM_UPS = 3

# Fields of the outputs that have a place for each token beside those that are [batch, seq, …] by their dimensions.
_OF_TOKENS = ("last_hidden_state", "hidden_states", "start_logits", "end_logits")


def graphed(model: AlbertPreTrainedModel, shapes: Sequence[tuple[int, int]] = DEFAULT_SHAPES) -> GraphedModel:
    """`model` as CUDA graphs, one for each of `shapes`, recorded when it is first needed.

    Args:
        model: on a GPU. The graphs read its parameters where they lie: they follow optimizers, load_state_dict and
            every other edit in place; after `.to()` they are recorded again.
        shapes: (batch, length) of the graphs. A batch that none of them holds is refused: give it a shape.

    Returns:
        a module that is called as `model` is, with padded batches on the GPU. In eval mode, or without a gradient, it
        returns new tensors as `model` does. In training mode it returns the loss alone, whose backward is a graph, too:
        one backward for each forward, which adds to what the parameters' `grad` has. Dropout draws a new seed in each
        replay.

    Raises:
        ValueError: the model is not on a GPU, or no shape is given.
    """
    check(len(shapes) > 0, "shapes is empty; at least one (batch, length) was expected")
    check_on_gpu(model)
    longest = model.config.max_position_embeddings
    for batch, length in shapes:
        check(
            batch >= 1 and 1 <= length <= longest,
            f"shapes holds ({batch}, {length}); at least one row of 1 to {longest} tokens was expected",
        )
    return GraphedModel(model, shapes)


def check_on_gpu(model: AlbertPreTrainedModel) -> None:
    check(model.device.type == "cuda", f"model is on {model.device}; CUDA graphs need a GPU: model.to('cuda')")


class GraphedModel(nn.Module):
    """What `graphed` returns."""

    def __init__(self, model: AlbertPreTrainedModel, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.model = model
        self.shapes = sorted(shapes, key=lambda shape: shape[0] * shape[1])
        self._recorded: dict[tuple[object, ...], _Recorded] = {}
        self._places = _Places(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As the model's forward with a padded batch; `options` are its other arguments but tensors.

        Raises:
            ValueError, TypeError: an argument does not fit, or no shape holds the batch; the message names it.
        """
        check_tensor("input_ids", input_ids, (None, None), dtype=(torch.int64, torch.int32))
        model = self.model
        if self._places.changed():
            self._recorded.clear()
            self._places = _Places(model)
        check(input_ids.device == self._places.device, f"input_ids is on {input_ids.device}, the model elsewhere")
        batch, length = input_ids.shape
        of_rows, every_row_counts = self._of_rows(labels)
        shape = self._shape_for(batch, length, every_row_counts)
        if attention_mask is not None and attention_mask.dtype != input_ids.dtype:
            attention_mask = attention_mask != 0
        given = {
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "labels": labels,
        }
        tensors = {"input_ids": input_ids, **{name: t for name, t in given.items() if t is not None}}
        for name, tensor in tensors.items():
            rest = (model.config.num_labels,)[: tensor.dim() - 1] if name == "labels" and of_rows else (length,)
            check_tensor(name, tensor, (batch, *rest), like=input_ids)
        for name, value in options.items():
            check(
                not isinstance(value, Tensor),
                f"{name} is {describe(value) if isinstance(value, Tensor) else value}; a graph takes tensors as "
                "input_ids, attention_mask, token_type_ids, position_ids and labels only",
            )
        attentions = options.get("output_attentions")
        check(
            not (model.config.output_attentions if attentions is None else attentions),
            "output_attentions is True; the attention's probabilities come from the reference, which waits for values "
            "on the host: call the model itself for them",
        )
        training = model.training and torch.is_grad_enabled()
        check(not training or labels is not None, "labels is None; in training mode the graph computes the loss")
        # Whole rows and no mask: such a graph packs nothing.
        whole = attention_mask is None and (batch, length) == shape
        recorded = self._record(shape, whole, tensors, options, training)
        results = recorded(tensors, (batch, length))
        return results if training else _cut(results, batch, length, shape)

    def _of_rows(self, labels: Tensor | None) -> tuple[bool, bool]:
        """Whether the labels are rows' and not tokens', and whether none can be ignored: a class in a row beyond the
        batch's can, a number to be met cannot."""
        if labels is None:
            return False, False
        numbers = labels.is_floating_point()
        if labels.dim() == 2 and isinstance(self.model, AlbertForSequenceClassification):
            check(numbers, f"labels is {describe(labels)}; floating-point numbers were expected for several a row")
        of_rows = numbers or labels.dim() == 1
        return of_rows, of_rows and (numbers or self.model.config.num_labels == 1)

    def _shape_for(self, batch: int, length: int, every_row_counts: bool) -> tuple[int, int]:
        for rows, columns in self.shapes:
            if (batch == rows if every_row_counts else batch <= rows) and length <= columns:
                return rows, columns
        check(
            not every_row_counts,
            f"labels holds numbers that {batch} rows of {length} tokens are to meet, and no shape of {self.shapes} has "
            f"exactly {batch} rows for them: rows beyond the batch's would count in the loss, too. Give graphed() one "
            "that does, or leave the last, smaller batch to the model itself",
        )
        raise ValueError(
            f"input_ids has {batch} rows of {length} and no shape of {self.shapes} holds them: "
            "give graphed() a larger one, or split the batch"
        )

    def _record(
        self, shape: tuple[int, int], whole: bool, tensors: dict[str, Tensor], options: dict[str, Any], training: bool
    ) -> _Recorded:
        model = self.model
        device = self._places.device.type
        # A mask that is not given is one of ones, or none.
        kinds = tuple((name, t.dtype, t.dim()) for name, t in tensors.items() if name != "attention_mask")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (shape, whole, kinds, tuple(sorted(options.items())), self._places.modes(training), autocast)
        if key not in self._recorded:
            self._recorded[key] = _Recorded(model, shape, whole, tensors, options, training)
        return self._recorded[key]


class _Places:
    """Where all parameters and buffers of a model lie, and what they are used for. Each call asks whether they still
    do: a walk through the modules would take longer than the kernels of a short text."""

    def __init__(self, model: AlbertPreTrainedModel) -> None:
        self.device = model.device
        self._modules = [*model.modules()]
        self._holders: list[Mapping[str, Any]] = [
            names for module in self._modules for names in (module._modules, module._parameters, module._buffers)
        ]
        found = [(names, name, value) for names in self._holders for name, value in names.items()]
        self._counts = [*map(len, self._holders)]
        self._others = [(names, name) for names, name, value in found if not isinstance(value, Tensor)]
        self._values = [value for _, _, value in found if not isinstance(value, Tensor)]  # modules, and None
        self._tensors = [(names, name) for names, name, value in found if isinstance(value, Tensor)]
        self._addresses = [value.data_ptr() for _, _, value in found if isinstance(value, Tensor)]

    def modes(self, training: bool) -> tuple[bool, ...]:
        """Which modules are in training mode; where gradients are asked for, of which tensors."""
        trained = [names[name].requires_grad for names, name in self._tensors] if training else []
        return (training, *[module.training for module in self._modules], *trained)

    def changed(self) -> bool:
        """Whether a tensor lies elsewhere, or there are other tensors or modules."""
        try:
            return (
                [names[name].data_ptr() for names, name in self._tensors] != self._addresses
                or [names[name] for names, name in self._others] != self._values
                or [*map(len, self._holders)] != self._counts
            )
        except (KeyError, AttributeError):  # one is gone, or None
            return True


class _Recorded:
    """A graph, and the tensors that it reads and writes."""

    def __init__(
        self,
        model: AlbertPreTrainedModel,
        shape: tuple[int, int],
        whole: bool,
        tensors: dict[str, Tensor],
        options: dict[str, Any],
        training: bool,
    ) -> None:
        self.fill = {name: _FILL[name] for name in ("attention_mask", *tensors)}
        self.fill["input_ids"] = model.config.pad_token_id or 0
        self.inputs = {
            name: tensor.new_full(
                (shape[0], *tensor.shape[1:]) if tensor.is_floating_point() else shape[: tensor.dim()], self.fill[name]
            )
            for name, tensor in tensors.items()
        }
        self.mask: Tensor | None = None
        if not whole:
            self.mask = self.inputs["attention_mask"] = tensors["input_ids"].new_zeros(shape)
            self.mask[:, 0] = 1  # what is run while it is recorded has a token in each row
        self.ones: tuple[int, int] | None = None  # rows and columns of the mask that are 1, where no other was given
        with backends.for_graphs(), _casts_not_kept(model.device):
            self.run = (_training_step if training else _inference)(model, self.inputs, options)

    def __call__(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Any:
        if "attention_mask" in tensors:
            self.ones = None
        elif self.mask is not None and self.ones != shape:
            self.mask.zero_()
            self.mask[: shape[0], : shape[1]] = 1
            self.ones = shape
        parts = []
        for name, tensor in tensors.items():
            static = self.inputs[name]
            if tensor.shape != static.shape:
                static.fill_(self.fill[name])
                static = static[tuple(slice(size) for size in tensor.shape)]
            parts.append(static)
        torch._foreach_copy_(parts, list(tensors.values()))
        return self.run()


def _casts_not_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast keeps parameters that it has cast until its end: a graph would read these, not the parameters."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)


def _inference(model: AlbertPreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any]) -> Callable[[], Any]:
    """Replays the forward; the outputs lie in the graph's own memory."""
    with torch.no_grad(), torch.cuda.device(model.device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # handles, workspaces and tuning come before the recording
            for _ in range(_WARM_UPS):
                model(**inputs, **options, return_dict=True)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = model(**inputs, **options, return_dict=True)

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _training_step(
    model: AlbertPreTrainedModel, inputs: dict[str, Tensor], options: dict[str, Any]
) -> Callable[[], Any]:
    """Replays forward, and in the loss's backward that."""

    class Loss(nn.Module):
        """PyTorch's recorder takes a module of tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> Tensor:
            named = dict(zip(inputs, tensors, strict=True))
            return self.model(**named, **options, return_dict=True).loss

    arguments = tuple(inputs.values())
    with torch.cuda.device(model.device):
        step = torch.cuda.make_graphed_callables(Loss(), arguments, num_warmup_iters=_WARM_UPS, allow_unused_input=True)

    def replay() -> Tensor:
        loss = cast(Tensor, step(*arguments))
        if loss.grad_fn is not None:
            loss.grad_fn.register_hook(_in_own_memory)
        return loss.clone()

    return replay


def _in_own_memory(gradients: Sequence[Tensor | None], _: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Autograd would make the graph's memory the parameters' `grad`, and the next replay writes into that: what was in
    it would be lost."""
    found = [gradient for gradient in gradients if gradient is not None]
    copies = [torch.empty_like(gradient) for gradient in found]
    torch._foreach_copy_(copies, found)
    left = iter(copies)
    return tuple(gradient if gradient is None else next(left) for gradient in gradients)


def _cut(outputs: Any, rows: int, columns: int, shape: tuple[int, int]) -> Any:
    """The part of the outputs that belongs to the batch, in memory of its own."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(name, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 0 or (rows, columns) == shape:
            return value.clone()
        of_tokens = name in _OF_TOKENS or (value.dim() == 3 and value.shape[:2] == shape)
        return value[:rows, :columns].clone() if of_tokens else value[:rows].clone()

    return type(outputs)(**{name: cut(name, value) for name, value in vars(outputs).items()})
