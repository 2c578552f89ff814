"""What a fine-tuning run is: the command line, a YAML file, or both.

    albert-fast finetune classification --model DIR --train train.tsv --dev dev.tsv -o OUT epochs=3

Every field has a default but task, model, data.train and output; `albert-fast finetune --keys` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from albert_fast.ops.checks import check
from albert_fast.training import options
from albert_fast.training.configuration import Configuration
from albert_fast.training.options import (
    LogOptions,
    OptimizerOptions,
    RunOptions,
    SaveOptions,
    ScheduleOptions,
    at_least,
)

# The file and the class of each.
TASKS = {
    "classification": "classification.Classification",
    "tagging": "tagging.Tagging",
    "answering": "answering.Answering",
    "choice": "choice.Choice",
    "translation": "translation.Translation",
    "speech": "speech.Speech",
}
EPOCHS = 3.0
PAIRS = ("classification", "answering", "choice")
LEAST_RATE = 2400  # of sound: below, mel bands have no frequency of the FFT
SHAPES = ("base", "large", "xlarge", "xxlarge")


@dataclass(frozen=True)
class DataOptions:
    """What is read.

    Attributes:
        train, dev: files of the task's format; several are read one after the other. Without dev nothing is evaluated,
            and the last checkpoint is the result.
        text, pair, label: columns of tables, by name, or by number from 0 where there is no header. pair None: single
            texts.
        kind: of classification: single (one label each), multi (any number of them) or regression (a number).
        separator: between the labels of `multi` in .tsv and .csv; .jsonl has lists.
        word, tag: columns of CoNLL files, from 0; negative ones count from the end. None: 0 and -1, in .conllu 1 and
            3 (universal parts of speech).
        stride: tokens from one window of a long paragraph to the next.
        normalize: of answering: the softmax goes over a window, or over all windows of a question.
        head: of answering: plain (two scores a token), or v2 (the original's for SQuAD v2).
        null_threshold: how much higher "no answer" must score than the best answer to be said.
        audio: of speech, a file's path, from the table's folder on; `label` is what is said.
        rate: samples a second that all sound is brought to.
        context, question, choices: of multiple choice; null says that there is no context, or no question. choices is a
            list, or columns (ending0,ending1); `label` is the number of the right one, from 0, or its letter.
        passage: what is read of a context: the beginning, as much as there is room for; or the sentence in which the
            choice stands (of several the one with most words of the question).
    """

    train: list[str] = field(default_factory=list)
    dev: list[str] = field(default_factory=list)
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    kind: str = "single"
    separator: str = ","
    word: int | None = None
    tag: int | None = None
    stride: int = 128
    normalize: str = "window"
    null_threshold: float = 0.0
    head: str = "plain"
    context: str | None = "context"
    question: str | None = "question"
    choices: str = "choices"
    passage: str = "beginning"
    audio: str = "audio"
    rate: int = 16000

    def __post_init__(self) -> None:
        options.one_of("data.kind", self.kind, ("single", "multi", "regression"))
        options.one_of("data.head", self.head, ("plain", "v2"))
        at_least("data.stride", self.stride, 1)
        options.one_of("data.normalize", self.normalize, ("window", "question"))
        check(
            self.normalize == "window" or self.head == "plain",
            "data.normalize=question is for data.head=plain: the v2 head says by itself whether there is an answer",
        )
        options.one_of("data.passage", self.passage, ("beginning", "sentence"))
        at_least("data.rate", self.rate, LEAST_RATE)


@dataclass(frozen=True)
class DecodingOptions:
    """How texts are written.

    Attributes:
        beams: kept in each step; 1 is greedy.
        length_penalty: a text's log-probability is divided by ((5 + length) / 6) to this power.
    """

    beams: int = 5
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        at_least("decoding.beams", self.beams, 1)


@dataclass(frozen=True)
class ExitOptions:
    """When a row of a model with early exits may leave: at most one rule; none: after the last pass.

    Attributes:
        patience: passes in a row that give the same label.
        confidence: the label's probability.
    """

    patience: int | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        at_least("exit.patience", self.patience, 1)
        check(
            self.confidence is None or 0 < self.confidence <= 1,
            f"exit.confidence is {self.confidence}; a probability above 0 was expected",
        )
        check(
            self.patience is None or self.confidence is None,
            "exit.patience and exit.confidence are both given; one rule was expected",
        )


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluation on data.dev. The checkpoint that is best there is kept in OUT/best.

    Attributes:
        every: steps between two; None: an epoch. The last step is always evaluated.
        rows: rows of a batch.
    """

    every: int | None = None
    rows: int = 64

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 1)
        at_least("evaluate.rows", self.rows, 1)


