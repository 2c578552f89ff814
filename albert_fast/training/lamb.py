"""LAMB exactly as ALBERT was trained with (google-research/albert, lamb_optimizer.py), and Google's AdamW beside it.

For each tensor w with gradient g, in this order:

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g²
    u = m / (sqrt(v) + eps) + weight_decay w
    w = w - lr ratio u,    ratio = |w| / |u|, or 1 where either norm is 0

There is no bias correction, the decay enters the norm, and the ratio is not clamped: other LAMBs differ in each of the
three. LayerNorms and biases are neither decayed nor adapted (`parameter_groups`). A matrix that all layers share is one
tensor and has one ratio. Clipping the gradients (Google's global norm is 1.0) is the training loop's work.

    optimizer = Lamb(parameter_groups(model, weight_decay=0.01), lr=1.76e-3)
    adamw = Lamb(parameter_groups(model, weight_decay=0.01), lr=1e-4, adapt=False)

The state is float32 (float64 for float64 weights), whatever the parameter's dtype. Weights in bfloat16 are computed in
float32 and rounded once a step, so that changes below 2^-9 of a weight are lost: train float32 weights under autocast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from albert_fast.ops.checks import check
from albert_fast.training.sharded import like, local, norms

# Google's regular expressions, searched in the whole name: transformers' `full_layer_layer_norm` is one of them.
_EXCLUDED = re.compile("LayerNorm|layer_norm|bias")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Google's two groups: parameters that are decayed and adapted, and those that are neither.

    The second has LayerNorms, by the module's type or the parameter's name, and biases. Embeddings are in the first. A
    parameter with several names is taken once, one that needs no gradient not at all; either group may be empty.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[Tensor] = []
    excluded: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            alone = id(parameter) in norms or _EXCLUDED.search(name) is not None
            (excluded if alone else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": excluded, "weight_decay": 0.0, "adapt": False},
    ]


class Lamb(torch.optim.Optimizer):
    """LAMB as this module's docstring has it.

    Args:
        params: tensors, or groups such as `parameter_groups` gives.
        lr: a float, or a tensor of one number on the parameters' device, which a CUDA graph reads at each replay (and
            counts no steps, so that bias_correction is not for graphs).
        betas: decay rates of the two moments.
        eps: added to sqrt(v).
        weight_decay: times the weight, added to the update before the norm.
        bias_correction: divides m by 1 - b1^t and v by 1 - b2^t, as the LAMB paper does (arXiv 1904.00962) and Google
            does not. t is the number of the tensor's own steps.
        adapt: multiplies by |w| / |u|. False gives AdamW without bias correction, Google's second optimizer.

    Parameters may be DTensors (FSDP2, tensor parallelism): the norms are those of the whole tensor, by two
    small all-reduces for all tensors of a group. The same parameters must have gradients on all ranks.

    Raises:
        ValueError: a number out of its range, or parameters or gradients that are not dense and real.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1.76e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = False,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]  # with the defaults filled in
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor):
            check(lr.numel() == 1, f"lr is a tensor of shape {list(lr.shape)}; one number was expected")
        else:
            check(lr >= 0, f"lr is {lr}; a number of at least 0 was expected")
        check(
            len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
            f"betas is {betas}; two numbers in [0, 1) were expected",
        )
        for name in ("eps", "weight_decay"):
            check(group[name] >= 0, f"{name} is {group[name]}; a number of at least 0 was expected")
        for parameter in group["params"]:
            check(
                parameter.is_floating_point() and parameter.layout == torch.strided,
                f"params has a {parameter.dtype} tensor of layout {parameter.layout}; dense real ones were expected",
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but copied, and still in float32: torch would round it to the parameter's dtype."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[parameter][name] = (
                    value.clone() if name == "step" else value.to(parameter.device, _state_dtype(parameter), copy=True)
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Changes the parameters by their gradients; those without one stay. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # foreach takes one kind at a time
            for parameter in group["params"]:
                if parameter.grad is not None:
                    check(
                        parameter.grad.layout == torch.strided,
                        f"a gradient of shape {list(parameter.shape)} is {parameter.grad.layout}; a dense one was "
                        "expected: build embeddings with sparse=False",
                    )
                    alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)
        return loss

    @torch.no_grad()
    def allocate(self) -> None:
        """Makes the state of the parameters that have none yet, zeros: what a checkpoint is read into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        dtype = _state_dtype(parameters[0])
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = _new_state(parameter)
        steps = [self.state[parameter]["step"] for parameter in parameters]
        m = [local(self.state[parameter]["exp_avg"]) for parameter in parameters]
        v = [local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters]
        gradients = [local(like(parameter.grad, parameter)).to(dtype) for parameter in parameters]
        stored = [local(parameter) for parameter in parameters]
        weights = [weight.to(dtype) for weight in stored]  # the stored tensors themselves where they have the dtype

        lr = group["lr"]
        if not group["adapt"] and weights[0] is stored[0] and stored[0].is_cpu and not isinstance(lr, Tensor):
            # AdamW in one pass over memory. After infinitely many steps there is no bias to correct.
            counts = steps if group["bias_correction"] else [torch.full_like(step, torch.inf) for step in steps]
            adamw(
                weights,
                gradients,
                m,
                v,
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=lr,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            if counts is not steps:
                torch._foreach_add_(steps, 1.0)
            return
        torch._foreach_add_(steps, 1.0)
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, gradients, alpha=1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_sqrt(v)
        if group["bias_correction"]:
            torch._foreach_div_(denominators, [(1 - beta2 ** step.item()) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(m, denominators)
        if group["bias_correction"]:
            torch._foreach_div_(updates, [1 - beta1 ** step.item() for step in steps])
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])

        if group["adapt"]:
            torch._foreach_mul_(updates, _ratios(weights, updates, parameters))
        if isinstance(lr, Tensor):
            torch._foreach_mul_(updates, lr.reshape(()).to(updates[0].device, dtype))
            torch._foreach_sub_(weights, updates)
        else:
            torch._foreach_sub_(weights, updates, alpha=lr)
        if weights[0] is not stored[0]:
            torch._foreach_copy_(stored, weights)


def _new_state(parameter: Tensor) -> dict[str, Tensor]:
    dtype = _state_dtype(parameter)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype),
    }


def _state_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _ratios(weights: Sequence[Tensor], updates: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """|w| / |u| of each whole tensor, a tensor of no dimensions; 1 where either is 0."""
    lengths = zip(norms(weights, parameters), norms(updates, parameters), strict=True)
    return [torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)) for w, u in lengths]
