"""AlbertModel: plain modules with transformers' parameter names, arguments and outputs. Heads are in heads.py.

What differs from transformers, on purpose:

- Padding is never computed. A batch is packed before the embeddings and padded once at the end: hidden states,
  attentions and logits are zero at padded positions. `unpad=False` computes them as transformers does.
- A `PackedBatch` may stand in the place of `input_ids` and `attention_mask`; the outputs are then packed, too.
- A row's pooled output is of its first real token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from albert_fast import inference, ops, quantization
from albert_fast.activations import ACTIVATIONS
from albert_fast.checkpoint import check_state_dict, read_state_dict, write_state_dict
from albert_fast.config import AlbertConfig
from albert_fast.ops.checks import check, describe, is_being_recorded
from albert_fast.ops.encoder import RECOMPUTE, EncoderOptions, observe_input_means
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.outputs import BaseModelOutputWithPooling, ModelOutput
from albert_fast.packing import PackedBatch

Model = TypeVar("Model", bound="AlbertPreTrainedModel")


# ------------------------------------------------------------------------------------------- where the parameters live


class AlbertEmbeddings(nn.Module):
    """Word, position and token-type tables of width E, and their LayerNorm."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.config = config
        size = config.embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def tables(self) -> inference.Tables:
        norm = self.LayerNorm
        return inference.Tables(
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            norm.weight,
            norm.bias,
        )

    def forward(self, batch: PackedBatch, seed: Tensor | None) -> Tensor:
        """The embedded tokens, [tokens, E]."""
        inputs = batch.input_ids if batch.input_ids is not None else batch.inputs_embeds
        assert inputs is not None
        assert batch.position_ids is not None
        assert batch.token_type_ids is not None
        return ops.embed_layer_norm(
            inputs,
            batch.position_ids,
            batch.token_type_ids,
            self.word_embeddings.weight,
            self.position_embeddings.weight,
            self.token_type_embeddings.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            eps=self.config.layer_norm_eps,
            dropout_p=self.config.hidden_dropout_prob if self.training else 0.0,
            seed=seed,
            cu_seqlens=batch.cu_seqlens,
            padding_idx=self.config.pad_token_id,
        )


class AlbertAttention(nn.Module):
    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.dense = nn.Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)


