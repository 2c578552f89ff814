"""Which configuration is chosen, what is kept of it and where, and what becomes of files that are foreign."""

import json
import multiprocessing
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources, PTXASError

from albert_fast.kernels import tuning
from albert_fast.kernels.launch import Config
from albert_fast.kernels.tuning import Choices, merge_json, read_json

A, B, C = CONFIGS = [Config({"BLOCK": size}) for size in (16, 32, 64)]


def kernel() -> None:
    """Stands for one: its name is all that is looked at."""


def kind(key: int = 0) -> tuple[Any, ...]:
    return (kernel, torch.bfloat16, (key, "causal"), (("HEAD_DIM", 64),), (False, True))


class Timer:
    """Times by a list: configuration -> milliseconds, or what is raised."""

    def __init__(self, **times: float | Exception) -> None:
        self.times = {f"BLOCK={name[1:]} warps=4 stages=2": time for name, time in times.items()}
        self.timed: list[str] = []

    def __call__(self, run: Callable[[], None]) -> float:
        assert isinstance(run, partial)
        name = str(run.args[0])
        self.timed.append(name)
        time = self.times[name]
        if isinstance(time, Exception):
            raise time
        run()
        return time


def choices(path: Path, timer: Timer, capturing: Callable[[], bool] = lambda: False) -> Choices:
    return Choices(path, timer, capturing)


def best(
    chooser: Choices, key: int = 0, run: Callable[[Config], None] = lambda config: None, *arguments: Any
) -> Config:
    return chooser.best(kind(key), CONFIGS, run, arguments)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tuning._warn.cache_clear()
    return tmp_path / "new" / "tuning.json"


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"_16": 3.0, "_32": 1.0, "_64": 2.0}, B),
        ({"_16": 1.0, "_32": 2.0, "_64": 2.0}, A),
        ({"_16": 1.0, "_32": 0.98, "_64": 2.0}, A),  # within what timings differ by
        ({"_16": 1.0, "_32": 0.9, "_64": 0.89}, C),
        ({"_16": 2.0, "_32": OutOfResources(2, 1, "shared memory"), "_64": 1.0}, C),
        ({"_16": PTXASError("registers"), "_32": 2.0, "_64": 1.0}, C),
        ({"_16": OutOfResources(2, 1, "registers"), "_32": 2.0, "_64": 3.0}, B),
    ],
)
def test_the_fastest_that_fits_is_chosen(path, times, expected):
    assert best(choices(path, Timer(**times))) is expected


def test_where_nothing_fits_the_first_is_left_to_say_so(path):
    timer = Timer(**dict.fromkeys(("_16", "_32", "_64"), OutOfResources(2, 1, "shared memory")))
    assert best(choices(path, timer)) is A


def test_other_errors_are_not_hidden(path):
    with pytest.raises(RuntimeError, match="illegal"):
        best(choices(path, Timer(_16=1.0, _32=RuntimeError("an illegal memory access"), _64=1.0)))


def test_a_kind_is_timed_once(path):
    timer = Timer(_16=3.0, _32=1.0, _64=2.0)
    chooser = choices(path, timer)
    assert [best(chooser, key) for key in (0, 0, 1, 0, 1)] == [B] * 5
    assert len(timer.timed) == 2 * 3


def test_a_full_gpu_is_asked_again_by_a_later_process(path):
    timer = Timer(_16=1.0, _32=torch.OutOfMemoryError("CUDA out of memory"), _64=0.5)
    chooser = choices(path, timer)
    assert [best(chooser), best(chooser)] == [A, A]
    assert len(timer.timed) == 2
    assert best(choices(path, Timer(_16=1.0, _32=2.0, _64=0.5))) is C


def test_arguments_hold_afterwards_what_they_held(path):
    x, expanded = torch.randn(8, 6), torch.randn(3).expand(4, 3)
    strided = torch.randn(8, 3, 6)[:, 1]
    before = [tensor.clone() for tensor in (x, strided, expanded)]
    weight = torch.nn.Parameter(x)
    versions = weight._version

    def run(config: Config) -> None:
        weight.data.mul_(3.0)
        strided.fill_(float("nan"))

    best(choices(path, Timer(_16=1.0, _32=1.0, _64=1.0)), 0, run, weight, None, strided, 3, expanded)
    for tensor, saved in zip((x, strided, expanded), before, strict=True):
        assert torch.equal(tensor, saved)
    assert weight._version == versions


def test_arguments_may_be_of_inference_mode(path):
    with torch.inference_mode():
        x = torch.zeros(3)

    def run(config: Config) -> None:
        with torch.inference_mode():
            x.add_(1.0)

    best(choices(path, Timer(_16=1.0, _32=1.0, _64=1.0)), 0, run, x)
    assert (x == 0.0).all()


