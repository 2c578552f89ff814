"""transformers' AlbertTransformer with this package's encoder inside: what `accelerate` makes of it.

The class takes the place of transformers' under its own name; it has no state but `_albert_fast`, which says how the
model was accelerated. A call that the guards refuse is transformers' own, to the bit.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert import modeling_albert

from albert_fast import ops
from albert_fast.hf import guards
from albert_fast.ops.checks import has_values
from albert_fast.packing import PackedBatch

IMPLEMENTATIONS = ("sdpa", "eager")


class Options(NamedTuple):
    """What `accelerate` was told; its docstring explains each."""

    unpad: str | bool = "auto"
    recompute: str = "none"
    strict: bool = False


# Who `explain` runs: receives each call's encoder and why it was refused, or None.
watcher: ContextVar[list[tuple[torch.nn.Module, str | None]] | None] = ContextVar("watcher", default=None)


class Rows(NamedTuple):
    """Where the tokens are, and what is added to the scores."""

    batch: PackedBatch
    bias: Tensor | None = None


class AlbertTransformer(modeling_albert.AlbertTransformer):
    _albert_fast: Options

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        found = self._refusal(kwargs) or self._rows(hidden_states, attention_mask, kwargs)
        refused = found if isinstance(found, str) else None
        if (watching := None if torch.compiler.is_compiling() else watcher.get()) is not None:
            watching.append((self, refused))
        if isinstance(found, Rows):
            return self._run(hidden_states, found)
        if self._albert_fast.strict:
            raise guards.NotAcceleratedError(
                f"transformers' own encoder would have to serve this call: {refused}. "
                "Mend that, or accelerate the model with strict=False"
            )
        return super().forward(hidden_states, attention_mask, **kwargs)

    def _refusal(self, kwargs: dict[str, Any]) -> str | None:
        implementation = self.config._attn_implementation
        if implementation not in IMPLEMENTATIONS:
            return f"attn_implementation is {implementation!r}; {' and '.join(IMPLEMENTATIONS)} are served"
        if kwargs.get("is_causal") or getattr(self.config, "is_causal", False):
            return "is_causal is set"
        if guards.wants_attentions():
            return "attentions are wanted, which the kernels do not have"
        return guards.refusal(self)

    def _rows(self, hidden_states: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Rows | str:
        """Which tokens there are; or why this cannot be said."""
        shape = (hidden_states.shape[0], hidden_states.shape[1])
        device = hidden_states.device
        packed = _packed_offsets(shape, kwargs, device)
        if packed is not None:
            if mask is not None:
                return "a mask beside packed rows"
            cu_seqlens, longest = packed
            return Rows(PackedBatch(cu_seqlens, longest, *shape))
        if mask is None:
            return Rows(PackedBatch.layout(shape, device))
        if mask.dim() != 4 or mask.shape[-2:] != (shape[1], shape[1]):
            return f"a mask of shape {list(mask.shape)}"
        if self._albert_fast.unpad is False or not has_values(hidden_states):
            return Rows(PackedBatch.layout(shape, device), _as_bias(mask, hidden_states))
        kept = mask if mask.dtype == torch.bool else mask == 0
        keys = kept[:, 0, 0]
        if not bool((kept == keys[:, None, None]).all()) or not (mask.dtype == torch.bool or _is_blocking(mask, kept)):
            return "a mask that does more than leave out padding"
        return Rows(PackedBatch.layout(shape, device, keys.expand(shape)))

    def _run(self, hidden_states: Tensor, rows: Rows) -> BaseModelOutput:
        config, batch = self.config, rows.batch
        layer = guards.layers_of(self)[0]
        hidden_p = layer.attention.output_dropout.p if self.training else 0.0
        attention_p = layer.attention.attention_dropout.p if self.training else 0.0
        seed = None
        if hidden_p or attention_p:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=hidden_states.device)
        return_all = guards.wants_hidden_states()
        output = ops.encoder(
            self.embedding_hidden_mapping_in(batch.pack(hidden_states)),
            guards.parameters_of(self),
            batch.cu_seqlens,
            batch.max_seqlen,
            num_layers=config.num_hidden_layers,
            num_groups=config.num_hidden_groups,
            inner_group_num=config.inner_group_num,
            num_heads=config.num_attention_heads,
            activation=config.hidden_act,
            eps=layer.attention.LayerNorm.eps,
            hidden_dropout_p=hidden_p,
            attention_dropout_p=attention_p,
            seed=seed,
            bias=rows.bias,
            recompute=self._albert_fast.recompute,
            return_all=return_all,
        )
        if not return_all:
            return BaseModelOutput(last_hidden_state=batch.pad(output))
        states = torch.stack([batch.pad(state) for state in output])
        guards.show_hidden_states(self, states)
        return BaseModelOutput(last_hidden_state=states[-1])


def _packed_offsets(shape: tuple[int, int], kwargs: dict[str, Any], device: torch.device) -> tuple[Tensor, int] | None:
    """Of rows that lie one after the other in one: from cu_seq_lens_q, or from positions that begin anew."""
    cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int32), shape[1] if longest is None else int(longest)
    positions = kwargs.get("position_ids")
    if positions is None or shape[0] != 1 or not has_values(positions):
        return None
    positions = positions.flatten()
    begins = positions == 0
    steps = positions[1:] - positions[:-1] == 1
    if not bool(begins[:1].all()) or not bool((begins[1:] | steps).all()) or int(begins.sum()) < 2:
        return None
    starts = begins.nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([shape[1]])]).to(device, torch.int32)
    return cu_seqlens, int((cu_seqlens[1:] - cu_seqlens[:-1]).max())


def _as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """transformers' mask as numbers that are added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, float("-inf"))
    return mask


def _is_blocking(mask: Tensor, kept: Tensor) -> bool:
    """Whether what is added is either nothing or the least number there is."""
    return bool((mask[~kept] <= torch.finfo(mask.dtype).min).all())
