"""Finds, builds and loads csrc: one shared library, made on first use and kept in a cache.

The cache is $ALBERT_FAST_CACHE, else $XDG_CACHE_HOME/albert_fast or ~/.cache/albert_fast. A library's name there says
what it was made of: the sources, the compiler and its version, the flags, torch and the processor's architecture. It is
written under another name and renamed, behind a file lock, so that a process finds a whole library or none, and two
that start together build it once. A library of the same sources and torch serves where there is no compiler.

On first use, a processor without AVX-512 gets a library without its kernels, in half the time; the name says which a
library holds, and one with all of them serves as well. `albert-fast build` makes that one, for any machine.

Object files are named by what they were made of, too: after a change of one source, only that one is compiled.

Nothing is imported, compiled or loaded before an operation is first called; what stands in the way is one line, and
PyTorch then serves in the library's place.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

# The one source that includes torch: its stable ABI as of 2.10, so that nothing is used that 2.10 lacks.
_BINDING = "binding.cpp"
_BINDING_FLAGS = "-O1 -DTORCH_TARGET_VERSION=0x020a000000000000"
_FLAGS = "-std=c++17 -O3 -fPIC -Wall -Wextra -fno-math-errno -fno-trapping-math"
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
# The names and flags that csrc/cpu/isa.h tells of.
ISA_FLAGS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_vnni": f"{_AVX512} -mavx512vnni",
    "avx512_bf16": f"{_AVX512} -mavx512bf16",
}
# A source of namespace albert::ALBERT_ISA is compiled for these, and a few for more; one of albert::avx512 for that.
_ISAS = ("avx512", "avx2")
_MORE_ISAS = {"gemm_micro.cpp": ("avx512_vnni", "avx512_bf16")}
# What a processor must have to run any kernel of avx512*, as Linux calls it.
_AVX512_FEATURES = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


class BuildError(RuntimeError):
    """The library could not be built; the message holds the compiler's own."""


# --------------------------------------------------------------------------------------------------- what is on hand


def source_folder() -> Path | None:
    """csrc as package data, where the package was installed, or in the checkout."""
    package = Path(__file__).parent
    return next((folder for folder in (package / "csrc", package.parent / "csrc") if _has_sources(folder)), None)


def _has_sources(folder: Path) -> bool:
    return (folder / _BINDING).is_file()


