"""The table that `albert-fast bench` prints, from the report that `--json` writes.

`python -m albert_fast.bench.report FILE…` prints the README's table of such reports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from albert_fast.bench.checkout import short

Report = dict[str, Any]

COLUMNS = ("error", "ms", "tokens/s", "x floor", "speed-up", "peak")

NOTE = (
    "error: relative to float64; who is wrong gets no figure. x floor: time over that of the real tokens' operations\n"
    "at the best matrix rate, int8's attention at bfloat16's, or of what must be moved where that takes longer.\n"
    "speed-up: of albert_fast over this row. peak: resident memory of its process; in the suites of ops, data, tasks\n"
    "and scaling what building it and its first call took."
)


def print_report(report: Report, console: Console) -> None:
    """One table: a section for each piece of work, a line for each peer."""
    console.print(_headline(report), highlight=False, soft_wrap=True)
    for work in report["works"]:
        console.print(f"\n[bold]{_title(work)}[/]", highlight=False)
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
                reasons.setdefault((row["peer"], row["reason"]), []).append(_title(work))
    for (peer, reason), (first, *others) in reasons.items():
        rest = f" and {len(others)} more" if others else ""
        console.print(f"{peer}, {first}{rest}: {reason}", highlight=False, soft_wrap=True)
    console.print(NOTE, highlight=False, soft_wrap=True)


def markdown(report: Report) -> str:
    """The same for a README, a line for each piece of work: milliseconds, times the floor, error, peak memory."""
    peers = list(dict.fromkeys(row["peer"] for work in report["works"] for row in work["rows"]))
    lines = [f"| work | floor | {' | '.join(peers)} |", "|---|--:|" + "---|" * len(peers)]
    for work in report["works"]:
        rows = {row["peer"]: row for row in work["rows"]}
        cells = [_summary(rows[peer]) if peer in rows else "" for peer in peers]
        floor = "" if work["floor_milliseconds"] is None else f"{work['floor_milliseconds']:,.1f} ms"
        lines.append(f"| {_title(work)} | {floor} | {' | '.join(cells)} |")
    return "\n".join([_headline(report), "", *lines])


def _summary(row: dict[str, Any]) -> str:
    if row["passed"] is None:
        return "-"
    _, error, milliseconds, _, times_floor, _, peak = _cells(row)
    if row["milliseconds"] is None:
        return f"no figure: error {error}"
    return f"{milliseconds} ms, {times_floor}, {error}, {peak}"


def _headline(report: Report) -> str:
    machine, versions, config = report["machine"], report["versions"], report["config"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f"; commit {short(report['commit'])}" if report.get("commit") is not None else ""
    rates = ", ".join(f"{rate:.0f} GFLOP/s {name}" for name, rate in report["matrix_gflops"].items())
    served = "; ".join(f"{name}: {_served(operations)}" for name, operations in report["backends"].items())
    return (
        f"{report['date'][:10]}, {where}; {packages}{commit}\n"
        f"ALBERT of {config['num_hidden_layers']} passes, hidden {config['hidden_size']}, vocabulary "
        f"{config['vocab_size']}; text: {report['text']['source']}\n"
        f"best matrix rate: {rates}. Backends: {served}"
    )


def _served(operations: dict[str, str]) -> str:
    names = sorted(set(operations.values()))
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({', '.join(o for o, b in operations.items() if b == name)})" for name in names)


def _title(work: dict[str, Any]) -> str:
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
