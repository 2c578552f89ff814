"""What every test gets: room, a fresh seed that is printed, poisoned memory, one thread a worker, and a device."""

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from turnstile import turnstile

# Without a GPU the Triton kernels are tried in Triton's interpreter. It has to be asked for before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import interpret_quickly
    from interpreter_checks import check_launches

    interpret_quickly()
    check_launches()

# Helpers that assert: pytest then shows the values, as it does for asserts in the tests themselves.
pytest.register_assert_rewrite("ops.parity")

# Two workers with a thread for each core would fight over the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The other workers' tests wait while one that is marked `alone` takes its times."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with turnstile(tmp_path_factory.getbasetemp().parent, request.node.get_closest_marker("alone") is not None):
        yield


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch, numpy and random afresh; a failure shows the seed: ALBERT_FAST_TEST_SEED=… repeats it."""
    value = int(os.environ.get("ALBERT_FAST_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"ALBERT_FAST_TEST_SEED={value}")
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002
    random.seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """For what a test draws itself."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What ATen allocates without a value holds NaN (the largest integer, True), also when C++ asks for it.

    PyTorch fills memory only in its deterministic mode. The package never looks at that mode; some of PyTorch's
    own kernels take another order of sums, on CUDA mostly. Tests of determinism therefore switch it off.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unpoisoned_memory(poisoned_memory: None) -> None:
    """PyTorch as users have it, for tests that its deterministic mode would make too easy."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the parity tests run: ALBERT_FAST_TEST_DEVICE, or the CPU."""
    return torch.device(os.environ.get("ALBERT_FAST_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real texts and vocabularies that lie beside the checkout."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("no shared/data beside the checkout")
    return path
