"""`make bench-check`: whether this package is as fast, beside PyTorch's reference, as it was when that was committed.

    python -m albert_fast.bench.check [--write] [--only TEXT] [--expected FILE]

Times of one machine mean nothing to another, nor to itself an hour later. So what is compared is the ratio of this
package's time to that of the reference at the same call in the same seconds, turn by turn, A B A B; and it is compared
with ratios of the same kind of machine: instruction set and processor. Whoever has another kind writes its ratios with
`--write` and commits them.

Calls are short and on one thread: one that lasts longer than the system's slice of time, or waits for a second thread
on a core that somebody else has, says more of the others than of itself (benchmarks/NOTES.md).

A case whose ratio is beyond the band is measured again, up to twice, when all others have been: only what is slower
each time is a regression.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import albert_fast
from albert_fast import AlbertConfig, backends, native
from albert_fast.bench.arguments import MODES, Shape, check_target
from albert_fast.bench.case import Case, examine
from albert_fast.bench.checkout import commit_of
from albert_fast.bench.console import make_console, show_findings
from albert_fast.bench.suites.model import ModelCase, Subject
from albert_fast.bench.suites.ops import OPERATIONS, operation_case
from albert_fast.bench.suites.setting import Setting, lengths_of, random_batch
from albert_fast.bench.work import Row
from albert_fast.bench.worker import CPU, Contender, with_threads

if TYPE_CHECKING:
    from rich.console import Console

# How much slower, relative to the reference, is a regression.
BAND = 0.12
ATTEMPTS = 3

# Of a case: turns of each of the two, and how long a turn repeats a short call for.
TURNS = 40
TURN_SECONDS = 0.01
QUIET_TURNS = 5  # that count, at least; a quarter of all otherwise

OURS, THEIRS = "albert_fast", "reference"
EXPECTED = "benchmarks/expected_ratios.json"

Ratios = dict[str, float]


@dataclass(frozen=True)
class Finding:
    """One case: its ratios, newest last, and the committed one."""

    case: str
    ratios: tuple[float, ...]
    expected: float | None
    wrong: str | None = None

    @property
    def change(self) -> float | None:
        """Of the most favourable ratio against the expected one: 0.2 is 20 % slower."""
        return None if self.expected is None or not self.ratios else min(self.ratios) / self.expected - 1.0

    @property
    def failed(self) -> bool:
        return self.wrong is not None or (self.change is not None and self.change > BAND)


# Small, so that most calls end before anybody else gets the core.
CONFIG = AlbertConfig(
    vocab_size=1000,
    embedding_size=64,
    hidden_size=192,
    num_attention_heads=3,
    intermediate_size=768,
    num_hidden_layers=2,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout_prob=0.0,
)
SHAPE = Shape(2, 48)


def cases(config: AlbertConfig = CONFIG, shape: Shape = SHAPE) -> list[Case]:
    """Each operation, and a small model, forward and with gradients, in float32 and on one thread."""
    found: list[Case] = [
        operation_case(operation, config, shape, mode, suite="check", peers=(OURS, THEIRS), threads=1)
        for operation in OPERATIONS
        for mode in MODES
    ]

    def make() -> Subject:
        return Subject(config, Setting().weights(config), random_batch(config, shape, lengths_of(shape)))

    for mode in MODES:
        common: dict[str, Any] = {"suite": "check", "group": "model", "dtype": "float32", "shape": str(shape)}
        found.append(ModelCase(**common, mode=mode, peers=(OURS, THEIRS), here=True, threads=1, make=make))
    return found


# ----------------------------------------------------------------------------------------------------------- measuring


class WrongError(ValueError):
    """This package or the reference computes the wrong thing, which no ratio makes good."""


class Pair:
    """This package and the reference, ready for one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.contenders: dict[str, Contender] = {peer: case.open(peer) for peer in (OURS, THEIRS)}

    def wrong(self) -> str | None:
        """Who computes the wrong thing; builds both."""
        for peer, contender in self.contenders.items():
            row = Row(peer)
            examine(self.case, row, contender)
            if not row.passed:
                return f"{peer}: {row.reason}"
        return None

    def ratio(self, turns: int = TURNS) -> float:
        """The median of the ratios of the quietest turns: the two calls of a turn follow each other, so that what slows
        the machine down slows both, but not alike; a turn is quiet where both are near the best of theirs."""
        taken = []
        for turn in range(turns):
            # Who comes first changes: a clock that falls within a turn is then fair to both.
            order = (OURS, THEIRS) if turn % 2 else (THEIRS, OURS)
            seconds = {peer: self._best(self.contenders[peer].call) for peer in order}
            taken.append((seconds[OURS], seconds[THEIRS]))
        best = [min(seconds) for seconds in zip(*taken, strict=True)]
        taken.sort(key=lambda seconds: seconds[0] / best[0] + seconds[1] / best[1])
        quiet = taken[: max(QUIET_TURNS, turns // 4)]
        return statistics.median(ours / theirs for ours, theirs in quiet)

    @staticmethod
    def _best(call: Callable[[], object]) -> float:
        """Of the calls of a turn the fastest, the first of which warms up: others' work only ever adds."""
        call()
        best, end = float("inf"), time.perf_counter() + TURN_SECONDS
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return best


def attempt(case: Case, turns: int = TURNS) -> float:
    """The ratio of one measurement, with tensors of its own: where they lie in memory matters for as long as they do.

    Raises:
        WrongError: one of the two computes the wrong thing.
    """
    with with_threads(case.threads):
        pair = Pair(case)
        wrong = pair.wrong()
        if wrong is not None:
            raise WrongError(wrong)
        ratio = pair.ratio(turns)
    case.release()
    return ratio


def check(
    chosen: Sequence[Case], expected: Ratios, turns: int = TURNS, say: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """Measures the cases beside the expected ratios, and again, after all others, those that are beyond the band."""
    findings = {case.name: Finding(case.name, (), expected.get(case.name)) for case in chosen}
    for number in range(ATTEMPTS):
        for case in chosen:
            finding = findings[case.name]
            if finding.wrong is not None or (number > 0 and not finding.failed):
                continue
            try:
                finding = replace(finding, ratios=(*finding.ratios, attempt(case, turns)))
            except WrongError as error:
                finding = replace(finding, wrong=str(error))
            findings[case.name] = finding
            say(finding)
    return list(findings.values())


def measure(
    chosen: Sequence[Case], turns: int = TURNS, say: Callable[[Finding], None] = lambda finding: None
) -> Ratios:
    """The ratios to expect: the median of as many measurements as a check may take, minutes apart.

    Raises:
        WrongError: a case computes the wrong thing, of which no ratio is written.
    """
    found: dict[str, tuple[float, ...]] = {case.name: () for case in chosen}
    for _ in range(ATTEMPTS):
        for case in chosen:
            found[case.name] = (*found[case.name], attempt(case, turns))
            say(Finding(case.name, found[case.name], None))
    return {name: statistics.median(ratios) for name, ratios in found.items()}


# --------------------------------------------------------------------------------------------------------- the command


def kind_of_machine() -> str:
    """What ratios depend on: instruction set and processor."""
    from albert_fast.bench.run import machine

    if backends.CPU.unavailable() is not None or native.load() is not None:
        raise ValueError(f"the CPU kernels are not there ({native.load()}): there is nothing to hold against PyTorch")
    return f"{torch.ops.albert_fast_native.isa()} on {machine(CPU)['processor']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make bench-check", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write this machine's ratios in place of comparing them")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases that have this in their name")
    parser.add_argument("--expected", default=EXPECTED, metavar="FILE", help="the ratios (default: %(default)s)")
    args = parser.parse_args(arguments)
    file = Path(args.expected)
    try:
        console = make_console()
        if args.write:
            check_target("--expected", args.expected)
        kind = kind_of_machine()
        known = _read(file)
        chosen = [case for case in cases() if args.only in case.name]
        if not chosen:
            raise ValueError(f"--only is {args.only!r}, and no case has that in its name")
        console.print(f"{kind}; ratios: time of albert_fast over that of PyTorch's reference")
        if args.write:
            return _write(file, known, kind, chosen, console)
        if kind not in known:
            kinds = "".join(f"\n  {name}" for name in known) or " none"
            raise ValueError(
                f"{file} has no ratios of this kind of machine, so that nothing can be said of regressions here. It "
                f"has:{kinds}\n`make bench-check ARGS=--write`, with nothing else running, writes them: commit the file"
            )
        return _compare(known[kind], chosen, console)
    except (ValueError, OSError) as error:
        print(f"make bench-check: {error}", file=sys.stderr)
        return 2


def _read(file: Path) -> dict[str, Any]:
    """What is known of each kind of machine; nothing where there is no file."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:  # of the JSON, or of UTF-8
        raise ValueError(f"--expected is {str(file)!r}, which is damaged ({error}); JSON was expected") from None
    if not isinstance(known, dict) or not all(isinstance(of, dict) and "ratios" in of for of in known.values()):
        raise ValueError(f"--expected is {str(file)!r}, which has no ratios; what --write writes was expected")
    return known


def _write(file: Path, known: dict[str, Any], kind: str, chosen: Sequence[Case], console: Console) -> int:
    with show_findings(console, ATTEMPTS * len(chosen)) as say:
        ratios = measure(chosen, say=lambda finding: say(_line(finding)))
    old = known.get(kind, {}).get("ratios", {})
    known[kind] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit_of(Path(albert_fast.__file__).parent),
        "torch": torch.__version__,
        "ratios": {name: round(ratio, 4) for name, ratio in {**old, **ratios}.items()},
    }
    file.write_text(json.dumps(known, indent=1) + "\n")
    console.print(f"wrote {file}")
    return 0


def _compare(known: dict[str, Any], chosen: Sequence[Case], console: Console) -> int:
    with show_findings(console, len(chosen)) as say:
        findings = check(chosen, known["ratios"], say=lambda finding: say(_line(finding)))
    failed = [finding for finding in findings if finding.failed]
    missing = [finding.case for finding in findings if finding.expected is None]
    if missing:
        console.print(f"not committed, so not compared: {', '.join(missing)}; ARGS=--write adds them")
    if known.get("torch") != torch.__version__:
        console.print(f"the ratios are of torch {known.get('torch')}, this is {torch.__version__}")
    verdict = f"{len(failed)} of {len(findings)} cases failed" if failed else f"{len(findings)} cases, none slower"
    console.print(f"{verdict} (band: {BAND:.0%} of the ratios of {known['date']})")
    return 1 if failed else 0


def _line(finding: Finding) -> str:
    if finding.wrong is not None:
        return f"FAIL {finding.case}: {finding.wrong}"
    ratios = ", ".join(f"{ratio:.3f}" for ratio in finding.ratios)
    if finding.change is None:
        return f"     {finding.case}: {ratios}"
    return f"{'FAIL' if finding.failed else 'ok  '} {finding.case}: {ratios} (expected {finding.expected:.3f}, " + (
        f"{finding.change:+.1%})"
    )


if __name__ == "__main__":
    sys.exit(main())
