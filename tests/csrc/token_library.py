"""csrc/cpu's operations on tokens and the loss, called through ctypes with guarded memory (see gemm_library)."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from ctypes import c_double, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gemm_library as g

needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def matrices(*names: str) -> list[tuple[str, type]]:
    return [field for name in names for field in ((name, c_void_p), (f"{name}_stride", c_int64))]


class Dropout(ctypes.Structure):
    """albert_dropout."""

    _fields_ = (
        ("p", c_double),
        ("seed", c_uint64),
        ("site", c_uint32),
        ("cu_seqlens", c_void_p),
        ("batch", c_int64),
    )


class LayerNormArgs(ctypes.Structure):
    """albert_layer_norm_args."""

    _fields_ = (
        ("m", c_int64),
        ("n", c_int64),
        *matrices("x"),
        ("bias", c_void_p),
        *matrices("residual"),
        ("x_dtype", c_int),
        ("residual_dtype", c_int),
        ("weight", c_void_p),
        ("ln_bias", c_void_p),
        ("eps", c_float),
        ("dropout", Dropout),
        *matrices("y", "pre_norm"),
        ("mean", c_void_p),
        ("rstd", c_void_p),
        *matrices("grad_y", "grad_residual", "grad_x"),
        ("grad_weight", c_void_p),
        ("grad_ln_bias", c_void_p),
        ("grad_bias", c_void_p),
    )


class BiasGeluArgs(ctypes.Structure):
    """albert_bias_gelu_args."""

    _fields_ = (
        ("m", c_int64),
        ("n", c_int64),
        *matrices("x"),
        ("bias", c_void_p),
        ("dtype", c_int),
        ("activation", c_int),
        *matrices("y", "grad_y", "grad_x"),
        ("grad_bias", c_void_p),
    )


class Embedding(ctypes.Structure):
    """albert_embedding."""

    _fields_ = (
        ("ids", c_void_p),
        ("id_bytes", c_int),
        ("table", c_void_p),
        ("rows", c_int64),
        ("stride", c_int64),
        ("gradient", c_void_p),
        ("gradient_stride", c_int64),
    )


class EmbedArgs(ctypes.Structure):
    """albert_embed_args."""

    _fields_ = (
        ("tokens", c_int64),
        ("size", c_int64),
        ("dtype", c_int),
        ("word", Embedding),
        ("position", Embedding),
        ("token_type", Embedding),
        *matrices("inputs"),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("eps", c_float),
        ("dropout", Dropout),
        *matrices("y", "grad_y", "grad_inputs"),
        ("grad_weight", c_void_p),
        ("grad_bias", c_void_p),
        ("padding_idx", c_int64),
    )


class LossArgs(ctypes.Structure):
    """albert_masked_lm_loss_args."""

    _fields_ = (
        ("dtype", c_int),
        ("tokens", c_int64),
        ("size", c_int64),
        ("vocabulary", c_int64),
        *matrices("x", "table"),
        ("bias", c_void_p),
        ("labels", c_void_p),
        ("ignore_index", c_int64),
        ("label_smoothing", c_double),
        ("z_loss", c_double),
        ("loss", c_void_p),
        ("logsumexp", c_void_p),
        ("correct", c_void_p),
        ("grad_loss", c_void_p),
        *matrices("grad_x", "grad_table"),
        ("grad_bias", c_void_p),
    )


# With a workspace, or without: the functions that need one have another that says how much.
FUNCTIONS = {
    "albert_dropout_add_layer_norm": (LayerNormArgs, False),
    "albert_layer_norm_backward": (LayerNormArgs, True),
    "albert_bias_gelu": (BiasGeluArgs, False),
    "albert_bias_gelu_backward": (BiasGeluArgs, True),
    "albert_embed_layer_norm": (EmbedArgs, False),
    "albert_embed_layer_norm_backward": (EmbedArgs, True),
    "albert_masked_lm_loss": (LossArgs, True),
    "albert_masked_lm_loss_backward": (LossArgs, True),
}


def load(path: Path) -> ctypes.CDLL:
    library = g.load(path)
    for name, (args, workspace) in FUNCTIONS.items():
        function, pointer = getattr(library, name), ctypes.POINTER(args)
        memory = [c_void_p, c_size_t] if workspace else []
        function.restype, function.argtypes = c_int, [pointer, *memory, ctypes.POINTER(g.Parallel)]
        if workspace:
            size = getattr(library, f"{name}_workspace_bytes")
            size.restype, size.argtypes = c_size_t, [pointer, c_int]
    return library


@pytest.fixture(scope="session")
def token_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    return load(g.build(base / "gemm"))


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """torch's spinning threads would slow every other test process on the machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_isa(library: ctypes.CDLL, isa: str, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library under ALBERT_FAST_ISA; skips where that changes nothing."""
    best = library.albert_isa()
    if best == b"none":
        pytest.skip("no AVX2")
    if isa:
        monkeypatch.setenv("ALBERT_FAST_ISA", isa)
        if library.albert_isa() == best:
            pytest.skip(f"the machine uses {best.decode()} either way")
    return library


def fill(args: ctypes.Structure, buffers: dict[str, g.Guarded]) -> None:
    fields = {name for name, _ in args._fields_}
    for name, buffer in buffers.items():
        setattr(args, name, buffer.address)
        if f"{name}_stride" in fields:
            setattr(args, f"{name}_stride", buffer.stride)


def call(
    library: ctypes.CDLL, name: str, args: ctypes.Structure, buffers: dict[str, g.Guarded], threads: int = 1
) -> dict[str, Tensor]:
    """Calls the function with a workspace of just the size asked for; checks what lies around every buffer."""
    parallel = g.parallel(threads)
    if FUNCTIONS[name][1]:
        size = getattr(library, f"{name}_workspace_bytes")(args, threads)
        workspace = g.aligned(size).fill(0xFF)  # NaN whatever it is read as
        code = getattr(library, name)(args, workspace.address, size, parallel)
        workspace.check()
    else:
        code = getattr(library, name)(args, parallel)
    assert code == 0
    for buffer in buffers.values():
        buffer.check()
    return {name: buffer.tensor.clone() for name, buffer in buffers.items()}


def vector(values: Tensor) -> g.Guarded:
    return g.guarded(values[None])


def empty(rows: int, columns: int, dtype: torch.dtype, gap: int = 0) -> g.Guarded:
    """Poisoned: what is never written shows."""
    buffer = g.Guarded(rows, columns, dtype, columns + gap)
    return buffer.fill(float("nan") if dtype.is_floating_point else 0x7F)


def assert_close(
    actual: Tensor, oracle: Tensor, peer: Tensor, what: str, dtype: torch.dtype | None = None, floor: float = 0.0
) -> None:
    """At most twice the error of PyTorch's own kernels in the same dtype, and never held to less than a rounding (or
    `floor`), nor, over a few elements, to the luck of a draw. dtype: in which everything was rounded, where it is not
    the output's."""
    assert actual.shape == oracle.shape, what
    few = oracle.numel() <= 1024
    scale = max(oracle.double().norm().item(), oracle.numel() ** 0.5 if few else 1e-30)
    ours, theirs = ((value.double() - oracle.double()).norm().item() / scale for value in (actual, peer))
    allowed = max(2 * theirs, torch.finfo(dtype or actual.dtype).eps * (8 if few else 0.5), floor)
    assert ours <= allowed, f"{what}: {ours:.3g}, torch {theirs:.3g}"
