"""The `triton` backend: the operations in terms of the kernels in kernels/.

On NVIDIA GPUs of compute capability 8.0 and later. With TRITON_INTERPRET=1 and ALBERT_FAST_BACKEND=triton Triton's
interpreter runs the same kernels on CPU tensors, slowly, for tests. Which of the two is decided once, when a kernel is
imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from albert_fast import backends

_LEAST_CAPABILITY = (8, 0)
_MOST_HEAD_DIM = 128
_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether the kernels are run by Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    if not _INSTALLED:
        return "Triton is not installed: pip install triton (Linux)"
    if not interpreted() and not torch.cuda.is_available():
        return "PyTorch finds no GPU; for tests TRITON_INTERPRET=1 runs the kernels on the CPU"
    return None


def declines(call: backends.Call) -> str | None:
    if interpreted() and os.environ.get("ALBERT_FAST_BACKEND") != "triton":
        return "Triton's interpreter is for tests, and serves where ALBERT_FAST_BACKEND=triton asks for it"
    device = "cpu" if interpreted() else "cuda"
    if call.device.type != device:
        return f"it serves {device} tensors"
    if call.dtype not in _DTYPES:
        return f"float32, bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 wrongly: use float32 or float16 there"
    if call.head_dim is not None and not 1 <= call.head_dim <= _MOST_HEAD_DIM:
        return f"heads of up to {_MOST_HEAD_DIM}, not {call.head_dim}"
    if call.quantized:
        return "no products in int8"
    if call.activation is not None:
        from albert_fast.ops.encoder import FUSED_ACTIVATIONS

        if call.activation not in FUSED_ACTIVATIONS:
            return f"activations {', '.join(FUSED_ACTIVATIONS)}, not {call.activation}"
    if interpreted():
        return None
    # Not functools.cache, which torch.compile looks through, with a warning.
    if call.device not in _reasons_of_devices:
        _reasons_of_devices[call.device] = _declines_device(call.device)
    return _reasons_of_devices[call.device]


_reasons_of_devices: dict[torch.device, str | None] = {}


def _declines_device(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the kernels are tried on NVIDIA GPUs only"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"compute capability 8.0 and later, not {capability[0]}.{capability[1]}"
    return None


# What serves each operation: a module of `albert_fast.kernels`, and a function in it.
_FUNCTIONS = {
    "attention": "attention_forward.attention",
    "attention_backward": "attention_backward.attention_backward",
    "bias_gelu": "bias_gelu.bias_gelu",
    "bias_gelu_backward": "bias_gelu.bias_gelu_backward",
    "dropout_add_layer_norm": "dropout_add_layer_norm.dropout_add_layer_norm",
    "dropout_add_layer_norm_backward": "dropout_add_layer_norm.dropout_add_layer_norm_backward",
    "embed_layer_norm": "embed_layer_norm.embed_layer_norm",
    "embed_layer_norm_backward": "embed_layer_norm.embed_layer_norm_backward",
    "embed_layer_norm_backward_sparse": "embed_layer_norm.embed_layer_norm_backward_sparse",
    "encoder": "encoder.encoder",
    "encoder_inference": "encoder.encoder_inference",
    "encoder_backward": "encoder.encoder_backward",
    "encoder_kept_shapes": "encoder.kept_shapes",
    "masked_lm_loss": "masked_lm_loss.masked_lm_loss",
    "masked_lm_loss_kept": "masked_lm_loss.masked_lm_loss_kept",
    "masked_lm_loss_backward": "masked_lm_loss_table.masked_lm_loss_backward",
}


@functools.cache
def load() -> dict[str, Callable[..., Any]]:
    functions = {}
    for name, path in _FUNCTIONS.items():
        module, function = path.split(".")
        functions[name] = getattr(importlib.import_module(f"albert_fast.kernels.{module}"), function)
    return functions
