"""Starts kernels: which tiles on which architecture, and on which device.

Every kernel is started by `launch`, with a table of `Tiles` that stands beside it. Three things can happen: Triton's
interpreter runs it, a GPU does, or, under `recording`, nothing runs and what would have been compiled is noted, for
`albert_fast.kernels.aot`. On a GPU `albert_fast.kernels.tuning` chooses among the configurations of the table.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import AsyncCompileMode, knobs
from triton.compiler import CompiledKernel
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from albert_fast import devices
from albert_fast.kernels import tuning

ARCHITECTURES = (80, 90, 100)

Grid = Callable[[Mapping[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Config:
    """How a kernel is cut.

    Attributes:
        blocks: its tile sizes, constexpr arguments by name.
        num_warps, num_stages: warps of a program, and stages of its loops' pipeline.
    """

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is told of it."""
        compiled = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.blocks, **compiled}

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}"


@dataclass(frozen=True)
class Tiles:
    """The configurations of one kernel; of each list the first is the one used without tuning.

    Attributes:
        interpreter: small tiles, so that short inputs have several.
        half, single: for elements of 2 bytes and of 4, by compute capability: 80, 90, 100. An architecture between
            two uses the lower one's; those of 80 must fit into 99 KB of shared memory, which is what 8.6 and 8.9 have,
            and 12.0, whose tensor cores are those of 8.9, too.
    """

    interpreter: Config
    half: Mapping[int, Sequence[Config]]
    single: Mapping[int, Sequence[Config]]

    def of(self, architecture: int, dtype: torch.dtype) -> Sequence[Config]:
        table = self.half if dtype.itemsize == 2 else self.single
        if architecture >= 120:
            architecture = 89
        return table[max(known for known in table if known <= architecture)]


@dataclass
class Launch:
    """One that was recorded: what to compile."""

    kernel: Any
    arguments: dict[str, Any]  # by name; tensors, numbers, None
    constants: dict[str, Any]  # constexpr arguments but the blocks
    tiles: Tiles
    dtype: torch.dtype
    grid: Grid


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Nothing runs inside; the launches are noted. Tensors may be on the device `meta`."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def dot_precision(dtype: torch.dtype) -> str:
    """What `tl.dot` is to make of float32: full precision, or tf32 where PyTorch's own products may use it."""
    return "tf32" if dtype == torch.float32 and devices.allows_tf32() else "ieee"


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds on the host."""
    return -(-a // b)


def launch(
    kernel: Any,
    grid: Grid,
    *arguments: Any,
    tiles: Tiles,
    dtype: torch.dtype,
    key: tuple[Any, ...] = (),
    in_cache: bool = False,
    **constants: Any,
) -> None:
    """Runs `kernel`.

    Where it is being tuned it runs more than once. What the arguments held is then put back before it runs for good: a
    kernel may add to its outputs or work in place.

    Args:
        grid: tile sizes -> number of programs on each axis.
        arguments: those of the kernel that are not constexpr, in order; the first is a tensor. None is one of the
            kernel's constexpr values to Triton: pass it for a pointer that this call does not have.
        tiles, dtype: choose the configuration; dtype is that of the products or of what is read most.
        key: sizes that the best tiles depend on, numbers or strings. Each new key is timed anew: a size that changes
            with every batch is passed rounded up (`next_power_of_2`). The constexpr arguments, and which pointers are
            None, count without being named here.
        in_cache: whether it finds in L2 what it reads: it is then timed like that.
        constants: the constexpr arguments but the tile sizes.
    """
    if _recorded is not None:
        names = [name for name in kernel.arg_names if name not in constants and name not in tiles.interpreter.blocks]
        _recorded.append(Launch(kernel, dict(zip(names, arguments, strict=True)), constants, tiles, dtype, grid))
        _note(None)
        return

    if isinstance(kernel, InterpretedFunction):
        blocks = tiles.interpreter.blocks
        if all(grid(blocks)):
            kernel[grid(blocks)](*arguments, **constants, **tiles.interpreter.options)
        _note(None)
        return
    device = arguments[0].device
    with devices.current(device):
        call = (*_form(kernel, arguments), device, id(tiles), dtype, key, tuning.enabled(), *constants.values())
        started = _started.get(call)
        if started is None:
            started = _find_and_start(kernel, grid, arguments, tiles, dtype, key, constants, device, in_cache)
            if started is not None:
                _started[call] = started
            _note(None)
            return
        programs = grid(started.blocks)
        if all(programs):
            x, y, z = (*programs, 1, 1)[:3]
            start(started, (x, y, z), arguments, devices.stream_of(device))
            _note(Start(started, (x, y, z), arguments, kernel))


class Start(NamedTuple):
    """A kernel that was started."""

    started: Started
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    kernel: Any


_noted: ContextVar[list[Start | None] | None] = ContextVar("_noted", default=None)


@contextmanager
def noting() -> Iterator[list[Start | None]]:
    """What `launch` starts inside, in this thread; None for what cannot be started again without it."""
    starts: list[Start | None] = []
    token = _noted.set(starts)
    try:
        yield starts
    finally:
        _noted.reset(token)


def _note(entry: Start | None) -> None:
    starts = _noted.get()
    if starts is not None:
        starts.append(entry)


class Started(NamedTuple):
    """What a call was started with. Triton finds it anew each time, and takes longer for that than some kernels do."""

    compiled: CompiledKernel
    blocks: Mapping[str, int]
    constants: tuple[Any, ...]  # of all constexpr arguments, in the kernel's order


_started: dict[tuple[Any, ...], Started] = {}


def start(started: Started, grid: tuple[int, int, int], arguments: Sequence[Any], stream: int | None) -> None:
    """As `compiled[grid](*arguments)` does, without what only hooks need: a profiler's, which rarely are any."""
    compiled, hooks = started.compiled, knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # chains, or what somebody put in their place
        compiled[grid](*arguments, *started.constants, stream=stream)
    else:
        what, unseen = (compiled.function, compiled.packed_metadata), (None, None, None)
        compiled.run(*grid, stream, *what, *unseen, *arguments, *started.constants)


