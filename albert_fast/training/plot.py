"""`albert-fast plot RUN…`: the curves of runs side by side, as a picture."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from albert_fast.ops.checks import check
from albert_fast.training.tracking import FIGURES, read

Records = list[dict[str, Any]]

AXES = ("step", "seconds", "tokens")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#b8a800")  # Okabe and Ito's
EVENTS = ("rollback", "collapse", "not_finite", "plateau")


SHARES = "correct"  # the unit of accuracies
ERRORS = "errors"  # and of error rates
START = 0.03  # of a run: what falls from a random model's loss there would leave no room for the rest


@dataclass(frozen=True)
class Panel:
    """One figure over the course of the run.

    Attributes:
        title, unit: above it, and beside its axis.
        key: of the records.
        level: dashed, to hold it against: a key of the records, or a number.
        exact: known without noise, and not smoothed.
        zero: its axis begins at 0.
    """

    title: str
    unit: str
    key: str
    level: str | float | None = None
    exact: bool = False
    zero: bool = False


PRETRAINING = (
    Panel("Masked-LM loss", "nats", "masked_lm_loss", level="unigram_loss"),
    Panel("Below the unigram model", "nats", "below_unigram", level=0.0),
    Panel("Masked-token accuracy", SHARES, "masked_accuracy"),
    Panel("Sentence-order accuracy", SHARES, "sentence_order_accuracy", level=0.5),
    Panel("Learning rate", "", "learning_rate", exact=True, zero=True),
    Panel("Speed", "tokens/s", "tokens_per_second", zero=True),
)

NAMES = {"wer": "WER", "cer": "CER", "bleu": "BLEU", "chrf": "chrF"}  # where a key's first letter is not all
MEASURED = 3  # figures of a task that have a panel


def panels_of(records: Records) -> tuple[Panel, ...]:
    """Those of pretraining; for a task: the loss, and the first of FIGURES."""
    if any("masked_lm_loss" in record for record in records):
        return PRETRAINING
    about = {"kind", "step", "seconds", "tokens", "weights"}
    keys = dict.fromkeys(key for r in records if r["kind"] == "evaluation" for key in r if key not in about)
    rank = {key: number for number, key in enumerate(FIGURES)}
    measured = []
    for key in sorted(keys, key=lambda key: rank.get(key, len(rank)))[:MEASURED]:
        values = [abs(r[key]) for r in records if r.get(key) is not None]
        unit = ERRORS if key in ("wer", "cer") else SHARES if max(values, default=0.0) <= 1 else ""
        unit = "" if key == "mean_squared_error" else unit
        measured.append(Panel(NAMES.get(key, key.replace("_", " ").capitalize()), unit, key))
    return (Panel("Loss", "nats", "loss"), *measured, *PRETRAINING[-2:])


def plot(
    runs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    x: str = "tokens",
    smoothing: float = 0.02,
) -> None:
    """Draws the runs' records: training thin, and smoothed; held-out text as points; the unigram model's loss dashed.

    Args:
        runs: directories.
        output: the file to write, .png or another one that matplotlib knows; a reader finds the old one or the new one.
        x: step, seconds or tokens.
        smoothing: the share of a run's records that a point of its smoothed curve is the mean of; 0 for none.

    Raises:
        ValueError: matplotlib is missing; no run, one without records, or one that is damaged; an argument out of its
            range.
        OSError: the file cannot be written.
    """
    check(len(runs) > 0, "runs is empty; at least one run's directory was expected")
    check(x in AXES, f"x is {x!r}; one of {', '.join(AXES)} was expected")
    check(0 <= smoothing < 1, f"smoothing is {smoothing}; a share of the records in [0, 1) was expected")
    try:
        figures = importlib.import_module("matplotlib.figure")
        ticker = importlib.import_module("matplotlib.ticker")
    except ImportError as error:
        raise ValueError(
            f"a plot needs matplotlib, which cannot be imported ({error}): pip install 'albert_fast[train]'"
        ) from None
    output = Path(output)
    records = [read(run) for run in runs]
    for run, own in zip(runs, records, strict=True):
        check(any(record["kind"] == "train" for record in own), f"{run} has no record of training yet")
    scale, label = _axis(x, records)

    panels = panels_of([record for own in records for record in own])
    figure = figures.Figure(figsize=(15, 8), dpi=110, layout="constrained")
    places = list(figure.subplots(2, 3).flat)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for panel, axes in zip(panels, places, strict=False):
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel=label, ylabel=panel.unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        if panel.unit in (SHARES, ERRORS):
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        elif panel.unit == "tokens/s":
            axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        else:
            axes.ticklabel_format(axis="y", scilimits=(-2, 3))
        shown = [value for run in enumerate(records) for value in _curves(axes, panel, *run, x, scale, smoothing)]
        _limits(axes, panel, shown)
    legend = [
        figures.mpl.lines.Line2D([], [], color=_color(number), linewidth=2.5, label=name)
        for number, name in enumerate(_names(runs))
    ]
    legend += [
        figures.mpl.lines.Line2D([], [], color="#888888", label=name, **style)
        for name, style in (
            ("training", {"linewidth": 2}),
            ("held out", {"marker": "o", "linestyle": "", "markersize": 6}),
            ("unigram model, chance", {"linestyle": "--"} if panels is PRETRAINING else None),
            ("event", {"linestyle": ":"} if any(_events(own, x) for own in records) else None),
        )
        if style is not None
    ]
    figure.legend(handles=legend, loc="outside upper center", ncols=min(len(legend), 6), frameon=False)
    _save(figure, output)


def _curves(
    axes: Any, panel: Panel, number: int, records: Records, x: str, scale: float, smoothing: float
) -> list[float]:
    """Draws one run's; what of it has to be seen."""
    color, shown = _color(number), []

    def points(kind: str, key: str) -> tuple[list[float], list[float], list[int]]:
        own = [r for r in records if r["kind"] == kind and r.get(x) is not None and r.get(key) is not None]
        return [r[x] / scale for r in own], [float(r[key]) for r in own], [r["step"] for r in own]

    places, values, steps = points("train", panel.key)
    smooth = _smoothed(values, steps, 0.0 if panel.exact else smoothing)
    axes.plot(places, values, color=color, linewidth=0.7, alpha=0.3)
    axes.plot(places, smooth, color=color, linewidth=1.8)
    shown += smooth[round(START * len(smooth)) :]
    if isinstance(panel.level, str):
        places, values, steps = points("train", panel.level)
        level = _smoothed(values, steps, smoothing)
        axes.plot(places, level, color=color, linewidth=1.2, linestyle="--", alpha=0.8)
        shown += level
    places, values, _ = points("evaluation", panel.key)
    axes.plot(places, values, "o", color=color, markersize=5.5, markeredgecolor="white", markeredgewidth=0.8, zorder=3)
    shown += values
    for place, name in _events(records, x):
        axes.axvline(place / scale, color=color, linestyle=":", linewidth=1.2)
        if panel.key.endswith("loss"):
            axes.annotate(
                name.replace("_", " "),
                (place / scale, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -3),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=8,
                color=color,
            )
    return [value for value in shown if math.isfinite(value)]


