"""The triton backend around models: which calls it takes, and what else works on top of it: autocast, compilers,
activation checkpointing, several processes."""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from interpreter import interpret_quickly
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from albert_fast import AlbertConfig, AlbertForMaskedLM, backends, triton_backend
from albert_fast.backends import Call

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def call(**changed: Any) -> Call:
    return Call(**{"operation": "attention", "device": CUDA, "dtype": torch.bfloat16, "head_dim": 64, **changed})


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_backend, "_reasons_of_devices", {CUDA: None})


def test_what_it_declines_on_a_gpu(on_a_gpu):
    declines = triton_backend.declines
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert declines(call(dtype=dtype)) is None
    assert declines(call(device=CPU)) == "it serves cuda tensors"
    assert declines(call(dtype=torch.float64)) == "float32, bfloat16 and float16, not float64"
    assert declines(call(head_dim=128)) is None
    assert declines(call(head_dim=192)) == "heads of up to 128, not 192"
    assert declines(call(operation="encoder", activation="gelu_new")) is None
    assert "not swish" in str(declines(call(operation="encoder", activation="swish")))
    assert declines(call(operation="encoder", quantized=True)) == "no products in int8"


def test_old_gpus(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "compute capability 8.0 and later, not 7.5"
    for capability, expected in (((7, 5), reason), ((8, 0), None), ((9, 0), None)):
        monkeypatch.setattr(triton_backend, "_reasons_of_devices", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert triton_backend.declines(call()) == expected


def test_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.unavailable() is None
    monkeypatch.delenv("ALBERT_FAST_BACKEND", raising=False)
    assert "ALBERT_FAST_BACKEND=triton asks for it" in str(triton_backend.declines(call(device=CPU)))
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    assert triton_backend.declines(call(device=CPU, dtype=torch.float16)) is None
    assert "interpreter computes bfloat16 wrongly" in str(triton_backend.declines(call(device=CPU)))
    assert triton_backend.declines(call(dtype=torch.float16)) == "it serves cpu tensors"


def test_why_it_is_unavailable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(triton_backend.unavailable()).startswith("PyTorch finds no GPU")
    monkeypatch.setattr(triton_backend, "_INSTALLED", False)
    assert triton_backend.unavailable() == "Triton is not installed: pip install triton (Linux)"


# --------------------------------------------------------------------------------------------------------- on top of it


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    reason = backends.refusal(backends.TRITON, Call("encoder", device, torch.float32, head_dim=16))
    if reason is not None:
        pytest.skip(reason)


def make_model(dropout: float = 0.0, **changed: Any) -> AlbertForMaskedLM:
    sizes = {"vocab_size": 61, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 24}
    probabilities = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return AlbertForMaskedLM(AlbertConfig(**sizes, **probabilities, **changed))


def make_batch(device: torch.device | str = "cpu", rows: int = 3, columns: int = 12) -> dict[str, Tensor]:
    lengths = torch.randint(2, columns + 1, (rows,))
    mask = (torch.arange(columns) < lengths[:, None]).long()
    ids = torch.randint(5, 61, (rows, columns))
    labels = ids.masked_fill((torch.rand(rows, columns) < 0.5) | (mask == 0), -100)
    labels[:, 0] = ids[:, 0]
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4, rounding: float = 1e-6
) -> None:
    """Each gradient to `tolerance` of its norm, and where that is nothing but rounding to `rounding` of the largest."""
    assert actual.keys() == expected.keys()
    whole = max(float(tensor.norm()) for tensor in expected.values())
    for name, tensor in expected.items():
        error = float((actual[name] - tensor).norm())
        assert error <= tolerance * float(tensor.norm()) + rounding * whole, f"{name}: {error}"


def test_a_model_trains_as_on_the_reference(forced, device, monkeypatch):
    model, batch = make_model().to(device), make_batch(device)
    loss = model(**batch).loss
    actual = gradients(model, loss)
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "reference")
    expected_loss = model(**batch).loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert_close(actual, gradients(model, expected_loss))


