"""Rows that lie one after the other in one row: what transformers' collators without padding make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from albert_fast.ops.checks import has_values


def packed_offsets(shape: tuple[int, int], kwargs: dict[str, Any], device: torch.device) -> tuple[Tensor, int] | None:
    """Where the rows begin, from what a call of transformers says of it.

    Args:
        shape: [batch, seq] of the call.
        kwargs: of the call: `cu_seq_lens_q` and `max_length_q`, or `position_ids` that begin anew with each row.
        device: of the hidden states.

    Returns:
        cu_seqlens (int32 [rows + 1], on the device) and a bound of the rows' lengths; None where the call has no
        such rows.
    """
    cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu_seqlens is not None:
        return cu_seqlens.to(device, torch.int32), shape[1] if longest is None else int(longest)
    positions = kwargs.get("position_ids")
    if positions is None or shape[0] != 1 or positions.numel() != shape[1] or not has_values(positions):
        return None
    positions = positions.flatten()
    begins = positions == 0
    steps = positions[1:] - positions[:-1] == 1
    if not bool(begins[:1].all()) or not bool((begins[1:] | steps).all()) or int(begins.sum()) < 2:
        return None
    starts = begins.nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_tensor([shape[1]])]).to(device, torch.int32)
    return cu_seqlens, int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
