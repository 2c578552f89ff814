"""What a run is: a YAML file, or a preset's name, and `key=value` on the command line.

    output: runs/mine
    data: {train: store, dev: held_out}
    model: {shape: base, version: 2}
    examples: {length: 512, masking: {strategy: ngram}}
    batch: {size: 4096, micro: 32}
    schedule: {steps: 125000}

Every field has a default but output and data.train; `albert-fast pretrain --help` lists them. jsonargparse reads types
and values off the dataclasses below.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from albert_fast.config import AlbertConfig
from albert_fast.ops.checks import check
from albert_fast.ops.encoder import RECOMPUTE
from albert_fast.pretraining.initialization import INITIALIZATIONS
from albert_fast.pretraining.parallel import ENGINES
from albert_fast.pretraining.plan import ExampleOptions
from albert_fast.pretraining.schedules import (
    BatchRamp,
    Budget,
    Constant,
    Cosine,
    Exponential,
    LengthStages,
    Polynomial,
    Schedule,
    Warmup,
    warmup_stable_decay,
)

PRESETS = Path(__file__).parent / "presets"
SHAPES = ("base", "large", "xlarge", "xxlarge")
OPTIMIZERS = ("lamb", "adamw")
SCHEDULES = ("albert", "constant", "polynomial", "exponential", "cosine", "stable_decay")
PRECISIONS = ("float32", "bfloat16")
ACTIONS = ("rollback", "stop")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    check(value in known, f"{name} is {value!r}; one of {', '.join(known)} was expected")


def _at_least(name: str, value: float | None, least: float) -> None:
    check(value is None or value >= least, f"{name} is {value}; at least {least} was expected")


@dataclass(frozen=True)
class DataOptions:
    """What is read.

    Attributes:
        train: a token store, of `albert-fast corpus`.
        dev: another one, of held-out text, to evaluate on.
        dev_documents: in place of `dev`, how many of the last documents of `train` are held out.
        vocab: a sentencepiece model or a directory with one; None: the store's own.
        glossary: the tab-separated words and definitions of strategy `dmlm`.
        letters: what a piece within a word consists of; None: a to z, as in the original.
        workers: processes that make examples; 0: the training process does.
    """

    train: str = ""
    dev: str | None = None
    dev_documents: int = 0
    vocab: str | None = None
    glossary: str | None = None
    letters: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        _at_least("data.dev_documents", self.dev_documents, 0)
        _at_least("data.workers", self.workers, 0)
        check(
            self.dev is None or not self.dev_documents,
            f"data.dev is {self.dev!r} and data.dev_documents is {self.dev_documents}: at most one was expected",
        )


@dataclass(frozen=True)
class ModelOptions:
    """The model.

    Attributes:
        shape: base, large, xlarge, xxlarge, or a config.json.
        version: 1 (dropout 0.1) or 2 (none), of a named shape.
        overrides: fields of AlbertConfig, such as {num_hidden_layers: 4}.
        start_from: a checkpoint directory to go on from in place of random weights; its config.json counts then.
        recompute: none, ffn or layer: what backward computes again in place of keeping it.
        initialization: of a new model: original (random), or neighbors: as the unigram model, and with heads that look
            at the words beside each, which would otherwise take millions of tokens to learn (initialization.py).
    """

    shape: str = "base"
    version: int = 2
    overrides: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    recompute: str = "none"
    initialization: str = "original"

    def __post_init__(self) -> None:
        _one_of("model.recompute", self.recompute, RECOMPUTE)
        _one_of("model.initialization", self.initialization, INITIALIZATIONS)
        check(
            self.start_from is None or self.initialization == "original",
            f"model.initialization is {self.initialization!r} and model.start_from {self.start_from!r}, which has "
            "weights: give one of them",
        )
        check(
            self.shape in SHAPES or Path(self.shape).is_file(),
            f"model.shape is {self.shape!r}; {', '.join(SHAPES)} or a config.json was expected",
        )

    def build(self, vocab_size: int) -> AlbertConfig:
        """The model's config, for a vocabulary of this size."""
        if self.start_from is not None:
            config = AlbertConfig.from_pretrained(self.start_from, **self.overrides)
        elif self.shape in SHAPES:
            config = getattr(AlbertConfig, self.shape)(self.version, vocab_size=vocab_size, **self.overrides)
        else:
            config = AlbertConfig.from_json_file(self.shape, **{"vocab_size": vocab_size, **self.overrides})
        check(
            config.vocab_size == vocab_size,
            f"the model's vocab_size is {config.vocab_size} and the store's vocabulary has {vocab_size} pieces: give "
            "the store of the model's vocabulary",
        )
        return config


