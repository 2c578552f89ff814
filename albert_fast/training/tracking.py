"""The records of a run: a file of JSON lines always, a live line, TensorBoard and Weights & Biases when asked for.

`log.jsonl` in the run's directory has one record a line, an object with a "kind" ("train", "evaluation" or "event") and
the "step" that it belongs to. JSON knows no NaN and no infinity: they stand there as "nan", "inf" and "-inf".
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from albert_fast.ops.checks import check

LOG = "log.jsonl"
WANDB_ID = "wandb-id"
SECONDS = 10.0  # between plain lines
REFRESH = 0.2  # seconds between changes of the live line
# Of tasks, in the order in which they are shown.
FIGURES = (
    *("f1", "f1_answerable", "exact_match", "accuracy", "f1_macro", "matthews", "pearson", "spearman"),
    *("bleu", "chrf", "wer", "cer"),
)
BAR = 4, 40  # columns of the bar, at least and at most

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a run's directory, in the order in which they were written.

    A last line that is damaged, by a kill while it was written, is left out.

    Raises:
        ValueError: there is no log, or another line is damaged.
    """
    return [record for record, _ in _lines(Path(run) / LOG)]


class Recorder:
    """Writes down how a run goes. A context manager; `close` ends it.

    Nothing that happens to a record stops a run: lines that a full disk does not take are kept and written when it
    does, after one warning, and a TensorBoard or Weights & Biases that fails is left alone from then on.

    Args:
        directory: of the run; made when it is missing. None records nothing: for all ranks but the first.
        after_step: the run goes on after this step. Records of later steps are cut off, so that each step has one.
            None: the run begins, and the directory must have no records.
        tensorboard: event files in `tensorboard` in the directory.
        wandb: a project of Weights & Biases; the run's name there is the directory's.
        quiet: no lines but warnings.
        config: of the run, for TensorBoard and Weights & Biases.

    Raises:
        ValueError: a package is missing, or Weights & Biases does not begin a run; the directory has records and
            after_step is None; a line of them is damaged.
        OSError: the directory or the log cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        after_step: int | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        quiet: bool = False,
        config: dict[str, Any] | None = None,
    ) -> None:
        self._log: _Log | None = None
        self._sinks: dict[str, _TensorBoard | _WandB] = {}
        self._display = _Display(quiet=quiet or directory is None)
        if directory is None:
            return
        directory = Path(directory).absolute()
        board_module = (
            _module("torch.utils.tensorboard", "tensorboard", "'albert_fast[train]'") if tensorboard else None
        )
        wandb_module = _module("wandb", "wandb", "wandb") if wandb is not None else None
        self._log = _Log(directory, after_step)
        try:
            if board_module is not None:
                self._sinks["TensorBoard"] = _TensorBoard(board_module, directory, after_step, config)
            if wandb_module is not None:
                resumed = after_step is not None
                self._sinks["Weights & Biases"] = _WandB(wandb_module, directory, wandb, resumed, quiet, config)
        except BaseException:
            self.close()
            raise

    def train(self, record: dict[str, Any]) -> None:
        """What was measured in training up to `record["step"]`; values that are None are not known."""
        self._write("train", record)
        self._display.show(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """What was measured on held-out text after `record["step"]`."""
        self._write("evaluation", record)
        self._display.say(evaluation_line(record))

    def event(self, step: int, name: str, message: str) -> None:
        """Something that people should know, such as a finding, or a run that goes on."""
        self._write("event", {"step": step, "name": name, "message": message})
        self._display.say(f"step {step}: {name}: {message}")

    def close(self) -> None:
        self._display.close()
        for name in list(self._sinks):
            self._try(name, lambda sink: sink.close())
        self._sinks.clear()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if self._log is None:
            return
        self._log.append({"kind": kind, **record})
        for name in list(self._sinks):
            self._try(name, lambda sink: sink.write(kind, record))

    def _try(self, name: str, action: Callable[[Any], None]) -> None:
        try:
            action(self._sinks[name])
        except Exception as error:  # whatever it is, training is worth more than its picture
            del self._sinks[name]
            _warn(f"{name} has failed and is left alone from now on; {LOG} goes on: {error!r}")


# The file.


class _Log:
    """Lines at the end of a file, each of them written at once, or kept until that is possible."""

    def __init__(self, directory: Path, after_step: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / LOG
        records = _lines(self.path) if self.path.exists() else []
        check(
            after_step is not None or not records,
            f"{self.path} has the records of a run, up to step {records[-1][0]['step'] if records else 0}: write to "
            "another directory, or remove it to begin anew",
        )
        kept = b"".join(line for record, line in records if after_step is None or record["step"] <= after_step)
        if self.path.exists() and kept != self.path.read_bytes():
            _replace(self.path, kept)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._size = len(kept)  # of whole lines
        self._waiting: list[bytes] = []
        self._warned = False

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps({key: _encoded(value) for key, value in record.items()}, allow_nan=False)
        self._waiting.append(line.encode() + b"\n")
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                line = self._waiting[0]
                self._file.truncate(self._size)  # a full disk may have taken the line's beginning
                if self._file.write(line) != len(line):
                    raise OSError("a line was taken in part")
                self._size += len(line)
                del self._waiting[0]
        except OSError as error:
            if not self._warned:
                _warn(f"{self.path} cannot be written; the run goes on, and its records are kept until it can: {error}")
                self._warned = True

    def close(self) -> None:
        if self._file.closed:
            return
        self._flush()
        if self._waiting:
            _warn(f"{self.path} lacks the last {len(self._waiting)} records, which could not be written")
        with contextlib.suppress(OSError):
            self._file.truncate(self._size)
        with contextlib.suppress(OSError):
            self._file.close()


def _lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """The records and their lines, each of which ends."""
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent} has no {LOG}; the directory of a run was expected") from None
    records: list[tuple[dict[str, Any], bytes]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("kind"), str)):
                raise ValueError('an object with a "kind" was expected')
            if type(record.get("step")) is not int:
                raise ValueError('a whole number as its "step" was expected')
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is damaged: {error}; mend it, or remove the line") from None
        if record["kind"] != "event":
            record = {
                key: _NOT_FINITE.get(value, value) if type(value) is str else value for key, value in record.items()
            }
        records.append((record, line + b"\n"))
    return records


def _encoded(value: Any) -> Any:
    """Numbers of NumPy and PyTorch as Python's, and what JSON has no number for as words."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# The terminal.


