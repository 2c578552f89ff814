"""What comes before the model: text to ids, ids to masked examples, and padded batches to packed ones and back."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from albert_fast.bench import parity
from albert_fast.bench.arguments import Shape
from albert_fast.bench.case import Case, Here
from albert_fast.bench.data import LABELLED_SHARE, Batch
from albert_fast.bench.parity import Results
from albert_fast.bench.peers.base import missing
from albert_fast.bench.pretraining import make_examples
from albert_fast.bench.suites.setting import Setting
from albert_fast.bench.work import Work
from albert_fast.bench.worker import TURN
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.packing import PackedBatch

Compute = Callable[[], Results]

_PACKAGES = {"transformers": ("transformers",)}


@dataclass(kw_only=True)
class DataCase(Case):
    """Attributes:
    make: what each peer computes, by name, and "expected"; how many tokens, and megabytes that must be moved.
    largest: the largest error that passes.
    turn: as in `Here`.
    """

    make: Callable[[], tuple[Mapping[str, Compute], int, float]]
    largest: float = 0.0
    turn: float = TURN

    @functools.cached_property
    def made(self) -> tuple[Mapping[str, Compute], int, float]:
        return self.make()

    @functools.cached_property
    def expected(self) -> Results:
        return self.made[0]["expected"]()

    def work(self) -> Work:
        _, tokens, megabytes = self.made
        return self.new_work(tokens=tokens, megabytes=megabytes)

    def refuses(self, peer: str) -> str | None:
        return missing(_PACKAGES.get(peer, ()), "'albert_fast[bench]'")

    def open(self, peer: str) -> Here:
        return Here(lambda: self.made[0][peer](), turn=self.turn)

    def judge(self, peer: str, results: Results) -> tuple[float, float]:
        """Whole numbers must be the same; `largest` is of the relative errors of others."""
        whole = {name: value for name, value in self.expected.items() if not value.is_floating_point()}
        if not all(torch.equal(results[name], value) for name, value in whole.items()):
            return float("inf"), self.largest
        return parity.error(results, self.expected), self.largest


# ----------------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_case(setting: Setting) -> DataCase:
    """Paragraphs to ids. The expected ones are sentencepiece's own, of text that is cleaned beforehand."""

    def make() -> tuple[Mapping[str, Compute], int, float]:
        ours = setting.tokenizer
        # Of segmentations with equal scores, which rows of equals signs have, two programs choose different ones.
        texts = [text for text in setting.read.paragraphs if "==" not in text and "--" not in text]
        texts = texts[: 200 if setting.quick else 2000]

        def flat(rows: list[list[int]]) -> Results:
            return {"output": torch.tensor([i for row in rows for i in row])}

        @functools.cache
        def theirs() -> Any:
            import transformers

            with tempfile.TemporaryDirectory() as directory:
                ours.save_pretrained(directory)
                return transformers.AlbertTokenizer.from_pretrained(directory)

        def expected() -> Results:
            import sentencepiece

            with tempfile.TemporaryDirectory() as directory:
                ours.save_pretrained(directory)
                processor = sentencepiece.SentencePieceProcessor(model_file=f"{directory}/spiece.model")
            encoded = processor.encode([ours.clean(text) for text in texts])
            return flat([[ours.cls_token_id, *row, ours.sep_token_id] for row in encoded])

        computes = {
            "expected": expected,
            "albert_fast": lambda: flat(ours(texts)["input_ids"]),
            "transformers": lambda: flat(theirs()(texts)["input_ids"]),
        }
        return computes, sum(len(row) for row in ours(texts)["input_ids"]), 0.0

    return DataCase(
        suite="data",
        group="tokenizer",
        mode="",
        dtype="",
        shape="paragraphs",
        peers=("albert_fast", "transformers"),
        turn=setting.turn,
        make=make,
    )


# ------------------------------------------------------------------------------------------------------------- packing