class AlbertLayer(nn.Module):
    """The shared layer holds the 16 tensors, `ops.encoder` runs them. Its modules and their hooks are not called."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.full_layer_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AlbertAttention(config)
        self.ffn = nn.Linear(config.hidden_size, config.intermediate_size)
        self.ffn_output = nn.Linear(config.intermediate_size, config.hidden_size)

    def tensors(self) -> Iterator[Tensor]:
        """In the order that `ops.encoder` takes them.

        Raises:
            TypeError: a module computes something else than its tensors say: an adapter, pruning by a hook.
        """
        attention = self.attention
        projections = (attention.query, attention.key, attention.value, attention.dense)
        rest = (attention.LayerNorm, self.ffn, self.ffn_output, self.full_layer_layer_norm)
        for module in (*projections, *rest):
            if type(module) not in (nn.Linear, nn.LayerNorm) or module._forward_pre_hooks:
                self._check_is_plain(module)
            for name in ("weight", "bias"):
                # Every call comes here: a module's attribute takes four times as long.
                own = module._parameters.get(name)
                yield getattr(module, name) if own is None else own

    def _check_is_plain(self, module: nn.Module) -> None:
        """That its tensors are all that there is to it; parametrized ones are those that its attributes give."""
        name = next(name for name, other in self.named_modules() if other is module)
        stands = f"{name} of the shared layer is a {type(module).__module__}.{type(module).__qualname__}"
        inside = (
            "; albert_fast.hf.accelerate serves a model of transformers with such modules in its layer, more slowly"
        )
        check(
            type(module).forward in (nn.Linear.forward, nn.LayerNorm.forward),
            f"{stands}, whose forward would not be called: merge it into the layer's own weights, or train without it"
            + inside,
            TypeError,
        )
        computed = [key for key in ("weight", "bias") if key not in module._parameters and key in module.__dict__]
        check(
            not (computed and module._forward_pre_hooks),
            f"{stands}, whose {' and '.join(computed)} a hook computes that would not be called: make it permanent "
            f"(torch.nn.utils.prune.remove, remove_weight_norm), or use torch.nn.utils.parametrizations{inside}",
            TypeError,
        )


class AlbertLayerGroup(nn.Module):
    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.albert_layers = nn.ModuleList([AlbertLayer(config) for _ in range(config.inner_group_num)])


class AlbertTransformer(nn.Module):
    """The projection E -> H and the loop over the shared layers.

    Attributes:
        recompute: what backward computes again instead of keeping it: "none", "ffn" or "layer" (see `ops.encoder`).
        quantized: whether the products are in int8: inference only (see `albert_fast.quantization`).
        input_means: [passes, 3 hidden + inner], by which quantized products correct their biases; or None.
    """

    input_means: Tensor | None

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = "none"
        self.quantized = False
        self.register_buffer("input_means", None, persistent=False)
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList([AlbertLayerGroup(config) for _ in range(config.num_hidden_groups)])

    def forward(
        self,
        embedded: Tensor,
        batch: PackedBatch,
        *,
        seed: Tensor | None = None,
        bias: Tensor | None = None,
        return_all: bool = False,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """Embedded tokens [tokens, E] -> [tokens, hidden], or [passes + 1, tokens, hidden] with return_all."""
        config = self.config
        check(
            not (self.quantized and self.training),
            "the model is quantized to int8, which does not train: model.eval(), or model.quantize(False) first",
        )
        return ops.encoder(
            self.embedding_hidden_mapping_in(embedded),
            self.parameters_of_layers(),
            batch.cu_seqlens,
            batch.max_seqlen,
            **self._shape(),
            hidden_dropout_p=config.hidden_dropout_prob if self.training else 0.0,
            attention_dropout_p=config.attention_probs_dropout_prob if self.training else 0.0,
            seed=seed,
            bias=bias,
            recompute=self.recompute,
            return_all=return_all,
            attentions=attentions,
            quantized=self.quantized,
            input_means=self.input_means,
        )

    def one_pass(self, hidden: Tensor, batch: PackedBatch, number: int) -> Tensor:
        """Pass `number`, from 0, without dropout: [tokens, hidden] -> [tokens, hidden]. For one group of layers."""
        return ops.encoder(
            hidden,
            self.parameters_of_layers(),
            batch.cu_seqlens,
            batch.max_seqlen,
            **{**self._shape(), "num_layers": 1},
            hidden_dropout_p=0.0,
            attention_dropout_p=0.0,
            seed=None,
            quantized=self.quantized,
            input_means=None if self.input_means is None else self.input_means[number : number + 1],
        )

    def observe_input_means(self, embedded: Tensor, batch: PackedBatch) -> Tensor:
        """What `input_means` is to be, for inputs like these."""
        hidden = self.embedding_hidden_mapping_in(embedded)
        return observe_input_means(
            hidden, self.parameters_of_layers(), batch.cu_seqlens, batch.max_seqlen, **self._shape()
        )

    def inference_options(self) -> EncoderOptions:
        """Of all passes, without dropout."""
        shape = self._shape()
        return EncoderOptions(
            **shape,
            hidden_dropout_p=0.0,
            attention_dropout_p=0.0,
            seed=None,
            bias=None,
            recompute="none",
            return_all=False,
            quantized=self.quantized,
            input_means=self.input_means,
        )

    def parameters_of_layers(self) -> list[Tensor]:
        """As `ops.encoder` takes them."""
        groups = cast("list[AlbertLayerGroup]", list(self.albert_layer_groups))
        layers = [cast(AlbertLayer, layer) for group in groups for layer in group.albert_layers]
        return [tensor for layer in layers for tensor in layer.tensors()]

    def _shape(self) -> dict[str, Any]:
        config = self.config
        return {
            "num_layers": config.num_hidden_layers,
            "num_groups": config.num_hidden_groups,
            "inner_group_num": config.inner_group_num,
            "num_heads": config.num_attention_heads,
            "activation": config.hidden_act,
            "eps": config.layer_norm_eps,
        }


class AlbertMLMHead(nn.Module):
    """Hidden states to scores of the vocabulary: H -> E, activation, LayerNorm, word table."""

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def transform(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, E]: all of the head before the word table."""
        return self.LayerNorm(self.activation(self.dense(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> logits [tokens, vocab]."""
        return self.decoder(self.transform(hidden))

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the labelled tokens; no logits of the others."""
        return ops.masked_lm_loss(
            self.transform(hidden), self.decoder.weight, self.decoder.bias, labels, ignore_index=IGNORE_INDEX
        )


# ------------------------------------------------------------------------------------------------------------ the base


class AlbertPreTrainedModel(nn.Module):
    """What AlbertModel and the models with heads have in common: initialisation, tied weights, checkpoints, batches.

    Attributes:
        config: the AlbertConfig.
    """

    # Tied name -> the name it shares memory with, when config.tie_word_embeddings.
    _tied_weights_keys: ClassVar[dict[str, str]] = {}
    # What a checkpoint of another head may lack.
    _newly_initialized: ClassVar[tuple[str, ...]] = ("pooler.*", "albert.pooler.*")

    def __init__(self, config: AlbertConfig) -> None:
        super().__init__()
        if not isinstance(config, AlbertConfig):
            raise TypeError(
                f"config is a {type(config).__name__}; an albert_fast.AlbertConfig was expected: "
                "AlbertConfig.from_dict(config.to_dict()) makes one of a transformers config"
            )
        self.config = config

    def post_init(self) -> None:
        self.apply(self._init_weights)
        self.tie_weights()

    def _init_weights(self, module: nn.Module) -> None:
        """As transformers: normal(0, initializer_range), biases 0, LayerNorms 1 and 0, the embedding's padding row
        0."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm | AlbertMLMHead) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def tie_weights(self) -> None:
        """Makes the tied parameters one, as config.tie_word_embeddings says."""
        if not self.config.tie_word_embeddings:
            return
        for name, source in self._tied_weights_keys.items():
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, self.get_parameter(source))

    @property
    def _base(self) -> AlbertModel:
        return self if isinstance(self, AlbertModel) else self.get_submodule("albert")  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self._base.embeddings.word_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._base.embeddings.word_embeddings.weight.dtype

    def num_parameters(self) -> int:
        """Elements of all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Embedding:
        return self._base.embeddings.word_embeddings

    def set_recompute(self, recompute: str) -> None:
        """Trades time for memory in training: "none", "ffn" (about a third less) or "layer" (the least)."""
        check(recompute in RECOMPUTE, f"recompute is {recompute!r}; one of {', '.join(RECOMPUTE)} was expected")
        self._base.encoder.recompute = recompute

    def quantize(self: Model, quantized: bool = True, *, calibration: PackedBatch | None = None) -> Model:
        """Switches the encoder's products to int8, for inference, or back (see `albert_fast.quantization`)."""
        quantization.quantize(self, quantized, calibration=calibration)
        return self

    @classmethod
    def from_pretrained(
        cls: type[Model],
        directory: str | os.PathLike[str],
        *,
        config: AlbertConfig | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        parts: Sequence[str] | None = None,
        **overrides: Any,
    ) -> Model:
        """Reads a Hugging Face directory: config.json, and safetensors (single or sharded) or pytorch_model.bin.

        Args:
            directory: local; nothing is downloaded.
            config: in place of the directory's config.json.
            dtype: of the parameters; that of the file when None.
            device: where the parameters shall be.
            parts: patterns of the tensors that are read, such as "albert.*" without another task's head; None: all.
            overrides: fields of the config, such as num_labels=3.

        Returns:
            the model in eval mode. Parameters of a new head are initialised, with a warning that lists them.

        Raises:
            ConfigError, CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or
                mis-shaped.
        """
        if config is None:
            config = AlbertConfig.from_pretrained(directory, **overrides)
        elif overrides:
            config = AlbertConfig.from_dict(config.to_dict(), **overrides)
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        tied = cls._tied_weights_keys if config.tie_word_embeddings else {}
        read = read_state_dict(directory)
        if parts is not None:
            read = {name: tensor for name, tensor in read.items() if any(fnmatchcase(name, part) for part in parts)}
        state = check_state_dict(read, expected, tied=tied, newly_initialized=cls._newly_initialized)
        dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
        model.to(dtype).to_empty(device=device)
        model.tie_weights()
        if len(state) < len(expected):
            model.apply(model._init_weights)
        model.load_state_dict(state, strict=False)
        quantization.read(model, directory)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
    ) -> None:
        """Writes config.json and the weights, for this package and for transformers.

        Everything is written under temporary names and renamed: on a failure the directory holds what it held before.
        """
        config = replace(self.config, architectures=[type(self).__name__], dtype=self.dtype)
        write_state_dict(
            directory,
            self.state_dict(),
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
        )
        config.save_pretrained(directory)
        quantization.write(self, directory)

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Cuts the word table, or lengthens it with new rows (and the decoder's, with bias 0)."""
        check(vocab_size >= 1, f"vocab_size is {vocab_size}; at least 1 was expected")
        word = self.get_input_embeddings()
        padding = word.padding_idx
        check(
            padding is None or padding < vocab_size,
            f"vocab_size is {vocab_size}; more than pad_token_id ({padding}) was expected",
        )
        rows = min(vocab_size, word.num_embeddings)

        def resized(old: Tensor) -> nn.Parameter:
            new = old.new_zeros(vocab_size, *old.shape[1:])
            if old.dim() == 2:
                new.normal_(std=self.config.initializer_range)
            new[:rows] = old.detach()[:rows]
            return nn.Parameter(new, requires_grad=old.requires_grad)

        with torch.no_grad():
            word.weight = resized(word.weight)
            word.num_embeddings = vocab_size
            head = getattr(self, "predictions", None)
            if head is not None:
                head.bias = resized(head.bias)
                head.decoder.weight, head.decoder.bias = (
                    resized(head.decoder.weight),
                    resized(head.decoder.bias),
                )
                head.decoder.out_features = vocab_size
        self.config.vocab_size = vocab_size
        self.tie_weights()

    def _packed_inputs(
        self,
        input_ids: Tensor | PackedBatch | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        unpad: bool,
    ) -> tuple[PackedBatch, Tensor | None]:
        """The packed batch, and what is added to the attention's scores (a 4-D mask, or the padding with
        unpad=False)."""
        if isinstance(input_ids, PackedBatch):
            given = {
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
            }
            for name, tensor in given.items():
                check(tensor is None, f"{name} was given beside a PackedBatch: put it into the batch")
            check(
                attention_mask is None or attention_mask.dim() == 4,
                "attention_mask was given beside a PackedBatch, which has no padding: drop it",
            )
            return input_ids, None if attention_mask is None else self._additive(attention_mask)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None and position_ids is None and tokens.dim() >= 2:
            longest = self.config.max_position_embeddings
            check(
                tokens.shape[1] <= longest,
                lambda: (
                    f"{'input_ids' if input_ids is not None else 'inputs_embeds'} is {describe(tokens)}: rows of "
                    f"{tokens.shape[1]}, and config.max_position_embeddings is {longest}: truncate them"
                ),
            )
        bias, mask = None, attention_mask
        if attention_mask is not None and attention_mask.dim() == 4:
            bias, mask = self._additive(attention_mask), None
        elif attention_mask is not None and not unpad and attention_mask.dim() == 2 and tokens is not None:
            keep = (attention_mask != 0)[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
            bias, mask = self._additive(keep), None
        # A compiler and a CUDA graph need shapes that do not depend on the mask's values: all places are allotted.
        capacity = None
        if mask is not None and tokens is not None and (torch.compiler.is_compiling() or is_being_recorded(tokens)):
            capacity = tokens.shape[0] * tokens.shape[1]
        batch = PackedBatch.from_padded(
            input_ids, mask, token_type_ids, position_ids, inputs_embeds, capacity=capacity, shared=True
        )
        return batch, bias

    def _additive(self, mask: Tensor) -> Tensor:
        """A 4-D mask as it is added to the scores: a boolean one keeps where it is True."""
        check(
            mask.dtype == torch.bool or mask.is_floating_point(),
            f"attention_mask is {describe(mask)}; a 4-D mask must be boolean (True: attend) or floating (added to the "
            "scores)",
            TypeError,
        )
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(~mask, float("-inf"))

    def _outputs(self, output: ModelOutput, return_dict: bool | None) -> Any:
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def pad_extras(batch: PackedBatch, outputs: BaseModelOutputWithPooling) -> dict[str, tuple[Tensor, ...] | None]:
    """hidden_states and attentions of packed outputs, padded."""
    hidden_states, attentions = outputs.hidden_states, outputs.attentions
    return {
        "hidden_states": None if hidden_states is None else tuple(batch.pad(state) for state in hidden_states),
        "attentions": None if attentions is None else tuple(batch.pad_attention(a) for a in attentions),
    }


class AlbertModel(AlbertPreTrainedModel):
    """The encoder.

    Args:
        config: its shape.
        add_pooling_layer: whether there is a dense layer and tanh on each row's first token.
    """

    def __init__(self, config: AlbertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = AlbertEmbeddings(config)
        self.encoder = AlbertTransformer(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        unpad: bool = True,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: int64 [batch, seq]; or a PackedBatch, in place of all the others.
            attention_mask: [batch, seq], 0 at padding; or [batch or 1, heads or 1, seq, seq], boolean (True: attend) or
                added to the scores.
            token_type_ids: int64 [batch, seq]; zeros when None.
            position_ids: int64 [batch or 1, seq]; the column when None.
            inputs_embeds: [batch, seq, E], in place of input_ids.
            output_attentions: also each pass's attention probabilities. They come from the reference, which stores
                them.
            output_hidden_states: also the input of the first pass and the output of each.
            return_dict: False for a plain tuple; config.return_dict when None.
            unpad: False to compute padded positions as transformers does, instead of returning zeros there.

        Returns:
            BaseModelOutputWithPooling.

        Raises:
            ValueError, TypeError, IndexError: an argument does not fit; the message names it.
        """
        config = self.config
        batch, bias = self._packed_inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, unpad)
        check(
            batch.input_ids is not None or batch.inputs_embeds is not None,
            "the PackedBatch has neither input_ids nor inputs_embeds: make it with from_padded or from_sequences",
        )
        attentions: list[Tensor] | None = None
        if config.output_attentions if output_attentions is None else output_attentions:
            attentions = []
        all_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        plain = bias is None and attentions is None and not all_states
        output = self._in_one_call(batch) if plain else None
        if output is None:
            output = self._step_by_step(batch, bias, attentions, all_states)
        if not isinstance(input_ids, PackedBatch):
            extras: dict[str, Any] = pad_extras(batch, output)
            output = replace(output, last_hidden_state=batch.pad(cast(Tensor, output.last_hidden_state)), **extras)
        return self._outputs(output, return_dict)

    def _in_one_call(self, batch: PackedBatch) -> BaseModelOutputWithPooling | None:
        """Packed outputs by `albert_fast.inference`, where that serves the call."""
        embeddings, encoder = self.embeddings, self.encoder
        if self.training or embeddings.training or encoder.training:
            return None
        if not inference.is_plain(embeddings, AlbertEmbeddings) or not inference.is_plain(encoder, AlbertTransformer):
            return None
        found = inference.run(
            batch,
            None,
            embeddings.tables(),
            encoder.embedding_hidden_mapping_in,
            encoder.parameters_of_layers(),
            self.pooler,
            encoder.inference_options(),
            self.config.layer_norm_eps,
        )
        return None if found is None else BaseModelOutputWithPooling(*found)

    def _step_by_step(
        self, batch: PackedBatch, bias: Tensor | None, attentions: list[Tensor] | None, all_states: bool
    ) -> BaseModelOutputWithPooling:
        """The same, operation by operation."""
        config, seed = self.config, None
        if self.training and max(config.hidden_dropout_prob, config.attention_probs_dropout_prob) > 0.0:
            seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=batch.device)
        hidden = self.encoder(
            self.embeddings(batch, seed),
            batch,
            seed=seed,
            bias=bias,
            return_all=all_states,
            attentions=attentions,
        )
        last = hidden[-1] if all_states else hidden
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else torch.tanh(self.pooler(batch.first(last))),
            hidden_states=tuple(hidden.unbind(0)) if all_states else None,
            attentions=None if attentions is None else tuple(attentions),
        )
