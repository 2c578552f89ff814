"""Tensors of which each rank holds a part (DTensors of FSDP2 and of tensor parallelism): their parts and their norms.

What is computed element by element needs the parts alone. A norm needs the whole tensor: one of a part would be another
number on each rank, and LAMB would be silently wrong. Plain tensors, which every rank has whole, go through the same
functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; all ranks have to ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Any, parameter: Tensor) -> Any:
    """`tensor`, divided over the ranks as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    return tensor.redistribute(parameter.device_mesh, parameter.placements)


def norms(parts: Sequence[Tensor], parameters: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """2-norms of whole tensors, each of no dimensions and the same on all ranks.

    Args:
        parts: what this rank has of them.
        parameters: one for each; it says how the tensor is divided. All ranks give the same ones in the same order.
        dtype: what to compute in; that of the parts when None.

    One all-reduce serves all tensors that are divided over the same ranks.
    """
    if not parts:
        return []
    lengths = list(torch._foreach_norm(list(parts), 2, dtype=dtype))
    alike: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for index, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            # Over the other dimensions of the mesh each rank has the same: those are not to be counted twice.
            divided = tuple(dim for dim, place in enumerate(parameter.placements) if not place.is_replicate())
            if divided:
                alike.setdefault((parameter.device_mesh, divided), []).append(index)
    for (mesh, divided), indices in alike.items():
        # In float64: of what the ranks found, nothing more is lost.
        squares = torch.stack([lengths[index] for index in indices]).double().square()
        for dim in divided:
            distributed.all_reduce(squares, group=mesh.get_group(dim))
        for index, length in zip(indices, squares.sqrt().unbind(), strict=True):
            lengths[index] = length.to(lengths[index].dtype)
    return lengths
