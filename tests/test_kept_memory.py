"""Memory that training steps use in turn: never while a backward may still read it."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor

from albert_fast import kept_memory, native, ops

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no native library: {native.load()}")

ROWS = torch.tensor([0, 900, 1500], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _cpu_backend(monkeypatch):
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "cpu")
    kept_memory._pool.clear()
    yield
    kept_memory._pool.clear()


@pytest.fixture
def parameters() -> list[Tensor]:
    shapes: list[tuple[int, ...]] = [(96, 96), (96,)] * 4 + [(96,), (96,), (200, 96), (200,), (96, 200), (96,)]
    return [(torch.randn(shape) / 8).requires_grad_() for shape in (*shapes, (96,), (96,))]


def encode(x: Tensor, parameters: list[Tensor], **options) -> Tensor:
    rows = ROWS.clamp(max=x.shape[0])
    options = {"num_layers": 2, "num_heads": 2, "eps": 1e-12} | options
    return ops.encoder(x, parameters, rows, x.shape[0], **options)


def addresses() -> set[int]:
    return {storage.data_ptr() for storage in kept_memory._pool}


def test_a_step_takes_what_the_step_before_left(parameters):
    x = torch.randn(1500, 96)
    seen = []
    for _ in range(3):
        loss = encode(x, parameters).sum()
        loss.backward()
        seen.append(addresses())
    assert seen[0]
    assert seen[0] == seen[1] == seen[2]
    # A little smaller fits; much smaller does not, and gives the rest back.
    encode(x[:1400], parameters).sum().backward()
    assert addresses() == seen[0]
    largest = max(storage.nbytes() for storage in kept_memory._pool)
    encode(x[:500], parameters).sum().backward()
    assert max(storage.nbytes() for storage in kept_memory._pool) < largest / 2


def test_not_before_backward_is_done(parameters):
    inputs = [torch.randn(1500, 96) for _ in range(3)]
    alone = []
    for x in inputs:
        alone.append(torch.autograd.grad(encode(x, parameters).square().sum(), parameters))
        kept_memory._pool.clear()
    outputs = [encode(x, parameters).square().sum() for x in inputs]
    again = [torch.autograd.grad(output, parameters, retain_graph=True) for output in outputs]
    encode(inputs[0], parameters).sum().backward()
    third = [torch.autograd.grad(output, parameters) for output in reversed(outputs)][::-1]
    for expected, first, second in zip(alone, again, third, strict=True):
        assert all(map(torch.equal, expected, first))
        assert all(map(torch.equal, expected, second))


def test_a_graph_that_is_dropped_gives_its_memory_back(parameters):
    x = torch.randn(1500, 96)
    encode(x, parameters)
    before = addresses()
    encode(x, parameters)
    assert addresses() == before


def test_inference_gives_it_back(parameters):
    x = torch.randn(1500, 96)
    waiting = encode(x, parameters).sum()
    encode(x, parameters).sum().backward()
    pooled = len(kept_memory._pool)
    with torch.no_grad():
        encode(x, parameters)
    assert 0 < len(kept_memory._pool) < pooled
    waiting.backward()
    with torch.no_grad():
        encode(x, parameters)
    assert not kept_memory._pool


def test_without_pytorchs_count_nothing_is_used_again(parameters, monkeypatch):
    monkeypatch.setattr(kept_memory, "_count", None)
    x = torch.randn(1500, 96)
    for _ in range(2):
        encode(x, parameters, recompute="layer").sum().backward()
    assert not kept_memory._pool


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_lacks():
    with kept_memory._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends it
            kept_memory.empty([((4,), torch.float32)])
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
