"""The masked-LM loss of the labelled tokens, without a tensor of logits for all of them.

For a labelled token with head output x, logits z = table x + bias over a vocabulary of V, label y and L = logsumexp(z):

    loss = L - (1 - s) z[y] - (s / V) sum(z) + c L²

with s the label smoothing (Szegedy et al., arXiv 1512.00567, section 7) and c the z-loss (Chowdhery et al., arXiv
2204.02311, section 5). Its gradient is dz = (1 + 2 c L) softmax(z) - (1 - s) onehot(y) - s / V.

Shapes: x [tokens, E], table [V, E], bias [V], labels [tokens]; per-token results [tokens], zero where there is no
label, and the loss they are reduced to, a scalar. The reference reads x at the labelled positions only, and holds the
logits of a few hundred of them at a time; backward computes them again, which at E = 128 costs less than it would to
store them.

Precision: logits are in float32 at least once they are summed, and so are losses; the products are in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from albert_fast import backends
from albert_fast.ops import shared_table
from albert_fast.ops.checks import FLOATS, check, check_ids, check_tensor, has_no_derivative, values_can_be_read

REDUCTIONS = ("mean", "sum", "none")
IGNORE_INDEX = -100  # the label of a token that has none, in transformers and PyTorch

# Logits that the reference holds at a time: 64 MB in float32.
_CHUNK_ELEMENTS = 2**24


class MaskedLMStatistics(NamedTuple):
    """Of each token, without gradients; zero (False) where there is no label.

    Attributes:
        loss: [tokens], float32 at least, with smoothing and z-loss.
        logsumexp: [tokens], of the logits.
        correct: bool [tokens], the label has the largest logit (the first of several largest).
        labelled: bool [tokens], the token has a label.
    """

    loss: Tensor
    logsumexp: Tensor
    correct: Tensor
    labelled: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Share of the labelled tokens whose label has the largest logit; 0 without labels."""
        return self.correct.sum() / self.labelled.sum().clamp(min=1)


