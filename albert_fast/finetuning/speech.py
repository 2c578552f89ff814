"""Speech recognition: sound files and what is said in them, letter by letter; WER and CER.

Tables have a column of paths (data.audio) and one of texts (data.label). The labels are the characters of the training
texts, and CTC's blank before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from albert_fast.audio import WINDOW, log_mel, read_audio
from albert_fast.config import AlbertConfig
from albert_fast.finetuning.reading import Place, read_table
from albert_fast.finetuning.rows import Batch, Row
from albert_fast.finetuning.task import Task, number_of
from albert_fast.speech import MEL_BINS, AlbertForCTC, SpeechBatch, encoded_length, greedy, needed_length, prefix_beam

_BLANK = "<blank>"
_ALL_BUT_HEAD = ("front.*", "norm.*", "encoder.*", "pass_weights")


@dataclass(frozen=True)
class Utterance:
    """A sound file, and what is said, or None."""

    place: Place
    path: Path
    text: str | None


class Speech(Task):
    """See this file's docstring."""

    name = "speech"
    measures = ("jiwer",)
    best = "wer"
    larger_is_better = False
    model_class = AlbertForCTC
    reads_text = False
    labels: list[str]

    # ------------------------------------------------------------------------------------------------------- the data

    def read(self, path: Path, *, labelled: bool) -> Iterator[Utterance]:
        columns = [self.data.audio, *([self.data.label] if labelled else [])]
        for record in read_table(path, columns):
            text = " ".join(record.text(self.data.label).split()) if labelled else None
            if text == "":
                record.place.refuse("nothing is said")
            yield Utterance(record.place, path.parent / record.text(self.data.audio), text)

    def from_line(self, place: Place, line: str) -> Utterance:
        """A file's path."""
        return Utterance(place, Path(line), None)

    def learn(self, examples: Sequence[Utterance]) -> None:
        found = {character for example in examples for character in example.text or ""}
        self.restore({"labels": [_BLANK, *sorted(found)], "rate": self.data.rate})

    def state(self) -> dict[str, Any]:
        return {"labels": self.labels, "rate": self.rate}

    def restore(self, state: dict[str, Any]) -> None:
        self.labels, self.rate = state["labels"], state["rate"]
        self.numbers = {label: number for number, label in enumerate(self.labels)}

    def rows(self, examples: Sequence[Utterance], *, labelled: bool) -> list[Row]:
        """With the features as `extra`; the ids stand for the encoder's frames."""
        rows = []
        for number, example in enumerate(examples):
            features = self._features(example)
            target, size = None, encoded_length(len(features))
            if labelled:
                target = [number_of(character, self.numbers, example.place) for character in example.text or ""]
                need = needed_length(target)
                if size < need:
                    example.place.refuse(
                        f"{example.path} has {size} frames of 40 ms and its text needs {need}: it is too short for "
                        "CTC, or the text is another's"
                    )
            rows.append(Row([0] * size, [0] * size, target, number, features))
        return rows

    def _features(self, example: Utterance) -> Tensor:
        try:
            samples = read_audio(str(example.path), self.rate)
        except ValueError as error:
            example.place.refuse(str(error))
        if len(samples) < self.rate * WINDOW:
            example.place.refuse(
                f"{example.path} has {len(samples)} samples, less than a frame of {WINDOW * 1000:g} ms"
            )
        features = log_mel(samples, self.rate, self.bins)
        if not features.isfinite().all():
            example.place.refuse(
                f"{example.path} has samples that are not finite, or far beyond full scale, 1: write the file anew, or "
                "leave it out"
            )
        return features

    @property
    def bins(self) -> int:
        """Mel bands: as many as the FFT of such sound can tell apart."""
        return 80 if self.rate >= 16000 else 40

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return {}

    def pack(self, rows: Sequence[Row]) -> Batch:
        return Batch(SpeechBatch.of([row.extra for row in rows]), {}, rows)

    # ------------------------------------------------------------------------------------------------------ the model

    def configure(self, config: AlbertConfig) -> None:
        config.id2label = dict(enumerate(self.labels))
        config.label2id = dict(self.numbers)
        config.extra[MEL_BINS] = self.bins

    def with_new_head(self, directory: str, config: AlbertConfig) -> AlbertForCTC:
        """Of a model of other characters: all but what says them."""
        return AlbertForCTC.from_pretrained(directory, config=config, dtype=torch.float32, parts=_ALL_BUT_HEAD)

    def targets(self, batch: Batch) -> int:
        return sum(len(row.target) for row in batch.source)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = model(batch.inputs, [row.target for row in batch.source]).loss
        return loss, torch.full_like(loss, torch.nan)

    # -------------------------------------------------------------------------------------------------- what it says

    def outputs(self, model: nn.Module, batch: Batch) -> list[Any]:
        found = model(batch.inputs)
        beams = self.config.decoding.beams
        each = [log_probs[:length].cpu() for log_probs, length in zip(found.log_probs, found.lengths, strict=True)]
        return [greedy(log_probs) if beams == 1 else prefix_beam(log_probs, beams) for log_probs in each]

    def predictions(self, examples: Sequence[Utterance], rows: Sequence[Row], outputs: Sequence[Any]) -> list[Any]:
        texts = ["".join(self.labels[label] for label in output) for output in outputs]
        return [{"text": " ".join(text.split())} for text in texts]

    def metrics(self, examples: Sequence[Utterance], predictions: Sequence[Any]) -> dict[str, float]:
        import jiwer

        wanted = [example.text or "" for example in examples]
        said = [prediction["text"] for prediction in predictions]
        return {"wer": float(jiwer.wer(wanted, said)), "cer": float(jiwer.cer(wanted, said))}
