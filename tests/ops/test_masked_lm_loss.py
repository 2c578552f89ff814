"""The masked-LM loss against F.cross_entropy, its z-loss by hand, and the logits that must not exist."""

import importlib
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops import masked_lm_loss, masked_lm_loss_with_statistics
from albert_fast.ops.masked_lm_loss import REDUCTIONS, masked_lm_loss_reference
from ops import parity
from ops.parity import (
    CountingBackend,
    LargestTensor,
    assert_all_as_accurate_as,
    assert_all_close,
    assert_same_bits,
    differentiate,
    judged_over_draws,
    oracle_inputs,
    parametrize_dtype,
    parametrize_implementation,
    saved_elements,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-3},
}
parametrize_variant = pytest.mark.parametrize("variant", VARIANTS)


class Case:
    def __init__(
        self,
        tokens: int,
        size: int = 32,
        vocabulary: int = 101,
        *,
        labelled: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        shapes = {"x": (tokens, size), "table": (vocabulary, size), "bias": (vocabulary,)}
        self.tensors = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
        labels = torch.full((tokens,), ignore_index)
        chosen = torch.randperm(tokens)[: max(1, tokens // 6) if labelled is None else labelled]
        labels[chosen] = torch.randint(vocabulary, chosen.shape)
        self.tensors["labels"] = labels.to(device)
        self.reduction = reduction
        self.options: dict[str, Any] = {"ignore_index": ignore_index, **options}
        count = tokens if reduction == "none" else ()
        self.upstream = torch.randn(count, dtype=torch.float64).to(device)

    def full_options(self) -> dict[str, Any]:
        return {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0} | self.options

    def operator_arguments(self) -> tuple[Any, ...]:
        return *self.tensors.values(), *self.full_options().values(), self.reduction, True

    def reduce(self, losses: Tensor, labels: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        count = (labels != self.options["ignore_index"]).sum().clamp(min=1)
        return losses.sum() / (count if self.reduction == "mean" else 1)

    def implementation(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
        x = self.tensors["x"]
        if not parity.use(name, backends.Call("masked_lm_loss", x.device, x.dtype), monkeypatch):
            return partial(masked_lm_loss, reduction=self.reduction, **self.options)

        def operator(x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
            options = self.full_options().values()
            results = torch.ops.albert_fast.masked_lm_loss(x, table, bias, labels, *options, self.reduction, True)
            return results[0 if self.reduction == "none" else 1]

        return operator

    def formula(self, x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        """F.cross_entropy of all logits, in float32 at least, as models without this operation do it."""
        options = self.full_options()
        logits = F.linear(x, table, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(
            logits,
            labels,
            ignore_index=options["ignore_index"],
            label_smoothing=options["label_smoothing"],
            reduction="none",
        )
        z_losses = options["z_loss"] * logits.logsumexp(dim=-1).square()
        losses = losses + z_losses * (labels != options["ignore_index"])
        return self.reduce(losses, labels)

    def expected(self) -> dict[str, Tensor]:
        return differentiate(self.formula, oracle_inputs(self.tensors), self.upstream)

    def peer(self) -> dict[str, Tensor]:
        return differentiate(self.formula, self.tensors, self.upstream)


# -------------------------------------------------------------------------------------------------- against the formula


@parametrize_implementation
@parametrize_variant
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_cross_entropy(implementation, variant, reduction, device, monkeypatch):
    shape = random.choice([(63, 16, 101), (17, 33, 256), (127, 8, 3), (1, 8, 50)])
    ignore_index = random.choice([-100, -1, 2])  # one of them a word
    options = {"reduction": reduction, "ignore_index": ignore_index, **VARIANTS[variant]}
    case = Case(*shape, device=device, **options)
    function = case.implementation(implementation, monkeypatch)
    assert_all_close(differentiate(function, case.tensors, case.upstream), case.expected())


@parametrize_implementation
@parametrize_variant
@parametrize_dtype
@judged_over_draws
def test_is_as_accurate_as_pytorch(implementation, variant, dtype, device, monkeypatch):
    case = Case(255, 64, 509, dtype=dtype, device=device, reduction="none", **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    actual = differentiate(function, case.tensors, case.upstream)
    assert actual["output"].dtype == torch.promote_types(dtype, torch.float32)
    assert_all_as_accurate_as(actual, case.peer(), case.expected())


@parametrize_implementation
@parametrize_variant
def test_large_logits(implementation, variant, device, monkeypatch):
    """Exponentials that overflow without the maximum taken out, and biases that forbid words."""
    case = Case(63, 16, 101, dtype=torch.float32, device=device, **VARIANTS[variant])
    case.tensors["bias"] *= 1e4
    case.tensors["bias"][7] = -1e30 if variant == "plain" else -1e4
    case.tensors["labels"][case.tensors["labels"] == 7] = 8
    actual = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert all(result.isfinite().all() for result in actual.values())
    # exp(logit - logsumexp) in float32 is right to within the rounding of a logsumexp of that size.
    logsumexp = torch.logsumexp(F.linear(case.tensors["x"], *list(case.tensors.values())[1:3]), dim=-1)
    tolerance = 2 * torch.finfo(torch.float32).eps * logsumexp.abs().max().item()
    assert_all_close(actual, case.expected(), tolerance)


@parametrize_implementation
@parametrize_variant
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tokens", [9, 0])
def test_no_label_at_all_is_zero(implementation, variant, reduction, tokens, device, monkeypatch):
    case = Case(tokens, labelled=0, reduction=reduction, device=device, **VARIANTS[variant])
    results = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert results["output"].shape == ((tokens,) if reduction == "none" else ())
    assert not any(result.any() for result in results.values())


@parametrize_implementation
def test_tokens_without_a_label_are_not_read(implementation, device, monkeypatch):
    case = Case(40, device=device)
    unlabelled = case.tensors["labels"] == -100
    case.tensors["x"][unlabelled] = float("nan")
    results = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert not results["x"][unlabelled].any()
    assert all(result.isfinite().all() for result in results.values())


def test_every_token_labelled_as_in_causal_models(device):
    case = Case(33, labelled=33, device=device)
    function = partial(masked_lm_loss, **case.options)
    assert_all_close(differentiate(function, case.tensors, case.upstream), case.expected())


@parametrize_implementation
@parametrize_variant
def test_the_statistics(implementation, variant, device, monkeypatch):
    case = Case(200, 16, 7, device=device, **VARIANTS[variant])
    x, table, bias, labels = case.tensors.values()
    logits = F.linear(x, table, bias)
    labelled = labels != -100
    if parity.use(implementation, backends.Call("masked_lm_loss", x.device, x.dtype), monkeypatch):
        loss, mean, logsumexp, correct, *_ = torch.ops.albert_fast.masked_lm_loss(*case.operator_arguments())
    else:
        mean, statistics = masked_lm_loss_with_statistics(x, table, bias, labels, **case.options)
        loss, logsumexp, correct, found = statistics
        assert torch.equal(found, labelled)
        expected = (logits.argmax(dim=-1) == labels)[labelled].double().mean()
        torch.testing.assert_close(statistics.accuracy.double(), expected)
        assert not any(tensor.requires_grad for tensor in statistics)
    torch.testing.assert_close(mean, loss.sum() / labelled.sum())
    case.reduction = "none"
    torch.testing.assert_close(loss, case.formula(**case.tensors))
    torch.testing.assert_close(logsumexp, logits.logsumexp(dim=-1) * labelled)
    assert torch.equal(correct, (logits.argmax(dim=-1) == labels) & labelled)


def test_accuracy_without_labels_is_zero(device):
    case = Case(5, labelled=0, device=device)
    _, statistics = masked_lm_loss_with_statistics(**case.tensors)
    assert statistics.accuracy == 0


@parametrize_implementation
def test_of_several_largest_logits_the_first_counts(implementation, device, monkeypatch):
    case = Case(12, labelled=12, vocabulary=9, device=device)
    case.tensors["table"].zero_()
    case.tensors["bias"].fill_(1.0)[:2] = 0.0
    case.tensors["labels"] = torch.arange(12, device=device) % 9
    case.implementation(implementation, monkeypatch)
    _, _, logsumexp, correct, *_ = torch.ops.albert_fast.masked_lm_loss(*case.operator_arguments())
    assert correct.tolist() == [label == 2 for label in case.tensors["labels"].tolist()]
    torch.testing.assert_close(logsumexp, torch.full_like(logsumexp, math.log(2 + 7 * math.e)))


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@judged_over_draws
def test_autocast_takes_float32_parameters(compiled, device):
    """As F.linear does: products in bfloat16, gradients of the parameters in float32."""
    case = Case(127, 64, 301, dtype=torch.float32, device=device, reduction="sum")

    def autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(**tensors: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return function(**tensors)

        return run

    function = autocast(partial(masked_lm_loss, reduction="sum"))
    if compiled:
        function = torch.compile(function, fullgraph=True, backend=CountingBackend())
    case.tensors["x"] = case.tensors["x"].bfloat16()
    actual = differentiate(function, case.tensors, case.upstream)
    for name in ("x", "table", "bias"):
        assert actual[name].dtype == case.tensors[name].dtype
    peer, expected = differentiate(autocast(case.formula), case.tensors, case.upstream), case.expected()
    # One number, in which the roundings of bfloat16 inputs happen to cancel more or less.
    assert parity.relative_error(actual.pop("output"), expected.pop("output")) <= torch.finfo(torch.bfloat16).eps
    del peer["output"]
    assert_all_as_accurate_as(actual, peer, expected)


# ------------------------------------------------------------------------------------------------ what it must not do


def test_no_tensor_of_all_tokens_and_words(device, monkeypatch):
    tokens, size, vocabulary, labelled = 2048, 16, 512, 64
    case = Case(tokens, size, vocabulary, labelled=labelled, device=device, dtype=torch.float32)
    function = case.implementation(parity.IMPLEMENTATIONS[0], monkeypatch)
    allowed = max(labelled * vocabulary, tokens * size, vocabulary * size)
    with LargestTensor() as largest:
        differentiate(function, case.tensors, case.upstream)
    assert largest.numel <= allowed
    with LargestTensor() as largest:
        differentiate(case.formula, case.tensors, case.upstream)
    assert largest.numel >= tokens * vocabulary, "the test itself would not see them"


def test_the_reference_holds_the_logits_of_a_few_tokens(device, monkeypatch):
    module = importlib.import_module("albert_fast.ops.masked_lm_loss")
    tokens, size, vocabulary, rows = 300, 4, 256, 16
    options = {"labelled": 100, "device": device, "reduction": "none", "z_loss": 1e-3}
    case = Case(tokens, size, vocabulary, **options)
    function = case.implementation(parity.REFERENCE, monkeypatch)
    forward, backward = (backends.REFERENCE.load()[f"masked_lm_loss{half}"] for half in ("", "_backward"))
    arguments = case.operator_arguments()
    whole = differentiate(function, case.tensors, case.upstream)
    with torch.no_grad():
        losses, _, logsumexp, _, *kept = forward(*arguments)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", rows * vocabulary)
    with LargestTensor() as largest:
        in_chunks = differentiate(function, case.tensors, case.upstream)
        with torch.no_grad():
            again, *_ = forward(*arguments)
            grads = backward(case.upstream, *arguments[:4], logsumexp, *kept, *arguments[4:-1])
    assert largest.numel <= rows * vocabulary
    assert_all_close(in_chunks, whole)
    by_hand = dict(zip(("output", "x", "table", "bias"), (again, *grads), strict=True))
    assert_all_close(by_hand, whole)
    torch.testing.assert_close(again, losses)
    with saved_elements() as sizes:
        leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in case.tensors.items()}
        function(**leaves)
    assert max(sizes) < rows * vocabulary, "logits are kept for backward"


# -------------------------------------------------------------------------------------------------- operator, compiler


@parametrize_variant
def test_gradcheck_of_the_reference(variant):
    case = Case(6, 3, 5, labelled=4, **VARIANTS[variant])
    labels = case.tensors.pop("labels")
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]

    def function(x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        return masked_lm_loss_reference(x, table, bias, labels, **case.full_options())[0]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", parity.ACCELERATED, ids=str)
def test_opcheck(dtype, reduction, device):
    case = Case(9, 4, 11, dtype=dtype, device=device, reduction=reduction, label_smoothing=0.1, z_loss=1e-3)
    arguments = case.operator_arguments()
    parity.check_operator(torch.ops.albert_fast.masked_lm_loss.default, arguments)
    losses, loss, logsumexp, _, *kept = torch.ops.albert_fast.masked_lm_loss(*arguments)
    grad = torch.randn_like(losses if reduction == "none" else loss)
    backward = (grad, *arguments[:4], logsumexp, *kept, *arguments[4:-1])
    operator = torch.ops.albert_fast.masked_lm_loss_backward.default
    parity.check_operator(operator, backward, without_gradient=tuple(range(len(backward))))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_with_any_number_of_tokens_and_labels(reduction, device):
    backend = CountingBackend()

    def loss(x, table, bias, labels):
        options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": reduction}
        return masked_lm_loss(x * 2.0, table, bias, labels, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for tokens, labelled in ((9, 2), (5, 3), (14, 0), (14, 14)):
        case = Case(tokens, 8, 30, labelled=labelled, device=device)
        assert_all_close(differentiate(compiled, case.tensors), differentiate(loss, case.tensors))
    assert backend.count <= 2, "one graph for the first shape and one for all others"


@parametrize_implementation
def test_strided_inputs(implementation, device, monkeypatch):
    case = Case(21, device=device, label_smoothing=0.1)
    function = case.implementation(implementation, monkeypatch)
    doubled = {name: torch.stack([tensor] * 2, dim=-1) for name, tensor in case.tensors.items()}

    def strided(**tensors: Tensor) -> Tensor:
        return function(**{name: tensor[..., 0] for name, tensor in tensors.items()})

    actual = differentiate(strided, doubled, case.upstream)
    actual = {name: x if name == "output" else x[..., 0] for name, x in actual.items()}
    assert_all_close(actual, case.expected())


@parametrize_implementation
@parametrize_variant
def test_twice_the_same_bits(implementation, variant, device, monkeypatch, unpoisoned_memory):
    if device.type == "cuda" and "reference" in implementation:
        pytest.skip("PyTorch's own kernels do not promise it on CUDA")
    case = Case(255, 64, 301, dtype=torch.float32, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    first, second = (differentiate(function, case.tensors, case.upstream) for _ in range(2))
    assert_same_bits(first, second)


LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": torch.zeros(3)}, ValueError, "x is .* shape"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x is int64"),
        ({"table": torch.zeros(7, 5)}, ValueError, "table is .* shape"),
        ({"table": torch.zeros(7, 4).bfloat16()}, TypeError, "table is bfloat16.*float32 was expected"),
        ({"table": torch.zeros(7, 4, device="meta")}, ValueError, "table is on meta"),
        ({"bias": torch.zeros(4)}, ValueError, "bias is .* shape"),
        ({"bias": torch.zeros(7).double()}, TypeError, "bias is float64"),
        ({"bias": torch.zeros(7, device="meta")}, ValueError, "bias is on meta"),
        ({"labels": LABELS[:2]}, ValueError, "labels is .* shape"),
        ({"labels": LABELS.int()}, TypeError, "labels is int32"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta"),
        ({"labels": LABELS + 7}, IndexError, "labels has values from 7.*0 to 6 was expected"),
        ({"labels": LABELS - 1}, IndexError, "labels has values from -1"),
        ({"labels": LABELS - 100, "ignore_index": -1}, IndexError, "labels has values from -100"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'; one of mean, sum, none"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing is -0.1"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], error, match):
    arguments = {"x": torch.zeros(3, 4), "table": torch.zeros(7, 4), "bias": torch.zeros(7), "labels": LABELS}
    masked_lm_loss(**arguments)
    with pytest.raises(error, match=match):
        masked_lm_loss(**{**arguments, **changed})
