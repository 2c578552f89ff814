"""Tensor parallelism: each rank has some of the heads and some of the feed-forward columns (Shoeybi et al., arXiv
1909.08053, section 3). For xxlarge, the one ALBERT whose shared layer is large.

Of the layer, each rank holds a part of

    query, key, value, ffn      by output: whole heads, whole columns of the activation
    dense, ffn_output           by input: what each rank makes of its part is summed over the ranks

and all of the rest: LayerNorms, the biases of dense and ffn_output (added once, after the sum), embeddings and heads. A
pass has two sums over the ranks in forward and two in backward. The parts are DTensors, so that an optimizer and a
checkpoint know of the whole tensors, and names do not change.

Dropout: the ranks must be given the same seed. What all of them have gets the same mask on each; the attention's mask
is drawn with seed + rank, so that no two ranks' heads have the same one. With dropout a run therefore differs from one
of another number of ranks, by its random numbers alone.

Precision: as `ops.encoder`, but that in bfloat16 the sum over the ranks is of rounded parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from albert_fast import ops
from albert_fast.activations import ACTIVATIONS
from albert_fast.config import AlbertConfig
from albert_fast.model import AlbertLayer, AlbertModel, AlbertTransformer
from albert_fast.ops.checks import check
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, layer_of_pass, layers_of
from albert_fast.packing import PackedBatch
from albert_fast.training.sharded import local


def check_tensor_ranks(config: AlbertConfig, tensor_ranks: int) -> None:
    """Raises ValueError unless the heads and the feed-forward columns can be divided among so many ranks."""
    heads, columns = config.num_attention_heads, config.intermediate_size
    check(
        tensor_ranks >= 1 and heads % tensor_ranks == 0 and columns % tensor_ranks == 0,
        f"tensor_ranks is {tensor_ranks}; a divisor of the model's {heads} attention heads and of its {columns} "
        "feed-forward columns was expected",
    )


def divide(model: AlbertModel, mesh: DeviceMesh) -> None:
    """Divides the encoder of `model` over the ranks of `mesh`, of one dimension; rank 0's weights are taken.

    Raises:
        ValueError: the heads or the feed-forward columns cannot be divided.
    """
    check_tensor_ranks(model.config, mesh.size())
    model.encoder = TensorParallelTransformer(model.encoder, mesh)


class TensorParallelTransformer(AlbertTransformer):
    """In place of `encoder`, with its modules and names; their parameters become DTensors."""

    def __init__(self, encoder: AlbertTransformer, mesh: DeviceMesh) -> None:
        check(
            not encoder.quantized, "the model is quantized to int8, which does not train: model.quantize(False) first"
        )
        with torch.device("meta"):
            super().__init__(encoder.config)
        self.mesh = mesh
        self.recompute = encoder.recompute
        self.train(encoder.training)
        self.embedding_hidden_mapping_in = encoder.embedding_hidden_mapping_in
        self.albert_layer_groups = encoder.albert_layer_groups
        for layer in self.albert_layer_groups.modules():
            if isinstance(layer, AlbertLayer):
                attention = layer.attention
                for linear in (attention.query, attention.key, attention.value, layer.ffn):
                    _divide(linear, "weight", 0, mesh)
                    _divide(linear, "bias", 0, mesh)
                for linear in (attention.dense, layer.ffn_output):
                    _divide(linear, "weight", 1, mesh)

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
        """As AlbertTransformer's, with the same arguments on all ranks; each returns the whole of it."""
        config, rank, ranks = self.config, self.mesh.get_local_rank(), self.mesh.size()
        check(not self.quantized, "the model is quantized to int8, which tensor parallelism does not know")
        check(
            attentions is None, "output_attentions is set, and no rank has all heads: ask a model that is not divided"
        )
        if bias is not None and bias.shape[1] > 1:
            bias = bias.chunk(ranks, dim=1)[rank]
        hidden = self.embedding_hidden_mapping_in(embedded)
        run = _Pass(
            group=self.mesh.get_group(),
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            heads=config.num_attention_heads // ranks,
            activation=config.hidden_act,
            eps=config.layer_norm_eps,
            hidden_dropout_p=config.hidden_dropout_prob if self.training else 0.0,
            attention_dropout_p=config.attention_probs_dropout_prob if self.training else 0.0,
            seed=seed,
            attention_seed=None if seed is None else seed + rank,
            bias=bias,
            recompute=self.recompute if torch.is_grad_enabled() else "none",
        )
        passes = layer_of_pass(config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num)
        # What is narrowed is decided here, once: the hidden states' dtype is that of the products.
        with torch.autocast(hidden.device.type, enabled=False):
            layers = _layers([local(tensor) for tensor in self.parameters_of_layers()], hidden.dtype)
            states = [hidden]
            for index, layer in enumerate(passes):
                if run.recompute == "layer":
                    y = cast(Tensor, _recomputed(run.whole, states[-1], layers[layer], index))
                else:
                    y = run.whole(states[-1], layers[layer], index)
                states = [*states, y] if return_all else [y]
            return torch.stack(states) if return_all else states[-1]


