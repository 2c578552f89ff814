"""`make gpu` without a GPU: every stage on small shapes, what becomes of failures, and the report."""

import importlib
import json
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from albert_fast import native_cuda

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = "albert_fast"


@pytest.fixture
def script(monkeypatch):
    """A module of benchmarks/, by name; the scripts import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def measured(script, tmp_path, monkeypatch):
    """Runs a stage here, on small shapes, and returns its record."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which tests ask for, and `make gpu` does not
    monkeypatch.setattr(script("gpu_timing"), "TURN", 1e-3)

    def run(name, *arguments):
        file = tmp_path / f"{name}.json"
        script(f"gpu_{name}").main(["--file", str(file), "--device", "cpu", "--tiny", *arguments])
        return script("gpu_stage").Record.read(file)

    yield run
    torch.set_num_threads(threads)


def row_of(case, peer):
    return next(row for row in case["rows"] if row["peer"] == peer)


# ----------------------------------------------------------------------------------------------------------- the stages


def test_rates(measured):
    record = measured("rates")
    assert all(case["reason"] is None for case in record.cases)
    assert all(row["reason"] is None and row["microseconds"] > 0 for case in record.cases for row in case["rows"])
    products = [case for case in record.cases if case["name"].startswith("products of")]
    assert [len(case["rows"]) for case in products] == [12, 12]
    assert record.facts["matrix_tflops"] > 0
    assert record.facts["copy_terabytes_per_second"] > 0


def test_resident(measured, monkeypatch):
    """The kernel's source runs on the CPU here (csrc/cuda/host.h)."""
    monkeypatch.setenv("ALBERT_FAST_CUDA_ON_CPU", "1")
    native_cuda.load().albert_host_machine(8, 227 << 10, True, 0, False)
    (case,) = measured("resident").cases
    assert case["name"] == "5 tokens in 2 rows"
    peers = [OURS, f"{OURS} in clusters", f"{OURS} without clusters"]
    assert [row["peer"] for row in case["rows"]] == peers
    for row in case["rows"]:
        assert row["reason"] is None
        assert row["error"] <= row["limit"] < 0.05
        assert row["microseconds"] > 0


def test_attention(measured, script, monkeypatch):
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        calls.append(max_q)
        attention = script("gpu_attention").ops.cross_attention
        return attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k).view(query.shape)

    module = importlib.import_module("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    record = measured("attention", "--only", "bfloat16 3x33 2x16|8x33 1x32")
    full, ragged = record.cases
    assert (full["name"], ragged["name"]) == ("bfloat16 3x33 2x16 full", "bfloat16 8x33 1x32 ragged")
    assert calls
    for case in record.cases:
        for row in case["rows"]:
            assert row["reason"] is None
            assert row["error"] <= row["limit"] < 0.05
            assert row["forward_tflops"] > 0
            assert row["backward_ratio"] > 0
    assert full["work"]["gflop"] == pytest.approx(4e-9 * 3 * 33**2 * 32)
    assert ragged["work"]["tokens"] < 0.5 * 8 * 33
    assert ragged["work"]["gflop"] < full["work"]["gflop"] * 8 / 3 * 0.5


@pytest.mark.parametrize(("rows", "length"), [(320, 128), (80, 512), (20, 2048), (5, 8192)])
def test_ragged_rows_hold_40_percent(script, rows, length):
    lengths = script("gpu_attention").ragged_lengths(rows, length)
    assert len(lengths) == rows
    assert 1 <= min(lengths) <= max(lengths) <= length
    assert sum(lengths) / (rows * length) == pytest.approx(0.4, abs=0.01)


def test_a_wrong_result_has_no_figures(measured, script, monkeypatch, capsys):
    right = script("gpu_attention").ops.cross_attention
    monkeypatch.setattr(script("gpu_attention").ops, "cross_attention", lambda *args: 1.01 * right(*args))
    (case,) = measured("attention", "--only", "bfloat16 3x33 2x16").cases
    row = row_of(case, OURS)
    assert row["passed"] is False
    assert row["error"] > row["limit"]
    assert "wrong" in row["reason"]
    assert "forward_microseconds" not in row
    assert row_of(case, "sdpa flash")["forward_microseconds"] > 0
    assert "wrong" in capsys.readouterr().out


def test_loss(measured, script, monkeypatch):
    loss = script("gpu_loss")
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", _linear_cross_entropy, raising=False)
    found = {
        "liger_kernel": lambda x, table, labels, bias: (
            _linear_cross_entropy(x, table, labels, linear_bias=bias),
            None,
        ),
        "cut_cross_entropy": lambda x, table, labels, bias: _linear_cross_entropy(x, table, labels, linear_bias=bias),
    }
    monkeypatch.setattr(loss, "_found", lambda package, module, name: found[package])
    record = measured("loss")
    assert [case["name"] for case in record.cases] == ["10 of 64 tokens labelled", "64 of 64 tokens labelled"]
    assert [len(case["rows"]) for case in record.cases] == [10, 6]
    for case in record.cases:
        for row in case["rows"]:
            assert row["reason"] is None
            assert 0 < row["error"] <= row["limit"]
            assert row["microseconds"] > 0


def _linear_cross_entropy(x, table, labels, *, linear_bias):
    return torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, table, linear_bias), labels)


