"""`albert-fast bench`: for each dtype, mode and shape, every peer in turn, parity first. `pretraining` is a mode.

With `--suite` the cases are those of `albert_fast.bench.suites`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.bench import peers, pretraining
from albert_fast.bench.arguments import CONFIGS, DEFAULT_PEERS, PRETRAINING, Options, Shape, options_from
from albert_fast.bench.case import Case, run_case
from albert_fast.bench.checkout import commit_of
from albert_fast.bench.console import make_console, show_progress
from albert_fast.bench.data import Batch, Text, load_tokenizer, make_batch, read_text
from albert_fast.bench.formats import FORMATS, name_of
from albert_fast.bench.peers import serving_backends
from albert_fast.bench.rates import Rates, floor
from albert_fast.bench.report import print_report
from albert_fast.bench.suites import cases_of
from albert_fast.bench.suites.model import ModelCase, Subject
from albert_fast.bench.suites.ops import OperationCase
from albert_fast.bench.suites.setting import Setting
from albert_fast.bench.work import Work
from albert_fast.flops import Operations, flops, matrix_rate

if TYPE_CHECKING:
    from rich.console import Console

_REPEATS = {"cpu": 3, "cuda": 20}


def main(args: argparse.Namespace) -> int:
    """Runs the command; 1 where a peer of this package computes the wrong thing, 130 where Ctrl-C ended it."""
    options = options_from(args)
    console = make_console()
    installed = peers.add_installed()
    own = {plug_in: peers.add(plug_in) for plug_in in options.peers}
    if options.suites:
        report = run_suites(options, console)
    elif options.pretrain:
        report = run(options, console)
    else:
        report = run(replace(options, compare=_compared(options.compare, installed, own)), console)
    # What was measured is kept whatever becomes of the table.
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    print_report(report, console)
    if options.json is not None:
        console.print(f"wrote {options.json}", soft_wrap=True)
    measured, planned = len(report["works"]), report["planned"]
    if measured < planned:
        print(f"albert-fast bench: stopped; the report is of {measured} of {planned} pieces of work", file=sys.stderr)
        return 130
    ours = [row for work in report["works"] for row in work["rows"] if row["peer"] in ("albert_fast", "reference")]
    return 0 if all(row["passed"] for row in ours) else 1


def _compared(
    compare: tuple[str, ...], installed: Sequence[peers.Kind], own: Mapping[str, peers.Kind]
) -> tuple[str, ...]:
    """Those of --compare and of --peer; installed ones, too, unless --compare says who of them."""
    for plug_in, peer in own.items():
        if not issubclass(peer, peers.Peer):
            raise ValueError(
                f"--peer {plug_in} is {peer.name!r}, an OperationPeer; a Peer was expected, for without --suite whole "
                "models are measured: --suite ops measures operations"
            )
    joining = (*(installed if compare == DEFAULT_PEERS else ()), *own.values())
    names = tuple(dict.fromkeys((*compare, *(peer.name for peer in joining if issubclass(peer, peers.Peer)))))
    for name in names:
        if name not in peers.PEERS:
            raise ValueError(f"--compare has {name!r}; {', '.join(peers.PEERS)} was expected")
    return names


def run(options: Options, console: Console) -> dict[str, Any]:
    """The report: machine, versions, configuration, and a `Work` for each dtype, mode and shape, as plain values.

    `planned` says how many works there are, unless Ctrl-C ends the run before.
    """
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
        about = _about(options, text, config)
        works: list[tuple[Work, Operations]] = []
        rates: dict[torch.dtype, float] = {}
        backends = {}
        asked = {
            dtype: [mode for mode in options.modes if (mode, dtype) != ("training", "int8")] for dtype in options.dtypes
        }
        with _until_stopped(works):
            for dtype, modes in asked.items():
                backends[dtype] = serving_backends(config, device, FORMATS[dtype].activations)
                # Before and after each work: what follows one precedes the next.
                probe(dtype, device, rates, say)
                for mode, (shape, batch) in itertools.product(modes, batches.items()):
                    if mode == PRETRAINING:
                        done = _pretrain(options, config, state_dict, batch, shape, say)
                    else:
                        done = _compute(options, config, state_dict, batch.to(device), shape, mode, dtype, say)
                    works.append(done)
                    probe(dtype, device, rates, say)
    for work, operations in works:
        # The best rates of the whole run: a machine that others use shows them at times only.
        work.floor_milliseconds = floor(operations, FORMATS[work.dtype], rates) * 1e3
        for row in work.rows:
            row.times_floor = None if row.milliseconds is None else row.milliseconds / work.floor_milliseconds
    return {
        **about,
        "matrix_gflops": {name_of(numbers): rate / 1e9 for numbers, rate in rates.items()},
        "backends": backends,
        "planned": len(batches) * sum(map(len, asked.values())),
        "works": [asdict(work) for work, _ in works],
    }


def run_suites(options: Options, console: Console) -> dict[str, Any]:
    """The same report of suites, a `Work` for each case."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda' and torch finds no GPU here; cpu was expected")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    setting = Setting(options.quick, device, options.text, options.vocab)
    cases = cases_of(options.suites, setting, options.only)
    _check_parts(options.peers, cases)
    about = _about(options, setting.read, setting.config)
    rates = Rates(device)
    works: list[Work] = []
    repeats = options.repeats or _REPEATS[device.type]
    with show_progress(console, len(cases)) as say, _until_stopped(works):
        for number, case in enumerate(cases, start=1):
            title = f"{case.suite} {number}/{len(cases)}: {case.name}"
            work = run_case(case, repeats, lambda text, title=title: say(f"{title}: {text}"))  # type: ignore[misc]
            # Products again at a suite's end: a machine that others use shows its best rate at times only.
            rates.probe(work, again=number == len(cases) or cases[number].suite != case.suite)
            works.append(work)
            say(f"{title}: {_summary(work)}", done=number)
    for work in works:
        work.floor_milliseconds = rates.floor_milliseconds(work)
        for row in work.rows:
            if row.milliseconds is not None and work.floor_milliseconds is not None:
                row.times_floor = row.milliseconds / work.floor_milliseconds
    products = rates.products.get(torch.get_num_threads(), {})
    dtypes = dict.fromkeys(work.dtype for work in works if work.dtype in FORMATS)
    return {
        **about,
        "matrix_gflops": {name_of(numbers): rate / 1e9 for numbers, rate in products.items()},
        "copy_gbytes": {f"{size} bytes, {n} threads": rate / 1e9 for (n, size), rate in rates.copies.items()},
        "backends": {dtype: serving_backends(setting.config, device, FORMATS[dtype].activations) for dtype in dtypes},
        "planned": len(cases),
        "works": [asdict(work) for work in works],
    }


