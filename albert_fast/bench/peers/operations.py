"""What a peer of single operations is; and this package as one, with its own kernels and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from albert_fast import ops
from albert_fast.bench.peers.albert_fast import forced_backend
from albert_fast.bench.peers.base import Participant


class OperationPeer(Participant):
    """Implementations of operations of `albert_fast.ops`: a method for each that it has, under the operation's name.

    A method takes the operation's tensors and options by name, as `albert_fast.ops` does (no dropout), and gives the
    same output, through which autograd finds its way where gradients are measured.
    """

    def run(self, operation: str, arguments: dict[str, Any]) -> Tensor:
        """One call."""
        return getattr(self, operation)(**arguments)


class AlbertFastOperations(OperationPeer):
    """This package, with the best backend that serves here (or the one that ALBERT_FAST_BACKEND names)."""

    name = "albert_fast"
    attention: Callable[..., Tensor] = staticmethod(ops.attention)
    cross_attention: Callable[..., Tensor] = staticmethod(ops.cross_attention)
    encoder: Callable[..., Tensor] = staticmethod(ops.encoder)
    masked_lm_loss: Callable[..., Tensor] = staticmethod(ops.masked_lm_loss)
    dropout_add_layer_norm: Callable[..., Tensor] = staticmethod(ops.dropout_add_layer_norm)
    bias_gelu: Callable[..., Tensor] = staticmethod(ops.bias_gelu)
    embed_layer_norm: Callable[..., Tensor] = staticmethod(ops.embed_layer_norm)


class ReferenceOperations(AlbertFastOperations):
    """The same in plain PyTorch: what every figure of this package is held against."""

    name = "reference"
    dtypes = ("float64", *AlbertFastOperations.dtypes)

    def run(self, operation: str, arguments: dict[str, Any]) -> Tensor:
        with forced_backend("reference"):
            return super().run(operation, arguments)
