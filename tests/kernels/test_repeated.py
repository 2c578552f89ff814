"""Calls that a loop repeats: what a later one starts is what the function itself would start."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from albert_fast.kernels import launch, repeated
from albert_fast.kernels.launch import Start
from albert_fast.kernels.repeated import Repeated

KERNEL = SimpleNamespace(
    arg_names=("x", "scale", "y", "site", "z", "BLOCK"),
    params=[SimpleNamespace(do_not_specialize=name == "site") for name in ("x", "scale", "y", "site", "z")],
)


class Watched:
    """A function that starts `KERNEL` as `change` has it, and what was started without it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[Start], Start | None] = lambda s: s) -> None:
        self.change = change
        self.ran = 0
        self.again: list[tuple[Any, ...]] = []
        monkeypatch.setattr(repeated.devices, "stream_of", lambda device: 7)
        monkeypatch.setattr(repeated, "start", lambda *entry: self.again.append(entry))
        self.call = Repeated(self.function)

    def function(self, x: Tensor, y: Tensor, z: Tensor | None, *, site: int) -> None:
        self.ran += 1
        launch._note(self.change(Start("started", (3, 1, 1), (x, 0.5, y, site, z), KERNEL)))  # type: ignore[arg-type]


def tensors(count: int = 2) -> list[Tensor]:
    return [torch.zeros(8) for _ in range(count)]


def test_a_later_call_starts_the_kernel_with_its_own_addresses_and_site(monkeypatch):
    watched = Watched(monkeypatch)
    watched.call(*tensors(), None, site=1)
    x, y = tensors()
    watched.call(x, y, None, site=3)
    assert watched.ran == 1
    ((started, grid, arguments, stream),) = watched.again
    assert (started, grid, stream) == ("started", (3, 1, 1), 7)
    assert arguments[0] is x
    assert arguments[2] is y
    assert (arguments[1], *arguments[3:]) == (0.5, 3, None)


def test_nothing_of_a_call_is_kept_alive(monkeypatch):
    watched = Watched(monkeypatch)
    x, y = tensors()
    before = sys.getrefcount(x)
    watched.call(x, y, None)
    assert sys.getrefcount(x) == before


def test_another_pattern_of_none_is_another_kind(monkeypatch):
    watched = Watched(monkeypatch)
    for with_z in (False, True, False, True):
        watched.call(*tensors(), torch.zeros(8) if with_z else None)
    assert watched.ran == 2
    assert [arguments[4] is None for _, _, arguments, _ in watched.again] == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda start: None,
        lambda start: start._replace(arguments=(torch.zeros(8), *start.arguments[1:])),
        lambda start: start._replace(
            kernel=SimpleNamespace(arg_names=KERNEL.arg_names, params=[SimpleNamespace(do_not_specialize=False)] * 5)
        ),
    ],
    ids=["cannot be started again", "a tensor that was not given", "compiled for each site"],
)
def test_what_cannot_be_repeated_runs_the_function(change, monkeypatch):
    watched = Watched(monkeypatch, change)
    for _ in range(3):
        watched.call(*tensors(), None)
    assert (watched.ran, watched.again) == (3, [])


def test_a_tensor_at_two_places_is_not_told_from_two(monkeypatch):
    watched = Watched(monkeypatch)
    (x,) = tensors(1)
    for _ in range(2):
        watched.call(x, x, None)
    assert (watched.ran, watched.again) == (2, [])


def test_other_alignments_are_another_kind(monkeypatch):
    watched = Watched(monkeypatch)
    x, y = tensors()
    shifted = torch.zeros(9)[1:]
    for given in ((x, y), (shifted, y), (x, shifted)):
        watched.call(*given, None)
    assert (watched.ran, watched.again) == (3, [])
    for given in ((shifted, y), (x, y), (x, shifted)):
        watched.call(*given, None)
        assert watched.again[-1][2][0] is given[0]
    assert (watched.ran, len(watched.again)) == (3, 3)


def test_a_function_that_fails_is_not_repeated(monkeypatch):
    def fail(start: Start) -> None:
        raise MemoryError

    watched = Watched(monkeypatch, fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            watched.call(*tensors(), None)
    assert launch._noted.get() is None


def test_the_encoder_starts_what_it_would_without(seed):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("repeated_passes.py")), str(seed)]
    result = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
