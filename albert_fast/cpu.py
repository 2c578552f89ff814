"""The `cpu` backend: the operations in terms of the native library (csrc/cpu, through csrc/binding.cpp).

Float32 and bfloat16 on the CPU. What it is given has been checked by the operations; what it does not serve, it
declines beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends, kept_memory, native
from albert_fast.ops.attention import AttentionOptions, logsumexp_shape
from albert_fast.ops.embed_layer_norm import check_all_ids
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, TENSORS_PER_LAYER, EncoderOptions, kept_shapes
from albert_fast.ops.masked_lm_loss import gradient_of_losses, nothing_kept, reduced
from albert_fast.packing import PackedBatch
from albert_fast.prepared import CODES, model_weights, packed_weights, quantized_weights

# csrc/cpu/gemm.h
_ACTIVATIONS = {"tanh": 1, "none": 2, "relu": 3}

_MOST_HEAD_DIM = 128


unavailable = native.unavailable


def declines(call: backends.Call) -> str | None:
    if call.device.type != "cpu":
        return "it serves CPU tensors"
    if call.dtype not in CODES:
        return f"float32 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.head_dim is not None and not 1 <= call.head_dim <= _MOST_HEAD_DIM:
        return f"heads of up to {_MOST_HEAD_DIM}, not {call.head_dim}"
    if call.activation is not None and call.activation not in FUSED_ACTIVATIONS:
        return f"activations {', '.join(FUSED_ACTIVATIONS)}, not {call.activation}"
    return native.load()


def load() -> backends.Implementations:
    return _implementations


_implementations: dict[str, Callable[..., Any]] = {}


def _implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[name] = function
        return function

    return register


def _additive(bias: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """[batch or 1, heads or 1, queries, keys] as the kernels read it: strides 0 where it repeats, keys contiguous."""
    if bias is None:
        return None
    bias = bias.detach()
    if bias.dtype not in CODES:
        bias = bias.float()
    if bias.stride(-1) != 1:
        bias = bias.contiguous()
    return bias.expand(batch, heads, -1, -1)


def _serves(*tensors: Tensor | None) -> bool:
    """Whether all are float32 or bfloat16: a call is chosen by the dtype of one of them."""
    return all(tensor is None or tensor.dtype in CODES for tensor in tensors)


def _rows(x: Tensor) -> Tensor:
    """Columns contiguous, any row stride but those of rows that overlap."""
    apart = x.dim() != 2 or x.shape[0] <= 1 or x.stride(0) >= x.shape[1]
    return x if apart and (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()


def _dropout_rows(dropout_p: float, cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """The rows that name the elements to a dropout; tokens of no row are one more, as in the reference."""
    if dropout_p == 0.0 or cu_seqlens is None:
        return None
    return cu_seqlens.contiguous() if int(cu_seqlens[-1]) == tokens else F.pad(cu_seqlens, (0, 1), value=tokens)


def _floats(*like: Tensor) -> list[Tensor]:
    """Float32 zeros, for gradients that the kernels add to."""
    return [torch.zeros(tensor.shape, dtype=torch.float32) for tensor in like]


def _seed(seed: Tensor | None, *probabilities: float) -> int:
    return int(seed) if seed is not None and any(probabilities) else 0


# -------------------------------------------------------------------------------------------------------------- encoder


def _encoder_options(options: EncoderOptions, cu_seqlens: Tensor) -> tuple[Any, ...]:
    """From layer_of_pass to bias, as the native operators take them."""
    batch = cu_seqlens.numel() - 1
    return (
        options.layer_of_pass(),
        options.num_heads,
        _ACTIVATIONS[FUSED_ACTIVATIONS[options.activation]],
        options.eps,
        options.hidden_dropout_p,
        options.attention_dropout_p,
        _seed(options.seed, options.hidden_dropout_p, options.attention_dropout_p),
        _additive(options.bias, batch, options.num_heads),
    )


def _as_served(parameters: list[Tensor]) -> list[Tensor]:
    """Under autocast parameters may have any dtype."""
    return parameters if _serves(*parameters) else [p if p.dtype in CODES else p.float() for p in parameters]


def _encoder(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, options: EncoderOptions, kept: list[Tensor]
) -> Tensor:
    arguments = _encoder_options(options, cu_seqlens)
    shape = (len(arguments[0]) + 1, *hidden.shape) if options.return_all else hidden.shape
    output = hidden.new_empty(shape)
    parameters = _as_served(parameters)
    corrections = None
    if options.quantized:
        packed, corrections = quantized_weights(parameters, options.input_means, arguments[0])
    else:
        packed = packed_weights(parameters, hidden.dtype)
    torch.ops.albert_fast_native.encoder(
        hidden.contiguous(), parameters, packed, cu_seqlens.contiguous(), *arguments, corrections, kept, output
    )
    return output


@_implements("encoder_inference")
def _encoder_inference(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> Tensor:
    kept_memory.release()
    return _encoder(hidden, parameters, cu_seqlens, options, [])


@_implements("encoder")
def _encoder_forward(
    hidden: Tensor, parameters: list[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: EncoderOptions
) -> tuple[Tensor, list[Tensor]]:
    kept = kept_memory.empty(kept_shapes(hidden, parameters, options))
    return _encoder(hidden, parameters, cu_seqlens, options, kept), kept


@_implements("encoder_backward")
def _encoder_backward(
    grad_output: Tensor,
    kept: list[Tensor],
    parameters: list[Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    options: EncoderOptions,
) -> list[Tensor]:
    grad_hidden = grad_output.new_empty(grad_output.shape[-2:])
    gradients = []
    for first in range(0, len(parameters), TENSORS_PER_LAYER):
        gradients += _layer_gradients(parameters[first].shape[0], parameters[first + 10].shape[0])
    served = _as_served(parameters)
    packed = packed_weights(served, grad_output.dtype, transposes=True)
    torch.ops.albert_fast_native.encoder_backward(
        grad_output.contiguous(),
        served,
        packed,
        cu_seqlens.contiguous(),
        *_encoder_options(options, cu_seqlens),
        kept,
        grad_hidden,
        gradients,
    )
    flat = [grad for first in range(0, len(gradients), 12) for grad in _by_parameter(gradients[first : first + 12])]
    return [grad_hidden, *(grad.to(p.dtype) for grad, p in zip(flat, parameters, strict=True))]


def _layer_gradients(width: int, inner: int) -> list[Tensor]:
    """Float32 sums of a layer's gradients, zero, in the order of albert_encoder_layer_gradients: matrices, vectors."""
    matrices = ((3 * width, width), (width, width), (inner, width), (width, inner))
    vectors = (3 * width, width, width, width, inner, width, width, width)
    return [torch.zeros(shape, dtype=torch.float32) for shape in (*matrices, *vectors)]


