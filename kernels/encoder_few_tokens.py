"""The encoder's inference for few tokens: five kernels a pass in place of seven, for who waits for launches.

LayerNorm is never a kernel of its own, but for the last one. With x the sum before it, γ and β its weight and bias,

    LayerNorm(x) Wᵀ + b = rstd (x (W γ)ᵀ - mean Σ(W γ)) + (W β + b)

where W γ, its sums over the rows and W β + b are made once a call (`fold`). A product thus reads sums as they are. Who
writes sums leaves mean and squared deviations of each `GROUP` columns of a row; who reads them puts these together, in
float32, which loses nothing where the mean is large. A pass is

    qkv     = LayerNorm(output sum of the pass before) qkvᵀ       the first pass: of its input
    context = attention(qkv)
    summed  = context denseᵀ + LayerNorm(output sum of the pass before)
    inner   = act(LayerNorm(summed) ffnᵀ)
    output  = inner ffn_outputᵀ + LayerNorm(summed)               a sum, too

Precision: W γ is rounded to the dtype of the products, in place of LayerNorm(x), and the mean is taken out of exactly
these rounded numbers; residuals are not rounded at all.

ALBERT_FAST_FEW_TOKENS=0 never takes this way, 1 wherever it serves.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.attention_forward import attention
from albert_fast.kernels.dropout_add_layer_norm import layer_norm_forward
from albert_fast.kernels.few_tokens_product import GROUP, Workspace, few_tokens_product
from albert_fast.kernels.launch import cdiv, launch
from albert_fast.kernels.layer_norm_backward import block_of, row_tiles
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, EncoderOptions

if TYPE_CHECKING:
    from albert_fast.kernels.encoder import _Layer

MOST_TOKENS = 256  # beyond, cuBLAS's larger tiles read less
MOST_HIDDEN = 1024  # of a row's statistics, which a program holds in registers; wider layers are more than L2, too


def serves(hidden: Tensor, options: EncoderOptions) -> bool:
    """Whether the call is one of few tokens [tokens, hidden], and has nothing that is missing here."""
    setting = os.environ.get("ALBERT_FAST_FEW_TOKENS", "")
    tokens, width = hidden.shape
    if setting == "0" or options.hidden_dropout_p > 0.0 or not tokens or width > MOST_HIDDEN:
        return False
    # Products in float32 are not on tensor cores: cuBLAS's are better.
    return setting == "1" or (tokens <= MOST_TOKENS and hidden.dtype.itemsize == 2)


class _Folded(NamedTuple):
    """A product's weights with the LayerNorm before it."""

    weight: Tensor  # [out, in], of the products' dtype
    sums: Tensor  # float32 [out]
    bias: Tensor  # float32 [out]


