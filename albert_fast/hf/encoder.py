"""transformers' AlbertTransformer with this package's encoder inside: what `accelerate` makes of it.

The class takes the place of transformers' under its own name; it has no state but `_albert_fast`, which says how the
model was accelerated. A call that the guards refuse runs through transformers' own layers, with the same zeros in the
padding.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert import modeling_albert

from albert_fast import inference, ops
from albert_fast.hf import guards
from albert_fast.hf.heads import Call
from albert_fast.hf.packed import packed_offsets
from albert_fast.ops.checks import has_values
from albert_fast.ops.encoder import TENSORS_PER_LAYER, EncoderOptions
from albert_fast.packing import PackedBatch


class Options(NamedTuple):
    """What `accelerate` was told; its docstring explains each."""

    unpad: str | bool = "auto"
    skip_logits: bool = False
    recompute: str = "none"
    strict: bool = False


# Who `explain` runs: receives each call's encoder and why it was refused, or None.
watcher: ContextVar[list[tuple[torch.nn.Module, str | None]] | None] = ContextVar("watcher", default=None)


class Rows(NamedTuple):
    """Where the tokens are, what is added to the scores, and whether rows lie one after the other in one."""

    batch: PackedBatch
    bias: Tensor | None = None
    are_packed: bool = False


class AlbertTransformer(modeling_albert.AlbertTransformer):
    _albert_fast: Options
    # transformers sets it in every module that has it: model.gradient_checkpointing_enable().
    gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        call = Call.taken_from(kwargs)
        rows = self._rows(hidden_states, attention_mask, kwargs)
        refused = self._refusal(args, kwargs) or (rows if isinstance(rows, str) else None)
        if (watching := None if torch.compiler.is_compiling() else watcher.get()) is not None:
            watching.append((self, refused))
        if refused is None:
            assert isinstance(rows, Rows)
            return self._run(hidden_states, rows, kwargs, call)
        if self._albert_fast.strict:
            raise guards.NotAcceleratedError(
                f"transformers' own encoder would have to serve this call: {refused}. "
                "Mend that, or accelerate the model with strict=False"
            )
        if isinstance(rows, Rows) and rows.are_packed and attention_mask is None:
            attention_mask = self._mask_between(rows.batch, hidden_states.dtype)
        output = super().forward(hidden_states, attention_mask, *args, **kwargs)
        return output if isinstance(rows, str) else _without_padding(output, rows.batch, call)

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        implementation = self.config._attn_implementation
        if implementation not in guards.IMPLEMENTATIONS:
            return f"attn_implementation is {implementation!r}; {', '.join(guards.IMPLEMENTATIONS)} are served"
        if kwargs.get("is_causal") or getattr(self.config, "is_causal", False):
            return "is_causal is set"
        if args or any(mask is not None for mask in kwargs.get("head_mask") or ()):  # transformers 4
            return "head_mask is set"
        if guards.wants_attentions(kwargs):
            return "attentions are wanted, which the kernels do not have"
        return guards.refusal(self)

    def _rows(self, hidden_states: Tensor, mask: Any, kwargs: dict[str, Any]) -> Rows | str:
        """Which tokens there are; or why this cannot be said."""
        shape = (hidden_states.shape[0], hidden_states.shape[1])
        device = hidden_states.device
        packed = packed_offsets(shape, kwargs, device)
        if packed is not None:
            if mask is not None:
                return "a mask beside packed rows"
            cu_seqlens, longest = packed
            return Rows(PackedBatch(cu_seqlens, longest, *shape), are_packed=True)
        if mask is None:
            return Rows(PackedBatch.layout(shape, device))
        if not isinstance(mask, Tensor):
            return f"a mask that is a {type(mask).__name__}"
        if mask.dim() == 2 and mask.shape == shape:
            mask = mask[:, None, None, :] != 0
        if mask.dim() != 4 or mask.shape[2] not in (1, shape[1]) or mask.shape[3] != shape[1]:
            return f"a mask of shape {list(mask.shape)}"
        if self._albert_fast.unpad is False or not has_values(hidden_states):
            return Rows(PackedBatch.layout(shape, device), as_bias(mask, hidden_states, shape[1]))
        kept = mask if mask.dtype == torch.bool else mask == 0
        keys = kept[:, 0, 0]
        if not bool((kept == keys[:, None, None]).all()) or not (mask.dtype == torch.bool or _is_blocking(mask, kept)):
            return "a mask that does more than leave out padding"
        return Rows(PackedBatch.layout(shape, device, keys.expand(shape)))

    def _mask_between(self, batch: PackedBatch, dtype: torch.dtype) -> Tensor | None:
        """What keeps packed rows apart in transformers' own attention, where it does not do that by itself."""
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            return None
        places = torch.arange(batch.tokens, device=batch.device)
        row = torch.searchsorted(batch.cu_seqlens[1:], places, right=True)
        same = (row[:, None] == row)[None, None]
        if implementation == "sdpa":
            return same
        return torch.zeros_like(same, dtype=dtype).masked_fill(~same, torch.finfo(dtype).min)

    def _run(self, hidden_states: Tensor, rows: Rows, kwargs: dict[str, Any], call: Call | None) -> Any:
        config, batch = guards.fields_of(self.config), rows.batch
        layer = guards.layers_of(self)[0]
        hidden_p = layer.attention.output_dropout.p if self.training else 0.0
        attention_p = layer.attention.attention_dropout.p if self.training else 0.0
        return_all = guards.wants_hidden_states(kwargs)
        options = EncoderOptions(
            num_layers=config["num_hidden_layers"],
            num_groups=config["num_hidden_groups"],
            inner_group_num=config["inner_group_num"],
            num_heads=config["num_attention_heads"],
            activation=config["hidden_act"],
            eps=layer.attention.LayerNorm.eps,
            hidden_dropout_p=hidden_p,
            attention_dropout_p=attention_p,
            seed=fresh_seed(hidden_p + attention_p, hidden_states.device),
            bias=rows.bias,
            recompute="layer" if self.gradient_checkpointing and self.training else self._albert_fast.recompute,
            return_all=return_all,
        )
        embedded, projection = batch.pack(hidden_states), self.embedding_hidden_mapping_in
        parameters = guards.parameters_of(self)
        found = inference.run(batch, embedded, None, projection, parameters, None, options)
        if found is not None:
            states = [batch.pad(found[0])]
        else:
            states = _states(projection(embedded), parameters, batch, options)
        padded = states[-1]
        if call is not None:
            call.goes_with(padded, batch)
        if guards.TRANSFORMERS_5:
            if return_all:
                guards.show_hidden_states(self, states)
            return BaseModelOutput(last_hidden_state=padded)
        # transformers 4 counts a group's layers as one.
        chosen = tuple(states[:: config["inner_group_num"]]) if return_all else None
        result = BaseModelOutput(last_hidden_state=padded, hidden_states=chosen)
        return result if kwargs.get("return_dict", True) else result.to_tuple()