def _by_parameter(gradients: list[Tensor]) -> list[Tensor]:
    """The same in the order of a layer's parameters, those of query, key and value apart: in memory of their own."""
    qkv, dense, ffn, ffn_output, qkv_bias, dense_bias, attention_norm, attention_norm_bias, *rest = gradients
    ffn_bias, ffn_output_bias, norm, norm_bias = rest
    apart = zip(qkv.chunk(3), qkv_bias.chunk(3), strict=True)
    first = [part.clone() for pair in apart for part in pair]
    first += [dense, dense_bias, attention_norm, attention_norm_bias]
    return [*first, ffn, ffn_bias, ffn_output, ffn_output_bias, norm, norm_bias]


# -------------------------------------------------------------------------------------------------------- a whole model

# What the native operator answers.
_DONE, _UNFIT, _STALE = range(3)


def model(
    batch: PackedBatch,
    inputs: Tensor,
    tables: list[Tensor],
    ends: list[Tensor],
    parameters: list[Tensor],
    options: EncoderOptions,
    embedding_eps: float,
) -> tuple[Tensor, Tensor | None] | None:
    """What `albert_fast.inference.run` says; `ends` are weight and bias of the projection and of the pooler."""
    kept_memory.release()
    width = parameters[0].shape[0]
    output = inputs.new_empty(batch.tokens, width, dtype=parameters[0].dtype)
    pooled = output.new_empty(batch.cu_seqlens.numel() - 1, width) if len(ends) == 4 else None
    passes = options.layer_of_pass()
    for is_known in (True, False):
        weights = model_weights(parameters, ends[::2], options.quantized, options.input_means, passes, is_known)
        answer = torch.ops.albert_fast_native.model(
            inputs,
            batch.position_ids,
            batch.token_type_ids,
            tables,
            ends,
            parameters,
            weights.packed,
            weights.fingerprints,
            batch.cu_seqlens,
            batch.max_seqlen,
            passes,
            options.num_heads,
            _ACTIVATIONS[FUSED_ACTIVATIONS[options.activation]],
            options.eps,
            embedding_eps,
            weights.corrections,
            output,
            pooled,
        )
        if answer == _DONE:
            return output, pooled
        if answer == _UNFIT:
            break
    return None


