"""The cases of `albert_fast.bench.suites` as tests of pytest-benchmark: parity first, and who is wrong fails.

    pytest benchmarks [--quick] [--peer my_peer.py] [-k "attention and training"] [--benchmark-json FILE]

A file here is a suite. Its tests are one a case and peer: both names are parameters, the case's title is the group, and
`extra_info` has what the work was, the error and its limit, the floor and the memory.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import pytest
import torch

from albert_fast.bench import peers
from albert_fast.bench.case import Case, examine
from albert_fast.bench.rates import Rates
from albert_fast.bench.suites import SUITES
from albert_fast.bench.suites.setting import Setting
from albert_fast.bench.work import Row
from albert_fast.bench.worker import with_threads


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("albert_fast")
    group.addoption("--quick", action="store_true", help="fewer and smaller cases")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--peer", action="append", default=[], metavar="FILE", help="a file with one class of Peer")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SETTING] = Setting(config.getoption("--quick"), torch.device(config.getoption("--device")))
    try:
        peers.add_installed()
        for plug_in in config.getoption("--peer"):
            peers.add(plug_in)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


_SETTING = pytest.StashKey[Setting]()
_cases: dict[str, dict[str, Case]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = metafunc.module.__name__.removeprefix("test_")
    if suite not in _cases:
        _cases[suite] = {case.name: case for case in SUITES[suite](metafunc.config.stash[_SETTING])}
    pairs = [(name, peer) for name, case in _cases[suite].items() for peer in case.peers]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{name}-{peer}" for name, peer in pairs])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        for item in items:
            item.add_marker(pytest.mark.benchmark(max_time=0.1, min_rounds=3))


class Current:
    """The case whose tests are running: its inputs and oracle serve every peer of it, and then make room."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.rates: Rates | None = None

    def enter(self, case: Case) -> Case:
        if self.case is not None and self.case is not case:
            self.case.release()
        self.case = case
        return case

    def about(self, case: Case) -> dict[str, Any]:
        """The work with its floor."""
        self.rates = self.rates or Rates(case.device)
        work = case.work()
        self.rates.probe(work)
        work.floor_milliseconds = self.rates.floor_milliseconds(work)
        return {key: value for key, value in asdict(work).items() if key != "rows"}


@pytest.fixture(scope="session")
def current() -> Current:
    return Current()


@pytest.fixture
def measure(benchmark: Any, current: Current, request: pytest.FixtureRequest, case: str, peer: str) -> Any:
    """Checks a peer at a case, and times it."""

    def run() -> None:
        chosen = current.enter(_cases[request.module.__name__.removeprefix("test_")][case])
        reason = chosen.refuses(peer)
        if reason is not None:
            pytest.skip(f"{peer}: {reason}")
        row = Row(peer)
        with with_threads(chosen.threads), contextlib.closing(chosen.open(peer)) as contender:
            examine(chosen, row, contender)
            benchmark.group = " ".join(filter(None, (chosen.suite, case)))
            about = {**current.about(chosen), "error": row.error, "limit": row.limit}
            benchmark.extra_info.update(about)
            if not row.passed:
                pytest.fail(f"{peer}: {row.reason}", pytrace=False)
            benchmark(contender.call)
            benchmark.extra_info["peak_bytes"] = contender.peak_bytes()

    return run
