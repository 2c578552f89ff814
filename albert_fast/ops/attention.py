"""Attention over packed rows: softmax(Q Kᵀ · scale + bias) V, no padding read or written.

Row r of the batch owns the tokens `cu_seqlens[r]` to `cu_seqlens[r + 1]` and attends to nothing else. Tokens beyond the
last offset belong to no row: their output is zero, and so is their gradient. So is the output of a query that may
attend to no key at all (every score -inf, or a row without keys): never NaN.

Shapes: query [tokens_q, heads, head_dim], key and value [tokens_k, heads, head_dim], output [tokens_q, heads *
head_dim], logsumexp [heads, tokens_q] in float32 (float64 for float64 inputs; -inf where a query has no key). With a
bias, logsumexp is in two parts, [2, heads, tokens_q], both in units of ln 2: the largest score, and the logarithm of
the sum of exp(score - largest). Where all keys of a query have a large negative bias, one number for both would have no
digits left for the second.

Precision: scores and softmax are in float32 at least; in bfloat16 and float16 the probabilities are rounded to the
input's type before the product with V, as in every flash-attention kernel (Dao, arXiv 2307.08691, section 3).
Backward computes the probabilities again from logsumexp.

Dropout (Srivastava et al., applied to the probabilities as in Devlin et al., arXiv 1810.04805) draws the mask of
`albert_fast.ops.dropout`: the same for every backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops.checks import check, check_cu_seqlens, check_tensor, describe, has_no_derivative
from albert_fast.ops.dropout import check_dropout, keep_mask

# ------------------------------------------------------------------------------------------------------- the reference


class AttentionOptions(NamedTuple):
    """What `cross_attention` takes after its tensors and offsets; its docstring explains each."""

    causal: bool = False
    dropout_p: float = 0.0
    seed: Tensor | None = None
    site: int = 0
    scale: float = 1.0
    bias: Tensor | None = None


class _Run(NamedTuple):
    """Neighbouring rows of the same lengths, which PyTorch can treat as one padded batch without padding."""

    first_row: int
    rows: int
    queries: slice
    keys: slice

    def batch(self, x: Tensor, tokens: slice) -> Tensor:
        """[tokens, heads, head_dim] -> [rows, heads, length, head_dim]."""
        return x[tokens].unflatten(0, (self.rows, (tokens.stop - tokens.start) // self.rows)).transpose(1, 2)


def _runs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[_Run]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lengths = [(q[row + 1] - q[row], k[row + 1] - k[row]) for row in range(len(q) - 1)]
    first = 0
    for _, group in groupby(lengths):
        end = first + len(list(group))
        yield _Run(first, end - first, slice(q[first], q[end]), slice(k[first], k[end]))
        first = end


def _additive_mask(run: _Run, query: Tensor, key: Tensor, options: AttentionOptions) -> Tensor | None:
    """What is added to the scores [rows, heads, length_q, length_k] of a run; -inf forbids. None: nothing is added."""
    length_q, length_k = query.shape[2], key.shape[2]
    mask = None
    if options.bias is not None:
        rows = slice(run.first_row, run.first_row + run.rows) if options.bias.shape[0] > 1 else slice(None)
        mask = options.bias[rows, :, :length_q, :length_k]
    if options.causal:
        # The last query sees the last key: what a decoder with a cache of earlier keys needs.
        scores = torch.full((length_q, length_k), float("-inf"), dtype=query.dtype, device=query.device)
        future = scores.triu(length_k - length_q + 1)
        mask = future if mask is None else mask + future
    return mask


def _scores(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[rows, heads, length_q, length_k], in float32 at least."""
    at_least_float32 = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(at_least_float32) @ key.to(at_least_float32).transpose(-1, -2)) * scale
    return scores if mask is None else scores + mask.to(at_least_float32)


def _probabilities(scores: Tensor, masked: bool) -> Tensor:
    if not masked and scores.shape[-1] > 0:
        return scores.softmax(dim=-1)
    nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)


