"""Fine-tuning: a step of classification, and what a model says of many rows; beside transformers' model and AdamW."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import AlbertConfig, AlbertForSequenceClassification
from albert_fast.bench import parity
from albert_fast.bench.case import Case, Here
from albert_fast.bench.formats import FORMATS
from albert_fast.bench.parity import Results
from albert_fast.bench.peers.albert_fast import forced_backend
from albert_fast.bench.peers.base import missing
from albert_fast.bench.suites.setting import Setting
from albert_fast.bench.work import Work
from albert_fast.bench.worker import TURN
from albert_fast.finetuning.classification import Classification
from albert_fast.finetuning.config import FinetuneConfig
from albert_fast.finetuning.objective import TaskObjective
from albert_fast.finetuning.rows import Row
from albert_fast.finetuning.trainer import run_rows
from albert_fast.flops import flops
from albert_fast.training import parallel
from albert_fast.training.lamb import Lamb, parameter_groups

LENGTH = 128
EVALUATED_AT_ONCE = 16
LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-5, 0.01, 1.0


class Subject(NamedTuple):
    """What every peer is given: texts of odd and of even length are to be told apart, which nothing depends on."""

    config: AlbertConfig
    state_dict: dict[str, Tensor]
    task: Classification
    rows: Sequence[Row]


@dataclass(kw_only=True)
class TaskCase(Case):
    """Attributes:
    make: what is given.
    turn: as in `Here`.
    """

    make: Callable[[], Subject]
    turn: float = TURN
    peers: tuple[str, ...] = ("albert_fast", "reference", "transformers")

    @functools.cached_property
    def subject(self) -> Subject:
        return self.make()

    @functools.cached_property
    def expected(self) -> Results:
        return self._bind("oracle", "float64")[0]()

    @functools.cached_property
    def yardstick(self) -> float:
        return parity.error(self._bind("reference", self.dtype)[0](), self.expected)

    def work(self) -> Work:
        lengths = [len(row.input_ids) for row in self.subject.rows]
        operations = flops(self.subject.config, lengths, self.mode == "training", 0)
        return self.new_work(
            tokens=sum(lengths),
            fill=sum(lengths) / (len(lengths) * max(lengths)),
            gflop=operations.total / 1e9,
            attention_gflop=operations.attention / 1e9,
        )

    def refuses(self, peer: str) -> str | None:
        return missing(("transformers",), "'albert_fast[bench]'") if peer == "transformers" else None

    def open(self, peer: str) -> Here:
        bound = functools.cache(lambda: self._bind(peer, self.dtype))
        return Here(lambda: bound()[0](), lambda: bound()[1](), self.device, self.turn)

    def judge(self, peer: str, results: Results) -> tuple[float, float]:
        largest = parity.LARGEST[self.mode, self.dtype]
        ours = min(max(parity.TOLERANCE * self.yardstick, torch.finfo(torch.float32).eps), largest)
        return parity.error(results, self.expected), largest if peer == "transformers" else ours

    def _bind(self, peer: str, dtype: str) -> tuple[Callable[[], Results], Callable[[], object]]:
        """What is compared, and what is timed: a step's loss and gradients and the step, or what is said of each row
        twice."""
        make = {"transformers": _theirs, "oracle": _oracle}.get(peer, _ours)
        loss, say, model = make(self.subject, self.device, FORMATS[dtype].weights)
        backend = "reference" if peer in ("reference", "oracle") else None
        parameters = list(model.parameters())
        step = _theirs_step if peer == "transformers" else _ours_step
        finish = step(model)

        def gradients() -> Results:
            model.zero_grad(set_to_none=True)
            with forced_backend(backend):
                value = loss()
                value.backward()
            named = model.named_parameters()
            return {"loss": value.detach(), **{n: p.grad.clone() for n, p in named if p.grad is not None}}

        def train() -> None:
            model.zero_grad(set_to_none=True)
            with forced_backend(backend):
                loss().backward()
            finish(parameters)

        def evaluate() -> Results:
            with forced_backend(backend), torch.no_grad():
                return {"output": say()}

        return (gradients, train) if self.mode == "training" else (evaluate, evaluate)


Bound = tuple[Callable[[], Tensor], Callable[[], Tensor], torch.nn.Module]


def _ours(subject: Subject, device: torch.device, dtype: torch.dtype) -> Bound:
    """The loss of all rows, what is said of each, and the model."""
    model = AlbertForSequenceClassification(subject.config).to(device, dtype).train()
    model.load_state_dict(subject.state_dict)
    objective = TaskObjective(model, subject.task)
    batch = subject.task.pack(subject.rows).to(device)
    world = parallel.start(str(device))

    def loss() -> Tensor:
        return objective(batch).losses.sum() / len(subject.rows)

    def say() -> Tensor:
        return torch.tensor(run_rows(subject.task, objective, subject.rows, EVALUATED_AT_ONCE, world))

    return loss, say, model


def _oracle(subject: Subject, device: torch.device, dtype: torch.dtype) -> Bound:
    """The same without the task's own code, which gives logits in float32."""
    _, _, model = _ours(subject, device, dtype)
    batch = subject.task.pack(subject.rows).to(device)

    def loss() -> Tensor:
        return F.cross_entropy(model(batch.inputs).logits, batch.targets["labels"])

    return loss, lambda: model.eval()(batch.inputs).logits.softmax(1), model


