"""What the encoder asks of the LayerNorm kernels beyond the operation: buffers, kept sums, strips of rows, masks."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_all_close, assert_same_bits, offsets, ragged_lengths, random_seed
from torch import Tensor

from albert_fast import triton_backend
from albert_fast.kernels.column_sum import add_strip_sums, column_sum, programs_of
from albert_fast.kernels.dropout_add_layer_norm import (
    dropout_add_layer_norm_backward,
    layer_norm_apply,
    layer_norm_backward,
    layer_norm_forward,
)
from albert_fast.kernels.layer_norm_backward import programs_of as layer_norm_programs
from albert_fast.ops.dropout import keep_mask, token_coordinates

EPS = 1e-12
parametrize_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cpu" if triton_backend.interpreted() else "cuda")


def assert_same_arithmetic(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits in the interpreter; compilers may fuse a product and a sum in one kernel and not in another."""
    if triton_backend.interpreted():
        assert_same_bits(actual, expected)
    else:
        assert_all_close(actual, expected, tolerance=max(torch.finfo(t.dtype).eps for t in actual.values()))


class Case:
    def __init__(
        self,
        tokens: int,
        hidden: int,
        device: torch.device,
        dropout_p: float = 0.0,
        dtype: torch.dtype = torch.float32,
        lengths: list[int] | None = None,
    ) -> None:
        def random_tensor(*size: int) -> Tensor:
            return torch.randn(size).to(device, dtype)

        self.x, self.residual, self.grad = (random_tensor(tokens, hidden) for _ in range(3))
        self.bias, self.weight, self.ln_bias = (random_tensor(hidden) for _ in range(3))
        self.summed = torch.empty_like(self.x)
        self.statistics = torch.empty(2, tokens, device=device)
        self.dropout: dict[str, Any] = {"dropout_p": dropout_p, "seed": None, "site": 0, "cu_seqlens": None}
        if dropout_p:
            self.dropout |= {"seed": random_seed(device), "site": random.randrange(2**31)}
            self.dropout["cu_seqlens"] = offsets([tokens] if lengths is None else lengths, device)

    def forward(self, **buffers: Tensor) -> Tensor:
        buffers = {"summed": self.summed, "statistics": self.statistics, **buffers}
        vectors = (self.bias, self.residual, self.weight, self.ln_bias)
        return layer_norm_forward(self.x, *vectors, eps=EPS, **self.dropout, **buffers)

    def no_partials(self) -> Tensor:
        tokens, hidden = self.x.shape
        programs = layer_norm_programs(self.x.device, tokens, hidden, self.dropout["dropout_p"])
        return torch.zeros(programs, 3 * hidden, device=self.x.device)

    def backward(self, partials: Tensor | None = None, **buffers: Tensor) -> dict[str, Tensor]:
        partials = self.no_partials() if partials is None else partials
        tensors = (self.grad, self.summed, self.weight, self.statistics, partials)
        grads = layer_norm_backward(*tensors, **self.dropout, **buffers)
        vectors = [torch.empty(self.x.shape[1], device=self.x.device) for _ in range(3)]
        column_sum(partials, vectors)
        return dict(zip(("residual", "x", "weight", "ln_bias", "bias"), (*grads, *vectors), strict=True))

    def from_inputs(self) -> dict[str, Tensor]:
        tensors = (self.grad, self.x, self.bias, self.residual, self.weight, self.ln_bias)
        grads = dropout_add_layer_norm_backward(*tensors, EPS, *self.dropout.values())
        return dict(zip(("x", "bias", "residual", "weight", "ln_bias"), grads, strict=True))

    def keep(self) -> Tensor:
        """Factors 0 and 1 / (1 - p)."""
        p, seed, site, cu_seqlens = self.dropout.values()
        if p == 0.0:
            return torch.ones_like(self.x)
        row, position = token_coordinates(cu_seqlens, self.x.shape[0], self.x.device)
        return keep_mask(seed, site, row, position, self.x.shape[1], p) / (1.0 - p)