def _logsumexp(scores: Tensor, in_parts: bool) -> Tensor:
    """Of the operator, [length, heads, 1 or 2] of all rows' queries."""
    if not in_parts:
        parts = scores.logsumexp(dim=-1)[..., None]
    elif scores.shape[-1] == 0:
        parts = scores.new_full((*scores.shape[:-1], 2), float("-inf"))
    else:
        largest = scores.amax(dim=-1)
        of_sum = (scores - largest.masked_fill(largest == float("-inf"), 0.0)[..., None]).logsumexp(dim=-1)
        parts = torch.stack([largest, of_sum], dim=-1) / math.log(2)
    return parts.transpose(1, 2).flatten(0, 1)


def _keep(run: _Run, probabilities: Tensor, options: AttentionOptions) -> Tensor:
    """The dropout's factor of each probability [rows, heads, queries, keys]: 0 or 1 / (1 - p)."""
    if options.dropout_p == 0.0:
        return probabilities.new_ones(())
    assert options.seed is not None
    _, heads, queries, keys = probabilities.shape
    rows = torch.arange(run.first_row, run.first_row + run.rows, device=probabilities.device)
    row_and_head = rows[:, None] * heads + torch.arange(heads, device=probabilities.device)
    positions = torch.arange(queries, device=probabilities.device)
    keep = keep_mask(options.seed, options.site, row_and_head[:, :, None], positions, keys, options.dropout_p)
    return keep.to(probabilities.dtype) / (1.0 - options.dropout_p)


def _formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The definition: output, logsumexp, and each run's probabilities after dropout."""
    outputs, logsumexps, weights = [], [], []
    for run in _runs(cu_seqlens_q, cu_seqlens_k):
        q, k, v = run.batch(query, run.queries), run.batch(key, run.keys), run.batch(value, run.keys)
        mask = _additive_mask(run, q, k, options)
        scores = _scores(q, k, options.scale, mask)
        probabilities = _probabilities(scores, mask is not None)
        probabilities = (probabilities * _keep(run, probabilities, options)).to(v.dtype)
        outputs.append((probabilities @ v).transpose(1, 2).flatten(0, 1))
        logsumexps.append(_logsumexp(scores, options.bias is not None))
        weights.append(probabilities)
    empty = _empty_logsumexp(query, options.bias)
    no_key = (empty[None] if options.bias is None else empty).permute(2, 1, 0)
    logsumexp = _join(logsumexps, query.shape[0], no_key, float("-inf")).permute(2, 1, 0)
    return _join(outputs, query.shape[0], query, 0.0).flatten(1), logsumexp.reshape(empty.shape), weights


