"""int8 inference: how a model is switched to it, what that costs in accuracy, and how it is remembered on disk.

The products of the shared layer, nearly all of a model's work, are done in 8-bit integers
(`albert_fast.ops.quantized_linear`); attention, LayerNorm, embeddings and heads stay as they are. The float parameters
stay, too: they are what is saved, the integers follow from them alone, and `quantize(model, False)` is an exact undo.
Nothing is calibrated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from albert_fast.checkpoint import QUANTIZATION_FILE

if TYPE_CHECKING:
    from albert_fast.model import AlbertPreTrainedModel
    from albert_fast.tokenizer import AlbertTokenizer


class QuantizationError(ValueError):
    """A model's quantization.json cannot be used."""


class AccuracyLoss(NamedTuple):
    """What quantization changes on a text, against the same model before it.

    Attributes:
        relative_error: Frobenius norm of the difference of the last hidden states over that of the states.
        cosine: mean cosine of a token's state before and after.
        tokens: how many were compared.
    """

    relative_error: float
    cosine: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"int8 changes the hidden states of {self.tokens} tokens by {self.relative_error:.2%} "
            f"(mean cosine {self.cosine:.5f})"
        )


def quantize(model: AlbertPreTrainedModel, quantized: bool = True) -> AlbertPreTrainedModel:
    """Switches the products of the model's encoder to int8, for inference, or back.

    Args:
        model: any of this package's; in eval mode while it is quantized.
        quantized: False undoes it exactly.

    Returns:
        the model.
    """
    model._base.encoder.quantized = quantized
    return model.eval() if quantized else model


@torch.inference_mode()
def accuracy_loss(
    model: AlbertPreTrainedModel, tokenizer: AlbertTokenizer, texts: Sequence[str], *, batch_size: int = 16
) -> AccuracyLoss:
    """Measures what quantization changes, on real text. The model is left as it was.

    Args:
        texts: each is cut to the model's positions.

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("texts is empty; at least one text was expected")
    base, before, training = model._base, model._base.encoder.quantized, model.training
    difference = norm = cosine = 0.0
    tokens = 0
    try:
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=model.config.max_position_embeddings,
                return_tensors="pt",
            ).to(model.device)
            real = inputs["attention_mask"] != 0
            exact, rounded = (
                quantize(model.eval(), on)._base(**inputs).last_hidden_state[real].double() for on in (False, True)
            )
            difference += (rounded - exact).square().sum().item()
            norm += exact.square().sum().item()
            cosine += torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).sum().item()
            tokens += exact.shape[0]
    finally:
        base.encoder.quantized = before
        model.train(training)
    return AccuracyLoss((difference / norm) ** 0.5, cosine / tokens, tokens)


def save(model: AlbertPreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Remembers beside the weights whether the model is quantized."""
    path = Path(directory) / QUANTIZATION_FILE
    if not model._base.encoder.quantized:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{QUANTIZATION_FILE}.{os.getpid()}")
    temporary.write_text(json.dumps({"encoder": "int8"}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def load(model: AlbertPreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Quantizes the model where `save` said so.

    Raises:
        QuantizationError: the file is not one that this version writes.
    """
    path = Path(directory) / QUANTIZATION_FILE
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QuantizationError(f"{path} is not JSON ({error}): remove it to load the model unquantized") from None
    if found != {"encoder": "int8"}:
        raise QuantizationError(
            f'{path} holds {found!r}; {{"encoder": "int8"}} was expected: remove it to load the model unquantized'
        )
    quantize(model)
