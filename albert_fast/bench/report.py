"""The table that `albert-fast bench` prints, from the report that `--json` writes.

`python -m albert_fast.bench.report FILE…` prints a Markdown table of each; the README's join several (bench/readme.py).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albert_fast.bench.checkout import short

if TYPE_CHECKING:
    from rich.console import Console

Report = dict[str, Any]
# Of the rows of a work, by peer, what stands in a column.
Column = Callable[[Mapping[str, dict[str, Any]]], str]

COLUMNS = ("error", "ms", "tokens/s", "x floor", "speed-up", "peak")

NOTE = (
    "error: relative to float64; who is wrong gets no figure. x floor: time over that of the real tokens' operations\n"
    "at the best matrix rate, int8's attention at bfloat16's, or of what must be moved where that takes longer.\n"
    "speed-up: of albert_fast over this row. peak: resident memory of its process; in the suites of ops, data, tasks\n"
    "and scaling what building it and its first call took."
)


def print_report(report: Report, console: Console) -> None:
    """One table: a section for each piece of work, a line for each peer; the console is one of `make_console`."""
    from rich.table import Table

    console.print(headline([report]), soft_wrap=True)
    for work in report["works"]:
        console.print(f"\n{title(work)}", style="bold")
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 0, 0, 1))
        table.add_column("", no_wrap=True, min_width=max(len(row["peer"]) for row in work["rows"]))
        for name in COLUMNS:
            table.add_column(name, justify="right", no_wrap=True, min_width=8)
        for row in work["rows"]:
            table.add_row(*_cells(row))
        console.print(table)
    console.print()
    reasons: dict[tuple[str, str], list[str]] = {}
    for work in report["works"]:
        for row in work["rows"]:
            if row["reason"] is not None:
                reasons.setdefault((row["peer"], row["reason"]), []).append(title(work))
    for (peer, reason), (first, *others) in reasons.items():
        rest = f" and {len(others)} more" if others else ""
        console.print(f"{peer}, {first}{rest}: {reason}", soft_wrap=True)
    console.print(NOTE, soft_wrap=True)


def markdown(report: Report) -> str:
    """The same in Markdown, a line for each piece of work: milliseconds, times the floor, error, peak memory."""
    return f"{headline([report])}\n\n{works_table({title(work): work for work in report['works']})}"


def works_table(works: Mapping[str, dict[str, Any]], columns: Mapping[str, Column] | None = None) -> str:
    """A line for each work, under the name that it is given; without `columns` a column for each peer."""
    if columns is None:
        peers = dict.fromkeys(row["peer"] for work in works.values() for row in work["rows"])
        columns = {peer: _summary_of(peer) for peer in peers}
    lines = [f"| work | floor | {' | '.join(columns)} |", "|---|--:|" + "---|" * len(columns)]
    for name, work in works.items():
        rows = {row["peer"]: row for row in work["rows"]}
        cells = " | ".join(column(rows) for column in columns.values())
        floor = "" if work["floor_milliseconds"] is None else f"{work['floor_milliseconds']:,.1f} ms"
        lines.append(f"| {name} | {floor} | {cells} |")
    return "\n".join(lines)


def _summary_of(peer: str) -> Column:
    return lambda rows: _summary(rows[peer]) if peer in rows else ""


def _summary(row: dict[str, Any]) -> str:
    if row["passed"] is None:
        return "-"
    _, error, milliseconds, _, times_floor, _, peak = _cells(row)
    if row["milliseconds"] is None:
        return f"no figure: error {error}"
    return f"{milliseconds} ms, {times_floor}, {error}, {peak}"


def headline(reports: Sequence[Report]) -> str:
    """Date, machine, versions, commit, model, text and matrix rates; what several reports share is said once."""
    dates = ", ".join(dict.fromkeys(report["date"][:10] for report in reports))
    commits = ", ".join(dict.fromkeys(short(report["commit"]) for report in reports if report.get("commit")))
    named = f"; commit {commits}" if commits else ""
    return (
        f"{dates}, {_each(reports, _where)}; {_each(reports, _packages)}{named}\n"
        f"{_each(reports, _model)}\n"
        f"best matrix rate: {_rates(reports)}. Backends: {_each(reports, _backends)}"
    )


def _each(reports: Sequence[Report], what: Callable[[Report], str]) -> str:
    return "; ".join(dict.fromkeys(part for report in reports for part in what(report).split("; ")))


def _where(report: Report) -> str:
    machine = report["machine"]
    return machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"


def _packages(report: Report) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def _model(report: Report) -> str:
    config = report["config"]
    return (
        f"ALBERT of {config['num_hidden_layers']} passes, hidden {config['hidden_size']}, vocabulary "
        f"{config['vocab_size']}; text: {report['text']['source']}"
    )


def _rates(reports: Sequence[Report]) -> str:
    """Each kind of numbers' rate, from the least to the greatest of the reports."""
    seen: dict[str, set[int]] = {}
    for report in reports:
        for name, rate in report["matrix_gflops"].items():
            seen.setdefault(name, set()).add(round(rate))
    ends = {name: sorted({min(rates), max(rates)}) for name, rates in seen.items()}
    return ", ".join(f"{' to '.join(map(str, rates))} GFLOP/s {name}" for name, rates in ends.items())


def _backends(report: Report) -> str:
    return "; ".join(f"{name}: {_served(operations)}" for name, operations in report["backends"].items())


def _served(operations: dict[str, str]) -> str:
    names = sorted(set(operations.values()))
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({', '.join(o for o, b in operations.items() if b == name)})" for name in names)


def title(work: dict[str, Any]) -> str:
    words = " ".join(filter(None, (work.get("group"), work["dtype"], work["mode"], work["shape"])))
    fill = "" if work["fill"] > 0.999 else f", {work['fill']:.0%} real"
    labels = f", {work['labelled']} labels" if work["mode"] != "inference" and work["labelled"] else ""
    varied = "".join(f", {name} {value:,}" for name, value in work.get("varied", {}).items())
    return f"{words}{fill}{labels}{varied}"


def _memory(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _cells(row: dict[str, Any]) -> list[str]:
    """peer, error, ms, tokens/s, x floor, speed-up, peak."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    wrong = row["passed"] is False
    return [
        row["peer"],
        cell(row["error"], "{:.1e}") + (" WRONG" if wrong else ""),
        cell(row["milliseconds"], "{:,.1f}" if (row["milliseconds"] or 1.0) >= 1.0 else "{:.3f}"),
        cell(row["tokens_per_second"], "{:,.0f}"),
        cell(row["times_floor"], "{:.2f}"),
        cell(row["speedup"], "{:.2f}x"),
        _memory(row["peak_bytes"]),
    ]


if __name__ == "__main__":
    print("\n\n".join(markdown(json.loads(Path(file).read_text())) for file in sys.argv[1:]))
