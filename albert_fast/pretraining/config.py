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

import difflib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from albert_fast.config import SIZES, AlbertConfig
from albert_fast.ops.checks import check
from albert_fast.ops.encoder import RECOMPUTE
from albert_fast.pretraining.initialization import INITIALIZATIONS
from albert_fast.pretraining.plan import ExampleOptions
from albert_fast.training import options
from albert_fast.training.configuration import Configuration
from albert_fast.training.options import RunOptions, at_least, one_of
from albert_fast.training.schedules import LengthStages

SHAPES = ("base", "large", "xlarge", "xxlarge")


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
        at_least("data.dev_documents", self.dev_documents, 0)
        at_least("data.workers", self.workers, 0)
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
        start_from: a checkpoint directory to go on from in place of random weights; its config.json counts then, and
            overrides may change dropout and the like.
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
        one_of("model.recompute", self.recompute, RECOMPUTE)
        one_of("model.initialization", self.initialization, INITIALIZATIONS)
        check(
            self.start_from is None or self.initialization == "original",
            f"model.initialization is {self.initialization!r} and model.start_from {self.start_from!r}, which has "
            "weights: give model.initialization=original, or leave model.start_from out",
        )
        known = [each.name for each in fields(AlbertConfig)]
        for name in self.overrides:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            check(name in known, f"model.overrides has {name!r}, which AlbertConfig has not: the nearest is {near!r}")
        check(
            self.shape in SHAPES or Path(self.shape).is_file(),
            f"model.shape is {self.shape!r}; {', '.join(SHAPES)} or a config.json was expected",
        )

    def build(self, vocab_size: int) -> AlbertConfig:
        """The model's config, for a vocabulary of this size."""
        if self.start_from is not None:
            self._check_overrides(AlbertConfig.from_pretrained(self.start_from))
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

    def _check_overrides(self, of_weights: AlbertConfig) -> None:
        """What shapes the model is the checkpoint's: shared weights would fit another number of layers, too."""
        for name in SIZES:
            found = getattr(of_weights, name)
            value = self.overrides.get(name, found)
            check(
                value == found,
                f"model.overrides has {name} {value} and model.start_from {found}: give model.overrides={{}}, or leave "
                "model.start_from out",
            )


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
        at_least("evaluate.every", self.every, 1)
        at_least("evaluate.rows", self.rows, 1)


@dataclass(frozen=True)
class RowOptions(options.BatchOptions):
    """How many rows make a step, and how long they are.

    Attributes:
        stages: pairs of a share of the run and a length, such as [[0.9, 128], [0.1, 512]], in place of
            examples.length.
    """

    stages: list[tuple[float, int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            LengthStages(self.stages)


@dataclass(frozen=True)
class WatchOptions(options.HealthOptions):
    """What happens when the loss is not finite, or collapses.

    Attributes:
        collapse: nats above the best smoothed loss, for twice as many steps as the smoothing remembers.
        smoothing: of that, per step; 0.98 remembers about 50.
    """

    collapse: float = 0.5
    smoothing: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.collapse > 0, f"health.collapse is {self.collapse}; nats above 0 were expected")


@dataclass(frozen=True)
class PretrainConfig(RunOptions):
    """A run, see `RunOptions`, and:

    Attributes:
        label_smoothing, z_loss: of the masked-LM loss.
        sentence_order_weight: of the second task's gradient. 1 is the original's, whose batches have 4096 rows; of few
            rows that gradient is mostly noise, and larger than the masked-LM loss's.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    sentence_order_weight: float = 1.0
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    examples: ExampleOptions = field(default_factory=ExampleOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    batch: RowOptions = field(default_factory=RowOptions)
    health: WatchOptions = field(default_factory=WatchOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("sentence_order_weight", self.sentence_order_weight, 0)

    def check_complete(self) -> None:
        """Raises ValueError where something has no value yet that has no default."""
        check(bool(self.output), "output is not given: the directory of the run, such as output=runs/mine")
        check(bool(self.data.train), "data.train is not given: a token store, which `albert-fast corpus` makes")
        self.schedule.budget()

    @property
    def stages(self) -> LengthStages:
        return LengthStages(self.batch.stages or [(1.0, self.examples.length)])

    def shape_of(self, vocab_size: int) -> AlbertConfig:
        """The model's config, for a vocabulary of this size and the longest examples."""
        shape, longest = self.model.build(vocab_size), max(length for _, length in self.stages.stages)
        check(
            longest <= shape.max_position_embeddings,
            f"examples are of {longest} tokens and the model has {shape.max_position_embeddings} positions: lower "
            "examples.length, or lengthen the model by `albert-fast extend`",
        )
        return shape

    def examples_of(self, length: int) -> ExampleOptions:
        return replace(self.examples, length=length)


CONFIGURATION = Configuration(PretrainConfig, "albert-fast pretrain", Path(__file__).parent / "presets")
parse, describe, preset_names = CONFIGURATION.parse, CONFIGURATION.describe, CONFIGURATION.preset_names