def _divide(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    whole = module.get_parameter(name)
    part = distribute_tensor(whole.detach(), mesh, [Shard(dim)])
    module.register_parameter(name, nn.Parameter(part, requires_grad=whole.requires_grad))


# -------------------------------------------------------------------------------------------------------------- a pass


class _Matrix(NamedTuple):
    """A matrix, and its copy in the dtype of the products: made once for all passes."""

    weight: Tensor
    narrow: Tensor


class _Layer(NamedTuple):
    """This rank's part of the layer."""

    qkv: _Matrix
    qkv_bias: Tensor
    dense: _Matrix
    dense_bias: Tensor
    attention_norm: tuple[Tensor, Tensor]
    ffn: _Matrix
    ffn_bias: Tensor
    ffn_output: _Matrix
    ffn_output_bias: Tensor
    norm: tuple[Tensor, Tensor]


def _layers(tensors: list[Tensor], dtype: torch.dtype) -> list[_Layer]:
    def matrix(weight: Tensor) -> _Matrix:
        return _Matrix(weight, weight.detach().to(dtype))

    return [
        _Layer(
            matrix(layer.qkv_weight),
            layer.qkv_bias,
            matrix(layer.dense_weight),
            layer.dense_bias,
            (layer.attention_norm_weight, layer.attention_norm_bias),
            matrix(layer.ffn_weight),
            layer.ffn_bias,
            matrix(layer.ffn_output_weight),
            layer.ffn_output_bias,
            (layer.norm_weight, layer.norm_bias),
        )
        for layer in layers_of(tensors)
    ]


class _Pass(NamedTuple):
    """What all passes of one forward have in common."""

    group: distributed.ProcessGroup
    cu_seqlens: Tensor
    max_seqlen: int
    heads: int  # of this rank
    activation: str
    eps: float
    hidden_dropout_p: float
    attention_dropout_p: float
    seed: Tensor | None
    attention_seed: Tensor | None
    bias: Tensor | None
    recompute: str

    def whole(self, x: Tensor, layer: _Layer, index: int) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden], whole on each rank."""
        projected = self._attention(_ToParts.apply(x, self.group), layer, index)
        h = self._norm(projected, layer.dense_bias, x, layer.attention_norm, self.hidden_dropout_p, 2 + 2 * index)
        parts = _ToParts.apply(h, self.group)
        # Not the sum, which would be another call over the network.
        if self.recompute == "ffn":
            y = cast(Tensor, _recomputed(self._feed_forward, parts, layer))
        else:
            y = self._feed_forward(parts, layer)
        return self._norm(y, layer.ffn_output_bias, h, layer.norm, 0.0, 0)

    def _attention(self, x: Tensor, layer: _Layer, index: int) -> Tensor:
        """This rank's term of the sum that `dense` is."""
        qkv = _linear(x, layer.qkv) + layer.qkv_bias.to(x.dtype)
        context = ops.attention(
            qkv.unflatten(-1, (3, self.heads, -1)),  # [tokens, 3, this rank's heads, head_dim]
            self.cu_seqlens,
            self.max_seqlen,
            dropout_p=self.attention_dropout_p,
            seed=self.attention_seed,
            site=1 + 2 * index,
            bias=self.bias,
        )
        return _linear(context, layer.dense)

    def _feed_forward(self, h: Tensor, layer: _Layer) -> Tensor:
        """This rank's term of the sum that `ffn_output` is."""
        inner = _linear(h, layer.ffn)  # [tokens, this rank's columns]
        form = FUSED_ACTIVATIONS.get(self.activation)
        if form is None:
            inner = ACTIVATIONS[self.activation](inner + layer.ffn_bias.to(h.dtype))
        else:
            inner = ops.bias_gelu(inner, layer.ffn_bias, approximate=form)
        return _linear(inner, layer.ffn_output)

    def _norm(
        self, part: Tensor, bias: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor], dropout_p: float, site: int
    ) -> Tensor:
        return ops.dropout_add_layer_norm(
            _Sum.apply(part, self.group),
            bias,
            residual,
            *norm,
            eps=self.eps,
            dropout_p=dropout_p,
            seed=self.seed,
            site=site,
            cu_seqlens=self.cu_seqlens,
        )


def _recomputed(function: Any, *arguments: Any) -> Any:
    # Masks come of seeds, not of a generator whose state would have to be kept.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _linear(x: Tensor, matrix: _Matrix) -> Tensor:
    return cast(Tensor, _Linear.apply(x, matrix.weight, matrix.narrow))


class _Linear(torch.autograd.Function):
    """x narrowᵀ. The gradient goes to `weight`, in its dtype, so that those of the passes are summed in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, narrow: Tensor) -> Tensor:
        ctx.save_for_backward(x, narrow)
        ctx.dtype = weight.dtype
        return x @ narrow.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, narrow) = grads, ctx.saved_tensors
        grad_x = grad @ narrow if ctx.needs_input_grad[0] else None
        grad_weight = (grad.t() @ x).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _ToParts(torch.autograd.Function):
    """What all ranks have goes into each one's part of a product: the gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' parts, in place: each part has a share of it, so its gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: distributed.ProcessGroup) -> Tensor:
        distributed.all_reduce(part, group=group)
        ctx.mark_dirty(part)
        return part

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