def _states(hidden: Tensor, parameters: list[Tensor], batch: PackedBatch, options: EncoderOptions) -> list[Tensor]:
    """The passes' outputs, padded, each in memory of its own: the last alone or, with return_all, the first pass's
    input and the output of each."""
    rows = (batch.cu_seqlens, batch.max_seqlen)
    if not options.return_all:
        return [batch.pad(ops.encoder(hidden, parameters, *rows, **options._asdict()))]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (hidden, *parameters)):
        return [batch.pad(state.clone()) for state in ops.encoder(hidden, parameters, *rows, **options._asdict())]
    # Pass by pass: a gradient at a state is there only where the passes after it go on from that very tensor.
    states = [batch.pad(hidden)]
    for layer in options.layer_of_pass():
        own = parameters[layer * TENSORS_PER_LAYER : (layer + 1) * TENSORS_PER_LAYER]
        seed = fresh_seed(options.hidden_dropout_p + options.attention_dropout_p, hidden.device)
        one = options._replace(num_layers=1, num_groups=1, inner_group_num=1, return_all=False, seed=seed)
        states.append(batch.pad(ops.encoder(batch.pack(states[-1]), own, *rows, **one._asdict())))
    return states


def _without_padding(output: Any, batch: PackedBatch, call: Call | None) -> Any:
    """Who serves a call is not to be seen in it: zeros in the padding, and the way for the masked-LM head."""
    padded = output[0] if batch.indices is None else batch.pad(batch.pack(output[0]))
    if call is not None:
        call.goes_with(padded, batch)
    if padded is output[0]:
        return output
    if isinstance(output, tuple):  # transformers 4
        return (padded, *output[1:])
    return type(output)(**{**output, "last_hidden_state": padded})


def fresh_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A seed from PyTorch's generator, where there is something to drop."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device) if dropout_p else None


def as_bias(mask: Tensor, like: Tensor, length: int) -> Tensor:
    """A 4-D mask of transformers as numbers that are added to the scores, for `length` queries."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))
    return mask.expand(-1, -1, length, -1)


def _is_blocking(mask: Tensor, kept: Tensor) -> bool:
    """Whether what is added is either nothing or the least number there is."""
    return bool((mask[~kept] <= torch.finfo(mask.dtype).min).all())
