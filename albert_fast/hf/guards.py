"""When an encoder of transformers may be run by this package's kernels, and when it must not.

The kernels read the parameters of a layer by themselves: whatever somebody put in a module's place, hung on it, or
wants to see of it on the way would be passed over in silence. So each call looks, and transformers' own forward serves
where anything is not as transformers made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.albert import modeling_albert

from albert_fast.activations import ACTIVATIONS
from albert_fast.ops.encoder import layer_of_pass

# transformers captures hidden states by hooks of this module, which stay once they were asked for.
CAPTURING = "transformers.utils.output_capturing"


class NotAcceleratedError(RuntimeError):
    """An encoder was accelerated with strict=True, and a call has to take transformers' own path."""


def layers_of(encoder: Any) -> list[Any]:
    """By group, then inner, as `albert_fast.ops.encoder` counts them."""
    return [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]


def parts_of(layer: Any) -> tuple[Any, ...]:
    """The modules with a weight and a bias, in the order of the operation's parameters."""
    attention = layer.attention
    projections = (attention.query, attention.key, attention.value, attention.dense)
    return (*projections, attention.LayerNorm, layer.ffn, layer.ffn_output, layer.full_layer_layer_norm)


def parameters_of(encoder: Any) -> list[Tensor]:
    return [p for layer in layers_of(encoder) for part in parts_of(layer) for p in (part.weight, part.bias)]


# The classes of a layer's modules, by their place.
_CLASSES: dict[str, type[nn.Module]] = {
    "": modeling_albert.AlbertLayer,
    "attention": modeling_albert.AlbertAttention,
    **dict.fromkeys([f"attention.{name}" for name in ("query", "key", "value", "dense")], nn.Linear),
    **dict.fromkeys(("ffn", "ffn_output"), nn.Linear),
    **dict.fromkeys(("attention.LayerNorm", "full_layer_layer_norm"), nn.LayerNorm),
    **dict.fromkeys(("attention.attention_dropout", "attention.output_dropout", "dropout"), nn.Dropout),
}


def refusal(encoder: Any) -> str | None:
    """Why the encoder's modules, as they are now, must run by themselves; None where the kernels may."""
    config = encoder.config
    if config.hidden_act not in ACTIVATIONS:
        return f"the activation {config.hidden_act!r} is not served"
    if config.chunk_size_feed_forward:
        return "chunk_size_feed_forward is set"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    reasons = (_refusal_of_layer(encoder, layer, name) for name, layer in _named_layers(encoder))
    return next((reason for reason in reasons if reason is not None), None) or _differing(encoder)


def _named_layers(encoder: Any) -> Iterator[tuple[str, Any]]:
    for i, group in enumerate(encoder.albert_layer_groups):
        if type(group) is modeling_albert.AlbertLayerGroup and _is_plain(group):
            for j, layer in enumerate(group.albert_layers):
                yield f"albert_layer_groups.{i}.albert_layers.{j}", layer
        else:
            yield f"albert_layer_groups.{i}", group


def _refusal_of_layer(encoder: Any, layer: Any, name: str) -> str | None:
    activation = type(ACT2FN[encoder.config.hidden_act])
    for place, expected in (*_CLASSES.items(), ("activation", activation)):
        where = f"{name}.{place}" if place else name
        try:
            module = layer.get_submodule(place)
        except AttributeError:
            return f"{where} is missing"
        if type(module) is not expected:
            return f"{where} is a {type(module).__name__}, not a {expected.__name__}"
        if not _is_plain(module):
            return f"{where} has hooks, or a forward of its own"
        if module.training != encoder.training:
            return f"{where} is in {'training' if module.training else 'eval'} mode, and the encoder is not"
        if expected in (nn.Linear, nn.LayerNorm):
            for which in ("weight", "bias"):
                parameter = module._parameters.get(which)
                if type(parameter) is not nn.Parameter:
                    return f"{where}.{which} is no plain parameter"
                if parameter.device != layer.attention.query.weight.device:
                    return f"{where}.{which} is on {parameter.device}, and the layer is not"
    return None


def _is_plain(module: nn.Module) -> bool:
    """Nothing that changes, or looks at, what it computes."""
    if "forward" in module.__dict__:
        return False
    hooks = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(len(some) > 0 for some in hooks):
        return False
    return all(hook.__module__ == CAPTURING for hook in module._forward_hooks.values())


def _differing(encoder: Any) -> str | None:
    """What one operation takes for all layers."""
    layers = layers_of(encoder)
    norms = [norm for layer in layers for norm in (layer.attention.LayerNorm, layer.full_layer_layer_norm)]
    found = {
        "LayerNorm's eps": {norm.eps for norm in norms},
        "the attention's dropout": {layer.attention.attention_dropout.p for layer in layers},
        "the hidden dropout": {layer.attention.output_dropout.p for layer in layers},
    }
    config = encoder.config
    if len(layers) != config.num_hidden_groups * config.inner_group_num:
        return f"there are {len(layers)} layers, and the config has another number"
    return next((f"{name} differs from layer to layer" for name, values in found.items() if len(values) > 1), None)


def wants_attentions() -> bool:
    """Whether transformers is to return the attention's probabilities, which the kernels never have."""
    collected = _collector()
    return collected is not None and "attentions" in collected


def wants_hidden_states() -> bool:
    collected = _collector()
    return collected is not None and "hidden_states" in collected


def _collector() -> dict[str, object] | None:
    from transformers.utils import output_capturing

    return output_capturing._active_collector.get()


def show_hidden_states(encoder: Any, states: Tensor) -> None:
    """Hands the input of the first pass and the output of each to transformers' own hooks.

    Args:
        states: [passes + 1, batch, seq, hidden].
    """
    config = encoder.config
    layers = layers_of(encoder)
    order = layer_of_pass(config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num)
    for index, which in enumerate(order):
        layer = layers[which]
        for hook in layer._forward_hooks.values():
            hook(layer, (states[index],), states[index + 1])