def _theirs(subject: Subject, device: torch.device, dtype: torch.dtype) -> Bound:
    """The same by transformers, in padded batches; for predictions of rows of like length, as `run_rows` has them."""
    import transformers

    values = {key: value for key, value in subject.config.to_dict().items() if key != "dtype"}
    model: Any = transformers.AlbertForSequenceClassification(transformers.AlbertConfig.from_dict(values))
    model = model.to(device, dtype).train()
    model.load_state_dict(subject.state_dict)
    padded = _padded(subject.rows, device)

    def loss() -> Tensor:
        return model(**padded).loss

    def say() -> Tensor:
        model.eval()
        order = sorted(range(len(subject.rows)), key=lambda i: len(subject.rows[i].input_ids))
        found: dict[int, list[float]] = {}
        for start in range(0, len(order), EVALUATED_AT_ONCE):
            chosen = order[start : start + EVALUATED_AT_ONCE]
            inputs = _padded([subject.rows[i] for i in chosen], device)
            del inputs["labels"]
            logits = model(**inputs).logits
            found.update(zip(chosen, logits.softmax(1).tolist(), strict=True))
        return torch.tensor([found[i] for i in range(len(order))])

    return loss, say, model


def _padded(rows: Sequence[Row], device: torch.device) -> dict[str, Tensor]:
    longest = max(len(row.input_ids) for row in rows)

    def pad(values: list[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (longest - len(row)) for row in values], device=device)

    return {
        "input_ids": pad([row.input_ids for row in rows]),
        "token_type_ids": pad([row.token_type_ids for row in rows]),
        "attention_mask": pad([[1] * len(row.input_ids) for row in rows]),
        "labels": torch.tensor([row.target for row in rows], device=device),
    }


Finish = Callable[[list[torch.nn.Parameter]], None]


def _ours_step(model: torch.nn.Module) -> Finish:
    """Gradients clipped, and AdamW, as `finetuning.trainer` does it."""
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = Lamb(groups, lr=LEARNING_RATE, bias_correction=True, adapt=False)

    def finish(parameters: list[torch.nn.Parameter]) -> None:
        parallel.clip(parameters, parallel.gradient_norm(parameters), CLIP)
        optimizer.step()

    return finish


def _theirs_step(model: torch.nn.Module) -> Finish:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def finish(parameters: list[torch.nn.Parameter]) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()

    return finish


def task_case(setting: Setting, mode: str, count: int) -> TaskCase:
    """Of `count` paragraphs."""

    def make() -> Subject:
        config = setting.config
        options = FinetuneConfig(task="classification", length=LENGTH)
        state: dict[str, Any] = {"kind": "single", "labels": ["even", "odd"], "early_exit": False}
        task = Classification(options, setting.tokenizer, state)
        task.configure(config)
        ids = setting.tokenizer(setting.read.paragraphs[:count], truncation=True, max_length=LENGTH)["input_ids"]
        rows = [Row(row, [0] * len(row), len(row) % 2, number) for number, row in enumerate(ids)]
        return Subject(config, setting.weights(config, AlbertForSequenceClassification), task, rows)

    return TaskCase(
        suite="tasks",
        group="classification",
        mode=mode,
        dtype="float32",
        shape=f"{count}x{LENGTH}:ragged",
        device=setting.device,
        turn=setting.turn,
        make=make,
    )


def cases(setting: Setting) -> list[Case]:
    trained, evaluated = (8, 32) if setting.quick else (32, 256)
    return [task_case(setting, "training", trained), task_case(setting, "inference", evaluated)]