def test_who_is_not_there_is_told_so(script):
    with pytest.raises(NotImplementedError, match="no_such_package is not installed"):
        script("gpu_loss")._found("no_such_package", "no_such_package", "loss")


def test_training_and_who_finds_no_memory_is_tried_alone(measured, monkeypatch):
    peers = importlib.import_module("albert_fast.bench.peers")
    build, asked = peers.TransformersEager.build, []

    def starved(self, *arguments):
        asked.append(self.name)
        if asked.count("transformers-eager") == 1 and self.name == "transformers-eager":
            raise torch.OutOfMemoryError("CUDA out of memory")
        build(self, *arguments)

    monkeypatch.setattr(peers.TransformersEager, "build", starved)
    (case,) = measured("training", "--only", "base 5x16 ragged").cases
    assert case["reason"] is None
    assert case["work"]["tokens"] == pytest.approx(0.4 * 5 * 16, abs=4)
    for row in case["rows"]:
        assert row["reason"] is None
        assert row["passed"]
        assert row["milliseconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(case["work"]["tokens"] / row["milliseconds"] * 1e3)
        assert row["alone"] == (row["peer"] == "transformers-eager")
        assert row["mfu_of_measured"] > 0
    assert row_of(case, OURS)["ratio"] == 1.0
    compiled = row_of(case, "transformers-compile")
    assert compiled["ratio"] == pytest.approx(compiled["milliseconds"] / row_of(case, OURS)["milliseconds"])


def test_latency(measured, script, monkeypatch):
    graphs = importlib.import_module("albert_fast.graphs")
    monkeypatch.setattr(graphs, "check_on_gpu", lambda model: None)
    stand_in = lambda model, inputs, options: lambda: model(**inputs, **options, return_dict=True)  # noqa: E731
    monkeypatch.setattr(graphs, "_inference", stand_in)
    monkeypatch.setattr(script("gpu_latency"), "ON_A_CPU", script("gpu_latency").ALL)
    (case,) = measured("latency").cases
    assert {row["peer"] for row in case["rows"]} == set(script("gpu_latency").ALL)
    for row in case["rows"]:
        assert row["reason"] is None
        assert row["microseconds"] > 0
        assert row["device_microseconds"] > 0
        assert row["ratio"] > 0


def test_full_batches_have_no_mask(script):
    models = script("gpu_models")
    config, device = models.configuration("base", tiny=True), torch.device("cpu")
    full, ragged = (models.make_batch(config, lengths, 8, device) for lengths in ([8, 8], [8, 3]))
    assert "attention_mask" not in full.inputs()
    assert ragged.inputs()["attention_mask"].sum() == ragged.tokens == 11
    assert full.labelled == 2
    assert int((ragged.labels[1, 3:] != -100).sum()) == 0
    assert int(full.input_ids.max()) < config.vocab_size


# --------------------------------------------------------------------------------------------------------------- timing


class FakeCuda:
    """Events and waits of a GPU whose work takes no longer than the host's."""

    def __init__(self, monkeypatch):
        self.slept, self.held, self.peak = [], 100, 0
        for name in ("_sleep", "synchronize", "empty_cache", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def _sleep(self, cycles):
        self.slept.append(cycles)
        time.sleep(cycles / 1e10)

    def synchronize(self, device=None):
        pass

    empty_cache = synchronize

    def memory_allocated(self, device):
        return self.held

    def max_memory_allocated(self, device):
        return self.peak


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return (other.time - self.time) * 1e3


@pytest.fixture
def timing(script, monkeypatch):
    module = script("gpu_timing")
    monkeypatch.setattr(module, "_flushed", lambda device: torch.empty(16, dtype=torch.int8))
    return module


def test_calls_behind_a_wait(timing, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    timing._cycles_per_second.cache_clear()
    one = timing.Queued(lambda: time.sleep(2e-3), torch.device("cpu"))
    one.warm_up()
    one.turn()
    timing._cycles_per_second.cache_clear()
    assert 1 < one.calls <= timing.MOST_CALLS
    assert len(one.seconds) == one.calls
    assert 2e-3 <= one.median < 2e-2
    assert 2e-3 <= one.host_seconds[0] < 2e-2
    assert one.wait >= one.calls * 2e-3
    assert len(cuda.slept) == 3
    assert not one.starved or max(one.seconds) > 2 * one.median  # only where this machine was away

    one.wait = 0.0
    one.turn()
    assert one.starved


def test_steps_follow_each_other(timing, monkeypatch):
    FakeCuda(monkeypatch)
    calls = []
    one = timing.Steps(lambda: calls.append(time.sleep(1e-3)), torch.device("cpu"))
    one.warm_up()
    warm = len(calls)
    one.turn()
    assert len(calls) == warm + 1 + timing.STEPS_A_TURN
    assert len(one.seconds) == timing.STEPS_A_TURN
    assert min(one.seconds) >= 1e-3


def test_which_timer_a_gpu_gets(timing, monkeypatch):
    gpu = torch.device("cuda")
    assert type(timing.timed("device", print, gpu)) is timing.Queued
    assert type(timing.timed("steps", print, gpu)) is timing.Steps
    assert type(timing.timed("latency", print, gpu)) is timing.Wall
    assert {type(timing.timed(how, print, torch.device("cpu"))) for how in ("device", "steps")} == {timing.Wall}
    cuda = FakeCuda(monkeypatch)
    cuda.peak = 350
    assert timing.peak_bytes(lambda: None, gpu) == 250
    assert timing.held_bytes(gpu) == 100
    assert timing.peak_bytes(lambda: None, torch.device("cpu")) is None


def test_graphs_are_recorded_after_a_call_aside(timing, monkeypatch):
    log = []

    class Stream:
        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def replay(self):
            log.append("replay")

    class Inside:
        def __init__(self, what):
            log.append(type(what).__name__)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "stream": Inside,
        "graph": Inside,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    timing.recorded(lambda: log.append("call"), torch.device("cuda"))()
    assert log == ["wait", "Stream", "call", "wait", "Graph", "call", "replay"]


# ------------------------------------------------------------------------------------------------------------- failures


def test_errors_that_are_not_numbers_are_wrong(script):
    stage = script("gpu_stage")
    expected = torch.ones(3)
    assert stage.relative_error(torch.tensor([1.0, 1.0, math.nan]), expected) == math.inf
    assert stage.relative_error(expected * 1.5, expected) == pytest.approx(0.5)


def test_a_stage_goes_on_where_it_was(script, tmp_path):
    module = script("gpu_stage")
    file = tmp_path / "stage.json"
    arguments = ["--file", str(file), "--device", "cpu"]
    asked = []

    def work(case):
        for row in case.standing():
            with case.attempt(row):
                asked.append((case.name, row.peer))
                if row.peer == "raises":
                    raise ValueError("first line\nsecond")
                row.figures["value"] = 1.0

    first = module.Stage("test", [module.Column("v", "value")], arguments)
    first.run("one", {}, ["good", "raises"], work)
    case = module.Case(first, "two", {}, ["good", "killer"])
    first.enter(case, case.rows["killer"])  # and here the process ended
    assert module.bury(file, "by a signal")

    asked.clear()
    second = module.Stage("test", [module.Column("v", "value")], arguments)
    for name in ("one", "two"):
        second.run(name, {}, ["good", "killer"], work)
    record = module.Record.read(file)
    assert asked == [("two", "good")]
    assert not module.bury(file, "nobody was at work")
    assert [case["name"] for case in record.cases] == ["one", "two"]
    assert row_of(record.cases[0], "raises")["reason"] == "ValueError: first line"
    assert row_of(record.cases[0], "good")["value"] == 1.0
    assert row_of(record.cases[1], "killer")["reason"] == "by a signal"

    for name in ("three", "four"):
        second.record.deaths.append([name, "killer", "by a signal"])
    second.run("five", {}, ["killer", "good"], work)
    assert "3 times" in row_of(module.Record.read(file).cases[-1], "killer")["reason"]
    second.run("six", {}, ["good"], lambda case: 1 / 0)
    assert module.Record.read(file).cases[-1]["reason"].startswith("ZeroDivisionError")
    late = module.Stage("test", [], [*arguments, "--seconds", "-1"])
    late.run("seven", {}, ["good"], work)
    assert module.Record.read(file).cases[-1]["reason"] == "no time was left"


def test_a_lost_context_ends_the_process_and_says_why(script, tmp_path, monkeypatch, capsys):
    module = script("gpu_stage")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    file = tmp_path / "stage.json"
    stage = module.Stage("test", [], ["--file", str(file)])
    assert stage.facts["device"] == "NVIDIA H200"
    lost = []

    def synchronize(device):
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    def leave(status):
        raise SystemExit(status)

    def work(case):
        with case.attempt(case.rows["raises"]):
            raise ValueError("of its own")
        with case.attempt(case.rows["breaks"]):
            lost.append(True)

    monkeypatch.setattr(module, "synchronize", synchronize)
    monkeypatch.setattr(module.os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        stage.run("case", {}, ["raises", "breaks"], work)
    assert left.value.code == module.BROKEN
    assert "context is lost" in capsys.readouterr().out
    record = module.Record.read(file)
    assert record.why == "RuntimeError: an illegal memory access was encountered"
    assert row_of(record.current, "raises")["reason"] == "ValueError: of its own"


STAND_IN = """
    import os, signal, sys, time
    sys.path.insert(0, {benchmarks!r})
    from gpu_stage import Column, Stage

    def work(case):
        for row in case.standing():
            with case.attempt(row, 0.5):
                if (case.name, row.peer) == ("first", "killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if (case.name, row.peer) == ("second", "hangs"):
                    time.sleep(60)
                row.figures["value"] = 1.0

    stage = Stage("rates", [Column("value", "value")])
    for name in ("first", "second", "third"):
        stage.run(name, {{}}, ["killed", "hangs", "albert_fast"], work)
"""


@pytest.fixture
def gpu(script):
    return script("gpu")


def options(gpu, out, *arguments):
    return gpu.options_from([str(out), "--device", "cpu", *arguments])


def test_what_ends_a_process_is_left_out_and_the_rest_goes_on(gpu, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    stand_in = textwrap.dedent(STAND_IN.format(benchmarks=str(BENCHMARKS)))
    (tmp_path / "benchmarks" / "gpu_rates.py").write_text(stand_in)
    session = gpu.Run(options(gpu, tmp_path / "out", "--stages", "rates", "--commit", "abc"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert session.all({}, tmp_path) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["commit"] == "abc"
    stage = report["stages"]["rates"]
    assert stage["status"] == "done"
    first, second, third = stage["cases"]
    assert row_of(first, "killed")["reason"] == "the process ended by SIGKILL"
    assert row_of(second, "hangs")["reason"] == "it took too long"
    for case in stage["cases"]:
        assert row_of(case, OURS)["value"] == 1.0
    assert all(row["value"] == 1.0 for row in third["rows"])


def test_a_stage_that_never_ends_leaves_what_it_had(gpu, tmp_path, monkeypatch):
    record = {
        "stage": "rates",
        "cases": [{"name": "done", "work": {}, "reason": None, "rows": []}],
        "current": {"name": "endless", "work": {}, "reason": None, "rows": []},
        "peer": "x",
    }

    def run(command, seconds, environment, each):
        Path(command[command.index("--file") + 1]).write_text(json.dumps(record))
        each("a line")
        assert len(json.loads((tmp_path / "report.json").read_text())["stages"]["rates"]["cases"]) == 2
        return gpu.Ended(-9, seconds, True, ["last words"])

    monkeypatch.setattr(gpu, "run", run)
    session = gpu.Run(options(gpu, tmp_path, "--stages", "rates,loss", "--commit", "abc"))
    session.end = time.monotonic() + 20
    assert session.all({}, tmp_path) == 1
    stage = json.loads((tmp_path / "report.json").read_text())["stages"]["rates"]
    assert stage["status"] == "out of time"
    assert [case["reason"] for case in stage["cases"]] == [None, "the stage's time was over"]
    assert "last words" in (tmp_path / "summary.md").read_text()


def test_a_command_is_run_shown_and_timed(gpu, capsys):
    result = gpu.run(["sh", "-c", "echo hello; echo hidden; exit 3"], 30, {}, lambda line: line != "hidden")
    assert (result.status, result.tail, result.timed_out) == (3, ["hello", "hidden"], False)
    assert result.why() == "the process ended with status 3"
    shown = capsys.readouterr().out
    assert "\nhello\n" in shown
    assert "\nhidden\n" not in shown
    slow = gpu.run(["sleep", "30"], 1, {})
    assert slow.timed_out
    assert slow.status != 0
    assert slow.seconds < 10


# ----------------------------------------------------------------------------------------------------------- the report


def test_a_run_of_tests_and_a_stage(gpu, tmp_path, capsys):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        textwrap.dedent("""
        import os, pytest
        def test_good(): assert os.environ["ALBERT_FAST_TEST_DEVICE"] == "cpu"
        @pytest.mark.parametrize("word", ["of two"])
        def test_bad(word): assert word == "another"
        @pytest.mark.skip
        def test_skipped(): pass
        """)
    )
    out = tmp_path / "new" / "folder"
    arguments = [str(out), "--device", "cpu", "--stages", "parity,rates", "--only", "ceilings", "--tests", str(tests)]
    assert gpu.main(arguments) == 1
    report = json.loads((out / "report.json").read_text())
    assert report["versions"]["torch"] == torch.__version__
    parity, rates = report["stages"]["parity"], report["stages"]["rates"]
    assert parity["status"] == "failed"
    assert parity["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    (failure,) = parity["failures"]
    assert "test_bad[of two]" in failure
    assert "assert" in failure.lower()
    assert "test_good" in (out / "parity.log").read_text()
    assert rates["status"] == "done"
    assert [case["name"] for case in rates["cases"]] == ["ceilings"]
    assert all(target["met"] is None for target in report["targets"])
    summary = (out / "summary.md").read_text()
    assert "1 passed, 1 failed, 1 skipped" in summary
    assert "**ceilings**" in summary
    assert "not measured" in capsys.readouterr().out


def test_targets(script):
    module = script("gpu_report")
    cases = {
        "attention": [("bfloat16 32x512 12x64 full", OURS, {"forward_tflops": 321.0, "backward_tflops": 249.0})],
        "training": [
            ("base 32x512 full", f"{OURS} graphed", {"mfu": 0.46}),
            ("base 32x512 ragged", "transformers-compile", {"ratio": 9.9}),
        ],
        "loss": [("2458 of 16384 tokens labelled", OURS, {"microseconds": 219.0})],
        "resident": [
            ("what it rests on", "grid barrier", {"microseconds": 1.6}),
            ("16 tokens", OURS, {"microseconds": 120.0, "chained_microseconds": 99.0}),
        ],
    }
    stages = {
        name: {"cases": [{"name": case, "rows": [{"peer": peer, **row}]} for case, peer, row in rows]}
        for name, rows in cases.items()
    }
    report = {"tiny": False, "stages": stages}
    met = [target["met"] for target in module.judged(report)]
    assert met == [True, False, True, None, True, None, False, True, None, None]
    assert all(target["met"] is None for target in module.judged({**report, "tiny": True}))


def test_the_cases_of_the_targets_exist(script):
    """A renamed case would leave its target unmeasured for ever."""
    stages = ("attention", "loss", "training", "resident")
    attention, loss, training, resident = (script(f"gpu_{name}") for name in stages)
    tokens, labelled = loss.SIZES[2:]
    names = {
        "attention": {work.name for work in attention.works(tiny=False)},
        "loss": {f"{some} of {tokens} tokens labelled" for some in (labelled, tokens)},
        "training": {work.name for work in training.works(tiny=False)},
        "resident": {resident.PROBED, *map(resident.name_of, resident.BATCHES)},
    }
    for target in script("gpu_report").TARGETS:
        assert target.case in names[target.stage]
        assert target.peer in (OURS, resident.TRITON, *training.ALL, *training.GRAPHED, *resident.PROBES)


def test_clocks_are_read_where_there_is_nvidia_smi(gpu, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '345, 80.5, 30\\n1980, 600, 50\\n[N/A], 1, 2\\n1755, 500, 40\\n'\nsleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with gpu.Clocks() as clocks:
        time.sleep(0.5)
    assert clocks.seen()["clocks.sm"] == (345.0, 1755.0, 1980.0)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with gpu.Clocks() as clocks:
        pass
    assert clocks.seen() == {}


def test_sanitizers_run_tests_of_every_instance(gpu, tmp_path, monkeypatch):
    """A stand-in notes what it is called with, and finds an error with the second tool."""
    log = tmp_path / "log"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *racecheck*) exit 9;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    session = gpu.Run(options(gpu, tmp_path / "out", "--commit", "abc"))
    session.device = "cuda"
    stage = {"facts": {}, "tail": []}
    session.sanitizer(stage, 60, dict(os.environ))
    assert stage["facts"]["memcheck"] == "no errors"
    assert "9" in stage["facts"]["racecheck"]
    assert stage["status"] == "failed"
    assert gpu.SANITIZED in (gpu.ROOT / "csrc" / "cuda" / "resident_encoder.cu").read_text()
    for line, (name, which) in zip(log.read_text().splitlines(), gpu.SANITIZERS.items(), strict=True):
        assert f"--tool {name} --kernel-name kernel_substring={gpu.SANITIZED}" in line
        assert line.endswith(f"tests/test_cuda_backend.py -k {which}")
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_cuda_backend.py", "-k", which]
        tests = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=True).stdout
        for instance in ("any sizes-no clusters", "compiled sizes-clusters", "[1-compiled", "[2-compiled", "by_words"):
            assert instance in tests


def test_kernels_are_found_without_an_installation(gpu, tmp_path):
    """Nothing of an installation's: Python without site-packages' own hooks, from another folder."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path += {packages!r}; import albert_fast.kernels.launch as module; print(module.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}
    command = [sys.executable, "-S", "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()) == gpu.ROOT / "kernels" / "launch.py"


def test_a_stage_that_does_not_exist_is_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        options(gpu, tmp_path, "--stages", "parity,atention")
    assert "atention" in capsys.readouterr().err