@dataclass(frozen=True)
class BatchOptions:
    """How many rows make a step.

    Attributes:
        size: rows of an optimizer step, on all ranks together.
        micro: rows that a rank computes at once; a step accumulates the gradients of as many as it takes. None: all.
        start, ramp: the batch grows from `start` rows by a line over the first share `ramp` of the run (None: it does
            not grow).
        stages: pairs of a share of the run and a length, such as [[0.9, 128], [0.1, 512]], in place of
            examples.length.
    """

    size: int = 4096
    micro: int | None = None
    start: int | None = None
    ramp: float = 0.6
    stages: list[tuple[float, int]] | None = None

    def __post_init__(self) -> None:
        _at_least("batch.size", self.size, 1)
        _at_least("batch.micro", self.micro, 1)
        if self.stages is not None:
            LengthStages(self.stages)

    def ramped(self, ranks: int) -> BatchRamp:
        """Rows of a step as a function of the progress, in whole micro-batches of all ranks."""
        check(
            self.size % ranks == 0,
            f"batch.size is {self.size}; a multiple of the {ranks} ranks was expected, each has as many rows",
        )
        micro = min(self.micro or self.size // ranks, self.size // ranks)
        return BatchRamp(self.start or self.size, self.size, self.ramp, multiple=micro * ranks)


@dataclass(frozen=True)
class OptimizerOptions:
    """LAMB as the original's, or the original's AdamW.

    Attributes:
        learning_rate: the highest; the schedule multiplies it.
        clip: the gradient's global norm is at most this; None: no clipping.
        bias_correction: of the moments; neither of Google's optimizers has it.
        ema: decay of the moving average of the weights that is kept beside them, such as 0.999; None: none.
    """

    name: str = "lamb"
    learning_rate: float = 1.76e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float | None = 1.0
    bias_correction: bool = False
    ema: float | None = None

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, OPTIMIZERS)
        check(
            self.clip is None or self.clip > 0, f"optimizer.clip is {self.clip}; a norm above 0 was expected, or null"
        )
        check(
            self.ema is None or 0 < self.ema < 1,
            f"optimizer.ema is {self.ema}; a decay between 0 and 1 was expected, such as 0.999, or null",
        )


@dataclass(frozen=True)
class ScheduleOptions:
    """How long the run is, and how the learning rate changes.

    Attributes:
        steps, seconds: the length, exactly one of them.
        shape: albert (a line down to 0 by the global step), polynomial, exponential, cosine, stable_decay or constant.
        warmup: share of the run over which the rate rises from 0.
        power: of `polynomial`.
        floor: what `polynomial`, `cosine` and `stable_decay` end at, and `exponential`, as a share of the highest rate.
        decay: share of the run over which `stable_decay` falls.
        decay_shape: of `stable_decay`: linear or sqrt.
    """

    steps: int | None = None
    seconds: float | None = None
    shape: str = "albert"
    warmup: float = 0.025
    power: float = 1.0
    floor: float | None = None
    decay: float = 0.1
    decay_shape: str = "linear"

    def __post_init__(self) -> None:
        _one_of("schedule.shape", self.shape, SCHEDULES)
        if self.steps is not None or self.seconds is not None:
            self.budget()
        self.rate()

    def budget(self) -> Budget:
        return Budget(steps=self.steps, seconds=self.seconds)

    def rate(self) -> Schedule:
        floor = self.floor or 0.0
        if self.shape == "stable_decay":
            return warmup_stable_decay(self.warmup, self.decay, floor, self.decay_shape)
        if self.shape == "albert":
            return Warmup(self.warmup, Polynomial())
        then: dict[str, Schedule] = {
            "constant": Constant(),
            "polynomial": Polynomial(self.power, floor),
            "exponential": Exponential(self.floor or 0.01),
            "cosine": Cosine(floor),
        }
        return Warmup(self.warmup, then[self.shape], restart=True)


@dataclass(frozen=True)
class ParallelOptions:
    """How several processes share the work; `torchrun` starts them.

    Attributes:
        engine: ddp (every rank has the whole model) or fsdp (weights, gradients and moments are divided).
        tensor: ranks that share the heads and the feed-forward network of one model.
        compress: gradients travel in bfloat16 (ddp).
    """

    engine: str = "ddp"
    tensor: int = 1
    compress: bool = False

    def __post_init__(self) -> None:
        _one_of("parallel.engine", self.engine, ENGINES)
        _at_least("parallel.tensor", self.tensor, 1)


@dataclass(frozen=True)
class SaveOptions:
    """Checkpoints.

    Attributes:
        every: steps between two; seconds: between two. Whatever is first; the last step is always saved.
        keep: how many of the last ones stay.
    """

    every: int | None = 1000
    seconds: float | None = 900.0
    keep: int = 3

    def __post_init__(self) -> None:
        _at_least("save.every", self.every, 1)
        _at_least("save.keep", self.keep, 1)


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluation on held-out text: the same examples each time.

    Attributes:
        every: steps between two; the last step is always evaluated.
        rows: how many.
    """

    every: int = 1000
    rows: int = 2048

    def __post_init__(self) -> None:
        _at_least("evaluate.every", self.every, 1)
        _at_least("evaluate.rows", self.rows, 1)


@dataclass(frozen=True)
class LogOptions:
    """What is recorded.

    Attributes:
        every: steps that one record of the log is the mean of.
        tensorboard: event files, too.
        wandb: a project of Weights & Biases, too.
        quiet: nothing on the terminal.
        peak_flops: of one device, which MFU is a share of; None: of the data sheet, or measured on a CPU.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    quiet: bool = False
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        _at_least("log.every", self.every, 1)


