"""transformers' AlbertForMaskedLM: with each of its implementations of attention, compiled, and accelerated."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from albert_fast.bench.data import Batch
from albert_fast.bench.peers.base import TorchPeer
from albert_fast.config import AlbertConfig


class Transformers(TorchPeer):
    packages = ("transformers",)
    attention: str

    def module(self, config: AlbertConfig) -> torch.nn.Module:
        import transformers

        values = {key: value for key, value in config.to_dict().items() if key != "dtype"}
        theirs = transformers.AlbertConfig.from_dict(values)
        theirs._attn_implementation = self.attention
        return transformers.AlbertForMaskedLM(theirs)


class TransformersEager(Transformers):
    name = "transformers-eager"
    attention = "eager"


class TransformersSdpa(Transformers):
    name = "transformers-sdpa"
    attention = "sdpa"


class TransformersCompile(TransformersSdpa):
    """Under torch.compile; the first call of each shape takes a minute, uncounted."""

    name = "transformers-compile"

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        super().build(config, state_dict, dtype, device, batch)
        self.model.albert.compile(dynamic=False)
        self.model.predictions.compile(dynamic=False)


class TransformersAttention(Transformers):
    """With this package's attention alone."""

    name = "transformers-attention"
    attention = "albert_fast"

    def module(self, config: AlbertConfig) -> torch.nn.Module:
        import albert_fast.hf  # noqa: F401  knows of attention="albert_fast"

        return super().module(config)


class TransformersAccelerated(TransformersSdpa):
    """Passed through `albert_fast.hf.accelerate`."""

    name = "transformers-accelerated"

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        from albert_fast.hf import accelerate

        super().build(config, state_dict, dtype, device, batch)
        accelerate(self.model, skip_logits=True, strict=True)
