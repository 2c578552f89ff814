"""LayerNorm(residual + dropout(x + bias)) against the formula, and against torch.nn's modules."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops import dropout_add_layer_norm
from albert_fast.ops.dropout import keep_mask, token_coordinates
from albert_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm_reference
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
parametrize_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])


class Case:
    def __init__(
        self,
        lengths: list[int],
        hidden: int,
        dropout_p: float = 0.0,
        *,
        beyond: int = 0,
        dtype: torch.dtype = torch.float64,
        residual_dtype: torch.dtype | None = None,
        vector_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        tokens = sum(lengths) + beyond
        residual_dtype = residual_dtype or dtype
        sizes = {"x": (tokens, hidden), "bias": (hidden,), "residual": (tokens, hidden)}
        sizes |= {"weight": (hidden,), "ln_bias": (hidden,)}
        dtypes = {"x": dtype, "residual": residual_dtype}
        self.tensors = {
            name: torch.randn(size).to(device, dtypes.get(name, vector_dtype or dtype)) for name, size in sizes.items()
        }
        self.upstream = torch.randn(tokens, hidden).to(device, torch.promote_types(dtype, residual_dtype))
        self.options: dict[str, Any] = {"eps": EPS}
        if dropout_p:
            seed, cu_seqlens = random_seed(device), offsets(lengths, device)
            self.options |= {"dropout_p": dropout_p, "seed": seed, "site": random.randrange(9)}
            self.options |= {"cu_seqlens": cu_seqlens}

    def full_options(self) -> dict[str, Any]:
        return {"dropout_p": 0.0, "seed": None, "site": 0, "cu_seqlens": None, **self.options}

    def operator_arguments(self) -> tuple[Any, ...]:
        options = self.full_options()
        names = ("eps", "dropout_p", "seed", "site", "cu_seqlens")
        return *self.tensors.values(), *(options[name] for name in names)

    def factor(self, like: Tensor) -> Tensor:
        """Of each element of x: 0 or 1 / (1 - p)."""
        options = self.full_options()
        if not options["dropout_p"]:
            return torch.ones_like(like)
        row, position = token_coordinates(options["cu_seqlens"], like.shape[0], options["seed"].device)
        keep = keep_mask(options["seed"], options["site"], row, position, like.shape[1], options["dropout_p"])
        return keep.to(like) / (1 - options["dropout_p"])

    def implementation(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
        x = self.tensors["x"]
        call = backends.Call("dropout_add_layer_norm", x.device, x.dtype)
        if parity.use(name, call, monkeypatch):
            rest = self.operator_arguments()[5:]
            return lambda **tensors: torch.ops.albert_fast.dropout_add_layer_norm(*tensors.values(), *rest)
        return partial(dropout_add_layer_norm, **self.options)

    def expected(self) -> dict[str, Tensor]:
        def formula(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
            summed = residual + (x + bias) * self.factor(x)
            centred = summed - summed.mean(dim=1, keepdim=True)
            variance = centred.square().mean(dim=1, keepdim=True)
            return centred / (variance + EPS).sqrt() * weight + ln_bias

        return differentiate(formula, oracle_inputs(self.tensors), self.upstream)

    def peer(self) -> dict[str, Tensor]:
        def kernels(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
            summed = residual + ((x + bias) * self.factor(x)).to(x.dtype)
            vectors = (weight.to(summed.dtype), ln_bias.to(summed.dtype))
            return F.layer_norm(summed, weight.shape, *vectors, eps=EPS)

        return differentiate(kernels, self.tensors, self.upstream)


@parametrize_implementation
@parametrize_dropout
@pytest.mark.parametrize("hidden", [5, 17, 64, 130])
def test_equals_the_formula(implementation, dropout_p, hidden, device, monkeypatch):
    case = Case(ragged_lengths((1, 15, 17)), hidden, dropout_p, beyond=random.randint(0, 3), device=device)
    function = case.implementation(implementation, monkeypatch)
    assert_all_close(differentiate(function, case.tensors, case.upstream), case.expected())


HALF, SINGLE = torch.bfloat16, torch.float32
MIXED = {
    "x bfloat16": (HALF, SINGLE, SINGLE),
    "vectors float32": (HALF, HALF, SINGLE),
    "residual bfloat16": (SINGLE, HALF, SINGLE),
    "x and vectors bfloat16": (HALF, SINGLE, HALF),
}


@parametrize_implementation
@parametrize_dropout
@parametrize_dtype
@judged_over_draws
def test_is_as_accurate_as_pytorch(implementation, dropout_p, dtype, device, monkeypatch):
    case = Case(ragged_lengths((1, 15, 17, 63, 127)), 256, dropout_p, dtype=dtype, device=device)
    function = case.implementation(implementation, monkeypatch)
    actual = differentiate(function, case.tensors, case.upstream)
    assert_all_as_accurate_as(actual, case.peer(), case.expected())


@parametrize_implementation
@parametrize_dropout
@pytest.mark.parametrize("dtypes", MIXED)
@judged_over_draws
def test_mixed_dtypes(implementation, dropout_p, dtypes, device, monkeypatch):
    dtype, residual_dtype, vector_dtype = MIXED[dtypes]
    kinds = {"dtype": dtype, "residual_dtype": residual_dtype, "vector_dtype": vector_dtype}
    case = Case([17, 0, 63], 192, dropout_p, device=device, **kinds)
    function = case.implementation(implementation, monkeypatch)
    actual = differentiate(function, case.tensors, case.upstream)
    assert actual["output"].dtype == torch.promote_types(dtype, residual_dtype)
    for name, tensor in case.tensors.items():
        assert actual[name].dtype == tensor.dtype, name
    assert_all_as_accurate_as(actual, case.peer(), case.expected())


@parametrize_implementation
def test_equals_the_modules(implementation, device, monkeypatch):
    case = Case([9], 48, device=device)
    function = case.implementation(implementation, monkeypatch)
    dense, norm = torch.nn.Linear(48, 48).double(), torch.nn.LayerNorm(48, eps=EPS).double()
    inputs = torch.randn(9, 48, dtype=torch.float64)
    residual = torch.randn(9, 48, dtype=torch.float64)
    tensors = {"x": inputs @ dense.weight.t(), "bias": dense.bias, "residual": residual}
    tensors |= {"weight": norm.weight, "ln_bias": norm.bias}
    actual = function(**{name: tensor.detach().to(device) for name, tensor in tensors.items()})
    torch.testing.assert_close(actual.cpu(), norm(dense(inputs) + residual).detach())


@parametrize_implementation
def test_a_row_of_equal_numbers_is_the_bias(implementation, device, monkeypatch):
    """Variance 0: eps alone keeps it finite."""
    case = Case([3], 16, dtype=torch.float32, device=device)
    for name in ("x", "bias", "residual"):
        case.tensors[name] = torch.ones_like(case.tensors[name])
    results = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    torch.testing.assert_close(results["output"], case.tensors["ln_bias"].expand(3, -1))
    assert all(result.isfinite().all() for result in results.values())


@parametrize_implementation
@judged_over_draws
def test_a_large_mean_does_not_swallow_the_variance(implementation, device, monkeypatch):
    """mean(x²) - mean(x)² loses everything here; two passes, or Welford's, do not."""
    case = Case([33], 128, dtype=torch.float32, device=device)
    case.tensors["residual"] += 3000
    function = case.implementation(implementation, monkeypatch)
    assert_all_as_accurate_as(differentiate(function, case.tensors, case.upstream), case.peer(), case.expected())


