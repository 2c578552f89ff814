"""What the encoder asks of the GELU kernels beyond the operation: buffers, activations beside gradients, strides."""

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_all_close, assert_same_bits
from torch import Tensor

from albert_fast import triton_backend
from albert_fast.kernels.bias_gelu import gelu, gelu_backward, programs_of
from albert_fast.ops.bias_gelu import FORMS

parametrize_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cpu" if triton_backend.interpreted() else "cuda")


def assert_same_arithmetic(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same bits in the interpreter; compilers may fuse a product and a sum in one kernel and not in another."""
    if triton_backend.interpreted():
        assert_same_bits(actual, expected)
    else:
        assert_all_close(actual, expected, tolerance=max(torch.finfo(t.dtype).eps for t in actual.values()))


def inputs(tokens: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, x, bias."""
    return tuple(torch.randn(*size, device=device) for size in ((tokens, columns), (tokens, columns), (columns,)))


def expected(grad: Tensor, x: Tensor, bias: Tensor | None, form: str) -> dict[str, Tensor]:
    sums = (x.double() if bias is None else x.double() + bias.double()).requires_grad_()
    y = F.relu(sums) if form == "relu" else F.gelu(sums, approximate=form)
    (grad_x,) = torch.autograd.grad(y, sums, grad.double())
    return {"y": y.detach(), "grad_x": grad_x, "grad_bias": grad_x.sum(0)}


# Several tiles of columns, the last of them short; several tiles of a strip's rows.
@parametrize_form
@pytest.mark.parametrize(("tokens", "columns"), [(1, 1), (150, 600), (700, 3)])
def test_activation_and_gradients(tokens, columns, form, device):
    grad, x, bias = inputs(tokens, columns, device)
    activated = torch.empty_like(x)
    grad_x, grad_bias = gelu_backward(grad, x, bias, form, activated=activated)
    results = {"y": gelu(x, bias, form), "grad_x": grad_x, "grad_bias": grad_bias}
    # Far out on the left little is left, of numbers of the size of x and of the gradient.
    size = grad.norm().item()
    scales = {"y": (x + bias).norm().item(), "grad_x": size, "grad_bias": size}
    assert_all_close(results, expected(grad, x, bias, form), tolerance=1e-6, scales=scales)
    assert_same_arithmetic({"y": activated}, {"y": results["y"]})
    again = gelu_backward(grad, x, bias, form)
    assert_same_bits({"x": again[0], "bias": again[1]}, {"x": grad_x, "bias": grad_bias})


@parametrize_form
def test_without_bias(form, device):
    grad, x, _ = inputs(33, 70, device)
    grad_x, grad_bias = gelu_backward(grad, x, None, form)
    assert grad_bias is None
    wanted = expected(grad, x, None, form)
    del wanted["grad_bias"]
    assert_all_close({"y": gelu(x, None, form), "grad_x": grad_x}, wanted, tolerance=1e-6)


@parametrize_form
def test_into_buffers_with_strides_and_in_place(form, device):
    grad, x, bias = inputs(40, 30, device)
    y = gelu(x, bias, form)
    grad_x, grad_bias = gelu_backward(grad, x, bias, form)
    wide, wider = (torch.full((40, width), 7.0, device=device) for width in (50, 70))
    grad_there, x_there = wide[:, 8:38], wider[:, 8:38]
    gelu_backward(grad, x, bias, form, grad_x=grad_there, activated=x_there)
    assert_same_arithmetic({"x": grad_there, "y": x_there}, {"x": grad_x, "y": y})
    grad_there.copy_(grad)
    x_there.copy_(x)
    partials = torch.zeros(programs_of(device, 40, 30), 30, device=device)
    # The loop's own use: the gradient replaces that of the output, the activations what they were computed from.
    results = gelu_backward(grad_there, x_there, bias, form, grad_x=grad_there, activated=x_there, partials=partials)
    assert results[0] is grad_there
    assert results[1] is None
    assert_same_arithmetic({"x": grad_there, "y": x_there}, {"x": grad_x, "y": y})
    assert_all_close({"": partials.sum(0)}, {"": grad_bias}, tolerance=1e-6)
    x_there.copy_(x)
    assert gelu(x_there, bias, form, out=x_there) is x_there
    assert torch.equal(x_there, y)
    for buffer in (wide, wider):
        assert torch.equal(buffer[:, :8], torch.full_like(buffer[:, :8], 7.0))
        assert torch.equal(buffer[:, 38:], torch.full_like(buffer[:, 38:], 7.0))


@parametrize_form
def test_partial_sums_of_several_launches(form, device):
    """Each launch adds its own, row by row; without a bias, too, as in the loop."""
    launches = [inputs(70, 300, device)[:2] for _ in range(3)]
    together, *alone = (torch.zeros(programs_of(device, 70, 300), 300, device=device) for _ in range(4))
    assert len(together) > 1
    for (grad, x), partials in zip(launches, alone, strict=True):
        for into in (together, partials):
            gelu_backward(grad, x, None, form, partials=into)
    assert_all_close({"": together}, {"": alone[0] + alone[1] + alone[2]}, tolerance=1e-6)
    wanted = sum(expected(grad, x, None, form)["grad_bias"] for grad, x in launches)
    assert_all_close({"": together.sum(0)}, {"": wanted}, tolerance=1e-5)


@parametrize_form
def test_half_precision_is_rounded_once(form, device):
    grad, x, bias = (tensor.half() for tensor in inputs(50, 300, device))
    wide_grad, wide_grad_bias = gelu_backward(grad.float(), x.float(), bias.float(), form)
    grad_x, grad_bias = gelu_backward(grad, x, bias, form)
    results = {"y": gelu(x, bias, form), "x": grad_x, "bias": grad_bias}
    wide = {"y": gelu(x.float(), bias.float(), form).half(), "x": wide_grad.half(), "bias": wide_grad_bias}
    assert_same_arithmetic(results, wide)


@parametrize_form
@pytest.mark.parametrize("size", [1e3, 1e19, 3e38])
def test_no_nan_far_out(size, form, device):
    """Where the square or the cube overflows."""
    x = torch.tensor([[-size, size]], device=device)
    grad_x, _ = gelu_backward(torch.ones_like(x), x, None, form)
    assert torch.equal(gelu(x, None, form), x.clamp(min=0))
    assert torch.equal(grad_x, (x > 0).float())
