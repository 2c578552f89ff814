"""Words and their definitions, and where the words occur: what descriptive masked-LM is made of.

The task (DMLM: Barba et al., Findings of ACL 2023) is to predict a word that is masked in its context from its
definition. A word occurs where its pieces do, from the beginning of a word to the beginning of the next or the end of
the sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from albert_fast.ops.checks import check
from albert_fast.pretraining.masking import Vocabulary
from albert_fast.pretraining.store import TokenStore
from albert_fast.training.randomness import mix

if TYPE_CHECKING:
    from albert_fast.tokenizer import AlbertTokenizer

BLOCK = 1 << 22  # tokens searched together


class GlossaryError(ValueError):
    """A glossary that cannot be read or used."""


class Entry(NamedTuple):
    word: str
    definition: str


def read_glossary(path: str | os.PathLike[str]) -> list[Entry]:
    """Reads lines of `word<TAB>definition`, UTF-8; a word may come several times, empty lines are passed over.

    Raises:
        GlossaryError: the file cannot be read or has no entry, or a line is none; the message names file and line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise GlossaryError(f"{path} cannot be read ({error.strerror}): give a tab-separated glossary") from error
    entries = []
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip("\r\ufeff")
        except UnicodeDecodeError as error:
            raise GlossaryError(f"{path}, line {number} is not UTF-8 ({error.reason}): convert the file") from None
        if not text.strip():
            continue
        fields = [field.strip() for field in text.split("\t")]
        if len(fields) != 2 or not all(fields):
            raise GlossaryError(
                f"{path}, line {number} is {text[:60]!r}; a word, one tab and its definition were expected"
            )
        entries.append(Entry(*fields))
    if not entries:
        raise GlossaryError(f"{path} has no entry; lines of a word, one tab and its definition were expected")
    return entries


@dataclass(frozen=True)
class Glossary:
    """A glossary in ids.

    Attributes:
        words: the pieces of each word; no two are the same.
        definitions: ids of all definitions, those of a word one after the other.
        definition_offsets: int64 [definitions + 1], into them.
        first_definition: int64 [words + 1]: word w has the definitions first_definition[w] to first_definition[w + 1].
    """

    words: list[tuple[int, ...]]
    definitions: NDArray[np.int64]
    definition_offsets: NDArray[np.int64]
    first_definition: NDArray[np.int64]

    @classmethod
    def encode(cls, entries: Iterable[Entry], tokenizer: AlbertTokenizer) -> Glossary:
        """Words and definitions as the tokenizer sees them."""
        rows = list(entries)
        if not rows:
            raise GlossaryError("entries is empty; at least one word and its definition were expected")
        words = tokenizer([entry.word for entry in rows], add_special_tokens=False)["input_ids"]
        definitions = tokenizer([entry.definition for entry in rows], add_special_tokens=False)["input_ids"]
        return cls.from_ids(zip(words, definitions, strict=True))

    @classmethod
    def from_ids(cls, pairs: Iterable[tuple[Iterable[int], Iterable[int]]]) -> Glossary:
        """From the ids of words and their definitions."""
        found: dict[tuple[int, ...], list[list[int]]] = {}
        for word, definition in pairs:
            pieces, ids = tuple(word), list(definition)
            if pieces and ids:
                found.setdefault(pieces, []).append(ids)
        texts = [ids for group in found.values() for ids in group]
        return cls(
            words=list(found),
            definitions=np.array([i for ids in texts for i in ids], dtype=np.int64),
            definition_offsets=np.cumsum([0, *map(len, texts)], dtype=np.int64),
            first_definition=np.cumsum([0, *map(len, found.values())], dtype=np.int64),
        )


class Occurrences(NamedTuple):
    """Where words of a glossary occur, in the order of the store.

    position: int64 [occurrences], the token at which it begins; word: int32 [occurrences], the word's number.
    """

    position: NDArray[np.int64]
    word: NDArray[np.int32]


def find_occurrences(store: TokenStore, vocabulary: Vocabulary, glossary: Glossary) -> Occurrences:
    """Looks for all words at once: the pieces between two word boundaries, hashed, in a sorted table of the words.

    Raises:
        ValueError: none of them occurs.
    """
    numbers: dict[int, list[int]] = {}  # of the words of each length
    for number, pieces in enumerate(glossary.words):
        numbers.setdefault(len(pieces), []).append(number)
    tables = {size: _Table.of(glossary, members) for size, members in numbers.items()}
    overlap = max(numbers, default=0)
    positions, words = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int32)]
    for low in range(0, len(store.tokens), BLOCK):
        high = min(low + BLOCK, len(store.tokens))
        tokens = np.asarray(store.tokens[low : high + overlap], dtype=np.int64)
        span = np.searchsorted(store.sentence_offsets, [low, low + len(tokens)])
        sentence_begins = np.zeros(len(tokens) + 1, dtype=bool)
        sentence_begins[store.sentence_offsets[span[0] : span[1]] - low] = True
        boundary = sentence_begins.copy()
        boundary[:-1] |= vocabulary.starts_word[tokens] | vocabulary.is_special[tokens]
        boundary[-1] |= low + len(tokens) == len(store.tokens)
        sentence = np.cumsum(sentence_begins)
        for size, table in tables.items():
            begin = np.flatnonzero(boundary[: len(tokens) - size + 1] & boundary[size:])
            begin = begin[(begin < high - low) & (sentence[begin] == sentence[begin + size - 1])]
            hits, found = table.look_up(tokens, begin)
            positions.append(hits + low)
            words.append(found)
    position, word = np.concatenate(positions), np.concatenate(words)
    check(
        len(position) > 0,
        f"none of the {len(glossary.words)} words of the glossary occurs in the store: are both of one vocabulary?",
    )
    order = np.lexsort((word, position))
    return Occurrences(position[order], word[order])


class _Table(NamedTuple):
    """Words of one length, sorted by their hashes."""

    pieces: NDArray[np.int64]  # [words, length]
    hashes: NDArray[np.uint64]
    numbers: NDArray[np.int32]

    @classmethod
    def of(cls, glossary: Glossary, numbers: list[int]) -> _Table:
        pieces = np.array([glossary.words[number] for number in numbers], dtype=np.int64)
        hashes = _hash(list(pieces.T))
        order = np.argsort(hashes)
        return cls(pieces[order], hashes[order], np.array(numbers, dtype=np.int32)[order])

    def look_up(
        self, tokens: NDArray[np.int64], begin: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Where one of the words begins, of the places `begin`, and which."""
        begin = begin[np.isin(tokens[begin], self.pieces[:, 0], kind="table")]
        size = self.pieces.shape[1]
        place = np.searchsorted(self.hashes, _hash([tokens[begin + i] for i in range(size)]))
        place = np.minimum(place, len(self.hashes) - 1)
        # Equal pieces, not equal hashes: of two words with one hash the second would be missed, and none mistaken.
        same = (tokens[begin[:, None] + np.arange(size)] == self.pieces[place]).all(axis=1)
        return begin[same], self.numbers[place[same]]


def _hash(columns: list[NDArray[np.int64]]) -> NDArray[np.uint64]:
    value = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        value = mix(value + column.astype(np.uint64) + np.uint64(1))
    return value
