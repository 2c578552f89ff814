"""Finds, builds and loads csrc/cuda/*.cu: one shared library for the GPUs that are there, or for named ones.

Made and kept as `albert_fast.native` makes and keeps the CPU kernels: by ninja on first use, behind the same lock,
under a name that says what it was made of. The compiler is $NVCC, else nvcc of $CUDA_HOME, on the PATH or in
/usr/local/cuda.

With ALBERT_FAST_CUDA_ON_CPU=1 the C++ compiler takes the same sources instead, and a library comes out that runs the
kernels on CPU memory, thread by thread (csrc/cuda/host.h): slowly, for tests.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shlex
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from ctypes import c_char_p, c_float, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from albert_fast import native
from albert_fast.native import BuildError

_FLAGS = "-std=c++17 -O3"
# On the CPU: the machine that plays the GPU, and the kernels, whose loads and stores it sees by the hooks of
# -fsanitize=thread, which are its own (csrc/cuda/host/machine.cpp).
_HOST_FLAGS = f"{_FLAGS} -g1 -fPIC -Wall -Wextra -Wno-unknown-pragmas"
_KERNEL_ON_HOST_FLAGS = "-fsanitize=thread -x c++"
# mma.sync in bfloat16 and cp.async are from here on.
LEAST_CAPABILITY = (8, 0)


def on_cpu() -> bool:
    """Whether the kernels run on the CPU, for tests."""
    return os.environ.get("ALBERT_FAST_CUDA_ON_CPU") == "1"


def compiler() -> list[str] | None:
    wanted = shlex.split(os.environ.get("NVCC", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    home = os.environ.get("CUDA_HOME", "")
    places = [str(Path(home) / "bin" / "nvcc")] if home else []
    found = next((path for name in (*places, "nvcc", "/usr/local/cuda/bin/nvcc") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def architecture(capability: tuple[int, int]) -> str:
    """As nvcc names it after sm_."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def architectures_present() -> tuple[str, ...]:
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(architecture(c) for c in sorted(capabilities) if c >= LEAST_CAPABILITY)


@dataclass(frozen=True)
class Plan:
    """What is compiled, and the names that follow from it; without architectures by the C++ compiler."""

    command: tuple[str, ...] | None
    architectures: tuple[str, ...]
    sources: tuple[Path, ...]

    @classmethod
    def make(cls, architectures: tuple[str, ...]) -> Plan:
        folder = native.source_folder()
        if folder is None:
            raise BuildError("the C++ sources (csrc) are missing from this installation: install albert_fast anew")
        wrong = [name for name in architectures if not re.fullmatch(r"\d{2,3}[af]?", name)]
        if wrong:
            raise BuildError(f"architectures: {wrong[0]!r} is none; 80, 90a or 100 were expected")
        command = compiler() if architectures else native.compiler()
        sources = sorted((folder / "cuda").glob("*.cu"))
        if not architectures:
            sources += sorted((folder / "cuda" / "host").glob("*.cpp"))
        return cls(None if command is None else tuple(command), architectures, tuple(sources))

    def flags(self, source: Path) -> str:
        if not self.architectures:
            return f"{_HOST_FLAGS} {_KERNEL_ON_HOST_FLAGS}" if source.suffix == ".cu" else _HOST_FLAGS
        codes = [f"-gencode arch=compute_{name},code=sm_{name}" for name in self.architectures]
        return " ".join([_FLAGS, "-Xcompiler -fPIC", *codes])

    @property
    def announcement(self) -> str:
        targets = ", ".join(f"sm_{name}" for name in self.architectures) or "the CPU"
        return f"the CUDA kernels for {targets}, once: less than a minute"

    @property
    def version(self) -> str:
        return "" if self.command is None else native.compiler_version(self.command)

    def object_name(self, source: Path) -> str:
        made_of = native.digest(*native.with_includes(source), self.flags(source), self.version)
        return f"{source.stem}-{'-'.join(self.architectures) or 'host'}-{made_of}.o"

    def object_names(self) -> list[str]:
        return [self.object_name(source) for source in self.sources]

    @property
    def stem(self) -> str:
        """The part of the library's name that says nothing of the compiler."""
        texts: list[str | bytes] = []
        for source in self.sources:
            texts += [*native.with_includes(source), self.flags(source)]
        return f"albert_fast-cuda-{'-'.join(self.architectures) or 'host'}-{native.digest(*texts)}"

    @property
    def name(self) -> str:
        return f"{self.stem}-{native.digest(self.version)}.so"

    def existing(self) -> Path | None:
        """The library in the cache; without a compiler, that of any compiler."""
        folder = native.cache_folder()
        if self.command is not None:
            return folder / self.name if (folder / self.name).is_file() else None
        return next(iter(sorted(folder.glob(f"{self.stem}-*.so"))), None)

    def lacking(self) -> str | None:
        if self.command is None and not self.architectures:
            return "there is no C++ compiler: install g++ or clang++, or set CXX"
        if self.command is None:
            return "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME or NVCC"
        return None if native.ninja() else "there is no ninja: pip install ninja"

    def ninja_file(self, output: str) -> str:
        assert self.command is not None
        command = shlex.join(self.command)
        lines = [native.compile_rule(f"{command} $flags")]
        lines.append(f"rule link\n  command = {command} -shared $in -o $out")
        lines += [
            native.compile_edge(name, path, self.flags(path))
            for path, name in zip(self.sources, self.object_names(), strict=True)
        ]
        lines.append(f"build {output}: link {' '.join(self.object_names())}")
        return "\n".join(lines) + "\n"


