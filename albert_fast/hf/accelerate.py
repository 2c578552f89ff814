"""`accelerate`, its undoing, and what it does to a call."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.models.albert import modeling_albert

from albert_fast.hf import guards
from albert_fast.hf.embeddings import AlbertEmbeddings
from albert_fast.hf.encoder import AlbertTransformer, Options, watcher
from albert_fast.hf.guards import TRANSFORMERS_5
from albert_fast.hf.heads import AlbertMLMHead, surround
from albert_fast.hf.layer import AlbertLayer
from albert_fast.ops.checks import check
from albert_fast.ops.encoder import RECOMPUTE

Model = TypeVar("Model", bound=nn.Module)

# What each is, transformers' class, and the one that takes its place.
_CLASSES: tuple[tuple[str, type[nn.Module], type[nn.Module]], ...] = (
    ("encoder", modeling_albert.AlbertTransformer, AlbertTransformer),
    ("layer", modeling_albert.AlbertLayer, AlbertLayer),
    ("embeddings", modeling_albert.AlbertEmbeddings, AlbertEmbeddings),
    ("masked-LM head", modeling_albert.AlbertMLMHead, AlbertMLMHead),
)


def accelerate(
    model: Model,
    *,
    unpad: str | bool = "auto",
    skip_logits: bool = False,
    recompute: str = "none",
    strict: bool = False,
) -> Model:
    """Makes the ALBERT encoders of transformers inside a model fast, in place.

    Encoders, layers, embeddings and masked-LM heads change, and nothing that can be seen of them: the models' own
    classes, parameters and their names, `state_dict`, hooks, tied weights, `deepcopy` and `pickle` stay. A call that
    the kernels must not serve (LoRA or other modules in a layer's place, hooks, attentions wanted, a mask that is more
    than padding, an export to ONNX, …) runs through transformers' own layers; `explain` says which.

    What differs from transformers, on purpose:

    - Hidden states and masked-LM logits at padded positions are zeros, where transformers computes values that mean
      nothing; labels there do not count, and an answer's logits are the least number there is.
    - The masked-LM loss is computed from the labelled positions, and 0 where there are none (transformers: NaN); so is
      that of answers from the rows that have one outside the padding.
    - `num_items_in_batch` is honoured by every loss (transformers 5; 4 does not have it): Trainer with gradient
      accumulation gives the gradient of the large batch.
    - `model.gradient_checkpointing_enable()` works, and keeps one hidden state a pass.

    Args:
        model: any module with encoders of transformers' ALBERT inside: a head, a subclass, a net around it.
        unpad: "auto" leaves out padding. False computes it, as transformers does.
        skip_logits: with labels, a masked-LM model returns the loss without logits, and they are never computed.
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
    modules = list(model.modules())
    has = {name: any(type(module) in classes for module in modules) for name, *classes in _CLASSES}
    check(
        has["encoder"],
        f"model, a {type(model).__name__}, has no AlbertTransformer of transformers inside; an ALBERT was expected",
    )
    check(
        not skip_logits or (TRANSFORMERS_5 and has["masked-LM head"]),
        f"skip_logits is True, and model, a {type(model).__name__}, has no masked-LM head inside whose logits could be "
        "skipped, or transformers is older than 5: leave it out",
    )
    options = Options(unpad, skip_logits, recompute, strict)
    for module in modules:
        for _, stock, fast in _CLASSES:
            if type(module) in (stock, fast):
                module.__class__ = fast
                module._albert_fast = options  # type: ignore[assignment]
        _remove_hooks(module)
        if isinstance(module, modeling_albert.AlbertPreTrainedModel) and not module.supports_gradient_checkpointing:
            module.supports_gradient_checkpointing = True
        if hooks := surround(module, unpad):
            module._albert_fast_hooks = hooks  # type: ignore[assignment]
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: everything inside is transformers' own again.

    Returns:
        `model` itself. One that was not accelerated stays as it is.
    """
    for module in model.modules():
        for _, stock, fast in _CLASSES:
            if type(module) is fast:
                module.__class__ = stock
                for name in ("_albert_fast", "gradient_checkpointing", "_gradient_checkpointing_func"):
                    module.__dict__.pop(name, None)
        _remove_hooks(module)
        if isinstance(module, modeling_albert.AlbertPreTrainedModel):
            module.__dict__.pop("supports_gradient_checkpointing", None)
    return model


def _remove_hooks(module: nn.Module) -> None:
    for handle in module.__dict__.pop("_albert_fast_hooks", ()):
        handle.remove()


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
