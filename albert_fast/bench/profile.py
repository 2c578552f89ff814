"""`albert-fast profile`: where the time of a step goes, as a Chrome trace and as a table with the floor.

The same step is timed in turn as it is and under PyTorch's profiler, with the recorder of the native steps
(albert_fast/native_trace.py). Of both the fastest counts: what else runs on the machine only ever makes a step slower,
and a difference of two has the noise of both. What the profiled step's operators took, or on a GPU its kernels, is
products, attention, loss and rest; overhead is what the plain step takes beyond that: Python, PyTorch's dispatch and
autograd, on a GPU the time when nothing runs there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, record_function

import albert_fast
from albert_fast import AlbertConfig, backends, native_trace
from albert_fast.bench import timeline
from albert_fast.bench.arguments import ProfileOptions, profile_options_from
from albert_fast.bench.checkout import commit_of
from albert_fast.bench.console import make_console, show_progress
from albert_fast.bench.data import Batch, load_tokenizer, make_batch, read_text
from albert_fast.bench.formats import FORMATS, name_of
from albert_fast.bench.peers import AlbertFast, call, serving_backends
from albert_fast.bench.peers.albert_fast import forced_backend
from albert_fast.bench.report import headline, title
from albert_fast.bench.run import (
    check_lengths,
    floor,
    machine,
    make_model,
    probe,
    versions,
    vocabulary_of,
)
from albert_fast.bench.timeline import ATTENTION, ENCODER, KINDS, LOSS, OVERHEAD, PRODUCTS, Part, Slice
from albert_fast.bench.worker import synchronize
from albert_fast.flops import Operations, flops

if TYPE_CHECKING:
    from rich.console import Console

# A kind's parts that take less than this of the step are not printed.
_LEAST_SHARE = 0.01
# What fits into 80 columns beside the figures.
_NAME_WIDTH = 32

NOTE = (
    "GFLOP: what the real tokens need; of a part: what it did. The floor is that at the best matrix rate. overhead:\n"
    "the step without the profiler, less all above: Python and PyTorch between the operators, or an idle GPU."
)


def main(args: argparse.Namespace) -> int:
    options = profile_options_from(args)
    console = make_console()
    with forced_backend(options.backend):
        report, events = run(options, console)
    Path(options.output).write_text(json.dumps(events))
    if options.work.json is not None:
        Path(options.work.json).write_text(json.dumps(report, indent=1) + "\n")
    print_profile(report, console)
    for file in filter(None, (options.output, options.work.json)):
        console.print(f"wrote {file}", soft_wrap=True)
    return 0


def run(options: ProfileOptions, console: Console) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, as plain values, and the Chrome trace."""
    work = options.work
    known = [backend.name for backend in backends.BACKENDS]
    if options.backend is not None and options.backend not in known:
        raise ValueError(f"--backend is {options.backend!r}; {', '.join(known)} was expected")
    if work.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is 'cuda' and torch finds no GPU here; cpu was expected")
    (shape,), (mode,), (dtype,) = work.shapes, work.modes, work.dtypes
    device = torch.device(work.device)
    if work.threads is not None:
        torch.set_num_threads(work.threads)
    with show_progress(console) as say:
        say("reading the text, and training a vocabulary on it if there is none yet")
        text = read_text(work.text)
        tokenizer = load_tokenizer(work.vocab or vocabulary_of(work), text)
        config, state_dict = make_model(work, len(tokenizer))
        check_lengths(config, work.shapes)
        served = serving_backends(config, device, FORMATS[dtype].activations)
        batch = make_batch(tokenizer, text, shape).to(device)
        peer = AlbertFast()
        peer.build(config, state_dict, dtype, device, batch)
        rates: dict[torch.dtype, float] = {}
        probe(dtype, device, rates, say)
        measured = measure(lambda: call(peer, batch, mode), device, options.steps, say)
        probe(dtype, device, rates, say)
    needed = needed_operations(config, batch, mode)
    numbers = FORMATS[dtype]
    floors = {kind: floor(operations, numbers, rates) for kind, operations in needed.items()}
    step, events = measured.step, measured.trace
    if device.type == "cuda":
        parts = timeline.parts_on_gpu(events["traceEvents"], step, config.vocab_size)
    else:
        parts = timeline.parts_on_cpu(step, config.vocab_size)
    fastest = min(measured.seconds) * 1e3
    accounted = sum(part.nanoseconds for part in parts if part.kind != OVERHEAD)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(Path(albert_fast.__file__).parent),
        "machine": machine(device),
        "versions": versions(),
        "text": {"source": text.source, "sha256": text.sha256},
        "config": config.to_dict(),
        "matrix_gflops": {name_of(numbers): rate / 1e9 for numbers, rate in rates.items()},
        "backends": {dtype: served},
        "work": {
            "mode": mode,
            "dtype": dtype,
            "shape": str(shape),
            "tokens": batch.tokens,
            "fill": batch.fill,
            "labelled": batch.labelled,
        },
        "milliseconds": fastest,
        "all_milliseconds": [seconds * 1e3 for seconds in measured.seconds],
        "profiled_milliseconds": step.duration / 1e6,
        "all_profiled_milliseconds": [nanoseconds / 1e6 for nanoseconds in measured.profiled_nanoseconds],
        "profiled_overhead_milliseconds": (step.duration - accounted) / 1e6,
        "rows": table_rows(parts, fastest, needed, floors),
    }
    return report, events


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass
class Measured:
    """Plain steps and profiled ones, taken in turn.

    Attributes:
        seconds: of each plain step.
        profiled_nanoseconds: of each profiled one.
        step, trace: the fastest of these, and its Chrome trace.
    """

    seconds: list[float]
    profiled_nanoseconds: list[int]
    step: Slice
    trace: dict[str, Any]


