"""What `make gpu` runs: parity tests on the GPU and benchmarks, stage by stage, and a report of them all.

    python benchmarks/gpu.py OUT [--stages parity,rates,resident,…] [--only NAMES] [--without PEERS] [--seconds 470]

OUT/report.json has everything that was measured, OUT/summary.md the tables and the targets, OUT/parity.log what pytest
wrote. They are written again after each step: what ends early, or is ended, leaves what it had. Each stage is a process
with a time limit of its own; one that fails does not keep the others from their work (gpu_stage.py says what becomes of
a crash).

Needs no installation and no network: it runs from the checkout, with what the environment has. Without a GPU, or with
`--device cpu`, the same lines run on small shapes, and no figure means anything. Exit status 1 where a test failed, a
stage broke off, or this package computed something wrong; missed targets are no failure.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_report
import gpu_stage
import gpu_timing

ROOT = Path(__file__).resolve().parents[1]

# Seconds of each stage at most; the order is that of a run.
STAGES = {
    "parity": 180,
    "sanitizer": 120,
    "rates": 45,
    "resident": 60,
    "attention": 170,
    "loss": 90,
    "latency": 180,
    "training": 450,
}
TOTAL_SECONDS = 470

TESTS = ("tests/ops", "tests/kernels", "tests/test_backends.py", "tests/test_cuda_backend.py", "tests/test_graphs.py")

# NVIDIA's tools, of that kernel alone, and the tests that each runs: the second takes longer, and so has each of the
# kernel's instances in few.
SANITIZED = "resident_encoder"
SANITIZERS = {"memcheck": "parity or words", "racecheck": "counts_of_tiles or parity_by_words"}

# With so little time a stage is not begun, and not begun again.
_LEAST_SECONDS = 15

# What a process is given to end by itself once it is told to.
_GRACE = 5.0

# What a process starts ends with it.
_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


@dataclass
class Ended:
    """How a command ended, and its last lines."""

    status: int
    seconds: float
    timed_out: bool
    tail: list[str] = field(default_factory=list)

    def why(self) -> str:
        if self.timed_out:
            return "the stage's time was over"
        if any(line.startswith("Timeout (") for line in self.tail):
            return "it took too long"
        if self.status < 0:
            return f"the process ended by {signal.Signals(-self.status).name}"
        return f"the process ended with status {self.status}"


def run(
    command: list[str],
    seconds: float,
    environment: dict[str, str],
    each: Callable[[str], bool] = lambda line: True,
) -> Ended:
    """Runs a command and shows those lines of its output for which `each` is true."""
    print("$", " ".join(command), flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **_GROUP,
    )
    timed_out = threading.Event()

    def stop() -> None:
        timed_out.set()
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        _signal(process, signal.SIGKILL)

    tail: collections.deque[str] = collections.deque(maxlen=60)

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if each(line.rstrip()):
                print(line, end="", flush=True)
            tail.append(line.rstrip())

    timer = threading.Timer(max(1.0, seconds), stop)
    # Apart, for what a process started may hold the pipe open after its end.
    reader = threading.Thread(target=read, daemon=True)
    timer.start()
    reader.start()
    try:
        status = process.wait()
    finally:
        timer.cancel()
        _signal(process, signal.SIGKILL)
        reader.join(_GRACE)
    return Ended(status, round(time.monotonic() - start, 1), timed_out.is_set(), list(tail))


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


class Clocks:
    """What nvidia-smi says of the GPU twice a second, while a stage runs."""

    FIELDS = ("clocks.sm", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        query = f"--query-gpu={','.join(self.FIELDS)}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "500"]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def seen(self) -> dict[str, tuple[float, float, float]]:
        """Least, median and most of each field."""
        self._output.seek(0)
        rows = []
        for line in self._output.read().splitlines():
            with contextlib.suppress(ValueError):
                rows.append([float(value) for value in line.split(",")])
        columns = zip(*(row for row in rows if len(row) == len(self.FIELDS)), strict=True)
        return {
            name: (min(values), statistics.median(values), max(values))
            for name, values in zip(self.FIELDS, columns, strict=False)
        }


class Run:
    """The stages, one after the other, and their report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out
        self.end = time.monotonic() + options.seconds
        self.device: str = options.device
        self.tiny = options.tiny or self.device == "cpu"
        self.out.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": options.commit or _commit(),
            "gpu": _gpu() if self.device == "cuda" else None,
            "versions": versions(),
            "tiny": self.tiny,
            "timing": gpu_timing.HOW,
            "options": {name: getattr(options, name) for name in ("stages", "only", "without", "seconds")},
            "nvidia_smi": _nvidia_smi(),
            "targets": [],
            "stages": {},
        }

    def write(self) -> None:
        self.report["targets"] = gpu_report.judged(self.report)
        for name, text in (
            ("report.json", json.dumps(self.report, indent=1) + "\n"),
            ("summary.md", gpu_report.markdown(self.report)),
        ):
            temporary = self.out / f".{name}"
            temporary.write_text(text)
            temporary.replace(self.out / name)

    def all(self, environment: dict[str, str], scratch: Path) -> int:
        for name in self.options.stages:
            seconds = min(STAGES[name], self.end - time.monotonic())
            print(f"\n=== {name}", flush=True)
            stage: dict[str, Any] = {"status": "no time was left", "seconds": 0.0, "tail": []}
            stage |= {"counts": {}, "failures": []} if name == "parity" else {"facts": {}, "columns": [], "cases": []}
            self.report["stages"][name] = stage
            if seconds >= _LEAST_SECONDS:
                start = time.monotonic()
                with Clocks() as clocks:
                    if name == "parity":
                        self.parity(stage, seconds, environment)
                    elif name == "sanitizer":
                        self.sanitizer(stage, seconds, environment)
                    else:
                        self.stage(name, stage, seconds, environment, scratch / f"{name}.json")
                stage["seconds"] = round(time.monotonic() - start, 1)
                stage["clocks"] = clocks.seen()
            print(f"=== {name}: {stage['status']} after {stage['seconds']:.0f} s", flush=True)
            self.write()
        return int(any(map(_failed, self.report["stages"].values())))

    def parity(self, stage: dict[str, Any], seconds: float, environment: dict[str, str]) -> None:
        tests = [test for test in self.options.tests.split(",") if (ROOT / test).exists()]
        command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", *tests]
        if self.device == "cuda" and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(16, os.cpu_count() or 1))]  # most of the time is Triton's compiler, on the CPU
        failures: dict[str, str] = {}

        def each(line: str) -> bool:
            """Counts as they come: a run that is ended has no last lines. Shows what failed; all is in the log."""
            log.write(line + "\n")
            if line.startswith(("FAILED ", "ERROR ")):  # pytest's summary, with a reason
                failures[line.split(" ", 1)[1].split(" - ")[0]] = line
                return True
            test = re.search(r"\S+::.*?(?=$| (?:PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b)", line)
            outcome = re.search(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", line)
            if test is None or outcome is None:
                return line.startswith(("E  ", "===", "!!!"))
            word = outcome[1].lower()
            stage["counts"][word] = stage["counts"].get(word, 0) + 1
            if word in ("failed", "error"):
                failures[test[0].strip()] = line.strip()
            return word in ("failed", "error")

        # Several workers would disturb each other's choice of tiles, which the stages after this one would then use.
        tuning = os.environ.get("ALBERT_FAST_AUTOTUNE", "0")
        environment = {**environment, "ALBERT_FAST_AUTOTUNE": tuning, "ALBERT_FAST_TEST_DEVICE": self.device}
        environment["COLUMNS"] = "200"  # of pytest's lines
        with open(self.out / "parity.log", "w") as log:
            ended = run(command, seconds, environment, each)
        stage |= {"command": command, "tail": ended.tail, "failures": list(failures.values())}
        stage["status"] = "done" if ended.status == 0 else "out of time" if ended.timed_out else "failed"

    def sanitizer(self, stage: dict[str, Any], seconds: float, environment: dict[str, str]) -> None:
        """NVIDIA's memory and race checkers over the parity tests of the CUDA C++ kernels."""
        environment = {**environment, "ALBERT_FAST_TEST_DEVICE": self.device, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        end = time.monotonic() + seconds
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda_backend.py", "-k"]
        stage["status"] = "done"
        if self.device != "cuda":
            stage["facts"]["reason"] = "nothing to check without a GPU"
            return
        for tool, which in SANITIZERS.items():
            program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
            if not Path(program).exists():
                stage["status"] = "failed: there is no compute-sanitizer here"
                return
            only = ["--kernel-name", f"kernel_substring={SANITIZED}"]
            command = [program, "--tool", tool, *only, "--error-exitcode", "9", *tests, which]
            ended = run(command, end - time.monotonic(), environment)
            stage["facts"][tool] = "no errors" if ended.status == 0 else ended.why()
            stage["tail"] += ended.tail
            if ended.status != 0:
                stage["status"] = "out of time" if ended.timed_out else "failed"

    def stage(self, name: str, stage: dict[str, Any], seconds: float, environment: dict[str, str], file: Path) -> None:
        """Starts the stage's process, again after each death, until it has been through its cases."""
        end = time.monotonic() + seconds
        seen = 0

        def take_over(line: str = "") -> bool:
            nonlocal seen
            if file.exists() and (changed := file.stat().st_mtime_ns) != seen:
                seen = changed
                record = gpu_stage.Record.read(file)
                stage.update(facts=record.facts, columns=record.columns, deaths=record.deaths)
                # What was measured of the case that is at work counts, too.
                stage["cases"] = record.cases + ([record.current] if record.current is not None else [])
                self.write()
            return True

        while True:
            left = end - time.monotonic()
            command = [sys.executable, str(ROOT / "benchmarks" / f"gpu_{name}.py"), "--file", str(file)]
            command += ["--device", self.device, "--seconds", str(round(left - 5))]
            command += ["--only", self.options.only, "--without", self.options.without]
            command += ["--tiny"] if self.tiny else []
            ended = run(command, left, environment, take_over)
            somebody = ended.status != 0 and gpu_stage.bury(file, ended.why())
            take_over()
            again = somebody and not ended.timed_out and end - time.monotonic() >= _LEAST_SECONDS
            if not again:
                break
            who = stage["deaths"][-1][1] or "the case"
            print(f"{who} ended the process ({ended.why()}): on without it", flush=True)
        stage["tail"] = ended.tail
        stage["status"] = "done" if ended.status == 0 else "out of time" if ended.timed_out else "failed"
        if somebody:
            stage["cases"][-1]["reason"] = stage["deaths"][-1][2]
        if stage["status"] == "done" and any(case["reason"] for case in stage["cases"]):
            stage["status"] = "not complete"


def _failed(stage: dict[str, Any]) -> bool:
    ours = [row for case in stage.get("cases", []) for row in case["rows"] if row["peer"].startswith(gpu_stage.OURS)]
    return stage["status"] != "done" or any(row["reason"] is not None for row in ours)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    with contextlib.suppress(ImportError):
        import torch

        found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
        if torch.cuda.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _gpu() -> str:
    """Its name: from nvidia-smi where there is one, since torch would take some of the GPU's memory for that."""
    lines = (_nvidia_smi() or "").splitlines()
    if len(lines) > 1:
        return lines[1].split(",")[0]
    import torch

    return torch.cuda.get_device_name()


def _commit() -> str | None:
    sys.path.insert(0, str(ROOT))
    from albert_fast.bench.checkout import commit_of

    return commit_of(ROOT / "albert_fast")


def _nvidia_smi() -> str | None:
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,clocks.mem,power.limit,mig.mode.current"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    return None


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of report.json and summary.md")
    parser.add_argument("--stages", default=",".join(STAGES), help="in this order (default: %(default)s)")
    parser.add_argument("--only", default="", help="only cases whose names hold one of these words, a|b")
    parser.add_argument("--without", default="", help="no peers whose names hold one of these words, a|b")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="of all stages (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch finds a GPU")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the code; always so on a CPU")
    parser.add_argument("--tests", default=",".join(TESTS), help="of the parity stage (default: %(default)s)")
    parser.add_argument("--commit", help="what is measured, where the copy has no git")
    options = parser.parse_args(arguments)
    options.stages = [name.strip() for name in options.stages.split(",") if name.strip()]
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown or not options.stages:
        parser.error(f"--stages has {', '.join(unknown) or 'none'}; of {', '.join(STAGES)} at least one was expected")
    if options.device is None:
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
        if options.device == "cpu":
            print("torch finds no GPU here: this tries the script itself, on the CPU and on little", flush=True)
    return options


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    session = Run(options_from(arguments))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="albert_fast-gpu-", ignore_cleanup_errors=True) as scratch:
        status = session.all({"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}, Path(scratch))
    print()
    for target in session.report["targets"]:
        value = "-" if target["value"] is None else target["form"].format(target["value"])
        verdict = {True: "met", False: "MISSED", None: "not measured"}[target["met"]]
        bound = ("at least " if target["at_least"] else "at most ") + target["form"].format(target["bound"])
        print(f"{target['text']}: {value}, {bound} was wanted: {verdict}")
    print(f"wrote {session.out / 'report.json'} and summary.md after {time.monotonic() - start:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
