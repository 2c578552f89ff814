"""Packed weights follow the parameters: no way of changing a weight leaves its old packing in use."""

from __future__ import annotations

import copy
import gc
import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import albert_fast
from albert_fast import native, ops, prepared

pytestmark = pytest.mark.skipif(native.load() is not None, reason=f"no native library: {native.load()}")

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "embedding_size": 16, "vocab_size": 50}


@pytest.fixture(autouse=True)
def _cpu_backend(monkeypatch):
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "cpu")
    prepared.forget()


def model(**options) -> albert_fast.AlbertModel:
    config = albert_fast.AlbertConfig(**SHAPE, num_hidden_layers=2, **options)
    return albert_fast.AlbertModel(config).eval()


def layer_of(m: albert_fast.AlbertModel) -> torch.nn.Module:
    return m.encoder.albert_layer_groups[0].albert_layers[0]


def tensors_of(m: albert_fast.AlbertModel) -> list[Tensor]:
    return list(layer_of(m).tensors())


def run(parameters: list[Tensor], x: Tensor) -> Tensor:
    rows = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    return ops.encoder(x, parameters, rows, x.shape[0], num_layers=2, num_heads=2, eps=1e-12)


def assert_fresh(parameters: list[Tensor], x: Tensor) -> None:
    """What the cached packings give equals what new ones give."""
    with torch.no_grad():
        cached = run(parameters, x)
        prepared.forget()
        assert torch.equal(cached, run(parameters, x))


def scaled(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


def through_data(tensor: Tensor) -> None:
    tensor.data.copy_(torch.randn(tensor.shape))


def through_numpy(tensor: Tensor) -> None:
    tensor.detach().numpy()[:] *= 3


def one_element(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[random.randrange(tensor.shape[0]), random.randrange(tensor.shape[1])] += 1


def new_data(tensor: Tensor) -> None:
    tensor.data = torch.randn(tensor.shape)


def swapped(tensor: Tensor) -> None:
    """The memory of the tensor holds another matrix's values, from a view of a view."""
    with torch.no_grad():
        tensor.view(-1)[::2].view(-1).neg_()


EDITS: list[Callable[[Tensor], None]] = [scaled, through_data, through_numpy, one_element, new_data, swapped]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("place", [0, 2, 4, 6, 10, 12], ids=["query", "key", "value", "dense", "ffn", "ffn_output"])
def test_edits_in_place(edit, place):
    parameters, x = tensors_of(model()), torch.randn(5, 32)
    with torch.no_grad():
        before = run(parameters, x)
    edit(parameters[place])
    with torch.no_grad():
        assert not torch.equal(before, run(parameters, x))
    assert_fresh(parameters, x)


def test_vectors():
    parameters, x = tensors_of(model()), torch.randn(5, 32)
    for place in (1, 5, 7, 8, 9, 11, 13, 14, 15):
        with torch.no_grad():
            before = run(parameters, x)
            parameters[place].data[0] += 0.5
            assert not torch.equal(before, run(parameters, x)), place
        assert_fresh(parameters, x)


def test_load_state_dict():
    one, other, x = model(), model(), torch.randn(5, 32)
    parameters = tensors_of(one)
    with torch.no_grad():
        run(parameters, x)
        one.load_state_dict(other.state_dict())
        assert torch.equal(run(parameters, x), run(tensors_of(other), x))
        one.load_state_dict(model().state_dict(), assign=True)
    assert_fresh(tensors_of(one), x)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_optimizer_steps(name, options):
    m, x = model(), torch.randn(5, 32)
    parameters = tensors_of(m)
    optimizer = getattr(torch.optim, name)(parameters, lr=1e-3, **options)
    for _ in range(3):
        # Forward and backward both use packings of this step's weights.
        gradients = []
        for _ in range(2):
            optimizer.zero_grad()
            run(parameters, x).square().sum().backward()
            gradients.append(parameters[0].grad)
            if not gradients[1:]:
                prepared.forget()
        assert torch.equal(*gradients)
        optimizer.step()
        assert_fresh(parameters, x)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_steps_too_small_for_a_sample(options, monkeypatch):
    """A step of bfloat16 parameters may change a few elements only."""
    m, x = model().bfloat16(), torch.randn(5, 32).bfloat16()
    parameters = tensors_of(m)
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, **options)
    monkeypatch.setattr(torch.ops.albert_fast_native, "fingerprint", lambda matrices: 0)
    for _ in range(3):
        with torch.no_grad():
            run(parameters, x)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        parameters[6].grad[-1, -1] = 1.0
        optimizer.step()
        assert_fresh(parameters, x)


def test_to_another_dtype_and_back():
    m, x = model(), torch.randn(5, 32)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            run(tensors_of(m), x.to(tensors_of(m)[0].dtype))
            m.to(dtype)
            assert_fresh(tensors_of(m), x.to(dtype))


def test_autocast_and_float32_have_packings_of_their_own():
    parameters, x = tensors_of(model()), torch.randn(5, 32)
    with torch.no_grad():
        for _ in range(2):
            assert run(parameters, x).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16):
                assert run(parameters, x.bfloat16()).dtype == torch.bfloat16
    assert len(prepared._entries) == 2


