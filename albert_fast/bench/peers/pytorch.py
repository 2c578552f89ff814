"""The operations as one writes them in PyTorch: padded attention, and logits of every token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast.bench.peers.operations import OperationPeer


class PyTorch(OperationPeer):
    name = "pytorch"

    def attention(self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        query, key, value = qkv.unbind(1)
        return self.cross_attention(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    def cross_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Tensor:
        places_q, places_k = _places(cu_seqlens_q, max_seqlen_q), _places(cu_seqlens_k, max_seqlen_k)
        q = _pad(query, places_q).transpose(1, 2)
        k, v = (_pad(x, places_k).transpose(1, 2) for x in (key, value))
        # Full rows need no mask, for which PyTorch has no flash kernel.
        mask = None if key.shape[0] == places_k.numel() else places_k[:, None, None, :]
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        output = output.flatten(0, 1) if query.shape[0] == places_q.numel() else output[places_q]
        return output.flatten(1)

    def masked_lm_loss(self, x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, table, bias).float(), labels, ignore_index=-100)

    def dropout_add_layer_norm(
        self, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor, eps: float
    ) -> Tensor:
        return F.layer_norm(residual + (x + bias), weight.shape, weight, ln_bias, eps)

    def bias_gelu(self, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        return F.gelu(x + bias, approximate=approximate)

    def embed_layer_norm(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        word: Tensor,
        position: Tensor,
        token_type: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> Tensor:
        words, types = F.embedding(inputs, word), F.embedding(token_type_ids, token_type)
        summed = words + types + F.embedding(position_ids, position)
        return F.layer_norm(summed, weight.shape, weight, bias, eps)


def _places(cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """[rows, max_seqlen], true where there is a token."""
    return torch.arange(max_seqlen, device=cu_seqlens.device) < cu_seqlens.diff()[:, None]


def _pad(x: Tensor, places: Tensor) -> Tensor:
    """[tokens, heads, head_dim] -> [rows, max_seqlen, heads, head_dim]; a view where all places are taken."""
    if x.shape[0] == places.numel():
        return x.unflatten(0, tuple(places.shape))
    return x.new_zeros(*places.shape, *x.shape[1:]).index_put((places,), x)
