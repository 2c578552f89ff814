"""Memory for what a training step keeps for its backward, used again by the next step.

A gigabyte and more is kept in each step, and a system hands new memory out page by page, cleared: on a virtual machine
that took 14 % of a training step (8 rows of 512, float32). So its storages stay here, and one that nothing else refers
to any more, backward having released it, is given out again. Inference gives all of them back to the system.
"""

from __future__ import annotations

import math
import os
import threading

import torch
from torch import Tensor, UntypedStorage

_pool: list[UntypedStorage] = []
_lock = threading.Lock()


def _after_fork() -> None:
    """Another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# Less is not worth a look.
_LEAST_BYTES = 1 << 20


# How many refer to a storage. A torch that does not tell gets new memory in each step.
_count = getattr(torch._C, "_storage_Use_Count", None)


def _is_free(storage: UntypedStorage) -> bool:
    """Whether this module alone refers to it."""
    return _count is not None and _count(storage._cdata) == 1


def empty(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """A tensor of each shape and dtype, its values anything, in memory of its own."""
    with _lock:
        # Largest last. Those that are free and not taken go back to the system: batches of other sizes would pile up.
        free = sorted(filter(_is_free, _pool), key=UntypedStorage.nbytes)
        busy = [storage for storage in _pool if not _is_free(storage)]
        tensors = [_take(free, shape, dtype) for shape, dtype in shapes]
        taken = [tensor.untyped_storage() for tensor in tensors] if _count is not None else []
        _pool[:] = busy + [storage for storage in taken if storage.nbytes() >= _LEAST_BYTES]
    return tensors


def _take(free: list[UntypedStorage], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    needed = math.prod(shape) * dtype.itemsize
    for i, storage in enumerate(free):
        if _LEAST_BYTES <= needed <= storage.nbytes() <= 1.5 * needed:
            return torch.empty(0, dtype=dtype).set_(free.pop(i), 0, shape)  # type: ignore[call-overload]
    tensor = torch.empty(shape, dtype=dtype)
    torch.ops.albert_fast_native.advise(tensor)
    return tensor


def release() -> None:
    """Gives what is free back to the system."""
    if _pool:
        with _lock:
            _pool[:] = [storage for storage in _pool if not _is_free(storage)]