def train_parts(record: dict[str, Any]) -> list[str]:
    """The figures of a train record for people, the most important ones first; those that are not known are missing."""

    def part(key: str, form: Callable[[Any], str]) -> Iterator[str]:
        if record.get(key) is not None:
            yield form(record[key])

    return [
        *part("step", lambda value: f"step {value}"),
        *part("masked_lm_loss" if "masked_lm_loss" in record else "loss", lambda value: f"loss {value:.2f}"),
        *part("below_unigram", lambda value: f"unigram {-value:+.2f}"),
        *part("seconds_left", lambda value: f"{_duration(value)} left"),
        *(f"{name.replace('_', ' ')} {record[name]:.3f}" for name in FIGURES if record.get(name) is not None),
        *part("masked_accuracy", lambda value: f"mlm {value:.0%}"),
        *part("sentence_order_accuracy", lambda value: f"sop {value:.0%}"),
        *part("tokens_per_second", lambda value: f"{_count(value)} tok/s"),
        *part("mfu", lambda value: f"MFU {value:.0%}"),
        *part("memory", lambda value: f"{value / 1e9:.{int(value < 1e10)}f} GB"),
    ]


def evaluation_line(record: dict[str, Any]) -> str:
    """An evaluation for people."""
    parts = [part for part in train_parts(record) if not part.startswith("step")]
    ema = ["averaged weights"] if record.get("weights") == "ema" else []
    return f"step {record['step']}: held out: " + ", ".join(parts + ema)


def fitting(parts: list[str], columns: int) -> str:
    """As many of the parts as fit in one line, the last ones left out."""
    while len(parts) > 1 and len(" ".join(parts)) > columns:
        parts = parts[:-1]
    return " ".join(parts)[:columns]


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for large, small, form in (
        (days, hours, "{}d{:02}h"),
        (hours, minutes, "{}h{:02}m"),
        (minutes, seconds, "{}m{:02}s"),
    ):
        if large:
            return form.format(large, small)
    return f"{seconds}s"


