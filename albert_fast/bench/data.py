"""What is computed on: English text that lies on every machine, its vocabulary, and batches of it."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from albert_fast.bench.arguments import Shape
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.tokenizer import AlbertTokenizer, TokenizerError, train_vocabulary

LABELLED_SHARE = 0.15
RAGGED_FILL = 0.4

# Of the vocabulary that is trained here.
VOCAB_SIZE = 2000


@dataclass(frozen=True)
class Text:
    """Paragraphs, and where they are from."""

    source: str
    paragraphs: list[str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n\n".join(self.paragraphs).encode()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """A padded batch: int64 [rows, length] each. `lengths` are the real tokens of each row, on the host."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    @property
    def labelled(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def fill(self) -> float:
        """Share of the padded positions that are real."""
        return self.tokens / self.input_ids.numel()

    def inputs(self) -> dict[str, Tensor]:
        """A model's arguments; the token types too, which transformers' tokenizer no longer gives."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }

    def rows(self, start: int, end: int) -> Batch:
        """Rows start to end, without the columns that none of them fills."""
        lengths = self.lengths[start:end]
        return self._map(lambda tensor: tensor[start:end, : max(lengths)], lengths)

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda tensor: tensor.to(device), self.lengths)

    def _map(self, change: Callable[[Tensor], Tensor], lengths: list[int]) -> Batch:
        tensors = (self.input_ids, self.attention_mask, self.token_type_ids, self.labels)
        ids, mask, types, labels = map(change, tensors)
        return Batch(ids, mask, types, labels, lengths)


def read_text(files: Sequence[str]) -> Text:
    """The user's files, or the documentation that comes with Python.

    Raises:
        ValueError: a file is not UTF-8, or there is no text in them.
    """
    if files:
        contents = []
        for file in files:
            try:
                contents.append(Path(file).read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from None
        source = ", ".join(files)
    else:
        import pydoc_data.topics

        contents = list(pydoc_data.topics.topics.values())
        source = "pydoc_data.topics"
    paragraphs = [" ".join(part.split()) for content in contents for part in re.split(r"\n\s*\n", content)]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    if not paragraphs:
        raise ValueError(f"{source} has no text")
    return Text(source, paragraphs)


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/albert_fast, or ~/.cache/albert_fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "albert_fast"


def load_tokenizer(vocab: str | None, text: Text) -> AlbertTokenizer:
    """The tokenizer of a file or directory, or else one trained on the text, which is kept for the next run.

    Raises:
        ValueError: there is too little text to train one on, or what is given is no vocabulary.
    """
    if vocab is not None:
        return AlbertTokenizer.from_pretrained(vocab) if Path(vocab).is_dir() else AlbertTokenizer(vocab)
    key = hashlib.sha256(f"{text.sha256} {VOCAB_SIZE}".encode()).hexdigest()[:16]
    directory = cache_directory() / "vocabulary" / key
    if not directory.is_dir():
        # Trained under another name: nobody ever finds half a vocabulary.
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=directory.parent))
        try:
            train_vocabulary(text.paragraphs, temporary, vocab_size=VOCAB_SIZE)
            temporary.rename(directory)
        except TokenizerError:
            raise ValueError(
                f"--text {text.source}: too little, or of too many different characters, to train a vocabulary of "
                f"{VOCAB_SIZE} pieces on; give more, or a --vocab"
            ) from None
        except OSError:
            if not directory.is_dir():  # or another process was faster, with the same content
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return AlbertTokenizer.from_pretrained(directory)


def make_batch(tokenizer: AlbertTokenizer, text: Text, shape: Shape) -> Batch:
    """The rows of `shape`, with 15 % of their tokens masked and labelled; the same ones each time.

    Full rows are cut from the running text. Ragged ones are consecutive paragraphs (or sentences, where rows are
    short), as many to a row as fill about 40 %, and of all such runs the one that comes nearest to that.

    Raises:
        ValueError: there is too little text.
    """
    room = shape.length - 2  # [CLS] and [SEP]
    rows = _ragged_rows(tokenizer, text, shape.rows, room) if shape.ragged else None
    if rows is None:
        stream = itertools.chain.from_iterable(_token_ids(tokenizer, text.paragraphs))
        ids = list(itertools.islice(stream, shape.rows * room))
        rows = [ids[start : start + room] for start in range(0, len(ids), room)]
    if len(rows) < shape.rows or (not shape.ragged and len(rows[-1]) < room):
        raise ValueError(f"--text has too little text for a batch of {shape}: give more of it")
    lengths = [len(row) + 2 for row in rows]
    input_ids = torch.full((shape.rows, shape.length), tokenizer.pad_token_id)
    maskable = torch.zeros(shape.rows, shape.length, dtype=torch.bool)
    for r, row in enumerate(rows):
        input_ids[r, : lengths[r]] = torch.tensor([tokenizer.cls_token_id, *row, tokenizer.sep_token_id])
        maskable[r, 1 : lengths[r] - 1] = True
    places = maskable.flatten().nonzero().squeeze(1)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    chosen = places[order[: max(1, round(LABELLED_SHARE * sum(lengths)))]]
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels.view(-1)[chosen] = input_ids.view(-1)[chosen]
    input_ids.view(-1)[chosen] = tokenizer.mask_token_id
    attention_mask = (torch.arange(shape.length) < torch.tensor(lengths)[:, None]).long()
    return Batch(input_ids, attention_mask, torch.zeros_like(input_ids), labels, lengths)


def _token_ids(tokenizer: AlbertTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, without [CLS] and [SEP]."""
    return [ids[1:-1] for ids in tokenizer(list(texts))["input_ids"]]


def _ragged_rows(tokenizer: AlbertTokenizer, text: Text, count: int, room: int) -> list[list[int]]:
    goal = RAGGED_FILL * (room + 2) - 2  # tokens of a row, on average

    def mean(units: list[list[int]]) -> float:
        return sum(min(len(unit), room) for unit in units) / max(1, len(units))

    units = [ids for ids in _token_ids(tokenizer, text.paragraphs) if ids]
    if mean(units) > goal:
        sentences = [part for paragraph in text.paragraphs for part in re.split(r"(?<=[.!?:;,])\s+", paragraph)]
        units = [ids for ids in _token_ids(tokenizer, sentences) if ids]
    rows = units
    for together in range(2, len(units) // count + 1):
        if mean(rows) >= goal:
            break
        groups = range(0, len(units) - together + 1, together)
        rows = [list(itertools.chain.from_iterable(units[start : start + together])) for start in groups]
    rows = [row[:room] for row in rows]
    sums = [0, *itertools.accumulate(len(row) for row in rows)]
    starts = range(max(1, len(rows) - count + 1))
    start = min(starts, key=lambda s: abs(sums[min(s + count, len(rows))] - sums[s] - goal * count))
    return rows[start : start + count]
