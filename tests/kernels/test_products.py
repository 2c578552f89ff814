"""Products of training by cuBLASLt, without a GPU: csrc/cuda/products.cpp and what stands on it, on a stand-in for the
library that works on the host's memory (tests/csrc/fake_cublaslt.cpp) and ends the process where it is misused."""

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import (
    assert_all_as_accurate_as,
    assert_as_accurate_as,
    assert_same_bits,
    differentiate,
    judged_over_draws,
    relative_error,
)
from ops.test_encoder import Case
from torch import Tensor

from albert_fast import cublaslt, devices, native
from albert_fast.kernels import encoder, products, tuning
from albert_fast.kernels.tuning import Choices

SOURCE = Path(__file__).parents[1] / "csrc" / "fake_cublaslt.cpp"
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
SIZES = pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 8, 16), (17, 24, 40), (63, 72, 8), (127, 64, 96)])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = native.unavailable()
    if reason is not None:
        pytest.skip(reason)
    command = native.compiler()
    assert command is not None
    path = tmp_path_factory.mktemp("fake") / "libfake_cublaslt.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    result = subprocess.run([*command, *flags, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(autouse=True)
def at_hand(library: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in; on a GPU cuBLASLt."""
    if device.type == "cuda":
        monkeypatch.setenv("ALBERT_FAST_CUBLASLT", "1")
    else:
        monkeypatch.setenv("ALBERT_FAST_CUBLASLT", str(library))
        monkeypatch.delenv("FAKE_CUBLASLT", raising=False)
        monkeypatch.setattr(cublaslt, "_DEVICE_TYPE", "cpu")
        monkeypatch.setattr(cublaslt, "_opened", {})
        monkeypatch.setattr(cublaslt, "_refusals", {})
        monkeypatch.setattr(cublaslt, "_checked", set())
        monkeypatch.setattr(products, "_by_rule", lambda what, device: True)


@pytest.fixture
def made_there(device: torch.device) -> Iterator[None]:
    """New tensors are on the device."""
    with device:
        yield


@pytest.fixture
def on_the_host(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("of the stand-in, or of the host")


@pytest.fixture
def ran(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the products that ran, after the first trial."""
    assert cublaslt.refusal(torch.zeros(1, device=device).device, torch.float16) is None
    names: list[str] = []
    call = cublaslt.Product.__call__

    def watched(self: cublaslt.Product) -> bool:
        done = call(self)
        names.extend([self.name] if done else [])
        return done

    monkeypatch.setattr(cublaslt.Product, "__call__", watched)
    return names


def numbers(*shape: int, dtype: torch.dtype, wider: int = 0) -> Tensor:
    """Rows of a wider matrix, or a whole one."""
    return torch.randn(*shape[:-1], shape[-1] + wider).to(dtype)[..., : shape[-1]]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def slope(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")


# ------------------------------------------------------------------------------------------------ against PyTorch's own


@HALF
@SIZES
@pytest.mark.parametrize("wider", [0, 8])
def test_linear_gelu(dtype, tokens, inputs, outputs, wider, made_there):
    x = numbers(tokens, inputs, dtype=dtype, wider=wider)
    weight, bias = numbers(outputs, inputs, dtype=dtype) * 0.2, numbers(outputs, dtype=dtype)
    y, inner = (numbers(tokens, outputs, dtype=dtype, wider=wider).fill_(torch.nan) for _ in range(2))
    assert cublaslt.linear_gelu(x, weight, bias, y, inner)()
    peer = F.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate_as(inner, peer, exact, name="inner")
    assert_as_accurate_as(y, F.gelu(peer, approximate="tanh"), F.gelu(exact, approximate="tanh"), name="y")


@HALF
@SIZES
@pytest.mark.parametrize("wider", [0, 8])
def test_gelu_gradient(dtype, tokens, inputs, outputs, wider, made_there):
    grad, inner = (numbers(tokens, size, dtype=dtype, wider=wider) for size in (inputs, outputs))
    weight = numbers(inputs, outputs, dtype=dtype) * 0.2
    grad_inner = numbers(tokens, outputs, dtype=dtype, wider=wider).fill_(torch.nan)
    grad_bias = poisoned(outputs, dtype=dtype)
    assert cublaslt.gelu_gradient(grad, weight, inner, grad_inner, grad_bias)()
    peer = (grad @ weight) * slope(inner)
    exact = (grad.double() @ weight.double()) * slope(inner.double())
    assert_as_accurate_as(grad_inner, peer, exact, name="grad_inner")
    assert_as_accurate_as(grad_bias, peer.sum(0), exact.sum(0), name="grad_bias")


@HALF
@SIZES
@pytest.mark.parametrize("accumulate", [False, True])
def test_weight_gradient(dtype, tokens, inputs, outputs, accumulate, made_there):
    grad, x = numbers(tokens, outputs, dtype=dtype, wider=8), numbers(tokens, inputs, dtype=dtype)
    before = torch.randn(outputs, inputs) if accumulate else poisoned(outputs, inputs, dtype=torch.float32)
    with_bias, without = before.clone(), before.clone()
    sums = poisoned(outputs, dtype=torch.float32)
    assert cublaslt.weight_gradient(grad, x, with_bias, sums, accumulate=accumulate)()
    assert cublaslt.weight_gradient(grad, x, without, accumulate=accumulate)()
    exact = grad.double().t() @ x.double() + (before.double() if accumulate else 0.0)
    # Products of two numbers of 11 bits are exact in float32, and so this is as exact as float32 sums are.
    assert relative_error(with_bias, exact) < 1e-5
    assert relative_error(without, exact) < 1e-5
    torch.testing.assert_close(sums, grad.double().sum(0).float(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- errors


SHAPES = {"x": 16, "y": 24, "inner": 24}


def of_linear_gelu(**changed: Any) -> cublaslt.Product:
    half = torch.float16
    given = {"x": numbers(5, 16, dtype=half), "weight": numbers(24, 16, dtype=half), "bias": numbers(24, dtype=half)}
    given |= {"y": numbers(5, 24, dtype=half), "inner": numbers(5, 24, dtype=half)}
    return cublaslt.linear_gelu(**{**given, **changed})


@pytest.mark.parametrize(
    ("name", "tensor", "error", "says"),
    [
        ("x", torch.randn(5, 16), TypeError, "x is float32"),
        ("x", torch.randn(16).half(), ValueError, "x is float16"),
        ("x", torch.randn(0, 16).half(), ValueError, "x is empty"),
        ("x", torch.randn(16, 5).half().t(), ValueError, "x has strides"),
        ("x", torch.randn(16).half().expand(5, 16), ValueError, "x has strides"),
        ("weight", torch.randn(24, 15).half(), ValueError, "weight is float16"),
        ("weight", torch.randn(24, 17).half()[:, :16], ValueError, "weight has strides"),
        ("bias", torch.randn(24), TypeError, "bias is float32"),
        ("bias", torch.randn(23).half(), ValueError, "bias is float16"),
        ("y", torch.randn(5, 24).bfloat16(), TypeError, "y is bfloat16"),
        ("inner", torch.randn(6, 24).half(), ValueError, "inner is float16"),
        ("inner", torch.randn(5, 24, device="meta").half(), ValueError, "inner is on meta"),
    ],
)
def test_arguments_are_checked(name, tensor, error, says, on_the_host):
    with pytest.raises(error, match=says):
        of_linear_gelu(**{name: tensor})


def test_float32_gradients_of_weights(made_there):
    grad, x = numbers(5, 24, dtype=torch.float16), numbers(5, 16, dtype=torch.float16)
    with pytest.raises(TypeError, match="grad_weight is float16"):
        cublaslt.weight_gradient(grad, x, torch.zeros(24, 16).half(), accumulate=True)
    with pytest.raises(TypeError, match="grad_bias is float16"):
        cublaslt.weight_gradient(grad, x, torch.zeros(24, 16), torch.zeros(24).half(), accumulate=True)


def test_what_is_not_aligned_is_not_started(made_there):
    half = torch.float16
    x, weight, bias = numbers(5, 12, dtype=half), numbers(24, 12, dtype=half), numbers(24, dtype=half)
    y = poisoned(5, 24, dtype=half)
    assert not of_linear_gelu(x=x, weight=weight, bias=bias, y=y)()
    assert not of_linear_gelu(bias=numbers(25, dtype=half)[1:], y=y)()
    assert not of_linear_gelu(inner=numbers(5, 24, dtype=half, wider=4), y=y)()
    assert y.isnan().all()


def test_a_failure_is_an_error(made_there, monkeypatch):
    product = of_linear_gelu()
    monkeypatch.setattr(cublaslt._functions(), "albert_products_linear_gelu", lambda *arguments: 114)
    with pytest.raises(
        RuntimeError, match=r"linear_gelu by cuBLASLt failed: CUBLAS_STATUS_INTERNAL_ERROR \(code 114\)"
    ):
        product()


def test_an_algorithm_is_asked_for_once_for_each_shape(library, on_the_host):
    heuristics = ctypes.CDLL(str(library)).fake_cublaslt_heuristics
    half, more = of_linear_gelu(), of_linear_gelu(**{n: torch.ones(7, w).half() for n, w in SHAPES.items()})
    bfloat = cublaslt.linear_gelu(*(tensor.view(torch.bfloat16) for tensor in half._keep))  # in the same places
    for product in (half, more, bfloat):
        before = heuristics()
        assert all(product() for _ in range(3))
        assert heuristics() == before + 1


# ------------------------------------------------------------------------------------------------------ what is on hand


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ALBERT_FAST_CUBLASLT": "0"}, "ALBERT_FAST_CUBLASLT=0"),
        (
            {"ALBERT_FAST_CUBLASLT": "/nowhere/libcublasLt.so"},
            "libcublasLt is not found.*/nowhere.*: set ALBERT_FAST_CUBL",
        ),
        ({"ALBERT_FAST_CUBLASLT": "libm.so.6"}, "libcublasLt is older than 12.0"),
        ({"FAKE_CUBLASLT": "wrong"}, "linear_gelu by cuBLASLt is wrong by [12]"),
    ],
)
def test_a_refusal_is_one_line(changed, says, on_the_host, monkeypatch):
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    reason = cublaslt.refusal(torch.device("cpu"), torch.float16)
    assert reason is not None
    assert "\n" not in reason
    assert re.search(says, reason), reason
    assert cublaslt.refusal(torch.device("cpu"), torch.float16) == reason
    cublaslt._opened.clear()
    with pytest.raises(RuntimeError, match="no products by cuBLASLt"):
        of_linear_gelu()


def test_other_kinds_are_refused(on_the_host, monkeypatch):
    assert "float32" in str(cublaslt.refusal(torch.device("cpu"), torch.float32))
    assert cublaslt.refusal(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(cublaslt, "_DEVICE_TYPE", "cuda")
    assert "GPU" in str(cublaslt.refusal(torch.device("cpu"), torch.float16))


def test_without_a_native_library(on_the_host, monkeypatch):
    def fail() -> None:
        raise native.BuildError("there is no C++ compiler: install g++:\nmore")

    monkeypatch.setattr(cublaslt, "_functions", fail)
    assert cublaslt.refusal(torch.device("cpu"), torch.float16) == "there is no C++ compiler: install g++"


# ------------------------------------------------------------------------------------------------------- which of both


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The choice on a GPU of a compute capability, where the two ways take so many milliseconds."""
    monkeypatch.undo()
    for name in ("ALBERT_FAST_CUBLASLT", "ALBERT_FAST_AUTOTUNE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cublaslt, "version", lambda device: 130100)
    current: list[torch.device] = []

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(devices, "current", made_current)

    def choose(
        capability: int,
        times: dict[str, float],
        tokens: int = 100,
        capturing: bool = False,
        what: Callable[..., object] = products.Products.linear_activation,
    ) -> str:
        monkeypatch.setattr(products, "architecture", lambda device: capability)

        def timed(run: Any) -> float:
            assert current == [x.device]  # whose stream has the events
            return times[run.args[0]]

        chooser = Choices(tmp_path / "tuning.json", timed, lambda: capturing)
        monkeypatch.setattr(tuning, "choices", lambda device: chooser)
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(tokens, 768))
        return products._choose(what, x, (3072, 768), lambda way: None, ())

    return choose


def test_the_faster_is_chosen_and_kept(choose, tmp_path):
    assert choose(90, {products.FUSED: 2.0, products.APART: 1.0}) == products.APART
    assert choose(90, {}, tokens=65) == products.APART  # from the file
    assert choose(90, {products.FUSED: 1.0, products.APART: 2.0}, tokens=30) == products.FUSED
    assert "(32, 3072, 768, 'cuBLASLt 130100')" in (tmp_path / "tuning.json").read_text()


@pytest.mark.parametrize(("capability", "rule"), [(80, "apart"), (89, "apart"), (90, "cuBLASLt"), (120, "apart")])
def test_where_nothing_is_timed_there_is_a_rule(choose, capability, rule, monkeypatch):
    assert choose(capability, {}, capturing=True) == rule
    assert choose(capability, {}, capturing=True, what=products.Products.activation_gradient) == products.APART
    monkeypatch.setenv("ALBERT_FAST_AUTOTUNE", "0")
    assert choose(capability, {}) == rule
    monkeypatch.setenv("ALBERT_FAST_CUBLASLT", "1")
    assert choose(capability, {}) == products.FUSED


# ---------------------------------------------------------------------------------------------------------- the encoder


def small(device: torch.device, **options: Any) -> Case:
    return Case([15, 0, 17], 64, 128, dtype=torch.float16, device=device, **options)


# From one pass on gradients are added to those of the passes before.
@pytest.mark.parametrize(("recompute", "gathered"), [("none", 100), ("ffn", 100), ("layer", 1)])
@judged_over_draws
def test_the_encoder(recompute, gathered, device, ran, monkeypatch):
    ran.clear()
    monkeypatch.setattr(encoder, "GATHERED_TOKENS", gathered)
    case = small(device, recompute=recompute, hidden_dropout_p=0.1)
    function = case.implementation("operator of triton", monkeypatch)
    actual, expected = differentiate(function, case.tensors, case.upstream), case.expected()
    assert_all_as_accurate_as(actual, case.peer(), expected, case.scales(expected))
    # "ffn" puts the activation into its input's place, and so does "layer", but not when it repeats a pass.
    once = {"linear_gelu": 0 if recompute == "ffn" else 2, "gelu_gradient": 2, "weight_gradient": 1 + (gathered == 1)}
    assert {name: ran.count(name) for name in once} == once
    if recompute == "none":
        assert_same_bits(actual, differentiate(function, case.tensors, case.upstream))


def test_where_no_algorithm_is_found_kernels_apart_serve(on_the_host, device, ran, monkeypatch):
    case = small(device)
    function = case.implementation("operator of triton", monkeypatch)
    monkeypatch.setenv("FAKE_CUBLASLT", "refuse")
    actual = differentiate(function, case.tensors, case.upstream)
    assert ran == []
    monkeypatch.setenv("ALBERT_FAST_CUBLASLT", "0")
    assert_same_bits(actual, differentiate(function, case.tensors, case.upstream))


@pytest.mark.parametrize("changed", [{"activation": "gelu"}, {"activation": "relu"}, {"dtype": torch.float32}])
def test_what_it_does_not_serve(changed, device, ran, monkeypatch):
    case = Case([3], 16, 24, num_heads=1, device=device, **{"dtype": torch.float16, **changed})
    differentiate(case.implementation("operator of triton", monkeypatch), case.tensors, case.upstream)
    assert set(ran) <= {"weight_gradient"}
    assert (ran == []) == (changed.get("dtype") == torch.float32)


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_inference_opens_no_library(activation, on_the_host, device, monkeypatch):
    monkeypatch.setattr(products, "_serves", lambda x: pytest.fail("asked for cuBLASLt"))
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    monkeypatch.setenv("ALBERT_FAST_FEW_TOKENS", "0")
    case = small(device, activation=activation)
    with torch.no_grad():
        case.public(**case.tensors)
