"""Which tokens have a label: found on the device, without telling the host how many there are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, launch


@triton.jit(do_not_specialize=["tokens", "ignore_index"])
def labelled_tokens_kernel(
    labels,  # int64 [tokens]
    positions,  # int32 [tokens]
    count,  # int32 [1]
    tokens,
    ignore_index,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    # Every program counts the labels before its own: reading them again takes less than another kernel, up to a million
    # tokens or so.
    first = tl.program_id(0) * BLOCK
    counts = tl.zeros([COUNTED], tl.int32)
    for start in range(0, first, COUNTED):
        earlier = start + tl.arange(0, COUNTED)
        label = tl.load(labels + earlier, mask=earlier < first, other=ignore_index)
        counts += (label != ignore_index).to(tl.int32)
    token = first + tl.arange(0, BLOCK)
    labelled = tl.load(labels + token, mask=token < tokens, other=ignore_index) != ignore_index
    rank = tl.sum(counts) + tl.cumsum(labelled.to(tl.int32), axis=0)
    tl.store(positions + rank - 1, token, mask=labelled)
    if first + BLOCK >= tokens:
        tl.store(count, tl.max(rank))


_GPU = (Config({"BLOCK": 1024, "COUNTED": 4096}, num_warps=8),)
TILES = Tiles(
    interpreter=Config({"BLOCK": 64, "COUNTED": 128}),
    half=dict.fromkeys(ARCHITECTURES, _GPU),
    single=dict.fromkeys(ARCHITECTURES, _GPU),
)


def labelled_tokens(labels: Tensor, ignore_index: int, positions: Tensor, count: Tensor) -> None:
    """Finds the tokens whose label is not `ignore_index`.

    Args:
        labels: int64 [tokens], contiguous, at least one.
        positions: int32 [tokens]; its first `count` are written, ascending.
        count: int32, its first element is written.
    """
    tokens = labels.shape[0]
    launch(
        labelled_tokens_kernel,
        lambda blocks: (cdiv(tokens, blocks["BLOCK"]),),
        labels,
        positions,
        count,
        tokens,
        ignore_index,
        tiles=TILES,
        dtype=labels.dtype,
    )