def packing_case(setting: Setting, shape: Shape) -> DataCase:
    """A padded batch's ids, types and positions packed; and hidden states of as many tokens padded again."""

    def make() -> tuple[Mapping[str, Compute], int, float]:
        batch: Batch = setting.batch(shape)
        hidden = torch.randn(batch.tokens, setting.config.hidden_size)
        mask = batch.attention_mask.bool()

        def ours() -> Results:
            packed = PackedBatch.from_padded(batch.input_ids, batch.attention_mask, batch.token_type_ids)
            assert packed.input_ids is not None
            return {"ids": packed.input_ids, "output": packed.pad(hidden)}

        def theirs() -> Results:
            padded = hidden.new_zeros(*mask.shape, hidden.shape[1])
            padded[mask] = hidden
            return {"ids": batch.input_ids[mask], "output": padded}

        def expected() -> Results:
            padded = torch.zeros(*mask.shape, hidden.shape[1])
            start = 0
            for row, length in enumerate(batch.lengths):
                padded[row, :length] = hidden[start : start + length]
                start += length
            rows = zip(batch.input_ids, batch.lengths, strict=True)
            return {"ids": torch.cat([row[:length] for row, length in rows]), "output": padded}

        moved = 4 * hidden.shape[1] * (batch.tokens + mask.numel())
        return {"expected": expected, "albert_fast": ours, "pytorch": theirs}, batch.tokens, moved / 1e6

    return DataCase(
        suite="data",
        group="packing",
        mode="",
        dtype="",
        shape=str(shape),
        peers=("albert_fast", "pytorch"),
        turn=setting.turn,
        make=make,
    )


# ------------------------------------------------------------------------------------------------------------- masking


def masking_case(setting: Setting, shape: Shape) -> DataCase:
    """Masked examples: rows of the text with tokens hidden and labelled.

    Everybody draws masks of their own, so what is held against what is expected is that the labels give back the text,
    and that about 15 % of the tokens have one, up to six standard deviations of tokens that are drawn one by one.
    """
    deviation = math.sqrt((1.0 - LABELLED_SHARE) / (LABELLED_SHARE * shape.rows * shape.length))

    def make() -> tuple[Mapping[str, Compute], int, float]:
        tokenizer = setting.tokenizer
        examples = make_examples(tokenizer, setting.read, shape)
        first = examples.batch(0, range(shape.rows))
        whole = torch.where(first.labels == IGNORE_INDEX, first.input_ids, first.labels)
        rows = [row.tolist() for row in whole.split(first.cu_seqlens.diff().tolist())]
        text = examples.store.tokens.tobytes()

        def ours() -> Results:
            batch = examples.batch(0, range(shape.rows))
            return _restored(batch.input_ids, batch.labels)

        @functools.cache
        def collator() -> Any:
            import transformers

            with tempfile.TemporaryDirectory() as directory:
                tokenizer.save_pretrained(directory)
                theirs = transformers.AlbertTokenizer.from_pretrained(directory)
            return transformers.DataCollatorForLanguageModeling(theirs, mlm_probability=LABELLED_SHARE)

        def theirs() -> Results:
            collated = collator()([{"input_ids": row} for row in rows])
            real = collated["attention_mask"].bool()
            return _restored(collated["input_ids"][real], collated["labels"][real])

        def expected() -> Results:
            """[CLS] one segment [SEP] another [SEP], and -1 in place of a segment that the text does not have."""
            ids: list[int] = []
            for row in rows:
                ids.append(tokenizer.cls_token_id)
                for segment in _segments(row[1:], tokenizer.sep_token_id):
                    there = np.array(segment, dtype=examples.store.tokens.dtype).tobytes() in text
                    ids += [*(segment if there else [-1] * len(segment)), tokenizer.sep_token_id]
            return {"output": torch.tensor(ids), "share": torch.tensor(LABELLED_SHARE)}

        return {"expected": expected, "albert_fast": ours, "transformers": theirs}, len(whole), 0.0

    return DataCase(
        suite="data",
        group="masking",
        mode="",
        dtype="",
        shape=str(shape),
        peers=("albert_fast", "transformers"),
        largest=6.0 * deviation,
        turn=setting.turn,
        make=make,
    )


def _restored(input_ids: Tensor, labels: Tensor) -> Results:
    labelled = labels != IGNORE_INDEX
    return {"output": torch.where(labelled, labels, input_ids), "share": labelled.double().mean()}


def _segments(row: list[int], sep: int) -> Iterator[list[int]]:
    """What stands before each [SEP]."""
    while row:
        end = row.index(sep)
        yield row[:end]
        row = row[end + 1 :]


def cases(setting: Setting) -> list[Case]:
    rows = 8 if setting.quick else 64
    return [
        tokenizer_case(setting),
        masking_case(setting, Shape(4 * rows, 128)),
        packing_case(setting, Shape(rows, 128, ragged=True)),
        packing_case(setting, Shape(rows, 128)),
    ]
