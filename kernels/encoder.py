"""The shared-layer loop on a GPU: cuBLAS's products, and between them the kernels of this package.

`albert_fast.kernels.products` has the products that cuBLASLt may do together with what follows them;
`albert_fast.kernels.encoder_few_tokens` the inference for few tokens, whose products are Triton's.

`albert_fast.ops.encoder` has the mathematics. What forward keeps for backward is 20 bytes x hidden for each token and
pass in half precision (qkv 6, context 2, both sums 4, inner 8 at four times the hidden size), and the statistics of the
rows: a pass's input is rebuilt from the sum before it, by the LayerNorm's backward that reads it anyway where it can.

The layer is the same in every pass, so its weight gradient is one product over the tokens of all passes. Backward
gathers what it multiplies over as many passes as make the product deep enough to fill the GPU and memory allows, at
most `GATHERED_TOKENS` tokens, and adds the products in float32. For gradients of vectors each program adds the sums
over its strip of tokens to those that it left in the pass before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from albert_fast.kernels import encoder_few_tokens as few_tokens
from albert_fast.kernels.attention_backward import attention_backward, memory_between
from albert_fast.kernels.attention_forward import attention
from albert_fast.kernels.bias_gelu import programs_of as gelu_programs
from albert_fast.kernels.column_sum import column_sum
from albert_fast.kernels.column_sum import programs_of as strip_sum_programs
from albert_fast.kernels.dropout_add_layer_norm import layer_norm_apply, layer_norm_backward, layer_norm_forward
from albert_fast.kernels.launch import cdiv, memory_bytes
from albert_fast.kernels.layer_norm_backward import programs_of as layer_norm_programs
from albert_fast.kernels.products import Products
from albert_fast.kernels.repeated import Repeated
from albert_fast.ops.attention import AttentionOptions, logsumexp_shape
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, EncoderOptions, Layer, layers_of

# A weight gradient of ALBERT base has 18 to 72 tiles of 128 x 256, fewer than a large GPU has multiprocessors: over few
# tokens most of them would have nothing to do. Over many cuBLAS splits the sum, and each product costs a kernel that
# clears memory, one that adds the parts, and one more reading and writing of the float32 total.
GATHERED_TOKENS = 98304

# What is gathered takes at most this part of the device's memory, unless a single pass takes more.
_GATHERED_SHARE = 1 / 32

_P = ParamSpec("_P")
_R = TypeVar("_R")


# Of a layer what products read, or add: in their dtype.
_OF_PRODUCTS = ("qkv_weight", "qkv_bias", "dense_weight", "ffn_weight", "ffn_bias", "ffn_output_weight")


def _layers(parameters: list[Tensor], dtype: torch.dtype) -> list[Layer]:
    """Cast once for all passes, and contiguous. Not cached: a captured graph has to follow the parameters."""
    layers = []
    for layer in layers_of(parameters):
        cast = layer._replace(**{name: getattr(layer, name).to(dtype) for name in _OF_PRODUCTS})
        layers.append(Layer(*[tensor.contiguous() for tensor in cast]))
    return layers


class _Kept(NamedTuple):
    """Of one pass, or [passes, …] of all; what is not kept is None."""

    qkv: Tensor  # [tokens, 3 hidden]
    context: Tensor  # [tokens, hidden]
    logsumexp: Tensor  # [heads, tokens], with a bias [2, heads, tokens]
    summed: Tensor  # [tokens, hidden], input of the first LayerNorm
    output_summed: Tensor  # [tokens, hidden], input of the second
    statistics: Tensor  # [2, 2, tokens]: of the first and of the second, mean and 1 / standard deviation
    inner: Tensor | None  # [tokens, intermediate], the activation's input

    def by_pass(self) -> list[_Kept]:
        passes = len(self.qkv)
        parts = [[None] * passes if tensor is None else tensor.unbind() for tensor in self]
        return [_Kept(*of_pass) for of_pass in zip(*parts, strict=True)]


def _pass_shapes(
    hidden: Tensor, intermediate: int, options: EncoderOptions
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    tokens, width = hidden.shape
    return {
        "qkv": ((tokens, 3 * width), hidden.dtype),
        "context": ((tokens, width), hidden.dtype),
        "logsumexp": (logsumexp_shape(options.num_heads, tokens, options.bias), torch.float32),
        "summed": ((tokens, width), hidden.dtype),
        "output_summed": ((tokens, width), hidden.dtype),
        "statistics": ((2, 2, tokens), torch.float32),
        "inner": ((tokens, intermediate), hidden.dtype),
    }


def kept_shapes(
    hidden: Tensor, parameters: list[Tensor], options: EncoderOptions
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what the operator keeps: the encoder's input, then `_Kept` of all passes; with recompute="ffn" without
    `inner`, with "layer" the input of each pass alone."""
    passes = len(options.layer_of_pass())
    if options.recompute == "layer":
        return [((passes, *hidden.shape), hidden.dtype)]
    shapes = _pass_shapes(hidden, parameters[10].shape[0], options)
    if options.recompute == "ffn":
        del shapes["inner"]
    return [(tuple(hidden.shape), hidden.dtype), *(((passes, *shape), dtype) for shape, dtype in shapes.values())]


