"""Translation, and any other text about a text: sacrebleu's BLEU and chrF of what a beam search finds.

Files are pairs of lines: two files, the source's and the target's, line by line (`--train train.de.gz train.en.gz`), or
tables with data.text and data.label. The vocabulary is one for both languages; train it with case and accents
(`albert-fast vocab … --cased --keep-accents`) where they are to be written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.reading import DataError, Place, read_lines, read_table
from albert_fast.finetuning.rows import Batch, Row
from albert_fast.finetuning.task import Task
from albert_fast.flops import flops
from albert_fast.packing import PackedBatch
from albert_fast.seq2seq import DECODER_LAYERS, AlbertForSeq2SeqLM

_TABLES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class Pair:
    """A source and its translation, or None."""

    place: Place
    source: str
    target: str | None


class Translation(Task):
    """See this file's docstring."""

    name = "translation"
    measures = ("sacrebleu",)
    best = "bleu"
    model_class = AlbertForSeq2SeqLM
    config_keys = (DECODER_LAYERS,)

    # ------------------------------------------------------------------------------------------------------- the data

    def read_all(self, paths: Sequence[str], *, labelled: bool = True) -> list[Pair]:
        """Tables as others; of text files, two by two where they are labelled."""
        if not labelled or all(_is_table(Path(path)) for path in paths):
            return super().read_all(paths, labelled=labelled)
        if len(paths) % 2:
            raise DataError(f"{', '.join(paths)}: an even number of files was expected, a source and a target each")
        found = []
        for source, target in zip(paths[::2], paths[1::2], strict=True):
            for a, b in itertools.zip_longest(read_lines(Path(source)), read_lines(Path(target))):
                if a is None or b is None:
                    place = (a or b)[0]
                    other = target if b is None else source
                    place.refuse(f"{other} has no such line: both files must have as many")
                found.append(Pair(a[0], a[1], b[1]))
        return found

    def read(self, path: Path, *, labelled: bool) -> Iterator[Pair]:
        if not _is_table(path):
            for place, line in read_lines(path):
                yield self.from_line(place, line)
            return
        columns = [self.data.text, *([self.data.label] if labelled else [])]
        for record in read_table(path, columns):
            target = record.text(self.data.label) if labelled else None
            yield Pair(record.place, record.text(self.data.text), target)

    def from_line(self, place: Place, line: str) -> Pair:
        return Pair(place, line, None)

    def learn(self, examples: Sequence[Pair]) -> None:
        """There is nothing but texts."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    def rows(self, examples: Sequence[Pair], *, labelled: bool) -> list[Row]:
        """Sources as [CLS] … [SEP]; targets without [CLS], with [SEP]."""
        sources = self.tokenizer([e.source for e in examples], truncation=True, max_length=self.length)["input_ids"]
        targets: list[Any] = [None] * len(examples)
        if labelled:
            texts = [example.target or "" for example in examples]
            # One token less than the length: the decoder reads [CLS] first.
            found = self.tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
            targets = [ids[1:] for ids in found]
        return [
            Row(ids, [0] * len(ids), target, number)
            for number, (ids, target) in enumerate(zip(sources, targets, strict=True))
        ]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return {"labels": torch.tensor([token for row in rows for token in row.target])}

    # ------------------------------------------------------------------------------------------------------ the model

    def configure(self, config: AlbertConfig) -> None:
        config.extra.setdefault(DECODER_LAYERS, config.num_hidden_layers)

    def begin(self, model: Any) -> None:
        model.begin_from_encoder()

    def targets(self, batch: Batch) -> int:
        return len(batch.targets["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.targets["labels"]
        begin = self.tokenizer.cls_token_id
        decoder = PackedBatch.from_sequences(
            [[begin, *row.target[:-1]] for row in batch.source], device=batch.inputs.device
        )
        smoothing = self.config.label_smoothing
        loss = model(batch.inputs, None, decoder, labels, label_smoothing=smoothing, reduction="sum").loss
        return loss, torch.full_like(loss, torch.nan)

    def flops(self, shape: AlbertConfig, batch: Batch) -> int:
        """The encoder's, and the decoder's as if its cross-attention were self-attention of as many tokens."""
        written = [len(row.target) for row in batch.source]
        passes = int(shape.extra.get(DECODER_LAYERS, shape.num_hidden_layers))
        decoder = flops(shape, written, training=True, labelled=sum(written)).total * passes / shape.num_hidden_layers
        return int(flops(shape, batch.lengths, training=True, labelled=0).total + decoder)

    # -------------------------------------------------------------------------------------------------- what it says

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        """The ids of each row's best target."""
        assert isinstance(model, AlbertForSeq2SeqLM)
        how = self.config.decoding
        return model.generate(batch.inputs, num_beams=how.beams, length_penalty=how.length_penalty)

    def predictions(self, examples: Sequence[Pair], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        return [{"translation": self.tokenizer.decode(output)} for output in outputs]

    def metrics(self, examples: Sequence[Pair], predictions: Sequence[Any]) -> dict[str, float]:
        from sacrebleu.metrics import BLEU, CHRF

        said = [prediction["translation"] for prediction in predictions]
        wanted = [[example.target or "" for example in examples]]
        lower = self.tokenizer.do_lower_case  # what cannot write capitals is not judged by them
        bleu, chrf = BLEU(lowercase=lower), CHRF(lowercase=lower)
        return {"bleu": bleu.corpus_score(said, wanted).score, "chrf": chrf.corpus_score(said, wanted).score}


def _is_table(path: Path) -> bool:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix in _TABLES
