"""The JSON files that `albert-fast bench` and `make gpu` write, read back and checked: a damaged one is named."""

from __future__ import annotations

import json
import math
import os
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from albert_fast.bench.work import Row, Work

Kind = TypeVar("Kind")


@dataclass
class Result:
    """What `albert-fast bench --json` writes: see `run.run`."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    options: dict[str, Any]
    text: dict[str, str]
    config: dict[str, Any]
    matrix_gflops: dict[str, float]
    backends: dict[str, dict[str, str]]
    works: list[Work]
    commit: str | None = None


@dataclass
class Formatted:
    """How a figure is written: such as {:,.1f} or {:.2f}x."""

    form: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^{}]*\{:[,.\d]*[efg%]\}[^{}]*", self.form):
            raise _Misfit(f"a form is {_what(self.form)}, not one such as {{:,.1f}}")


@dataclass
class Column(Formatted):
    """Of a stage's tables: a title, and the name of the figure."""

    title: str
    key: str


@dataclass
class Case:
    """One piece of work of a stage. Its rows have a `peer`, `passed`, `reason`, and figures."""

    name: str
    reason: str | None
    rows: list[dict[str, Any]]


@dataclass
class Stage:
    """A stage of `make gpu`. The stage of the tests has `counts` and `failures`, the others cases."""

    status: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    columns: list[Column] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass
class Target(Formatted):
    """A figure that was wanted; `met` is None where it was not measured."""

    text: str
    bound: float
    at_least: bool
    value: float | None
    met: bool | None


@dataclass
class GpuResult:
    """What `make gpu` writes: see benchmarks/gpu.py."""

    date: str
    gpu: str | None
    versions: dict[str, str | None]
    timing: str
    targets: list[Target]
    stages: dict[str, Stage]
    commit: str | None = None


def read(path: str | os.PathLike[str]) -> Result | GpuResult:
    """One file. Fields that are not known are ignored.

    Raises:
        ValueError: it is no JSON, or no such report; with the place where it is not.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON, or of UTF-8
        raise ValueError(f"{path} is no JSON ({error}); what `albert-fast bench --json` writes was expected") from None
    try:
        if isinstance(value, dict) and "stages" in value:
            return _build(GpuResult, value, "")
        result = _build(Result, value, "")
        _check_times(result)
        return result
    except _Misfit as misfit:
        raise ValueError(
            f"{path} is no report of a benchmark: {misfit}; what `albert-fast bench --json` writes was expected"
        ) from None


class _Misfit(Exception):
    """Where a value is not what its annotation says."""


def _build(kind: type[Kind], value: Any, place: str) -> Kind:
    """A dataclass of the JSON object that has its fields."""
    if not isinstance(value, dict):
        raise _Misfit(f"{place or 'all of it'} is {_what(value)}, not an object")
    hints = get_type_hints(kind)
    found = {}
    for each in fields(kind):  # type: ignore[arg-type]
        where = f"{place}.{each.name}" if place else each.name
        if each.name in value:
            found[each.name] = _fit(hints[each.name], value[each.name], where)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise _Misfit(f"it has no {where}")
    return kind(**found)


def _fit(hint: Any, value: Any, place: str) -> Any:
    """The value, where it is of the annotation's type; objects become dataclasses where it says so."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _fit(hint, value, place)
    if is_dataclass(hint):
        return _build(hint, value, place)  # type: ignore[arg-type]
    if origin is list and isinstance(value, list):
        return [_fit(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {name: _fit(arguments[1], item, f"{place}[{name!r}]") for name, item in value.items()}
    wanted = (int, float) if hint is float else origin or hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise _Misfit(f"{place} is {_what(value)}, not {getattr(wanted, '__name__', 'a number')}")
    return value


def _check_times(result: Result) -> None:
    for work in result.works:
        for row in work.rows:
            times = [*([] if row.milliseconds is None else [row.milliseconds]), *(row.all_milliseconds or [])]
            if not all(0 < time < math.inf for time in times):
                raise _Misfit(f"{row.peer}'s times at {work.title} are {', '.join(map(str, times))}")
    for name, rate in result.matrix_gflops.items():
        if not 0 < rate < math.inf:
            raise _Misfit(f"matrix_gflops[{name!r}] is {rate}")


def _what(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


__all__ = ["Case", "Column", "GpuResult", "Result", "Row", "Stage", "Target", "Work", "read"]
