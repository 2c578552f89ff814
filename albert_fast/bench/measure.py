"""Times calls in turn: A B C A B C …, so that a machine whose speed drifts is as unfair to one as to another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` of them by name. Each was called once before, uncounted, for warm-up.

    Args:
        calls: what to time, by name.
        repeats: rounds; in each of them every call runs once.
        device: waited for before and after a call.
        progress: told the name of each call that is about to run, the warm-up's too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for counted in range(-1, repeats):
        for name, call in calls.items():
            progress(name)
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if counted >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)
