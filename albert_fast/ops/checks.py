"""What the operations ask of their arguments, before any kernel starts.

Shapes and dtypes are always looked at. Values are looked at where that is free of a synchronisation: on the CPU, in
eager mode. On an accelerator `ALBERT_FAST_CHECK=1` looks at them, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(condition: bool, message: str | Callable[[], str], error: type[Exception] = ValueError) -> None:
    """A message that takes time to write is a function: it is written where it is needed alone."""
    if not condition:
        raise error(message if isinstance(message, str) else message())


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *,
    like: Tensor | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raises unless `tensor` has this shape (None: any size), the device of `like`, and one of the dtypes."""
    # Equal, as most are, in one comparison: a call checks dozens of tensors.
    fits = tensor.shape == shape or (
        tensor.dim() == len(shape)
        and all(want is None or have == want for have, want in zip(tensor.shape, shape, strict=True))
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {describe(tensor)}; shape [{wanted}] was expected")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; {like.device} was expected: move it with .to()")
    if dtype is not None:
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} is {describe(tensor)}; {wanted} was expected: convert it with .to()")


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether looking at the values of `tensor` is free (a CPU tensor in eager mode) or was asked for."""
    return (tensor.is_cpu or os.environ.get("ALBERT_FAST_CHECK") == "1") and has_values(tensor)


def has_values(tensor: Tensor) -> bool:
    """Whether `tensor` has values that can be waited for: not while something is compiled, traced or recorded."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta:
        return False
    if type(tensor) is not Tensor and isinstance(tensor, torch._subclasses.FakeTensor):
        return False
    return not is_being_recorded(tensor)


def is_being_recorded(tensor: Tensor) -> bool:
    """Whether what is done to `tensor` now becomes part of a CUDA graph: nothing may wait for its values."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def has_no_derivative(backward: torch.library.CustomOpDef) -> None:
    """Lets a backward operator say what to do, where somebody differentiates it in turn."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{backward._qualname} has no derivative, and a second one was asked for: let PyTorch compute it "
            "(transformers: albert_fast.hf.restore(model) and model.set_attn_implementation('eager'); albert_fast: "
            "ALBERT_FAST_BACKEND=reference and torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
        )

    backward.register_autograd(refuse)


def check_ids(name: str, ids: Tensor, limit: int, what: str) -> None:
    """Raises IndexError unless every value of the integer tensor `ids` is in [0, limit)."""
    if ids.numel() == 0 or not values_can_be_read(ids):
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= limit:
        raise IndexError(
            f"{name} has values from {low} to {high}; {what} has {limit} rows, so 0 to {limit - 1} was expected"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int, max_seqlen: int, like: Tensor) -> None:
    """Offsets of the packed rows: int32 [batch + 1], from 0, never falling, at most `tokens`, steps of at most
    max_seqlen."""
    check_tensor(name, cu_seqlens, (None,), like=like, dtype=torch.int32)
    check(cu_seqlens.numel() >= 1, lambda: f"{name} is empty; batch + 1 offsets were expected, the first of them 0")
    if not values_can_be_read(cu_seqlens):
        return
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    check(
        offsets[0] == 0 and offsets[-1] <= tokens and min(lengths, default=0) >= 0,
        lambda: (
            f"{name} is {_short(offsets)}; offsets that begin with 0, never fall and end at no more than the {tokens} "
            "tokens given were expected"
        ),
    )
    check(
        max(lengths, default=0) <= max_seqlen,
        lambda: (
            f"{name} holds a row of {max(lengths, default=0)} tokens and max_seqlen is {max_seqlen}; "
            "max_seqlen must be at least the longest row"
        ),
    )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:6]))}, …, {values[-1]}]"
