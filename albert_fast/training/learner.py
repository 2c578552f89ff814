"""What learns: the model, its optimizer and its moving average, on one device or divided over many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from albert_fast.checkpoint import write_state_dict
from albert_fast.training import parallel
from albert_fast.training.lamb import Lamb, parameter_groups
from albert_fast.training.objective import Objective
from albert_fast.training.options import RunOptions
from albert_fast.training.sharded import local, whole


class Learner:
    """Model, optimizer and moving average.

    Args:
        objective: with the model as it begins.
        options: of the run.
        world: this process among the others.
        write_rest: writes what belongs beside the weights into a directory: config.json, the vocabulary.

    Attributes:
        objective: what was given, on the world's device.
        module: what a batch is given to in training: `module(batch) -> Sums`.
        evaluated: the same for evaluation: the moving average, where there is one.
        model: the objective's.
        optimizer: Lamb, or Google's AdamW.
        parameters: all that are trained.
    """

    def __init__(
        self, objective: Objective, options: RunOptions, world: parallel.World, write_rest: Callable[[Path], None]
    ) -> None:
        self.objective, self.model, self._write_rest = objective.to(world.device).train(), objective.model, write_rest
        optimizer, engine = options.optimizer, options.parallel.engine
        self.average: AveragedModel | None = None
        if optimizer.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=partial(_move, decay=optimizer.ema))
        self.module = parallel.parallelize(objective, world, engine, compress=options.parallel.compress)
        # Evaluation needs no exchange of gradients, but whole weights where they are divided.
        divided = engine == "fsdp" or world.tensor_ranks > 1
        self.evaluated: nn.Module = self.module if divided else objective
        if self.average is not None:
            of_average = objective.with_model(self.average.module)
            self.evaluated = parallel.parallelize(of_average, world, engine) if divided else of_average
        self.optimizer = Lamb(
            parameter_groups(self.model, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            bias_correction=optimizer.bias_correction,
            adapt=optimizer.name == "lamb",
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def update(self, learning_rate: float) -> None:
        """One step with the gradients that are there."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint has of tensors, by name; this rank's parts of those that are divided."""
        self.optimizer.allocate()
        found: dict[str, Tensor] = {}
        for name, parameter in parallel.named_parameters(self.module).items():
            found[f"model/{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer/{key}/{name}"] = value
        if self.average is not None:
            found["average/n_averaged"] = self.average.n_averaged
            for name, parameter in self.average.module.named_parameters():
                found[f"average/{name}"] = parameter.detach()
        return found

    def whole_states(self) -> dict[str, Mapping[str, Tensor]]:
        """The state dicts for `export`: of every rank's parts, so every rank has to call this."""
        states: dict[str, Mapping[str, Tensor]] = {"model": _whole(self.model)}
        if self.average is not None:
            states["ema"] = _whole(self.average.module)
        return states

    def export(self, directory: Path, states: dict[str, Mapping[str, Tensor]]) -> None:
        """Hugging Face directories in `directory`, one for each of `states`."""
        for name, state in states.items():
            write_state_dict(directory / name, state)
            self._write_rest(directory / name)


def _move(averages: Sequence[Tensor], weights: Sequence[Tensor], _: object, decay: float) -> None:
    """The average of each, towards the weights; divided ones part by part."""
    torch._foreach_lerp_([local(each) for each in averages], [local(each) for each in weights], 1 - decay)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with nothing divided. Tied weights stay the same memory, which is stored once."""
    found = {id(parameter): whole(parameter) for parameter in model.parameters()}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