def _join(parts: list[Tensor], tokens: int, like: Tensor, fill: float) -> Tensor:
    """The runs' outputs [tokens, ...] one after the other, and `fill` for the tokens that belong to no row."""
    missing = tokens - sum(part.shape[0] for part in parts)
    if missing:
        parts = [*parts, like.new_full((missing, *like.shape[1:]), fill)]
    # With nothing of `like` a gradient can be asked for even where there is no row.
    return parts[0] if len(parts) == 1 and not missing else torch.cat([like[:0], *parts])


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Output, and the probabilities after dropout [batch, heads, max_seqlen_q, max_seqlen_k], zero beyond each row."""
    output, _, weights = _formula(query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    padded = [F.pad(w, (0, max_seqlen_k - w.shape[3], 0, max_seqlen_q - w.shape[2])) for w in weights]
    return output, torch.cat(padded)


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> Tensor:
    """The same output; through PyTorch's fused attention, which does not store the probabilities, but with dropout,
    which draws another mask there, and with a bias: its gradients are wrong under a large one."""
    if options.dropout_p > 0.0 or options.bias is not None:
        return _formula(query, key, value, cu_seqlens_q, cu_seqlens_k, options)[0]
    outputs = []
    for run in _runs(cu_seqlens_q, cu_seqlens_k):
        if run.queries.start == run.queries.stop:
            continue
        q, k, v = run.batch(query, run.queries), run.batch(key, run.keys), run.batch(value, run.keys)
        mask = _additive_mask(run, q, k, options)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _join(outputs, query.shape[0], query, 0.0).flatten(1)


# -------------------------------------------------------------------------------------------------------- the operator


@backends.reference("attention")
def reference_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    output, logsumexp, _ = _formula(query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    return output.contiguous(), logsumexp.contiguous()


@backends.reference("attention_backward")
def reference_backward(
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
    """dS = P · (dP - rowsum(dO · O)): what is left of the softmax's Jacobian (Dao et al., arXiv 2205.14135, appendix
    B)."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    grad_output, output = grad_output.view(query.shape), output.view(query.shape)
    for run in _runs(cu_seqlens_q, cu_seqlens_k):
        q, o, grad_o = (run.batch(x, run.queries).to(logsumexp.dtype) for x in (query, output, grad_output))
        k, v = (run.batch(x, run.keys).to(logsumexp.dtype) for x in (key, value))
        mask = _additive_mask(run, q, k, options)
        probabilities = _probabilities(_scores(q, k, options.scale, mask), mask is not None)
        keep = _keep(run, probabilities, options)
        grad_probabilities = (grad_o @ v.transpose(-1, -2)) * keep
        grad_scores = probabilities * (grad_probabilities - (grad_o * o).sum(dim=-1, keepdim=True)) * options.scale
        parts = (
            (run.queries, grad_scores @ k),
            (run.keys, grad_scores.transpose(-1, -2) @ q),
            (run.keys, (probabilities * keep).transpose(-1, -2) @ grad_o),
        )
        for grad, (tokens, part) in zip(grads, parts, strict=True):
            grad[tokens] = part.transpose(1, 2).flatten(0, 1).to(grad.dtype)
    return grads[0], grads[1], grads[2]


def logsumexp_shape(heads: int, tokens_q: int, bias: Tensor | None) -> tuple[int, ...]:
    """In one part, or in the two of a call with a bias."""
    return (heads, tokens_q) if bias is None else (2, heads, tokens_q)


def _empty_logsumexp(query: Tensor, bias: Tensor | None) -> Tensor:
    shape = logsumexp_shape(query.shape[1], query.shape[0], bias)
    return query.new_empty(shape, dtype=torch.promote_types(query.dtype, torch.float32))


def _call(query: Tensor) -> backends.Call:
    return backends.Call("attention", query.device, query.dtype, head_dim=query.shape[-1])


@torch.library.custom_op("albert_fast::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    options = AttentionOptions(causal, dropout_p, seed, site, scale, bias)
    function = backends.implementation("attention", _call(query))
    return function(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)


@_attention_op.register_fake
def _(query, key, value, *args):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[1] * query.shape[2]), _empty_logsumexp(query, args[-1])


