"""Triton's interpreter, made faster: it spends its time on Python around tensors that are small here."""

from __future__ import annotations

import dataclasses
from typing import Any


def interpret_quickly() -> None:
    """Most of the time of Triton's interpreter goes into what gives the same each time: it is done once.

    The language is patched before each call of each device function; within a kernel once is enough, and for the next
    kernel the same patches are put back. Types of blocks, and what tensors derive from their types, are looked up. The
    ranges of integers are not worked out: they are for an assertion that is made in debugging only.
    """
    from triton import language
    from triton.language import core
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patches: list[tuple[Any, str, Any]] = []

    def patch_once(function: Any) -> Any:
        found = [value for value in function.__globals__.values() if value is language or value is core]
        scope = interpreter._LangPatchScope()
        if found and not any(core.is_builtin(module.load) for module in found):
            return scope
        if found != [language]:
            return patch(function)
        if not patches:
            scope = patch(function)
            patches.extend((where, name, getattr(where, name)) for where, name, _ in scope._changes)
            return scope
        for change in patches:
            scope.set_attr(*change)
        return scope

    interpreter._patch_lang = patch_once

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

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
