"""What a user's installation relies on: imports, and both kinds of install."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, cwd: Path, executable: str = sys.executable, **options) -> str:
    result = subprocess.run([executable, *arguments], cwd=cwd, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_import_needs_neither_triton_nor_a_compiler(tmp_path):
    """And costs less than half a second on top of torch."""
    program = """
import sys, time
sys.modules["triton"] = sys.modules["transformers"] = None
import torch
start = time.process_time()
import albert_fast
print(time.process_time() - start)
"""
    seconds = float(python("-c", program, cwd=tmp_path, env={"PATH": "", "HOME": str(tmp_path)}))
    assert seconds < 0.5


def test_transformers_imports_from_the_checkout():
    """A top-level package named `kernels` would be taken for another project's."""
    pytest.importorskip("transformers")
    program = "from transformers import AlbertConfig, AlbertModel; AlbertModel(AlbertConfig(hidden_size=64))"
    python("-c", program, cwd=ROOT)


def test_kernels_are_inside_the_package(tmp_path):
    program = """
import importlib.util
spec = importlib.util.find_spec("kernels")
assert spec is None or "albert_fast" not in str(spec.origin)
import albert_fast.kernels
"""
    python("-c", program, cwd=tmp_path)


@pytest.fixture(scope="module")
def copy_of_the_tree(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("tree") / "albert_fast"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


# An installed package must find its parts, and run, from any directory.
PROBE = """
import pathlib, torch, albert_fast, albert_fast.kernels, importlib.resources
model = albert_fast.AlbertModel(albert_fast.AlbertConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1))
model(torch.tensor([[2, 5, 3]]))
print(albert_fast.__file__)
"""


@pytest.mark.slow
def test_sdist_and_wheel(copy_of_the_tree, tmp_path):
    pytest.importorskip("build")
    python("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(copy_of_the_tree), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert list(tmp_path.glob("*.tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "albert_fast/kernels/__init__.py" in names
    assert "albert_fast/py.typed" in names
    assert "albert_fast/bench/page.html" in names
    csrc = ROOT / "csrc"
    sources = [path.relative_to(csrc) for path in csrc.rglob("[!.]*.*") if "tests" not in path.parts]
    assert {f"albert_fast/csrc/{path.as_posix()}" for path in sources} <= set(names)
    assert not any(name.startswith(("kernels", "csrc", "tests", "benchmarks")) for name in names)
    site = tmp_path / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    where = python("-c", PROBE, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""})
    assert where.startswith(str(site))


@pytest.mark.slow
def test_editable_install_without_a_network(copy_of_the_tree, tmp_path):
    python("-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    executable = str(tmp_path / "venv" / "bin" / "python")
    # The libraries of this environment, behind the new one's own.
    import torch

    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    libraries = Path(torch.__file__).parents[1]
    (site / "zz_libraries.pth").write_text(f"{libraries}\n")
    options = ("-q", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed")
    python("-m", "pip", "install", *options, "-e", str(copy_of_the_tree), cwd=tmp_path, executable=executable)
    where = python("-c", PROBE, cwd=tmp_path, executable=executable)
    assert where.startswith(str(copy_of_the_tree))
