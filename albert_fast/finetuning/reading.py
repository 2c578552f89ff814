"""Files of labelled examples: tables and columns of words. What cannot be read is named by file and line.

Any file may be compressed (.gz). Tables are .tsv (tabs alone, no quotes, as GLUE's), .csv or .jsonl; CoNLL files have a
word a line, columns apart by tabs or blanks, and an empty line after each sentence.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


class DataError(ValueError):
    """A file of examples is not what it should be; the message names file and line."""


@dataclass(frozen=True)
class Place:
    """Where something was read: a line's number, or the name of an entry."""

    path: Path
    line: int | str

    def __str__(self) -> str:
        return f"{self.path}, {f'line {self.line}' if isinstance(self.line, int) else self.line}"

    def refuse(self, why: str) -> NoReturn:
        raise DataError(f"{self}: {why}")


@dataclass(frozen=True)
class Record:
    """A row of a table: its fields by name, or by number ("0", "1" …) where the file has no header."""

    place: Place
    fields: dict[str, Any]

    def get(self, column: str) -> Any:
        """The field; the error says which ones there are."""
        if column not in self.fields:
            self.place.refuse(f"there is no {column!r}; it has {', '.join(map(repr, self.fields)) or 'nothing'}")
        return self.fields[column]

    def text(self, column: str) -> str:
        value = self.get(column)
        if not isinstance(value, str):
            self.place.refuse(f"{column!r} is {value!r}; a text was expected")
        return value


def read_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The lines of a text file, without their ends: \\n or \\r\\n. A \\r elsewhere is a character like others."""
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                yield Place(path, number), line.removesuffix("\n").removesuffix("\r")
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number + 1}: this is not UTF-8 ({error.reason}): convert the file") from None


def read_table(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """The rows of a .tsv, .csv or .jsonl file.

    Args:
        columns: the names that are wanted. Where they all are numbers, a table has no header; else its first line is
            one.

    Raises:
        DataError: a line has another number of fields than the first, or is no JSON object.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind == ".jsonl":
        yield from _objects(path)
        return
    if kind not in (".tsv", ".csv", ".txt"):
        raise DataError(f"{path} is {kind or 'without a suffix'}; .tsv, .csv or .jsonl was expected, or one with .gz")
    rows: Iterable[tuple[Place, list[str]]]
    rows = _quoted(path) if kind == ".csv" else ((place, line.split("\t")) for place, line in read_lines(path) if line)
    header: list[str] | None = None
    for place, row in rows:
        if header is None:
            numbered = all(column.isdigit() for column in columns)
            header = [str(i) for i in range(len(row))] if numbered else row
            if not numbered:
                for column in columns:
                    if column not in row:
                        place.refuse(
                            f"the header has {', '.join(map(repr, row))} and no {column!r}: name the columns, or "
                            "number them from 0 where there is no header (data.text=1 data.label=0)"
                        )
                continue
        if len(row) != len(header):
            place.refuse(f"it has {len(row)} fields; {len(header)} were expected, as in the first line")
        yield Record(place, dict(zip(header, row, strict=True)))


def _objects(path: Path) -> Iterator[Record]:
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            place.refuse(f"this is no JSON: {error}")
        if not isinstance(found, dict):
            place.refuse(f"it holds {type(found).__name__}; an object was expected")
        yield Record(place, found)


def _quoted(path: Path) -> list[tuple[Place, list[str]]]:
    text = "\n".join(line for _, line in read_lines(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, begin = [], 1
    usual = csv.field_size_limit(max(len(text), 1))  # of all readers: 131072 is little for a document
    try:
        for row in reader:
            if row:
                rows.append((Place(path, begin), row))
            begin = reader.line_num + 1
    except csv.Error as error:
        Place(path, begin).refuse(f"{error}: a quote is not closed, or stands alone")
    finally:
        csv.field_size_limit(usual)
    return rows


@dataclass(frozen=True)
class Sentence:
    """Words with a label each (None: the file has none), and the line of each (none: they are all `place`'s)."""

    place: Place
    words: list[str]
    labels: list[str] | None
    lines: tuple[int, ...] = ()

    def place_of(self, word: int) -> Place:
        return Place(self.place.path, self.lines[word]) if self.lines else self.place


def read_columns(path: Path, word: int, label: int | None) -> Iterator[Sentence]:
    """The sentences of a CoNLL file. CoNLL-U's comments, multiword tokens (1-2) and empty nodes (1.1) are left out.

    A separator is a line without anything but blanks. A line that begins with "# " between sentences is a comment, but
    where it has the columns and the label of another line. -DOCSTART- lines are left out.

    Args:
        word, label: their columns, from 0; negative ones count from the end. label None: not read.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    universal = kind == ".conllu"
    words: list[str] = []
    labels: list[str] = []
    lines: list[int] = []
    width = 0  # of the whole file
    # "# O" is a row; "# id 17 domain=train" is none, though it may have as many columns.
    telling = -1 if label is None else label
    kinds = {_kind(line, telling) for _, line in read_lines(path) if line.strip() and not line.startswith("# ")}

    def sentence() -> Sentence:
        return Sentence(Place(path, lines[0]), words, None if label is None else labels, tuple(lines))

    for place, line in read_lines(path):
        if not line.strip():
            if words:
                yield sentence()
            words, labels, lines = [], [], []
            continue
        if universal and line.startswith("#"):
            continue
        if not words and line.startswith("# ") and _kind(line, telling) not in kinds:
            continue
        fields = _fields(line)
        if fields[0] == "-DOCSTART-" or (universal and not fields[0].isdigit()):
            continue
        width = width or len(fields)
        if len(fields) != width:
            place.refuse(f"it has {len(fields)} columns; {width} were expected, as in the lines before")
        for name, column in (("word", word), ("label", label)):
            if column is not None and not -width <= column < width:
                place.refuse(f"it has {width} columns, and the {name}'s is number {column}")
        if label is not None and word % width == label % width:
            place.refuse(f"it has {width} columns, so that a word and its label are one: one for each was expected")
        assert isinstance(place.line, int)
        lines.append(place.line)
        words.append(fields[word])
        if label is not None:
            labels.append(fields[label])
    if words:
        yield sentence()


def _fields(line: str) -> list[str]:
    """The columns, without the blanks around them: one behind a label would make another label of it."""
    return [field.strip() for field in line.split("\t")] if "\t" in line else line.split()


def _kind(line: str, column: int) -> tuple[int, str]:
    """How many columns it has, and what stands in one of them."""
    fields = _fields(line)
    return len(fields), fields[column] if -len(fields) <= column < len(fields) else ""
