"""When modules of transformers may be run by this package's kernels, and when they must not.

The kernels read the parameters of a module by themselves: whatever somebody put in a part's place, hung on it, or
wants to see of it on the way would be passed over in silence. So each call looks, and transformers' own forward serves
where anything is not as transformers made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.albert import modeling_albert

from albert_fast.activations import ACTIVATIONS
from albert_fast.hf.layer import AlbertLayer
from albert_fast.ops.encoder import layer_of_pass

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

# transformers captures hidden states by hooks of this module, which stay once they were asked for.
CAPTURING = "transformers.utils.output_capturing"

# Their masks, None, 2-D or 4-D, are understood. ("flex_attention" has masks of its own kind.)
IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "albert_fast")


class NotAcceleratedError(RuntimeError):
    """A model was accelerated with strict=True, and a call has to take transformers' own path."""


def layers_of(encoder: Any) -> list[Any]:
    """By group, then inner, as `albert_fast.ops.encoder` counts them."""
    return [layer for group in encoder.albert_layer_groups for layer in group.albert_layers]


def parts_of(layer: Any) -> tuple[Any, ...]:
    """The modules with a weight and a bias, in the order of the operation's parameters."""
    attention = layer.attention
    projections = (attention.query, attention.key, attention.value, attention.dense)
    return (*projections, attention.LayerNorm, layer.ffn, layer.ffn_output, layer.full_layer_layer_norm)


def parameters_of(encoder: Any) -> list[Tensor]:
    """Of an encoder that is not refused."""
    own = [part._parameters for layer in layers_of(encoder) for part in parts_of(layer)]
    return [parameters[name] for parameters in own for name in ("weight", "bias")]


def fields_of(config: Any) -> dict[str, Any]:
    """What the config holds. Every call looks at a dozen of its fields, and an attribute of transformers' takes a
    microsecond."""
    return vars(config)


# ------------------------------------------------------------------------------------- what may stand at each place

Classes = tuple[type[nn.Module], ...]
_LINEAR, _NORM, _EMBEDDING, _DROPOUT = (nn.Linear,), (nn.LayerNorm,), (nn.Embedding,), (nn.Dropout,)
# transformers 4 has a class of its own for sdpa.
_ATTENTION = tuple(
    getattr(modeling_albert, name)
    for name in ("AlbertAttention", "AlbertSdpaAttention")
    if hasattr(modeling_albert, name)
)
_LAYER: dict[str, Classes] = {
    "": (modeling_albert.AlbertLayer, AlbertLayer),
    "attention": _ATTENTION,
    **dict.fromkeys([f"attention.{name}" for name in ("query", "key", "value", "dense")], _LINEAR),
    **dict.fromkeys(("ffn", "ffn_output"), _LINEAR),
    **dict.fromkeys(("attention.LayerNorm", "full_layer_layer_norm"), _NORM),
    **dict.fromkeys(("attention.attention_dropout", "attention.output_dropout", "dropout"), _DROPOUT),
}
_PROJECTION: dict[str, Classes] = {"embedding_hidden_mapping_in": _LINEAR}
_EMBEDDINGS: dict[str, Classes] = {
    **dict.fromkeys(("word_embeddings", "position_embeddings", "token_type_embeddings"), _EMBEDDING),
    "LayerNorm": _NORM,
    "dropout": _DROPOUT,
}
# torch.export shows parameters as the second.
_PLAIN = (nn.Parameter, torch._subclasses.FakeTensor)
_PARAMETERS: dict[Classes, tuple[str, ...]] = {
    _LINEAR: ("weight", "bias"),
    _NORM: ("weight", "bias"),
    _EMBEDDING: ("weight",),
}
_MLM_HEAD: dict[str, Classes] = {"dense": _LINEAR, "LayerNorm": _NORM, "decoder": _LINEAR}


def refusal(encoder: Any) -> str | None:
    """Why the encoder's modules, as they are now, must run by themselves; None where the kernels may."""
    config = fields_of(encoder.config)
    activation = config["hidden_act"]
    if activation not in ACTIVATIONS:
        return f"the activation {activation!r} is not served"
    if config["chunk_size_feed_forward"]:
        return "chunk_size_feed_forward is set"
    classes = {**_LAYER, "activation": (type(ACT2FN[activation]),)}
    owners = [(encoder, _PROJECTION, ""), *((layer, classes, name) for name, layer in _named_layers(encoder))]
    found = (_refusal_of_parts(owner, places, encoder.training, name) for owner, places, name in owners)
    return _refusal_of_context() or _first(found) or _differing(encoder)


def refusal_of_embeddings(embeddings: Any) -> str | None:
    """The same for an AlbertEmbeddings."""
    if getattr(embeddings, "position_embedding_type", "absolute") != "absolute":
        return "the positions are not absolute"
    tables = [embeddings._modules.get(name) for name in _EMBEDDINGS if name.endswith("_embeddings")]
    if any(
        getattr(t, "max_norm", None) or getattr(t, "scale_grad_by_freq", 0) or getattr(t, "sparse", 0) for t in tables
    ):
        return "a table of embeddings has max_norm, scale_grad_by_freq or sparse"
    return _refusal_of_context() or _refusal_of_parts(embeddings, _EMBEDDINGS, embeddings.training, casts=False)


def refusal_of_mlm_head(head: Any) -> str | None:
    """The same for an AlbertMLMHead. Its activation is called as it is, whatever it is."""
    if not _is_plain(head.activation):
        return "activation has hooks, or a forward of its own"
    return _refusal_of_context() or _refusal_of_parts(head, _MLM_HEAD, head.training)


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _refusal_of_context() -> str | None:
    if torch.onnx.is_in_onnx_export():
        return "an export to ONNX, which has no such operator"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace, which cannot record the operators"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation, which the operators do not have"
    return None


