"""The shared-layer loop: all passes of ALBERT's encoder (arXiv 1909.11942, section 3.1), forward and backward.

One layer, on packed tokens x [tokens, hidden]:

    qkv = x [query; key; value]ᵀ            one product for the three
    h   = LayerNorm(x + dropout(attention(qkv) denseᵀ))
    y   = LayerNorm(h + act(h ffnᵀ) ffn_outputᵀ)

There is no dropout after the feed-forward half: transformers has none there, and its checkpoints are what this must
reproduce (Google's original code does drop there).

Which layer a pass uses: layers l = 0 … num_layers - 1 in order, each of them the `inner_group_num` layers of group
`int(l / (num_layers / num_groups))`. With one group and one inner layer the same 16 tensors serve every pass: their
gradients are summed over the passes in float32 at least, inside this one node of the graph.

Dropout sites: pass i uses 1 + 2 i for the attention's probabilities and 2 + 2 i for the dropout that follows `dense`;
site 0 is the embeddings'.

Precision: products in the dtype of hidden, which autocast may make narrower than that of the parameters; softmax,
statistics and the sums of gradients in float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from albert_fast import backends
from albert_fast.activations import ACTIVATIONS
from albert_fast.ops.attention import (
    AttentionOptions,
    attention,
    attention_with_weights,
    check_bias,
    logsumexp_shape,
)
from albert_fast.ops.attention import reference_backward as attention_backward
from albert_fast.ops.attention import reference_forward as attention_forward
from albert_fast.ops.checks import FLOATS, check, check_cu_seqlens, check_tensor, has_no_derivative
from albert_fast.ops.dropout import check_dropout, dropout
from albert_fast.ops.dropout_add_layer_norm import layer_norm_backward
from albert_fast.ops.quantized_linear import quantized_linear, rounding_error

RECOMPUTE = ("none", "ffn", "layer")
TENSORS_PER_LAYER = 16

# The activations that fused kernels know, by the name that `bias_gelu` gives them.
FUSED_ACTIVATIONS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_new": "tanh",
    "gelu_accurate": "tanh",
    "gelu_fast": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "relu": "relu",
}


def layer_of_pass(num_layers: int, num_groups: int, inner_group_num: int) -> list[int]:
    """For each pass, which of the num_groups * inner_group_num layers it uses."""
    layers_per_group = num_layers / num_groups
    return [
        int(layer / layers_per_group) * inner_group_num + inner
        for layer in range(num_layers)
        for inner in range(inner_group_num)
    ]


class EncoderOptions(NamedTuple):
    """What `encoder` takes after its tensors and offsets; its docstring explains each."""

    num_layers: int
    num_groups: int
    inner_group_num: int
    num_heads: int
    activation: str
    eps: float
    hidden_dropout_p: float
    attention_dropout_p: float
    seed: Tensor | None
    bias: Tensor | None
    recompute: str
    return_all: bool
    quantized: bool = False  # inference alone has these
    input_means: Tensor | None = None

    def layer_of_pass(self) -> list[int]:
        return layer_of_pass(self.num_layers, self.num_groups, self.inner_group_num)

    def of_training(self) -> tuple[object, ...]:
        """As the operators that train take them."""
        return self[:-2]

    def attention(self, pass_index: int, head_dim: int) -> AttentionOptions:
        return AttentionOptions(
            dropout_p=self.attention_dropout_p,
            seed=self.seed,
            site=1 + 2 * pass_index,
            scale=head_dim**-0.5,
            bias=self.bias,
        )


class Layer(NamedTuple):
    """The layer's tensors as the loop uses them: query, key and value as one matrix, prepared once for all passes."""

    qkv_weight: Tensor
    qkv_bias: Tensor
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


def layers_of(parameters: list[Tensor]) -> list[Layer]:
    layers = []
    for first in range(0, len(parameters), TENSORS_PER_LAYER):
        q, q_bias, k, k_bias, v, v_bias, *rest = parameters[first : first + TENSORS_PER_LAYER]
        layers.append(Layer(torch.cat([q, k, v]), torch.cat([q_bias, k_bias, v_bias]), *rest))
    return layers


# --------------------------------------------------------------------------------------------- what rounding takes away


def _input_places(width: int) -> list[slice]:
    """Of query/key/value, dense, ffn and ffn_output among a pass's input means."""
    return [slice(0, width), slice(width, 2 * width), slice(2 * width, 3 * width), slice(3 * width, None)]


