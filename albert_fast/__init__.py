"""albert_fast: ALBERT, one layer prepared once and used L times."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from albert_fast.config import AlbertConfig
from albert_fast.graphs import graphed
from albert_fast.heads import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
)
from albert_fast.model import AlbertModel, AlbertPreTrainedModel
from albert_fast.packing import PackedBatch
from albert_fast.quantization import quantize
from albert_fast.seq2seq import AlbertForSeq2SeqLM
from albert_fast.speech import AlbertForCTC

try:
    __version__ = version("albert_fast")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"

# In a checkout that was not installed kernels/ stands beside the package: albert_fast.kernels is then found there.
_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "kernels" / "launch.py").is_file():
    __path__.append(str(_checkout))

__all__ = [
    "AlbertConfig",
    "AlbertForCTC",
    "AlbertForMaskedLM",
    "AlbertForMultipleChoice",
    "AlbertForPreTraining",
    "AlbertForQuestionAnswering",
    "AlbertForSeq2SeqLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
    "AlbertPreTrainedModel",
    "PackedBatch",
    "graphed",
    "quantize",
]