def test_arguments_hold_what_they_held_after_an_error_too(path):
    x = torch.zeros(3)
    with pytest.raises(ZeroDivisionError):
        best(choices(path, Timer(_16=1.0, _32=ZeroDivisionError(), _64=1.0)), 0, lambda config: x.add_(1.0), x)
    assert (x == 0.0).all()


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("1", True), ("0", False)])
def test_the_switch(monkeypatch, value, expected):
    monkeypatch.delenv("ALBERT_FAST_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("ALBERT_FAST_AUTOTUNE", value)
    assert tuning.enabled() is expected


# --------------------------------------------------------------------------------------------------- capturing a graph


def test_nothing_is_timed_while_a_graph_is_captured(path):
    timer, capturing = Timer(_16=2.0, _32=1.0, _64=2.0), True
    chooser = choices(path, timer, lambda: capturing)
    assert best(chooser) is A
    assert timer.timed == []
    assert not path.exists()
    capturing = False
    assert best(chooser) is B
    capturing = True
    assert best(chooser) is B


def test_what_is_stored_serves_a_capture(path):
    best(choices(path, Timer(_16=2.0, _32=1.0, _64=2.0)))
    assert best(choices(path, Timer(), lambda: True)) is B


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_later_process_finds_the_choice_and_the_times(path):
    best(choices(path, Timer(_16=3.0, _32=OutOfResources(2, 1, "shared memory"), _64=2.0)))
    assert best(choices(path, Timer())) is C
    (entry,) = json.loads(path.read_text()).values()
    assert entry == {
        "best": "BLOCK=64 warps=4 stages=2",
        "milliseconds": {
            "BLOCK=16 warps=4 stages=2": 3.0,
            "BLOCK=32 warps=4 stages=2": None,
            "BLOCK=64 warps=4 stages=2": 2.0,
        },
    }


def test_the_file_names_the_kind():
    assert tuning.describe(*kind(512)) == (f"{__name__}.kernel bfloat16 (512, 'causal') HEAD_DIM=64 +-")


def test_processes_that_tune_at_once_end_with_one_choice(path):
    first, second = choices(path, Timer(_16=3.0, _32=1.0, _64=2.0)), choices(path, Timer(_16=3.0, _32=2.0, _64=1.0))
    second.best(kind(1), CONFIGS, lambda config: None)  # has read the file before the first wrote there
    assert best(first) is B
    assert best(second) is B
    assert len(json.loads(path.read_text())) == 2


def test_a_choice_that_is_no_longer_in_the_table_is_made_anew(path):
    path.parent.mkdir()
    path.write_text(json.dumps({tuning.describe(*kind()): {"best": "BLOCK=8 warps=4 stages=2"}}))
    assert best(choices(path, Timer(_16=2.0, _32=1.0, _64=2.0))) is B


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", '{"best": 3}'])
def test_foreign_files_are_ignored_with_one_warning(path, text):
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chooser = choices(path, Timer(_16=2.0, _32=1.0, _64=2.0))
        assert [best(chooser, key) for key in range(3)] == [B] * 3
    expected = 0 if text == '{"best": 3}' else 1  # an object without what is looked for
    assert [str(path) in str(warning.message) for warning in caught] == [True] * expected
    assert best(choices(path, Timer())) is B


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    tuning._warn.cache_clear()
    (tmp_path / "file").write_text("")
    chooser = choices(tmp_path / "file" / "tuning.json", Timer(_16=2.0, _32=1.0, _64=2.0))
    with pytest.warns(RuntimeWarning, match="ALBERT_FAST_CACHE"):
        assert best(chooser) is B
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [best(chooser), best(chooser, 1)] == [B, B]


def _write(path: Path, process: int) -> None:
    for index in range(20):
        merge_json(path, {f"{process} {index}": index, "all": process})


def test_many_processes_lose_nothing(path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = read_json(path)
    assert len(found) == 4 * 20 + 1
    assert found["all"] in range(4)
    assert {name.suffix for name in path.parent.iterdir()} == {".json", ".lock"}


def test_one_file_for_each_gpu_triton_and_sources(monkeypatch, tmp_path):
    monkeypatch.setenv("ALBERT_FAST_CACHE", str(tmp_path))
    tuning._choices_of.cache_clear()
    name = tuning._choices_of("NVIDIA H200 (a/b)")._path
    assert name.parent == tmp_path
    assert name.name.startswith("tuning-NVIDIA-H200-a-b-triton-")
    assert tuning._choices_of("NVIDIA H200 (a/b)") is tuning._choices_of("NVIDIA H200 (a/b)")
    assert tuning._choices_of("NVIDIA H200 (a/b)", in_cache=True)._path == name
    monkeypatch.setattr(tuning, "_sources", lambda: "others")
    tuning._choices_of.cache_clear()
    assert tuning._choices_of("NVIDIA H200 (a/b)")._path != name
    tuning._choices_of.cache_clear()
