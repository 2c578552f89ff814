"""Every CUDA kernel, compiled for every architecture that is supported: no spills, no more registers than committed.

What ptxas says is kept in the package's cache by what was compiled.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from albert_fast import native, native_cuda

# Registers of each kernel at most: committed, so that a change that needs more is seen.
LIMITS = json.loads((Path(__file__).parent / "cuda_registers.json").read_text())

pytestmark = pytest.mark.skipif(native_cuda.compiler() is None, reason="there is no nvcc")


def ptxas_log(architecture: str) -> str:
    plan = native_cuda.Plan.make((architecture,))
    path = native.cache_folder() / f"{Path(plan.name).stem}.ptxas"
    if not path.is_file():
        text = ""
        for source in plan.sources:
            command = [*plan.command, *plan.flags(source).split(), "-Xptxas=-v", "-c", str(source), "-o", "/dev/null"]
            clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # the sanitizers'
            result = subprocess.run(command, capture_output=True, text=True, env=clean)
            assert result.returncode == 0, result.stderr
            assert "warning" not in result.stderr, result.stderr
            text += result.stderr
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path.read_text()


@pytest.mark.parametrize("architecture", LIMITS)
def test_registers_and_spills(architecture):
    log = ptxas_log(architecture)
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    kernels = re.findall(pattern, log, re.DOTALL)
    limits = LIMITS[architecture]
    found = {}
    for name, spilled, registers in kernels:
        kernel = max((k for k in limits if k in name), key=len, default=name)
        print(f"sm_{architecture} {name}: {registers} registers, {spilled} bytes spilled")
        assert int(spilled) == 0, name
        found[kernel] = max(found.get(kernel, 0), int(registers))
    assert found.keys() == limits.keys()
    assert all(registers <= limits[kernel] for kernel, registers in found.items()), found
    # bfloat16 and half, each for ALBERT base in clusters, alone, of one tile, of one tile by words, and for any sizes
    assert sum("resident_encoder" in name for name, *_ in kernels) == 10