def _limits(axes: Any, panel: Panel, shown: list[float]) -> None:
    """The smoothed curves and the points fill a panel; what jumps out of it alone may be cut off."""
    if not shown:
        axes.text(0.5, 0.5, "not in these runs", transform=axes.transAxes, ha="center", va="center", color="#888888")
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        return
    if isinstance(panel.level, float):
        axes.axhline(panel.level, color="#888888", linewidth=1.2, linestyle="--", zorder=1)
        shown.append(panel.level)
    low, high = min(shown), max(shown)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0.0 if panel.zero else low - margin, high + margin)


def _events(records: Records, x: str) -> list[tuple[float, str]]:
    """Where on the axis the run went ill, and what it was called; several at one place as one."""
    places: dict[float, str] = {}
    for event in records:
        if event["kind"] == "event" and event.get("name") in EVENTS:
            before = [
                r[x] for r in records if r["kind"] != "event" and r["step"] <= event["step"] and r.get(x) is not None
            ]
            place = event["step"] if x == "step" else max(before, default=0.0)
            names = places.get(place)
            places[place] = event["name"] if names is None else f"{names}, {event['name']}"
    return list(places.items())


def _smoothed(values: Sequence[float], steps: Sequence[int], share: float) -> list[float]:
    """Means over this share of the values around each; what is not finite is left out. A value is a mean, too, of the
    steps since the one before: where those are fewer than usual (a run's last may be of one) it counts for less."""
    if not values:
        return []
    half = round(share * len(values) / 2)
    given = np.asarray(values)
    gaps = np.diff(steps, prepend=0)
    usual = np.median(gaps)
    weight = np.where((gaps > 0) & (gaps < usual), gaps, usual)  # none but after a rollback
    weight = np.where(np.isfinite(given), weight, 0.0)
    # Not differences of running sums: a loss of 1e30 would be left in all that follow.
    total, count = (
        np.convolve(each, np.ones(2 * half + 1))[half : half + len(given)]
        for each in (np.where(weight > 0, given, 0.0) * weight, weight)
    )
    return np.divide(total, count, out=np.full(len(given), math.nan), where=count > 0).tolist()


def _axis(x: str, records: Sequence[Records]) -> tuple[float, str]:
    """What the values are divided by, and the axis's name with its unit."""
    if x != "seconds":
        return 1.0, {"step": "step", "tokens": "tokens of training"}[x]
    longest = max((record.get("seconds") or 0.0 for own in records for record in own), default=0.0)
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * size:
            return size, f"{unit} of training"
    return 1.0, "seconds of training"


def _names(runs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The directories' own names where they differ, else as they were given."""
    names = [Path(run).absolute().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _save(figure: Any, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        figure.savefig(temporary, format=output.suffix.removeprefix(".") or "png")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
