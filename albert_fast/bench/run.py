"""`albert-fast bench`: for each dtype, mode and shape, every peer in turn, parity first."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM
from albert_fast.bench import parity
from albert_fast.bench.arguments import CONFIGS, Options, Shape, options_from
from albert_fast.bench.checkout import commit_of
from albert_fast.bench.data import Batch, load_tokenizer, make_batch, read_text
from albert_fast.bench.flops import Operations, floor, flops, matrix_rate
from albert_fast.bench.formats import FORMATS, name_of
from albert_fast.bench.peers import PEERS, AlbertFast, serving_backends
from albert_fast.bench.report import print_report
from albert_fast.bench.worker import Worker, WorkerError, interleave, median

_REPEATS = {"cpu": 3, "cuda": 20}


@dataclass
class Row:
    """One peer at one piece of work.

    Attributes:
        passed: whether its error is within the limit; None where nothing was computed.
        reason: why there is no figure.
        milliseconds: median of the timed calls, `all_milliseconds`.
        speedup: how many times as fast albert_fast is in the same run; above 1 where it is faster.
        times_floor: milliseconds over the floor's.
        peak_bytes: most memory that its process held, or allocated on the GPU.
    """

    peer: str
    error: float | None = None
    limit: float | None = None
    passed: bool | None = None
    reason: str | None = None
    milliseconds: float | None = None
    all_milliseconds: list[float] | None = None
    tokens_per_second: float | None = None
    speedup: float | None = None
    times_floor: float | None = None
    peak_bytes: int | None = None


@dataclass
class Work:
    """What was asked of every peer, and what it needs at least.

    Attributes:
        gflop: operations that the real tokens need, `attention_gflop` of them products of activations.
        floor_milliseconds: of them, at the rates of the whole run.
    """

    mode: str
    dtype: str
    shape: str
    tokens: int
    fill: float
    labelled: int
    gflop: float
    attention_gflop: float
    floor_milliseconds: float | None
    rows: list[Row]


def main(args: argparse.Namespace) -> int:
    """Runs the command; 1 where a peer of this package computes the wrong thing."""
    options = options_from(args)
    console = Console()
    report = run(options, console)
    print_report(report, console)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {options.json}")
    ours = [row for work in report["works"] for row in work["rows"] if row["peer"] in ("albert_fast", "reference")]
    return 0 if all(row["passed"] for row in ours) else 1


def run(options: Options, console: Console) -> dict[str, Any]:
    """The report: machine, versions, configuration, and a `Work` for each dtype, mode and shape, as plain values."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda' and torch finds no GPU here; cpu was expected")
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _progress(console) as say:
        say("reading the text, and training a vocabulary on it if there is none yet")
        text = read_text(options.text)
        tokenizer = load_tokenizer(options.vocab or _vocabulary_of(options), text)
        config, state_dict = _model(options, len(tokenizer))
        batches = {shape: make_batch(tokenizer, text, shape) for shape in options.shapes}
        _check_lengths(config, options.shapes)
        commit = commit_of(Path(albert_fast.__file__).parent)
        works: list[tuple[Work, Operations]] = []
        rates: dict[torch.dtype, float] = {}
        backends = {}
        for dtype in options.dtypes:
            backends[dtype] = serving_backends(config, device, FORMATS[dtype].activations)
            modes = options.modes if dtype != "int8" else ("inference",)
            # Before and after each work: what follows one precedes the next.
            _probe(dtype, device, rates, say)
            for mode, (shape, batch) in itertools.product(modes, batches.items()):
                labelled = batch.labelled if mode == "training" else 0
                operations = flops(config, batch.lengths, mode == "training", labelled)
                work = _new_work(batch, shape, mode, dtype, operations)
                _measure(work, options, config, state_dict, batch.to(device), say)
                works.append((work, operations))
                _probe(dtype, device, rates, say)
    for work, operations in works:
        # The best rates of the whole run: a machine that others use shows them at times only.
        work.floor_milliseconds = floor(operations, FORMATS[work.dtype], rates) * 1e3
        for row in work.rows:
            row.times_floor = None if row.milliseconds is None else row.milliseconds / work.floor_milliseconds
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": _machine(device),
        "versions": _versions(),
        "options": {**asdict(options), "shapes": [str(shape) for shape in options.shapes]},
        "text": {"source": text.source, "sha256": text.sha256},
        "config": config.to_dict(),
        "matrix_gflops": {name_of(numbers): rate / 1e9 for numbers, rate in rates.items()},
        "backends": backends,
        "works": [asdict(work) for work, _ in works],
    }


