"""ONNX Runtime on the CPU: transformers' model, exported, its attention fused, and in int8 its products quantized.

A shared weight defeats both of its quantizers: one initializer that twelve products read is quantized for one of them.
Each use gets a copy of its own before anything else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from albert_fast.bench.data import Batch
from albert_fast.bench.peers.base import Peer
from albert_fast.bench.peers.transformers import TransformersEager
from albert_fast.config import AlbertConfig

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(torch.nn.Module):
    """transformers' encoder with tensors in and a tensor out, as exporters want it."""

    def __init__(self, albert: Any) -> None:
        super().__init__()
        self.albert = albert.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.albert(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=False
        )[0]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Exporters and quantizers tell much that is of no use to who reads a benchmark."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class OnnxRuntime(Peer):
    name = "onnxruntime"
    packages = ("transformers", "onnx", "onnxscript", "onnxruntime")
    install = "'albert_fast[peers]'"
    modes = ("inference",)
    dtypes = ("float32", "int8")
    devices = ("cpu",)

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxruntime.transformers import optimizer

        source = TransformersEager()
        source.build(config, state_dict, "float32", device, batch)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as directory, quietly():
            file = str(Path(directory) / "model.onnx")
            torch.onnx.export(
                Encoder(source.model.albert),
                tuple(batch.inputs().values()),
                file,
                input_names=list(INPUTS),
                output_names=["last_hidden_state"],
                dynamic_axes={name: {0: "batch", 1: "seq"} for name in INPUTS},
                opset_version=17,
                dynamo=False,
            )
            model = onnx.load(file)
            _unshare(model)
            onnx.save(model, file)
            heads, hidden = config.num_attention_heads, config.hidden_size
            fused = optimizer.optimize_model(file, "bert", num_heads=heads, hidden_size=hidden, opt_level=1)
            fused.save_model_to_file(file)
            if dtype == "int8":
                # Behind a fused operator the types are not known to the quantizer.
                types = {"DefaultTensorType": onnx.TensorProto.FLOAT}
                quantize_dynamic(file, file, weight_type=QuantType.QInt8, per_channel=True, extra_options=types)
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def inference(self, batch: Batch) -> Tensor:
        inputs = {name: tensor.numpy() for name, tensor in batch.inputs().items()}
        wanted = {node.name for node in self.session.get_inputs()}
        (hidden,) = self.session.run(None, {name: value for name, value in inputs.items() if name in wanted})
        return torch.from_numpy(hidden)


def _unshare(model: Any) -> None:
    """A copy of each matrix for each of its uses but the first."""
    import onnx

    matrices = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name not in matrices:
                continue
            uses[name] = uses.get(name, 0) + 1
            if uses[name] > 1:
                copy = onnx.TensorProto()
                copy.CopyFrom(matrices[name])
                copy.name = f"{name}.{uses[name]}"
                model.graph.initializer.append(copy)
                node.input[place] = copy.name
