"""Text files -> parts: .txt, .jsonl and .parquet, zipped or not, cut into pieces of about a million characters.

What becomes a document: a record of a .jsonl or .parquet file is one. In plain text `documents` says it:

    blank   blank lines stand between documents (the original's input); a file without any is one
    file    a file is one; blank lines stand between paragraphs
    line    a line is one

and a file's end ends a document always.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

DOCUMENTS = ("blank", "file", "line")
SENTENCES = ("split", "line")
RECORDS = (".jsonl", ".ndjson", ".parquet")  # endings of files that hold a document a record; others are plain text

PART_CHARACTERS = 1 << 20
LONGEST_LINE = 1 << 20  # bytes: a longer line of plain text is cut at a blank, a file may have no line ends at all
LONGEST_RECORD = 64 << 20  # bytes of a line of .jsonl
READ_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
GO_ON = "run the same command again, it goes on from there"


class CorpusError(ValueError):
    """A text that cannot be read, or a store that cannot be made of it."""


@dataclass(frozen=True)
class Options:
    """How texts are read: see the module. `skip_bad_lines`: count what cannot be read, in place of stopping there."""

    documents: str = "blank"
    sentences: str = "split"
    field: str = "text"
    skip_bad_lines: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--documents", self.documents, DOCUMENTS),
            ("--sentences", self.sentences, SENTENCES),
        ):
            if value not in known:
                raise CorpusError(f"{name} is {value!r}; {', '.join(known[:-1])} or {known[-1]} was expected")


class Source(NamedTuple):
    """A text file, by the name that it was given."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, name: str | os.PathLike[str]) -> Source:
        """Raises CorpusError for what is no readable file."""
        name = os.fspath(name)
        try:
            found = os.stat(name)
            if os.path.isdir(name):
                raise CorpusError(f"{name} is a directory: name its files, such as {os.path.join(name, '*.txt.gz')}")
            with open(name, "rb"):
                pass
        except OSError as error:
            raise CorpusError(f"{name} cannot be read ({error.strerror}): name text files that exist") from None
        if kind_of(name) == ".json":
            raise CorpusError(f"{name} is .json: write one record a line and name it .jsonl")
        return cls(name, found.st_size, found.st_mtime_ns)

    def sha256(self) -> str:
        with open(self.name, "rb") as file:
            return _sha256_of(file)


def kind_of(name: str) -> str:
    """The ending that says how to read it, .gz apart; what is not known is read as plain text."""
    return os.path.splitext(name.removesuffix(".gz"))[1].lower()


class Part(NamedTuple):
    """Some lines of a source, or, at its end, what was found in it.

    Attributes:
        documents: lines; the last document goes on in the next part, the others end.
        same_width: all lines are of one text, and wrapped at one width if they are.
        number: counted from 0 in its source.
        read: bytes of the source that were read so far.
        found: None but at the source's end: its entry in meta.json.
    """

    documents: list[list[str]]
    same_width: bool
    number: int
    read: int
    found: dict[str, Any] | None = None