@parametrize_implementation
@parametrize_dropout
def test_no_tokens(implementation, dropout_p, device, monkeypatch):
    case = Case([0, 0], 8, dropout_p, device=device)
    results = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert results["output"].shape == (0, 8)
    assert not any(result.any() for result in results.values())


@parametrize_implementation
@parametrize_dropout
def test_strided_inputs(implementation, dropout_p, device, monkeypatch):
    case = Case([5, 0, 4], 12, dropout_p, device=device)
    function = case.implementation(implementation, monkeypatch)
    expected = differentiate(function, case.tensors, case.upstream)
    wide = dict(case.tensors)
    wide["x"] = case.tensors["x"].t().contiguous()
    wide["residual"] = torch.cat([case.tensors["residual"]] * 2, dim=1)
    wide["weight"] = case.tensors["weight"].repeat_interleave(2)

    def strided(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor) -> Tensor:
        return function(x=x.t(), bias=bias, residual=residual[:, :12], weight=weight[::2], ln_bias=ln_bias)

    actual = differentiate(strided, wide, case.upstream.t().contiguous().t())
    actual["x"], actual["residual"] = actual["x"].t(), actual["residual"][:, :12]
    actual["weight"] = actual["weight"][::2]
    assert_all_close(actual, expected)


@parametrize_implementation
@parametrize_dropout
def test_twice_the_same_bits(implementation, dropout_p, device, monkeypatch, unpoisoned_memory):
    if device.type == "cuda" and "reference" in implementation:
        pytest.skip("PyTorch's own kernels do not promise it on CUDA")
    case = Case([63, 127], 64, dropout_p, dtype=torch.float32, device=device)
    function = case.implementation(implementation, monkeypatch)
    first, second = (differentiate(function, case.tensors, case.upstream) for _ in range(2))
    assert_same_bits(first, second)


