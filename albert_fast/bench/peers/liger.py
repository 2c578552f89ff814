"""Liger's Triton kernels, for GPUs."""

from __future__ import annotations

from torch import Tensor

from albert_fast.bench.peers.operations import OperationPeer


class Liger(OperationPeer):
    name = "liger"
    packages = ("liger_kernel",)
    install = "liger-kernel"
    devices = ("cuda",)

    def masked_lm_loss(self, x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(x, table, labels, bias, ignore_index=-100)

    def dropout_add_layer_norm(
        self, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor, eps: float
    ) -> Tensor:
        from liger_kernel.transformers.functional import liger_layer_norm

        return liger_layer_norm(residual + (x + bias), weight, ln_bias, eps)
