"""Chooses among a kernel's configurations by timing them on a GPU, once for each kind of call.

`launch` asks here. The first call of a kind runs each configuration on the very arguments, for about 50 ms, waits for
the GPU while it does, and puts back what the arguments held; later ones look the answer up, in memory or, in later
processes, in a file. There is one file for each name of a GPU, version of Triton and state of the sources in kernels/,
in the cache folder of `albert_fast.native`.

ALBERT_FAST_AUTOTUNE=0 uses the first configuration of each table: nothing is timed, and the bits do not depend on what
the cache holds. Nothing is timed while a CUDA graph is captured either.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from albert_fast.native import cache_folder

# Another than the first is chosen only where it takes less than this part of the first's time: timings of the same
# kernel differ by about as much, and who runs twice without the file should find the same.
_GAIN = 0.97

_Config = TypeVar("_Config")  # launch.Config: anything that a string names


def enabled() -> bool:
    return os.environ.get("ALBERT_FAST_AUTOTUNE", "1") != "0"


@functools.cache
def choices(device: torch.device, in_cache: bool = False) -> Choices:
    """`in_cache`: for kernels that find in L2 what they read."""
    return _choices_of(torch.cuda.get_device_name(device), in_cache)


@functools.cache
def _choices_of(device_name: str, in_cache: bool = False) -> Choices:
    name = re.sub(r"\W+", "-", f"{device_name} triton {triton.__version__}")
    milliseconds = _milliseconds_in_cache if in_cache else _milliseconds
    return Choices(cache_folder() / f"tuning-{name}-{_sources()}.json", milliseconds, _capturing)


def _sources() -> str:
    """Digest of kernels/: kernels and tables of tiles."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def _milliseconds(function: Callable[[], None]) -> float:
    # On the caller's stream, after what it waits for, and with a cold L2: what a kernel finds in a training step, whose
    # tensors are larger than it.
    return triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")


def _milliseconds_in_cache(function: Callable[[], None]) -> float:
    # One call after the other. Each is shorter than the host takes to launch it: the GPU waits until all are.
    calls, times = 20, []
    for _ in range(3):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        function()
        torch.cuda._sleep(10_000_000)  # clocks, 5 ms
        before.record()
        for _ in range(calls):
            function()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / calls)
    return statistics.median(times)


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


class Choices:
    """What was chosen on GPUs of one name.

    Args:
        path: of the file.
        milliseconds: times a function.
        capturing: whether nothing may be timed now.

    Attributes:
        chosen: what `best` will answer again, by its `what`.
    """

    def __init__(
        self, path: Path, milliseconds: Callable[[Callable[[], None]], float], capturing: Callable[[], bool]
    ) -> None:
        self._path = path
        self._milliseconds = milliseconds
        self._capturing = capturing
        self.chosen: dict[Hashable, Any] = {}
        self._stored: dict[str, Any] | None = None  # the file, when it was last looked at

    def best(
        self,
        what: tuple[Any, ...],
        configs: Sequence[_Config],
        run: Callable[[_Config], None],
        arguments: Sequence[Any] = (),
        compile_all: Callable[[], None] = lambda: None,
    ) -> _Config:
        """The fastest of `configs` for calls of this kind.

        Args:
            what: the kernel's Python function, dtype, key, constants (pairs) and for each argument whether it is None.
            run: runs the call.
            arguments: of the call; tensors among them hold afterwards what they hold now.
            compile_all: is called before the first of them is run, so that none waits for its turn to be compiled.
        """
        chosen = self.chosen.get(what)
        if chosen is not None:
            return chosen
        if self._stored is None:
            self._stored = read_json(self._path)
        name = describe(*what)
        chosen = _find(self._stored.get(name), configs)
        if chosen is None:
            if self._capturing():
                return configs[0]
            compile_all()
            try:
                with _unchanged(arguments):
                    chosen = self._tune(name, configs, run)
            except torch.OutOfMemoryError:  # no room for what timing needs: a later process may have it
                chosen = configs[0]
        self.chosen[what] = chosen
        return chosen

    def _tune(self, name: str, configs: Sequence[_Config], run: Callable[[_Config], None]) -> _Config:
        took: dict[str, float | None] = {}  # None: does not fit
        best, least = configs[0], float("inf")
        for config in configs:
            try:
                time = self._milliseconds(functools.partial(run, config))
            except (OutOfResources, PTXASError):
                took[str(config)] = None
                continue
            took[str(config)] = round(time, 6)
            if time < least:
                best, least = config, time if config is not configs[0] else time * _GAIN
        self._stored = merge_json(self._path, {name: {"best": str(best), "milliseconds": took}})
        # Another process may have been faster: both then use its choice.
        return _find(self._stored.get(name), configs) or best


@contextlib.contextmanager
def _unchanged(arguments: Sequence[Any]) -> Iterator[None]:
    """Puts back what tensors hold. The version counters stay, too: these are the same values."""
    saved = [(a.data, a.data.clone()) for a in arguments if isinstance(a, Tensor) and not _repeats(a)]
    try:
        yield
    finally:
        with torch.inference_mode():  # which alone may write to tensors that were made in it
            for tensor, before in saved:
                tensor.copy_(before)


def _repeats(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: no kernel writes there."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def describe(
    function: Callable[..., Any],
    dtype: torch.dtype,
    key: tuple[Any, ...],
    constants: tuple[tuple[str, Any], ...],
    absent: Sequence[bool],
) -> str:
    """A kind of call, as the file names it."""
    flags = " ".join(f"{name}={value}" for name, value in sorted(constants))
    pattern = "".join("-" if is_none else "+" for is_none in absent)
    return f"{function.__module__}.{function.__name__} {str(dtype).removeprefix('torch.')} {key} {flags} {pattern}"


def _find(entry: Any, configs: Sequence[_Config]) -> _Config | None:
    name = entry.get("best") if isinstance(entry, dict) else None
    return next((config for config in configs if str(config) == name), None)


# -------------------------------------------------------------------------------------- files that processes share


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; {} where there is none, and with one warning where it is not one."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _warn(f"{path} cannot be read ({error}) and is ignored: delete it")
        return {}
    if not isinstance(found, dict):
        _warn(f"{path} is not what albert_fast writes there and is ignored: delete it")
        return {}
    return found


def merge_json(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a file, where what is there stays, and returns all of it. The file is whole at every moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            merged = {**entries, **read_json(path)}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(merged, indent=1, sort_keys=True))
            os.replace(partial, path)
            return merged
    except OSError as error:
        _warn(f"cannot write {path} ({error}): what was measured is lost with this process; set ALBERT_FAST_CACHE")
        return {**entries, **read_json(path)}


@functools.cache  # once
def _warn(message: str) -> None:
    warnings.warn(f"albert_fast: {message}", RuntimeWarning, stacklevel=4)
