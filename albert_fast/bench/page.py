"""`albert-fast report RESULTS… -o report.html`: one page of what was measured, that needs nothing else.

`page.html` beside this file is its template: the words, the tables and how they look. The pictures are from `plots`,
and what two results differ in from `comparison`.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albert_fast.bench import results
from albert_fast.bench.checkout import short
from albert_fast.bench.comparison import OURS
from albert_fast.bench.results import GpuResult, Result

if TYPE_CHECKING:
    import jinja2

# Options that the tables show anyway, and where the file was written.
_SHOWN = ("shapes", "modes", "dtypes", "compare", "json")


def write(files: Sequence[str], output: str, *, compare: bool = False) -> None:
    """Writes the page; a reader finds the old one or the new one, never a part.

    Args:
        files: what `albert-fast bench --json` or `make gpu` wrote.
        output: the page.
        compare: whether it begins with what changed from the first file to the second.

    Raises:
        ValueError: a package is missing; a file is no such report, or `output` no place for a page; nothing is written.
        OSError: a file cannot be read, or the page not be written.
    """
    missing = [package for package in ("jinja2", "matplotlib") if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'albert_fast[report]'")
    target = Path(output)
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise ValueError(f"-o is {output!r}; a file in a directory that exists was expected")
    if any(target.exists() and Path(file).exists() and target.samefile(file) for file in files):
        raise ValueError(f"-o is {output!r}, which is one of the results; another file was expected")
    if compare and len(files) != 2:
        raise ValueError(f"--compare got {len(files)} results; two were expected, the earlier one first")
    read = [results.read(file) for file in files]
    for file, result in zip(files, read, strict=True):
        if compare and isinstance(result, GpuResult):
            raise ValueError(
                f"--compare got {file}, a report of `make gpu`; those of `albert-fast bench` were expected"
            )
    html = render(_names(files), read, compare=compare)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def render(names: Sequence[str], read: Sequence[Result | GpuResult], *, compare: bool = False) -> str:
    """The page of results; `names` stand above each."""
    from albert_fast.bench import comparison, plots

    measured = [result for result in read if isinstance(result, Result)]
    return _template().render(
        results=list(zip(names, read, strict=True)),
        compared=comparison.compare(*measured) if compare else None,
        peers=plots.looks(measured),
        plots=plots,
        comparison=comparison,
        is_gpu=lambda result: isinstance(result, GpuResult),
    )


@functools.cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (_facts, _summary, _date, _figure, _digits, _memory, _cell)
    environment.filters.update({"short": short, **{each.__name__.lstrip("_"): each for each in filters}})
    return environment.get_template("page.html")


def _names(files: Sequence[str]) -> list[str]:
    """The files' own names where they differ, else as they were given."""
    names = [Path(file).name.removesuffix(".json") for file in files]
    return names if len(set(names)) == len(names) else list(files)


def _date(text: str) -> str:
    """2026-11-25T04:41:16+00:00 as 25 November 2026, 04:41 UTC; what is no such date as it is."""
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def _facts(result: Result) -> dict[str, str]:
    """What the figures rest on: a name, and a line of text."""
    machine, config = result.machine, result.config
    cpu = f"{machine.get('processor', 'a processor')}, {machine.get('cores', '?')} cores"
    options = [
        name if value is True else f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in result.options.items()
        if name not in _SHOWN and value not in (None, False, [], "")
    ]
    facts = {
        "Machine": f"{machine['gpu']}; {cpu}"
        if machine.get("gpu")
        else f"{cpu}, {machine.get('threads', '?')} threads",
        "Matrix products": ", ".join(f"{rate:,.0f} GFLOP/s {name}" for name, rate in result.matrix_gflops.items()),
        "Model": f"ALBERT of {config.get('num_hidden_layers', '?')} passes, hidden {config.get('hidden_size', '?')}, "
        f"vocabulary {config.get('vocab_size', '?')}",
        "Text": result.text.get("source", "unknown"),
        "Versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "Commit": short(result.commit) if result.commit else "unknown",
        "Backends": "; ".join(
            f"{dtype}: {', '.join(sorted(set(operations.values())))}" for dtype, operations in result.backends.items()
        ),
        "Options": "; ".join(options),
    }
    return {name: text for name, text in facts.items() if text}


def _summary(result: Result) -> list[tuple[str, str]]:
    """A few figures that say how albert_fast stands, each with what it is."""
    floors, ahead = [], []
    for work in result.works:
        times = {row.peer: row.milliseconds for row in work.rows if row.milliseconds is not None}
        ours = times.pop(OURS, None)
        floors += [row.times_floor for row in work.rows if row.peer == OURS and row.times_floor is not None]
        if ours is not None and times:
            ahead.append(min(times.values()) / ours)
    said = []
    if ahead:
        said.append((f"{sum(ratio >= 1 for ratio in ahead)} of {len(ahead)}", "works where albert_fast is the fastest"))
        said.append((f"{_range(ahead)}×", "as fast as the fastest of the others"))
    if floors:
        said.append((_range(floors), "times the floor, albert_fast"))
    if failed := sum(row.passed is False for work in result.works for row in work.rows):
        said.append((str(failed), f"row{'s' * (failed > 1)} failed, without figures"))
    return said


def _range(values: Sequence[float]) -> str:
    return "–".join(dict.fromkeys(_digits(end, 3) for end in (min(values), max(values))))


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else format(value, form) + unit


def _memory(size: int | None) -> str:
    if size is None:
        return "–"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _digits(value: float, count: int = 4) -> str:
    """With so many digits that mean something: 1,370, 651.8 or 4.218."""
    before = math.floor(math.log10(value)) + 1 if value > 0 else 1
    return f"{value:,.{max(count - before, 0)}f}"


def _cell(row: dict[str, Any], column: results.Column) -> str:
    """A figure of `make gpu`."""
    value = row.get(column.key)
    if isinstance(value, (int, float)):
        return column.form.format(value)
    return "–" if value is None else str(value)