def _logits(x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    logits = F.linear(x, table, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_losses(
    x: Tensor, table: Tensor, bias: Tensor, labels: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, logsumexp and correct of tokens that all have a label: the formula."""
    logits = _logits(x, table, bias)
    logsumexp = logits.logsumexp(dim=-1)
    target = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    loss = (
        logsumexp
        - (1.0 - label_smoothing) * target
        - label_smoothing * logits.mean(dim=-1)
        + z_loss * logsumexp.square()
    )
    return loss, logsumexp.detach(), logits.argmax(dim=-1) == labels


def _chunks(x: Tensor, table: Tensor, labels: Tensor, ignore_index: int) -> Iterator[Tensor]:
    """Positions of the labelled tokens, a few hundred at a time (at least one chunk, which may be empty)."""
    positions = (labels != ignore_index).nonzero().squeeze(1)
    yield from positions.split(max(1, _CHUNK_ELEMENTS // table.shape[0]))


def masked_lm_loss_reference(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, logsumexp and correct of each token, [tokens]."""

    def run(function: Callable[..., tuple[Tensor, ...]], *args: Tensor | float) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    chunks = list(_chunks(x, table, labels, ignore_index))
    parts = [run(_token_losses, x[c], table, bias, labels[c], label_smoothing, z_loss) for c in chunks]
    positions = torch.cat(chunks)
    loss, logsumexp, correct = (torch.cat(part) for part in zip(*parts, strict=True))
    tokens = x.shape[0]
    return (
        loss.new_zeros(tokens).index_copy(0, positions, loss),
        logsumexp.new_zeros(tokens).index_copy(0, positions, logsumexp),
        correct.new_zeros(tokens).index_copy(0, positions, correct),
    )


def _divisor(labels: Tensor, ignore_index: int) -> Tensor:
    """How many tokens have a label, but 1 where none has: what a mean is divided by."""
    return (labels != ignore_index).sum().clamp(min=1)


def reduced(losses: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum or mean of the tokens' losses [tokens], a scalar; for "none" empty."""
    if reduction == "none":
        return losses.new_empty(0)
    return losses.sum() if reduction == "sum" else losses.sum() / _divisor(labels, ignore_index)


def gradient_of_losses(grad_loss: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The gradient of each token's loss [tokens], from that of what they were reduced to."""
    if reduction == "mean":
        grad_loss = grad_loss / _divisor(labels, ignore_index)
    return grad_loss.expand(labels.shape)


def nothing_kept(x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """token_grads, positions and count of a backend whose backward begins anew."""
    return x.new_empty(0), x.new_empty(0, dtype=torch.int32), x.new_empty(0, dtype=torch.int32)


@backends.reference("masked_lm_loss")
def _forward(
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
    losses, logsumexp, correct = masked_lm_loss_reference(
        x,
        table.to(x.dtype),
        bias.to(x.dtype),
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return losses, reduced(losses, labels, ignore_index, reduction), logsumexp, correct, *nothing_kept(x, training)


@backends.reference("masked_lm_loss_backward")
def _backward(
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
    dtype = logsumexp.dtype
    grad_losses = gradient_of_losses(grad_loss, labels, ignore_index, reduction)
    grad_x = torch.zeros_like(x)
    grad_table, grad_bias = torch.zeros_like(table, dtype=dtype), torch.zeros_like(bias, dtype=dtype)
    wanted = (table.dtype, bias.dtype)
    table, bias = table.to(x.dtype), bias.to(x.dtype)
    for chunk in _chunks(x, table, labels, ignore_index):
        rows, total = x[chunk], logsumexp[chunk].unsqueeze(-1)
        grad = (_logits(rows, table, bias) - total).exp_() * (1.0 + 2.0 * z_loss * total)
        grad -= label_smoothing / table.shape[0]
        target = labels[chunk].unsqueeze(-1)
        grad.scatter_add_(-1, target, torch.full_like(total, label_smoothing - 1.0))
        grad *= grad_losses[chunk].unsqueeze(-1)
        grad_x[chunk] = (grad @ table.to(dtype)).to(x.dtype)
        grad_table.addmm_(grad.t(), rows.to(dtype))
        grad_bias += grad.sum(dim=0)
    return grad_x, grad_table.to(wanted[0]), grad_bias.to(wanted[1])


def _call(x: Tensor) -> backends.Call:
    return backends.Call("masked_lm_loss", x.device, x.dtype)


@torch.library.custom_op("albert_fast::masked_lm_loss", mutates_args=())
def _op(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tokens' losses [tokens], what they are reduced to (a scalar; empty for "none"), logsumexp and correct.

    Then what a backend finds on the way and its backward uses, else empty (`masked_lm_loss_kept` of a backend gives the
    memory): token_grads [tokens, E] while `training`, the gradient of each token's loss with respect to its x;
    positions, int32 [tokens], first those of the labelled tokens; count, int32 [4], first how many they are.
    """
    function = backends.implementation("masked_lm_loss", _call(x))
    return function(x, table, bias, labels, ignore_index, label_smoothing, z_loss, reduction, training)


@_op.register_fake
def _(x, table, bias, labels, ignore_index, label_smoothing, z_loss, reduction, training):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_empty(x.shape[0], dtype=dtype)
    loss = losses.new_empty(0 if reduction == "none" else ())
    kept = backends.choose(_call(x)).load().get("masked_lm_loss_kept", nothing_kept)(x, training)
    return losses, loss, torch.empty_like(losses), torch.empty_like(losses, dtype=torch.bool), *kept


@torch.library.custom_op("albert_fast::masked_lm_loss_backward", mutates_args=())
def _backward_op(
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
    function = backends.implementation("masked_lm_loss_backward", _call(x))
    kept = (logsumexp, token_grads, positions, count)
    return function(grad_loss, x, table, bias, labels, *kept, ignore_index, label_smoothing, z_loss, reduction)


@_backward_op.register_fake
def _(grad_loss, x, table, bias, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(table), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, table, bias, labels, *ctx.options, _ = inputs
    _, _, logsumexp, correct, *kept = output
    ctx.place = 0 if ctx.options[-1] == "none" else 1  # of the output that has a gradient
    ctx.mark_non_differentiable(output[1 - ctx.place], logsumexp, correct, *kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, table, bias, labels, logsumexp, *kept)


def _autograd(ctx, *grads):  # type: ignore[no-untyped-def]
    shared_table.note_dense_gradient(ctx, 1)
    return *_backward_op(grads[ctx.place], *ctx.saved_tensors, *ctx.options), *([None] * 6)


_op.register_autograd(_autograd, setup_context=_setup_context)
has_no_derivative(_backward_op)


def masked_lm_loss(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The masked-LM loss.

    Args:
        x: [tokens, E], the head's output before the word table, floating point.
        table: [V, E], the dtype of x or, under autocast, float32.
        bias: [V], the dtype of table.
        labels: int64 [tokens], in [0, V) or `ignore_index`.
        ignore_index: the label of the tokens that have none.
        label_smoothing: in [0, 1).
        z_loss: factor of logsumexp², at least 0.
        reduction: "mean" over the labelled tokens (0 with zero gradients where there are none), "sum", or "none".

    Returns:
        a scalar, or [tokens] for "none" (zero without a label); float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError, IndexError: an argument does not fit; the message names it.
    """
    return _masked_lm_loss(x, table, bias, labels, ignore_index, label_smoothing, z_loss, reduction)[0]


def masked_lm_loss_with_statistics(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, MaskedLMStatistics]:
    """`masked_lm_loss`, and what was seen on the way: each token's loss, logsumexp and whether its label came first."""
    loss, losses, logsumexp, correct = _masked_lm_loss(
        x, table, bias, labels, ignore_index, label_smoothing, z_loss, reduction
    )
    return loss, MaskedLMStatistics(losses.detach(), logsumexp, correct, labels != ignore_index)


def _masked_lm_loss(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, then each token's, logsumexp and correct; raises where an argument does not fit."""
    check_tensor("x", x, (None, None), dtype=FLOATS)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtypes = FLOATS if autocast else x.dtype
    check_tensor("table", table, (None, x.shape[1]), like=x, dtype=dtypes)
    check_tensor("bias", bias, (table.shape[0],), like=x, dtype=dtypes)
    check_tensor("labels", labels, (x.shape[0],), like=x, dtype=torch.int64)
    check(reduction in REDUCTIONS, f"reduction is {reduction!r}; one of {', '.join(REDUCTIONS)} was expected")
    # Not `check`: a compiler that traces the number as a symbol cannot put it into a message.
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; at least 0 and below 1 was expected")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss is {z_loss}; a factor of at least 0 was expected")
    if values_can_be_read(labels):
        check_ids("labels", labels[labels != ignore_index], table.shape[0], "the word table")
    # How many tokens have labels is not known to a compiler: there, the operator hides it.
    if backends.uses_reference(_call(x)) and not torch.compiler.is_compiling():
        losses, logsumexp, correct = masked_lm_loss_reference(
            x, table, bias, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
        loss = reduced(losses, labels, ignore_index, reduction)
    else:
        if autocast:  # the operator casts the table: its gradient then needs no cast back, and is rounded once
            x = x.to(torch.get_autocast_dtype(x.device.type))
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, table, bias))
        losses, loss, logsumexp, correct, *_ = _op(
            x, table, bias, labels, ignore_index, label_smoothing, z_loss, reduction, training
        )
    return losses if reduction == "none" else loss, losses, logsumexp, correct
