"""What a peer is: one implementation of ALBERT that can be measured beside the others."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from albert_fast.bench.data import Batch
from albert_fast.bench.formats import FORMATS, Format
from albert_fast.config import AlbertConfig


def missing(packages: tuple[str, ...], install: str | None = None) -> str | None:
    """Which of them cannot be imported, in one line that says how to mend it; `install` None: by their own names."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed: pip install {install or ' '.join(absent)}" if absent else None


class Participant:
    """Who is measured, be it a whole model (`Peer`) or single operations (`OperationPeer`).

    Attributes:
        name: in the table and in the report.
        packages: what must be importable; `install` is what pip is to be given for it, their own names when None.
        modes, dtypes, devices: what it can be asked for.
    """

    name: str
    packages: tuple[str, ...] = ()
    install: str | None = None
    modes: tuple[str, ...] = ("inference", "training")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    devices: tuple[str, ...] = ("cpu", "cuda")

    def refuses(self, mode: str, dtype: str, device: str) -> str | None:
        """Why it has no part in such work here, in one line; None where it has."""
        for asked, known in ((device, self.devices), (mode, self.modes), (dtype, self.dtypes)):
            if asked not in known:
                return f"it has {', '.join(known)}, not {asked}"
        return missing(self.packages, self.install)


class Peer(Participant, ABC):
    """One implementation of a masked language model whose parameters have transformers' names.

    Of its dtypes "int8" is for weights and activations of the encoder's products, all else in float32; "autocast" for
    float32 weights under torch.autocast to bfloat16.
    """

    def refuses(self, mode: str, dtype: str, device: str) -> str | None:
        trains_in_int8 = (mode, dtype) == ("training", "int8")
        return super().refuses(mode, dtype, device) or ("int8 is for inference" if trains_in_int8 else None)

    @abstractmethod
    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        """Makes the model with copies of these float32 weights, in training mode where it has one.

        `batch` is what it will be given: for implementations that are traced, or calibrated.
        """

    @abstractmethod
    def inference(self, batch: Batch) -> Tensor:
        """The encoder's last hidden states [batch, seq, hidden]; anything in the padding."""

    def loss_and_gradients(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of the labelled tokens, and `scale` times its gradient for each parameter by name.

        A parameter without a gradient is left out.
        """
        raise NotImplementedError(f"{self.name} does not train")


class TorchPeer(Peer):
    """A peer that is a PyTorch module.

    Attributes:
        model: what `build` made.
        numbers: what it computes with.
    """

    dtypes = (*Peer.dtypes, "autocast")
    model: Any
    numbers: Format

    @abstractmethod
    def module(self, config: AlbertConfig) -> torch.nn.Module:
        """The model, with any weights."""

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        self.numbers = FORMATS[dtype]
        self.model = self.module(config).to(device, self.numbers.weights)
        self.model.load_state_dict(state_dict)
        self.model.train()

    def inference(self, batch: Batch) -> Tensor:
        with torch.inference_mode(), self.numbers.forward(batch.input_ids.device):
            return self.model.albert(**batch.inputs()).last_hidden_state

    def loss_and_gradients(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        self.model.zero_grad(set_to_none=True)
        with self.numbers.forward(batch.input_ids.device):
            loss = self.loss(batch)
        (loss * scale if scale != 1.0 else loss).backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return loss.detach(), gradients

    def loss(self, batch: Batch) -> Tensor:
        return self.model(**batch.inputs(), labels=batch.labels).loss


def call(peer: Peer, batch: Batch, mode: str) -> object:
    """The work that is timed: a forward for "inference", the loss and all gradients for "training"."""
    return peer.inference(batch) if mode == "inference" else peer.loss_and_gradients(batch)
