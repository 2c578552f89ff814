"""The `cuda` backend: the kernels in csrc/cuda.

It serves one thing: the encoder's inference for up to 128 tokens in bfloat16 or half, where the shared layer fits into
the multiprocessors' shared memory. One kernel then runs all passes, and reads the weights once.

With ALBERT_FAST_CUDA_ON_CPU=1 it serves CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from albert_fast import backends, devices, native_cuda
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, EncoderOptions

# csrc/cuda/resident_encoder.h
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ACTIVATIONS = {"tanh": 1, "none": 2, "relu": 3}
_MOST_TOKENS = 128
# On an H200, ALBERT base, 12 passes: one launch takes 205 us at 16 tokens, 312 at 32, 452 at 64, 685 at 128; a graph of
# Triton's kernels 254, 259, 276 and 308. Launched one by one those are 60 launches, for each of which the host takes
# some tens of microseconds in a training step; a call of either alone was not timed.
_MOST_TOKENS_IN_GRAPHS = 16
# Up to here blocks without clusters are faster: 203 against 340 us at 16 tokens, 450 against 465 at 64; 819 against 684
# at 128.
_MOST_TOKENS_ALONE = 64
_MOST_HIDDEN = 1024
_CHUNK = 32  # that hidden, inner and head_dim are multiples of


def unavailable() -> str | None:
    if native_cuda.on_cpu():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return None if torch.version.hip is None else "the kernels are tried on NVIDIA GPUs only"


def declines(call: backends.Call) -> str | None:
    device = "cpu" if native_cuda.on_cpu() else "cuda"
    if call.device.type != device:
        return f"it serves {device} tensors"
    if call.operation != "encoder" or call.training:
        return "it serves the encoder's inference alone"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"bfloat16 and float16, not {str(call.dtype).removeprefix('torch.')}"
    if call.activation not in FUSED_ACTIVATIONS:
        return f"activations {', '.join(FUSED_ACTIVATIONS)}, not {call.activation}"
    if call.quantized:
        return "no products in int8"
    if call.sizes is None:
        return f"it serves up to {_MOST_TOKENS} tokens, and how many there will be is not known yet"
    return _declines_sizes(call.sizes) or _declines_device(call.device, call.dtype, call.sizes)


def _declines_sizes(sizes: backends.EncoderSizes) -> str | None:
    tokens, hidden, inner, heads, layers, has_bias, has_dropout = sizes
    if not 1 <= tokens <= _MOST_TOKENS:
        return f"1 to {_MOST_TOKENS} tokens, not {tokens}"
    if tokens > _MOST_TOKENS_IN_GRAPHS and backends.are_for_graphs():
        return f"up to {_MOST_TOKENS_IN_GRAPHS} tokens where a CUDA graph starts the kernels, not {tokens}"
    if layers != 1:
        return f"one layer that all passes share, not {layers}"
    if has_bias or has_dropout:
        return f"no {'bias of the scores' if has_bias else 'dropout'}"
    if hidden > _MOST_HIDDEN or any(size % _CHUNK for size in (hidden, inner, hidden // heads)):
        return (
            f"hidden of up to {_MOST_HIDDEN}, inner and head_dim multiples of {_CHUNK}; "
            f"not {hidden}, {inner} and {hidden // heads}"
        )
    return None


def _declines_device(device: torch.device, dtype: torch.dtype, sizes: backends.EncoderSizes) -> str | None:
    """Whether the layer fits there; asked once for each size."""
    key = (device, dtype, *sizes[1:4])
    if key not in _reasons:
        _reasons[key] = _find_reason(device, dtype, sizes)
    return _reasons[key]


_reasons: dict[tuple[Any, ...], str | None] = {}


def _find_reason(device: torch.device, dtype: torch.dtype, sizes: backends.EncoderSizes) -> str | None:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < native_cuda.LEAST_CAPABILITY:
            return f"compute capability 8.0 and later, not {capability[0]}.{capability[1]}"
    library = native_cuda.load()
    if isinstance(library, str):
        return library
    error = _plan_error(library, device, _shape(dtype, dtype, *sizes[1:4], _CLUSTERS))
    if error == native_cuda.DOES_NOT_FIT:
        return (
            f"a layer of hidden {sizes.hidden} and inner {sizes.inner} does not fit into the shared memory of {device}"
        )
    return f"{library.albert_cuda_error(error).decode()} on {device}" if error else None


# albert_resident_shape's `cluster`: in clusters where there are any, and not in clusters.
_CLUSTERS, _ALONE = 0, 1


def _shape(
    dtype: torch.dtype,
    parameter_dtype: torch.dtype,
    hidden: int,
    inner: int,
    heads: int,
    cluster: int,
    words: bool = False,
) -> native_cuda.Shape:
    return native_cuda.Shape(hidden, inner, heads, _DTYPES[dtype], _DTYPES[parameter_dtype], cluster, words)


def _plan_error(library: ctypes.CDLL, device: torch.device, shape: native_cuda.Shape) -> int:
    with devices.current(device):
        return library.albert_resident_plan_of(shape, native_cuda.ResidentPlan())


def _shape_for(
    library: ctypes.CDLL, device: torch.device, tokens: int, kind: tuple[torch.dtype, torch.dtype, int, int, int]
) -> native_cuda.Shape:
    """What is faster and fits: in clusters or not, up to 16 tokens by words (csrc/cuda/resident_words.h), where they
    serve; or ALBERT_FAST_CLUSTER, for experiments."""
    wanted = os.environ.get("ALBERT_FAST_CLUSTER")
    if wanted is None and tokens <= _MOST_TOKENS_ALONE:
        alone, key = _shape(*kind, _ALONE, words=True), (device, *kind)
        if key not in _fit_alone:
            _fit_alone[key] = _plan_error(library, device, alone) == 0
        if _fit_alone[key]:
            return alone
    return _shape(*kind, int(wanted or _CLUSTERS))


_fit_alone: dict[tuple[Any, ...], bool] = {}


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernel reads it: contiguous, at a multiple of 16 bytes."""
    tensor = tensor.detach().to(dtype).contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def encoder_inference(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> Tensor:
    """All passes in one launch on the current stream; it may be captured in a CUDA graph."""
    library = native_cuda.load()
    assert not isinstance(library, str), library
    tokens, width = hidden.shape
    passes = len(options.layer_of_pass())
    # Weights that are float32 (autocast) are rounded when the kernel reads them.
    parameter_dtype = hidden.dtype if all(p.dtype == hidden.dtype for p in parameters) else torch.float32
    tensors = [_ready(parameter, parameter_dtype) for parameter in parameters]
    hidden, cu_seqlens = _ready(hidden, hidden.dtype), cu_seqlens.contiguous()
    kind = (hidden.dtype, parameter_dtype, width, tensors[10].shape[0], options.num_heads)
    shape = _shape_for(library, hidden.device, tokens, kind)
    workspace = torch.empty(
        library.albert_resident_workspace_bytes(shape, tokens, passes), dtype=torch.uint8, device=hidden.device
    )
    if options.return_all:
        states = hidden.new_empty(passes + 1, tokens, width)
        states[0].copy_(hidden)
        output = states[1:]
    else:
        states = output = hidden.new_empty(tokens, width)
    arguments = native_cuda.Arguments(
        shape=shape,
        tokens=tokens,
        batch=cu_seqlens.numel() - 1,
        passes=passes,
        activation=_ACTIVATIONS[FUSED_ACTIVATIONS[options.activation]],
        return_all=options.return_all,
        eps=options.eps,
        hidden=hidden.data_ptr(),
        cu_seqlens=cu_seqlens.data_ptr(),
        parameters=(ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)),
        output=output.data_ptr(),
        workspace=workspace.data_ptr(),
    )
    with devices.current(hidden.device):
        error = library.albert_resident_encoder(arguments, devices.stream_of(hidden.device))
    if error:
        raise RuntimeError(f"the resident encoder on {hidden.device}: {library.albert_cuda_error(error).decode()}")
    return states


def load() -> dict[str, Callable[..., Any]]:
    return {"encoder_inference": encoder_inference}