def measure(function: Callable[[], object], device: torch.device, steps: int, say: Callable[[str], None]) -> Measured:
    """So many steps of each kind, in turn: a machine whose speed drifts is as slow for the one as for the other."""
    say("the step as it is and under the profiler, in turn")
    for _ in range(2):
        function()  # prepares weights, compiles kernels
    profile(function, device)  # the profiler's own beginning takes a while
    seconds, traces = [], []
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        traces.append(profile(function, device))
    profiled = [timeline.step(events["traceEvents"]) for events in traces]
    step, events = min(zip(profiled, traces, strict=True), key=lambda pair: pair[0].duration)
    return Measured(seconds, [step.duration for step in profiled], step, events)


def profile(function: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The Chrome trace of a step, with the native steps inside it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    spans: list[native_trace.Span] = []
    synchronize(device)
    first = _clocks()
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            spans = stack.enter_context(native_trace.record())
        profiler = stack.enter_context(torch.profiler.profile(activities=activities, record_shapes=True))
        with record_function(timeline.STEP):
            function()
            synchronize(device)
    last = _clocks()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(file))
        result = json.loads(file.read_text())

    def on_the_trace(counted: int) -> int:
        """From perf_counter's nanoseconds to those since the trace's base, which is of Unix time."""
        share = (counted - first[0]) / (last[0] - first[0])
        return round(first[1] - result["baseTimeNanoseconds"] + share * (last[1] - first[1]))

    moved = [span._replace(begin=on_the_trace(span.begin), end=on_the_trace(span.end)) for span in spans]
    timeline.add_native_spans(result["traceEvents"], moved)
    return result


def _clocks() -> tuple[int, int]:
    """perf_counter's nanoseconds, and Unix time's at the same moment."""

    def both() -> tuple[int, int, int]:
        before = time.perf_counter_ns()
        unix = time.time_ns()
        return time.perf_counter_ns() - before, before, unix

    waited, before, unix = min(both() for _ in range(20))
    return before + waited // 2, unix


# ------------------------------------------------------------------------------------------------------------ the table


