"""Dropout masks that depend on nothing but the seed and the element.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11, section 4.2) turns a 64-bit key and
four 32-bit counters into four 32-bit integers. The key is the seed, the counters name the element:

    attention          (site, row * heads + head, query position, key position // 4)
    everything else    (site, row,                position,       column // 4)

and the element takes integer `key position % 4` (or `column % 4`). It is kept where that integer is below
`round((1 - p) * 2**32)`. Rows and positions count within the packed batch, so the mask depends neither on padding nor
on the shape of a kernel's tiles: every backend draws the same bits.

Integers are held in int64, PyTorch's widest type with wrap-around products: the low 64 bits of a product are right, and
its high word is the arithmetic shift with the sign's copies masked away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from albert_fast.ops.checks import check

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(seed: Tensor, counters: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10.

    Args:
        seed: int64 scalar, the key (low word first).
        counters: four int64 tensors that broadcast against each other, values in [0, 2**32).

    Returns:
        four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    key = [seed & _WORD, (seed >> 32) & _WORD]
    counter = list(counters)
    for _ in range(10):
        product0, product2 = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            ((product2 >> 32) & _WORD) ^ counter[1] ^ key[0],
            product2 & _WORD,
            ((product0 >> 32) & _WORD) ^ counter[3] ^ key[1],
            product0 & _WORD,
        ]
        key = [(key[0] + _WEYL[0]) & _WORD, (key[1] + _WEYL[1]) & _WORD]
    return tuple(counter)


def keep_mask(seed: Tensor, site: int, outer: Tensor, inner: Tensor, columns: int, dropout_p: float) -> Tensor:
    """Which elements survive dropout, bool, shape `[*broadcast(outer, inner), columns]`.

    Args:
        seed: int64 scalar on the device of the result.
        site: which dropout of which pass this is; no two dropouts of one forward share a site.
        outer: int64, the second counter (row, or row * heads + head).
        inner: int64, the third counter (position, or query position).
        columns: size of the last dimension (hidden columns, or key positions).
        dropout_p: probability of dropping, in [0, 1).
    """
    groups = torch.arange((columns + 3) // 4, device=seed.device)
    words = philox(seed.reshape(()), (torch.full_like(groups, site), outer.unsqueeze(-1), inner.unsqueeze(-1), groups))
    bits = torch.stack(words, dim=-1).flatten(-2)[..., :columns]
    return bits < round((1.0 - dropout_p) * 2**32)


def token_coordinates(cu_seqlens: Tensor | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and position of each packed token, both int64 [tokens]; without `cu_seqlens` all are of row 0."""
    index = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(index), index
    row = torch.searchsorted(cu_seqlens[1:].long(), index, right=True)
    start = cu_seqlens.long()[row.clamp(max=cu_seqlens.numel() - 1)]
    return row, index - start


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, site: int, cu_seqlens: Tensor | None) -> Tensor:
    """x [tokens, columns] with dropped elements zeroed and the others divided by 1 - p."""
    if dropout_p == 0.0:
        return x
    assert seed is not None
    row, position = token_coordinates(cu_seqlens, x.shape[0], x.device)
    keep = keep_mask(seed, site, row, position, x.shape[1], dropout_p)
    return x * keep * (1.0 / (1.0 - dropout_p))


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    # Not `check`: a compiler that traces the number as a symbol cannot put it into a message.
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; a probability of at least 0 and below 1 was expected")
    if dropout_p == 0.0:
        return
    if seed is None:
        raise ValueError(
            f"dropout_p is {dropout_p} and seed is None; pass an int64 tensor with one element as seed, "
            "or dropout_p=0.0 for inference"
        )
    check(
        seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device,
        f"seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}; "
        f"one int64 element on {device} was expected: torch.randint(2**63 - 1, (), device=...)",
    )