def _form(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles different code for: the kernel, types and dtypes, whether pointers are multiples of 16
    bytes, integers (it looks for 1 and multiples of 16), and whether those that it is told not to specialize on have
    32 bits."""
    types = tuple(map(type, arguments))
    places = _places.get((id(kernel), types))
    if places is None:
        places = _places[id(kernel), types] = _Places.find(kernel, arguments)
    tensors, others = places.tensors(arguments), places.others(arguments)
    wide = reduce(or_, others, 0) >> 31
    return (
        id(places),
        *map(_DTYPE_OF, tensors),
        alignment(tensors),
        places.specialized(arguments),
        wide and tuple([integer >> 31 for integer in others]),
    )


_DTYPE_OF = attrgetter("dtype")


def alignment(tensors: Sequence[Tensor]) -> bool | tuple[bool, ...]:
    """Whether each begins at a multiple of 16 bytes; True where all do, which takes a loop in C."""
    aligned = reduce(or_, map(Tensor.data_ptr, tensors)) % 16 == 0
    return aligned or tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])


def taking(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What takes the elements at these places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda elements: tuple([elements[place] for place in places])


class _Places(NamedTuple):
    """What takes the tensors of a call's arguments, the integers that Triton specializes on, and the others."""

    tensors: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    specialized: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    others: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    kernel: Any  # lives on: its id names it

    @classmethod
    def find(cls, kernel: Any, arguments: tuple[Any, ...]) -> _Places:
        tensors = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        integers = [place for place, argument in enumerate(arguments) if type(argument) is int]
        free = [place for place in integers if kernel.params[place].do_not_specialize]
        return cls(taking(tensors), taking([place for place in integers if place not in free]), taking(free), kernel)


# By the kernel's id, which is quicker to look up than the kernel, and the types of the arguments.
_places: dict[tuple[int, tuple[type, ...]], _Places] = {}


def _find_and_start(
    kernel: Any,
    grid: Grid,
    arguments: tuple[Any, ...],
    tiles: Tiles,
    dtype: torch.dtype,
    key: tuple[Any, ...],
    constants: dict[str, Any],
    device: torch.device,
    in_cache: bool,
) -> Started | None:
    """Chooses a configuration, compiles the kernel where it is not, and starts it; returns what the next call of this
    form needs, or None where the choice was not a lasting one."""
    configs = tiles.of(architecture(device), dtype)
    first = config = configs[0]
    if not all(grid(first.blocks)):
        return None
    lasting = True

    def run(config: Config) -> Any:
        return kernel[grid(config.blocks)](*arguments, **constants, **config.options)

    if len(configs) > 1 and tuning.enabled():
        what = (kernel.fn, dtype, key, tuple(constants.items()), tuple([argument is None for argument in arguments]))
        # In a context of its own: an interruption would leave Triton's mode active, and it refuses a second one.
        compile_all = functools.partial(copy_context().run, _compile_all, kernel, arguments, constants, configs)
        choices = tuning.choices(device, in_cache)
        config = choices.best(what, configs, run, arguments, compile_all)
        lasting = what in choices.chosen
    try:
        compiled = run(config)
    except OutOfResources:  # chosen for another call that counts as the same, or on a GPU of the same name
        if config is first:
            raise
        config = first
        compiled = run(first)
    if not lasting or not isinstance(compiled, CompiledKernel):
        return None
    values = {**constants, **config.blocks}
    return Started(compiled, config.blocks, tuple(values[name] for name in kernel.arg_names[len(arguments) :]))


def _compile_all(
    kernel: Any, arguments: Sequence[Any], constants: Mapping[str, Any], configs: Sequence[Config]
) -> None:
    """Compiles the configurations at the same time: Triton's compiler does not hold the interpreter's lock. What fails
    to compile fails again where it is run."""
    threads = min(len(configs), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for config in configs:
            kernel.warmup(*arguments, grid=(1,), **constants, **config.options)


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability, 80 for 8.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs at least keep the device busy: few for the interpreter, an H100's where nothing runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


@functools.cache
def memory_bytes(device: torch.device) -> int:
    """All of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory
