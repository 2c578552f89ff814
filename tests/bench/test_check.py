"""`make bench-check`: unchanged code passes, a delay of a fifth in one operation does not."""

import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from albert_fast import backends
from albert_fast.bench import check
from albert_fast.bench.check import BAND, TURNS, Finding
from albert_fast.bench.worker import with_threads


@pytest.fixture(scope="module")
def chosen():
    if check.backends.CPU.unavailable() is not None or check.native.load() is not None:
        pytest.skip("no CPU kernels here")
    wanted = ("attention-inference", "masked_lm_loss-inference", "model-inference")
    return [case for case in check.cases() if case.name.startswith(wanted)]


def replaced(name: str, change) -> list[backends.Backend]:
    """The backends, with `change` of the `cpu` one's implementation of `name` in its place."""

    def load():
        functions = dict(backends.CPU.load())
        return {**functions, name: change(functions[name])}

    return [replace(backends.CPU, load=load), *(b for b in backends.BACKENDS if b is not backends.CPU)]


def share_of(name: str, case, monkeypatch) -> float:
    """Of a call's time, that of the implementation of `name`: medians of the same calls."""
    inside: list[float] = []

    def timed(function):
        def run(*arguments):
            begin = time.perf_counter()
            result = function(*arguments)
            inside.append(time.perf_counter() - begin)
            return result

        return run

    with with_threads(case.threads), monkeypatch.context() as patched:
        patched.setattr(backends, "BACKENDS", replaced(name, timed))
        contender = case.open(check.OURS)
        contender.results()
        inside.clear()
        calls = []
        for _ in range(200):
            begin = time.perf_counter()
            contender.call()
            calls.append(time.perf_counter() - begin)
    assert len(inside) == len(calls)
    return statistics.median(inside) / statistics.median(calls)


def delayed(name: str, share: float) -> list[backends.Backend]:
    """`name` takes longer by that share of what it takes, whatever the processor's clock is then."""

    def slow(function):
        def run(*arguments):
            begin = time.perf_counter()
            result = function(*arguments)
            end = time.perf_counter()
            end += share * (end - begin)
            while time.perf_counter() < end:  # time.sleep would sleep for longer
                pass
            return result

        return run

    return replaced(name, slow)


