"""Who is measured. To add one: a class with a name, `available` and `build`, and a line in `PEERS`."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from albert_fast import AlbertForMaskedLM, backends
from albert_fast.bench.data import Batch
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


class Peer(ABC):
    """One implementation of a masked language model whose parameters have transformers' names.

    Attributes:
        name: in the table and in the report.
        backend: the package's backend while the peer runs; None where that is nothing to it.
        model: what `build` made.
    """

    name: str
    backend: str | None = None
    model: Any

    def available(self) -> str | None:
        """Why it cannot run here, in one line that says how to mend it; None where it can."""
        return None

    @abstractmethod
    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Makes the model with copies of these weights, in training mode."""

    def inference(self, batch: Batch) -> Tensor:
        """The encoder's last hidden states [batch, seq, hidden]; anything in the padding."""
        with forced_backend(self.backend), torch.inference_mode():
            return self.model.albert(**batch.inputs()).last_hidden_state

    def loss_and_gradients(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the labelled tokens, and `scale` times its gradient for each parameter by name.

        A parameter without a gradient is left out.
        """
        with forced_backend(self.backend):
            self.model.zero_grad(set_to_none=True)
            loss = self.model(**batch.inputs(), labels=batch.labels).loss
            (loss * scale if scale != 1.0 else loss).backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients


class AlbertFast(Peer):
    """This package, with the best backend that serves here (or the one that ALBERT_FAST_BACKEND names)."""

    name = "albert_fast"

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = AlbertForMaskedLM(config).to(device, dtype)
        self.model.load_state_dict(state_dict)
        self.model.train()


class Reference(AlbertFast):
    """This package in plain PyTorch."""

    name = "reference"
    backend = "reference"


class Transformers(Peer):
    """transformers' AlbertForMaskedLM, with one of its implementations of attention."""

    attention: str

    def available(self) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "transformers is not installed: pip install 'albert_fast[bench]'"
        return None

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        import transformers

        values = {key: value for key, value in config.to_dict().items() if key != "dtype"}
        theirs = transformers.AlbertConfig.from_dict(values)
        theirs._attn_implementation = self.attention
        self.model = torch.nn.Module.to(transformers.AlbertForMaskedLM(theirs), device, dtype)
        self.model.load_state_dict(state_dict)
        self.model.train()


class TransformersEager(Transformers):
    name = "transformers-eager"
    attention = "eager"


class TransformersSdpa(Transformers):
    name = "transformers-sdpa"
    attention = "sdpa"


def call(peer: Peer, batch: Batch, mode: str) -> object:
    """The work that is timed: a forward for "inference", the loss and all gradients for "training"."""
    return peer.inference(batch) if mode == "inference" else peer.loss_and_gradients(batch)


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (AlbertFast, Reference, TransformersEager, TransformersSdpa)
}
