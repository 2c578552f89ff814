"""The int8 product: exact integers, the error that rounding to 8 bits allows, and rows that cannot be quantized."""

import pytest
import torch

from albert_fast.ops.quantized_linear import quantize_rows, quantize_weight, quantized_linear


def test_a_product_of_integers_is_exact():
    """Scales of 1: nothing is rounded."""
    weight = torch.randint(-127, 128, (9, 40)).double()
    weight[:, 0] = 127.0
    x = torch.randint(0, 256, (5, 40)).double() - 100.0
    x[:, 0], x[:, 1] = -100.0, 155.0
    bias = torch.randn(9).double()
    torch.testing.assert_close(quantized_linear(x, weight, bias), x @ weight.t() + bias, rtol=1e-6, atol=1e-4)


def test_rounding_is_by_half_a_step():
    x, weight = torch.randn(7, 33), torch.randn(11, 33)
    q, weight_scale = quantize_weight(weight)
    assert ((q * weight_scale[:, None] - weight).abs() <= 0.5001 * weight_scale[:, None]).all()
    u, scale, zero = quantize_rows(x)
    assert ((scale[:, None] * (u.int() - zero[:, None]) - x).abs() <= 1.0001 * scale[:, None]).all()
    assert q.dtype == torch.int8
    assert u.dtype == torch.uint8
    error = quantized_linear(x, weight, torch.zeros(11)) - x @ weight.t()
    assert error.norm() < 0.03 * (x @ weight.t()).norm()


def test_zero_is_exact():
    x = torch.randn(6, 20).abs() + 3.0
    x[:, ::2] = 0.0
    u, scale, zero = quantize_rows(x)
    assert not (scale[:, None] * (u.int() - zero[:, None]))[:, ::2].any()
    assert not quantized_linear(torch.zeros(3, 20), torch.randn(4, 20), torch.zeros(4)).any()
    assert not quantized_linear(torch.randn(3, 20), torch.zeros(4, 20), torch.zeros(4)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_does_not_look_right(bad):
    x = torch.randn(4, 16)
    x[2, 5] = bad
    y = quantized_linear(x, torch.randn(3, 16), torch.zeros(3))
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_the_mean_corrects_the_bias():
    """Inputs that are all the mean come out as if the weight had not been rounded."""
    weight, bias, mean = torch.randn(11, 200), torch.randn(11), torch.randn(200)
    x = mean.expand(3, -1)
    exact = (x.double() @ weight.double().t() + bias.double()).float()
    u, scale, zero = quantize_rows(x)
    rounded_x = (u.float() - zero[:, None]) * scale[:, None]
    of_activations = (rounded_x - x) @ weight.t()  # what is left
    left = quantized_linear(x, weight, bias, mean) - exact
    torch.testing.assert_close(left, of_activations, rtol=0, atol=0.1 * of_activations.abs().max().item())
    assert (quantized_linear(x, weight, bias) - exact).norm() > 1.5 * (left - of_activations).norm()
