"""LayerNorm(word + token type + position) and dropout against torch.nn's modules and one-hot products."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends, native
from albert_fast.ops import embed_layer_norm
from albert_fast.ops.dropout import keep_mask, token_coordinates
from albert_fast.ops.embed_layer_norm import embed_layer_norm_reference
from ops import parity
from ops.parity import (
    CountingBackend,
    assert_all_as_accurate_as,
    assert_all_close,
    assert_same_bits,
    differentiate,
    judged_over_draws,
    offsets,
    oracle_inputs,
    parametrize_dtype,
    parametrize_implementation,
    ragged_lengths,
    random_seed,
)

EPS = 1e-12
WORDS, POSITIONS, TYPES = 50, 130, 3
IDS = ("inputs", "position_ids", "token_type_ids")
VARIANTS: dict[str, dict[str, Any]] = {
    "ids": {},
    "embeds": {"embeds": True},
    "padding": {"padding_idx": 3},
    "dropout": {"dropout_p": 0.3, "padding_idx": 0},
    "embeds and dropout": {"embeds": True, "dropout_p": 0.3},
}
parametrize_variant = pytest.mark.parametrize("variant", VARIANTS)


class Case:
    def __init__(
        self,
        lengths: list[int],
        size: int = 32,
        *,
        embeds: bool = False,
        dropout_p: float = 0.0,
        padding_idx: int | None = None,
        id_dtype: torch.dtype = torch.int64,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        tokens = sum(lengths)
        ids = {
            "inputs": torch.randint(WORDS, (tokens,)),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]) % POSITIONS,
            "token_type_ids": torch.randint(TYPES, (tokens,)),
        }
        tables = {"word": (WORDS, size), "position": (POSITIONS, size), "token_type": (TYPES, size)}
        shapes = tables | {"weight": (size,), "bias": (size,)}
        self.tensors = {name: tensor.to(device, id_dtype) for name, tensor in ids.items()}
        self.tensors |= {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
        if embeds:
            self.tensors["inputs"] = torch.randn(tokens, size).to(device, dtype)
        self.upstream = torch.randn(tokens, size).to(device, dtype)
        self.options: dict[str, Any] = {"eps": EPS, "padding_idx": padding_idx}
        if dropout_p:
            self.options |= {"dropout_p": dropout_p, "seed": random_seed(device), "site": random.randrange(9)}
            self.options |= {"cu_seqlens": offsets(lengths, device)}

    def full_options(self) -> dict[str, Any]:
        return {"dropout_p": 0.0, "seed": None, "site": 0, "cu_seqlens": None, **self.options}

    def operator_arguments(self) -> tuple[Any, ...]:
        options = self.full_options()
        names = ("eps", "dropout_p", "seed", "site", "cu_seqlens", "padding_idx")
        return *self.tensors.values(), *(options[name] for name in names)

    def implementation(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
        word = self.tensors["word"]
        if parity.use(name, backends.Call("embed_layer_norm", word.device, word.dtype), monkeypatch):
            rest = self.operator_arguments()[8:]
            return lambda **tensors: torch.ops.albert_fast.embed_layer_norm(*tensors.values(), *rest)
        return partial(embed_layer_norm, **self.options)

    def factor(self, like: Tensor) -> Tensor:
        options = self.full_options()
        if not options["dropout_p"]:
            return torch.ones_like(like)
        row, position = token_coordinates(options["cu_seqlens"], like.shape[0], options["seed"].device)
        keep = keep_mask(options["seed"], options["site"], row, position, like.shape[1], options["dropout_p"])
        return keep.to(like) / (1 - options["dropout_p"])

    def expected(self) -> dict[str, Tensor]:
        """Rows are picked by products with one-hot matrices, whose gradient is a plain product."""

        def pick(ids: Tensor, table: Tensor, padding_idx: int | None = None) -> Tensor:
            one_hot = F.one_hot(ids.long(), table.shape[0]).to(table)
            if padding_idx is None:
                return one_hot @ table
            without = one_hot.clone()
            without[:, padding_idx] = 0
            return without @ table + (one_hot - without) @ table.detach()

        def formula(inputs, position_ids, token_type_ids, word, position, token_type, weight, bias) -> Tensor:
            words = inputs if inputs.is_floating_point() else pick(inputs, word, self.options["padding_idx"])
            summed = words + pick(position_ids, position) + pick(token_type_ids, token_type)
            centred = summed - summed.mean(dim=1, keepdim=True)
            variance = centred.square().mean(dim=1, keepdim=True)
            return (centred / (variance + EPS).sqrt() * weight + bias) * self.factor(centred)

        return differentiate(formula, oracle_inputs(self.tensors), self.upstream)

    def peer(self) -> dict[str, Tensor]:
        """As three nn.Embeddings and a LayerNorm do it, in the dtype of the tables."""

        def kernels(inputs, position_ids, token_type_ids, word, position, token_type, weight, bias) -> Tensor:
            embeds = inputs.is_floating_point()
            words = inputs if embeds else F.embedding(inputs, word, self.options["padding_idx"])
            summed = words + F.embedding(token_type_ids, token_type) + F.embedding(position_ids, position)
            normed = F.layer_norm(summed, weight.shape, weight, bias, EPS)
            return normed * self.factor(normed)

        return differentiate(kernels, self.tensors, self.upstream)


@parametrize_implementation
@parametrize_variant
@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
def test_equals_the_formula(implementation, variant, id_dtype, device, monkeypatch):
    size = random.choice([8, 33, 128])
    case = Case(ragged_lengths((1, 15, 17)), size, id_dtype=id_dtype, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    actual = differentiate(function, case.tensors, case.upstream)
    assert_all_close(actual, case.expected())
    if case.options["padding_idx"] is not None:
        assert not actual["word"][case.options["padding_idx"]].any()


@parametrize_implementation
@parametrize_variant
@parametrize_dtype
@judged_over_draws
def test_is_as_accurate_as_pytorch(implementation, variant, dtype, device, monkeypatch):
    case = Case(ragged_lengths((1, 15, 17, 63, 127)), 128, dtype=dtype, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    actual = differentiate(function, case.tensors, case.upstream)
    assert_all_as_accurate_as(actual, case.peer(), case.expected())


@parametrize_implementation
def test_equals_the_modules(implementation, device, monkeypatch):
    case = Case([9, 0, 4], padding_idx=2)
    case.tensors["inputs"][3] = 2
    word, position, token_type = (
        torch.nn.Embedding.from_pretrained(case.tensors[name], freeze=False, padding_idx=padding)
        for name, padding in (("word", 2), ("position", None), ("token_type", None))
    )
    norm = torch.nn.LayerNorm(32, eps=EPS).double()
    output = norm(
        word(case.tensors["inputs"])
        + token_type(case.tensors["token_type_ids"])
        + position(case.tensors["position_ids"])
    )
    output.backward(case.upstream)
    case.tensors |= {"weight": norm.weight.detach(), "bias": norm.bias.detach()}
    case.tensors = {name: tensor.to(device) for name, tensor in case.tensors.items()}
    actual = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    grads = {"word": word, "position": position, "token_type": token_type}
    expected = {"output": output, **{name: module.weight.grad for name, module in grads.items()}}
    expected |= {"weight": norm.weight.grad, "bias": norm.bias.grad}
    assert_all_close(actual, expected)


@parametrize_implementation
@parametrize_variant
def test_no_tokens(implementation, variant, device, monkeypatch):
    case = Case([0, 0], device=device, **VARIANTS[variant])
    results = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert results["output"].shape == (0, 32)
    assert not any(result.any() for result in results.values())


@parametrize_implementation
@parametrize_variant
def test_strided_inputs(implementation, variant, device, monkeypatch):
    case = Case([5, 0, 4], device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    expected = differentiate(function, case.tensors, case.upstream)
    doubled = {name: torch.stack([tensor] * 2, dim=-1) for name, tensor in case.tensors.items()}

    def strided(**tensors: Tensor) -> Tensor:
        return function(**{name: tensor[..., 0] for name, tensor in tensors.items()})

    actual = differentiate(strided, doubled, case.upstream.t().contiguous().t())
    assert_all_close({name: x if name == "output" else x[..., 0] for name, x in actual.items()}, expected)


@parametrize_implementation
@parametrize_variant
def test_twice_the_same_bits(implementation, variant, device, monkeypatch, unpoisoned_memory):
    if device.type == "cuda" and "reference" in implementation:
        pytest.skip("PyTorch's own kernels do not promise it on CUDA")
    case = Case([63, 127], dtype=torch.float32, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    first, second = (differentiate(function, case.tensors, case.upstream) for _ in range(2))
    assert_same_bits(first, second)


@parametrize_variant
def test_gradcheck_of_the_reference(variant):
    case = Case([2, 0, 3], 4, **VARIANTS[variant])
    case.tensors["inputs"][..., 0] += case.tensors["inputs"].dtype.is_floating_point
    if case.options["padding_idx"] is not None:
        # Its gradient is defined to be wrong.
        case.tensors["inputs"] = case.tensors["inputs"].clamp(min=case.options["padding_idx"] + 1)
    names = [name for name, tensor in case.tensors.items() if tensor.is_floating_point()]

    def function(*leaves: Tensor) -> Tensor:
        tensors = case.tensors | dict(zip(names, leaves, strict=True))
        return embed_layer_norm_reference(**tensors, **case.full_options())

    assert torch.autograd.gradcheck(function, [case.tensors[name].requires_grad_() for name in names])


@parametrize_variant
def test_opcheck(variant, device):
    case = Case([2, 0, 3], 8, dtype=torch.float32, device=device, **VARIANTS[variant])
    arguments = case.operator_arguments()
    parity.check_operator(torch.ops.albert_fast.embed_layer_norm.default, arguments)
    backward = (case.upstream, *arguments)
    operator = torch.ops.albert_fast.embed_layer_norm_backward.default
    parity.check_operator(operator, backward, without_gradient=tuple(range(len(backward))))


@pytest.mark.parametrize("variant", ["padding", "embeds", "dropout"])
def test_compiled_with_any_number_of_tokens(variant, device):
    backend = CountingBackend()

    def loss(options, **tensors):
        tensors["word"] = tensors["word"] * 2.0
        return embed_layer_norm(**tensors, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for lengths in ([5, 2], [3, 1], [1, 9]):
        case = Case(lengths, 8, device=device, **VARIANTS[variant])
        if "site" in case.options:
            case.options["site"] = 3
        results = [differentiate(partial(function, case.options), case.tensors) for function in (compiled, loss)]
        assert_all_close(*results)
    assert backend.count <= 2, "one graph for the first shape and one for all others"


IDS_OF_THREE = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"inputs": IDS_OF_THREE + WORDS}, IndexError, "input_ids has values .*0 to 49 was expected"),
        ({"inputs": IDS_OF_THREE - 1}, IndexError, "input_ids has values from -1"),
        ({"inputs": IDS_OF_THREE[None]}, ValueError, "input_ids is .* shape"),
        ({"inputs": IDS_OF_THREE.short()}, TypeError, "input_ids is int16"),
        ({"inputs": IDS_OF_THREE.to("meta")}, ValueError, "input_ids is on meta"),
        ({"inputs": torch.zeros(3, 5)}, ValueError, "inputs_embeds is .* shape"),
        ({"inputs": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "inputs_embeds is float64"),
        ({"position_ids": IDS_OF_THREE + POSITIONS}, IndexError, "position_ids has values"),
        ({"position_ids": IDS_OF_THREE[:2]}, ValueError, "position_ids is .* shape"),
        ({"position_ids": IDS_OF_THREE.float()}, TypeError, "position_ids is float32"),
        ({"token_type_ids": IDS_OF_THREE + TYPES}, IndexError, "token_type_ids has values"),
        ({"token_type_ids": IDS_OF_THREE.to("meta")}, ValueError, "token_type_ids is on meta"),
        ({"word": torch.zeros(4)}, ValueError, "word is .* shape"),
        ({"position": torch.zeros(POSITIONS, 5)}, ValueError, "table of position_ids is .* shape"),
        ({"token_type": torch.zeros(TYPES, 4).half()}, TypeError, "table of token_type_ids is float16"),
        ({"weight": torch.zeros(5)}, ValueError, "weight is .* shape"),
        ({"weight": torch.zeros(4).double()}, TypeError, "weight is float64"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias is on meta"),
        ({"padding_idx": WORDS}, ValueError, "padding_idx is 50"),
        ({"padding_idx": -1}, ValueError, "padding_idx is -1"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": 0.1}, ValueError, "seed is None"),
        ({"cu_seqlens": offsets([9])}, ValueError, "cu_seqlens is .* 3 tokens"),
        ({"word": torch.zeros(WORDS, 4, dtype=torch.int64)}, TypeError, "word is int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], error, match):
    tensors = dict.fromkeys(IDS, IDS_OF_THREE)
    tables = {"word": WORDS, "position": POSITIONS, "token_type": TYPES}
    tensors |= {name: torch.zeros(rows, 4) for name, rows in tables.items()}
    tensors |= {"weight": torch.zeros(4), "bias": torch.zeros(4)}
    embed_layer_norm(**tensors, eps=EPS)
    with pytest.raises(error, match=match):
        embed_layer_norm(**{**tensors, "eps": EPS, **changed})


@pytest.mark.skipif(native.load() is not None, reason="no native library")
@pytest.mark.parametrize("training", [False, True])
def test_rows_that_overlap(training, monkeypatch):
    """One vector for all words."""
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "cpu")
    ids = torch.zeros(5, dtype=torch.int64)
    table = torch.randn(1, 16).expand(8, 16)
    tables = [table, torch.randn(9, 16), torch.randn(2, 16), torch.ones(16), torch.zeros(16)]
    tables[1].requires_grad_(training)
    expected = embed_layer_norm(ids, ids, ids, table.contiguous(), *tables[1:], eps=1e-12)
    assert torch.equal(embed_layer_norm(ids, ids, ids, *tables, eps=1e-12), expected)
