"""What the operations know of a call before it runs."""

import pytest
import torch
from torch._library.custom_ops import OPDEFS

from albert_fast import ops
from albert_fast.ops.checks import has_values

BACKWARD = [name for name in OPDEFS if name.startswith("albert_fast::") and "_backward" in name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_may_depend_on_values_in_a_trace():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(has_values(x))
        return x + 1

    look(torch.ones(2))
    torch.jit.trace(look, (torch.ones(2),), check_trace=False)
    assert seen == [True, False]


def test_a_second_derivative_says_what_to_do():
    x = torch.randn(5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.bias_gelu(x, torch.zeros(8)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"bias_gelu_backward .* ALBERT_FAST_BACKEND=reference"):
        grad.sum().backward()


@pytest.mark.parametrize("name", BACKWARD)
def test_every_backward_says_it(name):
    assert len(BACKWARD) == 7
    with pytest.raises(NotImplementedError, match=f"{name} has no derivative"):
        OPDEFS[name]._backward_fn(None)
