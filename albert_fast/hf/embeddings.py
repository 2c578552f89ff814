"""transformers' AlbertEmbeddings as one operation: what `accelerate` makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.albert import modeling_albert

from albert_fast import ops
from albert_fast.hf import guards
from albert_fast.hf.encoder import fresh_seed
from albert_fast.packing import zeros


class AlbertEmbeddings(modeling_albert.AlbertEmbeddings):
    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        inputs = input_ids if input_ids is not None else inputs_embeds
        # transformers 4 has one more argument, which counts positions from somewhere else.
        if inputs is None or args or any(kwargs.values()) or not self._serves(inputs, token_type_ids, position_ids):
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds, *args, **kwargs)
        shape = inputs.shape[:2]
        if position_ids is None:
            position_ids = self.position_ids[:, : shape[1]]
        # By the dictionaries of plain modules: every call comes here, and an attribute takes four times as long.
        modules: dict[str, Any] = self._modules
        word, norm = modules["word_embeddings"], modules["LayerNorm"]
        dropout_p = modules["dropout"].p if self.training else 0.0
        embedded = ops.embed_layer_norm(
            inputs.flatten(0, 1),
            _flat(position_ids, shape),
            zeros(shape[0] * shape[1], inputs.device) if token_type_ids is None else _flat(token_type_ids, shape),
            word._parameters["weight"],
            modules["position_embeddings"]._parameters["weight"],
            modules["token_type_embeddings"]._parameters["weight"],
            norm._parameters["weight"],
            norm._parameters["bias"],
            eps=norm.eps,
            dropout_p=dropout_p,
            seed=fresh_seed(dropout_p, inputs.device),
            padding_idx=word.padding_idx,
        )
        return embedded.view(*shape, -1)

    def _serves(self, inputs: Tensor, *ids: Tensor | None) -> bool:
        """Whether the operation takes these inputs, and the tables are as transformers made them."""
        word = self.word_embeddings.weight
        fits = inputs.dtype in (torch.int64, torch.int32) if inputs.dim() == 2 else inputs.dtype == word.dtype
        shape = inputs.shape[:2]
        return (
            fits
            and shape[1] <= self.position_ids.shape[1]
            and all(i is None or (i.dim() == 2 and i.shape[0] in (1, shape[0]) and i.shape[1] == shape[1]) for i in ids)
            and guards.refusal_of_embeddings(self) is None
        )


def _flat(ids: Tensor, shape: torch.Size) -> Tensor:
    return (ids if ids.shape == shape else ids.expand(shape)).flatten()