# Wider than a warp's loads, in one tile and masked; several tiles of rows, and strips that are no multiple of a tile.
@parametrize_dropout
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (37, 768), (5, 1030), (101, 24)])
def test_what_forward_keeps_is_what_backward_reads(tokens, hidden, dropout_p, device):
    case = Case(tokens, hidden, device, dropout_p)
    output = case.forward()
    leaves = {
        name: getattr(case, name).double().requires_grad_() for name in ("residual", "x", "weight", "ln_bias", "bias")
    }
    expected = leaves["residual"] + (leaves["x"] + leaves["bias"]) * case.keep()
    expected_output = F.layer_norm(expected, (hidden,), leaves["weight"], leaves["ln_bias"], EPS)
    expected_grads = torch.autograd.grad(expected_output, list(leaves.values()), case.grad.double())
    assert_all_close(
        {"summed": case.summed, "mean": case.statistics[0], "rstd": case.statistics[1], "output": output},
        {
            "summed": expected,
            "mean": expected.mean(1),
            "rstd": (expected.var(1, correction=0) + EPS).rsqrt(),
            "output": expected_output,
        },
        tolerance=1e-4 if hidden == 1 else 1e-5,
    )
    applied = layer_norm_apply(case.summed, case.weight, case.ln_bias, case.statistics)
    assert_same_arithmetic({"": applied}, {"": output})
    normed = torch.empty_like(output)
    grads = case.backward(ln_bias=case.ln_bias, normed=normed)
    scales = dict.fromkeys(grads, float(tokens)) if hidden == 1 else None
    if scales is not None:
        # The gradient of the sum is 0: w g / std - mean(w g) / std, of which either is rounded, or in an FMA one alone.
        terms = (case.grad * case.weight).norm().item() * EPS**-0.5
        scales |= dict.fromkeys(("residual", "x", "bias"), terms)
    for actual in (grads, case.from_inputs()):
        assert_all_close(actual, dict(zip(grads, expected_grads, strict=True)), tolerance=1e-5, scales=scales)
    assert_all_close({"": normed}, {"": output}, tolerance=1e-6)
    assert (grads["x"] is grads["residual"]) == (dropout_p == 0.0)
    assert_same_bits(case.backward(), grads)


@parametrize_dropout
def test_into_buffers_with_strides_and_in_place(dropout_p, device):
    case = Case(19, 40, device, dropout_p)
    expected, expected_grads = case.forward(), case.backward()
    normed, summed = layer_norm_apply(case.summed, case.weight, case.ln_bias, case.statistics), case.summed
    wide = torch.full((6, 19, 100), 7.0, device=device)
    buffers = dict(zip(("summed", "grad_residual", "grad_x", "normed", "grad", "x"), wide[..., 8:48], strict=True))
    case.summed, x, grad = buffers.pop("summed"), buffers.pop("x"), buffers.pop("grad")
    x.copy_(case.x)
    grad.copy_(case.grad)
    case.x, case.grad = x, grad
    assert case.forward(out=x) is x
    grads = case.backward(ln_bias=case.ln_bias, **buffers)
    assert grads["residual"] is buffers["grad_residual"]
    assert grads["x"] is buffers["grad_x"]
    assert_same_arithmetic(
        {**grads, "output": x, "normed": buffers["normed"], "summed": case.summed},
        {**expected_grads, "output": expected, "normed": normed, "summed": summed},
    )
    # The gradient of the output may make room for that of the sum.
    case.backward(grad_residual=case.grad, grad_x=buffers["grad_x"])
    assert torch.equal(case.grad, grads["residual"])
    assert bool((wide[..., :8] == 7.0).all() & (wide[..., 48:] == 7.0).all())


@parametrize_dropout
def test_partial_sums_of_several_launches(dropout_p, device):
    """Each launch adds its own, row by row; the sums of all are those of one after the other."""
    cases = [Case(37, 40, device, dropout_p) for _ in range(3)]
    together, alone = cases[0].no_partials(), []
    assert len(together) > 1
    for case in cases:
        case.forward()
        alone.append(case.no_partials())
        case.backward(alone[-1])
        grads = case.backward(together)
    assert_all_close({"": together}, {"": alone[0] + alone[1] + alone[2]}, tolerance=1e-6)
    expected = sum(partials.double() for partials in alone).sum(0).split(40)
    names = ("weight", "ln_bias", "bias")
    assert_all_close({name: grads[name] for name in names}, dict(zip(names, expected, strict=True)), tolerance=1e-5)


@parametrize_dropout
def test_a_gradient_in_two_parts(dropout_p, device):
    case = Case(37, 40, device, dropout_p)
    case.forward()
    first, whole = torch.randn(37, 60, device=device)[:, :40], case.grad
    more = whole - first
    case.grad = first + more
    expected = case.backward()
    case.grad = first
    assert_same_arithmetic(case.backward(more=more), expected)


