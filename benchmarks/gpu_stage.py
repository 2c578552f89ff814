"""What the stages of `make gpu` share: a process that goes through cases, and a file that says how far it came.

A case is one piece of work that several peers do: `Stage.run` calls a function with a `Case`, which checks what they
compute, times them in turn and fills in a `Row` for each. Whatever a peer does stays its own failure: an exception
becomes the row's reason. What a process does not survive (an illegal address, a crash, a call that never returns) is
survived by the file: gpu.py starts the stage again, which goes on after the cases that are done, and repeats the one
that was not without the peer that ended it.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_timing import MOST_CALLS, Function, Timed, synchronize, timed
from torch import Tensor

OURS = "albert_fast"

# A peer's step (building, one check, one turn) may take so long, in seconds; compilers need a part of it.
ATTEMPT_SECONDS = 150.0

# A peer that ended the process so often in one stage is not asked any more.
MOST_DEATHS = 3

# What a stage's process ends with when a peer has left the GPU's context unusable.
BROKEN = 70


@dataclass
class Row:
    """One peer in one case.

    Attributes:
        passed: whether it computes the right thing; None where it was not tried.
        error, limit: of what it computes, relative to float64, the worst of all outputs, and what was allowed there.
        reason: why there are no figures, or not all.
        figures: by name; the stage's columns show some of them.
    """

    peer: str
    passed: bool | None = None
    error: float | None = None
    limit: float | None = None
    reason: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """title; a figure's name, or error; a format."""

    title: str
    key: str
    form: str = "{:,.1f}"


