"""Weights of the shared layer as the CPU kernels read them: packed once a version of the parameters, used until then.

A packing is good as long as the very same tensors are given with the same version counters and memory:
`load_state_dict`, `.to()` and every edit in place that autograd knows of change one of them. Three kinds of edit change
none:

- by an optimizer with `fused=True`: every optimizer's step drops the packings of its parameters.
- of a tensor made under `torch.inference_mode()`, which has no version counter: a copy of it is kept and compared.
- through `.data` or NumPy: a sample of 256 elements of each matrix is compared, 16 side by side at 16 places. Replacing
  or scaling a matrix is seen; an edit of a few elements is not, unless one of them is in the sample. Call `forget()`
  after such an edit.

Vectors are not packed: each call reads them from the parameters.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from albert_fast.ops.encoder import TENSORS_PER_LAYER
from albert_fast.ops.encoder import corrections as encoder_corrections

# csrc/cpu/gemm.h
CODES = {torch.float32: 0, torch.bfloat16: 1}
_FORMATS = {**CODES, torch.int8: 2}


def _drop_stepped(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for key in list(_entries):
        if not stepped.isdisjoint(key):
            _entries.pop(key, None)


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_drop_stepped)


# Places of the matrices among a layer's tensors: query, key, value, dense, ffn, ffn_output.
_MATRICES = (0, 2, 4, 6, 10, 12)


class _Entry(NamedTuple):
    references: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    fingerprint: int  # of addresses and elements
    copies: tuple[Tensor, ...]  # of those without a version counter
    packed: list[Tensor]  # 4 a layer, or with the transposes 8; of the ends each
    has_transposes: bool
    corrections: list[tuple[weakref.ref[Tensor], object, Tensor]]  # of biases, for the last input means: one or none


_entries: dict[tuple[object, ...], _Entry] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """A lock that another thread held when the process forked would never be free again."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def forget() -> None:
    """Drops every packing."""
    with _lock:
        _entries.clear()


def packed_weights(parameters: list[Tensor], dtype: torch.dtype, transposes: bool = False) -> list[Tensor]:
    """The matrices of the layers, packed for products in `dtype`: for each layer query, key and value as one, dense,
    ffn, ffn_output, and with `transposes` the transpose of each after them."""
    return _entry(_matrices(parameters), dtype, transposes).packed


def quantized_weights(
    parameters: list[Tensor], input_means: Tensor | None, layer_of_pass: list[int]
) -> tuple[list[Tensor], Tensor | None]:
    """The same for products in int8, and what `albert_fast.ops.encoder.corrections` makes of `input_means`."""
    entry = _entry(_matrices(parameters), torch.int8)
    return entry.packed, _corrections(entry, parameters, input_means, layer_of_pass)


class ModelWeights(NamedTuple):
    """What the native `model` takes of its weights; the fingerprints are for it to look at."""

    packed: list[Tensor]  # 4 a layer, then the ends
    fingerprints: list[int]  # of the layers and of the ends
    corrections: Tensor | None


def model_weights(
    parameters: list[Tensor],
    ends: list[Tensor],
    quantized: bool,
    input_means: Tensor | None,
    layer_of_pass: list[int],
    is_known: bool,
) -> ModelWeights:
    """The matrices of the layers, in int8 where they are `quantized`, and those at the ends of a model.

    With `is_known` what is there already, or nothing: changes without a version counter are not looked for then.
    """
    matrices, dtype = _matrices(parameters), parameters[0].dtype
    inner = torch.int8 if quantized else dtype
    if is_known:
        layers, outer = _known(matrices, inner), _known(ends, dtype)
        if layers is None or outer is None or layers.copies or outer.copies:
            return ModelWeights([], [], None)
    else:
        layers, outer = _entry(matrices, inner), _entry(ends, dtype, are_layers=False)
    corrections = _corrections(layers, parameters, input_means, layer_of_pass) if quantized else None
    return ModelWeights(layers.packed + outer.packed, [layers.fingerprint, outer.fingerprint], corrections)


