"""OpenVINO on the CPU: transformers' model in float32, in bfloat16, or quantized by NNCF after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from albert_fast.bench.data import Batch
from albert_fast.bench.peers.base import Peer
from albert_fast.bench.peers.onnxruntime import Encoder, quietly
from albert_fast.bench.peers.transformers import TransformersSdpa
from albert_fast.config import AlbertConfig


class OpenVino(Peer):
    name = "openvino"
    packages = ("transformers", "openvino", "nncf")
    install = "'albert_fast[peers]'"
    modes = ("inference",)
    dtypes = ("float32", "bfloat16", "int8")
    devices = ("cpu",)

    def refuses(self, mode: str, dtype: str, device: str) -> str | None:
        reason = super().refuses(mode, dtype, device)
        if reason is not None or dtype != "bfloat16":
            return reason
        import openvino

        # Asked for it nevertheless it computes in float32.
        there = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if there else "it has no bfloat16 on this processor"

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        import nncf
        import openvino

        source = TransformersSdpa()
        source.build(config, state_dict, "float32", device, batch)
        with quietly():
            model = openvino.convert_model(Encoder(source.model.albert), example_input=tuple(batch.inputs().values()))
            if dtype == "int8":
                # Calibrated on the very batch that is measured: the most that it can be given.
                _unshare(model)
                data = nncf.Dataset([self._arrays(batch)])
                model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
            properties = {
                "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            }
            self.compiled = openvino.Core().compile_model(model, "CPU", properties)

    @staticmethod
    def _arrays(batch: Batch) -> tuple[Any, ...]:
        return tuple(tensor.numpy() for tensor in batch.inputs().values())

    def inference(self, batch: Batch) -> Tensor:
        return torch.from_numpy(self.compiled(list(self._arrays(batch)))[0])


def _unshare(model: Any) -> None:
    """A constant for each use of it: NNCF leaves products of a shared weight as they are."""
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            continue
        for target in list(node.output(0).get_target_inputs())[1:]:
            target.replace_source_output(opset13.constant(node.data.copy()).output(0))
