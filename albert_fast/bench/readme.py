"""The README's figures, from committed results: `python -m albert_fast.bench.readme`, or `make readme`, writes them.

Every mark is an HTML comment, and every file is named by its path in benchmarks/results. One mark gives names to
results, for the whole README; a path into the file may follow a "#":

    <!-- results:
    sst2: 2026-11-26-finetuning/classification-sst2/result.json
    loss: 2026-11-26-h200-loss.json#stages.loss.cases
    -->

One is text with references in braces, formatted as in Python: what this command writes between it and its end. It is a
few words, or begins on a line of its own, such as a whole table:

    SST-2: accuracy <!-- = {sst2.mean:.3f} -->0.809<!-- end -->

A path has keys, and in brackets an element of a list: by its name, peer, run or text, by dtype, mode and shape, or by a
field (`[confidence=0.8]`). `{a / b}` is a ratio, `{a + b}` a sum, `{a / 1e9}` another unit (`UNITS`).

One is a table of the works of `albert-fast bench --json`'s reports: what the machine is called, then a report a line.
Of a work that several have, the last one's stands. Before a file may stand a label for its works, after it how the
titles of those that are wanted begin. Lines of heading and text are columns in place of one a peer; peers are names
in them:

    <!-- works: two cores of an AMD EPYC (Zen 3, AVX2)
    PL-BERT: 2026-11-26-cpu-avx2-inside-transformers-plbert-quiet.json float32 inference
    | times as fast | {transformers-sdpa.milliseconds / transformers-accelerated.milliseconds:.2f} |
    -->
    …
    <!-- end -->

`--check` writes nothing, and ends with 1 and the difference where the README is not what the results give.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import string
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albert_fast.bench.arguments import DTYPES, MODES, PRETRAINING
from albert_fast.bench.report import Column, Report, headline, title, works_table

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
END = "<!-- end -->"
UNITS = {"60": 60.0, "1e3": 1e3, "1e6": 1e6, "1e9": 1e9}

_NAMES = re.compile(r"<!-- results:(.*?)-->", re.DOTALL)
_REGION = re.compile(rf"<!-- (works:|=)(.*?)-->(.*?){END}", re.DOTALL)
_REPORT = re.compile(r"(?:(?P<label>[^|]+): )?(?P<file>\S+\.json)(?: (?P<start>.+))?")
_COLUMN = re.compile(r"\| (?P<heading>.+?) \| (?P<text>.+) \|")


def rewritten(readme: str, results: Path) -> str:
    """The README with what its marks ask for."""
    names = _names(readme, results)

    def region(match: re.Match[str]) -> str:
        kind, body, old = match.groups()
        where = f"the mark in line {readme.count(chr(10), 0, match.start()) + 1}"
        if "<!-- " in old:
            raise ValueError(f"{where} has another mark before its end; {END} was expected first")
        block = kind == "works:" or body.startswith("\n")
        line = readme[: match.start()].rpartition("\n")[2]
        if not block and not line.strip(" -*>"):
            raise ValueError(f"{where} begins its line, where Markdown ends the paragraph; put a word before it")
        try:
            lines = [part.strip() for part in body.strip().splitlines()]
            new = _works(lines, results) if kind == "works:" else _Figures(names).format("\n".join(lines))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        if block:
            indent = line[: len(line) - len(line.lstrip())]  # of a list's item
            new = f"\n\n{textwrap.indent(new, indent)}\n\n{indent}"
        return f"<!-- {kind}{body}-->{new}{END}"

    new = _REGION.sub(region, readme)
    begun, ended = len(re.findall("<!-- (?:works:|=)", readme)), readme.count(END)
    if begun != ended:
        raise ValueError(f"{begun} marks begin and {ended} end; one {END} for each was expected")
    return new


def written_by_hand(readme: str) -> str:
    """What no result gives: the README without its marks' figures, but with the words around them in the marks."""

    def words(match: re.Match[str]) -> str:
        kind, body, old = match.groups()
        kept = "\n".join(_without_file(line) for line in body.split("\n")) if kind == "works:" else body
        return re.sub(r"\{[^}]*\}", "", kept) + "\n" * old.count("\n")

    text = _REGION.sub(words, readme)
    return re.sub(r"<!--.*?-->", lambda comment: "\n" * comment.group().count("\n"), text, flags=re.DOTALL)


def _without_file(line: str) -> str:
    report = _REPORT.fullmatch(line)
    return line if report is None else report["label"] or ""


# ----------------------------------------------------------------------------------------------------------- references