def _corrections(
    entry: _Entry, parameters: list[Tensor], input_means: Tensor | None, layer_of_pass: list[int]
) -> Tensor | None:
    if input_means is None:
        return None
    for_what = (_version(input_means), input_means.data_ptr(), tuple(layer_of_pass))
    for means, known_for, corrections in entry.corrections:
        if means() is input_means and known_for == for_what:
            return corrections
    with torch.no_grad():
        corrections = encoder_corrections(parameters, input_means, layer_of_pass).float().contiguous()
    entry.corrections[:] = [(weakref.ref(input_means), for_what, corrections)]
    return corrections


def _entry(matrices: list[Tensor], dtype: torch.dtype, transposes: bool = False, *, are_layers: bool = True) -> _Entry:
    entry = _known(matrices, dtype, transposes)
    if entry is not None and _is_fresh(entry, matrices):
        return entry
    with _lock:
        entry = _known(matrices, dtype, transposes)
        if entry is None or not _is_fresh(entry, matrices):
            key = _key(matrices, dtype)
            # Weights that are being trained are packed in both ways from then on.
            old = _entries.get(key)
            transposes = transposes or (old is not None and old.has_transposes)
            entry = _entries[key] = _prepare(matrices, dtype, transposes, are_layers, key)
        return entry


def _key(matrices: list[Tensor], dtype: torch.dtype) -> tuple[object, ...]:
    return (*map(id, matrices), dtype, os.environ.get("ALBERT_FAST_ISA"))


def _known(matrices: list[Tensor], dtype: torch.dtype, transposes: bool = False) -> _Entry | None:
    """The packing of these very tensors in these versions."""
    entry = _entries.get(_key(matrices, dtype))
    if entry is None or (transposes and not entry.has_transposes):
        return None
    if any(reference() is not matrix for reference, matrix in zip(entry.references, matrices, strict=True)):
        return None
    return entry if entry.versions == tuple(map(_version, matrices)) else None


def _is_fresh(entry: _Entry, matrices: list[Tensor]) -> bool:
    """Whether nothing changed that no version tells of."""
    if entry.fingerprint != torch.ops.albert_fast_native.fingerprint(matrices):
        return False
    without = [matrix for matrix in matrices if matrix.is_inference()] if entry.copies else []
    return all(torch.equal(copy, matrix) for copy, matrix in zip(entry.copies, without, strict=True))


def _matrices(parameters: list[Tensor]) -> list[Tensor]:
    return [parameters[first + place] for first in range(0, len(parameters), TENSORS_PER_LAYER) for place in _MATRICES]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _prepare(
    matrices: list[Tensor], dtype: torch.dtype, transposes: bool, are_layers: bool, key: tuple[object, ...]
) -> _Entry:
    def drop(_: weakref.ref[Tensor]) -> None:
        _entries.pop(key, None)

    _watch_optimizers()
    # What tells the versions apart is taken first: an edit that comes between is then noticed by the next call.
    references = tuple(weakref.ref(matrix, drop) for matrix in matrices)
    versions = tuple(map(_version, matrices))
    fingerprint = torch.ops.albert_fast_native.fingerprint(matrices)
    with torch.no_grad():
        copies = tuple(matrix.clone() for matrix in matrices if matrix.is_inference())
        sources = _layers(matrices) if are_layers else [[matrix.detach() for matrix in matrices]]
        flat = [m for of in sources for m in ([*of, *(matrix.t() for matrix in of)] if transposes else of)]
        packed = pack(flat, dtype)
    return _Entry(references, versions, fingerprint, copies, packed, transposes, [])


def _layers(matrices: list[Tensor]) -> list[list[Tensor]]:
    """Of each layer query, key and value as one, then the others."""
    layers = []
    for first in range(0, len(matrices), len(_MATRICES)):
        query, key, value, *rest = (matrix.detach() for matrix in matrices[first : first + len(_MATRICES)])
        layers.append([torch.cat([query, key, value]), *rest])
    return layers


def pack(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each of them, one after the other in memory with large pages."""
    library, code = torch.ops.albert_fast_native, _FORMATS[dtype]
    sizes = [(library.packed_bytes(code, *matrix.shape) + 63) // 64 * 64 for matrix in matrices]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    library.advise(memory)
    packed = list(memory.split(sizes))
    for matrix, part in zip(matrices, packed, strict=True):
        library.pack(matrix, code, part)
    return packed
