"""`albert-fast bench`: for each dtype, mode and shape, every peer in turn, parity first. `pretraining` is a mode."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.bench import parity, pretraining
from albert_fast.bench.arguments import CONFIGS, PRETRAINING, Options, Shape, options_from
from albert_fast.bench.checkout import commit_of
from albert_fast.bench.data import Batch, load_tokenizer, make_batch, read_text
from albert_fast.bench.formats import FORMATS, Format, name_of
from albert_fast.bench.peers import PEERS, AlbertFast, serving_backends
from albert_fast.bench.report import print_report
from albert_fast.bench.work import Row, Work, time_rows
from albert_fast.bench.worker import Worker, WorkerError
from albert_fast.flops import Operations, flops, matrix_rate

_REPEATS = {"cpu": 3, "cuda": 20}


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
    with show_progress(console) as say:
        say("reading the text, and training a vocabulary on it if there is none yet")
        text = read_text(options.text)
        tokenizer = load_tokenizer(options.vocab or vocabulary_of(options), text)
        config, state_dict = make_model(options, len(tokenizer))
        make = pretraining.make_batches if options.pretrain else make_batch
        batches: dict[Shape, Any] = {shape: make(tokenizer, text, shape) for shape in options.shapes}
        check_lengths(config, options.shapes)
        commit = commit_of(Path(albert_fast.__file__).parent)
        works: list[tuple[Work, Operations]] = []
        rates: dict[torch.dtype, float] = {}
        backends = {}
        for dtype in options.dtypes:
            backends[dtype] = serving_backends(config, device, FORMATS[dtype].activations)
            modes = options.modes if dtype != "int8" else ("inference",)
            # Before and after each work: what follows one precedes the next.
            probe(dtype, device, rates, say)
            for mode, (shape, batch) in itertools.product(modes, batches.items()):
                if mode == PRETRAINING:
                    work, operations = _pretrain(options, config, state_dict, batch, shape, say)
                else:
                    work, operations = _compute(options, config, state_dict, batch.to(device), shape, mode, dtype, say)
                works.append((work, operations))
                probe(dtype, device, rates, say)
    for work, operations in works:
        # The best rates of the whole run: a machine that others use shows them at times only.
        work.floor_milliseconds = floor(operations, FORMATS[work.dtype], rates) * 1e3
        for row in work.rows:
            row.times_floor = None if row.milliseconds is None else row.milliseconds / work.floor_milliseconds
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "machine": machine(device),
        "versions": versions(),
        "options": {**asdict(options), "shapes": [str(shape) for shape in options.shapes]},
        "text": {"source": text.source, "sha256": text.sha256},
        "config": config.to_dict(),
        "matrix_gflops": {name_of(numbers): rate / 1e9 for numbers, rate in rates.items()},
        "backends": backends,
        "works": [asdict(work) for work, _ in works],
    }


def floor(operations: Operations, numbers: Format, rates: Mapping[torch.dtype, float]) -> float:
    """Seconds that the operations need at least, at the matrix rate of the numbers that they are done in.

    In int8 only the products with weights are: attention counts at bfloat16's rate.
    """
    return operations.products / rates[numbers.products] + operations.attention / rates[numbers.attention]


def _pretrain(
    options: Options,
    config: AlbertConfig,
    state_dict: dict[str, Tensor],
    batches: Sequence[pretraining.Batch],
    shape: Shape,
    say: Callable[[str], None],
) -> tuple[Work, Operations]:
    """Steps of the training loops; the work is that of one step, the mean of the batches."""
    lengths, labelled, count = pretraining.lengths(batches), pretraining.labelled(batches), len(batches)
    total = flops(config, lengths, True, labelled)
    operations = Operations(total.products // count, total.attention // count)
    fill = sum(lengths) / (len(lengths) * shape.length)
    work = _new_work(shape, PRETRAINING, "float32", operations, sum(lengths) // count, fill, labelled // count)
    device = torch.device(options.device)
    repeats = options.repeats or _REPEATS[device.type]
    pretraining.compare(work, config, state_dict, batches, device, repeats, say)
    return work, operations


def _compute(
    options: Options,
    config: AlbertConfig,
    state_dict: dict[str, Tensor],
    batch: Batch,
    shape: Shape,
    mode: str,
    dtype: str,
    say: Callable[[str], None],
) -> tuple[Work, Operations]:
    """One batch through every peer's model."""
    operations = flops(config, batch.lengths, mode == "training", batch.labelled if mode == "training" else 0)
    work = _new_work(shape, mode, dtype, operations, batch.tokens, batch.fill, batch.labelled)
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
        say(f"{work.title}: the oracle, in float64")
        expected = parity.oracle(config, state_dict, batch, work.mode)
        ours, theirs = parity.limits(config, state_dict, batch, work.mode, work.dtype, expected)
        for row in work.rows:
            if row.peer not in workers:
                continue
            say(f"{work.title}: parity of {row.peer}")
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

        time_rows(work, workers, options.repeats or _REPEATS[device.type], say)
    return work, operations


def probe(dtype: str, device: torch.device, rates: dict[torch.dtype, float], say: Callable[[str], None]) -> None:
    """Raises `rates` to what is seen now, for each kind of numbers that `dtype` computes with."""
    say(f"{dtype}: how fast this machine multiplies matrices")
    for numbers in dict.fromkeys((FORMATS[dtype].products, FORMATS[dtype].attention)):
        rates[numbers] = max(rates.get(numbers, 0.0), matrix_rate(numbers, device))


def _new_work(
    shape: Shape, mode: str, dtype: str, operations: Operations, tokens: int, fill: float, labelled: int
) -> Work:
    gflop, attention_gflop = operations.total / 1e9, operations.attention / 1e9
    return Work(mode, dtype, str(shape), tokens, fill, labelled, gflop, attention_gflop, None, [])


def make_model(options: Options, vocab_size: int) -> tuple[AlbertConfig, dict[str, Tensor]]:
    """The configuration, without dropout (masks that are drawn differently have no parity), and weights."""
    kind: Any = AlbertForPreTraining if options.pretrain else AlbertForMaskedLM
    if options.model is not None:
        model = kind.from_pretrained(options.model, dtype=torch.float32)
    else:
        named = options.config in CONFIGS
        config = getattr(AlbertConfig, options.config)() if named else AlbertConfig.from_json_file(options.config)
        layers = options.layers or config.num_hidden_layers
        torch.manual_seed(0)
        model = kind(replace(config, num_hidden_layers=layers))
    config = replace(
        model.config,
        num_hidden_layers=options.layers or model.config.num_hidden_layers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"the vocabulary has {vocab_size} pieces and the model {config.vocab_size} rows; no more pieces than rows "
            "were expected: give the model's own --vocab"
        )
    return config, model.state_dict()


def vocabulary_of(options: Options) -> str | None:
    """--model's own directory, where it holds a vocabulary."""
    if options.model is None:
        return None
    names = ("spiece.model", "tokenizer.json")
    return options.model if any((Path(options.model) / name).is_file() for name in names) else None


def check_lengths(config: AlbertConfig, shapes: tuple[Shape, ...]) -> None:
    longest = max(shape.length for shape in shapes)
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"--shapes has rows of {longest} tokens; the model's {config.max_position_embeddings} positions were "
            "expected at most"
        )


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores and threads, and the GPU where the device is one: what a report says of where it was made."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    found = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Of what the figures depend on; transformers where it is installed."""
    found = {"albert_fast": albert_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import transformers

        found["transformers"] = transformers.__version__
    return found


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str], None]]:
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
