"""The operations of `albert_fast.ops`, one by one: forward ("inference"), and forward and backward ("training").

All peers are in this process and get the same packed tensors. The oracle is the reference in float64, the yardstick the
reference in the same dtype, of which this package may be off by twice as much, as everywhere (`parity`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from albert_fast import AlbertConfig
from albert_fast.bench import parity
from albert_fast.bench.arguments import MODES, Shape
from albert_fast.bench.case import Case, Here
from albert_fast.bench.data import LABELLED_SHARE
from albert_fast.bench.formats import FORMATS
from albert_fast.bench.parity import Results
from albert_fast.bench.peers import OPERATION_PEERS
from albert_fast.bench.suites.setting import Setting, lengths_of
from albert_fast.bench.work import Work
from albert_fast.bench.worker import CPU, TURN
from albert_fast.flops import Operations

NOTHING = Operations(0, 0)


@dataclass
class Call:
    """The arguments of one call, and what it needs at least.

    Attributes:
        tensors: in float32 where they are of floating point: gradients are asked for of all those.
        options: the rest.
        tokens: of the output.
        operations: of the forward; the backward has twice as many.
        moved: numbers that the forward, and the backward, must read and write.
        padded: the places that a padded batch of these rows has.
    """

    tensors: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    operations: Operations = NOTHING
    moved: tuple[int, int] = (0, 0)
    labelled: int = 0
    padded: int | None = None


# ------------------------------------------------------------------------------------------------------ what is called


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attention(config: AlbertConfig, shape: Shape) -> Call:
    lengths = lengths_of(shape)
    tokens, hidden, heads = sum(lengths), config.hidden_size, config.num_attention_heads
    return Call(
        {"qkv": torch.randn(tokens, 3, heads, hidden // heads), "cu_seqlens": _offsets(lengths)},
        {"max_seqlen": shape.length},
        tokens,
        Operations(0, sum(4 * length**2 * hidden for length in lengths)),
        (4 * tokens * hidden, 8 * tokens * hidden),
        padded=shape.rows * shape.length,
    )


def cross_attention(config: AlbertConfig, shape: Shape) -> Call:
    """A quarter as many queries as keys, as a decoder has them."""
    keys = lengths_of(shape)
    queries = [max(1, length // 4) for length in keys]
    hidden, heads = config.hidden_size, config.num_attention_heads
    query, key, value = (torch.randn(sum(rows), heads, hidden // heads) for rows in (queries, keys, keys))
    moved = 2 * (query.numel() + key.numel())
    return Call(
        {
            "query": query,
            "key": key,
            "value": value,
            "cu_seqlens_q": _offsets(queries),
            "cu_seqlens_k": _offsets(keys),
        },
        {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)},
        sum(queries),
        Operations(0, sum(4 * q * k * hidden for q, k in zip(queries, keys, strict=True))),
        (moved, 2 * moved),
        padded=shape.rows * max(queries),
    )


def encoder(config: AlbertConfig, shape: Shape) -> Call:
    lengths = lengths_of(shape)
    tokens, hidden, inner, passes = sum(lengths), config.hidden_size, config.intermediate_size, config.num_hidden_layers
    scale = config.initializer_range
    square = [(scale * torch.randn(hidden, hidden), scale * torch.randn(hidden)) for _ in range(4)]
    norms = [(1.0 + scale * torch.randn(hidden), scale * torch.randn(hidden)) for _ in range(2)]
    ffn = (scale * torch.randn(inner, hidden), scale * torch.randn(inner))
    ffn_output = (scale * torch.randn(hidden, inner), scale * torch.randn(hidden))
    layer = [tensor for pair in (*square, norms[0], ffn, ffn_output, norms[1]) for tensor in pair]
    products = passes * 2 * tokens * (4 * hidden**2 + 2 * hidden * inner)
    return Call(
        {"hidden": torch.randn(tokens, hidden), "parameters": layer, "cu_seqlens": _offsets(lengths)},
        {"max_seqlen": shape.length, "num_layers": passes, "num_heads": config.num_attention_heads},
        tokens,
        Operations(products, passes * sum(4 * length**2 * hidden for length in lengths)),
        padded=shape.rows * shape.length,
    )


def masked_lm_loss(config: AlbertConfig, shape: Shape, labelled: float = LABELLED_SHARE) -> Call:
    tokens, size, vocab = sum(lengths_of(shape)), config.embedding_size, config.vocab_size
    labels = torch.full((tokens,), -100)
    chosen = torch.randperm(tokens)[: max(1, round(labelled * tokens))]
    labels[chosen] = torch.randint(vocab, (len(chosen),))
    table, bias = 0.5 * torch.randn(vocab, size), torch.randn(vocab)
    return Call(
        {"x": torch.randn(tokens, size), "table": table, "bias": bias, "labels": labels},
        {},
        tokens,
        Operations(2 * len(chosen) * size * vocab, 0),
        (table.numel(), 2 * table.numel()),
        labelled=len(chosen),
    )


def dropout_add_layer_norm(config: AlbertConfig, shape: Shape) -> Call:
    tokens, hidden = sum(lengths_of(shape)), config.hidden_size
    vectors = {"bias": torch.randn(hidden), "weight": torch.randn(hidden), "ln_bias": torch.randn(hidden)}
    both = {"x": torch.randn(tokens, hidden), "residual": torch.randn(tokens, hidden)}
    eps = {"eps": config.layer_norm_eps}
    return Call({**both, **vectors}, eps, tokens, moved=(3 * tokens * hidden, 5 * tokens * hidden))


def bias_gelu(config: AlbertConfig, shape: Shape) -> Call:
    tokens, inner = sum(lengths_of(shape)), config.intermediate_size
    tensors = {"x": torch.randn(tokens, inner), "bias": torch.randn(inner)}
    return Call(tensors, {"approximate": "tanh"}, tokens, moved=(2 * tokens * inner, 3 * tokens * inner))


def embed_layer_norm(config: AlbertConfig, shape: Shape) -> Call:
    lengths, size = lengths_of(shape), config.embedding_size
    tokens = sum(lengths)
    ids = {
        "inputs": torch.randint(config.vocab_size, (tokens,)),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "token_type_ids": torch.randint(2, (tokens,)),
    }
    rows = {"word": config.vocab_size, "position": max(config.max_position_embeddings, shape.length), "token_type": 2}
    tables = {name: torch.randn(count, size) for name, count in rows.items()}
    vectors = {"weight": torch.randn(size), "bias": torch.randn(size)}
    # The gradient of the word table is written, all of it.
    moved = (2 * tokens * size, 2 * tokens * size + tables["word"].numel())
    return Call({**ids, **tables, **vectors}, {"eps": config.layer_norm_eps}, tokens, moved=moved)


OPERATIONS: dict[str, Callable[..., Call]] = {
    function.__name__: function
    for function in (
        attention,
        cross_attention,
        encoder,
        masked_lm_loss,
        dropout_add_layer_norm,
        bias_gelu,
        embed_layer_norm,
    )
}


# --------------------------------------------------------------------------------------------------------------- a case


@dataclass(kw_only=True)
class OperationCase(Case):
    """Attributes:
    make: the call that is measured.
    turn: as in `Here`.
    """

    make: Callable[[], Call]
    operation: str
    turn: float = TURN
    peers: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        has = (name for name, peer in OPERATION_PEERS.items() if hasattr(peer, self.operation))
        self.peers = self.peers or tuple(has)

    @functools.cached_property
    def call(self) -> Call:
        return self.make()

    @functools.cached_property
    def expected(self) -> Results:
        return self._results("reference", "float64")

    @functools.cached_property
    def yardstick(self) -> float:
        return parity.error(self._results("reference", self.dtype), self.expected)

    def work(self) -> Work:
        call, training = self.call, self.mode == "training"
        times = 3 if training else 1
        moved = sum(call.moved) if training else call.moved[0]
        return self.new_work(
            tokens=call.tokens,
            fill=call.tokens / (call.padded or call.tokens),
            labelled=call.labelled,
            gflop=times * call.operations.total / 1e9,
            attention_gflop=times * call.operations.attention / 1e9,
            megabytes=moved * FORMATS[self.dtype].activations.itemsize / 1e6,
        )

    def refuses(self, peer: str) -> str | None:
        return OPERATION_PEERS[peer]().refuses(self.mode, self.dtype, self.device.type)

    def open(self, peer: str) -> Here:
        compute = functools.cache(lambda: self._bind(peer, self.dtype))
        return Here(lambda: _detached(compute()()), lambda: compute()(), self.device, self.turn)

    def judge(self, peer: str, results: Results) -> tuple[float, float]:
        largest = parity.LARGEST[self.mode, self.dtype]
        # A rounding is always allowed, and some of one number alone: few may happen to be exact in the yardstick.
        one_number = sum(value.numel() for value in self.expected.values()) == 1
        rounding = torch.finfo(FORMATS[self.dtype].activations).eps * (4.0 if one_number else 1.0)
        ours = min(max(parity.TOLERANCE * self.yardstick, rounding), largest)
        return parity.error(results, self.expected), ours if peer in ("albert_fast", "reference") else largest

    def _results(self, peer: str, dtype: str) -> Results:
        return _detached(self._bind(peer, dtype)())

    def _bind(self, peer: str, dtype: str) -> Callable[[], Results]:
        """A call with tensors of its own, and in training their gradients."""
        numbers, training = FORMATS[dtype].activations, self.mode == "training"

        def own(tensor: Any) -> Any:
            if isinstance(tensor, list):
                return [own(each) for each in tensor]
            tensor = tensor.to(self.device, numbers if tensor.is_floating_point() else None, copy=True)
            return tensor.requires_grad_(training and tensor.is_floating_point())

        tensors = {name: own(tensor) for name, tensor in self.call.tensors.items()}
        leaves = {
            name if len(group) == 1 else f"{name}[{i}]": leaf
            for name, value in tensors.items()
            for group in [value if isinstance(value, list) else [value]]
            for i, leaf in enumerate(group)
            if leaf.requires_grad
        }
        implementation, arguments = OPERATION_PEERS[peer](), {**tensors, **self.call.options}

        def forward() -> Results:
            with torch.no_grad():
                return {"output": implementation.run(self.operation, arguments)}

        def forward_and_backward() -> Results:
            output = implementation.run(self.operation, arguments)
            upstream = torch.ones_like(output) if output.dim() == 0 else self._upstream(output)
            gradients = torch.autograd.grad(output, list(leaves.values()), upstream, allow_unused=True)
            named = zip(leaves, gradients, strict=True)
            return {"output": output, **{name: gradient for name, gradient in named if gradient is not None}}

        return forward_and_backward if training else forward

    def _upstream(self, output: Tensor) -> Tensor:
        """The gradient of the output: the same for every peer, up to rounding."""
        if "upstream" not in self.__dict__:
            self.__dict__["upstream"] = {None: torch.randn(output.shape)}
        known = self.__dict__["upstream"]
        if output.dtype not in known:
            known[output.dtype] = known[None].to(output)
        return known[output.dtype]

    def release(self) -> None:
        super().release()
        self.__dict__.pop("upstream", None)


def _detached(results: Results) -> Results:
    return {name: tensor.detach().to_dense() for name, tensor in results.items()}


def operation_case(
    operation: str,
    config: AlbertConfig,
    shape: Shape,
    mode: str,
    dtype: str = "float32",
    *,
    device: torch.device = CPU,
    turn: float = TURN,
    suite: str = "ops",
    peers: tuple[str, ...] = (),
    varied: dict[str, Any] | None = None,
    threads: int | None = None,
    **options: Any,
) -> OperationCase:
    """A case of an operation in a model of this config. options: of its function in `OPERATIONS`."""
    return OperationCase(
        suite=suite,
        group=operation,
        mode=mode,
        dtype=dtype,
        shape=str(shape),
        peers=peers,
        device=device,
        varied=varied or {},
        threads=threads,
        make=lambda: OPERATIONS[operation](config, shape, **options),
        operation=operation,
        turn=turn,
    )


def cases(setting: Setting) -> list[Case]:
    shapes: tuple[Shape, ...] = (Shape(4, 128), Shape(8, 128, ragged=True))
    if not setting.quick:
        shapes = (Shape(8, 128), Shape(8, 512), Shape(32, 128, ragged=True))
    dtypes = ("float32",) if setting.quick else ("float32", "bfloat16")
    return [
        operation_case(operation, setting.config, shape, mode, dtype, device=setting.device, turn=setting.turn)
        for operation in OPERATIONS
        for dtype in dtypes
        for mode in MODES
        for shape in shapes
    ]