def _names(readme: str, results: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for match in _NAMES.finditer(readme):
        for line in match[1].strip().splitlines():
            name, _, source = line.partition(": ")
            file, _, path = source.partition("#")
            if name in found:
                raise ValueError(f"<!-- results: --> has {name!r} twice; another name was expected")
            found[name] = look_up(load(results, file), path)
    return found


def load(results: Path, file: str) -> Any:
    """A .json, or the lines of a .jsonl as a list."""
    path = results / file
    if not path.is_file():
        raise ValueError(f"there is no {file!r} in {RESULTS}; a .json or .jsonl that is there was expected")
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def look_up(value: Any, path: str) -> Any:
    """What a path leads to; exactly one thing, or a ValueError that says what there was."""
    for key, element in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path):
        if isinstance(value, Mapping):
            if (key or element) not in value:
                raise ValueError(f"{path!r} has {key or element!r}; one of {', '.join(value)} was expected")
            value = value[key or element]
        else:
            items = value if isinstance(value, list) else []
            fitting = [item for item in items if _is_called(item, element)]
            if len(fitting) != 1:
                raise ValueError(f"{path!r} has [{element}], which {len(fitting)} elements are; one was expected")
            value = fitting[0]
    return value


def _is_called(item: Mapping[str, Any], name: str) -> bool:
    field, equals, value = name.partition("=")
    if equals:
        return str(item.get(field)) == value
    work = " ".join(str(item.get(key)) for key in ("dtype", "mode", "shape"))
    return name in (work, *(item.get(key) for key in ("name", "peer", "run", "text")))


class _Figures(string.Formatter):
    """Python's format strings, whose fields are the expressions above."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        value, *more = (self._quotient(part) for part in field_name.split(" + "))
        return sum(more, value) if more else value, field_name

    def _quotient(self, text: str) -> Any:
        path, *divisors = text.split(" / ")
        value = look_up(self.names, path)
        for divisor in divisors:
            value /= UNITS[divisor] if divisor in UNITS else look_up(self.names, divisor)
        return value


# --------------------------------------------------------------------------------------------------------------- tables


def _works(lines: Sequence[str], results: Path) -> str:
    """Machine, date and versions of the reports, their works, and links to them."""
    machine, *sources = lines
    reports: dict[str, Report] = {}
    works: dict[str, dict[str, Any]] = {}
    order: dict[str, tuple[int, ...]] = {}
    columns: dict[str, Column] = {}
    labels: list[str] = []
    for line in sources:
        if column := _COLUMN.fullmatch(line):
            columns[column["heading"]] = _column(column["text"])
            continue
        source = _REPORT.fullmatch(line)
        if source is None:
            raise ValueError(f"{line!r} is neither a report, NAME.json, nor a column, | heading | text |")
        report = reports[source["file"]] = load(results, source["file"])
        label = f"{source['label']}: " if source["label"] else ""
        labels.append(label)
        for work in report["works"]:
            if title(work).startswith(source["start"] or ""):
                works[label + title(work)] = work
                order[label + title(work)] = (labels.index(label), *_rank(work))
    links = ", ".join(f"[{Path(file).stem}]({RESULTS}/{file})" for file in reports)
    table = works_table({name: works[name] for name in sorted(works, key=order.__getitem__)}, columns or None)
    return f"{machine}: {headline(list(reports.values()))}\n\n{table}\n\nReports: {links}."


def _rank(work: dict[str, Any]) -> tuple[int, int, int, bool]:
    """By kind of numbers and mode, then small before large, full before ragged."""
    rows, length = work["shape"].partition(":")[0].split("x")
    mode = (*MODES, PRETRAINING).index(work["mode"])
    return DTYPES.index(work["dtype"]), mode, int(rows) * int(length), work["fill"] < 0.999


def _column(text: str) -> Column:
    """Of peers that were not measured, "-"; of those whose numbers were wrong, that they were."""
    fields = [field for _, field, _, _ in string.Formatter().parse(text) if field]
    parts = {part for field in fields for part in re.split(r" [/+] ", field)}
    peers = {part.partition(".")[0] for part in parts - UNITS.keys()}

    def cell(rows: Mapping[str, dict[str, Any]]) -> str:
        used = [rows.get(peer, {"passed": None}) for peer in peers]
        if any(row["passed"] is False for row in used):
            return "no figure: wrong"
        if any(row["passed"] is None for row in used):
            return "-"
        return _Figures(rows).format(text)

    return cell


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m albert_fast.bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("readme", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the README is another")
    args = parser.parse_args(arguments)
    old = args.readme.read_text(encoding="utf-8")
    try:
        new = rewritten(old, args.readme.parent / RESULTS)
    except ValueError as error:
        print(f"{args.readme}: {error}", file=sys.stderr)
        return 2
    if args.check:
        lines = old.splitlines(keepends=True), new.splitlines(keepends=True)
        sys.stdout.writelines(difflib.unified_diff(*lines, "README.md", "README.md from the results"))
        return int(old != new)
    if old != new:
        args.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
