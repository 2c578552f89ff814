"""Whole models for the stages of `make gpu`: configurations, weights, batches, and the peers that the bench lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from albert_fast import AlbertConfig, AlbertForMaskedLM, graphed
from albert_fast.bench.data import LABELLED_SHARE, Batch
from albert_fast.bench.peers import AlbertFast
from albert_fast.bench.peers.transformers import TransformersSdpa
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX


def configuration(name: str, tiny: bool) -> AlbertConfig:
    """base, xxlarge, …, without dropout: masks that are drawn differently have no parity."""
    config = getattr(AlbertConfig, name)()
    if tiny:
        sizes = {"vocab_size": 300, "embedding_size": 16, "hidden_size": 64, "intermediate_size": 128}
        config = replace(config, **sizes, num_attention_heads=4, num_hidden_layers=2)
    return replace(config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def weights(config: AlbertConfig, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with device:
        return AlbertForMaskedLM(config).state_dict()


class FullBatch(Batch):
    """Without padding, and so without a mask: nobody has to look for it."""

    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "token_type_ids": self.token_type_ids}


def make_batch(config: AlbertConfig, lengths: list[int], length: int, device: torch.device) -> Batch:
    """Rows of these lengths, padded to `length`; 15 % of the tokens are labelled.

    Ids are drawn as often as words are (Zipf): the gradient of the word table then meets its frequent rows.
    """
    generator = torch.Generator().manual_seed(0)
    rows = len(lengths)
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    places = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    ids = (config.vocab_size**places).long().clamp(max=config.vocab_size - 1)
    order = real.flatten().nonzero().squeeze(1)
    order = order[torch.randperm(len(order), generator=generator)]
    labels = torch.full_like(ids, IGNORE_INDEX)
    chosen = order[: max(1, round(LABELLED_SHARE * sum(lengths)))]
    labels.view(-1)[chosen] = ids.view(-1)[chosen]
    ids = ids * real
    tensors = [tensor.to(device) for tensor in (ids, real.long(), torch.zeros_like(ids), labels)]
    return (FullBatch if bool(real.all()) else Batch)(*tensors, lengths)


class Compiled(TransformersSdpa):
    """transformers' model under torch.compile, with `options`.

    Attributes:
        tried: whether a backend that compiles nothing stands in for Inductor, to try the code.
    """

    name = "transformers-compile"
    options: ClassVar[dict[str, Any]] = {}
    tried = False

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        super().build(config, state_dict, dtype, device, batch)
        options = {"backend": "eager"} if self.tried else self.options
        self.model.albert.compile(dynamic=False, **options)
        self.model.predictions.compile(dynamic=False, **options)


class CompiledForLatency(Compiled):
    """With CUDA graphs."""

    options: ClassVar[dict[str, Any]] = {"mode": "reduce-overhead"}


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Sets variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Graphed(AlbertFast):
    """This package's encoder as a CUDA graph of the batch's shape."""

    name = "albert_fast graphed"
    modes = ("inference",)

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        super().build(config, state_dict, dtype, device, batch)
        rows, length = batch.input_ids.shape
        self.graph = graphed(self.model.albert.eval(), shapes=[(rows, length)])

    def inference(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.graph(**batch.inputs()).last_hidden_state


class GraphedTraining(AlbertFast):
    """This package's forward and backward as CUDA graphs of the batch's shape."""

    name = "albert_fast graphed"

    def build(
        self, config: AlbertConfig, state_dict: Mapping[str, Tensor], dtype: str, device: torch.device, batch: Batch
    ) -> None:
        super().build(config, state_dict, dtype, device, batch)
        self.graph = graphed(self.model, shapes=[tuple(batch.input_ids.shape)])

    def loss(self, batch: Batch) -> Tensor:
        return self.graph(**batch.inputs(), labels=batch.labels)


class GraphedApart(GraphedTraining):
    """The same without the products of cuBLASLt that end in an activation, or in a sum."""

    name = "albert_fast graphed, without cuBLASLt"

    def loss_and_gradients(self, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        with environment(ALBERT_FAST_CUBLASLT="0"):
            return super().loss_and_gradients(batch, scale)
