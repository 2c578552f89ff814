"""What Triton's interpreter does not look at, and a GPU would show: each launch's accesses to memory.

- Nothing outside of the tensors that the kernel was given is read or written.
- What a masked load leaves out, without `other`, is undefined: here NaN, or the largest integer.
- Programs run in any order, here in one that is drawn. So nothing that one writes is read or written by another
  one, but after atomics by which both count.
- What a program wrote to memory is read again only after a barrier: another thread of it may have written it.
- One store does not write two values to one place.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Whether programs are looked at side by side; what is no kernel's fault, as offsets that overlap, makes them meet.
CHECKS_ORDER = True


class MemoryFault(RuntimeError):
    """What a kernel does to memory that it may not."""


@dataclass
class Access:
    addresses: np.ndarray  # of elements, as many as are not masked
    size: int  # bytes of an element
    region: int
    writes: bool
    program: int
    segment: int  # barriers that the program has passed
    place: int  # among the launch's accesses and atomics


@dataclass
class Launch:
    """Of one kernel, program by program."""

    name: str
    begins: np.ndarray
    ends: np.ndarray
    order: list[int] = field(default_factory=list)
    program: int = 0  # by its number in the grid; they come in another order
    segment: int = 0
    count: int = 0
    accesses: list[Access] = field(default_factory=list)
    atomics: list[tuple[int, int, int, int]] = field(default_factory=list)  # address, program, segment, place

    def region_of(self, addresses: np.ndarray, size: int, what: str) -> int:
        first, last = int(addresses.min()), int(addresses.max()) + size
        region = int(np.searchsorted(self.begins, first, side="right")) - 1
        if region < 0 or last > self.ends[region]:
            near = max(region, 0)
            raise MemoryFault(
                f"{self.name}: program {self.program} {what} {first - int(self.begins[near])} to "
                f"{last - int(self.begins[near])} of a tensor of {int(self.ends[near] - self.begins[near])} bytes"
            )
        return region

    def note(self, pointers: np.ndarray, mask: np.ndarray, size: int, *, writes: bool) -> None:
        addresses = pointers[mask]
        if not addresses.size:
            return
        region = self.region_of(addresses, size, "writes" if writes else "reads")
        self.count += 1
        self.accesses.append(Access(addresses, size, region, writes, self.program, self.segment, self.count))

    def count_by(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        for address in np.broadcast_to(pointers, mask.shape)[mask].ravel():
            self.region_of(np.asarray(address), size, "counts at")
            self.count += 1
            self.atomics.append((int(address), self.program, self.segment, self.count))

    def check(self) -> None:
        written = {access.region for access in self.accesses if access.writes}
        for region in written:
            self._check_region([access for access in self.accesses if access.region == region])

    def _check_region(self, accesses: list[Access]) -> None:
        size = min(access.size for access in accesses)
        which = np.concatenate([np.full(a.addresses.size * (a.size // size), i) for i, a in enumerate(accesses)])
        places = np.concatenate(
            [(a.addresses[:, None] + np.arange(0, a.size, size, dtype=np.uint64)).ravel() for a in accesses]
        )
        order = np.lexsort((which, places))
        which, places = which[order], places[order]
        writes = np.array([a.writes for a in accesses])[which]
        # Of each place that is written the accesses, in their order; most places have the same.
        begins = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
        writers = np.add.reduceat(writes, begins)
        lengths = np.diff(np.r_[begins, places.size])
        for length in np.unique(lengths[(writers > 0) & (lengths > 1)]):
            of_length = begins[(writers > 0) & (lengths == length)]
            for group in np.unique(which[of_length[:, None] + np.arange(length)], axis=0):
                for first, second in itertools.combinations(group, 2):
                    self._check_pair(accesses[first], accesses[second])

    def _check_pair(self, first: Access, second: Access) -> None:
        """Of two accesses of one place."""
        if first is second or not (first.writes or second.writes):
            return
        verbs = [f"program {a.program} {'writes' if a.writes else 'reads'}" for a in (first, second)]
        if first.program != second.program:
            if not self._counted(first, second):
                raise MemoryFault(f"{self.name}: {verbs[0]} what {verbs[1]}, and nothing orders the two")
        elif first.writes and not second.writes and first.segment == second.segment:
            raise MemoryFault(f"{self.name}: {verbs[0]} what it reads again without a barrier")

    def _counted(self, first: Access, second: Access) -> bool:
        """Whether the first one's program counted after a barrier after it, and the second one's had counted before."""
        after, before = set(), set()
        for address, program, segment, place in self.atomics:
            if program == first.program and segment > first.segment:
                after.add(address)
            if program == second.program and place < second.place:
                before.add(address)
        return bool(after & before)


def poison(result: np.ndarray, mask: np.ndarray, is_bfloat16: bool) -> None:
    """What is not read is anything."""
    if is_bfloat16:
        result[~mask] = 0x7FC0
    elif result.dtype.kind in "iu":
        result[~mask] = np.iinfo(result.dtype).max
    else:
        result[~mask] = np.nan if result.dtype.kind == "f" else True


def check_launches() -> None:
    """From now on, of every kernel that the interpreter runs."""
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
    add, set_program = builder.create_atomic_rmw, builder.set_grid_idx
    executor = interpreter.GridExecutor
    begin, end = executor._init_args_hst, executor._restore_args_dev
    launches: list[Launch] = []

    def size_of(pointers: Any) -> int:
        return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def begin_launch(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, kwargs = begin(self, args_dev, kwargs)
        tensors = [a for a in (*flat(args), *flat(list(kwargs.values()))) if hasattr(a, "data_ptr")]
        spans = {
            (s.data_ptr(), s.data_ptr() + s.nbytes())
            for s in (interpreter._unwrap_tensor(t).untyped_storage() for t in tensors)
            if s.nbytes() > 0
        }
        bounds = np.array(sorted(spans), dtype=np.uint64).reshape(-1, 2)
        launches[:] = [Launch(self.fn.__name__, bounds[:, 0], bounds[:, 1])]
        return args, kwargs

    def end_launch(self: Any, *args: Any) -> None:
        launch = launches.pop()
        if CHECKS_ORDER:
            launch.check()
        end(self, *args)

    def set_drawn_program(self: Any, x: int, y: int, z: int) -> None:
        launch, (nx, ny, nz) = launches[-1], self.grid_dim
        if not launch.order:
            launch.order = random.sample(range(nx * ny * nz), nx * ny * nz)
        launch.program = launch.order[(x * ny + y) * nz + z]
        launch.segment = 0
        set_program(self, launch.program // (ny * nz), launch.program // nz % ny, launch.program % nz)

    def masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *args: Any) -> Any:
        launches[-1].note(ptrs.data, mask.data, size_of(ptrs), writes=False)
        result = load(self, ptrs, mask, other, *args)
        if other is None and not mask.data.all():
            poison(result.data, mask.data, ptrs.get_element_ty() == language.bfloat16)
        return result

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        launch = launches[-1]
        launch.note(ptrs.data, mask.data, size_of(ptrs), writes=True)
        addresses, values = ptrs.data[mask.data], value.data[mask.data]
        if (addresses[1:] <= addresses[:-1]).any():  # otherwise each is there once
            _, first, of_place = np.unique(addresses, return_index=True, return_inverse=True)
            if values[first][of_place].tobytes() != values.tobytes():
                raise MemoryFault(f"{launch.name}: program {launch.program} writes two values to one place at a time")
        return store(self, ptrs, value, mask, *args)

    def atomic_add(self: Any, operation: Any, ptr: Any, val: Any, mask: Any, *args: Any) -> Any:
        launches[-1].count_by(ptr.data, mask.data, size_of(ptr))
        return add(self, operation, ptr, val, mask, *args)

    def pass_barrier(self: Any) -> Any:
        launches[-1].segment += 1
        return barrier(self)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_barrier = atomic_add, pass_barrier
    builder.set_grid_idx = set_drawn_program
    executor._init_args_hst, executor._restore_args_dev = begin_launch, end_launch


def flat(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (flat(arg) if isinstance(arg, tuple) else [arg])]
