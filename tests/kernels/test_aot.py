"""Every kernel compiles for every architecture within its limits; and what is over a limit is found.

Kernels that are to be compiled must not be interpreted, which is decided when they are imported: by processes of their
own.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from albert_fast.kernels import aot
from albert_fast.kernels.aot import Measured, Row
from albert_fast.kernels.launch import ARCHITECTURES, Config, Launch, Tiles

KB = 1024
TILES = Tiles(Config({"M": 16}), {80: [Config({"M": 64})]}, {80: [Config({"M": 32})]})


def run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=kept | environment, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------------------------- the kernels


def test_every_kernel_compiles_within_its_limits(tmp_path):
    result = run(["-m", "albert_fast.kernels.aot", "--json", str(tmp_path / "rows.json")])
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    compiled = {(row["kernel"], row["architecture"]) for row in rows}
    assert compiled == {(name, architecture) for name in launched_kernels() for architecture in (80, 90, 100)}
    assert {row["dtype"] for row in rows} >= {"bfloat16", "float32"}
    # Products were seen, and found to be on tensor cores: the check above says nothing where there are none.
    for kernel in {row["kernel"] for row in rows if "fma" in row["measured"]["products"]}:
        on_tensor_cores = {
            row["measured"]["products"] for row in rows if row["kernel"] == kernel and row["dtype"] == "bfloat16"
        }
        assert on_tensor_cores <= {"mma.sync", "wgmma", "mma.sync+wgmma", "tcgen05", "mma.sync+tcgen05"}
        assert on_tensor_cores


def launched_kernels() -> set[str]:
    """Names of the functions in kernels/ that Triton compiles and that functions of Python start."""
    functions = [
        node
        for path in sorted(Path(aot.__file__).parent.glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    compiled = {node.name for node in functions if any("jit" in ast.unparse(name) for name in node.decorator_list)}
    on_host = [node for node in functions if node.name not in compiled]
    used = {name.id for node in on_host for name in ast.walk(node) if isinstance(name, ast.Name)}
    assert compiled & used
    return compiled & used


def test_grids_hold_many_tokens(monkeypatch):
    """CUDA takes 2**31 - 1 programs on the first axis, and no more than 65535 on the others."""
    monkeypatch.setattr(aot._Calls, "tokens", 2**22)
    monkeypatch.setattr(aot._Calls, "batch", 2**15)
    for launch in aot.record(aot.calls, [torch.float16]):
        for architecture in ARCHITECTURES:
            for config in launch.tiles.of(architecture, launch.dtype):
                first, *others = launch.grid(config.blocks)
                assert first < 2**31, launch.kernel
                assert max(others, default=0) < 2**16, (launch.kernel, config, others)


@pytest.mark.parametrize("change", ["nothing", "value", "dtype", "none", "boolean", "constant", "tiles", "elements"])
def test_launches_that_differ_are_told_apart(change):
    def make(x=torch.float32, rows=1, bias: object = 2.0, dim=64, tiles=TILES, dtype=torch.float32):
        arguments = {"x": torch.empty(3, dtype=x, device="meta"), "rows": rows, "bias": bias}
        return aot._alike(Launch("kernel", arguments, {"DIM": dim}, tiles, dtype, lambda blocks: (1,)))

    changes = {
        "nothing": {},
        "value": {"rows": 16},
        "dtype": {"x": torch.float16},
        "none": {"bias": None},
        "boolean": {"rows": True},
        "constant": {"dim": 128},
        "tiles": {"tiles": replace(TILES)},
        "elements": {"dtype": torch.bfloat16},
    }
    assert (make() == make(**changes[change])) == (change == "nothing")
    assert len({make(), make(**changes[change])}) == (1 if change == "nothing" else 2)


# -------------------------------------------------------------------------------------------------- kernels with faults

MADE_UP = """
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from albert_fast.kernels import aot
from albert_fast.kernels.launch import Config, Tiles, launch