class _Counted(io.RawIOBase):
    """A file that knows how much of it was read, and the sha256 of that."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.position += count
        return count


class Reader:
    """Reads a source from its beginning to its end, once."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source = source
        self.options = options
        self.skipped = 0
        self.first_skipped: str | None = None
        self._line = 0  # of a file, or row of a parquet table: the last that was begun
        self._read = 0
        self._sha256 = ""

    def parts(self) -> Iterator[Part]:
        """The source in parts, the last one with what was found.

        Raises:
            CorpusError: it is damaged, or has bad lines; the message names the file and the line or row.
        """
        kind = kind_of(self.source.name)
        lines = self._parquet() if kind == ".parquet" else self._lines(records=kind in RECORDS)
        same_width = kind not in RECORDS
        documents: list[list[str]] = [[]]
        size = number = 0
        for line in lines:
            if line is None:
                documents.append([])
            else:
                documents[-1].append(line)
            size += 1 + len(line or "")
            # Cut where a paragraph ends, or else anywhere.
            if size >= 2 * PART_CHARACTERS or (size >= PART_CHARACTERS and not line):
                yield Part(documents, same_width, number, self._read)
                documents, size, number = [[]], 0, number + 1
        self._check_unchanged()
        found = {**self.source._asdict(), "sha256": self._sha256, "skipped": self.skipped}
        # The file's end ends the document.
        yield Part([*documents, []], same_width, number, self.source.size, found)

    def _check_unchanged(self) -> None:
        if Source.of(self.source.name) != self.source:
            raise CorpusError(f"{self.source.name} changed while it was read: wait until it is written, and {GO_ON}")

    def _bad(self, what: str, unit: str = "line") -> None:
        where = f"{self.source.name}, {unit} {self._line}"
        if not self.options.skip_bad_lines:
            raise CorpusError(f"{where}: {what}; mend it, or pass over such lines with --skip-bad-lines")
        self.skipped += 1
        self.first_skipped = self.first_skipped or f"{where}: {what}"

    def _lines(self, *, records: bool) -> Iterator[str | None]:
        """Lines without their ends, and None after each document but the last."""
        zipped = self.source.name.endswith(".gz")
        try:
            with open(self.source.name, "rb", buffering=0) as file:
                counted = _Counted(file)
                stream: Any = io.BufferedReader(counted, READ_BYTES)
                if zipped:
                    unzipped: Any = gzip.GzipFile(fileobj=stream)
                    stream = io.BufferedReader(unzipped, READ_BYTES)
                for line in self._records(stream) if records else self._plain(stream):
                    self._read = counted.position
                    yield line
                self._sha256 = counted.sha256.hexdigest()
        except (EOFError, zlib.error, OSError) as error:
            what = "the gzip data end too early" if isinstance(error, EOFError) else f"it cannot be read on ({error})"
            raise CorpusError(f"{self.source.name}, line {self._line + 1}: {what}; fetch the file anew") from error

    def _plain(self, stream: io.BufferedReader) -> Iterator[str | None]:
        by_line, by_blank = (self.options.documents == name for name in ("line", "blank"))
        rest, within = b"", False
        for piece in itertools.chain(iter(lambda: stream.readline(LONGEST_LINE), b""), [b""]):
            if not within:
                self._line += 1
            ended = piece.endswith(b"\n") or not piece
            line, rest = rest + piece, b""
            if not ended and len(piece) == LONGEST_LINE:
                cut = _place_to_cut(line)
                line, rest = line[:cut], line[cut:]
            if self._line == 1 and not within:
                line = line.removeprefix(BOM)
            whole, within = ended and not within, not ended
            try:
                text = line.decode().rstrip()
            except UnicodeDecodeError as error:
                self._bad(f"byte {error.start} is not UTF-8 ({error.reason})")
                continue
            if by_blank and whole and not text:
                yield None
                continue
            yield text
            if by_line and ended:
                yield None

    def _records(self, stream: io.BufferedReader) -> Iterator[str | None]:
        while line := stream.readline(LONGEST_RECORD):
            self._line += 1
            if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
                self._bad(f"it is longer than {LONGEST_RECORD >> 20} MiB, and one record a line was expected")
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_RECORD)
                continue
            line = line.removeprefix(BOM) if self._line == 1 else line
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                self._bad(f"byte {error.start} is not UTF-8 ({error.reason})")
                continue
            except (ValueError, RecursionError) as error:
                self._bad(f"it is not valid JSON ({error})")
                continue
            if not isinstance(record, dict) or self.options.field not in record:
                has = f"fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
                self._bad(f"it has no field {self.options.field!r} but {has:.200}; name the field with --field")
            elif self._is_text(record[self.options.field], "line"):
                yield from record[self.options.field].split("\n")
                yield None

    def _is_text(self, value: Any, unit: str) -> bool:
        if not isinstance(value, str):
            self._bad(f"{self.options.field!r} is {type(value).__name__} {value!r:.40}; text was expected", unit)
            return False
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                self._bad(f"{self.options.field!r} has half a surrogate pair at character {error.start}", unit)
                return False
        return True

    def _parquet(self) -> Iterator[str | None]:
        name = self.source.name
        try:
            arrow = importlib.import_module("pyarrow")
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise CorpusError(
                f"{name} is parquet, and pyarrow is missing: install it with `pip install pyarrow`"
            ) from None
        try:
            with parquet.ParquetFile(name) as table:
                columns = table.schema_arrow.names
                if self.options.field not in columns:
                    has = f"{', '.join(columns):.200}"
                    raise CorpusError(f"{name} has no column {self.options.field!r} but {has}; name it with --field")
                for batch in table.iter_batches(batch_size=256, columns=[self.options.field]):
                    for value in batch.column(0):
                        self._line += 1
                        self._read = self.source.size * self._line // table.metadata.num_rows
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError as error:
                            self._bad(f"{self.options.field!r} is not UTF-8 ({error.reason})", "row")
                            continue
                        if self._is_text(text, "row"):
                            yield from text.split("\n")
                            yield None
            self._sha256 = self.source.sha256()
        except (arrow.ArrowException, OSError) as error:
            what = f"it is no parquet file, or damaged ({str(error).splitlines()[0]})"
            raise CorpusError(f"{name}, row {self._line + 1}: {what}; fetch it anew") from error


def _sha256_of(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(READ_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _place_to_cut(line: bytes) -> int:
    """After the last blank of a piece of a line, or else before its last character, which may be incomplete."""
    cut = line.rfind(b" ") + 1
    if cut == 0:
        cut = len(line) - 1
        while cut > 1 and line[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut
