"""The token store: a corpus as ids on disk, mapped into memory, with offsets of its sentences and documents.

A directory with

    tokens.bin            uint16 (a vocabulary of at most 65536 pieces) or uint32, little-endian: every document's
                          tokens, one after the other, without special tokens
    sentence_offsets.bin  int64 [sentences + 1]: where sentences begin in the tokens, and where the last one ends
    document_offsets.bin  int64 [documents + 1]: where documents begin in the sentences, and where the last one ends
    meta.json             counts, dtype, vocab_size, and what the writer adds: of `albert-fast corpus`, its sources with
                          their sizes, times and sha256, its options, and the vocabulary's sha256

and the vocabulary's own files, where it was made by that command. meta.json is written last: a directory without it is
no store. Masks, pairs and packing are made from it anew in each epoch, so nothing of them is stored.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

VERSION = 1
META = "meta.json"
TOKENS, SENTENCES, DOCUMENTS = FILES = ("tokens.bin", "sentence_offsets.bin", "document_offsets.bin")
OFFSET = np.dtype("<i8")
BUFFER = 1 << 20  # bytes of each file that the writer holds back


class StoreError(ValueError):
    """A token store that is missing, unfinished, damaged or in the way."""


class Counts(NamedTuple):
    """How much of a store there is. Sentences after the last document's end belong to one that goes on."""

    tokens: int = 0
    sentences: int = 0
    documents: int = 0


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the two dtypes that holds each id."""
    if vocab_size < 1 or vocab_size > 1 << 32:
        raise StoreError(f"vocab_size is {vocab_size}; 1 to 2**32 was expected")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenStore:
    """A corpus as ids: tokens of all documents one after the other, and where sentences and documents begin.

    Attributes:
        tokens: uint16 or uint32 [tokens], mapped from the file; no special tokens.
        sentence_offsets: int64 [sentences + 1], into tokens; sentence s is tokens[offsets[s]:offsets[s + 1]].
        document_offsets: int64 [documents + 1], into sentences.
        vocab_size: pieces of the vocabulary; each token is less.
        directory: where it lies, or None in memory.
        meta: the content of meta.json; empty in memory.

    No sentence and no document is empty. A store with a directory is pickled as its name, and opened anew.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sentence_offsets: np.ndarray,
        document_offsets: np.ndarray,
        vocab_size: int,
        directory: Path | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.tokens = tokens
        self.sentence_offsets = sentence_offsets
        self.document_offsets = document_offsets
        self.vocab_size = vocab_size
        self.directory = directory
        self.meta = meta or {}

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> TokenStore:
        """Maps a store; what is in its files is read when it is looked at.

        Raises:
            StoreError: there is no store, it was not finished, or its files are not what meta.json says.
        """
        directory = Path(directory).absolute()
        meta = read_meta(directory)
        try:
            counts = Counts(*(int(meta[name]) for name in Counts._fields))
            vocab_size = int(meta["vocab_size"])
            dtype = token_dtype(vocab_size)
            agree = min(counts) >= 0 and meta["dtype"] == dtype.name
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(directory / META, repr(error)) from error
        if not agree:
            raise _damaged(directory / META, f"its counts or its dtype {meta['dtype']!r} are not a store's")
        tokens = _mapped(directory / TOKENS, dtype, counts.tokens)
        sentences = _mapped(directory / SENTENCES, OFFSET, counts.sentences + 1)
        documents = _mapped(directory / DOCUMENTS, OFFSET, counts.documents + 1)
        for name, offsets, end in (
            (SENTENCES, sentences, counts.tokens),
            (DOCUMENTS, documents, counts.sentences),
        ):
            if offsets[0] != 0 or offsets[-1] != end:
                raise _damaged(directory / name, f"it runs from {offsets[0]} to {offsets[-1]}, not from 0 to {end}")
        return cls(tokens, sentences, documents, vocab_size, directory, meta)

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[Sequence[int]]], vocab_size: int) -> TokenStore:
        """A store in memory, from documents of sentences of ids; empty ones are dropped.

        Raises:
            StoreError: an id is outside the vocabulary.
        """
        dtype = token_dtype(vocab_size)
        sentences: list[np.ndarray] = []
        ends = [0]
        for document in documents:
            sentences += [checked_ids(sentence, vocab_size).astype(dtype) for sentence in document if len(sentence)]
            if len(sentences) > ends[-1]:
                ends.append(len(sentences))
        lengths = np.array([len(sentence) for sentence in sentences], dtype=OFFSET)
        offsets = np.concatenate([np.zeros(1, OFFSET), lengths.cumsum(dtype=OFFSET)])
        tokens = np.concatenate(sentences) if sentences else np.empty(0, dtype)
        return cls(tokens, offsets, np.array(ends, dtype=OFFSET), vocab_size)

    def part(self, first: int, last: int) -> TokenStore:
        """Documents `first` to `last` (not included) as a store of their own; the tokens stay where they are."""
        if not 0 <= first < last <= len(self):
            raise StoreError(f"documents {first} to {last} were asked for; the store has 0 to {len(self)}")
        documents = self.document_offsets[first : last + 1]
        sentences = self.sentence_offsets[documents[0] : documents[-1] + 1]
        tokens = self.tokens[sentences[0] : sentences[-1]]
        return TokenStore(tokens, sentences - sentences[0], documents - documents[0], self.vocab_size, meta=self.meta)

    def __len__(self) -> int:
        """Documents."""
        return len(self.document_offsets) - 1

    def __getitem__(self, document: int) -> list[np.ndarray]:
        """The sentences of a document, views of the tokens."""
        if not 0 <= document < len(self):
            raise IndexError(f"document is {document}; 0 to {len(self) - 1} was expected")
        first, last = self.document_offsets[document : document + 2]
        offsets = self.sentence_offsets[first : last + 1]
        return [self.tokens[start:end] for start, end in itertools.pairwise(offsets)]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.directory is not None:
            return TokenStore.open, (self.directory,)
        return TokenStore, (self.tokens, self.sentence_offsets, self.document_offsets, self.vocab_size)

    def __repr__(self) -> str:
        return (
            f"TokenStore({len(self.tokens)} tokens, {len(self.sentence_offsets) - 1} sentences, {len(self)} documents, "
            f"vocab_size={self.vocab_size}, {self.directory or 'in memory'})"
        )


