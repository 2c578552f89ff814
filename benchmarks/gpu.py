"""What `make gpu` runs: the parity tests on the GPU and the benchmark, and one JSON report of both.

Usage: python benchmarks/gpu.py OUT [options of `albert-fast bench`]
Needs no installation and no network: it runs from the checkout, with what the environment has. Exit status 1 where a
test failed or an implementation was wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Of the 8 minutes; the benchmark gets what the tests leave.
TEST_SECONDS = 200
TOTAL_SECONDS = 470

SHAPES = "1x16,1x128,8x128,32x128:ragged,8x512,16x512:ragged"


def run(command: list[str], seconds: float, **environment: str) -> dict[str, object]:
    """Runs a command with its output shown and kept: how it ended, how long it took, and its last lines."""
    print("$", " ".join(command), flush=True)
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = _kill_after(process, seconds)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = process.wait()
    timer.cancel()
    took = time.monotonic() - start
    return {
        "command": command,
        "status": status,
        "seconds": round(took, 1),
        "timed_out": took >= seconds,
        "tail": lines[-60:],
    }


def _kill_after(process: subprocess.Popen[str], seconds: float):  # type: ignore[no-untyped-def]
    import threading

    timer = threading.Timer(max(1.0, seconds), process.kill)
    timer.start()
    return timer


def environment() -> dict[str, object]:
    import torch

    found = {name: importlib.util.find_spec(name) is not None for name in ("triton", "transformers", "pytest", "rich")}
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": found,
    }


def main(out: Path, arguments: list[str]) -> int:
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"environment": environment()}
    device = "cuda" if report["environment"]["gpu"] is not None else "cpu"  # type: ignore[index]
    if device == "cpu":
        print("torch finds no GPU here: this tries the script itself, on the CPU and on little", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops", "tests/test_backends.py"]
    report["tests"] = run(tests, TEST_SECONDS, ALBERT_FAST_TEST_DEVICE=device)
    bench_file = out / "bench.json"
    bench = [sys.executable, "-m", "albert_fast.cli", "bench", "--device", device, "--json", str(bench_file)]
    bench += arguments or (
        ["--shapes", SHAPES, "--dtype", "float32,bfloat16"] if device == "cuda" else ["--repeats", "1"]
    )
    report["bench"] = run(bench, TOTAL_SECONDS - (time.monotonic() - start))
    if bench_file.exists():
        report["bench_report"] = json.loads(bench_file.read_text())
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out / 'report.json'} after {time.monotonic() - start:.0f} s")
    return int(any(report[name]["status"] != 0 for name in ("tests", "bench")))  # type: ignore[index]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
