"""Which implementation serves a call, and why.

A backend is a set of implementations of the operations in `albert_fast.ops`. They are asked in the order of `BACKENDS`,
best first; the first that serves the device, dtype and shapes is used. The last one, `reference`, is plain PyTorch and
serves everything.

`ALBERT_FAST_BACKEND=name` forces one backend: an operation that it cannot serve then raises, so that a test or a
benchmark never measures another one by mistake.

To add a backend, append a `Backend` to `BACKENDS`; `load` may import what only that backend needs (Triton, a compiled
library), so that `import albert_fast` needs neither.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

# The operations of the package: the names under which a backend's implementations are looked up. A backend serves
# `<name>` (forward) and, unless its forward says otherwise, `<name>_backward`.
OPERATIONS = (
    "attention",
    "encoder",
    "masked_lm_loss",
    "dropout_add_layer_norm",
    "bias_gelu",
    "embed_layer_norm",
)

Implementations = Mapping[str, Callable[..., Any]]


class BackendError(RuntimeError):
    """The backend that ALBERT_FAST_BACKEND asks for does not exist here or cannot serve the call."""


class EncoderSizes(NamedTuple):
    """What a call of `encoder` asks for, where a backend serves some sizes alone."""

    tokens: int
    hidden: int
    inner: int
    heads: int
    layers: int  # of different weights
    has_bias: bool
    has_dropout: bool


@dataclass(frozen=True)
class Call:
    """What a backend is told of a call before it is asked to serve it."""

    operation: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None
    activation: str | None = None
    training: bool = False  # whether a gradient will be asked for
    quantized: bool = False  # whether the products are to be in int8
    sizes: EncoderSizes | None = None  # of `encoder`, where they are known before it runs


@dataclass(frozen=True)
class Backend:
    """A set of implementations.

    Attributes:
        name: what ALBERT_FAST_BACKEND calls it.
        unavailable: why this machine cannot use it, in one line that says how to mend it; None where it can.
        declines: why it does not serve a call; None where it does. Asked only where the backend is available.
        load: name of the operation (or `<name>_backward`) -> function on tensors. Called on first use.
    """

    name: str
    unavailable: Callable[[], str | None]
    declines: Callable[[Call], str | None]
    load: Callable[[], Implementations]


_reference: dict[str, Callable[..., Any]] = {}


def reference(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of `albert_fast.ops` as the reference backend's implementation of `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _reference[name] = function
        return function

    return register


REFERENCE = Backend(
    name="reference",
    unavailable=lambda: None,
    declines=lambda call: None,
    load=lambda: _reference,
)


def _in_module(name: str, import_it: Callable[[], ModuleType]) -> Backend:
    """A backend whose module is imported when it is first asked."""
    imported: list[ModuleType] = []  # not functools.cache, of which torch.compile warns its users

    def module() -> ModuleType:
        if not imported:
            imported.append(import_it())
        return imported[0]

    return Backend(
        name=name,
        unavailable=lambda: module().unavailable(),
        declines=lambda call: module().declines(call),
        load=lambda: module().load(),
    )


def _cpu() -> ModuleType:
    from albert_fast import cpu

    return cpu


def _triton() -> ModuleType:
    from albert_fast import triton_backend

    return triton_backend


def _cuda() -> ModuleType:
    from albert_fast import cuda_backend

    return cuda_backend


CPU = _in_module("cpu", _cpu)
TRITON = _in_module("triton", _triton)
CUDA = _in_module("cuda", _cuda)

# Best first.
BACKENDS: list[Backend] = [CPU, CUDA, TRITON, REFERENCE]


_for_graphs: ContextVar[bool] = ContextVar("for_graphs", default=False)


@contextlib.contextmanager
def for_graphs() -> Iterator[None]:
    """What runs inside is to be replayed as a CUDA graph, or warms up for it: many launches then cost little."""
    token = _for_graphs.set(True)
    try:
        yield
    finally:
        _for_graphs.reset(token)


def are_for_graphs() -> bool:
    return _for_graphs.get()


def choose(call: Call) -> Backend:
    """The backend that serves `call`: the forced one, or the first that does not decline."""
    forced = os.environ.get("ALBERT_FAST_BACKEND")
    if forced is None:
        return next(backend for backend in BACKENDS if refusal(backend, call) is None)
    backend = next((backend for backend in BACKENDS if backend.name == forced), None)
    if backend is None:
        known = ", ".join(backend.name for backend in BACKENDS)
        raise BackendError(
            f"ALBERT_FAST_BACKEND is {forced!r}; this version has: {known}. Unset it to let the package choose"
        )
    reason = refusal(backend, call)
    if reason is not None:
        raise BackendError(
            f"ALBERT_FAST_BACKEND={forced} cannot serve {call.operation} ({call.dtype}, {call.device}): {reason}"
        )
    return backend


def refusal(backend: Backend, call: Call) -> str | None:
    """Why `backend` does not serve `call`; None where it does."""
    if backend is not REFERENCE and forward_ad._current_level >= 0:
        # Its kernels would give no tangent, which looks as if nothing depended on anything.
        return "forward-mode derivatives are asked for (torch.func.jvp, torch.autograd.forward_ad)"
    return backend.unavailable() or backend.declines(call)


def implementation(name: str, call: Call) -> Callable[..., Any]:
    """The function that serves operation `name` (`attention`, `attention_backward`, …) for this call."""
    return choose(call).load()[name]


def uses_reference(call: Call) -> bool:
    """Whether the reference serves: PyTorch's own autograd then runs through its lines, and no operator is needed."""
    return choose(call) is REFERENCE


def report(device: torch.device, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, dict[str, str]]]:
    """For each operation: its name, the backend that serves it on `device`, and why each other one does not."""
    rows = []
    for operation in OPERATIONS:
        call = Call(operation, device, dtype, head_dim=64, activation="gelu_new")
        others = {backend.name: reason for backend in BACKENDS if (reason := refusal(backend, call)) is not None}
        rows.append((operation, choose(call).name, others))
    return rows
