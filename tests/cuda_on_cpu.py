"""Builds csrc/cuda's kernels, or others, for the machine that plays a GPU (csrc/cuda/host)."""

from __future__ import annotations

import subprocess
from pathlib import Path

from albert_fast import native_cuda


def build(folder: Path, kernels: Path | None = None, *flags: str) -> Path:
    """A library in `folder`; kernels: a source in place of the package's; flags: beside the package's."""
    plan = native_cuda.Plan.make(())
    assert plan.command is not None
    sources = [path for path in plan.sources if kernels is None or path.suffix == ".cpp"]
    include, objects = f"-I{plan.sources[0].parent}", []
    for path in [*sources, *([kernels] if kernels else [])]:
        flags_here = [*plan.flags(Path("of_a_kernel.cu") if path == kernels else path).split(), *flags, include]
        objects.append(f"{path.stem}.o")
        subprocess.run([*plan.command, *flags_here, "-c", str(path), "-o", objects[-1]], check=True, cwd=folder)
    subprocess.run([*plan.command, "-shared", *objects, "-o", "library.so"], check=True, cwd=folder)
    return folder / "library.so"
