"""gelu(x + bias) against its formulas, written out."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops import bias_gelu
from albert_fast.ops.bias_gelu import FORMS, bias_gelu_reference
from ops import parity
from ops.parity import (
    CountingBackend,
    assert_all_as_accurate_as,
    assert_all_close,
    assert_same_bits,
    differentiate,
    judged_over_draws,
    oracle_inputs,
    parametrize_dtype,
    parametrize_implementation,
)

parametrize_form = pytest.mark.parametrize("approximate", FORMS)


def formula(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    x = x + bias
    if approximate == "relu":
        return x * (x > 0)
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def peer(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    x = (x + bias).to(x.dtype)
    return F.relu(x) if approximate == "relu" else F.gelu(x, approximate=approximate)


def inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    bias_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], Tensor]:
    """x and bias, some of them far in the tails, and the gradient of the output."""
    x, bias, upstream = torch.randn(shape), torch.randn(shape[-1:]), torch.randn(shape)
    far = torch.rand(shape) < 0.1
    tensors = {"x": torch.where(far, 6 * x, x).to(device, dtype), "bias": bias.to(device, bias_dtype or dtype)}
    return tensors, upstream.to(device, dtype)


def implementation_of(name: str, tensor: Tensor, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    call = backends.Call("bias_gelu", tensor.device, tensor.dtype)
    if parity.use(name, call, monkeypatch):
        return lambda x, bias, approximate: torch.ops.albert_fast.bias_gelu(x, bias, approximate)
    return bias_gelu


@parametrize_implementation
@parametrize_form
@pytest.mark.parametrize("shape", [(7,), (5, 1), (17, 63), (2, 3, 129), (0, 5)], ids=str)
def test_equals_the_formula(implementation, approximate, shape, device, monkeypatch):
    tensors, upstream = inputs(shape, device=device)
    function = partial(implementation_of(implementation, tensors["x"], monkeypatch), approximate=approximate)
    expected = differentiate(partial(formula, approximate=approximate), oracle_inputs(tensors), upstream)
    assert_all_close(differentiate(function, tensors, upstream), expected)


@parametrize_implementation
@parametrize_form
@parametrize_dtype
@pytest.mark.parametrize("wide_bias", [False, True], ids=["", "float32 bias"])
@judged_over_draws
def test_is_as_accurate_as_pytorch(implementation, approximate, dtype, wide_bias, device, monkeypatch):
    if wide_bias and dtype == torch.float64:
        pytest.skip("a float32 bias is not wider")
    bias_dtype = torch.float32 if wide_bias else dtype
    tensors, upstream = inputs((127, 511), dtype, bias_dtype, device)
    function = partial(implementation_of(implementation, tensors["x"], monkeypatch), approximate=approximate)
    actual = differentiate(function, tensors, upstream)
    assert actual["x"].dtype == dtype
    assert_all_as_accurate_as(
        actual,
        differentiate(partial(peer, approximate=approximate), tensors, upstream),
        differentiate(partial(formula, approximate=approximate), oracle_inputs(tensors), upstream),
    )


@parametrize_implementation
@parametrize_form
def test_the_tails_are_flat(implementation, approximate, device, monkeypatch):
    """Far out, where the exponential under- or overflows: no NaN, and slopes of 0 and 1."""
    x = torch.tensor([[-1e4, -300.0, -50.0, 50.0, 300.0, 1e4]], device=device)
    tensors = {"x": x, "bias": torch.zeros(6, device=device)}
    function = partial(implementation_of(implementation, x, monkeypatch), approximate=approximate)
    results = differentiate(function, tensors)
    torch.testing.assert_close(results["output"], x.clamp(min=0))
    torch.testing.assert_close(results["x"], (x > 0).to(x))


@parametrize_form
def test_gradcheck_of_the_reference(approximate):
    x, bias = (tensor.requires_grad_() for tensor in inputs((3, 4))[0].values())
    if approximate == "relu":
        with torch.no_grad():
            x += torch.sign(x + bias)  # away from the corner
    assert torch.autograd.gradcheck(partial(bias_gelu_reference, approximate=approximate), (x, bias))


@parametrize_form
def test_opcheck(approximate, device):
    tensors, upstream = inputs((4, 5), torch.float32, device=device)
    arguments = (*tensors.values(), approximate)
    parity.check_operator(torch.ops.albert_fast.bias_gelu.default, arguments)
    backward = (upstream, *arguments)
    parity.check_operator(torch.ops.albert_fast.bias_gelu_backward.default, backward, without_gradient=(0, 1, 2))


@parametrize_form
def test_compiled_with_any_number_of_tokens(approximate, device):
    backend = CountingBackend()

    def loss(x, bias):
        return bias_gelu(x * 2.0, bias, approximate=approximate).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for tokens in (5, 3, 8):
        tensors, _ = inputs((tokens, 6), device=device)
        assert_all_close(differentiate(compiled, tensors), differentiate(loss, tensors))
    assert backend.count <= 2, "one graph for the first shape and one for all others"


@parametrize_implementation
def test_strided_inputs(implementation, device, monkeypatch):
    tensors, upstream = inputs((6, 10), device=device)
    function = implementation_of(implementation, tensors["x"], monkeypatch)

    def strided(x: Tensor, bias: Tensor) -> Tensor:
        return function(x.t()[:, 1:], bias[::2][: x.shape[0] - 1 : 1], approximate="tanh")

    def contiguous(x: Tensor, bias: Tensor) -> Tensor:
        parts = x.t()[:, 1:].contiguous(), bias[::2].contiguous()[: x.shape[0] - 1].contiguous()
        return formula(*parts, approximate="tanh")

    wide = {"x": tensors["x"], "bias": torch.randn(10, device=device, dtype=torch.float64)}
    upstream = torch.randn(5, 10, device=device, dtype=torch.float64).t()
    assert_all_close(differentiate(strided, wide, upstream), differentiate(contiguous, oracle_inputs(wide), upstream))


@parametrize_implementation
@parametrize_form
def test_twice_the_same_bits(implementation, approximate, device, monkeypatch, unpoisoned_memory):
    if device.type == "cuda" and "reference" in implementation:
        pytest.skip("PyTorch's own kernels do not promise it on CUDA")
    tensors, upstream = inputs((127, 63), torch.float32, device=device)
    function = partial(implementation_of(implementation, tensors["x"], monkeypatch), approximate=approximate)
    assert_same_bits(differentiate(function, tensors, upstream), differentiate(function, tensors, upstream))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, (ValueError, TypeError), "x is int64"),
        ({"x": torch.tensor(1.0)}, ValueError, "x is float32"),
        ({"bias": torch.zeros(5)}, ValueError, "bias is .* shape"),
        ({"bias": torch.zeros(1, 4)}, ValueError, "bias is .* shape"),
        ({"bias": torch.zeros(4, dtype=torch.float64)}, TypeError, "bias is float64.*float32 was expected"),
        ({"bias": torch.zeros(4, dtype=torch.float16)}, TypeError, "bias is float16"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias is on meta"),
        ({"approximate": "gelu"}, ValueError, "approximate is 'gelu'; one of tanh, none, relu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], error, match):
    arguments = {"x": torch.zeros(3, 4), "bias": torch.zeros(4), **changed}
    with pytest.raises(error, match=match):
        bias_gelu(**arguments)