@triton.jit(do_not_specialize=["rows"])
def fold_kernel(
    weight,  # [rows, columns]
    bias,  # [rows]
    norm_weight,  # [columns]
    norm_bias,  # [columns]
    folded,  # [rows, columns]
    sums,  # float32 [rows]
    folded_bias,  # float32 [rows]
    rows,
    columns,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
    gamma = tl.load(norm_weight + column, mask=column < columns, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + column, mask=column < columns, other=0.0).to(tl.float32)
    b = tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    rounded = (w * gamma[None, :]).to(folded.dtype.element_ty)
    tl.store(folded + at, rounded, mask=mask)
    tl.store(sums + row, tl.sum(rounded.to(tl.float32), axis=1), mask=row < rows)
    tl.store(folded_bias + row, tl.sum(w * beta[None, :], axis=1) + b, mask=row < rows)


def fold(weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> _Folded:
    """Of weight [out, in], bias [out], and the LayerNorm's [in]; all contiguous."""
    rows, columns = weight.shape
    sums, folded_bias = (torch.empty(rows, dtype=torch.float32, device=weight.device) for _ in range(2))
    result = _Folded(torch.empty_like(weight), sums, folded_bias)
    block = block_of(columns)
    launch(
        fold_kernel,
        lambda blocks: (cdiv(rows, blocks["ROWS"]),),
        weight,
        bias,
        norm_weight,
        norm_bias,
        *result,
        rows,
        columns,
        tiles=row_tiles(block, half=((32, 1), (32, 2)), single=((16, 1), (16, 2))),
        dtype=weight.dtype,
        key=(rows,),
        BLOCK=block,
    )
    return result


def encoder_few_tokens(
    hidden: Tensor, layers: list[_Layer], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> Tensor:
    """All passes over hidden [tokens, hidden], contiguous, with layers whose matrices have its dtype.

    Returns:
        [tokens, hidden], or with return_all [passes + 1, tokens, hidden].
    """
    (tokens, width), heads = hidden.shape, options.num_heads
    inner_width = layers[0].ffn_weight.shape[0]
    order = options.layer_of_pass()
    ffn = [fold(r.ffn_weight, r.ffn_bias, r.attention_norm_weight, r.attention_norm_bias) for r in layers]
    # By the layer of the pass before, whose LayerNorm it is, and that of the pass.
    qkv_after = {
        (before, now): fold(
            layers[now].qkv_weight, layers[now].qkv_bias, layers[before].norm_weight, layers[before].norm_bias
        )
        for before, now in dict.fromkeys(pairwise(order))
    }

    qkv, context = hidden.new_empty(tokens, 3 * width), hidden.new_empty(tokens, width)
    summed, inner = hidden.new_empty(tokens, width), hidden.new_empty(tokens, inner_width)
    logsumexp = hidden.new_empty(heads, tokens, dtype=torch.float32)
    # float32 [mean or squared deviations, tokens, groups of columns] of `summed` and of the pass's output sum
    statistics, output_statistics = hidden.new_empty(2, 2, tokens, cdiv(width, GROUP), dtype=torch.float32)
    workspace = Workspace.of(hidden, width)
    states = hidden.new_empty(len(order) + 1 if options.return_all else 1, tokens, width)
    if options.return_all:
        states[0].copy_(hidden)
    sums = [*states[1:]] if options.return_all else [states[0]] * len(order)

    query, key, value = qkv.view(tokens, 3, heads, width // heads).unbind(1)
    rows = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    common: dict[str, Any] = {"eps": options.eps, "workspace": workspace}
    x, before = hidden, None  # the pass's input: through the LayerNorm of the layer `before`, where there is one
    for index, (now, output) in enumerate(zip(order, sums, strict=True)):
        layer, norm = layers[now], None
        if before is None:
            few_tokens_product(x, layer.qkv_weight, layer.qkv_bias, qkv, **common)
        else:
            folded, norm = qkv_after[before, now], (layers[before].norm_weight, layers[before].norm_bias)
            few_tokens_product(
                x, folded.weight, folded.bias, qkv, weight_sums=folded.sums, statistics=output_statistics, **common
            )
        attention_options = options.attention(index, width // heads)
        attention(query, key, value, *rows, attention_options, out=context, logsumexp=logsumexp)
        few_tokens_product(
            context,
            layer.dense_weight,
            layer.dense_bias,
            summed,
            residual=x,
            norm=norm,
            statistics=None if norm is None else output_statistics,
            new_statistics=statistics,
            **common,
        )
        few_tokens_product(
            summed,
            ffn[now].weight,
            ffn[now].bias,
            inner,
            weight_sums=ffn[now].sums,
            statistics=statistics,
            form=FUSED_ACTIVATIONS[options.activation],
            **common,
        )
        few_tokens_product(
            inner,
            layer.ffn_output_weight,
            layer.ffn_output_bias,
            output,
            residual=summed,
            norm=(layer.attention_norm_weight, layer.attention_norm_bias),
            statistics=statistics,
            new_statistics=output_statistics,
            **common,
        )
        x, before = output, now

    for index in range(len(order)) if options.return_all else (len(order) - 1,):
        layer, output = layers[order[index]], sums[index]
        layer_norm_forward(output, None, None, layer.norm_weight, layer.norm_bias, eps=options.eps, out=output)
    return states if options.return_all else states[0]
