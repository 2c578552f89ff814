"""This package inside transformers (the extra `hf`). Three doors, one implementation:

1. `accelerate(model)`: any model with ALBERT encoders of transformers inside, in place; `restore(model)` undoes it,
   `explain(model, **inputs)` says which path each encoder takes, and why.
2. `AlbertModel`, `AlbertForMaskedLM`, …: transformers' classes under their own names, accelerated from the start;
   `register()` makes AutoModel, pipeline and their kin take them, `unregister()` undoes that.
3. `attn_implementation="albert_fast"`: this package's attention alone, in any bidirectional encoder of transformers.
"""

from albert_fast.hf import attention as _attention  # registers attn_implementation="albert_fast"
from albert_fast.hf.accelerate import Path, accelerate, explain, restore
from albert_fast.hf.guards import NotAcceleratedError
from albert_fast.hf.models import (
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from albert_fast.hf.registration import register, unregister

__all__ = [
    "AlbertForMaskedLM",
    "AlbertForMultipleChoice",
    "AlbertForPreTraining",
    "AlbertForQuestionAnswering",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
    "NotAcceleratedError",
    "Path",
    "accelerate",
    "explain",
    "register",
    "restore",
    "unregister",
]

del _attention