@parametrize_implementation
def test_dropout_without_rows_is_that_of_one_row(implementation, device, monkeypatch):
    case = Case([9], 12, 0.4, device=device)
    with_rows = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    case.options["cu_seqlens"] = None
    without = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert_same_bits(without, with_rows)


@parametrize_dropout
def test_gradcheck_of_the_reference(dropout_p):
    case = Case([2, 0, 3], 5, dropout_p, beyond=1)
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]
    assert torch.autograd.gradcheck(partial(dropout_add_layer_norm_reference, **case.full_options()), leaves)


@parametrize_dropout
@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE, SINGLE), *MIXED.values()], ids=["float32", *MIXED])
def test_opcheck(dropout_p, dtypes, device):
    dtype, residual_dtype, vector_dtype = dtypes
    kinds = {"dtype": dtype, "residual_dtype": residual_dtype, "vector_dtype": vector_dtype}
    case = Case([2, 0, 3], 6, dropout_p, device=device, **kinds)
    arguments = case.operator_arguments()
    parity.check_operator(torch.ops.albert_fast.dropout_add_layer_norm.default, arguments)
    backward = (case.upstream, *arguments)
    operator = torch.ops.albert_fast.dropout_add_layer_norm_backward.default
    parity.check_operator(operator, backward, without_gradient=tuple(range(len(backward))))


@parametrize_dropout
def test_compiled_with_any_number_of_tokens(dropout_p, device):
    backend = CountingBackend()

    def loss(options, x, bias, residual, weight, ln_bias):
        return dropout_add_layer_norm(x * 2.0, bias, residual, weight, ln_bias, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for lengths in ([5, 2], [3, 1], [1, 9]):
        case = Case(lengths, 6, dropout_p, device=device)
        options = {**case.options, "site": 3}
        results = [differentiate(partial(function, options), case.tensors) for function in (compiled, loss)]
        assert_all_close(*results)
    assert backend.count <= 2, "one graph for the first shape and one for all others"


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": torch.zeros(3)}, ValueError, "x is .* shape"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"residual": torch.zeros(2, 4)}, ValueError, "residual is .* shape"),
        ({"residual": torch.zeros(3, 4, dtype=torch.int32)}, TypeError, "residual is int32"),
        ({"residual": torch.zeros(3, 4, device="meta")}, ValueError, "residual is on meta"),
        ({"bias": torch.zeros(3)}, ValueError, "bias is .* shape"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, TypeError, "bias is float64"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias is on meta"),
        ({"weight": torch.zeros(5)}, ValueError, "weight is .* shape"),
        ({"weight": torch.zeros(4, dtype=torch.float16)}, TypeError, "weight is float16"),
        ({"ln_bias": torch.zeros(1, 4)}, ValueError, "ln_bias is .* shape"),
        ({"ln_bias": torch.zeros(4, dtype=torch.int64)}, TypeError, "ln_bias is int64"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
        ({"dropout_p": 0.1}, ValueError, "seed is None"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, ValueError, "seed is torch.float32"),
        ({"cu_seqlens": offsets([2, 2])}, ValueError, "cu_seqlens is .* 3 tokens"),
        ({"cu_seqlens": offsets([2, 1]).long()}, TypeError, "cu_seqlens is int64"),
        ({"cu_seqlens": offsets([3]).flip(0)}, ValueError, "cu_seqlens is .* begin with 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], error, match):
    tensors = {"x": torch.zeros(3, 4), "residual": torch.zeros(3, 4)}
    vectors = {name: torch.zeros(4) for name in ("bias", "weight", "ln_bias")}
    with pytest.raises(error, match=match):
        dropout_add_layer_norm(**{**tensors, **vectors, "eps": EPS, **changed})
