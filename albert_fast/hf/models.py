"""transformers' ALBERT models, accelerated from the start: the same names, arguments, checkpoints and outputs.

    from albert_fast.hf import AlbertForMaskedLM  # in place of: from transformers import AlbertForMaskedLM

Each is a subclass of transformers' class of that name, passed through `accelerate`; what it saves loads in transformers
as if it had come from there. Options are changed by `accelerate(model, …)`.
"""

from __future__ import annotations

import transformers

from albert_fast.hf.accelerate import accelerate


class _Accelerated:
    supports_gradient_checkpointing = True

    def post_init(self) -> None:
        """What transformers' constructors call last."""
        accelerate(self)  # type: ignore[type-var]
        super().post_init()  # type: ignore[misc]


class AlbertModel(_Accelerated, transformers.AlbertModel):
    """transformers.AlbertModel: hidden states and the pooled first token."""


class AlbertForPreTraining(_Accelerated, transformers.AlbertForPreTraining):
    """transformers.AlbertForPreTraining: masked language model and sentence order."""


class AlbertForMaskedLM(_Accelerated, transformers.AlbertForMaskedLM):
    """transformers.AlbertForMaskedLM."""


class AlbertForSequenceClassification(_Accelerated, transformers.AlbertForSequenceClassification):
    """transformers.AlbertForSequenceClassification: classification or regression of whole texts."""


class AlbertForTokenClassification(_Accelerated, transformers.AlbertForTokenClassification):
    """transformers.AlbertForTokenClassification."""


class AlbertForQuestionAnswering(_Accelerated, transformers.AlbertForQuestionAnswering):
    """transformers.AlbertForQuestionAnswering: where an answer begins and ends."""


class AlbertForMultipleChoice(_Accelerated, transformers.AlbertForMultipleChoice):
    """transformers.AlbertForMultipleChoice."""
