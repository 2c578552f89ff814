"""`attn_implementation="albert_fast"`: this package's attention in any bidirectional encoder of transformers.

Attention alone: the model around it stays transformers' own, so that this gains less than `accelerate` does for an
ALBERT. Keys and values in the padding are left out; queries there are computed, as transformers' sdpa does, so that
every position has the values it would have there.

transformers asks for a function and, under the same name, for one that makes its mask: without the second a model
gets no mask at all, and attends to padding in silence. Importing `albert_fast.hf` registers both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from albert_fast import ops
from albert_fast.hf.encoder import as_bias, fresh_seed
from albert_fast.hf.packed import packed_offsets
from albert_fast.ops.checks import check, describe, has_values
from albert_fast.packing import PackedBatch

NAME = "albert_fast"

# What transformers may hand to an attention, and this one has nothing for.
_NOT_SERVED = ("softcap", "position_bias", "s_aux", "cache")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it.

    Args:
        module: the attention's, asked for `is_causal` and `num_key_value_groups`.
        query: [batch, heads, seq, head_dim].
        key, value: [batch, heads / num_key_value_groups, keys, head_dim].
        attention_mask: None; [batch, keys], true or nonzero where there is no padding; or [batch or 1, heads or 1, seq
            or 1, keys or more], boolean (may attend) or added to the scores.
        dropout: of the probabilities.
        scaling: of the scores; head_dim ** -0.5 when None.
        is_causal: None: as the module says, where there is no mask.
        kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k or position_ids of rows that lie one after
            the other.

    Returns:
        [batch, seq, heads, head_dim], and None in place of the probabilities.

    Raises:
        ValueError: a mask does not fit, or something is wanted that this attention does not have.
    """
    for name in _NOT_SERVED:
        check(
            kwargs.get(name) is None,
            f"{name} was given, which attn_implementation={NAME!r} does not have: take 'sdpa' or 'eager'",
        )
    if torch.jit.is_tracing():  # which cannot record the operator
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    if is_causal is None:
        is_causal = attention_mask is None and length > 1 and getattr(module, "is_causal", False)
    queries = PackedBatch.layout((batch, length), query.device)
    layout, bias = PackedBatch.layout((batch, keys), query.device), None
    packed = packed_offsets((batch, length), kwargs, query.device) if attention_mask is None else None
    if packed is not None:
        queries = PackedBatch(*packed, batch, length)
        layout = _packed_keys(queries, keys, kwargs)
    elif attention_mask is not None and attention_mask.dim() == 2:
        layout = _without_padding(attention_mask, (batch, keys))
    elif attention_mask is not None:
        bias = as_bias(_checked(attention_mask, length, keys)[..., :keys], query, length)
    output = ops.cross_attention(
        queries.pack(query.transpose(1, 2)),
        layout.pack(key.transpose(1, 2)),
        layout.pack(value.transpose(1, 2)),
        queries.cu_seqlens,
        layout.cu_seqlens,
        queries.max_seqlen,
        layout.max_seqlen,
        causal=bool(is_causal),
        dropout_p=dropout,
        seed=fresh_seed(dropout, query.device),
        scale=scaling,
        bias=bias,
    )
    return output.view(batch, length, heads, head_dim), None


def _packed_keys(queries: PackedBatch, keys: int, kwargs: dict[str, Any]) -> PackedBatch:
    cu_seqlens, longest = kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_k")
    if cu_seqlens is None:
        check(
            keys == queries.seq_length, f"there are {keys} keys for packed rows of {queries.seq_length} queries in all"
        )
        return queries
    return PackedBatch(cu_seqlens.to(queries.device, torch.int32), int(longest or keys), queries.batch_size, keys)


def _without_padding(mask: Tensor, shape: tuple[int, int]) -> PackedBatch:
    """Where the real keys are. Found once for all layers: they are given the same mask."""
    known = getattr(mask, "_albert_fast_layout", None)
    if known is not None:
        return known
    check(tuple(mask.shape) == shape, f"attention_mask is {describe(mask)}; {list(shape)} was expected")
    if not has_values(mask):  # nothing may depend on how many there are
        return PackedBatch.layout(shape, mask.device, mask, capacity=shape[0] * shape[1])
    layout = PackedBatch.layout(shape, mask.device, mask)
    mask._albert_fast_layout = layout  # type: ignore[attr-defined]
    return layout


def _checked(mask: Tensor, length: int, keys: int) -> Tensor:
    fits = mask.dim() == 4 and mask.shape[2] in (1, length) and mask.shape[3] >= keys
    check(fits, f"attention_mask is {describe(mask)}; [batch, heads or 1, {length} or 1, {keys}] was expected")
    return mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """As transformers' models call it: the padding alone [batch, keys], or None without any, where every query may
    attend to every key; else the mask of sdpa."""
    padding_alone = _is_bidirectional(mask_function) and kwargs.get("allow_is_bidirectional_skip", True)
    if padding_alone and not torch.jit.is_tracing():
        if attention_mask is None:
            return None
        mask = attention_mask[:, -kv_length:] != 0
        return None if has_values(mask) and bool(mask.all()) else mask
    places = (batch_size, q_length, kv_length, q_offset, kv_offset)
    return sdpa_mask(*places, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _is_bidirectional(mask_function: Any) -> bool:
    try:
        from transformers.masking_utils import bidirectional_mask_function
    except ImportError:  # transformers 4 makes no masks of this kind by the interface
        return False
    return mask_function is bidirectional_mask_function


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
