"""What early exits give: accuracy and time of a model by rule.

Rows that leave are taken out of the packed batch, so that the time is what is saved, on rows of any length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from albert_fast.finetuning.classification import Classification
from albert_fast.finetuning.config import ExitOptions
from albert_fast.finetuning.run import Pipeline
from albert_fast.finetuning.trainer import run_rows
from albert_fast.ops.checks import check

CONFIDENCES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
REPEATS = 5


def rules(passes: int) -> list[ExitOptions]:
    """All passes first, then each rule from the quickest to the surest."""
    return [
        ExitOptions(),
        *(ExitOptions(patience=number) for number in range(1, passes)),
        *(ExitOptions(confidence=share) for share in CONFIDENCES),
    ]


def curve(pipeline: Pipeline, paths: Sequence[str], *, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Of labelled files, for each rule: patience, confidence, the figures of `evaluate` (with the mean of the passes),
    seconds (the median of `repeats`, all rules in turn), and how much less that is than all passes need (speedup).

    Raises:
        ValueError: the model has no early exits.
        DataError: a file cannot be read.
    """
    task = pipeline.task
    check(
        isinstance(task, Classification) and task.early_exit,
        "the model has no early exits: train it with early_exit=true",
    )
    examples = task.read_all(paths)
    rows = task.rows(examples, labelled=True)
    tried = rules(pipeline.objective.model.config.num_hidden_layers)
    figures, seconds = [], []
    before = task.config
    try:
        for repeat in range(repeats + 1):  # the first is for caches and clocks
            taken = []
            for rule in tried:
                task.config = replace(before, exit=rule)
                start = time.perf_counter()
                outputs = run_rows(task, pipeline.objective, rows, pipeline.batch_rows, pipeline.world)
                taken.append(time.perf_counter() - start)
                if not repeat:
                    figures.append(task.metrics(examples, task.predictions(examples, rows, outputs)))
            if repeat:
                seconds.append(taken)
    finally:
        task.config = before
    medians = [statistics.median(each) for each in zip(*seconds, strict=True)]
    return [
        {**asdict(rule), **found, "seconds": median, "speedup": medians[0] / median}
        for rule, found, median in zip(tried, figures, medians, strict=True)
    ]