def build(architectures: tuple[str, ...], *, force: bool = False, quiet: bool = True) -> Path:
    """The library's path; it is built where it is not in the cache.

    Args:
        architectures: what follows `sm_`, such as ("80", "90a"); none: for the CPU.
        force, quiet: as in `albert_fast.native.build`.

    Raises:
        BuildError: there is no compiler, or it failed; the message holds its own.
    """
    return native.build_plan(Plan.make(architectures), force=force, quiet=quiet)


def build_command(architectures: Sequence[str], force: bool) -> int:
    """`albert-fast build --cuda`: for the GPUs that are here where none is named."""
    start = time.perf_counter()
    names = tuple(architectures) or architectures_present()
    if not names:
        print("albert-fast build --cuda: PyTorch finds no GPU; name architectures, such as 80 90a 100", file=sys.stderr)
        return 1
    try:
        path = build(names, force=force, quiet=False)
    except BuildError as error:
        print(f"albert-fast build --cuda: {error}", file=sys.stderr)
        return 1
    print(f"{path}\n{time.perf_counter() - start:.1f} s, {path.stat().st_size / 2**20:.1f} MiB")
    return 0


# ------------------------------------------------------------------------------------- csrc/cuda/resident_encoder.h


class Shape(ctypes.Structure):
    """albert_resident_shape."""

    _fields_ = tuple(
        (name, c_int) for name in ("hidden", "inner", "heads", "dtype", "parameter_dtype", "cluster", "words")
    )


class ResidentPlan(ctypes.Structure):
    """albert_resident_plan."""

    _fields_ = tuple((name, c_int) for name in ("blocks", "cluster", "shared_bytes", "words"))


class Arguments(ctypes.Structure):
    """albert_resident_args."""

    _fields_ = (
        ("shape", Shape),
        *((name, c_int) for name in ("tokens", "batch", "passes", "activation", "return_all")),
        ("eps", c_float),
        ("hidden", c_void_p),
        ("cu_seqlens", c_void_p),
        ("parameters", c_void_p * 16),
        ("output", c_void_p),
        ("workspace", c_void_p),
    )


DOES_NOT_FIT = -2


def open_library(path: Path) -> ctypes.CDLL:
    """With the signatures of its functions."""
    library = ctypes.CDLL(str(path))
    shape = ctypes.POINTER(Shape)
    signatures = {
        "albert_resident_plan_of": (c_int, [shape, ctypes.POINTER(ResidentPlan)]),
        "albert_resident_workspace_bytes": (c_size_t, [shape, c_int, c_int]),
        "albert_resident_encoder": (c_int, [ctypes.POINTER(Arguments), c_void_p]),
        "albert_cuda_error": (c_char_p, [c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_lock = threading.Lock()


def load() -> ctypes.CDLL | str:
    """The library for the GPUs that are there, built if need be; or why there is none, after one warning of it."""
    with _lock:
        return _load(on_cpu())


@functools.cache
def _load(host: bool) -> ctypes.CDLL | str:
    try:
        return open_library(build(() if host else architectures_present(), quiet=False))
    except BuildError as error:
        summary, _, log = str(error).partition("\n")
        print(log, end="", file=sys.stderr)
        reason = f"the CUDA kernels could not be built: {summary.rstrip(':')}"
    except OSError as error:
        reason = f"the CUDA kernels could not be loaded ({error}): `albert-fast build --force` makes them anew"
    warnings.warn(f"albert_fast: {reason}. Triton's serve in their place.", RuntimeWarning, stacklevel=2)
    return reason
