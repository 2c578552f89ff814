"""Cut cross-entropy (Wijmans et al., arXiv 2411.09009): the loss without logits in memory, for GPUs."""

from __future__ import annotations

from torch import Tensor

from albert_fast.bench.peers.operations import OperationPeer


class CutCrossEntropy(OperationPeer):
    name = "cut-cross-entropy"
    packages = ("cut_cross_entropy",)
    install = "cut-cross-entropy"
    dtypes = ("bfloat16", "float16")
    devices = ("cuda",)

    def masked_lm_loss(self, x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(x, table, labels, bias=bias, ignore_index=-100)