class Machine:
    """A machine that others use, too, by a clock of its own, which a call of an operation moves on.

    Its noise is of the kinds that are seen on real ones: others slow the two down at the same time, but not alike; the
    processor's clock drifts; who is interrupted waits for a slice of time; and where tensors lie matters for as long as
    they do.
    """

    SECONDS: ClassVar = {check.OURS: 1.2e-3, check.THEIRS: 1.5e-3}  # of an operation that nobody disturbs
    SLICE = 4e-3
    PLACES = (1.0, 1.14, 0.98)  # how long this package takes with the tensors of a case's first measurement, second, …

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.now, self.place = rng, 0.0, 1.0
        self.phase_ends, self.slowed = 0.0, dict.fromkeys(self.SECONDS, 1.0)
        self.measured: Counter[str] = Counter()

    def perf_counter(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        """The time of work that would take so long if nobody disturbed it."""
        self.now += seconds * (1.0 + 0.1 * math.sin(self.now))
        if self.rng.random() < 0.2:
            self.now += self.SLICE
        if self.now >= self.phase_ends:
            self.phase_ends = self.now + self.rng.exponential(0.02)
            disturbed = self.rng.random() < 0.3
            self.slowed = {peer: 1.0 + disturbed * self.rng.uniform(0.0, 0.6) for peer in self.SECONDS}

    def serves(self, backend: backends.Backend, peer: str, longer: Mapping[str, float]) -> backends.Backend:
        """The backend on this machine; some of its operations take longer by a share of their time."""

        def timed(name: str, function):
            def run(*arguments):
                result = function(*arguments)
                share = self.slowed[peer] * (self.place if peer == check.OURS else 1.0)
                self.passes(self.SECONDS[peer] * share * (1.0 + longer.get(name, 0.0)))
                return result

            return run

        return replace(backend, load=lambda: {name: timed(name, f) for name, f in backend.load().items()})

    def install(self, patched: pytest.MonkeyPatch, **longer: float) -> None:
        attempt = check.attempt

        def attempted(case, turns):
            self.place = self.PLACES[self.measured[case.name] % len(self.PLACES)]
            self.measured[case.name] += 1
            return attempt(case, turns)

        served = [self.serves(backends.CPU, check.OURS, longer), self.serves(backends.REFERENCE, check.THEIRS, {})]
        patched.setattr(check, "attempt", attempted)
        patched.setattr(check, "time", self)
        patched.setattr(backends, "BACKENDS", served)


def test_unchanged_code_passes_twice_and_a_delay_of_a_fifth_does_not(chosen, monkeypatch, rng):
    """The operations that are called are the real ones, the clock is not: on a shared machine, noise has no bound."""
    machine = Machine(rng)
    with monkeypatch.context() as patched:
        machine.install(patched)
        expected = check.measure(chosen, TURNS)
        assert expected.keys() == {case.name for case in chosen}
        for _ in range(2):
            assert not [finding for finding in check.check(chosen, expected, TURNS) if finding.failed]
    with monkeypatch.context() as patched:
        machine.install(patched, attention=0.2)
        failed = [finding for finding in check.check(chosen, expected, TURNS) if finding.failed]
    assert [finding.case for finding in failed] == [chosen[0].name]
    assert len(failed[0].ratios) == check.ATTEMPTS


@pytest.mark.alone
def test_the_time_is_the_real_one(chosen, monkeypatch, unpoisoned_memory):
    """An operation that takes four times as long makes its case fail, whatever else the machine does meanwhile."""
    (case,) = (case for case in chosen if case.group == "attention")
    expected = check.measure([case], TURNS)
    assert 0.01 < expected[case.name] < 100.0
    monkeypatch.setattr(backends, "BACKENDS", delayed("attention", 3.0))
    (finding,) = check.check([case], expected, TURNS)
    assert finding.failed
    assert len(finding.ratios) == check.ATTEMPTS


@pytest.mark.slow
def test_on_a_quiet_machine(chosen, monkeypatch, unpoisoned_memory):
    """The same by the real clock, with nothing else running: unchanged code passes, a delay of a fifth does not."""
    expected = check.measure(chosen, TURNS)
    for _ in range(2):
        assert not [finding for finding in check.check(chosen, expected, TURNS) if finding.failed]
    monkeypatch.setattr(backends, "BACKENDS", delayed("attention", 0.2 / share_of("attention", chosen[0], monkeypatch)))
    failed = [finding for finding in check.check(chosen, expected, TURNS) if finding.failed]
    assert [finding.case for finding in failed] == [chosen[0].name]


def test_who_is_wrong_fails_whatever_the_ratio(chosen, monkeypatch):
    def broken():
        functions = dict(backends.CPU.load())
        right = functions["masked_lm_loss"]

        def wrong(*arguments):
            losses, loss, *others = right(*arguments)
            return losses, loss * 1.01, *others

        return {**functions, "masked_lm_loss": wrong}

    monkeypatch.setattr(backends, "BACKENDS", [replace(backends.CPU, load=broken), backends.REFERENCE])
    (case,) = (case for case in chosen if case.group == "masked_lm_loss")
    (finding,) = check.check([case], {case.name: 1e9}, 1)
    assert finding.failed
    assert "wrong" in finding.wrong
    with pytest.raises(check.WrongError, match="wrong"):
        check.measure([case], 1)


def test_only_what_is_slower_each_time_is_a_regression(chosen, monkeypatch):
    slow, fast = 1.0 + 1.5 * BAND, 1.0 + 0.5 * BAND
    ratios = iter([slow, slow, 1.0, slow, fast, slow])
    monkeypatch.setattr(check, "attempt", lambda case, turns: next(ratios))
    named = {case.name: 1.0 for case in chosen}
    findings = check.check(chosen, named)
    assert [finding.ratios for finding in findings] == [(slow, slow, slow), (slow, fast), (1.0,)]
    assert [finding.failed for finding in findings] == [True, False, False]
    assert findings[0].change == pytest.approx(1.5 * BAND)


def test_a_case_that_nobody_has_committed_is_no_regression():
    finding = Finding("new", (5.0,), None)
    assert finding.change is None
    assert not finding.failed


def test_the_command(chosen, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "cases", lambda: chosen)
    ratios = iter([0.5] * (3 * len(chosen)))
    monkeypatch.setattr(check, "attempt", lambda case, turns: next(ratios))
    file = tmp_path / "ratios.json"
    arguments = ["--expected", str(file)]
    file.write_text(json.dumps({"avx9 on an abacus": {"ratios": {}}}))
    assert check.main(arguments) == 2
    said = capsys.readouterr().err
    assert "no ratios of this kind of machine" in said
    assert "avx9 on an abacus" in said
    assert "--write" in said
    assert check.main([*arguments, "--write"]) == 0
    kind = check.kind_of_machine()
    written = json.loads(file.read_text())
    assert written.keys() == {"avx9 on an abacus", kind}
    assert written[kind]["ratios"] == {case.name: 0.5 for case in chosen}
    for ratio, status, says in ((0.5, 0, "none slower"), (0.57, 1, "3 of 3 cases failed"), (0.3, 0, "none slower")):
        monkeypatch.setattr(check, "attempt", lambda case, turns, ratio=ratio: ratio)
        assert check.main(arguments) == status
        assert says in capsys.readouterr().out
    assert check.main([*arguments, "--only", "nothing"]) == 2
    assert "--only is 'nothing'" in capsys.readouterr().err


def test_a_file_that_cannot_be_right_is_one_line_before_anything_is_measured(chosen, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "cases", lambda: chosen)
    monkeypatch.setattr(check, "attempt", lambda case, turns: pytest.fail("measured"))
    file = tmp_path / "ratios.json"

    def says(*arguments: str) -> str:
        assert check.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    nowhere = str(tmp_path / "no" / "ratios.json")
    assert f"--expected is '{nowhere}'; a file in a directory that exists" in says("--write", "--expected", nowhere)
    for damaged, message in (("{", "which is damaged (Expecting"), ("[]", "no ratios"), ('{"avx9": 0}', "no ratios")):
        file.write_text(damaged)
        for write in ([], ["--write"]):
            said = says(*write, "--expected", str(file))
            assert f"--expected is '{file}'" in said
            assert message in said

    def unreadable(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(check, "_read", unreadable)
    assert f"Permission denied: '{file}'" in says("--expected", str(file))


def test_the_committed_ratios_are_of_these_cases(request):
    """A case that is renamed, or added, is not forgotten there."""
    file = request.config.rootpath / check.EXPECTED
    names = {case.name for case in check.cases()}
    for kind, known in json.loads(file.read_text()).items():
        assert known["ratios"].keys() == names, kind
