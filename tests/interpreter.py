"""Triton's interpreter, made faster: it spends its time on Python around tensors that are small here."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


def interpret_quickly() -> None:
    """Most of the time of Triton's interpreter goes into what gives the same each time: it is done once.

    The ranges of integers are not worked out: they are for an assertion that is made in debugging only.
    """
    from triton.runtime import interpreter

    patch_language_once()
    look_types_up()
    broadcast_at_once()
    draw_at_once()
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def patch_language_once() -> None:
    """The language is patched before each call of each device function: here once a kernel, with the same patches."""
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patches: dict[tuple[str, ...], list[tuple[Any, str, Any]]] = {}

    def direct(patched: Any) -> Any:
        """The function behind a builtin, without what looks at the arguments between."""
        builtin = (getattr(patched, "__kwdefaults__", None) or {}).get("member")
        if builtin is None:
            return patched
        function, semantic = getattr(builtin, "__wrapped__", builtin), interpreter.interpreter_semantic

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        return call

    def patch_once(function: Any) -> Any:
        found = [value for value in function.__globals__.values() if value is language or value is core]
        scope = interpreter._LangPatchScope()
        if found and not any(core.is_builtin(module.load) for module in found):
            return scope
        names = tuple(module.__name__ for module in found)
        if names not in patches:
            scope = patch(function)
            patches[names] = [(where, name, direct(getattr(where, name))) for where, name, _ in scope._changes]
            scope.restore()
        for change in patches[names]:
            scope.set_attr(*change)
        return scope

    interpreter._patch_lang = patch_once


def look_types_up() -> None:
    """Types of blocks, what tensors derive from their types, and what two types become together."""
    from triton.language import core
    from triton.runtime import interpreter

    numpy_type = interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}

    def numpy_type_once(dtype: Any) -> Any:
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    interpreter._get_np_dtype = numpy_type_once

    block_init, tensor_init = core.block_type.__init__, core.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in blocks:
            block_init(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            tensor_init(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name], handle=handle)

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor

    with_element_type = core.block_type.with_element_ty
    with_elements: dict[tuple[str, str], Any] = {}

    def with_element_type_once(self: Any, element: Any) -> Any:
        key = self.name, element.name
        if key not in with_elements:
            with_elements[key] = with_element_type(self, element)
        return with_elements[key]

    core.block_type.with_element_ty = with_element_type_once

    semantic = type(interpreter.interpreter_semantic)
    computation_type = semantic.computation_type_impl
    computation_types: dict[Any, Any] = {}

    def computation_type_once(self: Any, left: Any, left_is_scalar: bool, right: Any, *rest: Any) -> Any:
        key = left.name, left_is_scalar, right.name, *rest
        if key not in computation_types:
            computation_types[key] = computation_type(self, left, left_is_scalar, right, *rest)
        return computation_types[key]

    semantic.computation_type_impl = computation_type_once

    # Of types that are one object, and of values that hold no constant, nothing is to be looked for.
    equal, unwrap = core.dtype.__eq__, core._unwrap_if_constexpr
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core._unwrap_if_constexpr = lambda value: value if type(value) in plain else unwrap(value)


def broadcast_at_once() -> None:
    """Two tensors to one shape, without the builder and lists of constants between; what does not fit goes there."""
    from triton.language import core
    from triton.runtime import interpreter

    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def spread(scalar: Any, block: Any) -> Any:
        handle = interpreter.TensorHandle(np.full(block.shape, scalar.handle.data), scalar.handle.dtype.scalar)
        return core.tensor(handle, block.with_element_ty(scalar.type.scalar))

    def widened(tensor: Any, shape: list[int]) -> Any:
        if list(tensor.type.shape) == shape:
            return tensor
        handle = interpreter.TensorHandle(np.broadcast_to(tensor.handle.data, shape), tensor.handle.dtype.scalar)
        return core.tensor(handle, core.block_type(tensor.type.scalar, shape))

    def both(self: Any, left: Any, right: Any) -> Any:
        is_block = left.type.is_block()
        if is_block != right.type.is_block():
            return (left, spread(right, left.type)) if is_block else (spread(left, right.type), right)
        if not is_block:
            return left, right
        shape, other = list(left.type.shape), list(right.type.shape)
        if shape == other:
            return left, right
        if len(shape) != len(other) or any(1 not in (m, n) and m != n for m, n in zip(shape, other, strict=True)):
            return broadcast(self, left, right)
        shape = [max(sizes) for sizes in zip(shape, other, strict=True)]
        return widened(left, shape), widened(right, shape)

    semantic.broadcast_impl_value = both


def draw_at_once() -> None:
    """Rounds of Philox with 32-bit counters in NumPy: `philox_impl.rounds` is Triton's own function for them."""
    from triton.language import core, random
    from triton.runtime import interpreter

    rounds, half = random.philox_impl, np.uint64(32)

    def philox_impl(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, n_rounds: Any = 10) -> Any:
        counters = c0, c1, c2, c3
        if any(number.dtype != core.uint32 for number in (*counters, k0, k1)):
            return rounds(*counters, k0, k1, n_rounds)
        a, b, c, d = np.broadcast_arrays(*(counter.handle.data for counter in counters))
        key, other = k0.handle.data, k1.handle.data
        for _ in range(int(n_rounds)):
            left, right = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
            a, c = (right >> half).astype(np.uint32) ^ b ^ key, (left >> half).astype(np.uint32) ^ d ^ other
            b, d = right.astype(np.uint32), left.astype(np.uint32)
            key, other = key + np.uint32(0x9E3779B9), other + np.uint32(0xBB67AE85)
        is_block = any(counter.type.is_block() for counter in counters)
        of_words = core.block_type(core.uint32, list(a.shape)) if is_block else core.uint32
        return tuple(core.tensor(interpreter.TensorHandle(word, core.uint32), of_words) for word in (a, b, c, d))

    philox_impl.rounds = rounds  # type: ignore[attr-defined]
    random.philox_impl = philox_impl