def cache_folder() -> Path:
    if "ALBERT_FAST_CACHE" in os.environ:
        return Path(os.environ["ALBERT_FAST_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "albert_fast"


def compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, or the first of the usual names that is on the PATH."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    found = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


@cache
def compiler_version(command: tuple[str, ...]) -> str:
    """What tells this compiler from another."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return f"{' '.join(command)} {os.path.realpath(shutil.which(command[0]) or command[0])} {result.stdout}"


@cache
def has_avx512() -> bool:
    """Whether this processor can run any kernel of avx512*; True where that is not known."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found is None or set(found[1].split()) >= _AVX512_FEATURES


def unavailable() -> str | None:
    """Why this machine cannot have the library, as far as that is seen without building it; None where it can."""
    return _state.reason


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """What is to be compiled into the library, and the names that follow from it."""

    command: tuple[str, ...] | None  # the compiler's; None where there is none
    extra_flags: tuple[str, ...]
    avx512: bool  # its kernels are among them
    every_unit: tuple[tuple[Path, str], ...]  # a source and its flags
    texts: dict[Path, str]  # digest of each source and what it includes

    @classmethod
    def make(cls, extra_flags: Iterable[str] = (), *, avx512: bool | None = None) -> Plan:
        sources = source_folder()
        if sources is None:
            raise BuildError("the C++ sources (csrc) are missing from this installation: install albert_fast anew")
        units = [(sources / _BINDING, _BINDING_FLAGS)]
        for path in sorted([*(sources / "cpu").glob("*.cpp"), *(sources / "cuda").glob("*.cpp")]):
            isas = _isas(path)
            units += [(path, f"{ISA_FLAGS[isa]} -DALBERT_ISA={isa}") for isa in isas]
            if not isas:
                units.append((path, ""))
        texts = {path: digest(*with_includes(path)) for path in {path for path, _ in units}}
        command = compiler()
        flags = (*shlex.split(os.environ.get("ALBERT_FAST_CXXFLAGS", "")), *extra_flags)
        avx512 = has_avx512() if avx512 is None else avx512
        return cls(None if command is None else tuple(command), flags, avx512, tuple(units), texts)

    @property
    def units(self) -> list[tuple[Path, str]]:
        return [unit for unit in self.every_unit if self.avx512 or "ALBERT_ISA=avx512" not in unit[1]]

    def object_name(self, unit: tuple[Path, str]) -> str:
        path, flags = unit
        isa = re.search(r"ALBERT_ISA=(\w+)", flags)
        headers = torch.__version__ if path.name == _BINDING else ""
        made_of = digest(self.texts[path], _FLAGS, flags, *self.extra_flags, self.version, headers)
        return f"{path.stem}-{isa[1] if isa else 'any'}-{made_of}.o"

    @property
    def version(self) -> str:
        return "" if self.command is None else compiler_version(self.command)

    @property
    def link_flags(self) -> str:
        return f"-shared -pthread -L{shlex.quote(str(Path(torch.__file__).parent / 'lib'))} -ltorch_cpu"

    @property
    def stem(self) -> str:
        """The part of the library's name that says nothing of the compiler."""
        texts = [text for path, flags in self.every_unit for text in (self.texts[path], flags)]
        made_of = digest(*texts, _FLAGS, *self.extra_flags, torch.__version__)
        return f"albert_fast-{platform.machine()}-{'avx512' if self.avx512 else 'avx2'}-{made_of}"

    @property
    def name(self) -> str:
        return f"{self.stem}-{digest(self.version)}.so"

    @property
    def announcement(self) -> str:
        return "the CPU kernels, once: about half a minute"

    def object_names(self) -> list[str]:
        return [self.object_name(unit) for unit in self.units]

    def lacking(self) -> str | None:
        if self.command is None:
            if os.environ.get("CXX"):
                return f"CXX is {os.environ['CXX']!r}, which is not found: set it to a C++ compiler"
            return "there is no C++ compiler: install g++ or clang++, or set CXX"
        return None if ninja() else "there is no ninja: pip install ninja"

    def existing(self) -> Path | None:
        """The library in the cache, or one that holds more; without a compiler, one of any compiler, or with less."""
        whole, narrow = replace(self, avx512=True), replace(self, avx512=False)
        names = (whole.name, self.name) if self.command else (f"{whole.stem}-*.so", f"{narrow.stem}-*.so")
        return next((path for name in names for path in sorted(cache_folder().glob(name))), None)

    def ninja_file(self, output: str) -> str:
        assert self.command is not None
        command, extra = shlex.join(self.command), shlex.join(self.extra_flags)
        lines = [compile_rule(f"{command} {_FLAGS} $flags {extra}")]
        lines.append(f"rule link\n  command = {command} {extra} $in {self.link_flags} -o $out")
        names = self.object_names()
        for (path, flags), name in zip(self.units, names, strict=True):
            if path.name == _BINDING:
                flags += f" -isystem {shlex.quote(str(Path(torch.__file__).parent / 'include'))}"
            lines.append(compile_edge(name, path, flags))
        lines.append(f"build {output}: link {' '.join(names)}")
        return "\n".join(lines) + "\n"


def _isas(path: Path) -> tuple[str, ...]:
    """The instruction sets that a source is compiled for; none where it is compiled once, for any."""
    found = re.search(r"^namespace albert::(\w+)", path.read_text(), re.MULTILINE)
    if found is None or found[1] not in ("ALBERT_ISA", *ISA_FLAGS):
        return ()
    return (*_ISAS, *_MORE_ISAS.get(path.name, ())) if found[1] == "ALBERT_ISA" else (found[1],)


def compile_rule(command: str) -> str:
    """In ninja's language. An object that is there is whole, and is right: its name says what it is made of, so that
    neither times nor commands are compared, and it has that name once it is finished."""
    return f"rule compile\n  command = {command} -c $source -o $out.part && mv $out.part $out\n  generator = 1"


def compile_edge(name: str, source: Path, flags: str) -> str:
    return f"build {name}: compile\n  source = {shlex.quote(str(source)).replace('$', '$$')}\n  flags = {flags}"


def digest(*texts: str | bytes) -> str:
    total = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:16]


def with_includes(path: Path, seen: set[str] | None = None) -> Iterator[bytes]:
    """The text of a source and of the files beside it that it includes, each once."""
    seen = set() if seen is None else seen
    seen.add(str(path))
    text = path.read_bytes()
    yield text
    for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        included = os.path.normpath(path.parent / os.fsdecode(name))
        if included not in seen and os.path.isfile(included):
            yield from with_includes(Path(included), seen)


# ------------------------------------------------------------------------------------------------------ build and load


def build(
    extra_flags: Iterable[str] = (), *, avx512: bool | None = None, force: bool = False, quiet: bool = True
) -> Path:
    """The library's path; it is built where it is not in the cache.

    Args:
        extra_flags: of the compiler and the linker, after those of $ALBERT_FAST_CXXFLAGS: -fsanitize=address, …
        avx512: whether its kernels are in the library; None: where this processor can run them.
        force: compiles all of it anew.
        quiet: says nothing unless it fails.

    Raises:
        BuildError: there is no compiler, or it failed; the message holds its own.
    """
    return build_plan(Plan.make(extra_flags, avx512=avx512), force=force, quiet=quiet)


class Buildable(Protocol):
    """What `build_plan` builds: `Plan`, or that of the CUDA kernels."""

    @property
    def name(self) -> str:
        """Of the library; says what it is made of."""

    @property
    def announcement(self) -> str:
        """What is compiled, and how long it takes."""

    def existing(self) -> Path | None:
        """The library in the cache."""

    def lacking(self) -> str | None:
        """What a build needs and this machine lacks."""

    def object_names(self) -> list[str]:
        """Of the files that ninja makes on the way."""

    def ninja_file(self, output: str) -> str:
        """What makes `output` of the sources."""


def build_plan(plan: Buildable, *, force: bool, quiet: bool) -> Path:
    """As `build`."""
    existing = plan.existing()
    if existing is not None and not force:
        return existing
    reason = plan.lacking()
    if reason is not None:
        raise BuildError(reason)
    import fcntl  # not on Windows

    folder = cache_folder()
    try:
        (folder / "objects").mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            existing = None if force else plan.existing()
            return existing or _build(plan, folder, force, quiet)
    except OSError as error:
        raise BuildError(f"cannot write the cache {folder} ({error}): set ALBERT_FAST_CACHE to a folder") from error


def _build(plan: Buildable, folder: Path, force: bool, quiet: bool) -> Path:
    if not quiet:
        print(f"albert_fast: compiling {plan.announcement}; into {folder}", file=sys.stderr)
    partial, script = f"partial-{plan.name}", f"{plan.name}.ninja"
    objects = folder / "objects"
    if force:
        for name in (partial, *plan.object_names()):
            (objects / name).unlink(missing_ok=True)
    (objects / script).write_text(plan.ninja_file(partial))
    program = ninja()
    assert program is not None
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    result = subprocess.run([program, "-C", str(objects), "-f", script, *jobs], capture_output=True, text=True)
    log = result.stdout + result.stderr
    (objects / f"{plan.name}.log").write_text(log)
    if result.returncode != 0:
        raise BuildError(f"the compiler failed; its output ({objects / plan.name}.log):\n{log}")
    os.replace(objects / partial, folder / plan.name)
    return folder / plan.name


@dataclass
class _State:
    """What this process knows of the library."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    loaded: bool = False
    failure: str | None = None
    looked: bool = False

    @property
    def reason(self) -> str | None:
        """Why there is no library, as far as that is known or seen at a glance."""
        if not self.looked:
            with self.lock:
                if not self.looked:
                    self._fail(self._glance())
                    self.looked = True
        return self.failure

    def _glance(self) -> str | None:
        if platform.system() != "Linux":
            return f"the CPU kernels are built on Linux only, and this is {platform.system()}"
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"the CPU kernels need an x86-64 processor, and this one is {platform.machine()}"
        try:
            plan = Plan.make()
            return None if plan.existing() else plan.lacking()
        except BuildError as error:
            return str(error)

    def _fail(self, reason: str | None) -> None:
        self.failure = reason
        if reason is not None:
            warnings.warn(f"albert_fast: {reason}. PyTorch serves in their place.", RuntimeWarning, stacklevel=2)

    def load(self) -> str | None:
        """Builds and loads the library, once; why there is none."""
        if self.loaded:
            return None
        with self.lock:
            if self.loaded or self.reason is not None:
                return self.failure
            try:
                torch.ops.load_library(str(build(quiet=False)))
                isa = torch.ops.albert_fast_native.isa()
                if isa == "none":
                    self._fail("the CPU kernels need a processor with AVX2 and FMA")
            except BuildError as error:
                summary, _, log = str(error).partition("\n")
                print(log, end="", file=sys.stderr)
                self._fail(f"the CPU kernels could not be built: {summary.rstrip(':')}")
            except OSError as error:
                self._fail(
                    f"the CPU kernels could not be loaded ({error}): `albert-fast build --force` makes them anew"
                )
            self.loaded = self.failure is None
        return self.failure


_state = _State()


def load() -> str | None:
    """Builds and loads the library where this process has not yet; why there is none, or None.

    `torch.ops.albert_fast_native` then has its operators.
    """
    return _state.load()


# A compiler that traces a call takes the answers as constants: they do not change once they are known.
for _function in (unavailable, load):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_command(force: bool) -> int:
    """`albert-fast build`: with the kernels of every instruction set, for whatever machine the cache is carried to."""
    start = time.perf_counter()
    try:
        path = build(avx512=True, force=force, quiet=False)
    except BuildError as error:
        print(f"albert-fast build: {error}", file=sys.stderr)
        return 1
    print(f"{path}\n{time.perf_counter() - start:.1f} s, {path.stat().st_size / 2**20:.1f} MiB")
    return 0