@contextlib.contextmanager
def _until_stopped(works: Sequence[object]) -> Iterator[None]:
    """Ctrl-C ends what is inside, and the works that were finished before are kept; without any it ends the command."""
    try:
        yield
    except KeyboardInterrupt:
        if not works:
            raise


def _check_parts(plug_ins: Sequence[str], cases: Sequence[Case]) -> None:
    """Who is asked for takes part in a case, at least."""
    for plug_in in plug_ins:
        peer = peers.PLUG_INS[plug_in]
        kind: type[Case] = ModelCase
        what = "a Peer, for --suite model or train"
        if issubclass(peer, peers.OperationPeer):
            kind, what = OperationCase, "an OperationPeer, for the operations that it has, of --suite ops"
        if not any(isinstance(case, kind) and peer.name in case.peers for case in cases):
            raise ValueError(f"--peer {plug_in} is {peer.name!r}, {what}; no such case is chosen")


def _summary(work: Work) -> str:
    """A case in one line: who took how long, who is wrong, and who is absent."""
    parts = []
    for row in work.rows:
        said = {None: "-", False: "WRONG"}.get(row.passed, f"{row.milliseconds or 0.0:.3g} ms")
        parts.append(f"{row.peer} {said}")
    return ", ".join(parts)


def _about(options: Options, text: Text, config: AlbertConfig) -> dict[str, Any]:
    """What was measured, and where."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(Path(albert_fast.__file__).parent),
        "machine": machine(torch.device(options.device)),
        "versions": versions(),
        "options": {**asdict(options), "shapes": [str(shape) for shape in options.shapes]},
        "text": {"source": text.source, "sha256": text.sha256},
        "config": config.to_dict(),
    }


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
    case = ModelCase(
        suite="",
        group="",
        mode=mode,
        dtype=dtype,
        shape=str(shape),
        peers=options.compare,
        device=batch.input_ids.device,
        make=lambda: Subject(config, state_dict, batch),
    )
    work = run_case(
        case, options.repeats or _REPEATS[case.device.type], lambda text: say(f"{dtype} {mode} {shape}: {text}")
    )
    return work, flops(config, batch.lengths, mode == "training", batch.labelled if mode == "training" else 0)


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