@torch.library.custom_op("albert_fast::attention_backward", mutates_args=())
def _attention_backward_op(
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
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = AttentionOptions(causal, dropout_p, seed, site, scale, bias)
    rows = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    function = backends.implementation("attention_backward", _call(query))
    return function(grad_output.contiguous(), query, key, value, output, logsumexp, *rows, options)


@_attention_backward_op.register_fake
def _(grad_output, query, key, value, *args):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens_q, cu_seqlens_k, *ctx.lengths = inputs[:7]
    ctx.causal, ctx.dropout_p, seed, ctx.site, ctx.scale, bias = inputs[7:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, cu_seqlens_q, cu_seqlens_k, seed, bias)


def _autograd(ctx, grad_output, _grad_logsumexp):  # type: ignore[no-untyped-def]
    *tensors, seed, bias = ctx.saved_tensors
    options = (ctx.causal, ctx.dropout_p, seed, ctx.site, ctx.scale, bias)
    return *_attention_backward_op(grad_output, *tensors, *ctx.lengths, *options), *([None] * 10)


_attention_op.register_autograd(_autograd, setup_context=_setup_context)
has_no_derivative(_attention_backward_op)


# ---------------------------------------------------------------------------------------------------- public functions


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of the packed rows of `query` to the packed rows of `key` and `value`.

    Args:
        query: [tokens_q, heads, head_dim], any strides, floating point.
        key, value: [tokens_k, heads, head_dim], any strides, the dtype of query.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], where each row begins; on the device of query.
        max_seqlen_q, max_seqlen_k: upper bounds of the rows' lengths.
        causal: query i of a row sees the keys up to i + length_k - length_q: the last query sees the last key.
        dropout_p: probability of dropping a probability; needs `seed`.
        seed: int64 tensor with one element, on the device.
        site: which dropout of the forward pass this is (see `albert_fast.ops.dropout`).
        scale: of the scores; head_dim ** -0.5 when None.
        bias: added to the scores, [batch or 1, heads or 1, max_seqlen_q, max_seqlen_k], floating point; -inf forbids.
            A mask, not a parameter: it gets no gradient.

    Returns:
        [tokens_q, heads * head_dim], the dtype of query.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; the message names it.
    """
    check_tensor("query", query, (None, None, None))
    check(
        query.is_floating_point(),
        f"query is {describe(query)}; a floating-point tensor was expected",
        TypeError,
    )
    heads, head_dim = query.shape[1:]
    check_tensor("key", key, (None, heads, head_dim), like=query, dtype=query.dtype)
    check_tensor("value", value, (key.shape[0], heads, head_dim), like=query, dtype=query.dtype)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], max_seqlen_q, query)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.shape[0], max_seqlen_k, query)
    check(
        cu_seqlens_q.shape == cu_seqlens_k.shape,
        f"cu_seqlens_q has {cu_seqlens_q.numel()} offsets and cu_seqlens_k {cu_seqlens_k.numel()}; "
        "the same number of rows was expected",
    )
    check_dropout(dropout_p, seed, query.device)
    if bias is not None:
        check_bias(bias, query.device, cu_seqlens_q.numel() - 1, heads, max_seqlen_q, max_seqlen_k)
    scale = head_dim**-0.5 if scale is None else scale
    options = AttentionOptions(causal, dropout_p, seed, site, scale, bias)
    # The reference reads the offsets, which a compiler cannot trace: there, the operator hides it.
    if backends.uses_reference(_call(query)) and not torch.compiler.is_compiling():
        return attention_reference(query, key, value, cu_seqlens_q, cu_seqlens_k, options)
    output, _ = _attention_op(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)
    return output


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Self-attention straight from the fused projection.

    Args:
        qkv: [tokens, 3, heads, head_dim]: query, key and value.
        cu_seqlens, max_seqlen, and the rest: as in `cross_attention`, of which this is a view.

    Returns:
        [tokens, heads * head_dim].
    """
    check_tensor("qkv", qkv, (None, 3, None, None))
    query, key, value = qkv.unbind(1)
    return cross_attention(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        causal=causal,
        dropout_p=dropout_p,
        seed=seed,
        site=site,
        scale=scale,
        bias=bias,
    )


def check_bias(bias: Tensor, device: torch.device, batch: int, heads: int, max_q: int, max_k: int) -> None:
    fits = (
        bias.dim() == 4
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads)
        and bias.shape[2:] == (max_q, max_k)
    )
    check(
        fits,
        f"bias is {describe(bias)}; [{batch} or 1, {heads} or 1, {max_q}, {max_k}] was expected",
    )
    check(
        bias.is_floating_point(),
        f"bias is {describe(bias)}; a floating-point tensor that is added to the scores was expected: turn a boolean "
        "mask into 0 and -inf",
        TypeError,
    )
    check(bias.device == device, f"bias is on {bias.device}; {device} was expected")
    check(
        not (bias.requires_grad and torch.is_grad_enabled()),
        "bias requires a gradient, and attention gives it none: detach it",
    )