@dataclass(frozen=True)
class HealthOptions:
    """What happens when the loss is not finite, or collapses.

    Attributes:
        action: rollback (to the last checkpoint, and on with other examples) or stop.
        collapse: nats above the best smoothed loss, for twice as many steps as the smoothing remembers.
        smoothing: of that, per step; 0.98 remembers about 50.
        most_rollbacks: in one run; then it stops.
        rate_factor: the learning rate is multiplied by this with each rollback.
    """

    action: str = "rollback"
    collapse: float = 0.5
    smoothing: float = 0.98
    most_rollbacks: int = 3
    rate_factor: float = 0.5

    def __post_init__(self) -> None:
        _one_of("health.action", self.action, ACTIONS)
        check(self.collapse > 0, f"health.collapse is {self.collapse}; nats above 0 were expected")
        _at_least("health.most_rollbacks", self.most_rollbacks, 0)
        check(
            0 < self.rate_factor <= 1,
            f"health.rate_factor is {self.rate_factor}; a factor above 0, and at most 1, was expected",
        )


@dataclass(frozen=True)
class PretrainConfig:
    """A run.

    Attributes:
        output: its directory: checkpoints, log and configuration. A run that is there already is gone on with.
        seed: of the weights, the examples and dropout.
        device: cpu, cuda …; None: a GPU where there is one.
        precision: float32, or bfloat16 by autocast (float32 weights).
        label_smoothing, z_loss: of the masked-LM loss.
        sentence_order_weight: of the second task's gradient. 1 is the original's, whose batches have 4096 rows; of few
            rows that gradient is mostly noise, and larger than the masked-LM loss's.
    """

    output: str = ""
    seed: int = 12345
    device: str | None = None
    precision: str = "float32"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    sentence_order_weight: float = 1.0
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    log: LogOptions = field(default_factory=LogOptions)
    health: HealthOptions = field(default_factory=HealthOptions)

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _at_least("sentence_order_weight", self.sentence_order_weight, 0)

    def check_complete(self) -> None:
        """Raises ValueError where something has no value yet that has no default."""
        check(bool(self.output), "output is not given: the directory of the run, such as output=runs/mine")
        check(bool(self.data.train), "data.train is not given: a token store, which `albert-fast corpus` makes")
        self.schedule.budget()

    @property
    def stages(self) -> LengthStages:
        return LengthStages(self.batch.stages or [(1.0, self.examples.length)])

    def examples_of(self, length: int) -> ExampleOptions:
        return replace(self.examples, length=length)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse(source: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of a YAML file or a preset, and `key=value` overrides such as "optimizer.learning_rate=1e-3".

    Raises:
        ValueError: no such file or preset, an unknown key, or a value that does not fit; the message names it.
    """
    parser = _parser()
    arguments = []
    if source is not None:
        arguments.append(f"--config={_file(source)}")
    for override in overrides:
        key, found, value = override.partition("=")
        check(
            bool(found) and key.replace(".", "").replace("_", "").isalnum(),
            f"{override!r} was given; key=value was expected, such as batch.size=256",
        )
        arguments.append(f"--{key}={value}")
    with _readable_errors(source):
        parsed = parser.parse_args(arguments)
        values = parser.instantiate(parsed).as_dict()
    values.pop("config", None)
    return PretrainConfig(**values)


def describe() -> str:
    """All keys, their types and defaults, as `--help` prints them."""
    text = io.StringIO()
    _parser().print_help(text)
    return text.getvalue()


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def write(config: PretrainConfig, path: Path) -> None:
    """As YAML (its subset JSON), for `parse`; the old file or the new one is there, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _parser() -> Any:
    try:
        import jsonargparse
    except ImportError:
        raise ValueError(
            "pretraining reads its configuration with jsonargparse, which is not installed: "
            "pip install 'albert_fast[train]'"
        ) from None
    parser = jsonargparse.ArgumentParser(prog="albert-fast pretrain", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="a YAML file")
    parser.add_class_arguments(PretrainConfig)
    return parser


def _file(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    preset = PRESETS / f"{path.name}.yaml"
    if path.is_file():
        return path
    check(
        path.name == str(source) and preset.is_file(),
        f"{source} is no file and no preset; a YAML file, or one of {', '.join(preset_names())}, was expected",
    )
    return preset


@contextlib.contextmanager
def _readable_errors(source: object) -> Iterator[None]:
    """What jsonargparse raises, as one line."""
    import jsonargparse

    try:
        yield
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{source or 'the configuration'}: {' '.join(lines)}") from None