class StoreWriter:
    """Writes a store piece by piece; its memory does not grow with it.

    Args:
        directory: made when it is missing.
        vocab_size: pieces of the vocabulary.
        resume: what `checkpoint` returned before an interruption; what was written after it is cut off.

    Raises:
        StoreError: the directory holds a finished store, or less than `resume` says.
        OSError: it cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], vocab_size: int, *, resume: Counts | None = None) -> None:
        self.directory = Path(directory).absolute()
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / META).exists():
            raise StoreError(f"{directory} holds a finished store: remove it, or write to another directory")
        self.counts = resume or Counts()
        self._document_end = 0  # sentences of all ended documents
        self._files: list[BinaryIO] = []
        try:
            for name, size in zip(FILES, self._sizes(), strict=True):
                self._files.append(self._opened(self.directory / name, size if resume else None))
            if resume is None:
                self._write(SENTENCES, np.zeros(1, OFFSET))
                self._write(DOCUMENTS, np.zeros(1, OFFSET))
            else:
                ends = np.memmap(self.directory / DOCUMENTS, OFFSET, mode="r")
                self._document_end = int(ends[-1])
        except BaseException:
            self.close()
            raise

    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of the three files."""
        tokens, sentences, documents = self.counts
        return tokens * self.dtype.itemsize, (sentences + 1) * OFFSET.itemsize, (documents + 1) * OFFSET.itemsize

    @staticmethod
    def _opened(path: Path, size: int | None) -> BinaryIO:
        """The file, empty, or cut to the size that it had."""
        if size is None:
            return open(path, "wb", buffering=BUFFER)
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise _damaged(path, f"it has {found} bytes of the {size} that were written")
        os.truncate(path, size)
        return open(path, "ab", buffering=BUFFER)

    @property
    def size(self) -> int:
        """Bytes of the store so far."""
        return sum(self._sizes())

    def append(self, document: Sequence[np.ndarray]) -> None:
        """Adds a document: the ids of each sentence, of any integer dtype. Empty ones are dropped.

        Raises:
            StoreError: an id is outside the vocabulary.
        """
        sentences = [checked_ids(sentence, self.vocab_size) for sentence in document]
        lengths = np.array([len(sentence) for sentence in sentences], dtype=OFFSET)
        tokens = np.concatenate(sentences) if sentences else np.empty(0, self.dtype)
        self.extend(tokens, lengths, np.array([len(lengths)], dtype=OFFSET))

    def extend(self, tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> None:
        """Adds sentences, of several documents or of a part of one.

        Args:
            tokens: ids [tokens] of the sentences, one after the other; less than vocab_size, which is not looked at.
            lengths: integers [sentences], tokens of each; those of 0 are dropped.
            ends: integers [ended documents], rising: how many of these sentences come before each end.
        """
        kept = np.concatenate([np.zeros(1, OFFSET), (lengths > 0).cumsum(dtype=OFFSET)])
        documents = np.unique(self.counts.sentences + kept[ends])
        documents = documents[documents > self._document_end]
        offsets = self.counts.tokens + lengths[lengths > 0].cumsum(dtype=OFFSET)
        self._write(TOKENS, tokens.astype(self.dtype, copy=False))
        self._write(SENTENCES, offsets.astype(OFFSET, copy=False))
        self._write(DOCUMENTS, documents.astype(OFFSET, copy=False))
        self.counts = Counts(
            self.counts.tokens + len(tokens),
            self.counts.sentences + len(offsets),
            self.counts.documents + len(documents),
        )
        if len(documents):
            self._document_end = int(documents[-1])

    def checkpoint(self) -> Counts:
        """Everything so far is on the disk when this returns; `resume` takes what it returns."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return self.counts

    def finish(self, **details: Any) -> None:
        """Ends an open document and makes the store whole; `details` go into meta.json."""
        self.extend(np.empty(0, self.dtype), np.empty(0, OFFSET), np.zeros(1, OFFSET))
        self.checkpoint()
        self.close()
        meta = {"version": VERSION, "dtype": self.dtype.name, "vocab_size": self.vocab_size, **self.counts._asdict()}
        write_json(self.directory / META, {**meta, **details})

    def close(self) -> None:
        """Lets go of the files; without `finish` there is no store."""
        for file in self._files:
            # What cannot be flushed on a full disk is not counted on.
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, name: str, array: np.ndarray) -> None:
        self._files[FILES.index(name)].write(array.tobytes())


def checked_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """The ids as an array.

    Raises:
        StoreError: they are no integers, or one is outside the vocabulary.
    """
    array = np.asarray(ids)
    if len(array) == 0:
        return array.astype(OFFSET)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise StoreError(f"document holds {array.dtype} {list(array.shape)}; sentences of integer ids were expected")
    least, most = int(array.min()), int(array.max())
    if least < 0 or most >= vocab_size:
        raise StoreError(
            f"document holds the id {least if least < 0 else most}; 0 to {vocab_size - 1}, the vocabulary, was expected"
        )
    return array


def read_meta(directory: Path) -> dict[str, Any]:
    """The content of a store's meta.json.

    Raises:
        StoreError: it is missing, damaged, or of another version.
    """
    if not directory.is_dir():
        raise StoreError(f"{directory} is not a directory: make a store with `albert-fast corpus`")
    if not (directory / META).is_file():
        if (directory / TOKENS).exists():
            raise StoreError(f"{directory} was not finished: run the command that began it again, it goes on")
        raise StoreError(f"{directory} is no token store, it has no {META}: make one with `albert-fast corpus`")
    try:
        meta = json.loads((directory / META).read_bytes())
        version = meta["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(directory / META, repr(error)) from error
    if version != VERSION:
        raise StoreError(f"{directory} is a store of version {version!r}; {VERSION} was expected: make it anew")
    return meta


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is never seen half-written, by others or after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    found = path.stat().st_size if path.is_file() else None
    if found != count * dtype.itemsize:
        has = "is missing" if found is None else f"has {found} bytes"
        raise _damaged(path, f"it {has}; {count * dtype.itemsize} were expected")
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged ({what}): make the store anew with `albert-fast corpus --force`")
