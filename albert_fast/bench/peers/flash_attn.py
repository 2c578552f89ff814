"""flash-attn's kernels for rows without padding, for GPUs."""

from __future__ import annotations

from torch import Tensor

from albert_fast.bench.peers.operations import OperationPeer


class FlashAttn(OperationPeer):
    name = "flash-attn"
    packages = ("flash_attn",)
    install = "flash-attn"
    dtypes = ("bfloat16", "float16")
    devices = ("cuda",)

    def attention(self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        from flash_attn import flash_attn_varlen_qkvpacked_func

        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen).flatten(1)

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
        from flash_attn import flash_attn_varlen_func

        rows = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flash_attn_varlen_func(query, key, value, *rows).flatten(1)
