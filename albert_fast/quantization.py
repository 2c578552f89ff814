"""int8 inference: how a model is switched to it, what that costs in accuracy, and how it is remembered on disk.

The products of the shared layer, nearly all of a model's work, are done in 8-bit integers
(`albert_fast.ops.quantized_linear`); LayerNorm, embeddings and heads stay as they are. So does attention, but on
processors with VNNI, where the `cpu` backend computes it in integers as well (csrc/cpu/attention.h): of 8 bits for the
scores, of 11 and 13 for the output, which adds less than the products do. The float parameters stay, too: they are what
is saved, the integers follow from them alone, and `quantize(model, False)` is an exact undo.

Rounding one layer's weights is the same mistake in each of its passes, and most of it is the same for every token. The
mean input of each product in each pass is therefore measured once, and the biases make up for the mistake: that more
than halves the error. Tokens drawn at random do nearly as well as text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from albert_fast.checkpoint import QUANTIZATION_FILE
from albert_fast.packing import PackedBatch

if TYPE_CHECKING:
    from albert_fast.model import AlbertPreTrainedModel
    from albert_fast.tokenizer import AlbertTokenizer


# Rows and tokens drawn where no text is given.
_CALIBRATION = (8, 64)
_METADATA = {"encoder": "int8"}


class QuantizationError(ValueError):
    """A model's quantization.safetensors cannot be used."""


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


def quantize(
    model: AlbertPreTrainedModel, quantized: bool = True, *, calibration: PackedBatch | None = None
) -> AlbertPreTrainedModel:
    """Switches the products of the model's encoder to int8, for inference, or back.

    Args:
        model: any of this package's; in eval mode while it is quantized.
        quantized: False undoes it exactly.
        calibration: tokens like those that the model will see, some hundreds at least; when None, drawn at random.

    Returns:
        the model.

    Raises:
        ValueError: calibration has no tokens.
        IndexError: calibration has tokens that are not in the vocabulary.
    """
    encoder = model._base.encoder
    if not quantized:
        encoder.quantized, encoder.input_means = False, None
        return model
    encoder.input_means = _input_means(model.eval(), calibration)
    encoder.quantized = True
    return model


@torch.no_grad()
def _input_means(model: AlbertPreTrainedModel, calibration: PackedBatch | None) -> torch.Tensor:
    if calibration is None:
        rows, length = _CALIBRATION
        shape = (rows, min(length, model.config.max_position_embeddings))
        generator = torch.Generator().manual_seed(0)
        calibration = PackedBatch.from_padded(torch.randint(model.config.vocab_size, shape, generator=generator))
    batch = calibration.to(model.device)
    base = model._base
    return base.encoder.observe_input_means(base.embeddings(batch, None), batch)


@torch.inference_mode()
def accuracy_loss(
    model: AlbertPreTrainedModel, tokenizer: AlbertTokenizer, texts: Sequence[str], *, batch_size: int = 16
) -> AccuracyLoss:
    """Measures what quantization changes, on real text. The model is left as it was.

    Args:
        model: one that is not quantized is calibrated with tokens drawn at random.
        texts: each is cut to the model's positions.

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        raise ValueError("texts is empty; at least one text was expected")
    encoder, training = model._base.encoder, model.training
    before = (encoder.quantized, encoder.input_means)
    difference = norm = cosine = 0.0
    tokens = 0
    try:
        if not encoder.quantized:
            quantize(model)
        model.eval()
        for start in range(0, len(texts), batch_size):
            inputs = tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=model.config.max_position_embeddings,
                return_tensors="pt",
            ).to(model.device)
            real = inputs["attention_mask"] != 0
            states = []
            for encoder.quantized in (False, True):
                states.append(model._base(**inputs).last_hidden_state[real].double())
            exact, rounded = states
            difference += (rounded - exact).square().sum().item()
            norm += exact.square().sum().item()
            cosine += torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).sum().item()
            tokens += exact.shape[0]
    finally:
        encoder.quantized, encoder.input_means = before
        model.train(training)
    return AccuracyLoss((difference / norm) ** 0.5, cosine / tokens, tokens)


def write(model: AlbertPreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Remembers beside the weights whether the model is quantized, and the mean inputs of its products."""
    path = Path(directory) / QUANTIZATION_FILE
    encoder = model._base.encoder
    if not encoder.quantized:
        path.unlink(missing_ok=True)
        return
    means = {} if encoder.input_means is None else {"input_means": encoder.input_means.contiguous()}
    temporary = path.with_name(f".{QUANTIZATION_FILE}.{os.getpid()}")
    temporary.write_bytes(save(means, _METADATA))
    temporary.replace(path)


def read(model: AlbertPreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Quantizes the model where `write` said so.

    Raises:
        QuantizationError: the file is not one that this version writes, or of another model.
    """
    path = Path(directory) / QUANTIZATION_FILE
    if not path.is_file():
        return
    remedy = "remove it to load the model unquantized"
    try:
        with safe_open(path, framework="pt") as file:
            metadata, means = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QuantizationError(f"{path} cannot be read ({error}): {remedy}") from None
    if metadata != _METADATA or not means.keys() <= {"input_means"}:
        raise QuantizationError(f"{path} says {metadata} of {sorted(means)}; {_METADATA} was expected: {remedy}")
    config, encoder = model.config, model._base.encoder
    shape = [config.num_hidden_layers * config.inner_group_num, 3 * config.hidden_size + config.intermediate_size]
    if any(list(tensor.shape) != shape or not tensor.is_floating_point() for tensor in means.values()):
        found = {name: list(tensor.shape) for name, tensor in means.items()}
        raise QuantizationError(f"{path} has {found}; input_means {shape} was expected: {remedy}")
    encoder.input_means = means["input_means"].to(model.device) if means else None
    encoder.quantized = True
    model.eval()
