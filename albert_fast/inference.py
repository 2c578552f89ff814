"""Inference on a CPU in one native call: embeddings, their projection, all passes and the pooler.

By the time that the weights of a call have passed through the caches, the code of Python and PyTorch has left them:
each operation by itself then takes 30 to 150 microseconds, and those around the passes of 16 tokens took a quarter of
the time in int8. So what is asked for most goes by one operation, which looks at its tensors itself.

It is for plain modules and plain calls. Whatever is otherwise (a hook, a replaced module, a gradient, autocast, a
tensor that does not fit) is not served here: the functions return None, and the operations of `albert_fast.ops`, one by
one, do the work or say what is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from albert_fast import backends
from albert_fast.ops.encoder import EncoderOptions
from albert_fast.packing import PackedBatch


class Tables(NamedTuple):
    """Of the embeddings: [V, E], [P, E], [T, E], and [E] twice."""

    word: Tensor
    position: Tensor
    token_type: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def is_plain(module: nn.Module | None, expected: type[nn.Module]) -> bool:
    """Whether calling the module would do what its class says, and nothing else."""
    return type(module) is expected and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def run(
    batch: PackedBatch,
    embedded: Tensor | None,
    tables: Tables | None,
    projection: nn.Module,
    parameters: list[Tensor],
    pooler: nn.Module | None,
    options: EncoderOptions,
    embedding_eps: float = 0.0,
) -> tuple[Tensor, Tensor | None] | None:
    """
    Args:
        batch: where the rows are and, with `tables`, their ids.
        embedded: [tokens, E], in place of what `tables` give.
        tables: of the embeddings; None with `embedded`.
        projection: from E to the hidden size.
        parameters, options: of `albert_fast.ops.encoder`.
        pooler: of the rows' first tokens, before its tanh; or None.
        embedding_eps: of the LayerNorm of the embeddings.

    Returns:
        the last states [tokens, hidden] and what the pooler gives [batch, hidden], or None where there is none; or None
        where the call is not served.
    """
    ends = _ends(projection, pooler)
    if ends is None or options.bias is not None or options.return_all or not _is_plain_call():
        return None
    if options.hidden_dropout_p or options.attention_dropout_p:
        return None
    inputs = embedded if tables is None else batch.input_ids
    if inputs is None:
        return None
    tensors = (inputs, *ends, *parameters, *(tables or ()))
    if not all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu for tensor in tensors):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    weight, heads = parameters[0], options.num_heads
    call = backends.Call(
        "encoder", weight.device, weight.dtype, len(weight) // heads, options.activation, quantized=options.quantized
    )
    if backends.choose(call) is not backends.CPU:
        return None
    from albert_fast import cpu  # not before it serves

    return cpu.model(batch, inputs, list(tables or ()), ends, parameters, options, embedding_eps)


def _ends(projection: nn.Module, pooler: nn.Module | None) -> list[Tensor] | None:
    """Weight and bias of the projection and of the pooler."""
    found: list[Tensor] = []
    for module in (projection, pooler):
        if module is None:
            continue
        if not is_plain(module, nn.Linear):
            return None
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        if weight is None or bias is None:
            return None
        found += [weight, bias]
    return found


def _is_plain_call() -> bool:
    """Nothing that compiles, traces, transforms, casts or watches."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or modules._has_any_global_hook()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    )
