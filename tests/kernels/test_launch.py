"""What `launch` does with a kernel: interprets it, notes it, or starts it on a GPU with the tiles that were chosen.

There is no GPU to these tests: what Triton and CUDA are asked is answered by stand-ins.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from albert_fast.kernels import launch as launching
from albert_fast.kernels.launch import Config, Tiles, launch, multiprocessors, next_power_of_2, recording
from albert_fast.kernels.tuning import Choices

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are not interpreted")

SMALL, WIDE, FAST = (Config({"BLOCK": size}, num_warps=warps) for size, warps in ((16, 4), (64, 4), (32, 8)))
TILES = Tiles(interpreter=SMALL, half={80: [WIDE, FAST], 90: [FAST]}, single={80: [WIDE, FAST]})


@triton.jit
def write_block(out, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, index * 0 + BLOCK, mask=index < size)


class StandIn:
    """What `launch` needs of a kernel for a GPU: `kernel[grid](*arguments, **constants)`, and `warmup`."""

    arg_names = ("x", "bias", "BLOCK", "FLAG")
    params = (SimpleNamespace(do_not_specialize=False),) * 2

    @staticmethod
    def fn() -> None:
        """Its name is what the file has."""

    def __init__(self, compute: Callable[[Tensor], Any] = lambda x: None) -> None:
        self.compute = compute
        self.runs: list[dict[str, Any]] = []
        self.compiled: list[dict[str, Any]] = []

    def warmup(self, x: Tensor, bias: Tensor | None, grid: tuple[int, ...], **constants: Any) -> None:
        self.compiled.append({"runs before": len(self.runs), **constants})

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._run, grid)

    def _run(self, grid: tuple[int, ...], x: Tensor, bias: Tensor | None, **constants: Any) -> None:
        self.runs.append({"grid": grid, "bias": bias, **constants})
        self.compute(x)

    def blocks(self) -> list[int]:
        return [run["BLOCK"] for run in self.runs]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Choices:
    """Tensors seem to be on a GPU of compute capability 8.6, on which a program with more warps is faster."""

    def milliseconds(run: partial[None]) -> float:
        run()
        run()
        return 1.0 / run.args[0].num_warps

    choices = Choices(tmp_path / "tuning.json", milliseconds, capturing=lambda: False)
    monkeypatch.setattr(launching, "architecture", lambda device: 86)
    monkeypatch.setattr(launching.tuning, "choices", lambda device, in_cache: choices)
    monkeypatch.delenv("ALBERT_FAST_AUTOTUNE", raising=False)
    return choices


def start(kernel: StandIn, size: int = 100, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    x = torch.zeros(size, dtype=dtype)
    arguments = {"tiles": TILES, "dtype": dtype, "FLAG": True, "bias": None} | options
    launch(kernel, lambda blocks: (triton.cdiv(size, blocks["BLOCK"]),), x, arguments.pop("bias"), **arguments)
    return x


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("architecture", "first"), [(80, WIDE), (86, WIDE), (89, WIDE), (90, FAST), (103, FAST), (120, WIDE)]
)
def test_an_architecture_between_two_uses_the_lower_ones_tiles(architecture, first):
    """But 12.x, which has the shared memory and the tensor cores of 8.9."""
    assert TILES.of(architecture, torch.float16)[0] is first
    assert TILES.of(architecture, torch.float32)[0] is WIDE


def test_a_config_says_what_it_is():
    assert str(FAST) == "BLOCK=32 warps=8 stages=2"


@pytest.mark.parametrize(("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, power):
    assert next_power_of_2(n) == power


def test_multiprocessors_where_there_are_none():
    assert multiprocessors(torch.device("meta")) == 132
    assert 1 < multiprocessors(torch.device("cpu")) < 8


# --------------------------------------------------------------------------------------------------------- interpreting


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_interpreter_uses_its_own_tiles(monkeypatch, dtype):
    monkeypatch.setenv("ALBERT_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(launching.tuning, "choices", lambda *_: pytest.fail("nothing is tuned in the interpreter"))
    out = torch.zeros(50, dtype=torch.int32)
    launch(write_block, lambda blocks: (triton.cdiv(50, blocks["BLOCK"]),), out, 50, tiles=TILES, dtype=dtype)
    assert (out == 16).all()


@interpreted
def test_nothing_is_interpreted_where_the_grid_is_empty():
    launch(write_block, lambda blocks: (0,), torch.zeros(0, dtype=torch.int32), 0, tiles=TILES, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------ recording


def test_recording_notes_a_launch_and_runs_nothing():
    kernel = StandIn()
    with recording() as launches:
        start(kernel, dtype=torch.bfloat16)
    assert kernel.runs == []
    (noted,) = launches
    assert noted.kernel is kernel
    assert list(noted.arguments) == ["x", "bias"]
    assert noted.arguments["bias"] is None
    assert noted.constants == {"FLAG": True}
    assert (noted.tiles, noted.dtype) == (TILES, torch.bfloat16)
    assert noted.grid(WIDE.blocks) == (2,)


def test_recording_counts_the_arguments():
    with recording(), pytest.raises(ValueError):
        launch(StandIn(), lambda blocks: (1,), torch.zeros(1), tiles=TILES, dtype=torch.float32, FLAG=True)


def test_recording_ends_with_the_block(on_gpu):
    kernel = StandIn()
    with recording() as outer:
        with pytest.raises(KeyError), recording():
            raise KeyError
        start(kernel)
    assert (len(outer), kernel.runs) == (1, [])
    start(kernel)
    assert (len(outer), len(kernel.runs) > 0) == (1, True)


# ------------------------------------------------------------------------------------------------------------ on a GPU


def test_the_first_call_is_tuned_and_the_next_is_not(on_gpu):
    kernel = StandIn()
    start(kernel)
    assert kernel.blocks() == [64, 64, 32, 32, 32]  # each twice, then the faster one
    assert [(c["runs before"], c["BLOCK"], c["num_warps"]) for c in kernel.compiled] == [(0, 64, 4), (0, 32, 8)]
    start(kernel)
    assert kernel.blocks()[5:] == [32]
    assert kernel.runs[-1] | {"bias": None} == {
        "grid": (4,),
        "bias": None,
        "FLAG": True,
        "BLOCK": 32,
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def test_an_interruption_of_the_compiler_leaves_nothing_behind(on_gpu, monkeypatch):
    class Interrupted(launching.AsyncCompileMode):
        def __exit__(self, *_):
            raise KeyboardInterrupt

    kernel = StandIn()
    with monkeypatch.context() as patch:
        patch.setattr(launching, "AsyncCompileMode", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(kernel)
    start(kernel)
    assert kernel.blocks() == [64, 64, 32, 32, 32]


@pytest.mark.parametrize(
    "other",
    [{"key": (128,)}, {"FLAG": False}, {"bias": torch.zeros(1)}, {"dtype": torch.bfloat16}],
    ids=["key", "constant", "pointer", "dtype"],
)
def test_another_kind_of_call_is_tuned_apart(on_gpu, other):
    kernel = StandIn()
    start(kernel)
    start(kernel, **other)
    assert kernel.blocks() == [64, 64, 32, 32, 32] * 2


def test_sizes_do_not_make_another_kind(on_gpu):
    kernel = StandIn()
    for size in (100, 99, 50):
        start(kernel, size=size)
    assert len(kernel.runs) == 5 + 2


def test_a_kernel_that_adds_has_added_once(on_gpu):
    kernel = StandIn(lambda x: x.add_(1.0))
    assert (start(kernel) == 1.0).all()
    assert len(kernel.runs) == 5


def test_autotuning_can_be_switched_off(on_gpu, monkeypatch):
    kernel = StandIn()
    start(kernel)
    monkeypatch.setenv("ALBERT_FAST_AUTOTUNE", "0")
    start(kernel)
    assert kernel.blocks()[5:] == [64]
    monkeypatch.setenv("ALBERT_FAST_AUTOTUNE", "1")
    start(kernel)
    assert kernel.blocks()[6:] == [32]


def test_one_configuration_is_not_timed(on_gpu):
    kernel = StandIn()
    start(kernel, tiles=Tiles(SMALL, half={80: [FAST]}, single={80: [FAST]}))
    assert kernel.blocks() == [32]


def test_an_empty_grid_is_neither_started_nor_timed(on_gpu):
    kernel = StandIn()
    start(kernel, size=0)
    assert kernel.runs == []
    start(kernel)
    assert len(kernel.runs) == 5


def test_a_choice_that_does_not_fit_gives_way_to_the_first(on_gpu):
    kernel = StandIn()
    start(kernel)

    class Large(StandIn):
        def _run(self, grid, x, bias, **constants):
            super()._run(grid, x, bias, **constants)
            if constants["BLOCK"] == 32:
                raise OutOfResources(300, 200, "shared memory")

    large = Large()
    on_gpu.chosen = {(large.fn, *what[1:]): config for what, config in on_gpu.chosen.items()}
    start(large)
    assert large.blocks() == [32, 64]
    with pytest.raises(OutOfResources):
        start(large, tiles=Tiles(SMALL, half={80: [FAST]}, single={80: [FAST]}))


def test_torch_compile_never_shows_a_kernel_its_stand_ins(on_gpu):
    seen: list[type] = []
    kernel = StandIn(lambda x: (seen.append(type(x)), x.fill_(2.0)))

    @torch.library.custom_op("albert_fast_test::start", mutates_args=())
    def op(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        launch(kernel, lambda blocks: (1,), out, None, tiles=TILES, dtype=x.dtype, FLAG=True)
        return out

    op.register_fake(torch.empty_like)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        return op(x) + 1.0

    assert (compiled(torch.zeros(3)) == 3.0).all()
    assert (compiled(torch.zeros(3)) == 3.0).all()
    assert seen == [Tensor] * (5 + 1)


# ------------------------------------------------------------------------------------------------ what is started again


def test_a_call_that_was_seen_is_started_as_triton_would(seed, tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("started_again.py")), str(seed)]
    environment = kept | {"TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# ------------------------------------------------------------------------------------------------------ with a real one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ALBERT_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("ALBERT_FAST_AUTOTUNE", raising=False)
    launching.tuning.choices.cache_clear()
    launching.tuning._choices_of.cache_clear()
    out = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    tiles = Tiles(SMALL, half={80: [WIDE, FAST]}, single={80: [WIDE, FAST]})

    def run(key: int) -> None:
        grid = lambda blocks: (triton.cdiv(out.numel(), blocks["BLOCK"]),)  # noqa: E731
        launch(write_block, grid, out, out.numel(), tiles=tiles, dtype=torch.float32, key=(key,))

    run(0)
    (chosen,) = {int(value) for value in out.unique()}
    assert chosen in (32, 64)
    assert len(list(tmp_path.glob("tuning-*.json"))) == 1
    # While a graph is captured nothing is timed: a new key gets the first configuration.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(1)
    graph.replay()
    assert (out == 64).all()
    launching.tuning.choices.cache_clear()
    launching.tuning._choices_of.cache_clear()
