"""A product for few tokens, with LayerNorm before it and bias, activation and a residual after it.

    y = act(LayerNorm(x) weightᵀ + bias) + LayerNorm(residual)

each part of it where it is asked for; `albert_fast.kernels.encoder_few_tokens` says how LayerNorm gets into the weight.
A few dozen tiles make up y, and each program takes about as long as the bytes of its tile's operands take from L2: so
where the sum over the depth is long it is split among programs, and the last of a tile to arrive adds their parts, in
their order, whoever was first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.attention_tile import add_product
from albert_fast.kernels.bias_gelu import activation
from albert_fast.kernels.launch import Config, Tiles, cdiv, dot_precision, launch, next_power_of_2

GROUP = 32  # columns of a row whose mean and squared deviations are kept; BLOCK_N is a multiple
_GROUP = tl.constexpr(GROUP)


@triton.jit
def mean_and_rstd(means, deviations, eps, WIDTH: tl.constexpr):
    """Of rows of WIDTH columns, [rows, 1] each, from those of their groups [rows, GROUPS], zero beyond the last."""
    group = tl.arange(0, means.shape[1])
    size = tl.minimum(tl.maximum(WIDTH - group * _GROUP, 0), _GROUP).to(tl.float32)[None, :]
    mean = tl.sum(means * size, axis=1, keep_dims=True) / WIDTH
    off = means - mean
    return mean, tl.rsqrt(tl.sum(deviations + size * (off * off), axis=1, keep_dims=True) / WIDTH + eps)


@triton.jit
def store_statistics(statistics, tile, token, tokens, first, COLUMNS: tl.constexpr):
    """Mean and squared deviations of each group of a tile's rows; its first column is `first`."""
    PARTS: tl.constexpr = tile.shape[1] // _GROUP
    GROUPS: tl.constexpr = (COLUMNS + _GROUP - 1) // _GROUP
    group = first // _GROUP + tl.arange(0, PARTS)
    parts = tl.reshape(tile, (tile.shape[0], PARTS, _GROUP))
    size = tl.minimum(tl.maximum(COLUMNS - group * _GROUP, 0), _GROUP)[None, :, None]  # 0 beyond the last
    inside = tl.arange(0, _GROUP)[None, None, :] < size
    mean = tl.sum(tl.where(inside, parts, 0.0), axis=2, keep_dims=True) / tl.maximum(size, 1).to(tl.float32)
    off = tl.where(inside, parts - mean, 0.0)
    at = statistics + token[:, None] * GROUPS + group[None, :]  # [rows, PARTS]
    mask = (token < tokens)[:, None] & (group < GROUPS)[None, :]
    tl.store(at, tl.reshape(mean, (tile.shape[0], PARTS)), mask=mask)
    tl.store(at + tokens * GROUPS, tl.sum(off * off, axis=2), mask=mask)