def test_without_bias_or_residual(device):
    case = Case(21, 33, device)
    vectors = (case.weight, case.ln_bias)
    expected = F.layer_norm(case.x, (33,), *vectors, EPS)
    assert_all_close({"": layer_norm_forward(case.x, None, None, *vectors, eps=EPS)}, {"": expected}, tolerance=1e-6)


def test_a_wide_sum_beside_a_narrow_product(device):
    """x in float16, the stream in float32: nothing of the stream is lost."""
    case = Case(17, 48, device)
    case.x, case.bias = case.x.half(), case.bias.half()
    output = case.forward()
    expected = case.residual + (case.x.float() + case.bias.float())
    assert output.dtype == torch.float32
    assert_all_close({"": case.summed}, {"": expected}, tolerance=1e-7)
    # With a narrower buffer the statistics are of what the buffer holds.
    case.summed = case.summed.half()
    case.forward()
    assert_all_close({"": case.statistics[0]}, {"": case.summed.float().mean(1)}, tolerance=1e-6)


# 600 rows, most of them empty, need a loop over offsets; the last tokens are of no row.
@pytest.mark.parametrize("batch", [7, 600])
@pytest.mark.parametrize(("hidden", "dropout_p"), [(1, 0.5), (6, 1 - 2**-20), (130, 0.1)])
def test_draws_the_masks_of_the_reference(batch, hidden, dropout_p, device):
    lengths = ragged_lengths((1, 15, 17)) if batch == 7 else random.choices([0, 0, 0, 1], k=batch)
    case = Case(sum(lengths) + 3, hidden, device, dropout_p, lengths=lengths)
    case.dropout["site"] = random.choice([0, 1, 2**31 - 1])
    kept = case.keep() != 0
    case.x = torch.ones_like(case.x)
    vectors = (case.weight, case.ln_bias)
    layer_norm_forward(case.x, None, None, *vectors, eps=EPS, **case.dropout, summed=case.summed)
    assert torch.equal(case.summed != 0, kept)
    case.statistics = torch.stack([case.summed.mean(1), torch.ones(len(case.x), device=device)])
    grads = case.backward()
    passed = grads["residual"] != 0
    assert torch.equal((grads["x"] != 0)[passed], kept[passed])


@parametrize_dropout
def test_half_precision_is_rounded_once(dropout_p, device):
    case = Case(45, 200, device, dropout_p, dtype=torch.float16)
    output = case.forward()
    wide = Case(45, 200, device)
    for name in ("x", "residual", "grad", "bias", "weight", "ln_bias"):
        setattr(wide, name, getattr(case, name).float())
    wide.dropout = case.dropout
    wide.forward()
    wide.summed = case.summed.float()
    expected = layer_norm_apply(wide.summed, wide.weight, wide.ln_bias, case.statistics)
    wide.statistics = case.statistics
    grads, expected_grads = case.backward(), wide.backward()
    for name in ("x", "residual"):
        expected_grads[name] = expected_grads[name].half()
    assert_same_arithmetic({**grads, "output": output}, {**expected_grads, "output": expected.half()})


def test_column_sums(device):
    partials = torch.randn(530, 300, device=device)
    first, second = (torch.full(size, 2.0, device=device) for size in ((7,), (3, 11)))
    third = torch.full((260,), 2.0, device=device, dtype=torch.float16)
    parts = dict(zip("123", (first, second, third), strict=True))
    sums = dict(zip("123", partials.double().sum(0).split([7, 33, 260]), strict=True))
    column_sum(partials, list(parts.values()))
    assert_all_close(parts, {name: sums[name].view(part.shape) for name, part in parts.items()}, tolerance=2e-3)
    column_sum(partials[:0], [first])
    assert not first.any()


# Strips of several tiles and of none, the last of them short; several tiles of columns, the last of them short.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 40), (301, 16), (150, 300), (0, 8)])
def test_sums_over_strips(rows, columns, dtype, device):
    """Of the first and last third of what has rows of its own stride; added to what is there."""
    whole = torch.randn(rows, 3, columns + 5, device=device).to(dtype)
    x = whole[:, ::2, :columns]
    strips = max(2, programs_of(device, rows, 2, columns))
    before = torch.randn(strips, 2, columns, device=device)
    partials = before.clone()
    add_strip_sums(x, partials)
    again = before.clone()
    add_strip_sums(x, again)
    assert_same_bits({"": again}, {"": partials})
    assert_all_close({"": (partials.double() - before).sum(0)}, {"": x.double().sum(0)}, 1e-5, scales={"": 1.0 + rows})
