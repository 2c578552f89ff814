"""LayerNorm(word + token type + position) and dropout: what comes before the E -> H projection (ALBERT, arXiv
1909.11942, section 3.1: the embeddings have their own, smaller size E).

Shapes: ids [tokens], or word vectors [tokens, E] in their place; tables [V, E], [P, E], [T, E]; output [tokens, E].

Precision: the sum and the output are in the tables' dtype, mean and variance in float32 at least.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops import shared_table
from albert_fast.ops.checks import FLOATS, check, check_cu_seqlens, check_ids, check_tensor, describe, has_no_derivative
from albert_fast.ops.dropout import check_dropout, dropout
from albert_fast.ops.dropout_add_layer_norm import layer_norm_backward


def _summed(
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    padding_idx: int | None,
) -> Tensor:
    words = inputs if inputs.is_floating_point() else F.embedding(inputs, word, padding_idx)
    return words + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)


def embed_layer_norm_reference(
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    cu_seqlens: Tensor | None,
    padding_idx: int | None,
) -> Tensor:
    summed = _summed(inputs, position_ids, token_type_ids, word, position, token_type, padding_idx)
    normed = F.layer_norm(summed, weight.shape, weight, bias, eps)
    return dropout(normed, dropout_p, seed, site, cu_seqlens)


@backends.reference("embed_layer_norm")
def _forward(
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
    return embed_layer_norm_reference(
        inputs,
        position_ids,
        token_type_ids,
        word,
        position,
        token_type,
        weight,
        bias,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        cu_seqlens=cu_seqlens,
        padding_idx=padding_idx,
    )


@backends.reference("embed_layer_norm_backward")
def _backward(
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
    summed = _summed(inputs, position_ids, token_type_ids, word, position, token_type, padding_idx)
    grad_normed = dropout(grad_output, dropout_p, seed, site, cu_seqlens)
    grad, grad_weight, grad_bias = layer_norm_backward(grad_normed, summed, weight, bias, eps)

    def rows(ids: Tensor, table: Tensor, padding: int | None = None) -> Tensor:
        sums = torch.zeros_like(table).index_add_(0, ids, grad)
        if padding is not None:
            sums[padding] = 0
        return sums

    embeds = inputs.is_floating_point()
    return (
        grad if embeds else grad.new_empty(0),
        torch.zeros_like(word) if embeds else rows(inputs, word, padding_idx),
        rows(position_ids, position),
        rows(token_type_ids, token_type),
        grad_weight,
        grad_bias,
    )


def check_all_ids(
    inputs: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor, token_type: Tensor
) -> None:
    """Raises IndexError unless every id is a row of its table."""
    if not inputs.is_floating_point():
        check_ids("input_ids", inputs, word.shape[0], "the word table")
    check_ids("position_ids", position_ids, position.shape[0], "its table")
    check_ids("token_type_ids", token_type_ids, token_type.shape[0], "its table")


def _call(word: Tensor) -> backends.Call:
    return backends.Call("embed_layer_norm", word.device, word.dtype)


@torch.library.custom_op("albert_fast::embed_layer_norm", mutates_args=())
def _op(
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
    function = backends.implementation("embed_layer_norm", _call(word))
    tensors = (inputs, position_ids, token_type_ids, word, position, token_type, weight, bias)
    return function(*tensors, eps, dropout_p, seed, site, cu_seqlens, padding_idx)


@_op.register_fake
def _(inputs, position_ids, token_type_ids, word, *args):  # type: ignore[no-untyped-def]
    return word.new_empty(inputs.shape[0], word.shape[1])


@torch.library.custom_op("albert_fast::embed_layer_norm_backward", mutates_args=())
def _backward_op(
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
    function = backends.implementation("embed_layer_norm_backward", _call(word))
    tensors = (inputs, position_ids, token_type_ids, word, position, token_type, weight, bias)
    return function(grad_output.contiguous(), *tensors, eps, dropout_p, seed, site, cu_seqlens, padding_idx)


@_backward_op.register_fake
def _(grad_output, inputs, position_ids, token_type_ids, *tensors):  # type: ignore[no-untyped-def]
    embeds = inputs if inputs.is_floating_point() else grad_output.new_empty(0)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (embeds, *tensors[:5]))


@torch.library.custom_op("albert_fast::embed_layer_norm_backward_sparse", mutates_args=())
def _sparse_backward_op(
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
    """The same, with the gradient of `word` as ids [tokens], sorted, and rows [tokens, E]: of several rows with one id
    all but the first are zero."""
    function = backends.implementation("embed_layer_norm_backward_sparse", _call(word))
    tensors = (inputs, position_ids, token_type_ids, word, position, token_type, weight, bias)
    return function(grad_output.contiguous(), *tensors, eps, dropout_p, seed, site, cu_seqlens, padding_idx)


@_sparse_backward_op.register_fake
def _(grad_output, inputs, position_ids, token_type_ids, word, *tensors):  # type: ignore[no-untyped-def]
    rows = torch.empty_like(inputs), word.new_empty(grad_output.shape)
    return *rows, *(tensor.new_empty(tensor.shape) for tensor in tensors[:4])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.eps, ctx.dropout_p, seed, ctx.site, cu_seqlens, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors, seed, cu_seqlens)


def _autograd(ctx, grad_output):  # type: ignore[no-untyped-def]
    *tensors, seed, cu_seqlens = ctx.saved_tensors
    options = (ctx.eps, ctx.dropout_p, seed, ctx.site, cu_seqlens, ctx.padding_idx)
    inputs, word = tensors[0], tensors[3]
    offered = backends.choose(_call(word)).load()
    has_sparse = "embed_layer_norm_backward_sparse" in offered and not inputs.is_floating_point()
    if has_sparse and shared_table.has_dense_gradient(ctx, 3):
        ids, rows, *grads = _sparse_backward_op(grad_output, *tensors, *options)
        grad_word = torch.sparse_coo_tensor(ids[None], rows, word.shape, check_invariants=False)
        return None, None, None, grad_word, *grads, *([None] * 6)
    grad_inputs, *grads = _backward_op(grad_output, *tensors, *options)
    return grad_inputs if inputs.is_floating_point() else None, None, None, *grads, *([None] * 6)


_op.register_autograd(_autograd, setup_context=_setup_context)
has_no_derivative(_backward_op)
has_no_derivative(_sparse_backward_op)


def embed_layer_norm(
    inputs: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    cu_seqlens: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """dropout(LayerNorm(words + token types + positions)).

    Args:
        inputs: int64 [tokens], rows of `word`; or [tokens, E] in the tables' dtype, used in place of such rows.
        position_ids, token_type_ids: int64 [tokens], rows of `position` and `token_type`.
        word, position, token_type: [V, E], [P, E], [T, E], of one floating dtype.
        weight, bias: [E], of the same dtype.
        eps: added to the variance; ALBERT uses 1e-12.
        dropout_p, seed, site, cu_seqlens: as in `dropout_add_layer_norm`.
        padding_idx: the row of `word` that gets no gradient.

    Returns:
        [tokens, E], the tables' dtype.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit, or an id is beyond its table; the message names it.
    """
    check_tensor("word", word, (None, None), dtype=FLOATS)
    embedding_size = word.shape[1]
    if inputs.is_floating_point():
        check_tensor("inputs_embeds", inputs, (None, embedding_size), like=word, dtype=word.dtype)
    else:
        check_tensor("input_ids", inputs, (None,), like=word, dtype=(torch.int64, torch.int32))
    tables = (("position_ids", position_ids, position), ("token_type_ids", token_type_ids, token_type))
    for name, ids, table in tables:
        check_tensor(name, ids, (inputs.shape[0],), like=word, dtype=(torch.int64, torch.int32))
        check_tensor(f"the table of {name}", table, (None, embedding_size), like=word, dtype=word.dtype)
    for name, vector in (("weight", weight), ("bias", bias)):
        check_tensor(name, vector, (embedding_size,), like=word, dtype=word.dtype)
    check(
        padding_idx is None or 0 <= padding_idx < word.shape[0],
        lambda: f"padding_idx is {padding_idx}; None or a row of word ({describe(word)}) was expected",
    )
    check_dropout(dropout_p, seed, word.device)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, inputs.shape[0], inputs.shape[0], word)
    tensors = (inputs, position_ids, token_type_ids, word, position, token_type, weight, bias)
    serving = backends.choose(_call(word))
    if serving is not backends.CPU:  # whose kernel looks at the ids on its way
        check_all_ids(*tensors[:6])
    if serving is backends.REFERENCE:
        return embed_layer_norm_reference(
            *tensors,
            eps=eps,
            dropout_p=dropout_p,
            seed=seed,
            site=site,
            cu_seqlens=cu_seqlens,
            padding_idx=padding_idx,
        )
    options = (eps, dropout_p, seed, site, cu_seqlens, padding_idx)
    training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    plain = type(inputs) is Tensor and type(word) in (Tensor, torch.nn.Parameter)
    if training or torch.compiler.is_compiling() or not plain:
        return _op(*tensors, *options)
    # Without the operator, which would cost another 40 microseconds.
    return serving.load()["embed_layer_norm"](*tensors, *options)
