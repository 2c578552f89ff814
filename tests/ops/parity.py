"""What the parity suites share: implementations to try, ragged inputs, gradients, and the bound on errors.

A suite compares three results on the same inputs: the implementation under test, PyTorch's own kernels in the same
dtype (the peer), and an independent formula in float64 (the oracle).
"""

import functools
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from albert_fast import backends

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACCELERATED = [torch.float32, torch.bfloat16]
LENGTHS = (1, 15, 17, 63, 127, 511)
SHORT_LENGTHS = (1, 2, 3, 5, 15, 17)

# The reference through PyTorch's autograd, then the operator as each backend of this machine serves it. Where
# ALBERT_FAST_BACKEND names a backend, that one alone.
REFERENCE = "reference"
_forced = os.environ.get("ALBERT_FAST_BACKEND")
IMPLEMENTATIONS = [
    *([REFERENCE] if _forced is None else []),
    *(
        f"operator of {backend.name}"
        for backend in backends.BACKENDS
        if _forced in (None, backend.name) and backend.unavailable() is None
    ),
]

parametrize_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
parametrize_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def use(implementation: str, call: backends.Call, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Makes `implementation` serve the rest of the test; True where the operator is to be called.

    A backend without float64 is given the same numbers in float32, and the test's tolerances are widened. Skips where
    the backend declines the call otherwise: choosing another in its place would test that one twice.
    """
    if implementation == REFERENCE:
        monkeypatch.delenv("ALBERT_FAST_BACKEND", raising=False)
        monkeypatch.setattr(backends, "BACKENDS", [backends.REFERENCE])
        return False
    name = implementation.removeprefix("operator of ")
    monkeypatch.setenv("ALBERT_FAST_BACKEND", name)
    backend = next(backend for backend in backends.BACKENDS if backend.name == name)
    reason = backends.refusal(backend, call)
    if reason is not None and call.dtype == torch.float64:
        reason = backends.refusal(backend, replace(call, dtype=torch.float32))
        in_float32 = [_in_float32(other) if other is backend else other for other in backends.BACKENDS]
        monkeypatch.setattr(backends, "BACKENDS", in_float32)
        monkeypatch.setattr(sys.modules[__name__], "_least_tolerance", 1e-4)
        monkeypatch.setattr(torch.testing, "assert_close", partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5))
    if reason is not None:
        pytest.skip(f"{name} declines: {reason}")
    return True


# What the bounds below allow at least.
_least_tolerance = 0.0


def _as_far_apart(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As `to`, which puts together what lies apart: here each element has its place, and NaN lies between them."""
    cast = tensor.to(dtype)
    if cast.stride() == tensor.stride() or tensor.numel() == 0:
        return cast
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.full((last + 1,), float("nan"), dtype=dtype, device=tensor.device)
    places = memory.as_strided(tensor.shape, tensor.stride())
    once = [slice(None) if stride else slice(1) for stride in tensor.stride()]  # of what is expanded
    places[tuple(once)].copy_(cast[tuple(once)])
    return places


def _in_float32(backend: backends.Backend) -> backends.Backend:
    """The backend, with float64 tensors cast to float32 on the way in and the results cast back."""

    def cast_to(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return _as_far_apart(value, new) if value.dtype == old else value
        if isinstance(value, list | tuple):
            items = [cast_to(item, old, new) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: cast_to(
            function(*cast_to(args, torch.float64, torch.float32)), torch.float32, torch.float64
        )

    def declines(call: backends.Call) -> str | None:
        return backend.declines(replace(call, dtype=torch.float32) if call.dtype == torch.float64 else call)

    return replace(
        backend,
        declines=declines,
        load=lambda: {name: wrapped(function) for name, function in backend.load().items()},
    )


# ----------------------------------------------------------------------------------------------------- inputs


def ragged_lengths(candidates: tuple[int, ...] = LENGTHS, rows: int | None = None) -> list[int]:
    """Each of the candidates once, or `rows` of them drawn, and one empty row, in random order."""
    lengths = list(candidates) if rows is None else random.choices(candidates, k=rows)
    lengths.append(0)
    random.shuffle(lengths)
    return lengths


def offsets(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """cu_seqlens of rows of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def rows_of(cu_seqlens: Tensor) -> list[slice]:
    ends = cu_seqlens.tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def random_seed(device: torch.device | str = "cpu") -> Tensor:
    """A key for the dropout: any 64 bits."""
    return torch.randint(-(2**63), 2**63 - 1, (), device=device)


def cast(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """The tensors with those of floating point in `dtype`."""
    return {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


def oracle_inputs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The very same values in float64 on the CPU, where the formula in the test is evaluated."""
    return cast(tensors, torch.float64, "cpu")


# -------------------------------------------------------------------------------------------------- gradients


def differentiate(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor], upstream: Tensor | None = None
) -> dict[str, Tensor]:
    """`output` of function(**tensors), and by name the gradient of each tensor of floating point.

    `upstream` is the gradient of the output: ones when None.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()
    }
    output = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstream = torch.ones_like(output) if upstream is None else upstream.to(output)
    grads = torch.autograd.grad(output, list(wanted.values()), upstream, allow_unused=True)
    return {
        "output": output.detach(),
        **{
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(wanted.items(), grads, strict=True)
        },
    }


# ----------------------------------------------------------------------------------------------------- bounds


def relative_error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Frobenius norm of the difference over that of the expected, or over `scale`."""
    actual, expected = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, expected))
    assert actual.shape == expected.shape
    error = (actual - expected).norm().item()
    scale = expected.norm().item() if scale is None else scale
    return error / scale if scale > 0 else error


class Errors(NamedTuple):
    """Of a result and of PyTorch's, and what is allowed at least."""

    name: str
    actual: float
    peer: float
    factor: float
    floor: float
    dtype: torch.dtype

    def within(self) -> bool:
        return self.actual <= max(self.factor * self.peer, self.floor)

    def check(self) -> None:
        found = f"{self.name}: relative error {self.actual:.3g}, that of PyTorch in {self.dtype} {self.peer:.3g}"
        assert self.within(), found


# Where `judged_over_draws` collects what a run of its test finds.
_collected: list[Errors] | None = None
_DRAWS = 8


def judged_over_draws(test: Callable[..., None]) -> Callable[..., None]:
    """For tests of random inputs that call `assert_as_accurate_as`, with the same names each time.

    How far rounding carries a few numbers, or one sharp softmax, is the luck of a draw, and PyTorch's may have more of
    it. Where an error exceeds its bound, the test is run again with other inputs, and the root mean squares over all
    runs, that one among them, are held to the same bound.
    """

    @functools.wraps(test)
    def judged(*args: Any, **kwargs: Any) -> None:
        def draw() -> list[Errors]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys.modules[__name__], "_collected", [])
                test(*args, **kwargs)
                assert _collected, "nothing to judge"
                return _collected

        draws = [draw()]
        if not all(errors.within() for errors in draws[0]):
            draws += [draw() for _ in range(_DRAWS - 1)]
        for of_one in zip(*draws, strict=True):
            actual, peer = (math.hypot(*errors) / len(draws) ** 0.5 for errors in list(zip(*of_one, strict=True))[1:3])
            assert len({errors.name for errors in of_one}) == 1
            of_one[0]._replace(actual=actual, peer=peer).check()

    return judged


