"""`accelerate`, its undoing, and what it does to a call."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.models.albert import modeling_albert

from albert_fast.hf import guards
from albert_fast.hf.encoder import AlbertTransformer, Options, watcher
from albert_fast.ops.checks import check
from albert_fast.ops.encoder import RECOMPUTE

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, unpad: str | bool = "auto", recompute: str = "none", strict: bool = False) -> Model:
    """Makes the ALBERT encoders of transformers inside a model fast, in place.

    Only the encoders (`AlbertTransformer`) change, and nothing that can be seen of them: parameters and their names,
    `state_dict`, hooks, tied weights, `deepcopy` and `pickle` stay. A call that the kernels must not serve (LoRA or
    other modules in a layer's place, hooks, attentions wanted, a mask that is more than padding, …) is transformers'
    own; `explain` says which.

    Hidden states at padded positions are zeros, where transformers computes values that mean nothing.

    Args:
        model: any module with encoders of transformers' ALBERT inside: a head, a subclass, a net around it.
        unpad: "auto" leaves out padding. False computes it, as transformers does.
        recompute: what backward computes again instead of keeping it: "none", "ffn" or "layer" (see
            `albert_fast.ops.encoder`).
        strict: raises NotAcceleratedError where transformers would have to serve a call.

    Returns:
        `model` itself.

    Raises:
        ValueError: there is no such encoder inside, or an argument is none of those above.
    """
    check(unpad in ("auto", False), f"unpad is {unpad!r}; 'auto' or False was expected")
    check(recompute in RECOMPUTE, f"recompute is {recompute!r}; one of {', '.join(RECOMPUTE)} was expected")
    classes = (modeling_albert.AlbertTransformer, AlbertTransformer)
    encoders: list[Any] = [module for module in model.modules() if type(module) in classes]
    check(
        bool(encoders),
        f"model, a {type(model).__name__}, has no AlbertTransformer of transformers inside; an ALBERT was expected",
    )
    for encoder in encoders:
        encoder.__class__ = AlbertTransformer
        encoder._albert_fast = Options(unpad, recompute, strict)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: the encoders are transformers' own again.

    Returns:
        `model` itself. One that was not accelerated stays as it is.
    """
    encoders: list[Any] = [module for module in model.modules() if type(module) is AlbertTransformer]
    for encoder in encoders:
        del encoder._albert_fast
        encoder.__class__ = modeling_albert.AlbertTransformer
    return model


class Path(NamedTuple):
    """What became of one call of an encoder.

    Attributes:
        encoder: its name in the model.
        refusal: why transformers' own forward served; None where the kernels did.
    """

    encoder: str
    refusal: str | None


def explain(model: nn.Module, **inputs: Any) -> list[Path]:
    """Which path each encoder takes, and if not the fast one, why.

    Args:
        model: with accelerated encoders inside.
        inputs: those of a call, which is made, without gradients. None: what is seen without one.

    Returns:
        A Path for each call of an encoder, in their order; encoders that were not accelerated come first.
    """
    names = {module: name for name, module in model.named_modules()}
    stock = [module for module in names if type(module) is modeling_albert.AlbertTransformer]
    paths = [Path(names[module], "it was not accelerated: albert_fast.hf.accelerate(model)") for module in stock]
    if not inputs:
        fast = [module for module in names if type(module) is AlbertTransformer]
        return paths + [Path(names[module], guards.refusal(module)) for module in fast]
    seen: list[tuple[nn.Module, str | None]] = []
    token = watcher.set(seen)
    try:
        with torch.no_grad():
            model(**inputs)
    except guards.NotAcceleratedError:
        pass  # it is among what was seen
    finally:
        watcher.reset(token)
    return paths + [Path(names[module], reason) for module, reason in seen]
