"""What `make gpu` writes for people: a Markdown summary of its JSON, with the targets that were met and missed.

`python benchmarks/gpu_report.py FILE…` prints that of such reports, one after the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_stage import OURS, cell

Report = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure of one peer in one case, and what it should be at least, or at most."""

    text: str
    stage: str
    case: str
    peer: str
    key: str
    bound: float
    at_least: bool
    form: str = "{:,.0f}"

    def value(self, report: Report) -> float | None:
        for case in report["stages"].get(self.stage, {}).get("cases", []):
            if case["name"] == self.case:
                rows = {row["peer"]: row for row in case["rows"]}
                return rows[self.peer].get(self.key) if self.peer in rows else None
        return None

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


_ATTENTION = ("attention", "bfloat16 32x512 12x64 full", OURS)
_TRAINING = ("training", "base 32x512 full")
_LOADED = "chained_microseconds"
_COMPILED = "transformers-compile"

TARGETS = (
    Target("attention forward at 512, TFLOP/s", *_ATTENTION, "forward_tflops", 320, True),
    Target("attention backward at 512, TFLOP/s", *_ATTENTION, "backward_tflops", 250, True),
    Target("loss of 2458 labelled, us", "loss", "2458 of 16384 tokens labelled", OURS, "microseconds", 220, False),
    Target("loss of 16384 labelled, us", "loss", "16384 of 16384 tokens labelled", OURS, "microseconds", 1500, False),
    # Its weights loaded: one replay after the other. Of 128 tokens by what `graphed` takes.
    Target("encoder of 16 tokens, us", "resident", "16 tokens", OURS, _LOADED, 100, False),
    Target("encoder of 128 tokens, us", "resident", "128 tokens", f"{OURS} by Triton", _LOADED, 280, False),
    Target("its barrier, us", "resident", "what it rests on", "grid barrier", "microseconds", 1.5, False, "{:.2f}"),
    Target("base training at 512, MFU", *_TRAINING, f"{OURS} graphed", "mfu", 0.45, True, "{:.1%}"),
    Target("its speed over transformers' torch.compile", *_TRAINING, _COMPILED, "ratio", 1.3, True, "{:.2f}x"),
    Target("that one's memory over ours", *_TRAINING, _COMPILED, "memory_ratio", 2.0, True, "{:.2f}x"),
)


def judged(report: Report) -> list[dict[str, Any]]:
    """Each target with its value, and whether it is met: None where it was not measured, or not on a GPU."""
    found = []
    for target in TARGETS:
        value = None if report["tiny"] else target.value(report)
        met = None if value is None else target.met(value)
        found.append({**asdict(target), "value": value, "met": met})
    return found


def markdown(report: Report) -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    yield f"# GPU benchmark, {report['date'][:10]}, {report['gpu'] or 'no GPU: the script alone was tried'}"
    yield ""
    yield f"Commit {report['commit'] or 'unknown'}; {versions}"
    yield ""
    yield f"Timing: {report['timing']}."
    yield ""
    yield "| target | wanted | measured | |"
    yield "|---|--:|--:|---|"
    for target in report["targets"]:
        wanted = ("≥ " if target["at_least"] else "≤ ") + target["form"].format(target["bound"])
        value = "-" if target["value"] is None else target["form"].format(target["value"])
        verdict = {True: "met", False: "missed", None: "not measured"}[target["met"]]
        yield f"| {target['text']} | {wanted} | {value} | {verdict} |"
    for name, stage in report["stages"].items():
        yield ""
        yield f"## {name}: {stage['status']}, {stage['seconds']:.0f} s"
        yield ""
        yield from _parity(stage) if name == "parity" else _stage(stage)


def _parity(stage: dict[str, Any]) -> Iterator[str]:
    counts = ", ".join(f"{count} {word}" for word, count in stage["counts"].items())
    yield counts or "no test ended"
    for failure in stage["failures"]:
        yield f"- {failure}"


def _stage(stage: dict[str, Any]) -> Iterator[str]:
    facts = ", ".join(f"{name} {value:.4g}" for name, value in stage["facts"].items() if isinstance(value, float))
    if facts:
        yield facts
    if clocks := stage.get("clocks"):
        seen = (f"{name} {low:.0f} to {high:.0f}, median {middle:.0f}" for name, (low, middle, high) in clocks.items())
        yield ""
        yield "nvidia-smi: " + "; ".join(seen)
    for case in stage["cases"]:
        yield ""
        yield f"**{case['name']}**" + (f": {case['reason']}" if case["reason"] else "")
        yield ""
        if not case["rows"]:
            continue
        columns = stage["columns"]
        yield "| | " + " | ".join(column["title"] for column in columns) + " | |"
        yield "|---|" + "--:|" * len(columns) + "---|"
        for row in case["rows"]:
            cells = " | ".join(cell(row, column) for column in columns)
            reason = (row["reason"] or "").replace("|", "\\|")
            yield f"| {row['peer']} | {cells} | {reason} |"
    if stage["status"] != "done" and stage["tail"]:
        yield ""
        yield "```"
        yield from stage["tail"][-15:]
        yield "```"


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(Path(file).read_text())) for file in sys.argv[1:]), end="")
