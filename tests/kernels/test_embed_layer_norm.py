"""What tests/ops does not ask of the embedding kernels: ids beyond their tables, counts of token types, masks."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_all_close, assert_same_bits, offsets, ragged_lengths, random_seed
from torch import Tensor

from albert_fast import triton_backend
from albert_fast.kernels.embed_layer_norm import embed_layer_norm, embed_layer_norm_backward
from albert_fast.ops.dropout import keep_mask, token_coordinates
from albert_fast.ops.embed_layer_norm import embed_layer_norm_reference

EPS = 1e-12
NAMES = ("inputs", "position_ids", "token_type_ids", "word", "position", "token_type", "weight", "bias")
NO_DROPOUT = (EPS, 0.0, None, 0, None, None)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cpu" if triton_backend.interpreted() else "cuda")


def inputs(tokens: int, size: int, types: int, device: torch.device) -> dict[str, Tensor]:
    rows = {"word": 30, "position": 300, "token_type": types}
    ids = zip(NAMES[:3], rows.values(), strict=True)
    tensors = {name: torch.randint(count, (tokens,), device=device) for name, count in ids}
    tensors |= {name: torch.randn(count, size, device=device) for name, count in rows.items()}
    return tensors | {name: torch.randn(size, device=device) for name in ("weight", "bias")}


def expected(tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    doubles = {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in tensors.items()}
    options: dict[str, Any] = {"eps": EPS, "dropout_p": 0.0, "seed": None, "site": 0, "cu_seqlens": None}
    y = embed_layer_norm_reference(**doubles, **options, padding_idx=None)
    leaves = {name: tensor for name, tensor in doubles.items() if tensor.is_floating_point()}
    grads = torch.autograd.grad(y, list(leaves.values()), grad.double())
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def results(tensors: dict[str, Tensor], grad: Tensor, options: tuple[Any, ...] = NO_DROPOUT) -> dict[str, Tensor]:
    arguments = *tensors.values(), *options
    grads = embed_layer_norm_backward(grad, *arguments)
    names = ("inputs", *NAMES[3:])
    found = {name: grad for name, grad in zip(names, grads, strict=True) if tensors[name].is_floating_point()}
    return {"output": embed_layer_norm(*arguments), **found}


# One and two types are summed beside the vectors, more by id; several strips of rows, tiles that are not full.
@pytest.mark.parametrize(("tokens", "size", "types"), [(1, 1, 1), (70, 20, 1), (150, 128, 2), (150, 20, 3)])
def test_gradients_for_any_number_of_types(tokens, size, types, device):
    tensors, grad = inputs(tokens, size, types, device), torch.randn(tokens, size, device=device)
    actual = results(tensors, grad)
    scales = dict.fromkeys(actual, float(tokens * size) ** 0.5) if size == 1 else None
    if scales is not None:
        # The gradient of the sum is 0: w g / std - mean(w g) / std, of which either is rounded, or in an FMA one alone.
        terms = (grad * tensors["weight"]).norm().item() * EPS**-0.5
        scales |= dict.fromkeys(("word", "position", "token_type"), terms)
    assert_all_close(actual, expected(tensors, grad), tolerance=1e-5, scales=scales)
    assert_same_bits(results(tensors, grad), actual)


def test_ids_beyond_their_tables_read_nothing(device):
    """On a GPU nobody looks at ids beforehand. They stand for rows of zeros, and get no gradient."""
    tensors = inputs(40, 16, 2, device)
    wild = torch.tensor([-1, -(2**40), 2**31, 2**40], device=device)
    for name, table in zip(NAMES[:3], ("word", "position", "token_type"), strict=True):
        tensors[name][random.sample(range(40), 5)] = torch.cat([wild, wild.new_tensor([len(tensors[table])])])
    padded, grad = dict(tensors), torch.randn(40, 16, device=device)
    for name, table in zip(NAMES[:3], ("word", "position", "token_type"), strict=True):
        padded[table] = F.pad(tensors[table], (0, 0, 0, 1))
        inside = (tensors[name] >= 0) & (tensors[name] < len(tensors[table]))
        padded[name] = torch.where(inside, tensors[name], len(tensors[table]))
    wanted = expected(padded, grad)
    wanted |= {name: wanted[name][:-1] for name in ("word", "position", "token_type")}
    assert_all_close(results(tensors, grad), wanted, tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 30, 128])
def test_draws_the_masks_of_the_reference(size, device):
    lengths = ragged_lengths((1, 15, 17))
    tokens = sum(lengths) + 2
    tensors = inputs(tokens, size, 2, device)
    tensors["weight"], tensors["bias"] = torch.zeros(size, device=device), torch.ones(size, device=device)
    seed, site, p, cu_seqlens = random_seed(device), random.randrange(2**31), random.random(), offsets(lengths, device)
    options = (EPS, p, seed, site, cu_seqlens, None)
    actual = results(tensors, torch.ones(tokens, size, device=device), options)
    keep = keep_mask(seed, site, *token_coordinates(cu_seqlens, tokens, device), size, p)
    assert torch.equal(actual["output"] != 0, keep)
    # The gradient of the bias counts what was kept.
    assert_all_close({"": actual["bias"]}, {"": keep.sum(0) / (1 - p)}, tolerance=1e-5)


def test_half_precision(device):
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in inputs(100, 64, 2, device).items()}
    grad = torch.randn(100, 64, device=device).half()
    actual = results(tensors, grad)
    assert all(result.dtype == torch.float16 for result in actual.values())
    assert_all_close(actual, expected(tensors, grad), tolerance=2e-3)
