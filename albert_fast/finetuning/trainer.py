"""A fine-tuning run: the loop, its examples, and the checkpoint that is best on held-out ones."""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.config import SHAPES, FinetuneConfig
from albert_fast.finetuning.matching import look_for_matches
from albert_fast.finetuning.objective import TaskObjective
from albert_fast.finetuning.rows import Batch, Feed, Row
from albert_fast.finetuning.task import Task, check_length, read_known, task_class, tokenizer_of
from albert_fast.ops.checks import check
from albert_fast.training.learner import Learner
from albert_fast.training.loop import Loop
from albert_fast.training.parallel import World

BEST, METRICS = "best", "metrics.json"
DEV = "dev"  # in METRICS: which held-out examples the figures are of
PRETRAINED = {"AlbertModel", "AlbertForMaskedLM", "AlbertForPreTraining"}


class Finetuner(Loop):
    """See `Loop`. All files are read before anything is made.

    Attributes:
        task: as the training data has it.
        metrics: of the last evaluation; None before.
    """

    config: FinetuneConfig
    feed: Feed

    def __init__(self, config: FinetuneConfig, world: World) -> None:
        config.check_complete()
        kind = task_class(config.task)
        tokenizer = tokenizer_of(config) if kind.reads_text else None
        self.task = task = kind(config, tokenizer)
        examples = task.read_all(config.data.train)
        task.learn(examples)
        rows = task.rows(examples, labelled=True)
        if config.data.dev:
            task.check_measures()
        self.held_out = task.read_all(config.data.dev)
        self.held_out_rows = task.rows(self.held_out, labelled=True)
        shape = self._shape(config, None if tokenizer is None else len(tokenizer))
        check_length(config.length, shape)
        config = config.with_steps(len(rows))
        self.shape = shape
        model = self._model(config, shape)
        if config.matching_heads:
            words = sorted({token for row in rows for token in row.input_ids})
            look_for_matches(model.albert, config.matching_heads, words, config.length, config.seed)
        every = max(1, round(len(rows) / config.batch.size)) if config.evaluate.every is None else config.evaluate.every
        super().__init__(
            config,
            world,
            Feed(rows, task.pack, config.seed, rank=world.data_rank, ranks=world.data_ranks),
            Learner(TaskObjective(model, task), config, world, self._write_rest),
            every if self.held_out else None,
        )
        self.metrics: dict[str, float] | None = None

    def _shape(self, config: FinetuneConfig, vocab_size: int | None) -> AlbertConfig:
        path = Path(config.model)
        if config.model in SHAPES:
            shape = getattr(AlbertConfig, config.model)(2, vocab_size=vocab_size or 1)
        else:
            shape = AlbertConfig.from_json_file(path / "config.json" if path.is_dir() else path)
        known = {each.name for each in fields(AlbertConfig)} - {"extra"} | {*self.task.config_keys, *shape.extra}
        for name in config.overrides:
            close = ", ".join(difflib.get_close_matches(name, known)) or "num_hidden_layers"
            check(name in known, f"overrides has {name!r}; a field of the model's config was expected, such as {close}")
        shape = AlbertConfig.from_dict({**shape.to_dict(), **config.overrides})
        check(
            vocab_size is None or shape.vocab_size >= vocab_size,
            f"the model has {shape.vocab_size} pieces and the vocabulary {vocab_size}: give the model's own",
        )
        if config.dropout is not None:
            shape.hidden_dropout_prob = shape.attention_probs_dropout_prob = config.dropout
        if config.classifier_dropout is not None:
            shape.classifier_dropout_prob = config.classifier_dropout
        self.task.configure(shape)
        return shape

    def _model(self, config: FinetuneConfig, shape: AlbertConfig) -> Any:
        torch.manual_seed(config.seed)  # of the head, and of all where nothing is trained yet
        kind = self.task.model_class
        if not Path(config.model).is_dir():
            return kind(shape)
        before = AlbertConfig.from_pretrained(config.model)
        of_this_task = kind.__name__ in (before.architectures or ()) and before.id2label == shape.id2label
        other_task = not of_this_task and not PRETRAINED & set(before.architectures or PRETRAINED)
        if other_task:  # its head is no use here
            model = self.task.with_new_head(config.model, shape)
        else:
            model = kind.from_pretrained(config.model, config=shape, dtype=torch.float32)
        if not of_this_task:
            self.task.begin(model)
        return model

    def _write_rest(self, directory: Path) -> None:
        architectures = [self.task.model_class.__name__]
        replace(self.shape, architectures=architectures, dtype=torch.float32).save_pretrained(directory)
        self.task.save(directory)

    # --------------------------------------------------------------------------------------------------- of the loop

    def flops(self, batch: Batch) -> int:
        return self.task.flops(self.shape, batch)

    def evaluate(self) -> dict[str, Any]:
        objective = self.learner.evaluated
        micro = self.config.evaluate.rows
        outputs = run_rows(self.task, objective, self.held_out_rows, micro, self.world, bfloat16=self.bfloat16)
        predictions = self.task.predictions(self.held_out, self.held_out_rows, outputs)
        self.metrics = self.task.metrics(self.held_out, predictions)
        self._keep_best()
        return dict(self.metrics)

    def _resume(self, checkpoint: Path) -> None:
        """Labels are numbers to the weights: those of other data would be other labels, without a word."""
        how, before = read_known(checkpoint / "model")
        had, has = {"task": how.get("task"), **before}, {"task": self.task.name, **self.task.state()}
        if changed := sorted(key for key in {*had, *has} if had.get(key) != has.get(key)):
            of = lambda known: ", ".join(f"{key} {_shortened(known.get(key))}" for key in changed)  # noqa: E731
            raise ValueError(
                f"the run in {self.output} has {of(had)}, and would go on with {of(has)}: give the data and options "
                "that it had, or another output (-o)"
            )
        super()._resume(checkpoint)

    def _keep_best(self) -> None:
        """OUT/best, where this is better than what is there. Figures of other held-out data say nothing of it."""
        assert self.metrics is not None
        best = self.output / BEST
        states = self.learner.whole_states()
        if not self.world.is_main:
            return
        dev = _fingerprint(self.held_out)
        try:
            known = json.loads((best / METRICS).read_text(encoding="utf-8"))
            before = known[self.task.best] if known.get(DEV, dev) == dev else None  # older files do not say
        except (OSError, ValueError, KeyError):
            before = None
        if not self.task.is_better(self.metrics[self.task.best], before):
            return
        partial = self.output / ".best.partial"
        shutil.rmtree(partial, ignore_errors=True)
        name = "model" if self.learner.average is None else "ema"
        figures = {"step": self.budget.step, **self.metrics, DEV: dev}
        try:
            self.learner.export(partial, {name: states[name]})
            (partial / name / METRICS).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            self.recorder.event(self.budget.step, "not_saved", f"{best} is as it was: {error}")
            return
        shutil.rmtree(best, ignore_errors=True)
        (partial / name).rename(best)
        shutil.rmtree(partial)


