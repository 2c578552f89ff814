"""The suites: their cases, what comes out of the command and of `pytest benchmarks`, on models that take no time."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from albert_fast import AlbertForMaskedLM, cli, flops
from albert_fast.bench import case as cases_module
from albert_fast.bench import rates, run, suites, worker
from albert_fast.bench.arguments import SUITES, Shape
from albert_fast.bench.case import Here, measured_memory, run_case
from albert_fast.bench.rates import Rates
from albert_fast.bench.report import markdown, print_report
from albert_fast.bench.suites import data, model, ops, scaling, tasks, train
from albert_fast.bench.suites.ops import operation_case
from albert_fast.bench.suites.setting import Setting, lengths_of, random_batch
from albert_fast.bench.work import Work

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 2100,
    "embedding_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}
SETTING = Setting(quick=True, changes=tuple(TINY.items()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(Setting, "turn", 0.0)
    monkeypatch.setattr(flops, "_CPU_SIZES", ((64, 64, 64),))
    monkeypatch.setattr(flops, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(rates, "_COPY_SECONDS", 0.0)


# --------------------------------------------------------------------------------------------------------------- cases


def test_the_options_name_every_suite():
    assert tuple(suites.SUITES) == SUITES


@pytest.mark.parametrize("thorough", [False, True], ids=["quick", "all"])
@pytest.mark.parametrize("suite", SUITES)
def test_cases_are_told_apart(suite, thorough):
    cases = suites.cases_of([suite], Setting(quick=not thorough))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert all(case.suite == suite and case.peers for case in cases)
    assert all("albert_fast" in case.peers for case in cases)
    assert len(cases) >= len(suites.cases_of([suite], Setting(quick=True)))


def test_only():
    cases = suites.cases_of(["all"], SETTING, "attention-training")
    assert {case.group for case in cases} == {"attention", "cross_attention"}
    with pytest.raises(ValueError, match="--only is 'abacus'"):
        suites.cases_of(["ops"], SETTING, "abacus")


def test_lengths():
    assert lengths_of(Shape(3, 50)) == [50, 50, 50]
    ragged = lengths_of(Shape(200, 100, ragged=True), 0.3)
    assert sum(ragged) / 20000 == pytest.approx(0.3, abs=0.03)
    assert len(set(ragged)) > 20
    assert all(3 <= length <= 100 for length in ragged)
    batch = random_batch(SETTING.config, Shape(8, 40, ragged=True), lengths_of(Shape(8, 40, ragged=True), 0.5))
    assert batch.lengths == batch.attention_mask.sum(1).tolist()
    assert batch.labelled > 0
    assert not (batch.labels != -100)[batch.attention_mask == 0].any()


def test_what_operations_need():
    """The loss: the product with the table at the labelled tokens alone; backward is twice forward."""
    works = {
        mode: operation_case("masked_lm_loss", SETTING.config, Shape(4, 32), mode, labelled=0.25).work()
        for mode in ("inference", "training")
    }
    assert works["inference"].labelled == 32
    assert works["inference"].gflop == pytest.approx(2 * 32 * 8 * 2100 / 1e9)
    assert works["training"].gflop == pytest.approx(3 * works["inference"].gflop)
    work = operation_case("attention", SETTING.config, Shape(4, 32), "inference", "bfloat16").work()
    assert work.attention_gflop == work.gflop == pytest.approx(4 * 4 * 32**2 * 32 / 1e9)
    assert work.megabytes == pytest.approx(4 * 128 * 32 * 2 / 1e6)


@pytest.mark.parametrize(
    "case",
    [
        data.tokenizer_case(SETTING),
        data.masking_case(SETTING, Shape(8, 64)),
        data.packing_case(SETTING, Shape(5, 64, ragged=True)),
        data.packing_case(SETTING, Shape(3, 64)),
        tasks.task_case(SETTING, "training", 6),
        tasks.task_case(SETTING, "inference", 20),
        next(case for case in scaling.cases(SETTING) if case.varied == {"fill": 0.25}),
        next(case for case in scaling.cases(SETTING) if case.varied == {"labelled": 0.6}),
    ],
    ids=lambda case: case.name,
)
def test_every_peer_is_right(case):
    if "transformers" in "".join(case.peers):
        pytest.importorskip("transformers")
    work = run_case(case, 1)
    for row in work.rows:
        assert row.passed or row.reason.startswith("it has cuda"), f"{row.peer}: {row.reason}"
        assert (row.milliseconds is not None) is bool(row.passed)
    assert work.tokens > 0
    assert "made" not in vars(case)
    assert "subject" not in vars(case), "what it computed on is forgotten"


@pytest.mark.parametrize("suite", ["data", "tasks"])
def test_wrong_numbers_are_found(suite, monkeypatch):
    """Each result is changed a little, and each change is wrong."""
    made = (data.packing_case(SETTING, Shape(4, 64)), data.masking_case(SETTING, Shape(8, 64)))
    cases = made if suite == "data" else (tasks.task_case(SETTING, "training", 4),)
    for case in cases:
        right = case.open("albert_fast").results()
        error, limit = case.judge("albert_fast", right)
        assert error <= limit
        for name, tensor in right.items():
            changed = tensor.clone()
            if changed.is_floating_point():
                changed.view(-1)[0] += 1e-2 + 0.3 * changed.view(-1)[0].abs() + (0.1 if name == "share" else 0.0)
            else:
                changed.view(-1)[1] += 1
            error, limit = case.judge("albert_fast", {**right, name: changed})
            assert error > limit, f"{case.name}: {name}"
        case.release()


def test_steps_are_held_against_float64():
    case = train.step_case(SETTING, Shape(4, 32))
    assert len(case.expected) == 2
    losses = torch.tensor(case.expected, dtype=torch.float64)
    assert case.judge("albert_fast", {"losses": losses})[0] == 0.0
    for wrong in ([1 + 2e-4, 1.0], [1.0, 1 + 2e-3], [float("nan"), 1.0], [1.0, float("nan")]):
        error, limit = case.judge("albert_fast", {"losses": losses * torch.tensor(wrong, dtype=torch.float64)})
        assert error > limit, wrong
    error, limit = case.judge("albert_fast", {"losses": losses * torch.tensor([1.0, 1 + 5e-4], dtype=torch.float64)})
    assert error <= limit


def test_the_loop_takes_those_steps():
    """In its process."""
    case = train.step_case(SETTING, Shape(4, 32))
    contender = case.open("albert_fast")
    try:
        error, limit = case.judge("albert_fast", contender.results())
    finally:
        contender.close()
    assert 0.0 < error <= limit


# ----------------------------------------------------------------------------------------------- memory, threads, rates


def test_memory_of_a_call():
    size = 1 << 26
    kept = []
    contender = Here(lambda: {"output": torch.ones(size // 4)}, lambda: kept.append(1))
    assert contender.peak_bytes() is None
    for _ in range(2):
        contender.results()
        if contender.peak_bytes() is None:
            pytest.skip("this system does not tell")
        assert 0.9 * size < contender.peak_bytes() < 1.5 * size
    with measured_memory(CPU) as taken:
        pass
    assert taken[0] < 1 << 22


def test_a_case_has_its_own_threads(monkeypatch):
    before = torch.get_num_threads()
    seen = []
    case = operation_case("bias_gelu", SETTING.config, Shape(1, 8), "inference", threads=before + 1, turn=0.0)
    monkeypatch.setattr(cases_module, "examine", lambda case, row, contender: seen.append(torch.get_num_threads()))
    run_case(case, 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_floors(monkeypatch):
    """The longer of computing and moving, at the best rates that were seen."""
    seen = iter([2e9, 1e9, 4e9])
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype, device: next(seen))
    monkeypatch.setattr(rates, "copy_rate", lambda size, device: 1e9)
    found = Rates(CPU)

    def work(gflop, megabytes):
        return Work("inference", "float32", "1x1", 1, 1.0, 0, gflop, 0.0, None, [], megabytes=megabytes)

    found.probe(work(1.0, 0.0))
    found.probe(work(1.0, 0.0))  # known
    assert found.floor_milliseconds(work(1.0, 0.0)) == pytest.approx(500.0)
    for _ in range(2):
        found.probe(work(1.0, 3.0), again=True)
    assert found.floor_milliseconds(work(1.0, 3.0)) == pytest.approx(250.0)
    assert found.floor_milliseconds(work(0.001, 3.0)) == pytest.approx(3.0)
    assert found.floor_milliseconds(work(0.0, 0.0)) is None


# --------------------------------------------------------------------------------------------------------- the command


class InThisProcess:
    """Stands in for a worker, whose process takes seconds to start."""

    def __init__(self, peer, config, state_dict, batch, mode, dtype):
        case = model.ModelCase(
            suite="",
            group="",
            mode=mode,
            dtype=dtype,
            shape="",
            peers=(peer,),
            make=lambda: model.Subject(config, state_dict, batch),
            here=True,
            turn=0.0,
        )
        contender = case.open(peer)
        self.results, self.seconds, self.peak_bytes = contender.results, contender.seconds, contender.peak_bytes

    def close(self):
        pass


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "Setting", functools.partial(Setting, changes=SETTING.changes))
    monkeypatch.setattr(model, "Worker", InThisProcess)
    few = {name: points[:2] for name, points in scaling._QUICK.items()}
    monkeypatch.setattr(scaling, "_QUICK", few)
    monkeypatch.setattr(ops, "OPERATIONS", {name: ops.OPERATIONS[name] for name in ("attention", "bias_gelu")})
    three = ("albert_fast", "reference", "transformers-sdpa")
    monkeypatch.setattr(model, "PEERS", {name: model.PEERS[name] for name in three})
    file = tmp_path / "report.json"
    arguments = ["--suite", "ops,model,scaling", "--quick", "--only", "inference", "--repeats", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert cli.main(["bench", *arguments, "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    works = report["works"]
    assert {work["suite"] for work in works} == {"ops", "model", "scaling"}
    assert {work["group"] for work in works if work["suite"] == "ops"} == {"attention", "bias_gelu"}
    varied = {name for work in works if work["suite"] == "scaling" for name in work["varied"]}
    assert varied == {"length", "rows", "fill", "passes", "threads"}
    for work in works:
        ours = work["rows"][0]
        assert ours["peer"] == "albert_fast"
        assert ours["passed"], ours["reason"]
        assert (ours["speedup"], len(ours["all_milliseconds"])) == (1.0, 2)
        assert work["floor_milliseconds"] > 0.0
        assert ours["times_floor"] == pytest.approx(ours["milliseconds"] / work["floor_milliseconds"])
    assert f"ops 1/{len(works)}: attention-inference-float32-4x128: albert_fast " in printed
    assert f"{len(works)}/{len(works)}: " in printed
    assert "flash-attn, attention float32 inference 4x128 and" in printed
    assert printed.count("it has cuda, not cpu") <= 6, "one line for each peer"
    assert len(markdown(report).splitlines()) > len(works)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "abacus"], "--suite has 'abacus'; ops, model"),
        (["--suite", "ops", "--shapes", "1x8"], "--suite and --shapes"),
        (["--suite", "ops", "--mode", "training"], "--suite and --mode"),
        (["--suite", "ops", "--compare", "reference"], "--suite and --compare"),
        (["--suite", "ops", "--pretrain"], "--suite and --pretrain"),
        (["--quick"], "--quick and --only are of --suite"),
        (["--suite", "data", "--only", "attention"], "--only is 'attention'"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_this_packages_error_fails_the_command(monkeypatch):
    """And has no figure."""
    monkeypatch.setattr(run, "Setting", functools.partial(Setting, changes=SETTING.changes))
    monkeypatch.setattr("albert_fast.bench.parity.LARGEST", {("inference", "float32"): 1e-12})
    monkeypatch.setattr(run, "options_from", lambda args: args)
    options = run.Options(suites=("ops",), quick=True, only="bias_gelu-inference", repeats=1)
    assert run.main(options) == 1
    report = run.run_suites(options, Console(quiet=True))
    assert {row["passed"] for work in report["works"] for row in work["rows"]} == {False}
    console = Console(record=True, width=120)
    print_report(report, console)
    assert "WRONG" in console.export_text()


# ---------------------------------------------------------------------------------------------------- pytest benchmarks


def pytest_benchmarks(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-p", "no:cacheprovider", *arguments]
    # What a worker of pytest-xdist finds there switches pytest-benchmark off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)


def test_pytest_benchmarks(request, tmp_path):
    pytest.importorskip("pytest_benchmark")
    file, peer = tmp_path / "benchmark.json", tmp_path / "my_peer.py"
    peer.write_text(
        "from albert_fast.bench.peers import OperationPeer\n"
        "class Mine(OperationPeer):\n"
        "    name = 'mine'\n"
        "    def dropout_add_layer_norm(self, x, bias, residual, weight, ln_bias, eps):\n"
        "        return x\n"
    )
    chosen = "test_ops and dropout_add_layer_norm-inference-float32-4x128"
    done = pytest_benchmarks(request.config.rootpath, "-k", chosen, "--peer", str(peer), f"--benchmark-json={file}")
    assert "mine: wrong: its error is" in done.stdout, done.stdout + done.stderr
    assert "liger: it has cuda, not cpu" in done.stdout
    assert "1 failed, 3 passed, 1 skipped" in done.stdout
    benchmarks = {each["params"]["peer"]: each for each in json.loads(file.read_text())["benchmarks"]}
    assert benchmarks.keys() == {"albert_fast", "reference", "pytorch"}
    for each in benchmarks.values():
        assert each["params"]["case"] == "dropout_add_layer_norm-inference-float32-4x128"
        assert each["group"] == "ops dropout_add_layer_norm-inference-float32-4x128"
        assert each["extra_info"]["tokens"] == 512
        assert 0.0 < each["extra_info"]["error"] <= each["extra_info"]["limit"]
        assert each["extra_info"]["floor_milliseconds"] > 0.0
        assert each["stats"]["median"] > 0.0


def test_the_tests_and_the_benchmarks_keep_apart(request):
    """`make test` takes tests/ alone, and `pytest benchmarks` no script for GPUs."""
    assert request.config.getini("testpaths") == ["tests"]
    done = pytest_benchmarks(request.config.rootpath, "--collect-only", "-q")
    files = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {Path(file).name for file in files} == {f"test_{suite}.py" for suite in SUITES}, done.stdout + done.stderr


def test_worker_is_what_the_suites_start():
    """A process by itself, once: what `InThisProcess` stands in for."""
    config = SETTING.config
    subject = model.Subject(
        config, AlbertForMaskedLM(config).state_dict(), random_batch(config, Shape(2, 16), [16, 16])
    )
    case = model.model_case(SETTING, "model", Shape(2, 16), "inference", "float32")
    case.__dict__["subject"] = subject
    contender = case.open("albert_fast")
    try:
        assert isinstance(contender, worker.Worker)
        error, limit = case.judge("albert_fast", contender.results())
        assert error <= limit
    finally:
        contender.close()
