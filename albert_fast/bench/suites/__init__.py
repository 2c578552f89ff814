"""The suites of cases, by name: what `albert-fast bench --suite` and `pytest benchmarks` run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from albert_fast.bench.case import Case
from albert_fast.bench.suites import data, model, ops, scaling, tasks, train
from albert_fast.bench.suites.setting import Setting

SUITES: dict[str, Callable[[Setting], list[Case]]] = {
    "ops": ops.cases,
    "model": model.cases,
    "train": train.cases,
    "data": data.cases,
    "tasks": tasks.cases,
    "scaling": scaling.cases,
}


def cases_of(names: Sequence[str], setting: Setting, only: str = "") -> list[Case]:
    """The cases of these suites ("all": of every one) whose name has `only` in it.

    Raises:
        ValueError: none has.
    """
    chosen = tuple(SUITES) if "all" in names else names
    cases = [case for name in chosen for case in SUITES[name](setting) if only in case.name]
    if not cases:
        raise ValueError(f"--only is {only!r}, and no case of {', '.join(chosen)} has that in its name")
    return cases