# ------------------------------------------------------------------------------------------------------------ attention


def _attention_options(options: AttentionOptions, batch: int, heads: int) -> tuple[Any, ...]:
    """From causal to bias, as the native operators take them."""
    seed, bias = _seed(options.seed, options.dropout_p), _additive(options.bias, batch, heads)
    return options.causal, options.dropout_p, seed, options.site, options.scale, bias


@_implements("attention")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    tokens, heads, head_dim = query.shape
    output = query.new_empty(tokens, heads * head_dim)
    logsumexp = query.new_empty(logsumexp_shape(heads, tokens, options.bias), dtype=torch.float32)
    torch.ops.albert_fast_native.attention(
        *map(_rows, (query, key, value)),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        *_attention_options(options, cu_seqlens_q.numel() - 1, heads),
        output,
        logsumexp,
    )
    return output, logsumexp


@_implements("attention_backward")
def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    torch.ops.albert_fast_native.attention_backward(
        grad_output.contiguous(),
        *map(_rows, (query, key, value)),
        output.contiguous(),
        logsumexp.contiguous(),
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        *_attention_options(options, cu_seqlens_q.numel() - 1, query.shape[1]),
        *grads,
    )
    return grads


# ---------------------------------------------------------------------------------------------------- between products


@_implements("dropout_add_layer_norm")
def _dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    if not _serves(bias, residual, weight, ln_bias):
        reference = backends.REFERENCE.load()["dropout_add_layer_norm"]
        return reference(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    cu_seqlens = _dropout_rows(dropout_p, cu_seqlens, x.shape[0])
    torch.ops.albert_fast_native.dropout_add_layer_norm(
        _rows(x), bias, _rows(residual), weight, ln_bias, eps, dropout_p, _seed(seed, dropout_p), site, cu_seqlens, y
    )
    return y


@_implements("dropout_add_layer_norm_backward")
def _dropout_add_layer_norm_backward(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not _serves(bias, residual, weight, ln_bias):
        reference = backends.REFERENCE.load()["dropout_add_layer_norm_backward"]
        return reference(grad_output, x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, cu_seqlens)
    grad_x, grad_residual = x.new_empty(x.shape), residual.new_empty(residual.shape)
    vectors = _floats(bias, weight, ln_bias)
    cu_seqlens = _dropout_rows(dropout_p, cu_seqlens, x.shape[0])
    torch.ops.albert_fast_native.dropout_add_layer_norm_backward(
        grad_output.contiguous(),
        _rows(x),
        bias,
        _rows(residual),
        weight,
        eps,
        dropout_p,
        _seed(seed, dropout_p),
        site,
        cu_seqlens,
        grad_x,
        grad_residual,
        *vectors,
    )
    grad_bias, grad_weight, grad_ln_bias = vectors
    return (
        grad_x,
        grad_bias.to(bias.dtype),
        grad_residual,
        grad_weight.to(weight.dtype),
        grad_ln_bias.to(ln_bias.dtype),
    )


@_implements("bias_gelu")
def _bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    y = x.new_empty(x.shape)
    columns = (-1, x.shape[-1]) if x.shape[-1] else (0, 0)
    torch.ops.albert_fast_native.bias_gelu(
        x.reshape(columns).contiguous(), bias, _ACTIVATIONS[approximate], y.view(columns)
    )
    return y


@_implements("bias_gelu_backward")
def _bias_gelu_backward(grad_output: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    (grad_bias,) = _floats(bias)
    columns = (-1, x.shape[-1]) if x.shape[-1] else (0, 0)
    torch.ops.albert_fast_native.bias_gelu_backward(
        grad_output.reshape(columns).contiguous(),
        x.reshape(columns).contiguous(),
        bias,
        _ACTIVATIONS[approximate],
        grad_x.view(columns),
        grad_bias,
    )
    return grad_x, grad_bias.to(bias.dtype)


# ----------------------------------------------------------------------------------------------------------- embeddings


@_implements("embed_layer_norm")
def _embed_layer_norm(
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
    padding_idx: int | None,
) -> Tensor:
    y = word.new_empty(inputs.shape[0], word.shape[1])
    if y.numel() == 0:
        return y
    cu_seqlens = _dropout_rows(dropout_p, cu_seqlens, inputs.shape[0])
    done = torch.ops.albert_fast_native.embed_layer_norm(
        _rows(inputs),
        position_ids.contiguous(),
        token_type_ids.contiguous(),
        *map(_rows, (word, position, token_type)),
        weight,
        bias,
        eps,
        dropout_p,
        _seed(seed, dropout_p),
        site,
        cu_seqlens,
        y,
    )
    if not done:
        check_all_ids(inputs, position_ids, token_type_ids, word, position, token_type)
        raise RuntimeError("the CPU kernel declined the call, and no id is out of range: please report it")
    return y


@_implements("embed_layer_norm_backward")
def _embed_layer_norm_backward(
    grad_output: Tensor,
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    embeds = inputs.is_floating_point()
    grad_inputs = grad_output.new_empty(inputs.shape if embeds else 0)
    parameters = (word, position, token_type, weight, bias)
    grads = _floats(*parameters)
    if grad_output.numel() > 0:
        torch.ops.albert_fast_native.embed_layer_norm_backward(
            grad_output.contiguous(),
            _rows(inputs),
            position_ids.contiguous(),
            token_type_ids.contiguous(),
            *map(_rows, (word, position, token_type)),
            weight,
            eps,
            dropout_p,
            _seed(seed, dropout_p),
            site,
            _dropout_rows(dropout_p, cu_seqlens, inputs.shape[0]),
            -1 if padding_idx is None else padding_idx,
            grad_inputs,
            *grads,
        )
    grad_word, grad_position, grad_token_type, grad_weight, grad_bias = (
        grad.to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)
    )
    return grad_inputs, grad_word, grad_position, grad_token_type, grad_weight, grad_bias


# ----------------------------------------------------------------------------------------------------------------- loss


@_implements("masked_lm_loss")
def _masked_lm_loss(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    training: bool,
) -> tuple[Tensor, ...]:
    losses, logsumexp = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    correct = x.new_empty(x.shape[0], dtype=torch.bool)
    torch.ops.albert_fast_native.masked_lm_loss(
        _rows(x),
        _rows(table.to(x.dtype)),
        bias.to(x.dtype),
        labels.contiguous(),
        ignore_index,
        label_smoothing,
        z_loss,
        losses,
        logsumexp,
        correct,
    )
    return losses, reduced(losses, labels, ignore_index, reduction), logsumexp, correct, *nothing_kept(x, training)


@_implements("masked_lm_loss_backward")
def _masked_lm_loss_backward(
    grad_loss: Tensor,
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    token_grads: Tensor,
    positions: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = x.new_empty(x.shape)
    grad_table, grad_bias = _floats(table, bias)
    torch.ops.albert_fast_native.masked_lm_loss_backward(
        gradient_of_losses(grad_loss, labels, ignore_index, reduction).contiguous(),
        _rows(x),
        _rows(table.to(x.dtype)),
        bias.to(x.dtype),
        labels.contiguous(),
        logsumexp.contiguous(),
        ignore_index,
        label_smoothing,
        z_loss,
        grad_x,
        grad_table,
        grad_bias,
    )
    return grad_x, grad_table.to(table.dtype), grad_bias.to(bias.dtype)