def _measure(
    work: Work,
    options: Options,
    config: AlbertConfig,
    state_dict: dict[str, Tensor],
    batch: Batch,
    say: Callable[[str], None],
) -> None:
    """Fills in the rows of `work`."""
    title = f"{work.dtype} {work.mode} {work.shape}"
    device = batch.input_ids.device
    with contextlib.ExitStack() as stack:
        # The processes begin while the oracle is computed.
        workers: dict[str, Worker] = {}
        for name in options.compare:
            row = Row(name, reason=PEERS[name]().refuses(work.mode, work.dtype, device.type))
            work.rows.append(row)
            if row.reason is None:
                workers[name] = Worker(name, config, state_dict, batch, work.mode, work.dtype)
                stack.callback(workers[name].close)
        say(f"{title}: the oracle, in float64")
        expected = parity.oracle(config, state_dict, batch, work.mode)
        ours, theirs = parity.limits(config, state_dict, batch, work.mode, work.dtype, expected)
        for row in work.rows:
            if row.peer not in workers:
                continue
            say(f"{title}: parity of {row.peer}")
            row.limit = ours if issubclass(PEERS[row.peer], AlbertFast) else theirs
            try:
                row.error = parity.error(workers[row.peer].results(), expected)
                row.passed = row.error <= row.limit
                if not row.passed:
                    row.reason = f"wrong: its error is {row.error:.1e}, and at most {row.limit:.1e} was expected"
            except WorkerError as error:
                row.passed, row.reason = False, str(error)
            if not row.passed:
                workers.pop(row.peer).close()
        del expected

        repeats = options.repeats or _REPEATS[device.type]
        seconds = interleave(workers, repeats, lambda name: say(f"{title}: timing {name}"))
        fastest = median(seconds["albert_fast"]) if "albert_fast" in seconds else None
        for row in work.rows:
            if row.peer not in seconds:
                continue
            middle = median(seconds[row.peer])
            row.milliseconds = middle * 1e3
            row.all_milliseconds = [second * 1e3 for second in seconds[row.peer]]
            row.tokens_per_second = work.tokens / middle
            row.speedup = middle / fastest if fastest is not None else None
            row.peak_bytes = workers[row.peer].peak_bytes()


def _probe(dtype: str, device: torch.device, rates: dict[torch.dtype, float], say: Callable[[str], None]) -> None:
    """Raises `rates` to what is seen now, for each kind of numbers that `dtype` computes with."""
    say(f"{dtype}: how fast this machine multiplies matrices")
    for numbers in dict.fromkeys((FORMATS[dtype].products, FORMATS[dtype].attention)):
        rates[numbers] = max(rates.get(numbers, 0.0), matrix_rate(numbers, device))


def _new_work(batch: Batch, shape: Shape, mode: str, dtype: str, operations: Operations) -> Work:
    gflop, attention_gflop = operations.total / 1e9, operations.attention / 1e9
    return Work(mode, dtype, str(shape), batch.tokens, batch.fill, batch.labelled, gflop, attention_gflop, None, [])


def _model(options: Options, vocab_size: int) -> tuple[AlbertConfig, dict[str, Tensor]]:
    """The configuration, without dropout (masks that are drawn differently have no parity), and weights."""
    if options.model is not None:
        model = AlbertForMaskedLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        named = options.config in CONFIGS
        config = getattr(AlbertConfig, options.config)() if named else AlbertConfig.from_json_file(options.config)
        layers = options.layers or config.num_hidden_layers
        torch.manual_seed(0)
        model = AlbertForMaskedLM(replace(config, num_hidden_layers=layers))
    config = replace(
        model.config,
        num_hidden_layers=options.layers or model.config.num_hidden_layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the vocabulary has {vocab_size} pieces and the model {config.vocab_size} rows; no more pieces than rows "
            "were expected: give the model's own --vocab"
        )
    return config, model.state_dict()


def _vocabulary_of(options: Options) -> str | None:
    """--model's own directory, where it holds a vocabulary."""
    if options.model is None:
        return None
    names = ("spiece.model", "tokenizer.json")
    return options.model if any((Path(options.model) / name).is_file() for name in names) else None


def _check_lengths(config: AlbertConfig, shapes: tuple[Shape, ...]) -> None:
    longest = max(shape.length for shape in shapes)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"--shapes has rows of {longest} tokens; the model's {config.max_position_embeddings} positions were "
            "expected at most"
        )


def _machine(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    machine = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _versions() -> dict[str, str]:
    versions = {"albert_fast": albert_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import transformers

        versions["transformers"] = transformers.__version__
    return versions


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows one line of what is going on; on a terminal it is the same line, otherwise each is printed once."""
    if not console.is_terminal:
        seen = set()

        def print_once(text: str) -> None:
            if text not in seen:
                seen.add(text)
                console.print(text, highlight=False)

        yield print_once
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