def corrections(parameters: list[Tensor], input_means: Tensor, layer_of_pass: list[int]) -> Tensor:
    """What `input_means` adds to the biases of query, key and value, dense, ffn and ffn_output in each pass:
    [passes, 5 hidden + inner], float32."""
    errors = []
    for layer in layers_of(parameters):
        matrices = (layer.qkv_weight, layer.dense_weight, layer.ffn_weight, layer.ffn_output_weight)
        errors.append([rounding_error(matrix) for matrix in matrices])
    places = _input_places(parameters[0].shape[1])
    return torch.stack(
        [
            torch.cat([error @ means[place].float() for error, place in zip(errors[layer], places, strict=True)])
            for layer, means in zip(layer_of_pass, input_means, strict=True)
        ]
    )


# ------------------------------------------------------------------------------------------------------- the reference


def encoder_reference(
    hidden: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: EncoderOptions,
    attentions: list[Tensor] | None = None,
    observed_means: Tensor | None = None,
) -> Tensor:
    """The loop in PyTorch. `attentions`, when given, receives each pass's [batch, heads, max_seqlen, max_seqlen];
    `observed_means` [passes, 3 hidden + inner] is filled with what `input_means` is to be."""
    activation = ACTIVATIONS[options.activation]
    eps = options.eps
    places = _input_places(hidden.shape[-1])

    def linear(product: int, pass_index: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if observed_means is not None:
            observed_means[pass_index, places[product]] = x.detach().float().mean(dim=0).to(observed_means.dtype)
        if not options.quantized:
            return F.linear(x, weight, bias)
        means = options.input_means
        return quantized_linear(x, weight, bias, None if means is None else means[pass_index, places[product]])

    def feed_forward(h: Tensor, layer: Layer, pass_index: int) -> Tensor:
        inner = activation(linear(2, pass_index, h, layer.ffn_weight, layer.ffn_bias))
        return linear(3, pass_index, inner, layer.ffn_output_weight, layer.ffn_output_bias)

    def one_pass(x: Tensor, layer: Layer, pass_index: int) -> Tensor:
        qkv = linear(0, pass_index, x, layer.qkv_weight, layer.qkv_bias).unflatten(-1, (3, options.num_heads, -1))
        attention_options = options.attention(pass_index, qkv.shape[-1])
        if attentions is None:
            context = attention(qkv, cu_seqlens, max_seqlen, **attention_options._asdict())
        else:
            query, key, value = qkv.unbind(1)
            context, weights = attention_with_weights(
                query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, attention_options
            )
            attentions.append(weights)
        projected = linear(1, pass_index, context, layer.dense_weight, layer.dense_bias)
        site = 2 + 2 * pass_index
        h = x + dropout(projected, options.hidden_dropout_p, options.seed, site, cu_seqlens)
        h = F.layer_norm(h, h.shape[-1:], layer.attention_norm_weight, layer.attention_norm_bias, eps)
        if options.recompute == "ffn" and torch.is_grad_enabled():
            y = checkpoint(feed_forward, h, layer, pass_index, use_reentrant=False, preserve_rng_state=False)
        else:
            y = feed_forward(h, layer, pass_index)
        return F.layer_norm(h + y, h.shape[-1:], layer.norm_weight, layer.norm_bias, eps)

    layers = layers_of(parameters)
    states = [hidden]
    for pass_index, index in enumerate(options.layer_of_pass()):
        if options.recompute == "layer" and torch.is_grad_enabled():
            y = checkpoint(
                one_pass, states[-1], layers[index], pass_index, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y = one_pass(states[-1], layers[index], pass_index)
        states = [*states, y] if options.return_all else [y]
    return torch.stack(states) if options.return_all else states[-1]


# -------------------------------------------------------------------------------------------------------- the operator


class _Saved(NamedTuple):
    """What a pass leaves for its backward; `x` alone when recompute is "layer", without `inner` when it is "ffn".

    The operator keeps one tensor for all passes of each: [passes, …].
    """

    x: Tensor  # [tokens, hidden], the pass's input
    qkv: Tensor  # [tokens, 3, heads, head_dim]
    context: Tensor  # [tokens, hidden], the attention's output
    logsumexp: Tensor  # [heads, tokens], with a bias [2, heads, tokens]
    summed: Tensor  # [tokens, hidden], input of the first LayerNorm
    output_summed: Tensor  # [tokens, hidden], input of the second LayerNorm
    inner: Tensor  # [tokens, intermediate], before the activation


_KEPT = {"none": 7, "ffn": 6, "layer": 1}


def kept_shapes(
    hidden: Tensor, parameters: list[Tensor], options: EncoderOptions
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of what the operator keeps: the first of `_Saved`'s tensors, of all passes."""
    tokens, width = hidden.shape
    state = (tokens, width)
    shapes = {
        "x": state,
        "qkv": (tokens, 3, options.num_heads, width // options.num_heads),
        "context": state,
        "logsumexp": logsumexp_shape(options.num_heads, tokens, options.bias),
        "summed": state,
        "output_summed": state,
        "inner": (tokens, parameters[10].shape[0]),
    }
    at_least_float32 = torch.promote_types(hidden.dtype, torch.float32)
    passes = len(options.layer_of_pass())
    return [
        ((passes, *shapes[name]), at_least_float32 if name == "logsumexp" else hidden.dtype)
        for name in _Saved._fields[: _KEPT[options.recompute]]
    ]


def _activate(x: Tensor, form: str) -> Tensor:
    return F.relu(x) if form == "relu" else F.gelu(x, approximate=form)


def _activate_backward(grad: Tensor, x: Tensor, form: str) -> Tensor:
    return grad * (x > 0) if form == "relu" else torch.ops.aten.gelu_backward(grad, x, approximate=form)


def _pass_forward(
    x: Tensor, layer: Layer, pass_index: int, cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> tuple[Tensor, _Saved]:
    qkv = F.linear(x, layer.qkv_weight, layer.qkv_bias).unflatten(-1, (3, options.num_heads, -1))
    rows = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    context, logsumexp = attention_forward(*qkv.unbind(1), *rows, options.attention(pass_index, qkv.shape[-1]))
    projected = F.linear(context, layer.dense_weight, layer.dense_bias)
    summed = x + dropout(projected, options.hidden_dropout_p, options.seed, 2 + 2 * pass_index, cu_seqlens)
    h = F.layer_norm(summed, x.shape[-1:], layer.attention_norm_weight, layer.attention_norm_bias, options.eps)
    inner = F.linear(h, layer.ffn_weight, layer.ffn_bias)
    activated = _activate(inner, FUSED_ACTIVATIONS[options.activation])
    output_summed = h + F.linear(activated, layer.ffn_output_weight, layer.ffn_output_bias)
    y = F.layer_norm(output_summed, x.shape[-1:], layer.norm_weight, layer.norm_bias, options.eps)
    return y, _Saved(x, qkv, context, logsumexp, summed, output_summed, inner)


def _pass_backward(
    grad_y: Tensor,
    saved: _Saved,
    layer: Layer,
    grads: Layer,
    pass_index: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: EncoderOptions,
) -> Tensor:
    """Gradient of the pass's input; those of the parameters are added to `grads`."""
    form = FUSED_ACTIVATIONS[options.activation]

    def add_linear(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        weight.addmm_(grad.t().to(weight.dtype), x.to(weight.dtype))
        bias.add_(grad.sum(dim=0, dtype=bias.dtype))

    grad_h, *norm = layer_norm_backward(grad_y, saved.output_summed, layer.norm_weight, layer.norm_bias, options.eps)
    grads.norm_weight.add_(norm[0])
    grads.norm_bias.add_(norm[1])
    add_linear(grad_h, _activate(saved.inner, form), grads.ffn_output_weight, grads.ffn_output_bias)
    grad_inner = _activate_backward(grad_h @ layer.ffn_output_weight, saved.inner, form)
    h = F.layer_norm(
        saved.summed, grad_h.shape[-1:], layer.attention_norm_weight, layer.attention_norm_bias, options.eps
    )
    add_linear(grad_inner, h, grads.ffn_weight, grads.ffn_bias)
    grad_h = grad_h + grad_inner @ layer.ffn_weight

    grad_x, *norm = layer_norm_backward(
        grad_h, saved.summed, layer.attention_norm_weight, layer.attention_norm_bias, options.eps
    )
    grads.attention_norm_weight.add_(norm[0])
    grads.attention_norm_bias.add_(norm[1])
    grad_projected = dropout(grad_x, options.hidden_dropout_p, options.seed, 2 + 2 * pass_index, cu_seqlens)
    add_linear(grad_projected, saved.context, grads.dense_weight, grads.dense_bias)
    rows = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    grad_qkv = torch.stack(
        attention_backward(
            grad_projected @ layer.dense_weight,
            *saved.qkv.unbind(1),
            saved.context,
            saved.logsumexp,
            *rows,
            options.attention(pass_index, saved.qkv.shape[-1]),
        ),
        dim=1,
    ).flatten(1)
    add_linear(grad_qkv, saved.x, grads.qkv_weight, grads.qkv_bias)
    return grad_x + grad_qkv @ layer.qkv_weight


@backends.reference("encoder")
def _forward(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> tuple[Tensor, list[Tensor]]:
    layers = layers_of(parameters)
    states, kept = [hidden], []
    for pass_index, index in enumerate(options.layer_of_pass()):
        y, saved = _pass_forward(states[-1], layers[index], pass_index, cu_seqlens, max_seqlen, options)
        kept.append(saved[: _KEPT[options.recompute]])
        states = [*states, y] if options.return_all else [y]
    # Copies: an operator's outputs must not share memory with each other or with its inputs.
    output = torch.stack(states) if options.return_all else states[-1].clone()
    return output, [torch.stack(tensors) for tensors in zip(*kept, strict=True)]


@backends.reference("encoder_backward")
def _backward(
    grad_output: Tensor,
    kept: list[Tensor],
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: EncoderOptions,
) -> list[Tensor]:
    """Gradients of hidden and of each of the parameters."""
    layers = layers_of(parameters)
    grads = [
        Layer(*(torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in layer))
        for layer in layers
    ]
    passes = options.layer_of_pass()
    grad = grad_output[-1] if options.return_all else grad_output
    for pass_index in reversed(range(len(passes))):
        layer, layer_grads = layers[passes[pass_index]], grads[passes[pass_index]]
        tensors = [tensor[pass_index] for tensor in kept]
        if options.recompute == "none":
            saved = _Saved(*tensors)
        elif options.recompute == "ffn":
            summed = tensors[4]
            norm = (layer.attention_norm_weight, layer.attention_norm_bias)
            h = F.layer_norm(summed, summed.shape[-1:], *norm, options.eps)
            saved = _Saved._make([*tensors, F.linear(h, layer.ffn_weight, layer.ffn_bias)])
        else:
            _, saved = _pass_forward(tensors[0], layer, pass_index, cu_seqlens, max_seqlen, options)
        grad = _pass_backward(grad, saved, layer, layer_grads, pass_index, cu_seqlens, max_seqlen, options)
        if options.return_all:
            grad = grad + grad_output[pass_index]
    flat = [g for layer in grads for g in (*_split_qkv(layer.qkv_weight, layer.qkv_bias), *layer[2:])]
    return [grad.clone(), *(g.to(p.dtype) for g, p in zip(flat, parameters, strict=True))]


def _split_qkv(weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Gradients of the joined projection -> weight and bias of query, key and value."""
    pairs = zip(weight.chunk(3), bias.chunk(3), strict=True)
    return [tensor.clone() for pair in pairs for tensor in pair]


@backends.reference("encoder_inference")
def _inference(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> Tensor:
    with torch.no_grad():
        return encoder_reference(hidden, parameters, cu_seqlens, max_seqlen, options)


def _call(
    hidden: Tensor, options: EncoderOptions, training: bool, parameters: list[Tensor] | None = None
) -> backends.Call:
    """parameters: of a call that is about to run, so that it can be chosen for by its sizes."""
    tokens, width = hidden.shape[-2:]
    sizes = None
    if parameters is not None:
        sizes = backends.EncoderSizes(
            tokens,
            width,
            parameters[10].shape[0],
            options.num_heads,
            options.num_groups * options.inner_group_num,
            options.bias is not None,
            bool(options.hidden_dropout_p or options.attention_dropout_p),
        )
    return backends.Call(
        "encoder",
        hidden.device,
        hidden.dtype,
        width // options.num_heads,
        options.activation,
        training,
        options.quantized,
        sizes,
    )


@torch.library.custom_op("albert_fast::encoder", mutates_args=())
def _op(
    hidden: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_layers: int,
    num_groups: int,
    inner_group_num: int,
    num_heads: int,
    activation: str,
    eps: float,
    hidden_dropout_p: float,
    attention_dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    recompute: str,
    return_all: bool,
) -> tuple[Tensor, list[Tensor]]:
    options = EncoderOptions(
        num_layers,
        num_groups,
        inner_group_num,
        num_heads,
        activation,
        eps,
        hidden_dropout_p,
        attention_dropout_p,
        seed,
        bias,
        recompute,
        return_all,
    )
    function = backends.implementation("encoder", _call(hidden, options, training=True))
    return function(hidden, parameters, cu_seqlens, max_seqlen, options)


@_op.register_fake
def _(hidden, parameters, cu_seqlens, max_seqlen, *options):  # type: ignore[no-untyped-def]
    options = EncoderOptions(*options)
    shapes = backends.choose(_call(hidden, options, training=True)).load().get("encoder_kept_shapes", kept_shapes)
    kept = [hidden.new_empty(shape, dtype=dtype) for shape, dtype in shapes(hidden, parameters, options)]
    return _empty_output(hidden, options), kept


@torch.library.custom_op("albert_fast::encoder_inference", mutates_args=())
def _inference_op(
    hidden: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_layers: int,
    num_groups: int,
    inner_group_num: int,
    num_heads: int,
    activation: str,
    eps: float,
    hidden_dropout_p: float,
    attention_dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    recompute: str,
    return_all: bool,
    quantized: bool,
    input_means: Tensor | None,
) -> Tensor:
    """The output alone: nothing is kept for a backward, and there is none."""
    options = EncoderOptions(
        num_layers,
        num_groups,
        inner_group_num,
        num_heads,
        activation,
        eps,
        hidden_dropout_p,
        attention_dropout_p,
        seed,
        bias,
        recompute,
        return_all,
        quantized,
        input_means,
    )
    call = _call(hidden, options, training=False, parameters=parameters)
    function = backends.implementation("encoder_inference", call)
    return function(hidden, parameters, cu_seqlens, max_seqlen, options)


@_inference_op.register_fake
def _(hidden, parameters, cu_seqlens, max_seqlen, *options):  # type: ignore[no-untyped-def]
    return _empty_output(hidden, EncoderOptions(*options))


def _empty_output(hidden: Tensor, options: EncoderOptions) -> Tensor:
    states = (len(options.layer_of_pass()) + 1,) if options.return_all else ()
    return hidden.new_empty((*states, *hidden.shape))


@torch.library.custom_op("albert_fast::encoder_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    kept: list[Tensor],
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_layers: int,
    num_groups: int,
    inner_group_num: int,
    num_heads: int,
    activation: str,
    eps: float,
    hidden_dropout_p: float,
    attention_dropout_p: float,
    seed: Tensor | None,
    bias: Tensor | None,
    recompute: str,
    return_all: bool,
) -> list[Tensor]:
    options = EncoderOptions(
        num_layers,
        num_groups,
        inner_group_num,
        num_heads,
        activation,
        eps,
        hidden_dropout_p,
        attention_dropout_p,
        seed,
        bias,
        recompute,
        return_all,
    )
    function = backends.implementation("encoder_backward", _call(grad_output, options, training=True))
    return function(grad_output.contiguous(), kept, parameters, cu_seqlens, max_seqlen, options)


@_backward_op.register_fake
def _(grad_output, kept, parameters, *args):  # type: ignore[no-untyped-def]
    grad_hidden = grad_output.new_empty(grad_output.shape[-2:])
    return [grad_hidden, *(torch.empty_like(parameter) for parameter in parameters)]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, parameters, cu_seqlens, ctx.max_seqlen, *options = inputs
    ctx.options = EncoderOptions(*options)._replace(seed=None, bias=None)
    seed, bias = options[8], options[9]
    ctx.counts = (len(output[1]), len(parameters))
    # What is kept gets no gradient: without this, autograd would make zeros of the same size.
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1], *parameters, cu_seqlens, seed, bias)


def _autograd(ctx, grad_output, _grad_kept):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens, seed, bias = ctx.saved_tensors
    kept, parameters = tensors[: ctx.counts[0]], tensors[ctx.counts[0] :]
    options = ctx.options._replace(seed=seed, bias=bias)
    grad_hidden, *grads = _backward_op(
        grad_output, kept, parameters, cu_seqlens, ctx.max_seqlen, *options.of_training()
    )
    return grad_hidden, grads, *([None] * 14)


_op.register_autograd(_autograd, setup_context=_setup_context)
has_no_derivative(_backward_op)


# ----------------------------------------------------------------------------------------------------- public function


def encoder(
    hidden: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_layers: int,
    num_groups: int = 1,
    inner_group_num: int = 1,
    num_heads: int,
    activation: str = "gelu_new",
    eps: float = 1e-12,
    hidden_dropout_p: float = 0.0,
    attention_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    recompute: str = "none",
    return_all: bool = False,
    attentions: list[Tensor] | None = None,
    quantized: bool = False,
    input_means: Tensor | None = None,
) -> Tensor:
    """All passes of the encoder over packed tokens.

    Args:
        hidden: [tokens, hidden], floating point: the embeddings after their projection.
        parameters: 16 tensors a layer: weight and bias of query, key, value, dense, attention.LayerNorm, ffn,
            ffn_output, full_layer_layer_norm; the layers by group, then inner. Matrices are [out, in].
        cu_seqlens, max_seqlen: int32 [batch + 1], where each row begins, and an upper bound of the rows' lengths.
        num_layers, num_groups, inner_group_num: `num_layers * inner_group_num` passes; see above for which layer each
            uses.
        num_heads: hidden must be a multiple of it.
        activation: a name in `albert_fast.activations.ACTIVATIONS`.
        eps: of both LayerNorms.
        hidden_dropout_p, attention_dropout_p: after `dense`, and of the attention's probabilities; they need `seed`.
        seed: int64 tensor with one element, on the device.
        bias: added to the attention's scores of every pass, as in `cross_attention`.
        recompute: what backward computes again instead of keeping it: "none", "ffn" (the feed-forward half: keeps about
            60 % of the memory) or "layer" (all but the input of each pass).
        return_all: also the input of the first pass and the output of each.
        attentions: a list that receives each pass's probabilities [batch, heads, max_seqlen, max_seqlen], zero beyond
            each row. Only the reference stores them: it serves such a call.
        quantized: the products in int8 (see `albert_fast.ops.quantized_linear`), without a gradient; on processors with
            VNNI those of attention in integers, too (csrc/cpu/attention.h).
        input_means: [passes, 3 hidden + inner] floating point: for each pass the mean input of the query, key and value
            products, of `dense`, `ffn` and `ffn_output`, by which quantized products correct their biases.

    Returns:
        [tokens, hidden]; with return_all [passes + 1, tokens, hidden].

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    options = EncoderOptions(
        num_layers,
        num_groups,
        inner_group_num,
        num_heads,
        activation,
        eps,
        hidden_dropout_p,
        attention_dropout_p,
        seed,
        bias,
        recompute,
        return_all,
        quantized,
        input_means,
    )
    _check_encoder(hidden, parameters, cu_seqlens, max_seqlen, options)
    if quantized and torch.is_grad_enabled():
        with torch.no_grad():
            return _run(hidden, parameters, cu_seqlens, max_seqlen, options, attentions)
    return _run(hidden, parameters, cu_seqlens, max_seqlen, options, attentions)


@torch.no_grad()
def observe_input_means(
    hidden: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_layers: int,
    num_groups: int = 1,
    inner_group_num: int = 1,
    num_heads: int,
    activation: str = "gelu_new",
    eps: float = 1e-12,
) -> Tensor:
    """What `encoder` takes as `input_means`, [passes, 3 hidden + inner] float32, as these tokens have it.

    Arguments and errors are those of `encoder`.
    """
    options = EncoderOptions(
        num_layers, num_groups, inner_group_num, num_heads, activation, eps, 0.0, 0.0, None, None, "none", False
    )
    _check_encoder(hidden, parameters, cu_seqlens, max_seqlen, options)
    check(hidden.shape[0] > 0, "hidden has no tokens; at least one was expected")
    width, inner = hidden.shape[1], parameters[10].shape[0]
    means = hidden.new_empty(len(options.layer_of_pass()), 3 * width + inner, dtype=torch.float32)
    encoder_reference(hidden, parameters, cu_seqlens, max_seqlen, options, observed_means=means)
    return means


def _run(
    hidden: Tensor,
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: EncoderOptions,
    attentions: list[Tensor] | None,
) -> Tensor:
    """What serves the call, be it to train or not."""
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, *parameters))
    # Who compiles the call for any sizes is not to compile it for these.
    call = _call(hidden, options, training, None if training or torch.compiler.is_compiling() else parameters)
    serving = backends.REFERENCE if attentions is not None else backends.choose(call)
    if serving is backends.REFERENCE:
        return encoder_reference(hidden, parameters, cu_seqlens, max_seqlen, options, attentions)
    if training:
        output, _ = _op(hidden, parameters, cu_seqlens, max_seqlen, *options.of_training())
        return output
    if torch.compiler.is_compiling() or type(hidden) is not Tensor:
        return _inference_op(hidden, parameters, cu_seqlens, max_seqlen, *options)
    # Without the operator, which would cost another 40 microseconds.
    return serving.load()["encoder_inference"](hidden, parameters, cu_seqlens, max_seqlen, options)


def _shapes_of_layer(width: int, inner: int) -> tuple[tuple[int, ...], ...]:
    square, vector = (width, width), (width,)
    feed_forward = ((inner, width), (inner,), (width, inner), vector)
    return (square, vector) * 4 + (vector, vector, *feed_forward, vector, vector)


def _check_layer(
    layer: list[Tensor], first: int, hidden: Tensor, dtypes: torch.dtype | tuple[torch.dtype, ...]
) -> None:
    """The tensors of one layer, of which `layer[0]` is `parameters[first]`."""
    width = hidden.shape[1]
    ffn = layer[10]
    if ffn.dim() == 2 and not torch.compiler.is_compiling():
        # All at once: a call of few tokens takes a few milliseconds. What is wrong is looked for below.
        device, allowed = hidden.device, dtypes if isinstance(dtypes, tuple) else (dtypes,)
        fit = [tensor.shape for tensor in layer] == [*_shapes_of_layer(width, ffn.shape[0])]
        if fit and all(tensor.dtype in allowed and tensor.device == device for tensor in layer):
            return
    check_tensor(f"parameters[{first + 10}]", ffn, (None, width), like=hidden, dtype=dtypes)
    for offset, shape in enumerate(_shapes_of_layer(width, ffn.shape[0])):
        check_tensor(f"parameters[{first + offset}]", layer[offset], shape, like=hidden, dtype=dtypes)


def _check_encoder(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> None:
    check_tensor("hidden", hidden, (None, None), dtype=FLOATS)
    # Under autocast the products cast what they are given.
    dtypes = FLOATS if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
    width = hidden.shape[1]
    for name in ("num_layers", "num_groups", "inner_group_num", "num_heads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; at least 1 was expected")
    check(
        options.num_groups <= options.num_layers,
        lambda: (
            f"num_groups is {options.num_groups} and num_layers {options.num_layers}; "
            "no more groups than layers were expected"
        ),
    )
    check(
        width % options.num_heads == 0,
        lambda: f"num_heads is {options.num_heads}; a divisor of the hidden size {width} was expected",
    )
    check(
        options.activation in ACTIVATIONS,
        lambda: f"activation is {options.activation!r}; one of {', '.join(ACTIVATIONS)} was expected",
    )
    check(
        options.recompute in RECOMPUTE,
        lambda: f"recompute is {options.recompute!r}; one of {', '.join(RECOMPUTE)} was expected",
    )
    expected = TENSORS_PER_LAYER * options.num_groups * options.inner_group_num
    check(
        len(parameters) == expected,
        lambda: (
            f"parameters has {len(parameters)} tensors; {expected} were expected, {TENSORS_PER_LAYER} for each of "
            f"{options.num_groups} x {options.inner_group_num} layers"
        ),
    )
    for first in range(0, expected, TENSORS_PER_LAYER):
        _check_layer(parameters[first : first + TENSORS_PER_LAYER], first, hidden, dtypes)
    check_dropout(options.hidden_dropout_p, options.seed, hidden.device)
    check_dropout(options.attention_dropout_p, options.seed, hidden.device)
    check_cu_seqlens("cu_seqlens", cu_seqlens, hidden.shape[0], max_seqlen, hidden)
    if options.input_means is not None:
        shape = (len(options.layer_of_pass()), 3 * width + parameters[10].shape[0])
        check_tensor("input_means", options.input_means, shape, like=hidden, dtype=FLOATS)
    if options.bias is not None:
        batch = cu_seqlens.numel() - 1
        check_bias(options.bias, hidden.device, batch, options.num_heads, max_seqlen, max_seqlen)