@dataclass(frozen=True)
class RowOptions(options.BatchOptions):
    """How many rows make a step."""

    size: int = 32


@dataclass(frozen=True)
class FinetuneConfig(RunOptions):
    """A run, see `RunOptions`, and:

    Attributes:
        task: what is learned.
        model: a checkpoint's directory, with its vocabulary; or, for random weights, a config.json or one of base,
            large, xlarge and xxlarge, with `vocab`.
        overrides: fields of its config, such as {num_hidden_layers: 4}.
        vocab: a sentencepiece model or a directory with one; None: the model's own.
        length: most tokens of a row, special ones included; what is longer is cut, or becomes several rows.
        epochs: how often each example is trained on, in place of schedule.steps; None: as schedule says, and 3 times
            where it says nothing.
        dropout: of the encoder; None: the model's.
        classifier_dropout: before the head; None: the model's.
        matching_heads: numbers of heads that begin by looking for their token in the other segment (`matching`), such
            as [0]: for pairs, and models of little pretraining, in which no head does.
        label_smoothing: of translation.
        r_drop: of classification with one label each: weight of how far apart two answers to a row are, each with its
            own dropout, beside their losses (Liang et al. 2021, arXiv 2106.14448). A step costs twice.
        early_exit: of classification: train a head behind each pass.
        exit: when rows leave such a model.
    """

    task: str = ""
    model: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    vocab: str | None = None
    length: int = 128
    epochs: float | None = None
    dropout: float | None = None
    classifier_dropout: float | None = None
    matching_heads: list[int] = field(default_factory=list)
    label_smoothing: float = 0.1
    r_drop: float = 0.0
    early_exit: bool = False
    exit: ExitOptions = field(default_factory=ExitOptions)
    data: DataOptions = field(default_factory=DataOptions)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    batch: RowOptions = field(default_factory=RowOptions)
    # The original's recipe but for AdamW's bias correction, without which fine-tuning fails for some seeds (Mosbach et
    # al. 2021, arXiv 2006.04884; Zhang et al. 2021, arXiv 2006.05987). The presets are as the original in this, too.
    optimizer: OptimizerOptions = field(
        default_factory=lambda: OptimizerOptions(
            name="adamw", learning_rate=2e-5, weight_decay=0.01, bias_correction=True
        )
    )
    schedule: ScheduleOptions = field(default_factory=lambda: ScheduleOptions(shape="albert", warmup=0.1))
    save: SaveOptions = field(default_factory=lambda: SaveOptions(every=None, seconds=600.0, keep=1))
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.seed < 2**63, f"seed is {self.seed}; a number from 0 was expected, below 2 to the power of 63")
        at_least("length", self.length, 8)
        at_least("r_drop", self.r_drop, 0)
        check(self.epochs is None or self.epochs > 0, f"epochs is {self.epochs}; a number above 0 was expected")

    def check_complete(self) -> None:
        """Raises ValueError where something has no value yet that has no default."""
        options.one_of("task", self.task, tuple(TASKS))
        for name in ("r_drop", "early_exit"):
            check(
                not getattr(self, name) or (self.task == "classification" and self.data.kind == "single"),
                f"{name} is for classification with one label each (data.kind=single)",
            )
        check(
            not self.matching_heads or self.task in PAIRS,
            f"matching_heads is for tasks of two segments: {', '.join(PAIRS)}",
        )
        check(
            self.parallel.tensor == 1 or (self.task != "speech" and not self.early_exit),
            "parallel.tensor is not for speech and early_exit: divide the rows among the processes (parallel.tensor=1)",
        )
        check(
            self.epochs is None or self.schedule.seconds is None,
            "epochs and schedule.seconds are both given; one of them was expected",
        )
        check(bool(self.output), "output is not given: the directory of the run, such as -o runs/mine")
        check(bool(self.model), "model is not given: a checkpoint's directory (--model DIR)")
        check(bool(self.data.train), "data.train is not given: a file of labelled examples (--train FILE)")

    def with_steps(self, rows: int) -> FinetuneConfig:
        """Of `rows` training rows: schedule.steps from the epochs, where they are given or nothing is."""
        schedule, epochs = self.schedule, self.epochs
        if epochs is None:
            if schedule.steps is not None or schedule.seconds is not None:
                return self
            epochs = EPOCHS
        steps = max(1, round(epochs * rows / self.batch.size))
        return replace(self, schedule=replace(schedule, steps=steps))


CONFIGURATION = Configuration(FinetuneConfig, "albert-fast finetune", Path(__file__).parent / "presets")