@triton.jit(do_not_specialize=["rows"])
def product_kernel(x, y, out, bias, rows, HALVE: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    index, column = tl.arange(0, M)[:, None], tl.arange(0, K)[None, :]
    a = tl.load(x + index * K + column, mask=index < rows, other=0.0)
    b = tl.load(y + index * K + column, mask=index < rows, other=0.0)
    if HALVE:
        a = a * 0.5
        a, b = a.to(tl.float32), b.to(tl.float32)
    total = tl.dot(a, tl.trans(b), input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + index)
    tl.store(out + index * M + tl.arange(0, M)[None, :], total)


def config(m, k, warps=4):
    return Config({"M": m, "K": k}, warps)


def run(default, *others, halve=False, rows=64):
    def calls(dtype):
        def new(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        if dtype != torch.bfloat16:
            return
        each = {80: [default, *others]}
        arguments = new(64, 64), new(64, 64), new(64, 64, dtype=torch.float32), None, rows
        launch(product_kernel, lambda _: (1,), *arguments, tiles=Tiles(default, each, each), dtype=dtype, HALVE=halve)

    return calls


def main(calls, *arguments):
    return aot.main(["--jobs", "2", *arguments], calls, lambda dtype: None, Path(sys.argv[1]))


def case(name, status):
    table = Path(sys.argv[1])
    (rows,) = json.loads(table.read_text()).values()
    print(f"== {name}: {status}, {len(rows)} rows", flush=True)


good, wide, small = config(64, 64), config(128, 128), config(32, 64)
spilling, large = config(128, 64, 1), config(64, 1024, 8)
sys.stderr = sys.stdout
case("default", main(run(good, wide), "--update"))
case("committed", main(run(good, wide), "--update", "--all"))
case("again", main(run(good, rows=63)))
case("another default", main(run(small, wide), "--update"))
case("another and no more", main(run(small), "--update", "--all"))
case("spilling by default", main(run(spilling), "--architectures", "80"))
case("spilling otherwise", main(run(good, spilling), "--architectures", "80", "--all"))
case("large by default", main(run(large), "--architectures", "80,90"))
case("large otherwise", main(run(good, large), "--architectures", "90", "--all"))
case("without tensor cores", main(run(config(16, 16), halve=True), "--architectures", "90"))
case("wrong", main(run(config(63, 64)), "--architectures", "90"))
"""


def test_faults_are_found(tmp_path):
    (tmp_path / "made_up.py").write_text(MADE_UP)
    table = tmp_path / "table.json"
    result = run([str(tmp_path / "made_up.py"), str(table)], ALBERT_FAST_CACHE=str(tmp_path / "cache"))
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    first, *found = re.split(r"^== (.*): (\d), (\d+) rows$", result.stdout, flags=re.MULTILINE)
    names = found[::4]
    outputs = dict(zip(names, [first, *found[3::4]], strict=False))
    statuses = dict(zip(names, map(int, found[1::4]), strict=True))
    rows = dict(zip(names, map(int, found[2::4]), strict=True))

    for name in ("default", "committed", "again", "another default", "another and no more"):
        assert statuses[name] == 0
    assert [rows["default"], rows["committed"]] == [3, 2 * 3]
    assert [rows["another default"], rows["another and no more"]] == [3 * 3, 3]
    # A size that is not specialized is the same kernel: it was found in the cache, and in the table.
    assert "3 compilations" in outputs["again"]
    assert "all are in the committed table" in outputs["again"]
    assert "compiling 3 of 3" in outputs["default"]
    assert "compiling" not in outputs["again"]

    assert statuses["spilling by default"] == 1
    assert re.search(
        r"product_kernel .* sm_80 .* M=128 K=64 warps=1 stages=2\n +spills \d+ bytes", outputs["spilling by default"]
    )
    assert statuses["spilling otherwise"] == 0
    assert statuses["large by default"] == 1
    assert len(re.findall(r"bytes of shared memory: at most (101376|232448)", outputs["large by default"])) == 2
    assert statuses["large otherwise"] == 0
    assert re.search(r"K=1024 .* does not fit", outputs["large otherwise"])
    assert statuses["without tensor cores"] == 1
    assert "a product is not on tensor cores" in outputs["without tensor cores"]
    assert statuses["wrong"] == 1
    assert "does not compile" in outputs["wrong"]
    assert "power of 2" in outputs["wrong"]


def test_kernels_that_are_interpreted_are_refused():
    result = run(["-m", "albert_fast.kernels.aot"], TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


# ---------------------------------------------------------------------------------------------------------- the checks

GOOD = Row(
    "kernel", "HEAD_DIM=64", 80, "bfloat16", "M=64 warps=4 stages=2", True, Measured(100, 0, 99 * KB, 0, "mma.sync")
)


def changed(row: Row, **values: object) -> Row:
    measured = {name: values.pop(name) for name in list(values) if hasattr(row.measured, name)}
    return replace(row, measured=replace(row.measured, **measured), **values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"registers": 255}, None),
        ({"spilled": 4}, "spills 4 bytes"),
        ({"spilled": 4, "default": False}, None),
        ({"shared": 99 * KB + 1}, "shared memory"),
        ({"shared": 99 * KB + 1, "default": False}, None),
        ({"shared": 227 * KB, "architecture": 90}, None),
        ({"shared": 227 * KB + 1, "architecture": 90}, "shared memory"),
        ({"shared": 227 * KB, "architecture": 100, "tensor_memory": 512}, None),
        ({"architecture": 100, "tensor_memory": 1024}, "tensor memory"),
        ({"products": "fma"}, "not on tensor cores"),
        ({"products": "fma+mma.sync", "default": False}, "not on tensor cores"),
        ({"products": "fma", "dtype": "float32"}, None),
        ({"products": "", "dtype": "float32"}, None),
        ({"products": "mma.sync", "dtype": "float32"}, "tf32"),
        ({"products": "fma+tcgen05", "dtype": "float32", "architecture": 100}, "tf32"),
        ({"error": "CompilationError: it is wrong", "default": False}, "it is wrong"),
    ],
)
def test_limits(change, words):
    found = aot.problems(changed(GOOD, **change))
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


@pytest.mark.parametrize(
    ("architecture", "shared", "expected"),
    [(80, 163, True), (80, 164, False), (90, 227, True), (90, 228, False), (100, 227, True), (100, 228, False)],
)
def test_what_fits(architecture, shared, expected):
    assert aot.fits(changed(GOOD, architecture=architecture, shared=shared * KB)) is expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"registers": 108}, None),
        ({"registers": 109}, "109 registers: 100 are committed"),
        ({"registers": 50, "shared": 0}, None),
        ({"spilled": 8}, "committed without"),
        ({"shared": 99 * KB + 16}, "are committed"),
        ({"products": "wgmma"}, None),
        ({"products": "fma+mma.sync"}, "mma.sync is committed"),
        ({"products": "fma"}, "mma.sync is committed"),
        ({"products": ""}, "gone"),
    ],
)
def test_what_is_worse_than_what_is_committed(change, words):
    row = changed(GOOD, default=False, **change)
    found = aot.regressions(row.measured, GOOD.measured)
    assert len(found) == (words is not None)
    assert words is None or words in found[0]
    assert set(found) <= set(aot.check(row, {GOOD.name: GOOD.measured}))
    assert not set(found) & set(aot.check(row, {}))


def test_a_spill_that_is_committed_is_none_anew():
    spilling = replace(GOOD.measured, spilled=8)
    assert aot.regressions(spilling, spilling) == []


def test_the_table_is_kept_for_each_version(tmp_path):
    path = tmp_path / "table.json"
    other = changed(GOOD, architecture=90, products="wgmma")
    assert aot.read_table(path, "3.6.0") == {}
    aot.write_table(path, "3.6.0", [GOOD], whole=True)
    aot.write_table(path, "3.9.0", [GOOD], whole=False)
    aot.write_table(path, "3.9.0", [other], whole=False)
    assert set(aot.read_table(path, "3.9.0")) == {GOOD.name, other.name}
    aot.write_table(path, "3.9.0", [other], whole=True)
    assert aot.read_table(path, "3.6.0") == {GOOD.name: GOOD.measured}
    assert aot.read_table(path, "3.9.0") == {other.name: other.measured}
    assert aot.read_table(path, "4.0.0") == {}
    assert len(path.read_text().splitlines()) == 2 + 2 * 2 + 2


def test_the_committed_table_has_the_versions_that_this_is_tried_with():
    assert set(json.loads(aot.TABLE.read_text())) == {"3.6.0", "3.9.0"}