def test_compiles_to_one_graph(forced, device):
    model = make_model().to(device)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for rows, columns in ((3, 12), (2, 7)):
        batch = make_batch(device, rows, columns)
        loss, expected = compiled(**batch).loss, model(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        actual = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(compiled, loss).items()}
        assert_close(actual, gradients(model, expected))


def test_activation_checkpointing(forced, device):
    """With dropout: what is run again draws the same masks."""
    model, batch = make_model(dropout=0.3).to(device).train(), make_batch(device)

    def loss(ids: Tensor) -> Tensor:
        return model(ids, batch["attention_mask"], labels=batch["labels"]).loss

    torch.manual_seed(1)
    expected = gradients(model, loss(batch["input_ids"]))
    torch.manual_seed(1)
    again = gradients(model, checkpoint(loss, batch["input_ids"], use_reentrant=False))
    assert_close(again, expected, 1e-6)
    other = gradients(model, loss(batch["input_ids"]))
    assert not all(torch.allclose(other[name], expected[name]) for name in expected), "another seed, the same masks"


def test_autocast(forced, device):
    """With weights so large that the attention is not uniform: the gradients of query and key are above the rounding,
    a hundredth of the largest and more. Of 100 draws the worst came to a quarter of the bounds below."""
    model, batch = make_model(initializer_range=0.1).to(device), make_batch(device)
    expected = gradients(model, model(**batch).loss)
    with torch.autocast(device.type, torch.float16):
        loss = model(**batch).loss
    actual = gradients(model, loss)
    assert all(grad.dtype == torch.float32 for grad in actual.values())
    assert_close(actual, expected, tolerance=0.01, rounding=1e-4)


def test_the_word_table_has_one_gradient(forced, device, monkeypatch):
    """The loss's dense one, to which the embeddings' is added where it lies: in the same backward only."""
    model, batch = make_model().to(device), make_batch(device)
    word = model.albert.embeddings.word_embeddings.weight
    backend = triton_backend.load()
    calls = []

    def counted(name: str) -> Any:
        return lambda *arguments: (calls.append(name), backend[name](*arguments))[1]

    names = ("embed_layer_norm_backward", "embed_layer_norm_backward_sparse")
    functions = {**backend, **{name: counted(name) for name in names}}
    replaced = dataclasses.replace(backends.TRITON, load=lambda: functions)
    monkeypatch.setattr(backends, "BACKENDS", [replaced, backends.REFERENCE])
    loss = model(**batch).loss
    shared = gradients(model, loss)
    assert calls == ["embed_layer_norm_backward_sparse"]
    assert word.grad is not None
    assert word.grad.layout == torch.strided
    # Without the loss on the table the gradient is dense, though another backward had one.
    model.zero_grad()
    model.albert(batch["input_ids"], batch["attention_mask"]).last_hidden_state.sum().backward()
    assert calls[1:] == ["embed_layer_norm_backward"]
    assert word.grad.layout == torch.strided
    del functions["embed_layer_norm_backward_sparse"]
    assert_close(shared, gradients(model, model(**batch).loss), 1e-5)


def _one_of_two(rank: int, folder: str, seed: int) -> None:
    interpret_quickly()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(seed)
    model = make_model()
    batches = [make_batch(rows=2), make_batch(rows=2)]
    parallel = DistributedDataParallel(model)
    parallel(**batches[rank]).loss.backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    mean = {name: grad / 2 for name, grad in gradients(model, model(**batches[rank]).loss).items()}
    for grad in mean.values():
        torch.distributed.all_reduce(grad)
    assert_close(actual, mean, 1e-5)
    # Before the group: its end with `parallel` waits for gloo's thread, which may wait for Python's lock, held here.
    del parallel
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes(forced, tmp_path: Path, seed: int):
    """DistributedDataParallel: the mean of what each process finds by itself."""
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("two processes need a GPU each: tried in the interpreter")
    multiprocessing.spawn(_one_of_two, args=(str(tmp_path), seed), nprocs=2)
