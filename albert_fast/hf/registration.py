"""`register()`: AutoModel, pipeline and all that is built on them make accelerated models; `unregister()` undoes it."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AlbertConfig

from albert_fast.hf import models

_AUTO_CLASSES = {
    "AutoModel": models.AlbertModel,
    "AutoModelForPreTraining": models.AlbertForPreTraining,
    "AutoModelForMaskedLM": models.AlbertForMaskedLM,
    "AutoModelForSequenceClassification": models.AlbertForSequenceClassification,
    "AutoModelForTokenClassification": models.AlbertForTokenClassification,
    "AutoModelForQuestionAnswering": models.AlbertForQuestionAnswering,
    "AutoModelForMultipleChoice": models.AlbertForMultipleChoice,
}

# What somebody else had registered for AlbertConfig before.
_before: dict[str, Any] = {}


def register() -> None:
    """From now on, in this process, transformers' Auto classes make models of `albert_fast.hf` of an AlbertConfig.

    Models that exist stay as they are, as do transformers' own classes by name. Calling it twice is as good as once.
    """
    for name, model in _AUTO_CLASSES.items():
        extra = _extra(name)
        if extra.get(AlbertConfig) not in (None, model):
            _before[name] = extra[AlbertConfig]
        getattr(transformers, name).register(AlbertConfig, model, exist_ok=True)


def unregister() -> None:
    """Undoes `register`: the Auto classes make what they made before."""
    for name, model in _AUTO_CLASSES.items():
        extra = _extra(name)
        if extra.get(AlbertConfig) is model:
            del extra[AlbertConfig]
        if name in _before:
            extra[AlbertConfig] = _before.pop(name)


def _extra(name: str) -> dict[Any, Any]:
    """What was registered with an Auto class beside transformers' own models: there is no public way to take back."""
    return getattr(transformers, name)._model_mapping._extra_content