def test_tensors_of_inference_mode():
    """They have no version counter."""
    with torch.inference_mode():
        parameters, x = [tensor.clone() for tensor in tensors_of(model())], torch.randn(5, 32)
        run(parameters, x)
        for edit in (scaled, through_data, one_element):
            edit(parameters[6])
            cached = run(parameters, x)
            prepared.forget()
            assert torch.equal(cached, run(parameters, x))


def test_a_model_run_in_inference_mode():
    m, x = model(), torch.randn(5, 32)
    with torch.inference_mode():
        before = run(tensors_of(m), x)
    scaled(tensors_of(m)[6])
    with torch.inference_mode():
        assert not torch.equal(before, run(tensors_of(m), x))
    assert_fresh(tensors_of(m), x)


def test_groups_share_nothing():
    m, x = model(num_hidden_groups=2), torch.randn(5, 32)
    groups = m.encoder.albert_layer_groups
    parameters = [tensor for group in groups for layer in group.albert_layers for tensor in layer.tensors()]
    rows = torch.tensor([0, 5], dtype=torch.int32)

    def both() -> Tensor:
        with torch.no_grad():
            return ops.encoder(x, parameters, rows, 5, num_layers=2, num_groups=2, num_heads=2, eps=1e-12)

    before = both()
    scaled(parameters[16 + 10])
    after = both()
    prepared.forget()
    assert torch.equal(after, both())
    assert not torch.equal(after, before)


def test_they_are_made_once_and_die_with_the_model(monkeypatch):
    made = []
    pack = prepared.pack
    monkeypatch.setattr(prepared, "pack", lambda sources, dtype: made.append(len(sources)) or pack(sources, dtype))
    m, x = model(), torch.randn(5, 32)
    with torch.no_grad():
        for _ in range(3):
            run(tensors_of(m), x)
    assert made == [4]
    for _ in range(3):
        run(tensors_of(m), x).sum().backward()
        m.zero_grad()
    assert made == [4, 8]
    copied = copy.deepcopy(m)
    with torch.no_grad():
        assert torch.equal(run(tensors_of(copied), x), run(tensors_of(m), x))
    assert len(prepared._entries) == 2
    del m, copied
    gc.collect()
    assert not prepared._entries


def test_views_and_strides():
    """Matrices that are not contiguous, and made for each call."""
    parameters, x = tensors_of(model()), torch.randn(5, 32)
    with torch.no_grad():
        expected = run(parameters, x)
        turned = [p.t().contiguous().t() if p.dim() == 2 else p for p in parameters]
        assert torch.equal(run(turned, x), expected)
        assert torch.equal(run([torch.stack([p, p], dim=-1)[..., 0] for p in parameters], x), expected)


def test_many_threads_and_an_edit():
    m, x = model(), torch.randn(5, 32)
    parameters = tensors_of(m)
    for _ in range(5):
        scaled(parameters[10])
        results: list[Tensor] = []

        def work(results: list[Tensor] = results) -> None:
            with torch.no_grad():
                results.append(run(parameters, x))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        prepared.forget()
        with torch.no_grad():
            expected = run(parameters, x)
        assert len(results) == 4
        assert all(torch.equal(result, expected) for result in results)
