"""AlbertForCTC: speech recognition with one shared layer.

Log-mel features, two convolutions that halve the time twice, sinusoidal positions, the shared layer L times, and
connectionist temporal classification (Graves et al. 2006). What is classified is a learned sum of all passes' states:
in an ALBERT of speech the inner passes know more of the phones than the last one (Chi et al. 2020, arXiv 2005.08575).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from albert_fast.audio import normalized, positions, spec_augment
from albert_fast.config import AlbertConfig
from albert_fast.model import AlbertModel, AlbertPreTrainedModel, AlbertTransformer
from albert_fast.ops.checks import check
from albert_fast.outputs import ModelOutput
from albert_fast.packing import PackedBatch

BLANK = 0
MEL_BINS = "num_mel_bins"  # a key of config.json
MOST_BANDS, MOST_TIME = 0.34, 0.1  # of SpecAugment's stripes


@dataclass(frozen=True)
class SpeechBatch:
    """Features of utterances.

    Attributes:
        features: float32 [batch, most frames, bins], zeros behind each utterance.
        frames: each one's.
    """

    features: Tensor
    frames: tuple[int, ...]

    @classmethod
    def of(cls, utterances: Sequence[Tensor]) -> SpeechBatch:
        """Of features [frames, bins] each."""
        check(len(utterances) > 0, "there is no utterance; at least one was expected")
        padded = nn.utils.rnn.pad_sequence(list(utterances), batch_first=True)
        return cls(padded, tuple(len(each) for each in utterances))

    @property
    def tokens(self) -> int:
        """Of the encoder: a quarter of the frames."""
        return sum(map(encoded_length, self.frames))

    def to(self, device: torch.device | str, **options: Any) -> SpeechBatch:
        return replace(self, features=self.features.to(device, **options))


@dataclass
class CTCOutput(ModelOutput):
    """`log_probs` float32 [batch, most encoded frames, labels]; `lengths` of each utterance; the loss is summed."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    lengths: tuple[int, ...] | None = None


def encoded_length(frames: int) -> int:
    """Of so many feature frames: two convolutions of stride 2."""
    return ((frames + 1) // 2 + 1) // 2


def needed_length(labels: Sequence[int]) -> int:
    """Encoded frames that CTC needs at least: one for each label, and a blank between equal ones."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


class FrontEnd(nn.Module):
    """Features [batch, frames, bins] to [batch, frames / 4, E]."""

    def __init__(self, bins: int, size: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(bins, size, 3, stride=2, padding=1)
        self.second = nn.Conv1d(size, size, 3, stride=2, padding=1)

    def forward(self, features: Tensor, frames: Sequence[int]) -> Tensor:
        x = features.transpose(1, 2)
        lengths = torch.tensor(frames, device=x.device)
        for convolution in (self.first, self.second):
            x = F.gelu(convolution(x))
            lengths = (lengths + 1) // 2
            # What lies behind an utterance is no sound: zeros, as at the end of a longer one.
            x = x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]
        return x.transpose(1, 2)


class AlbertForCTC(AlbertPreTrainedModel):
    """Speech to labels; label 0 is CTC's blank. `config.num_labels` counts it."""

    _newly_initialized: ClassVar[tuple[str, ...]] = ("classifier.*",)

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__(config)
        self.bins = int(config.extra.get(MEL_BINS, 80))
        self.front = FrontEnd(self.bins, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.encoder = AlbertTransformer(config)
        self.pass_weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @property
    def _base(self) -> AlbertModel:
        return self  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.classifier.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.classifier.weight.dtype

    def forward(self, batch: SpeechBatch, labels: Sequence[Sequence[int]] | None = None) -> CTCOutput:
        """Of a batch of features; in training SpecAugment hides stripes of them.

        Args:
            labels: of each utterance, without blanks.

        Raises:
            ValueError: the features have another number of bins, or an utterance is too short for its labels.
        """
        found = batch.features.shape[2]
        check(found == self.bins, f"the features have {found} bins; {self.bins} were expected")
        lengths = tuple(map(encoded_length, batch.frames))
        if labels is not None:
            for number, (length, wanted) in enumerate(zip(lengths, labels, strict=True)):
                need = needed_length(wanted)
                check(
                    length >= need,
                    f"utterance {number} has {length} encoded frames and its {len(wanted)} labels need {need}: it is "
                    "too short for CTC",
                )
        features = [normalized(each[:size]) for each, size in zip(batch.features, batch.frames, strict=True)]
        if self.training:
            features = [spec_augment(each, int(MOST_BANDS * self.bins), MOST_TIME) for each in features]
        x = self.front(nn.utils.rnn.pad_sequence(features, batch_first=True), batch.frames)
        x = self.norm(x) + positions(x.shape[1], x.shape[2], x.device)
        layout = PackedBatch.layout((x.shape[0], x.shape[1]), x.device, lengths=list(lengths))
        seed = None
        if self.training:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
        states = self.encoder(layout.pack(x), layout, seed=seed, return_all=True)
        mixed = torch.einsum("p,pth->th", self.pass_weights.softmax(0).to(states.dtype), states)
        log_probs = layout.pad(self.classifier(self.dropout(mixed)).float().log_softmax(-1))
        loss = None
        if labels is not None:
            loss = F.ctc_loss(
                log_probs.transpose(0, 1),
                torch.tensor([label for each in labels for label in each], device=x.device),
                torch.tensor(lengths),
                torch.tensor([len(each) for each in labels]),
                blank=BLANK,
                reduction="sum",
            )
        return CTCOutput(loss, log_probs, lengths)


def greedy(log_probs: Tensor) -> list[int]:
    """The best label of each frame [frames, labels], repetitions and blanks left out."""
    best = log_probs.argmax(-1).tolist()
    return [label for label, before in zip(best, [BLANK, *best], strict=False) if label not in (BLANK, before)]


def prefix_beam(log_probs: Tensor, beams: int, least: float = -12.0) -> list[int]:
    """The label sequence whose alignments together are likeliest, as far as `beams` prefixes show (Hannun et al. 2014,
    arXiv 1408.2873).

    Args:
        log_probs: [frames, labels].
        least: labels below this in a frame are not tried.
    """
    minus = -math.inf
    # Of each prefix: the log-probability of alignments that end in a blank, and in its last label.
    states: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, minus)}
    for frame in log_probs.tolist():
        tried = [label for label, score in enumerate(frame) if score > least and label != BLANK]
        following: dict[tuple[int, ...], tuple[float, float]] = {}
        for prefix, (blank, last) in states.items():
            both = _log_add(blank, last)
            _add(following, prefix, both + frame[BLANK], last + frame[prefix[-1]] if prefix else minus)
            for label in tried:
                repeated = bool(prefix) and prefix[-1] == label
                _add(following, (*prefix, label), minus, (blank if repeated else both) + frame[label])
        kept = sorted(following.items(), key=lambda item: _log_add(*item[1]), reverse=True)
        states = dict(kept[:beams])
    best = max(states, key=lambda prefix: _log_add(*states[prefix]))
    return list(best)


def _add(
    states: dict[tuple[int, ...], tuple[float, float]], prefix: tuple[int, ...], blank: float, last: float
) -> None:
    before = states.get(prefix, (-math.inf, -math.inf))
    states[prefix] = _log_add(before[0], blank), _log_add(before[1], last)


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))