def _fingerprint(examples: Sequence[Any]) -> str:
    """Of what examples hold, wherever they were read."""
    found = hashlib.sha256()
    for example in examples:
        values = [getattr(example, each.name) for each in fields(example) if each.name not in ("place", "lines")]
        found.update(repr([value.name if isinstance(value, Path) else value for value in values]).encode())
    return found.hexdigest()[:16]


def _shortened(value: Any) -> str:
    text = ", ".join(map(repr, value)) if isinstance(value, list) else repr(value)
    return text if len(text) <= 200 else text[:200] + " …"


@torch.no_grad()
def run_rows(
    task: Task, objective: nn.Module, rows: Sequence[Row], micro: int, world: World, *, bfloat16: bool = False
) -> list[Any]:
    """What a model says of each row, on every rank, in the order of the rows.

    Args:
        objective: a TaskObjective, or what `parallelize` made of one.
        micro: rows that a rank computes at once.
    """
    was_training = objective.training
    objective.eval()
    # Rows of like length together: less is kept in memory at once.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    found: dict[int, Any] = {}
    try:
        for start in range(0, len(rows), micro * world.data_ranks):
            of_all = order[start : start + micro * world.data_ranks]
            # Ranks without a row left compute one for the others' sake (FSDP's gathering), which is not kept.
            mine = of_all[world.data_rank :: world.data_ranks]
            batch = task.pack([rows[i] for i in mine or of_all[:1]]).to(world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=bfloat16):
                said = objective(batch, True)
            found.update(zip(mine, said, strict=bool(mine)))
    finally:
        objective.train(was_training)
    if world.data_ranks > 1:
        parts: list[Any] = [None] * world.size
        distributed.all_gather_object(parts, found)
        for part in parts:
            found.update(part)
    return [found[i] for i in range(len(rows))]