def needed_operations(config: AlbertConfig, batch: Batch, mode: str) -> dict[str, Operations]:
    """Of the real tokens, by kind."""
    training = mode == "training"
    total = flops(config, batch.lengths, training, batch.labelled if training else 0)
    logits = 2 * batch.labelled * config.embedding_size * config.vocab_size * 3 if training else 0
    return {
        PRODUCTS: Operations(total.products - logits, 0),
        ATTENTION: Operations(0, total.attention),
        LOSS: Operations(logits, 0),
    }


def table_rows(
    parts: list[Part], milliseconds: float, needed: Mapping[str, Operations], floors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each kind, with its parts, the largest first; overhead is what is left of `milliseconds`."""
    operations = {kind: of_kind.total for kind, of_kind in needed.items()}
    floors = dict(floors)
    if any(part.kind == ENCODER for part in parts):
        operations[ENCODER] = operations.pop(PRODUCTS) + operations.pop(ATTENTION)
        floors[ENCODER] = floors.pop(PRODUCTS) + floors.pop(ATTENTION)
    rows = []
    for kind in (ENCODER, *KINDS):
        own = sorted((part for part in parts if part.kind == kind), key=lambda part: -part.nanoseconds)
        if not own and not operations.get(kind):
            continue
        row = _row(kind, sum(part.nanoseconds for part in own) / 1e6, milliseconds, operations.get(kind, 0))
        row["floor_milliseconds"] = floors[kind] * 1e3 if operations.get(kind) else None
        row["parts"] = [
            {**_row(part.name, part.nanoseconds / 1e6, milliseconds, part.operations), "calls": part.calls}
            for part in own
        ]
        rows.append(row)
    left = milliseconds - sum(row["milliseconds"] for row in rows)
    rows.append({**_row(OVERHEAD, left, milliseconds, 0), "floor_milliseconds": None, "parts": []})
    total = _row("step", milliseconds, milliseconds, sum(operations.values()))
    rows.append({**total, "floor_milliseconds": sum(floors.values()) * 1e3, "parts": []})
    return rows


def _row(name: str, milliseconds: float, of: float, operations: int) -> dict[str, Any]:
    rate = operations / milliseconds / 1e6 if operations and milliseconds > 0 else None
    return {
        "name": name,
        "milliseconds": milliseconds,
        "share": milliseconds / of,
        "gflop": operations / 1e9 if operations else None,
        "gflops": rate,
    }


def print_profile(report: dict[str, Any], console: Console) -> None:
    """The table of a report, on a console of `make_console`."""
    from rich.table import Table
    from rich.text import Text

    step, profiled, steps = report["milliseconds"], report["profiled_milliseconds"], len(report["all_milliseconds"])
    console.print(headline([report]), soft_wrap=True)
    said = (
        f": {step:,.1f} ms, the fastest of {steps}; the profiler adds {profiled - step:+,.1f} ms "
        f"({profiled / step - 1:+.1%})"
    )
    console.print(Text.assemble("\n", (title(report["work"]), "bold"), said), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for name in ("ms", "share", "GFLOP", "GFLOP/s", "floor", "x floor"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    for row in report["rows"]:
        table.add_row(*_cells(row), style="bold" if row["name"] == "step" else None)
        for part in row["parts"]:
            if part["share"] >= _LEAST_SHARE:
                name = f"  {part['calls']} x {part['name']}"
                name = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
                table.add_row(*_cells({**part, "name": name}), style="dim")
    console.print(table)
    console.print(NOTE, soft_wrap=True)
    inside = report["profiled_overhead_milliseconds"]
    text = f"In the profiled step itself overhead was {inside:,.1f} ms, the profiler's own included."
    console.print(text, soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    floor = row.get("floor_milliseconds")
    return [
        row["name"],
        cell(row["milliseconds"], "{:,.1f}"),
        cell(row["share"], "{:.1%}"),
        cell(row["gflop"], "{:,.1f}"),
        cell(row["gflops"], "{:,.0f}"),
        cell(floor, "{:,.1f}"),
        cell(row["milliseconds"] / floor if floor else None, "{:.2f}"),
    ]