def assert_as_accurate_as(
    actual: Tensor,
    peer: Tensor,
    oracle: Tensor,
    factor: float = 2.0,
    name: str = "",
    scale: float | None = None,
) -> None:
    """The error of `actual` is at most `factor` times that of `peer`, PyTorch's result in the same dtype.

    One rounding is always allowed (few numbers may happen to be exact in the peer); in float64, where the oracle
    itself is rounded, a few more. `scale` takes the place of the oracle's norm where that vanishes.
    """
    assert actual.dtype == peer.dtype, f"{name}: {actual.dtype} in place of {peer.dtype}"
    epsilon = torch.finfo(actual.dtype).eps
    floor = max(64 * epsilon if actual.dtype == torch.float64 else epsilon, _least_tolerance)
    error, allowed = relative_error(actual, oracle, scale), relative_error(peer, oracle, scale)
    errors = Errors(name, error, allowed, factor, floor, actual.dtype)
    if _collected is None:
        errors.check()
    else:
        _collected.append(errors)


def assert_all_as_accurate_as(
    actual: Mapping[str, Tensor],
    peer: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
    scales: Mapping[str, float] | None = None,
) -> None:
    """`assert_as_accurate_as` for the output and every gradient."""
    assert actual.keys() == peer.keys() == oracle.keys()
    for name in oracle:
        assert_as_accurate_as(actual[name], peer[name], oracle[name], name=name, scale=(scales or {}).get(name))


def assert_all_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float = 1e-12,
    scales: Mapping[str, float] | None = None,
) -> None:
    """Every relative error is below `tolerance`; absolute where the expected is zero."""
    assert actual.keys() == expected.keys()
    tolerance = max(tolerance, _least_tolerance)
    for name in expected:
        error = relative_error(actual[name], expected[name], (scales or {}).get(name))
        assert error <= tolerance, f"{name}: relative error {error:.3g}"


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), f"{name} differs from run to run"


# ---------------------------------------------------------------------------------------------- torch.library


def check_operator(operator: Any, arguments: tuple[Any, ...], without_gradient: tuple[int, ...] = ()) -> None:
    """torch.library.opcheck, with gradients of every tensor of floating point but `without_gradient`."""

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(item) for item in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().clone().requires_grad_()
        return value

    torch.library.opcheck(
        operator,
        tuple(argument if index in without_gradient else leaf(argument) for index, argument in enumerate(arguments)),
    )


class CountingBackend:
    """For torch.compile: `aot_eager`, forward and backward, and a count of the graphs that were asked for."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """The sizes of what autograd keeps for the backward of the functions that run inside, views by what they show."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


class LargestTensor(TorchDispatchMode):
    """Records the memory, in elements, behind the largest tensor that any operation under it returns."""

    numel = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