def _count(value: float) -> str:
    """3 digits: 950, 12.3k, 4.56M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


class _Display:
    """Lines on stderr: one that is rewritten on a terminal, else one now and then. It never fails."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._live: Any = None
        self._console: Any = None
        self._shown = -math.inf
        self._waiting: dict[str, Any] | None = None  # the last record, where it is not shown yet
        if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
            return
        with contextlib.suppress(ImportError, OSError):
            self._console = importlib.import_module("rich.console").Console(stderr=True)
            live = importlib.import_module("rich.live").Live(console=self._console, auto_refresh=False)
            live.start()
            self._live = live

    def show(self, record: dict[str, Any]) -> None:
        self._waiting = record
        if time.monotonic() - self._shown >= (SECONDS if self._live is None else REFRESH):
            self._draw()

    def say(self, text: str) -> None:
        """A line that stays."""
        with contextlib.suppress(OSError):
            if self._live is not None:
                self._console.print(text, markup=False, highlight=False)
            elif not self.quiet:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._waiting is not None:
            self._draw()
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None
            self.quiet = True

    def _draw(self) -> None:
        record, self._waiting, self._shown = self._waiting, None, time.monotonic()
        assert record is not None
        progress = min(1.0, max(0.0, record.get("progress") or 0.0))
        if self._live is None:
            self.say("  ".join([f"{progress:4.0%}", *train_parts(record)]))
            return
        columns = self._console.width - 1  # the last one is where some terminals break the line
        least, most = BAR
        share = f" {progress:.0%} "
        text = fitting(train_parts(record), columns - least - len(share))
        bar = importlib.import_module("rich.progress_bar").ProgressBar(
            completed=progress, total=1.0, width=min(most, columns - len(share) - len(text))
        )
        table = importlib.import_module("rich.table").Table.grid()
        words = importlib.import_module("rich.text").Text(share + text, no_wrap=True)
        words.highlight_regex(r"[a-zA-Z/]{2,}", "dim")
        table.add_row(bar, words)
        with contextlib.suppress(OSError):
            self._live.update(table, refresh=True)


def _warn(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


# TensorBoard, and Weights & Biases.


def _module(name: str, flag: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"log.{flag} was asked for and {flag} cannot be imported ({error}): pip install {package}"
        ) from None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in record.items()
        if key != "step" and value is not None and not isinstance(value, str)
    }


class _TensorBoard:
    def __init__(self, module: Any, directory: Path, after_step: int | None, config: dict[str, Any] | None) -> None:
        # What TensorBoard has seen of later steps is hidden.
        purge = None if after_step is None else after_step + 1
        self._writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
        if config is not None:
            self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```", after_step or 0)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        if kind == "event":
            self._writer.add_text(record["name"], record["message"], record["step"])
        for key, value in _numbers(record).items():
            self._writer.add_scalar(f"{kind}/{key}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(
        self,
        module: Any,
        directory: Path,
        project: str | None,
        resumed: bool,
        quiet: bool,
        config: dict[str, Any] | None,
    ) -> None:
        file = directory / WANDB_ID
        settings = module.Settings(console="off", silent=quiet)  # its capture of the terminal disturbs the live line
        try:
            self._run = module.init(
                project=project,
                name=directory.name,
                dir=str(directory),
                id=file.read_text().strip() if resumed and file.exists() else None,
                resume="allow",
                config=config,
                settings=settings,
            )
        except module.errors.Error as error:
            raise ValueError(
                f"log.wandb is {project!r} and Weights & Biases does not begin a run: {error}; `wandb login`, or set "
                "WANDB_MODE=offline and `wandb sync` later"
            ) from None
        file.write_text(f"{self._run.id}\n")
        # Steps of a run that goes on come again: as a figure like others, they may.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, record: dict[str, Any]) -> None:
        if kind == "event":
            self._run.log({"step": record["step"], "event": f"{record['name']}: {record['message']}"})
        else:
            figures = {f"{kind}/{key}": value for key, value in _numbers(record).items()}
            self._run.log({"step": record["step"], **figures})

    def close(self) -> None:
        self._run.finish()
