"""Which device is made the current one, which stream is asked for, and what float32 may round to, without a GPU."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from albert_fast import devices
from albert_fast.kernels.launch import dot_precision

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


def test_only_another_gpu_is_made_current(monkeypatch):
    made: list[torch.device] = []

    def device(device: torch.device) -> nullcontext[None]:
        made.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    for each in (CPU, SECOND, FIRST, torch.device("cuda")):
        with devices.current(each):
            pass
    assert made == [FIRST, torch.device("cuda")]


def test_the_stream_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    assert devices.stream_of(CPU) is None
    assert [devices.stream_of(device) for device in (FIRST, SECOND)] == [100, 101]


@pytest.fixture
def settings():
    """Those of products as they were, afterwards."""
    everywhere, products = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.fp32_precision = everywhere


def one_for_all(precision: str) -> None:
    torch.backends.fp32_precision = precision


def of_products(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


def the_older_one(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def the_oldest_one(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


@pytest.mark.parametrize("choose", [one_for_all, of_products, the_older_one, the_oldest_one])
def test_tf32_is_asked_for_in_four_ways(choose: Callable[[str], None], settings: None) -> None:
    for precision in ("ieee", "tf32", "ieee"):
        choose(precision)
        assert devices.allows_tf32() == (precision == "tf32")
        assert dot_precision(torch.float32) == precision
        assert dot_precision(torch.bfloat16) == "ieee"