@triton.jit(do_not_specialize=["tokens", "eps"])
def few_tokens_product_kernel(
    x,  # [tokens, DEPTH]
    weight,  # [COLUMNS, DEPTH]
    bias,  # [COLUMNS]
    y,  # [tokens, COLUMNS]
    weight_sums,  # float32 [COLUMNS]: x goes through LayerNorm; or None
    residual,  # [tokens, COLUMNS] or None
    norm_weight,  # [COLUMNS]: the residual goes through LayerNorm; or None
    norm_bias,  # [COLUMNS] or None
    statistics,  # float32 [2, tokens, groups of WIDTH] of what goes through LayerNorm, or None
    new_statistics,  # float32 [2, tokens, groups of COLUMNS] of y, or None
    partials,  # float32, of every tile [SPLIT, BLOCK_M, BLOCK_N]
    counters,  # int32, 0 for every tile, and 0 again
    tokens,
    eps,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,  # at least those of WIDTH
    FORM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    # What lies beyond is read from the last, and not written: no masks in the loop.
    row = tl.minimum(token, tokens - 1).to(tl.int64)
    column = first + tl.arange(0, BLOCK_N)
    mask = (token < tokens)[:, None]
    if COLUMNS % BLOCK_N != 0:
        mask = mask & (column < COLUMNS)[None, :]
        column = tl.minimum(column, COLUMNS - 1)

    # All that is needed after the loop is asked for before it, so that nothing has to be waited for then.
    if statistics is not None:
        group = tl.arange(0, GROUPS)[None, :]
        LAST: tl.constexpr = (WIDTH + _GROUP - 1) // _GROUP
        at = statistics + row[:, None] * LAST + group
        means = tl.load(at, mask=group < LAST, other=0.0)
        deviations = tl.load(at + tokens * LAST, mask=group < LAST, other=0.0)
    addend = tl.load(bias + column)
    if weight_sums is not None:
        weight_sum = tl.load(weight_sums + column)
    if residual is not None:
        other = tl.load(residual + row[:, None] * COLUMNS + column[None, :])
    if norm_weight is not None:
        gamma = tl.load(norm_weight + column)
        beta = tl.load(norm_bias + column)

    STEPS: tl.constexpr = (DEPTH + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
    depth = split * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    x += row[:, None] * DEPTH + depth[None, :]
    weight += column[:, None] * DEPTH + depth[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, STEPS * BLOCK_K, BLOCK_K):
        if DEPTH % (SPLIT * BLOCK_K) == 0:
            a = tl.load(x + start)
            b = tl.load(weight + start)
        else:
            inside = (depth < DEPTH - start)[None, :]
            a = tl.load(x + start, mask=inside, other=0.0)
            b = tl.load(weight + start, mask=inside, other=0.0)
        total = add_product(total, a, tl.trans(b), PRECISION)

    if SPLIT > 1:
        CELLS: tl.constexpr = BLOCK_M * BLOCK_N
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part = partials + tile.to(tl.int64) * (SPLIT * CELLS)
        part += tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(part + split * CELLS, total)
        tl.debug_barrier()  # the thread that counts speaks for all of them
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(counters + tile, 0)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for index in tl.static_range(SPLIT):
            total += tl.load(part + index * CELLS, cache_modifier=".cg")  # written by others: not from the first cache

    if statistics is not None:
        mean, rstd = mean_and_rstd(means, deviations, eps, WIDTH)
    if weight_sums is not None:
        total = rstd * (total - mean * weight_sum[None, :])
    total += addend.to(tl.float32)[None, :]
    if FORM != "linear":
        total, _ = activation(total, FORM)
    if residual is not None:
        other = other.to(tl.float32)
        if norm_weight is not None:
            other = (other - mean) * rstd * gamma.to(tl.float32)[None, :] + beta.to(tl.float32)[None, :]
        total += other
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + row[:, None] * COLUMNS + column[None, :], rounded, mask=mask)
    if new_statistics is not None:  # of what the next one reads
        store_statistics(new_statistics, rounded.to(tl.float32), token, tokens, first, COLUMNS)


Cut = tuple[int, int, int, int, int, int]  # BLOCK_M, BLOCK_N, BLOCK_K, SPLIT, warps, stages

# What workspaces are made for.
_MOST_BLOCK, _MOST_SPLIT = 128, 8


def _tiles(interpreter: Cut, sm_80: list[Cut], sm_90: list[Cut], sm_100: list[Cut], single: list[Cut]) -> Tiles:
    def config(cut: Cut) -> Config:
        m, n, k, split, warps, stages = cut
        return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": split}, warps, stages)

    half = {80: sm_80, 90: sm_90, 100: sm_100}
    # In float32 a chain of FMAs is as long as a tile is deep (attention_tile.CHAIN); tiles of 64 rows are tf32 on 10.0.
    return Tiles(
        config(interpreter),
        half={name: [*map(config, cuts)] for name, cuts in half.items()},
        single={name: [*map(config, single)] for name in half},
    )


# 128 tokens of ALBERT base: 72 and 96 tiles of 64 x 64 for qkv and ffn, 48 of 64 x 32 for dense, and 24 of 64 x 64 for
# ffn_output, four times as deep.
WIDE = _tiles(
    (32, 64, 32, 1, 4, 2),
    sm_80=[(64, 64, 64, 1, 4, 4), (32, 64, 64, 1, 4, 4), (32, 64, 128, 1, 4, 3), (16, 64, 128, 1, 4, 3)],
    sm_90=[
        (64, 64, 64, 1, 4, 6),
        (64, 64, 128, 1, 4, 3),
        (64, 32, 128, 1, 4, 3),
        (128, 64, 64, 1, 8, 4),
        (32, 64, 128, 1, 4, 3),
        (16, 64, 128, 1, 4, 6),
        (16, 32, 128, 1, 4, 6),
    ],
    sm_100=[(64, 64, 128, 1, 4, 3), (64, 64, 64, 1, 4, 6), (64, 32, 128, 1, 4, 3), (128, 64, 64, 1, 4, 4)],
    single=[(32, 32, 32, 1, 4, 2)],
)
SQUARE = _tiles(
    (16, 32, 32, 1, 4, 2),
    sm_80=[(32, 32, 64, 1, 4, 4), (32, 32, 128, 1, 4, 4), (64, 64, 64, 4, 4, 4), (16, 32, 128, 1, 4, 4)],
    sm_90=[
        (64, 32, 128, 1, 4, 4),
        (64, 32, 64, 1, 4, 6),
        (32, 32, 128, 1, 4, 6),
        (16, 32, 128, 1, 4, 4),
        (16, 64, 128, 1, 4, 4),
    ],
    sm_100=[(64, 32, 64, 1, 4, 6), (64, 32, 128, 1, 4, 4), (64, 32, 128, 2, 4, 3), (64, 64, 64, 4, 4, 3)],
    single=[(32, 32, 32, 1, 4, 2)],
)
DEEP = _tiles(
    (32, 32, 32, 3, 4, 2),
    sm_80=[(64, 64, 64, 4, 4, 4), (32, 64, 64, 4, 4, 4), (64, 64, 64, 8, 4, 3), (32, 32, 128, 2, 4, 3)],
    sm_90=[
        (64, 32, 128, 2, 4, 4),
        (64, 32, 128, 2, 4, 6),
        (64, 32, 128, 3, 4, 6),
        (64, 64, 128, 4, 4, 3),
        (64, 64, 64, 4, 4, 6),
        (32, 32, 128, 1, 4, 6),
        (32, 32, 128, 2, 4, 6),
        (32, 64, 128, 4, 4, 3),
        (16, 64, 128, 4, 4, 3),
        (16, 32, 128, 2, 4, 6),
    ],
    sm_100=[(64, 64, 128, 4, 4, 3), (64, 64, 64, 4, 4, 6), (64, 64, 128, 6, 4, 3), (64, 32, 128, 4, 4, 3)],
    single=[(32, 32, 32, 4, 4, 2)],
)


class Workspace(NamedTuple):
    """What products that are split need between their programs; kernels one after the other share it."""

    partials: Tensor
    counters: Tensor

    @classmethod
    def of(cls, x: Tensor, columns: int) -> Workspace:
        """For products of x [tokens, …] with as many columns, and narrower ones; the caller zeroes the counters."""
        tiles = cdiv(x.shape[0], 16) * cdiv(columns, GROUP)
        rows, columns = (cdiv(size, _MOST_BLOCK) * _MOST_BLOCK for size in (x.shape[0], columns))
        partials = torch.empty(_MOST_SPLIT * rows * columns, dtype=torch.float32, device=x.device)
        return cls(partials, torch.empty(tiles, dtype=torch.int32, device=x.device))


def few_tokens_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    *,
    eps: float,
    workspace: Workspace,
    weight_sums: Tensor | None = None,
    statistics: Tensor | None = None,
    form: str = "linear",
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    new_statistics: Tensor | None = None,
) -> None:
    """y = act(LayerNorm(x) weightᵀ + bias) + LayerNorm(residual); all contiguous.

    Args:
        x, weight, bias: [tokens, in], [out, in] and [out].
        y: [tokens, out], written.
        workspace: for as many tokens and columns, unless the product is `WIDE`.
        weight_sums: float32 [out], where x goes through LayerNorm, whose weight and bias are in `weight` and `bias`.
        statistics: float32 [2, tokens, ceil(width / GROUP)] of x or of the residual: for each group of columns its mean
            and the sum of its squared deviations from it.
        form: "linear" or one of `bias_gelu`.
        residual: [tokens, out], added after the activation.
        norm: weight and bias [out] of the residual's LayerNorm.
        new_statistics: receives those of y.
    """
    tokens, depth = x.shape
    columns = weight.shape[0]
    width = depth if weight_sums is not None else columns
    tiles = WIDE if columns > depth else SQUARE if columns == depth else DEEP
    launch(
        few_tokens_product_kernel,
        lambda blocks: (cdiv(tokens, blocks["BLOCK_M"]), cdiv(columns, blocks["BLOCK_N"]), blocks["SPLIT"]),
        x,
        weight,
        bias,
        y,
        weight_sums,
        residual,
        *((None, None) if norm is None else norm),
        statistics,
        new_statistics,
        *workspace,
        tokens,
        eps,
        tiles=tiles,
        dtype=x.dtype,
        key=(next_power_of_2(tokens),),
        in_cache=True,  # the pass before read the same weights
        DEPTH=depth,
        COLUMNS=columns,
        WIDTH=width,
        GROUPS=next_power_of_2(cdiv(width, GROUP)),
        FORM=form,
        PRECISION=dot_precision(x.dtype),
    )
