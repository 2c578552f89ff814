"""What learns: the model, its optimizer and its moving average, on one device or divided over many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from albert_fast.checkpoint import write_state_dict
from albert_fast.model import AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.pretraining import parallel
from albert_fast.pretraining.config import PretrainConfig
from albert_fast.pretraining.feed import Corpus
from albert_fast.pretraining.initialization import build_model, look_at_neighbors
from albert_fast.pretraining.lamb import Lamb, parameter_groups
from albert_fast.pretraining.objective import Objective, unigram_losses
from albert_fast.pretraining.sharded import local, whole


class Learner:
    """Model, optimizer and moving average.

    Attributes:
        module: what a batch is given to in training: `module(batch) -> Sums`.
        evaluated: the same for evaluation: the moving average, where there is one.
        model: AlbertForPreTraining, or AlbertForMaskedLM without a second task.
        optimizer: Lamb, or Google's AdamW.
        parameters: all that are trained.
    """

    def __init__(self, config: PretrainConfig, corpus: Corpus, world: parallel.World) -> None:
        options, second_task = config.model, config.examples.has_second_task
        shape = options.build(corpus.train.vocab_size)
        self.model: AlbertForPreTraining | AlbertForMaskedLM
        unigram = unigram_losses(corpus.train)
        if options.start_from is None:
            self.model = build_model(shape, second_task, config.seed)
            if options.initialization == "neighbors":
                look_at_neighbors(self.model, unigram, config.seed)
        else:
            kind: Any = AlbertForPreTraining if second_task else AlbertForMaskedLM
            self.model = kind.from_pretrained(options.start_from, config=shape, dtype=torch.float32)
        self.model.set_recompute(options.recompute)
        self.model.to(world.device).train()
        self.config, self.tokenizer = self.model.config, corpus.tokenizer
        unigram = unigram.to(world.device)
        engine, mask_id = config.parallel.engine, corpus.vocabulary.mask_id
        self.average: AveragedModel | None = None
        losses = {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
        objective = Objective(self.model, unigram, mask_id, **losses)
        if config.optimizer.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=partial(_move, decay=config.optimizer.ema))
        self.module = parallel.parallelize(objective, world, engine, compress=config.parallel.compress)
        # Evaluation needs no exchange of gradients, but whole weights where they are divided.
        divided = engine == "fsdp" or world.tensor_ranks > 1
        self.evaluated: nn.Module = self.module if divided else objective
        if self.average is not None:
            self.evaluated = Objective(self.average.module, unigram, mask_id)  # type: ignore[arg-type]
            if divided:
                self.evaluated = parallel.parallelize(self.evaluated, world, engine)
        self.optimizer = Lamb(
            parameter_groups(self.model, config.optimizer.weight_decay),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            bias_correction=config.optimizer.bias_correction,
            adapt=config.optimizer.name == "lamb",
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
        """Hugging Face directories in `directory`, one for each of `states`, with the vocabulary."""
        for name, state in states.items():
            config = replace(self.config, architectures=[type(self.model).__name__], dtype=torch.float32)
            write_state_dict(directory / name, state)
            config.save_pretrained(directory / name)
            self.tokenizer.save_pretrained(directory / name)


def _move(averages: Sequence[Tensor], weights: Sequence[Tensor], _: object, decay: float) -> None:
    """The average of each, towards the weights; divided ones part by part."""
    torch._foreach_lerp_([local(each) for each in averages], [local(each) for each in weights], 1 - decay)


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with nothing divided. Tied weights stay the same memory, which is stored once."""
    found = {id(parameter): whole(parameter) for parameter in model.parameters()}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