@dataclass
class Record:
    """A stage's file.

    Attributes:
        facts: figures of the whole stage.
        current: the case that is being worked on, and `peer` who is at it.
        why: what the process knows of its own end.
        deaths: case, peer (None: nobody's), reason.
    """

    stage: str
    facts: dict[str, Any] = field(default_factory=dict)
    columns: list[dict[str, str]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] | None = None
    peer: str | None = None
    why: str | None = None
    deaths: list[list[str | None]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Record:
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(file)


def bury(file: Path, why: str) -> bool:
    """Enters who was at work when the stage's process ended; False where nobody was, or nothing was written."""
    if not file.exists():
        return False
    record = Record.read(file)
    if record.current is None:
        return False
    record.deaths.append([record.current["name"], record.peer, record.why or why])
    record.write(file)
    return True


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected; infinite where something is not finite."""
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    return error if math.isfinite(error) else math.inf


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


class Case:
    """The work, and a row for each peer."""

    def __init__(self, stage: Stage, name: str, work: dict[str, Any], peers: Sequence[str]) -> None:
        self.stage = stage
        self.name = name
        self.work = work
        self.reason: str | None = None
        self.rows = {peer: Row(peer, reason=stage.death(name, peer)) for peer in peers}

    def standing(self) -> list[Row]:
        """Who has not failed."""
        return [row for row in self.rows.values() if row.reason is None]

    @contextmanager
    def attempt(self, row: Row | None, seconds: float = ATTEMPT_SECONDS) -> Iterator[None]:
        """What runs inside is the row's own: what it raises becomes its reason, and if it ends the process, or takes
        longer than `seconds`, the next process knows whose it was."""
        self.stage.enter(self, row)
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            yield
            synchronize(self.stage.device)  # or the next one would be blamed
        except Exception as error:
            if row is None:
                raise
            self.fail(row, one_line(error))
            self.stage.leave_if_broken(one_line(error))
            error.__traceback__ = None  # and with it the tensors of its frames
            self.stage.free()
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.stage.enter(self, None)

    def fail(self, row: Row, reason: str) -> None:
        row.reason = reason
        print(f"  {row.peer}: {reason}", flush=True)

    def judge(self, row: Row, errors: Mapping[str, float], limits: Mapping[str, float]) -> None:
        """Enters the error that comes nearest to its limit, or is farthest beyond it."""
        worst = max(errors, key=lambda name: errors[name] / limits[name])
        row.error, row.limit = errors[worst], limits[worst]
        row.passed = all(errors[name] <= limits[name] for name in errors)  # False for NaN
        if not row.passed:
            self.fail(row, f"wrong: the error of {worst} is {row.error:.1e}, and at most {row.limit:.1e} was expected")

    def interleave(
        self, how: str, functions: Mapping[str, Function], turns: int = 5, most_calls: int = MOST_CALLS
    ) -> dict[str, Timed]:
        """Times what stands of the peers' functions, in turns; who fails on the way is left out."""
        turns = 2 if self.stage.tiny else turns
        found: dict[str, Timed] = {}
        for peer, function in functions.items():
            row = self.rows[peer]
            if row.reason is None:
                with self.attempt(row):
                    found[peer] = timed(how, function, self.stage.device, most_calls)
                    found[peer].warm_up()
        for _ in range(turns):
            for peer, one in found.items():
                if self.rows[peer].reason is None:
                    with self.attempt(self.rows[peer]):
                        one.turn()
        return {peer: one for peer, one in found.items() if self.rows[peer].reason is None}

    def plain(self) -> dict[str, Any]:
        rows = [{**asdict(row), **row.figures} for row in self.rows.values()]
        for row in rows:
            del row["figures"]
        return {"name": self.name, "work": self.work, "reason": self.reason, "rows": rows}


class Stage:
    """A stage's process.

    Attributes:
        tiny: whether small shapes stand in for the real ones, to try the code.
    """

    def __init__(self, name: str, columns: Sequence[Column], arguments: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(description=f"The stage {name!r} of `make gpu`, which see.")
        parser.add_argument("--file", type=Path, required=True, help="what was measured; goes on from what it holds")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--tiny", action="store_true", help="small shapes, to try the code")
        parser.add_argument("--seconds", type=float, default=600.0, help="no case is begun after that")
        parser.add_argument("--only", default="", help="only cases whose names hold one of these words, a|b")
        parser.add_argument("--without", default="", help="no peers whose names hold one of these words, a|b")
        options = parser.parse_args(arguments)
        self.device = torch.device(options.device)
        self.tiny: bool = options.tiny
        self.file: Path = options.file
        self._only = options.only.split("|")
        self._without = [word for word in options.without.split("|") if word]
        self._end = time.monotonic() + options.seconds
        if self.file.exists():
            self.record = Record.read(self.file)
            self.record.current = self.record.peer = self.record.why = None
        else:
            self.record = Record(name, columns=[asdict(column) for column in columns])
        self.columns = columns
        self.facts["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        torch.manual_seed(0)
        if self.tiny:
            torch.set_num_threads(1)

    @property
    def facts(self) -> dict[str, Any]:
        return self.record.facts

    def write(self) -> None:
        self.record.write(self.file)

    def death(self, case: str, peer: str | None) -> str | None:
        """Why `peer` is not asked in this case, or the case (peer None) not begun."""
        here = [why for name, who, why in self.record.deaths if (name, who) == (case, peer)]
        if here:
            return here[-1]
        everywhere = [why for _, who, why in self.record.deaths if who == peer and who is not None]
        if len(everywhere) >= MOST_DEATHS:
            return f"not asked: it ended the process {len(everywhere)} times ({everywhere[-1]})"
        return None

    def enter(self, case: Case, row: Row | None) -> None:
        self.record.current, self.record.peer = case.plain(), None if row is None else row.peer
        self.write()

    def leave_if_broken(self, why: str) -> None:
        """Ends the process where the GPU answers nobody any more."""
        try:
            synchronize(self.device)
        except Exception:
            self.record.why = why
            self.write()
            print("the GPU's context is lost: the stage is to be started again", flush=True)
            sys.stdout.flush()
            os._exit(BROKEN)

    def run(self, name: str, work: dict[str, Any], peers: Sequence[str], function: Callable[[Case], None]) -> None:
        """Does a case, unless it is done or not asked for."""
        if any(case["name"] == name for case in self.record.cases) or not any(word in name for word in self._only):
            return
        case = Case(self, name, work, [peer for peer in peers if not any(word in peer for word in self._without)])
        case.reason = self.death(name, None)
        if case.reason is None and time.monotonic() > self._end:
            case.reason = "no time was left"
        if case.reason is None:
            try:
                self.enter(case, None)
                function(case)
            except Exception as error:
                case.reason = one_line(error)
                self.leave_if_broken(case.reason)
        self.record.cases.append(case.plain())
        self.record.current = None
        self.write()
        self.free()
        print("\n".join(table(self.record.cases[-1], self.record.columns)), flush=True)

    def free(self) -> None:
        """Gives back the GPU's memory that nobody holds."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def table(case: dict[str, Any], columns: Sequence[Mapping[str, str]]) -> list[str]:
    """A case as lines of text."""
    lines = [f"{case['name']}" + (f": {case['reason']}" if case["reason"] else "")]
    if not case["rows"] or (case["reason"] and all(row["passed"] is None for row in case["rows"])):
        return lines
    cells = [["", *(column["title"] for column in columns)]]
    cells += [[row["peer"], *(cell(row, column) for column in columns)] for row in case["rows"]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line, row in zip(cells, [None, *case["rows"]], strict=True):
        rest = "  ".join(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        why = f"  {row['reason']}" if row is not None and row["reason"] else ""
        lines.append(f"  {line[0].ljust(widths[0])}  {rest}{why}")
    return lines


def cell(row: Mapping[str, Any], column: Mapping[str, str]) -> str:
    value = row.get(column["key"])
    if value is None:
        return "-"
    return column["form"].format(value) if not isinstance(value, str) else value