class _Loop:
    """One call's constants and the memory that all its passes share."""

    def __init__(
        self,
        hidden: Tensor,
        parameters: list[Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        options: EncoderOptions,
    ) -> None:
        self.options = options
        self.layers = _layers(parameters, hidden.dtype)
        self.layer_of_pass = options.layer_of_pass()
        self.tokens, self.width = hidden.shape
        self.intermediate = parameters[10].shape[0]
        self.form = FUSED_ACTIVATIONS[options.activation]
        self.products = Products(hidden, self.form)
        self.cu_seqlens = cu_seqlens.contiguous()
        self.like = hidden
        self.between: tuple[Tensor, Tensor] | tuple[None, None] = None, None  # of backward
        dropout_p, eps = options.hidden_dropout_p, options.eps
        of_attention = options.attention(0, self.width // options.num_heads)
        self.attention = Repeated(functools.partial(_attention, of_attention, max_seqlen))
        self.attention_backward = Repeated(functools.partial(_attention_backward, of_attention, max_seqlen))
        self.norm = Repeated(functools.partial(_norm, eps, dropout_p))
        self.norm_in_place = Repeated(functools.partial(_norm_in_place, eps))
        self.norm_backward = Repeated(functools.partial(_norm_backward, 0.0))
        self.attention_norm_backward = Repeated(functools.partial(_norm_backward, dropout_p))

    def empty(self, columns: int, *leading: int) -> Tensor:
        return self.like.new_empty(*leading, self.tokens, columns)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, 3 hidden] -> query, key and value [tokens, heads, head_dim], views."""
        heads = self.options.num_heads
        query, key, value = qkv.view(self.tokens, 3, heads, self.width // heads).unbind(1)
        return query, key, value

    # ------------------------------------------------------------------------------------------------------- forward

    def forward_memory(self) -> _Kept:
        """For passes of which nothing is kept."""
        shapes = _pass_shapes(self.like, self.intermediate, self.options)
        return _Kept(*(self.like.new_empty(shape, dtype=dtype) for shape, dtype in shapes.values()))

    def forward_pass(self, index: int, x: Tensor, kept: _Kept, y: Tensor, h: Tensor, wide: Tensor | None) -> None:
        """y = layer(x). `wide` [tokens, intermediate] receives the activations; None where `kept.inner` may."""
        layer = self.layers[self.layer_of_pass[index]]
        torch.addmm(layer.qkv_bias, x, layer.qkv_weight.t(), out=kept.qkv)
        seed, site = self.options.seed, 1 + 2 * index
        self.attention(
            *self.split(kept.qkv), kept.context, kept.logsumexp, self.cu_seqlens, self.options.bias, seed, site=site
        )
        torch.mm(kept.context, layer.dense_weight.t(), out=y)
        weights = layer.dense_bias, layer.attention_norm_weight, layer.attention_norm_bias
        self.norm(y, x, *weights, h, kept.summed, kept.statistics[0], self.cu_seqlens, seed, site=site + 1)
        activated = self.activate(h, layer, kept, wide)
        torch.mm(activated, layer.ffn_output_weight.t(), out=y)
        weights = layer.ffn_output_bias, layer.norm_weight, layer.norm_bias
        self.norm_in_place(y, h, *weights, kept.output_summed, kept.statistics[1])

    def activate(self, h: Tensor, layer: Layer, kept: _Kept, wide: Tensor | None) -> Tensor:
        """act(h ffnᵀ + bias), in one product where nothing is kept and cuBLAS has the activation.

        Its GELU is the tanh form; PyTorch's function of that name computes the erf form on a CPU.
        """
        assert kept.inner is not None
        if wide is None and h.is_cuda and self.form in ("tanh", "relu"):
            use_gelu = self.form == "tanh"
            return torch._addmm_activation(layer.ffn_bias, h, layer.ffn_weight.t(), use_gelu=use_gelu, out=kept.inner)
        out = kept.inner if wide is None else wide
        return self.products.linear_activation(h, layer.ffn_weight, layer.ffn_bias, kept.inner, out)

    # ------------------------------------------------------------------------------------------------------ backward

    def input_of(self, index: int, first: Tensor, kept: list[_Kept], out: Tensor) -> None:
        """The input of a pass: the encoder's, or the second LayerNorm of the pass before, once more."""
        if index == 0:
            out.copy_(first)
            return
        before, layer = kept[index - 1], self.layers[self.layer_of_pass[index - 1]]
        layer_norm_apply(before.output_summed, layer.norm_weight, layer.norm_bias, before.statistics[1], out=out)

    def backward_pass(
        self,
        index: int,
        grad: Tensor,
        more: Tensor | None,
        kept: _Kept,
        gathered: _Gathered,
        sums: _LayerGradients,
        output: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the pass's input from that of its output, each as a sum of two: who reads them next adds them on
        the way. Those of vectors are added to `sums`, what those of matrices need goes to `gathered`. `output` receives
        the pass's output; None where nobody needs it."""
        layer = self.layers[self.layer_of_pass[index]]
        grad_output = gathered.grad_output
        of_norm = kept.output_summed, layer.norm_weight, layer.norm_bias, kept.statistics[1]
        self.norm_backward(grad, more, *of_norm, sums.norm, grad_output, None, output, None, None)
        inner = kept.inner
        if inner is None:
            h = layer_norm_apply(
                kept.summed, layer.attention_norm_weight, layer.attention_norm_bias, kept.statistics[0]
            )
            inner = torch.addmm(layer.ffn_bias, h, layer.ffn_weight.t())
        self.products.activation_gradient(
            grad_output,
            layer.ffn_output_weight,
            inner,
            grad_inner=gathered.grad_inner,
            activated=gathered.activated,
            partials=sums.ffn_bias,
        )
        grad_h = gathered.grad_inner @ layer.ffn_weight
        # Without dropout the gradient of the sum is that of the product before it, too.
        dropped, projected = self.options.hidden_dropout_p > 0.0, gathered.grad_projected
        of_norm = kept.summed, layer.attention_norm_weight, layer.attention_norm_bias, kept.statistics[0]
        written = sums.attention_norm, *((None, projected) if dropped else (projected, None)), gathered.h
        seed, site = self.options.seed, 1 + 2 * index
        self.attention_norm_backward(grad_h, grad_output, *of_norm, *written, self.cu_seqlens, seed, site=site + 1)
        self.attention_backward(
            projected @ layer.dense_weight,
            *self.split(kept.qkv),
            kept.context,
            kept.logsumexp,
            *self.split(gathered.grad_qkv),
            *self.between,
            self.cu_seqlens,
            self.options.bias,
            seed,
            site=site,
        )
        return gathered.grad_qkv @ layer.qkv_weight, grad_h if dropped else projected


# The loop's kernels as `Repeated` calls them: what they read and write, and the site of their masks.


def _attention(
    options: AttentionOptions,
    max_seqlen: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    site: int,
) -> None:
    options = options._replace(bias=bias, seed=seed, site=site)
    rows = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    attention(query, key, value, *rows, options, out=out, logsumexp=logsumexp)


def _attention_backward(
    options: AttentionOptions,
    max_seqlen: int,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    exponent: Tensor,
    delta: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    site: int,
) -> None:
    options = options._replace(bias=bias, seed=seed, site=site)
    rows = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    grads, between = (grad_query, grad_key, grad_value), (exponent, delta)
    attention_backward(grad, query, key, value, output, logsumexp, *rows, options, grads=grads, between=between)


def _norm(
    eps: float,
    dropout_p: float,
    x: Tensor,
    residual: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    y: Tensor,
    summed: Tensor,
    statistics: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    *,
    site: int,
) -> None:
    dropout = {"dropout_p": dropout_p, "seed": seed, "site": site, "cu_seqlens": cu_seqlens}
    written = {"out": y, "summed": summed, "statistics": statistics}
    layer_norm_forward(x, bias, residual, weight, norm_bias, eps=eps, **dropout, **written)


def _norm_in_place(
    eps: float,
    x: Tensor,
    residual: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    summed: Tensor,
    statistics: Tensor,
    *,
    site: int,
) -> None:
    written = {"out": x, "summed": summed, "statistics": statistics}
    layer_norm_forward(x, bias, residual, weight, norm_bias, eps=eps, **written)


def _norm_backward(
    dropout_p: float,
    grad: Tensor,
    more: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    statistics: Tensor,
    partials: Tensor,
    grad_residual: Tensor | None,  # None: in place of grad
    grad_x: Tensor | None,
    normed: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *,
    site: int,
) -> None:
    grad_residual = grad if grad_residual is None else grad_residual
    dropout = {"dropout_p": dropout_p, "seed": seed, "site": site, "cu_seqlens": cu_seqlens}
    written = {"grad_residual": grad_residual, "grad_x": grad_x, "normed": normed}
    layer_norm_backward(grad, summed, weight, statistics, partials, more=more, ln_bias=norm_bias, **dropout, **written)


class _Gathered(NamedTuple):
    """The factors of the weight gradients, of one pass or [passes, …] of a run of them."""

    grad_output: Tensor  # [tokens, hidden], of the second sum
    activated: Tensor  # [tokens, intermediate]
    grad_inner: Tensor  # [tokens, intermediate]
    h: Tensor  # [tokens, hidden]
    grad_projected: Tensor  # [tokens, hidden], of the product `dense`
    grad_qkv: Tensor  # [tokens, 3 hidden]
    x: Tensor  # [tokens, hidden], the pass's input

    def by_pass(self) -> list[_Gathered]:
        return [_Gathered(*of_pass) for of_pass in zip(*(tensor.unbind() for tensor in self), strict=True)]

    @classmethod
    def empty(cls, loop: _Loop, passes: int) -> _Gathered:
        return cls(*(loop.empty(size, passes) for size in cls.widths(loop)))

    @staticmethod
    def widths(loop: _Loop) -> tuple[int, ...]:
        width, wide = loop.width, loop.intermediate
        return width, wide, wide, width, width, 3 * width, width


class _LayerGradients:
    """The sums over the passes of one layer, in float32; of vectors a row for each strip of tokens, until the end."""

    def __init__(self, loop: _Loop) -> None:
        like, width, wide = loop.like, loop.width, loop.intermediate
        rows = (like.device, loop.tokens)
        shapes: list[tuple[int, ...]] = [
            (layer_norm_programs(*rows, width, 0.0), 3 * width),
            (layer_norm_programs(*rows, width, loop.options.hidden_dropout_p), 3 * width),
            (gelu_programs(*rows, wide), wide),
            (strip_sum_programs(*rows, 2, width), 2, width),
        ]
        sizes = [math.prod(shape) for shape in shapes]
        parts = like.new_zeros(sum(sizes), dtype=torch.float32).split(sizes)
        # Of weight and bias of a LayerNorm and of the bias before it; of a bias; of the biases of query and value.
        self.norm, self.attention_norm, self.ffn_bias, self.qv_bias = map(Tensor.view, parts, shapes)
        self.matrices: dict[str, Tensor] = {}
        self._products = loop.products

    def add(self, gathered: _Gathered, context: Tensor) -> None:
        """Of a run of passes [passes, tokens, …]."""
        products = {
            "qkv": (gathered.grad_qkv, gathered.x),
            "dense": (gathered.grad_projected, context),
            "ffn": (gathered.grad_inner, gathered.h),
            "ffn_output": (gathered.grad_output, gathered.activated),
        }
        # The other biases' gradients came with those of what follows them.
        sums = {"qkv": self.qv_bias}
        for name, (grad, x) in products.items():
            total = self.matrices.get(name)
            factors = grad.flatten(0, 1), x.flatten(0, 1)
            self.matrices[name] = self._products.add_weight_gradient(total, *factors, sums.get(name))

    def by_parameter(self) -> list[Tensor]:
        """In the order of a layer's parameters; some are views of one tensor."""
        norm_weight, norm_bias, ffn_output_bias = _vectors(self.norm, 3)
        attention_norm_weight, attention_norm_bias, dense_bias = _vectors(self.attention_norm, 3)
        (ffn_bias,) = _vectors(self.ffn_bias, 1)
        query_bias, value_bias = _vectors(self.qv_bias, 2)
        # The bias of the keys shifts all scores of a query alike, which no softmax sees, whatever the mask and dropout.
        key_bias = torch.zeros_like(query_bias)
        query, key, value = self.matrices["qkv"].chunk(3)
        first = [query, query_bias, key, key_bias, value, value_bias, self.matrices["dense"], dense_bias]
        then = [attention_norm_weight, attention_norm_bias, self.matrices["ffn"], ffn_bias]
        return [*first, *then, self.matrices["ffn_output"], ffn_output_bias, norm_weight, norm_bias]


def _vectors(partials: Tensor, count: int) -> list[Tensor]:
    """The sums of `partials` over its rows, as so many vectors."""
    vectors = [partials.new_empty(partials.shape[1:].numel() // count) for _ in range(count)]
    column_sum(partials.flatten(1), vectors)
    return vectors


# ------------------------------------------------------------------------------------------------- the implementations


def _without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The products are in the dtype of the tokens: autocast, which is seen inside operators, would have PyTorch return
    some of them in another than the kernels around them expect."""

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        tensor = args[0]
        assert isinstance(tensor, Tensor)
        device = tensor.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_without_autocast
def encoder_inference(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> Tensor:
    """All passes, nothing kept."""
    hidden = hidden.contiguous()
    if few_tokens.serves(hidden, options):
        return few_tokens.encoder_few_tokens(hidden, parameters, cu_seqlens, max_seqlen, options)
    loop = _Loop(hidden, parameters, cu_seqlens, max_seqlen, options)
    memory, h = loop.forward_memory(), loop.empty(loop.width)
    states, result = _states(hidden, options)
    for index in range(len(loop.layer_of_pass)):
        loop.forward_pass(index, states[index], memory, states[index + 1], h, None)
    return result


@_without_autocast
def encoder(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> tuple[Tensor, list[Tensor]]:
    """All passes, and what `encoder_backward` needs of them."""
    hidden = hidden.contiguous()
    loop = _Loop(hidden, parameters, cu_seqlens, max_seqlen, options)
    kept = [hidden.new_empty(shape, dtype=dtype) for shape, dtype in kept_shapes(hidden, parameters, options)]
    h = loop.empty(loop.width)
    states, result = _states(hidden, options)
    passes = len(loop.layer_of_pass)
    if options.recompute == "layer":
        memory = loop.forward_memory()
        for index in range(passes):
            kept[0][index].copy_(states[index])
            loop.forward_pass(index, states[index], memory, states[index + 1], h, None)
    else:
        kept[0].copy_(hidden)
        of_all = _Kept(*kept[1:], *([None] if options.recompute == "ffn" else []))
        wide = loop.empty(loop.intermediate)
        for index, of_pass in enumerate(of_all.by_pass()):
            if of_pass.inner is None:
                of_pass, into = of_pass._replace(inner=wide), None
            else:
                into = wide
            loop.forward_pass(index, states[index], of_pass, states[index + 1], h, into)
    return result, kept


def _states(hidden: Tensor, options: EncoderOptions) -> tuple[list[Tensor], Tensor]:
    """The input of the first pass and the output of each, all apart or two that take turns; and what is returned."""
    passes = len(options.layer_of_pass())
    if options.return_all:
        whole = hidden.new_empty(passes + 1, *hidden.shape)
        whole[0].copy_(hidden)
        return [*whole], whole
    pair = [torch.empty_like(hidden) for _ in range(min(passes, 2))]
    states = [hidden, *(pair[index % 2] for index in range(passes))]
    return states, states[-1]


@_without_autocast
def encoder_backward(
    grad_output: Tensor,
    kept: list[Tensor],
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: EncoderOptions,
) -> list[Tensor]:
    """Gradients of hidden and of each parameter."""
    grad = grad_output[-1] if options.return_all else grad_output
    loop = _Loop(grad, parameters, cu_seqlens, max_seqlen, options)
    gradients = [_LayerGradients(loop) for _ in loop.layers]
    runs = list(_runs(loop.layer_of_pass, _most_gathered(loop)))
    gathered = _Gathered.empty(loop, max(last - first for first, last in runs))
    loop.between = memory_between(loop.split(gathered.grad_qkv[0])[0], cu_seqlens.numel() - 1, options.bias)
    if options.recompute == "layer":
        again, context = loop.forward_memory(), loop.empty(loop.width, gathered.x.shape[0])
        y, h = loop.empty(loop.width), loop.empty(loop.width)
        wide = loop.empty(loop.intermediate)
    else:
        of_all = _Kept(*kept[1:], *([None] if options.recompute == "ffn" else []))
        by_pass = of_all.by_pass()
    slots = gathered.by_pass()
    more: Tensor | None = None
    for first, last in reversed(runs):
        layer_gradients = gradients[loop.layer_of_pass[first]]
        for index in reversed(range(first, last)):
            slot, output = slots[index - first], None
            if options.recompute == "layer":
                of_pass = again._replace(context=context[index - first])
                slot.x.copy_(kept[0][index])
                loop.forward_pass(index, slot.x, of_pass, y, h, wide)
            else:
                of_pass = by_pass[index]
                if index + 1 < last:  # of this run, whose products alone read `x`
                    output = slots[index + 1 - first].x
                if index == first:
                    loop.input_of(index, kept[0], by_pass, slot.x)
            grad, more = loop.backward_pass(index, grad, more, of_pass, slot, layer_gradients, output)
            if options.return_all:
                grad = grad + grad_output[index]
        contexts = context[: last - first] if options.recompute == "layer" else of_all.context[first:last]
        layer_gradients.add(_Gathered._make(part[: last - first] for part in gathered), contexts)
    if more is not None:
        grad = grad + more
    flat = [tensor for layer in gradients for tensor in layer.by_parameter()]
    return [grad, *(_apart(tensor, p.dtype) for tensor, p in zip(flat, parameters, strict=True))]


def _apart(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; a part of a tensor is copied, for an operator's results must not share memory.

    Not by what autograd knows of views: in inference mode and below a dispatch mode it knows of none.
    """
    return tensor.to(dtype, copy=tensor.untyped_storage().nbytes() != tensor.nbytes)


def _most_gathered(loop: _Loop) -> int:
    """How many passes; fewer where the last run would be short."""
    passes, tokens = len(loop.layer_of_pass), max(1, loop.tokens)
    most = GATHERED_TOKENS // tokens
    if loop.like.is_cuda:
        of_a_pass = sum(_Gathered.widths(loop)) * tokens * loop.like.element_size()
        most = min(most, int(_GATHERED_SHARE * memory_bytes(loop.like.device)) // of_a_pass)
    return cdiv(passes, cdiv(passes, max(1, min(most, passes)))) if passes else 1


def _runs(layer_of_pass: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring passes of one layer, at most so many: from the first to beyond the last."""
    first = 0
    for index in range(1, len(layer_of_pass) + 1):
        end = index == len(layer_of_pass)
        if end or layer_of_pass[index] != layer_of_pass[first] or index - first == most:
            yield first, index
            first = index
