"""albert_fast: ALBERT, one layer prepared once and used L times."""

from importlib.metadata import PackageNotFoundError, version

from albert_fast.config import AlbertConfig
from albert_fast.graphs import graphed
from albert_fast.model import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
    AlbertPreTrainedModel,
)
from albert_fast.packing import PackedBatch
from albert_fast.quantization import quantize

try:
    __version__ = version("albert_fast")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AlbertConfig",
    "AlbertForMaskedLM",
    "AlbertForMultipleChoice",
    "AlbertForPreTraining",
    "AlbertForQuestionAnswering",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
    "AlbertPreTrainedModel",
    "PackedBatch",
    "graphed",
    "quantize",
]
