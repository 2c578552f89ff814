"""Pictures of runs: what is drawn where, and that a file is there whole or not at all."""

import math
import sys

import numpy as np
import pytest

from albert_fast.training import plot as plotting
from albert_fast.training.plot import PRETRAINING, panels_of, plot
from albert_fast.training.tracking import Recorder

pytest.importorskip("matplotlib")


def record(directory, steps=100, sentence_order=True, ill=False):
    """A run of these steps, a record each: after a first loss of 20 it falls by a hundredth of a nat a step."""
    with Recorder(directory, quiet=True) as recorder:
        for step in range(1, steps + 1):
            gain = step / 100 - (2.0 if ill and 40 <= step < 50 else 0.0) if step > 1 else -13.6
            figures = {
                "step": step,
                "seconds": 60.0 * step,
                "tokens": 1000 * step,
                "masked_lm_loss": 6.4 - gain,
                "unigram_loss": 6.4,
                "below_unigram": gain,
                "masked_accuracy": 0.1 + gain / 10,
            }
            if sentence_order:
                figures["sentence_order_accuracy"] = 0.5 + step / 1000
            if ill and step == 50:
                recorder.event(step, "collapse", "…")
                recorder.event(step, "rollback", "…")
                recorder.event(step, "resumed", "…")
            loss = math.nan if ill and step == 60 else figures["masked_lm_loss"]
            rest = {"learning_rate": 1e-3 * (1 - step / steps), "tokens_per_second": 5000.0, "mfu": None}
            recorder.train({**figures, **rest, "masked_lm_loss": loss})
            if step % 20 == 0:
                recorder.evaluation(figures)
    return directory


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, and gives the figure in place of a file."""

    def draw(*runs, **options):
        figures = []
        monkeypatch.setattr(plotting, "_save", lambda figure, output: figures.append(figure))
        plot(runs, tmp_path / "curves.png", **options)
        return figures[0]

    return draw


def curves(axes, color, **style):
    lines = [line for line in axes.get_lines() if line.get_color() == color]
    return [line for line in lines if all(getattr(line, f"get_{name}")() == value for name, value in style.items())]


def test_a_picture(tmp_path):
    from matplotlib.image import imread

    runs = [record(tmp_path / "long", ill=True), record(tmp_path / "short", 30, sentence_order=False)]
    plot(runs, tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")
    assert min(pixels.shape[:2]) > 600
    assert 0.02 < (pixels[..., :3].min(axis=-1) < 0.9).mean() < 0.5, "neither empty nor full"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "long", "short"]


def test_what_is_drawn(tmp_path, drawn):
    figure = drawn(
        record(tmp_path / "long", ill=True), record(tmp_path / "short", 30, sentence_order=False), smoothing=0
    )
    blue, orange = plotting.COLORS[:2]
    panels = dict(zip([panel.key for panel in PRETRAINING], figure.axes, strict=True))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["long", "short"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"tokens of training"}
    assert panels["masked_lm_loss"].get_ylabel() == "nats"

    loss = panels["masked_lm_loss"]
    for color, steps in ((blue, 100), (orange, 30)):
        (thin,), (smooth,) = (curves(loss, color, linestyle="-", linewidth=width) for width in (0.7, 1.8))
        np.testing.assert_array_equal(thin.get_xdata(), 1000 * np.arange(1, steps + 1))
        np.testing.assert_array_equal(thin.get_ydata(), smooth.get_ydata())
        (level,) = curves(loss, color, linestyle="--")
        np.testing.assert_allclose(level.get_ydata(), 6.4)
    (held_out,) = curves(loss, blue, marker="o")
    np.testing.assert_array_equal(held_out.get_xdata(), 1000 * np.arange(20, 101, 20))
    assert [line.get_xdata()[0] for line in curves(loss, blue, linestyle=":")] == [50_000]
    assert [text.get_text() for text in loss.texts] == ["collapse, rollback"]
    assert curves(loss, orange, linestyle=":") == []

    order = panels["sentence_order_accuracy"]
    assert len(curves(order, blue, linewidth=1.8)[0].get_xdata()) == 100
    assert len(curves(order, orange, linewidth=1.8)[0].get_xdata()) == 0
    assert [line.get_ydata()[0] for line in curves(order, "#888888")] == [0.5]
    assert panels["learning_rate"].get_ylim()[0] == panels["tokens_per_second"].get_ylim()[0] == 0
    # A random model's first losses leave room for the rest.
    assert loss.get_ylim()[1] < 9


def test_what_no_run_has(tmp_path, drawn):
    figure = drawn(record(tmp_path / "run", sentence_order=False))
    axes = figure.axes[[panel.key for panel in PRETRAINING].index("sentence_order_accuracy")]
    assert [text.get_text() for text in axes.texts] == ["not in these runs"]


def test_panels_of_a_task():
    """The loss, and the figures that count most; BLEU is no share."""
    train = {"kind": "train", "step": 1, "loss": 2.0, "learning_rate": 1.0, "tokens_per_second": 2.0}
    said = {
        "kind": "evaluation",
        "step": 1,
        "seconds": 1.0,
        "tokens": 2,
        "bleu": 20.0,
        "wer": 1.2,
        "exact_match": 0.5,
        "weights": "model",
    }
    found = [(panel.title, panel.unit, panel.key) for panel in panels_of([train, said])]
    assert found[:4] == [
        ("Loss", "nats", "loss"),
        ("Exact match", plotting.SHARES, "exact_match"),
        ("BLEU", "", "bleu"),
        ("WER", plotting.ERRORS, "wer"),
    ]
    assert [key for *_, key in found[4:]] == ["learning_rate", "tokens_per_second"]
    figures = {"accuracy": 0.9, "exact_match": 0.1, "precision": 0.2, "f1": 0.2, "f1_answerable": 0.4}
    keys = [panel.key for panel in panels_of([train, {"kind": "evaluation", **figures}])]
    assert keys[1:4] == ["f1", "f1_answerable", "exact_match"]


@pytest.mark.parametrize(
    ("x", "label", "last"),
    [("step", "step", 100), ("tokens", "tokens of training", 100_000), ("seconds", "minutes of training", 100)],
)
def test_axes(x, label, last, tmp_path, drawn):
    figure = drawn(record(tmp_path / "run", ill=True), x=x)
    (curve,) = curves(figure.axes[1], plotting.COLORS[0], linewidth=1.8)
    assert figure.axes[1].get_xlabel() == label
    assert curve.get_xdata()[-1] == last


@pytest.mark.parametrize(("longest", "unit"), [(100, "seconds"), (130, "minutes"), (7200, "hours"), (200_000, "days")])
def test_units_of_time(longest, unit):
    scale, label = plotting._axis("seconds", [[{"seconds": 1.0}], [{"seconds": longest}, {}]])
    assert label == f"{unit} of training"
    assert longest / scale < 130


def test_smoothing():
    values = np.random.default_rng(0).normal(size=100).tolist()
    steps = range(20, 2001, 20)
    assert plotting._smoothed(values, steps, 0.0) == pytest.approx(values)
    smooth = plotting._smoothed(values, steps, 0.1)
    assert smooth[50] == pytest.approx(np.mean(values[45:56]))
    assert smooth[0] == pytest.approx(np.mean(values[:6]))
    assert smooth[-1] == pytest.approx(np.mean(values[-6:]))
    with_gaps = [math.nan if i == 47 else value for i, value in enumerate(values)]
    kept = [value for i, value in enumerate(values[45:56], start=45) if i != 47]
    assert plotting._smoothed(with_gaps, steps, 0.1)[50] == pytest.approx(np.mean(kept))
    assert math.isnan(plotting._smoothed([math.nan, 1.0], [20, 40], 0.0)[0])
    assert plotting._smoothed([1e30, 0.0, 0.0, 1.0, 1.0, 1.0], range(20, 121, 20), 0.5)[5] == pytest.approx(1.0)
    assert plotting._smoothed([], [], 0.1) == []
    # After a rollback step 60 comes again, a mean of 20 steps as before; the last is of one.
    smooth = plotting._smoothed([1.0, 1.0, 2.0, 4.0, 0.0], [20, 40, 60, 60, 61], 0.8)
    assert smooth[-1] == pytest.approx((2 * 20 + 4 * 20) / 41)


def test_names():
    assert plotting._names(["/a/first", "/a/second/"]) == ["first", "second"]
    assert plotting._names(["/a/run", "/b/run"]) == ["/a/run", "/b/run"]


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    run = record(tmp_path / "run")
    (tmp_path / "curves.png").write_bytes(b"old")
    from matplotlib.figure import Figure

    def fails(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fails)
        with pytest.raises(OSError, match="the disk is full"):
            plot([run], tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "run"]
    assert (tmp_path / "curves.png").read_bytes() == b"old"
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        plot([run], tmp_path / "curves.xyz")


def test_wrong_arguments(tmp_path, monkeypatch):
    output = tmp_path / "curves.png"
    run = record(tmp_path / "run", 2)
    with Recorder(tmp_path / "empty", quiet=True) as recorder:
        recorder.event(0, "a", "b")
    for runs, options, message in [
        ([], {}, "runs is empty"),
        ([run], {"x": "epoch"}, "x is 'epoch'; one of step, seconds, tokens was expected"),
        ([run], {"smoothing": 1.0}, r"smoothing is 1.0"),
        ([tmp_path], {}, "has no log.jsonl"),
        ([run, tmp_path / "empty"], {}, "empty has no record of training yet"),
    ]:
        with pytest.raises(ValueError, match=message):
            plot(runs, output, **options)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a plot needs matplotlib.*pip install 'albert_fast\[train\]'"):
        plot([run], output)
    assert not output.exists()
