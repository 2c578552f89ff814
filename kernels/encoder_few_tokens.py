"""The encoder's inference for few tokens: five kernels a pass in place of seven, for who waits for launches.

LayerNorm is never a kernel of its own, but for the last one. With x the sum before it, γ and β its weight and bias,

    LayerNorm(x) Wᵀ + b = rstd (x (W γ)ᵀ - mean Σ(W γ)) + (W β + b)

where W γ, its sums over the rows and W β + b are made once a call, in one kernel (`fold`) where there is one layer. A
product thus reads sums as they are. Who writes sums leaves mean and squared deviations of each `GROUP` columns of a
row; who reads them puts these together, in float32, which loses nothing where the mean is large. A pass is

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
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.attention_forward import attention
from albert_fast.kernels.dropout_add_layer_norm import layer_norm_forward
from albert_fast.kernels.few_tokens_attention import few_tokens_attention
from albert_fast.kernels.few_tokens_attention import serves as attention_serves
from albert_fast.kernels.few_tokens_product import GROUP, Workspace, few_tokens_product
from albert_fast.kernels.launch import cdiv, launch
from albert_fast.kernels.layer_norm_backward import block_of, row_tiles
from albert_fast.kernels.repeated import Repeated
from albert_fast.ops.attention import logsumexp_shape
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, TENSORS_PER_LAYER, EncoderOptions

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


class _Layer(NamedTuple):
    """A layer's parameters, in their order; contiguous, those of `dense` and `ffn_output` in the dtype of products."""

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    dense_weight: Tensor
    dense_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    ffn_weight: Tensor
    ffn_bias: Tensor
    ffn_output_weight: Tensor
    ffn_output_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor

    @classmethod
    def of(cls, parameters: list[Tensor], dtype: torch.dtype) -> _Layer:
        if len({parameter.dtype for parameter in parameters}) > 1:  # autocast allows it, `fold` takes one alone
            parameters = [parameter.float() for parameter in parameters]
        layer = cls(*[parameter.contiguous() for parameter in parameters])
        dense, output = layer.dense_weight.to(dtype), layer.ffn_output_weight.to(dtype)
        return layer._replace(dense_weight=dense, ffn_output_weight=output)


class _Folded(NamedTuple):
    """A product's weights with the LayerNorm before it."""

    weight: Tensor  # [out, in], of the products' dtype
    bias: Tensor  # float32 [out]
    sums: Tensor | None  # float32 [out]; None without a LayerNorm


