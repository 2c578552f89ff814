"""This package, and this package in plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from albert_fast import AlbertForMaskedLM, backends
from albert_fast.bench.data import Batch
from albert_fast.bench.peers.base import TorchPeer
from albert_fast.config import AlbertConfig

_FORCED = "ALBERT_FAST_BACKEND"


@contextmanager
def forced_backend(name: str | None) -> Iterator[None]:
    """The package's operations are served by backend `name`; None: as the environment says."""
    before = os.environ.get(_FORCED)
    if name is not None:
        os.environ[_FORCED] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(_FORCED)
            if before is not None:
                os.environ[_FORCED] = before


def serving_backends(config: AlbertConfig, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """For each of the package's operations, which backend serves it in a model of this shape."""
    head_dim = config.hidden_size // config.num_attention_heads
    return {
        operation: backends.choose(backends.Call(operation, device, dtype, head_dim, config.hidden_act)).name
        for operation in backends.OPERATIONS
    }


class AlbertFast(TorchPeer):
    """This package, with the best backend that serves here (or the one that ALBERT_FAST_BACKEND names)."""

    name = "albert_fast"
    backend: str | None = None
    dtypes = (*TorchPeer.dtypes, "int8")

    def module(self, config: AlbertConfig) -> torch.nn.Module:
        return AlbertForMaskedLM(config)

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        super().build(config, state_dict, dtype, device, batch)
        if dtype == "int8":
            self.model.quantize()

    def inference(self, batch: Batch) -> Tensor:
        with forced_backend(self.backend):
            return super().inference(batch)

    def loss_and_gradients(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        with forced_backend(self.backend):
            return super().loss_and_gradients(batch, scale)


class Reference(AlbertFast):
    name = "reference"
    backend = "reference"
    dtypes = ("float64", *AlbertFast.dtypes)
