"""The activations against transformers' modules of the same name, in float64: values and gradients."""

import pytest
import torch

from albert_fast.activations import ACTIVATIONS

hf = pytest.importorskip("transformers.activations")
WITH_PARAMETERS = {"prelu", "xielu"}


def test_the_names_are_those_of_transformers():
    assert set(ACTIVATIONS) == set(hf.ACT2CLS) - WITH_PARAMETERS


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_value_and_gradient(name):
    seed = torch.seed() % 2**31
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    near = torch.randn(2000, generator=generator, dtype=torch.float64)
    wide = 20 * torch.randn(2000, generator=generator, dtype=torch.float64)
    values, upstream = torch.cat([near, wide]), torch.randn(4000, generator=generator, dtype=torch.float64)
    results = []
    for function in (ACTIVATIONS[name], hf.ACT2FN[name]):
        x = values.clone().requires_grad_()
        y = function(x)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        results.append((y.detach(), gradient))
    # gelu_fast spells sqrt(2/pi) with ten digits in transformers.
    tolerance = 1e-9 if name == "gelu_fast" else 1e-12
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)
