"""transformers' AlbertForMaskedLM: with each of its attentions, in int8, compiled, and accelerated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from albert_fast.bench.data import Batch
from albert_fast.bench.peers.base import TorchPeer
from albert_fast.config import AlbertConfig


class Transformers(TorchPeer):
    packages: tuple[str, ...] = ("transformers",)
    install = "'albert_fast[bench]'"
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


class TransformersFlash(Transformers):
    """With flash-attn's kernels, which are for GPUs and 16 bits."""

    name = "transformers-flash"
    attention = "flash_attention_2"
    packages = ("transformers", "flash_attn")
    install = "flash-attn"
    dtypes = ("bfloat16", "float16", "autocast")
    devices = ("cuda",)


class TransformersInt8(TransformersSdpa):
    """PyTorch's dynamic int8: its linear layers quantized, a weight's columns each with a scale of its own.

    The shared layer's are quantized once, and serve every pass, as the module does.
    """

    name = "transformers-int8"
    modes = ("inference",)
    dtypes = ("int8",)
    devices = ("cpu",)

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        from torch.ao import quantization

        super().build(config, state_dict, "float32", device, batch)
        how = {torch.nn.Linear: quantization.per_channel_dynamic_qconfig}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torchao will have it one day
            self.model.albert = quantization.quantize_dynamic(self.model.albert.eval(), how)


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
