"""Calls the C interface of csrc/cpu's matrix products through ctypes, in the library that the package builds.

Every buffer handed to the library lies against a page that may not be touched, so that a read or a write one element
too far ends the process, and outputs are poisoned with NaN and surrounded by bytes that must not change.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

from albert_fast import native

SOURCE = Path(__file__).parents[2] / "csrc" / "cpu"

F32, BF16, INT8, U8 = range(4)
NONE, GELU_TANH, GELU_ERF, RELU, TANH = range(5)
BAD_ARGUMENT, BAD_WEIGHT, SMALL_WORKSPACE, NO_ISA, UNALIGNED = range(1, 6)
CODES = {torch.float32: F32, torch.bfloat16: BF16, torch.uint8: U8}


def build(folder: Path) -> Path:
    """The package's own library, as `libgemm.so`, and for each instruction set the program gemm_test_<isa>."""
    library = native.build()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # one build for all test processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "libgemm.so").exists():
            return folder / "libgemm.so"
        command = native.compiler()
        assert command is not None
        flags = ["-std=c++17", "-O3", *os.environ.get("ALBERT_FAST_CXXFLAGS", "").split()]
        torch_libraries = Path(torch.__file__).parent / "lib"
        link = [
            str(library),
            "-Wl,--disable-new-dtags",
            f"-Wl,-rpath,{library.parent}",
            f"-Wl,-rpath,{torch_libraries}",
            "-pthread",
        ]
        link.append(f"-Wl,-rpath-link,{torch_libraries}")
        for isa in ("avx2", "avx512"):
            program = [str(SOURCE / "tests" / "gemm_test.cpp"), "-o", str(folder / f"gemm_test_{isa}")]
            isa_flags = [*native.ISA_FLAGS[isa].split(), f"-DALBERT_ISA={isa}"]
            clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            arguments = [*command, *flags, *isa_flags, *program, *link]
            result = subprocess.run(arguments, capture_output=True, text=True, env=clean)
            assert result.returncode == 0, result.stdout + result.stderr
        (folder / "libgemm.so").symlink_to(library)
    return folder / "libgemm.so"


THREADS = ThreadPoolExecutor(64)
RUN = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_void_p, c_void_p)
TASK = ctypes.CFUNCTYPE(None, c_void_p, c_int)


@RUN
def run_in_threads(context, tasks, task, argument):
    """The caller's side of albert_parallel: a thread for each task, the caller's for one of them."""
    call = TASK(task)
    others = [THREADS.submit(call, argument, i) for i in range(1, tasks)]
    call(argument, 0)
    for other in others:
        other.result()


class Parallel(ctypes.Structure):
    _fields_ = (("context", c_void_p), ("threads", c_int), ("run", RUN))


def parallel(threads: int) -> Parallel:
    return Parallel(None, threads, run_in_threads if threads > 1 else RUN())


class Args(ctypes.Structure):
    """albert_gemm_args."""

    _fields_ = (
        ("m", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("x_dtype", c_int),
        ("y_dtype", c_int),
        ("x_scale", c_void_p),
        ("x_zero", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("bias", c_void_p),
        ("activation", c_int),
        ("pre_activation", c_void_p),
        ("pre_activation_stride", c_int64),
        ("activation_input", c_void_p),
        ("activation_input_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("ln_weight", c_void_p),
        ("ln_bias", c_void_p),
        ("ln_eps", c_float),
        ("ln_mean", c_void_p),
        ("ln_rstd", c_void_p),
        ("pre_norm", c_void_p),
        ("pre_norm_stride", c_int64),
        ("next_weight", c_void_p),
    )


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    p, i64, par = c_void_p, c_int64, ctypes.POINTER(Parallel)
    signatures = {
        "albert_isa": (c_char_p, []),
        "albert_packed_bytes": (c_size_t, [c_int, i64, i64]),
        "albert_pack": (c_int, [c_int, c_int, p, i64, i64, i64, i64, p, par]),
        "albert_quantize_rows": (c_int, [c_int, p, i64, i64, i64, p, i64, p, p, par]),
        "albert_gemm_workspace_bytes": (c_size_t, [ctypes.POINTER(Args), c_int]),
        "albert_gemm": (c_int, [ctypes.POINTER(Args), p, c_size_t, par]),
        "albert_weight_gradient_workspace_bytes": (c_size_t, [c_int, i64, i64, i64]),
        "albert_weight_gradient": (
            c_int,
            [c_int, i64, i64, i64, p, i64, p, i64, p, i64, p, p, c_size_t, par],
        ),
        "albert_layer_norm": (c_int, [c_int, p, i64, c_int, p, i64, i64, i64, p, p, c_float, p, p, par]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [c_void_p, c_size_t, c_int]
PAGE = mmap.PAGESIZE
CANARY = 0xA5


class Guarded:
    """Memory of a matrix [rows, columns] with the given row stride, between two pages that may not be touched.

    It ends at the second page, as closely as `align` allows; everything that is not the matrix holds a canary.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, stride: int | None = None, align: int = 0):
        size = dtype.itemsize
        self.stride = stride if stride is not None else columns
        span = ((rows - 1) * self.stride + columns) * size if rows and columns else 0
        align = align or size
        pages = (span + align + PAGE - 1) // PAGE + 1
        self.memory = mmap.mmap(-1, (pages + 2) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        offset = ((pages + 1) * PAGE - span) // align * align
        assert libc.mprotect(self.base, PAGE, mmap.PROT_READ) == 0
        self.inside = torch.frombuffer(self.memory, dtype=torch.uint8)[PAGE : (pages + 1) * PAGE]
        self.inside.fill_(CANARY)
        assert libc.mprotect(self.base, PAGE, 0) == 0
        assert libc.mprotect(self.base + (pages + 1) * PAGE, PAGE, 0) == 0
        self.address = self.base + offset
        flat = self.inside[offset - PAGE : offset - PAGE + span].view(dtype)
        self.tensor = flat.as_strided((rows, columns), (self.stride, 1)) if span else flat.reshape(rows, columns)
        self.outside = torch.ones_like(self.inside, dtype=torch.bool)
        for row in range(rows if span else 0):
            start = offset - PAGE + row * self.stride * size
            self.outside[start : start + columns * size] = False

    def fill(self, values: torch.Tensor | float) -> Guarded:
        self.tensor.copy_(values) if isinstance(values, torch.Tensor) else self.tensor.fill_(values)
        return self

    def check(self) -> None:
        assert bool((self.inside[self.outside] == CANARY).all()), "bytes outside the matrix were written"


def guarded(values: torch.Tensor, stride: int | None = None) -> Guarded:
    rows, columns = values.shape
    return Guarded(rows, columns, values.dtype, stride).fill(values)


def aligned(size: int) -> Guarded:
    """A workspace or a packed weight."""
    return Guarded(1, (size + 63) // 64 * 64, torch.uint8, align=64)