@triton.jit(do_not_specialize=["inner", "count"])
def fold_kernel(
    query,  # [width, width], as key and value
    key,
    value,
    ffn,  # [inner, width]
    query_bias,  # [width]
    key_bias,
    value_bias,
    ffn_bias,  # [inner]
    norm_weight,  # [width], of the LayerNorm before query, key and value
    norm_bias,
    ffn_norm_weight,  # [width], of that before ffn
    ffn_norm_bias,
    folded,  # [3 width + inner, width]: query, key, value and ffn
    folded_bias,  # float32 [3 width + inner]
    sums,  # float32 [3 width + inner]
    plain,  # [3 width, width], without LayerNorm; or None
    plain_bias,  # [3 width] or None
    counters,  # int32 [count], are zeroed
    width,
    inner,
    count,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = tl.cdiv(width, ROWS)
    part = tl.minimum(tl.program_id(0) // tiles, 3)
    weight, bias, rows = query, query_bias, width
    if part == 1:
        weight, bias = key, key_bias
    elif part == 2:
        weight, bias = value, value_bias
    elif part == 3:
        weight, bias, rows = ffn, ffn_bias, inner
        norm_weight, norm_bias = ffn_norm_weight, ffn_norm_bias

    row = (tl.program_id(0) - part * tiles) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    # What the products would read: rounded to their dtype.
    w = tl.load(weight + at, mask=mask, other=0.0).to(folded.dtype.element_ty)  # [ROWS, BLOCK]
    gamma = tl.load(norm_weight + column, mask=column < width, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + column, mask=column < width, other=0.0).to(tl.float32)
    b = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    rounded = (w.to(tl.float32) * gamma[None, :]).to(folded.dtype.element_ty)

    first = part * width  # row of what is written
    at += first.to(tl.int64) * width
    tl.store(folded + at, rounded, mask=mask)
    tl.store(sums + first + row, tl.sum(rounded.to(tl.float32), axis=1), mask=inside)
    tl.store(folded_bias + first + row, tl.sum(w.to(tl.float32) * beta[None, :], axis=1) + b, mask=inside)
    if plain is not None and part < 3:
        tl.store(plain + at, w, mask=mask)
        tl.store(plain_bias + first + row, b, mask=inside)
    if tl.program_id(0) == 0:
        for index in range(0, count, BLOCK):
            tl.store(counters + index + column, 0, mask=column < count - index)


def fold(
    layer: _Layer,
    before: _Layer,
    dtype: torch.dtype,
    counters: Tensor,
    *,
    plain: tuple[Tensor, Tensor] | None,
    with_ffn: bool,
) -> tuple[_Folded, _Folded]:
    """Query, key and value with the LayerNorm that ends the layer `before`, and ffn with its own, in one kernel.

    Args:
        dtype: that of the products.
        counters: int32, are zeroed here, which would be a kernel of its own otherwise.
        plain: weight [3 width, width] and bias, receive query, key and value without LayerNorm.
        with_ffn: without, the second result has no rows.
    """
    inner, width = layer.ffn_weight.shape
    like, rows = layer.query_weight, 3 * width + (inner if with_ffn else 0)
    bias, sums = (like.new_empty(rows, dtype=torch.float32) for _ in range(2))
    weight, block = like.new_empty(rows, width, dtype=dtype), block_of(width)
    launch(
        fold_kernel,
        lambda blocks: (3 * cdiv(width, blocks["ROWS"]) + cdiv(rows - 3 * width, blocks["ROWS"]),),
        layer.query_weight,
        layer.key_weight,
        layer.value_weight,
        layer.ffn_weight,
        layer.query_bias,
        layer.key_bias,
        layer.value_bias,
        layer.ffn_bias,
        before.norm_weight,
        before.norm_bias,
        layer.attention_norm_weight,
        layer.attention_norm_bias,
        weight,
        bias,
        sums,
        *((None, None) if plain is None else plain),
        counters,
        width,
        inner,
        counters.numel(),
        tiles=row_tiles(block, half=((32, 1), (32, 2)), single=((16, 2), (16, 1))),
        dtype=like.dtype,
        key=(rows,),
        BLOCK=block,
    )
    parts = zip(*(tensor.split([3 * width, rows - 3 * width]) for tensor in (weight, bias, sums)), strict=True)
    qkv, ffn = (_Folded(*of_part) for of_part in parts)
    return qkv, ffn


def encoder_few_tokens(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> Tensor:
    """All passes over hidden [tokens, hidden], contiguous, whose dtype is that of the products.

    Returns:
        [tokens, hidden], or with return_all [passes + 1, tokens, hidden].
    """
    (tokens, width), heads = hidden.shape, options.num_heads
    inner_width = parameters[10].shape[0]
    order, step = options.layer_of_pass(), TENSORS_PER_LAYER
    layers = [_Layer.of(parameters[at : at + step], hidden.dtype) for at in range(0, len(parameters), step)]
    workspace = Workspace.of(hidden, width)
    # By the layer of the pass before, whose LayerNorm it is, and that of the pass; `plain` is for the first pass.
    qkv_after: dict[tuple[int, int], _Folded] = {}
    ffn: dict[int, _Folded] = {}
    plain = hidden.new_empty(3 * width, width), hidden.new_empty(3 * width)
    # The first layer comes first, as if it followed itself, which with one layer it does.
    for before, now in dict.fromkeys([(order[0], order[0]), *pairwise(order)]):
        qkv_after[before, now], of_ffn = fold(
            layers[now],
            layers[before],
            hidden.dtype,
            workspace.counters,
            plain=None if ffn else plain,
            with_ffn=now not in ffn,
        )
        ffn.setdefault(now, of_ffn)

    qkv = hidden.new_empty(tokens, 3 * width)
    of_any_lengths: tuple[Tensor | None, ...] = None, None, None, None
    if not attention_serves(qkv, cu_seqlens, heads, options.attention(0, width // heads)):
        query, key, value = qkv.view(tokens, 3, heads, width // heads).unbind(1)
        logsumexp = hidden.new_empty(logsumexp_shape(heads, tokens, options.bias), dtype=torch.float32)
        of_any_lengths = query, key, value, logsumexp
    statistics, output_statistics = hidden.new_empty(2, 2, tokens, cdiv(width, GROUP), dtype=torch.float32)
    memory = _Memory(
        qkv,
        *of_any_lengths,
        context=hidden.new_empty(tokens, width),
        summed=hidden.new_empty(tokens, width),
        inner=hidden.new_empty(tokens, inner_width),
        statistics=statistics,
        output_statistics=output_statistics,
        partials=workspace.partials,
        counters=workspace.counters,
        cu_seqlens=cu_seqlens,
        bias=options.bias,
        seed=options.seed,
    )
    states = hidden.new_empty(len(order) + 1 if options.return_all else 1, tokens, width)
    if options.return_all:
        states[0].copy_(hidden)
    sums = [*states[1:]] if options.return_all else [states[0]] * len(order)

    one_pass = Repeated(partial(_one_pass, options, max_seqlen))
    x, last = hidden, None  # the pass's input: through the LayerNorm of the layer `last`, where there is one
    for index, (now, output) in enumerate(zip(order, sums, strict=True)):
        folded = _Folded(*plain, None) if last is None else qkv_after[last, now]
        norm = (None, None) if last is None else (layers[last].norm_weight, layers[last].norm_bias)
        weights = _Weights(*folded, *norm, *ffn[now], *layers[now][6:10], *layers[now][12:14])
        one_pass(x, None if output is x else output, *weights, *memory, site=1 + 2 * index)
        x, last = output, now

    for index in range(len(order)) if options.return_all else (len(order) - 1,):
        layer, output = layers[order[index]], sums[index]
        layer_norm_forward(output, None, None, layer.norm_weight, layer.norm_bias, eps=options.eps, out=output)
    return states if options.return_all else states[0]


class _Weights(NamedTuple):
    """Of a pass."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    qkv_sums: Tensor | None  # None in the first pass, whose input needs no LayerNorm
    norm_weight: Tensor | None  # of the LayerNorm of the pass before; likewise
    norm_bias: Tensor | None
    ffn_weight: Tensor
    ffn_bias: Tensor
    ffn_sums: Tensor
    dense_weight: Tensor
    dense_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    ffn_output_weight: Tensor
    ffn_output_bias: Tensor


class _Memory(NamedTuple):
    """What all passes write and read."""

    qkv: Tensor  # [tokens, 3 width]
    query: Tensor | None  # views of it, and logsumexp, where attention is that of any lengths
    key: Tensor | None
    value: Tensor | None
    logsumexp: Tensor | None
    context: Tensor  # [tokens, width]
    summed: Tensor  # [tokens, width]
    inner: Tensor  # [tokens, inner]
    statistics: Tensor  # float32 [mean or squared deviations, tokens, groups of columns] of `summed`
    output_statistics: Tensor  # and of the pass's output sum
    partials: Tensor  # `Workspace`
    counters: Tensor
    cu_seqlens: Tensor
    bias: Tensor | None
    seed: Tensor | None


def _one_pass(
    options: EncoderOptions, max_seqlen: int, x: Tensor, output: Tensor | None, *tensors: Any, site: int
) -> None:
    """As `Repeated` calls it. `output`: None for in place of x."""
    weights, memory = _Weights(*tensors[: len(_Weights._fields)]), _Memory(*tensors[len(_Weights._fields) :])
    width, heads = x.shape[1], options.num_heads
    of_attention = options.attention(0, width // heads)._replace(bias=memory.bias, seed=memory.seed, site=site)
    common: dict[str, Any] = {"eps": options.eps, "workspace": Workspace(memory.partials, memory.counters)}
    first = weights.qkv_sums is None
    norm = None if first else (weights.norm_weight, weights.norm_bias)
    before = None if first else memory.output_statistics
    few_tokens_product(
        x,
        weights.qkv_weight,
        weights.qkv_bias,
        memory.qkv,
        weight_sums=weights.qkv_sums,
        statistics=before,
        **common,
    )
    if memory.logsumexp is None:
        few_tokens_attention(memory.qkv, memory.cu_seqlens, heads, of_attention.scale, memory.context)
    else:
        rows = (memory.cu_seqlens, memory.cu_seqlens, max_seqlen, max_seqlen)
        views = memory.query, memory.key, memory.value
        attention(*views, *rows, of_attention, out=memory.context, logsumexp=memory.logsumexp)
    few_tokens_product(
        memory.context,
        weights.dense_weight,
        weights.dense_bias,
        memory.summed,
        residual=x,
        norm=norm,
        statistics=before,
        new_statistics=memory.statistics,
        **common,
    )
    few_tokens_product(
        memory.summed,
        weights.ffn_weight,
        weights.ffn_bias,
        memory.inner,
        weight_sums=weights.ffn_sums,
        statistics=memory.statistics,
        form=FUSED_ACTIVATIONS[options.activation],
        **common,
    )
    few_tokens_product(
        memory.inner,
        weights.ffn_output_weight,
        weights.ffn_output_bias,
        x if output is None else output,
        residual=memory.summed,
        norm=(weights.attention_norm_weight, weights.attention_norm_bias),
        statistics=memory.statistics,
        new_statistics=memory.output_statistics,
        **common,
    )
