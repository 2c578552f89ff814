"""A pytest plugin: puts this package into transformers by one of its doors, and counts who served.

    none          transformers as it is
    accelerate    its models, each passed through `albert_fast.hf.accelerate` at the end of its construction
    classes       the classes of the same names in `albert_fast.hf` in their places
    attention     its models with attn_implementation="albert_fast" where they would be built with "sdpa"

A suite that passes because every call fell back to transformers would prove nothing: without one call by the fast path
a run fails. Calls inside of a compiled or exported graph are not counted.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HEADS = (
    "AlbertForPreTraining",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertForQuestionAnswering",
    "AlbertForMultipleChoice",
)
CLASSES = ("AlbertModel", *HEADS)

calls: Counter[str] = Counter()


def counted(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls[kind] += 1
        return function(*args, **kwargs)

    return call


def _count_encoders() -> None:
    from albert_fast.hf.encoder import AlbertTransformer

    AlbertTransformer.forward = counted(AlbertTransformer.forward, "all")
    AlbertTransformer._run = counted(AlbertTransformer._run, "fast")


def accelerate() -> None:
    """transformers calls post_init last in every constructor, so this is what a user's own call would find."""
    from transformers.models.albert import modeling_albert

    from albert_fast import hf

    _count_encoders()
    stock, encoder = modeling_albert.AlbertPreTrainedModel.post_init, modeling_albert.AlbertTransformer

    @functools.wraps(stock)
    def post_init(self: Any) -> None:
        stock(self)
        if any(isinstance(module, encoder) for module in self.modules()):
            hf.accelerate(self)

    modeling_albert.AlbertPreTrainedModel.post_init = post_init


def classes() -> None:
    """Every place where one looks the classes up: heads build their AlbertModel from the first, Auto classes from the
    second, tests import from the third."""
    from albert_fast import hf

    missing = [name for name in CLASSES if not hasattr(hf, name)]
    if missing:
        raise pytest.UsageError(f"albert_fast.hf has no {', '.join(missing)}, which the door 'classes' expects")
    _count_encoders()
    for place in ("transformers.models.albert.modeling_albert", "transformers.models.albert", "transformers"):
        module = importlib.import_module(place)
        for name in CLASSES:
            setattr(module, name, getattr(hf, name))


def attention() -> None:
    """Where models are built with "sdpa", by default or by name; `set_attn_implementation` sets what it is told."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.albert import modeling_albert

    import albert_fast.hf  # noqa: F401  (registers the name)

    if "albert_fast" not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise pytest.UsageError("AttentionInterface has no 'albert_fast', which the door 'attention' expects")
    AttentionInterface.register("albert_fast", counted(ALL_ATTENTION_FUNCTIONS["albert_fast"], "fast"))
    modeling_albert.AlbertAttention.forward = counted(modeling_albert.AlbertAttention.forward, "all")
    stock = modeling_albert.AlbertPreTrainedModel.get_correct_attn_implementation

    @functools.wraps(stock)
    def chosen(self: Any, requested: str | None, is_init_check: bool = False) -> str:
        found = stock(self, requested, is_init_check)
        return "albert_fast" if found == "sdpa" and is_init_check else found

    modeling_albert.AlbertPreTrainedModel.get_correct_attn_implementation = chosen


DOORS: dict[str, Callable[[], None] | None] = {
    "none": None,
    "accelerate": accelerate,
    "classes": classes,
    "attention": attention,
}


def sizes_of(head_size: int) -> dict[str, int]:
    """A model with two heads of that size."""
    return {
        "hidden_size": 2 * head_size,
        "num_attention_heads": 2,
        "embedding_size": head_size,
        "intermediate_size": 4 * head_size,
    }


def resize(tester: type, sizes: dict[str, int]) -> None:
    """Overrides what the tester's constructor has set, of which it builds its configurations."""
    stock = tester.__init__

    @functools.wraps(stock)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        unknown = [name for name in sizes if not hasattr(self, name)]
        if unknown:
            raise AttributeError(f"{tester.__name__} has no {', '.join(unknown)}, which --head-size expects")
        vars(self).update(sizes)

    tester.__init__ = built


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("doors")
    group.addoption("--door", choices=list(DOORS), default="none")
    group.addoption("--head-size", type=int, help="of every AlbertModelTester among the tests")
    group.addoption("--outcomes", type=Path, help="a JSON file to write: outcomes by test, and the counts")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(), "outcomes")
    # Before any test is imported: they take the classes by name.
    if (install := DOORS[config.getoption("--door")]) is not None:
        install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    head_size = config.getoption("--head-size")
    if head_size is None:
        return
    modules = {item.module for item in items if isinstance(item, pytest.Function)}
    testers = {tester for module in modules if (tester := getattr(module, "AlbertModelTester", None)) is not None}
    if items and not testers:
        raise pytest.UsageError("--head-size expects a class AlbertModelTester among the tests; there is none")
    for tester in testers:
        resize(tester, sizes_of(head_size))


class Outcomes:
    """Of each test: failed if any of its phases or subtests failed, else skipped or passed."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.subtests: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        subtest = isinstance(report, getattr(pytest, "SubtestReport", ()))  # since pytest 9
        if subtest:
            self.subtests[report.outcome] += 1
        if report.failed or (not subtest and report.nodeid not in self.tests):
            self.tests[report.nodeid] = report.outcome
        elif report.skipped and not subtest and self.tests[report.nodeid] == "passed":
            self.tests[report.nodeid] = "skipped"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config = session.config
        if config.getoption("--door") != "none" and not calls["fast"] and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if (path := config.getoption("--outcomes")) is not None:
            found = {"tests": self.tests, "subtests": dict(self.subtests), "fast": calls["fast"], "own": _own()}
            path.write_text(json.dumps(found, indent=1))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        door = config.getoption("--door")
        if door != "none":
            verdict = "" if calls["fast"] else "; at least one by the fast path was expected"
            counts = f"fast path: {calls['fast']} calls, transformers' own: {_own()}"
            terminalreporter.write_line(f"door {door}: {counts}{verdict}")


def _own() -> int:
    return calls["all"] - calls["fast"]