def _named_layers(encoder: Any) -> Iterator[tuple[str, Any]]:
    for i, group in enumerate(encoder.albert_layer_groups):
        if type(group) is modeling_albert.AlbertLayerGroup and _is_plain(group):
            for j, layer in enumerate(group.albert_layers):
                yield f"albert_layer_groups.{i}.albert_layers.{j}", layer
        else:
            yield f"albert_layer_groups.{i}", group


def _refusal_of_parts(
    owner: Any, classes: dict[str, Classes], training: bool, name: str = "", casts: bool = True
) -> str | None:
    """casts: whether the operation takes parameters of several dtypes under autocast."""
    first = None
    for place, expected in classes.items():
        module = _part(owner, place)
        reason = _refusal_of_module(module, expected, training)
        if reason is None:
            for which in _PARAMETERS.get(expected, ()):
                parameter = module._parameters.get(which)
                if type(parameter) not in _PLAIN:
                    reason = f".{which} is no plain parameter"
                    break
                first = parameter if first is None else first
                if parameter.device != first.device:
                    reason = f".{which} is on {parameter.device}, and the parameters before it on {first.device}"
                    break
                if parameter.dtype != first.dtype and not (casts and _is_autocast(first)):
                    reason = f".{which} is {_dtype(parameter)}, and the parameters before it are {_dtype(first)}"
                    break
        if reason is not None:
            return ".".join(part for part in (name, place) if part) + reason
    return None


def _is_autocast(parameter: Tensor) -> bool:
    return torch.is_autocast_enabled(parameter.device.type)


def _dtype(parameter: Tensor) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def _part(owner: Any, place: str) -> Any:
    """The module at `place`, or None. Every call looks at every part: `get_submodule` takes four times as long."""
    for name in place.split(".") if place else ():
        owner = None if owner is None else owner._modules.get(name)
    return owner


def _refusal_of_module(module: Any, expected: Classes, training: bool) -> str | None:
    """What follows the module's name in the reason."""
    if module is None:
        return " is missing"
    if type(module) not in expected:
        return f" is a {_name(type(module), expected[-1])}, not a {_name(expected[-1], type(module))}"
    if not _is_plain(module):
        return " has hooks, or a forward of its own"
    if module.training != training:
        return f" is in {'training' if module.training else 'eval'} mode, and the module around it is not"
    return None


def _name(of: type, beside: type) -> str:
    """A class's name, with its module where the other one is called the same."""
    return of.__name__ if of.__name__ != beside.__name__ else f"{of.__module__}.{of.__name__}"


def _is_plain(module: nn.Module) -> bool:
    """Nothing that changes, or looks at, what it computes."""
    if "forward" in module.__dict__:
        return False
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = module._forward_hooks
    return not hooks or all(hook.__module__ == CAPTURING for hook in hooks.values())


def _differing(encoder: Any) -> str | None:
    """What one operation takes for all layers."""
    layers = layers_of(encoder)
    projection = encoder.embedding_hidden_mapping_in.weight
    norms = [norm for layer in layers for norm in (layer.attention.LayerNorm, layer.full_layer_layer_norm)]
    found = {
        "the feed-forward's width": {len(layer.ffn.weight) for layer in layers},
        "LayerNorm's eps": {norm.eps for norm in norms},
        "the attention's dropout": {layer.attention.attention_dropout.p for layer in layers},
        "the hidden dropout": {layer.attention.output_dropout.p for layer in layers},
    }
    config = fields_of(encoder.config)
    groups, depth = config["num_hidden_groups"], config["num_hidden_layers"]
    if len(layers) != groups * config["inner_group_num"]:
        return f"there are {len(layers)} layers, and the config has another number"
    if not layers or depth < groups:
        return f"num_hidden_layers is {depth}, in {groups} groups of {config['inner_group_num']}: one each is needed"
    if not _is_autocast(projection):
        found["the dtype"] = {projection.dtype, *(layer.ffn.weight.dtype for layer in layers)}
    # transformers 4 prunes heads, and knows of positions that are not absolute.
    if any(layer.attention.num_attention_heads != config["num_attention_heads"] for layer in layers):
        return "heads were pruned"
    if any(getattr(layer.attention, "position_embedding_type", "absolute") != "absolute" for layer in layers):
        return "the positions are not absolute"
    return next((f"{name} differs from layer to layer" for name, values in found.items() if len(values) > 1), None)


# ------------------------------------------------------------------------ what is wanted of a call beside the output


def wants_attentions(kwargs: dict[str, Any]) -> bool:
    """Whether transformers is to return the attention's probabilities, which the kernels never have."""
    return _wants("attentions", kwargs)


def wants_hidden_states(kwargs: dict[str, Any]) -> bool:
    return _wants("hidden_states", kwargs)


def _wants(what: str, kwargs: dict[str, Any]) -> bool:
    if not TRANSFORMERS_5:
        return bool(kwargs.get(f"output_{what}"))
    from transformers.utils import output_capturing

    collected = output_capturing._active_collector.get()
    return collected is not None and what in collected


def show_hidden_states(encoder: Any, states: list[Tensor]) -> None:
    """Hands the input of the first pass and the output of each to transformers' own hooks.

    Args:
        states: passes + 1 tensors [batch, seq, hidden].
    """
    config = encoder.config
    layers = layers_of(encoder)
    order = layer_of_pass(config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num)
    for index, which in enumerate(order):
        layer = layers[which]
        for hook in layer._forward_hooks.values():
            hook(layer, (states[index],), states[index + 1])
