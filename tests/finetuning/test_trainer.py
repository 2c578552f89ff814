"""Runs: what is learned, kept, gone on with, and refused."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from albert_fast import AlbertForSequenceClassification
from albert_fast.cli import main
from albert_fast.finetuning.classification import Classification
from albert_fast.finetuning.config import CONFIGURATION, ExitOptions, FinetuneConfig
from albert_fast.finetuning.exits import curve
from albert_fast.finetuning.run import Pipeline, finetune
from albert_fast.finetuning.task import tokenizer_of
from albert_fast.finetuning.trainer import Finetuner
from albert_fast.tokenizer import train_vocabulary
from albert_fast.training import parallel, tracking
from albert_fast.training.learner import Learner

from .conftest import sentence


@pytest.fixture
def files(tmp_path, draw) -> dict[str, Path]:
    """Sentences that are good or bad: 160 to train on, 60 to evaluate on."""
    found = {}
    for name, count in (("train", 160), ("dev", 60)):
        lines = [f"{sentence(draw, bool(i % 2))}\t{['bad', 'good'][i % 2]}" for i in range(count)]
        found[name] = tmp_path / f"{name}.tsv"
        found[name].write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return found


@pytest.fixture
def configure(files, model_directory, tmp_path):
    def make(*overrides: str):
        base = [
            "task=classification",
            f"model={model_directory}",
            f"data.train=[{files['train']}]",
            f"data.dev=[{files['dev']}]",
            f"output={tmp_path / 'run'}",
            "length=32",
            "epochs=12",
            "optimizer.learning_rate=0.004",
            "batch.size=16",
            "log={every: 5, quiet: true, peak_flops: 1e12}",
            "device=cpu",
        ]
        return CONFIGURATION.parse(None, [*base, *overrides])

    return make


def test_it_learns_and_keeps_the_best(configure, files, tmp_path):
    config = configure()
    assert finetune(config) == 0
    run = tmp_path / "run"
    records = tracking.read(run)
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in evaluations] == list(range(10, 121, 10))
    best = max(evaluations, key=lambda record: record["accuracy"])
    assert best["accuracy"] > 0.9
    kept = json.loads((run / "best" / "metrics.json").read_text())
    assert (kept["step"], kept["accuracy"]) == (best["step"], best["accuracy"])
    pipeline = Pipeline(run / "best", device="cpu")
    assert pipeline.evaluate([str(files["dev"])])["accuracy"] == pytest.approx(best["accuracy"])
    said = pipeline(["a great warm fine film", "dull poor cold story"])
    assert [each["label"] for each in said] == ["good", "bad"]
    assert pipeline("a great warm fine film")["label"] == "good"
    with pytest.raises(ValueError, match="no early exits"):
        curve(pipeline, [str(files["dev"])])


def test_the_commands(files, model_directory, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    options = ["epochs=1", "length=32", "log.quiet=true", "log.peak_flops=1e12", "device=cpu"]
    arguments = ["--model", str(model_directory), "--train", str(files["train"]), "--dev", str(files["dev"])]
    assert main(["finetune", "classification", *arguments, "-o", str(run), "--set", *options]) == 0
    assert main(["evaluate", str(run / "best"), str(files["dev"]), "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"] == json.loads((run / "best" / "metrics.json").read_text())["accuracy"]
    written = tmp_path / "said.jsonl"
    assert main(["predict", str(run / "best"), str(files["dev"]), "-o", str(written), "--device", "cpu"]) == 0
    assert len(written.read_text().splitlines()) == 60
    monkeypatch.setattr("sys.stdin", iter(["a fine film\n", "a dull one\n"]))
    assert main(["predict", str(run / "best"), "-", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_does_not_fit_a_model_is_refused(configure, files, tmp_path, capsys):
    """Before anything is computed or written."""
    assert finetune(configure("schedule.steps=1", "epochs=null")) == 0
    best, dev = str(tmp_path / "run" / "best"), str(files["dev"])
    for arguments, message in (
        (["evaluate", best, dev, "--set", "task=tagging"], "'task=tagging' was given, and .* for 'classification'"),
        (["predict", best, dev, "--set", "length=4096"], "length is 4096 and the model has 64 positions"),
        (["predict", best, "missing.tsv", "-o", "/proc/nope/x"], "--output is '/proc/nope/x', which cannot be written"),
        (["predict", best, "missing.tsv", "-o", str(tmp_path)], "which cannot be written .*[Dd]irectory"),
        (["predict", best, "missing.tsv", "-o", str(tmp_path / "said")], "missing.tsv cannot be read"),
    ):
        assert main([*arguments, "--device", "cpu"]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "said").exists()
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    assert main(["predict", best, "missing.tsv", "-o", str(kept), "--device", "cpu"]) == 2
    assert kept.read_text() == "as it was"


def test_going_on_gives_the_same_bits(configure, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch, a run ends with the weights of one that was not."""
    whole = Finetuner(configure("epochs=2", "model=" + configure().model), parallel.start("cpu"))
    assert whole.run() == 0
    expected = {name: tensor.clone() for name, tensor in whole.learner.model.state_dict().items()}

    update, steps = Learner.update, []
    other = configure("epochs=2", f"output={tmp_path / 'other'}", "save.every=7")
    first = Finetuner(other, parallel.start("cpu"))

    def stopped(learner: Learner, rate: float) -> None:
        steps.append(rate)
        if len(steps) == 10:
            raise KeyboardInterrupt
        update(learner, rate)

    monkeypatch.setattr(Learner, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    monkeypatch.setattr(Learner, "update", update)
    second = Finetuner(other, parallel.start("cpu"))
    assert second.run() == 0
    for name, tensor in second.learner.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_does_not_go_on_with_other_labels(configure, files):
    """Their numbers in the weights would be other labels': "bad" was 0, and "worst" would be 1."""
    assert finetune(configure("epochs=0.1")) == 0
    for path in files.values():
        path.write_text(path.read_text().replace("\tgood", "\tan"))
    with pytest.raises(
        ValueError, match=r"run has labels 'bad', 'good', and would go on with labels 'an', 'bad': .*output \(-o\)"
    ):
        finetune(configure("epochs=0.2"))


def test_the_best_of_other_held_out_data(configure, files, tmp_path):
    """A figure of one file does not stand against one of another; one that does not say of which is compared."""
    path, moved = tmp_path / "run" / "best" / "metrics.json", tmp_path / "moved.tsv"

    def kept(accuracy: float, dev: Path) -> float:
        run = Finetuner(configure(f"data.dev=[{dev}]"), parallel.start("cpu"))
        run.metrics = {"accuracy": accuracy}
        run._keep_best()
        return json.loads(path.read_text())["accuracy"]

    assert kept(0.9, files["dev"]) == 0.9
    assert kept(0.8, files["dev"]) == 0.9
    files["dev"].rename(moved)
    assert kept(0.8, moved) == 0.9
    moved.write_text("text\tlabel\na great film\tgood\n")
    assert kept(0.8, moved) == 0.8
    path.write_text('{"step": 1, "accuracy": 0.9}')
    assert kept(0.8, moved) == 0.9


def test_every_row_comes_once_in_an_epoch(configure):
    feed = Finetuner(configure(), parallel.start("cpu")).feed
    seen = []
    for _ in range(20):
        batches = feed.take(0.0, 16, 8)
        assert [batch.rows for batch in batches] == [8, 8]
        seen += [row.example for batch in batches for row in batch.source]
        feed.done(16, 0)
    assert sorted(seen[:160]) == sorted(seen[160:]) == list(range(160))
    assert seen[:160] != seen[160:]
    assert feed.epoch == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=guessing"], "task is 'guessing'; one of"),
        (["data.train=[]"], "data.train is not given"),
        (["length=100"], "length is 100 and the model has 64 positions"),
        (["schedule.seconds=5"], "epochs and schedule.seconds are both given"),
        (["exit.patience=2"], "the model has no early exits"),
        (["exit={patience: 2, confidence: 0.9}"], "both given; one rule"),
        (["exit.confidence=1.5"], "exit.confidence is 1.5"),
        (["r_drop=1", "data.kind=multi"], "r_drop is for classification with one label each"),
        (["early_exit=true", "parallel.tensor=2"], "parallel.tensor is not for speech and early_exit"),
        (["data.train=[missing.tsv]"], "missing.tsv cannot be read"),
        (["model=nowhere"], "nowhere"),
        (["seed=-1"], "seed is -1; a number from 0"),
        (["overrides={num_layers: 1}"], "overrides has 'num_layers'; .* such as .*num_hidden_layers"),
        (["overrides={extra: {}}"], "overrides has 'extra'"),
        (["overrides={num_decoder_layers: 1}"], "overrides has 'num_decoder_layers'"),  # of translation
    ],
    ids=[
        "task",
        "train",
        "length",
        "epochs",
        "rule",
        "rules",
        "confidence",
        "r_drop",
        "tensor",
        "missing",
        "model",
        "seed",
        "override",
        "extra",
        "other_task",
    ],
)
def test_mistakes(overrides, message, configure, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        Finetuner(configure(*overrides), parallel.start("cpu"))
    assert not (tmp_path / "run").exists()


def test_a_dev_file_with_another_label(configure, files):
    files["dev"].write_text("text\tlabel\na film\tsplendid\n")
    with pytest.raises(ValueError, match=r"dev\.tsv, line 2: the label 'splendid' is not among"):
        Finetuner(configure(), parallel.start("cpu"))


@pytest.mark.parametrize("name", CONFIGURATION.preset_names())
def test_presets(name):
    """The original's recipes, complete but for the files."""
    config = CONFIGURATION.parse(name, ["model=base", "output=x", "data.train=[x]"])
    assert config.with_steps(10).schedule.steps == config.schedule.steps
    assert replace(config, epochs=2.0).with_steps(10 * config.batch.size).schedule.steps == 20
    config.check_complete()
    assert config.schedule.steps >= 800
    assert config.optimizer.learning_rate <= 5e-5
    assert 0.05 < config.schedule.warmup <= 0.25


@pytest.mark.parametrize(
    ("data", "lines", "figure"),
    [
        ({"kind": "regression"}, ["a fine film\t1.5", "a dull film\t-1", "a film\t0.25"], "spearman"),
        ({"kind": "multi", "separator": "|"}, ["a fine film\tfilm|good", "a dull film\tfilm", "the end\t"], "f1"),
        ({"text": "0", "label": "1"}, ["a fine film\tgood", "a dull film\tbad"], "accuracy"),
    ],
    ids=["regression", "multi", "columns"],
)
def test_a_model_knows_how_its_files_are_read(data, lines, figure, configure, tmp_path):
    path = tmp_path / "labelled.tsv"
    path.write_text("\n".join([*([] if "text" in data else ["text\tlabel"]), *lines]) + "\n")
    options = [f"data.{key}={value}" for key, value in data.items()]
    assert finetune(configure(*options, f"data.train=[{path}]", f"data.dev=[{path}]", "epochs=2", "batch.size=2")) == 0
    best = tmp_path / "run" / "best"
    kept = json.loads((best / "metrics.json").read_text())
    assert Pipeline(best, device="cpu").evaluate([str(path)])[figure] == pytest.approx(kept[figure])
    with pytest.raises(ValueError, match="no 'other'"):
        Pipeline(best, ["data.text=other", "data.label=label"], device="cpu").evaluate([str(path)])


def test_a_head_for_other_labels_is_left_out(configure, files, tmp_path):
    """A task may begin with a model of another one: with its encoder."""
    assert finetune(configure("epochs=1")) == 0
    first = tmp_path / "run" / "best"
    same = Finetuner(configure(f"model={first}", f"output={tmp_path / 'b'}"), parallel.start("cpu")).learner.model
    before = AlbertForSequenceClassification.from_pretrained(first)
    assert torch.equal(same.classifier.weight, before.classifier.weight)
    lines = files["train"].read_text().splitlines()
    files["train"].write_text("\n".join([*lines, "a film\tneither"]) + "\n")
    other = Finetuner(configure(f"model={first}", f"output={tmp_path / 'c'}"), parallel.start("cpu")).learner.model
    assert other.classifier.weight.shape[0] == 3
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    assert torch.equal(other.state_dict()[name], before.state_dict()[name])
    early = configure(f"model={first}", f"output={tmp_path / 'd'}", "early_exit=true")
    assert len(Finetuner(early, parallel.start("cpu")).learner.model.exits) == 1


def test_the_best_is_kept_where_the_disk_is_full(configure, tmp_path, monkeypatch):
    config = configure("epochs=2")
    export = Learner.export

    def full(learner: Learner, directory: Path, states) -> None:
        if directory.name == ".best.partial":
            raise OSError(28, "No space left on device")
        export(learner, directory, states)

    monkeypatch.setattr(Learner, "export", full)
    assert finetune(config) == 0
    events = [record for record in tracking.read(tmp_path / "run") if record["kind"] == "event"]
    assert any(event["name"] == "not_saved" and "No space" in event["message"] for event in events)
    assert not (tmp_path / "run" / ".best.partial").exists()


def test_what_is_better(configure):
    task = Finetuner(configure(), parallel.start("cpu")).task
    nan = float("nan")
    assert task.is_better(0.5, None)
    assert task.is_better(0.5, nan)
    assert task.is_better(0.6, 0.5)
    assert not task.is_better(0.5, 0.6)
    assert not task.is_better(nan, None)
    assert not task.is_better(nan, 0.5)


def test_a_vocabulary_by_its_file_keeps_its_case(tmp_path):
    train_vocabulary(["Ada Lovelace was here and THERE"] * 20, tmp_path, vocab_size=33, do_lower_case=False)
    for vocab in (tmp_path, tmp_path / "spiece.model"):
        assert not tokenizer_of(FinetuneConfig(model="base", vocab=str(vocab))).do_lower_case


def test_a_package_for_figures_that_is_missing(configure, files, tmp_path, monkeypatch):
    """Said before a step is made."""
    assert finetune(configure("epochs=1")) == 0
    monkeypatch.setattr(Classification, "measures", ("nowhere_to_be_found",))
    with pytest.raises(ValueError, match=r"need nowhere_to_be_found.*pip install 'albert_fast\[finetune\]'"):
        Finetuner(configure(f"output={tmp_path / 'other'}"), parallel.start("cpu"))
    with pytest.raises(ValueError, match="need nowhere_to_be_found"):
        Pipeline(tmp_path / "run" / "best", device="cpu").evaluate([str(files["dev"])])


def test_from_random_weights(configure, model_directory, draw: random.Random):
    config = configure(f"model={model_directory / 'config.json'}", f"vocab={model_directory}", "epochs=1")
    assert finetune(config) == 0


def test_overrides(configure, model_directory, tmp_path):
    """Fields of AlbertConfig, and what the model's own config.json has beside them."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads((model_directory / "config.json").read_text()), "gap_size": 0}))
    overrides = "overrides={num_hidden_layers: 1, num_labels: 2, gap_size: 1}"
    run = Finetuner(configure(f"model={path}", f"vocab={model_directory}", overrides), parallel.start("cpu"))
    assert (run.shape.num_hidden_layers, run.shape.extra["gap_size"]) == (1, 1)


def test_two_processes(configure, files, model_directory, tmp_path):
    """As one process: the same rows in each step, the same predictions in the end."""
    options = ["dropout=0.0", "classifier_dropout=0.0", "epochs=2"]
    assert finetune(configure(*options)) == 0
    arguments = [f"{key}={value}" for key, value in (("length", 32), ("optimizer.learning_rate", 0.004))]
    arguments += [*options, "batch.size=16", "log.quiet=true", "log.peak_flops=1e12", "device=cpu"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "albert_fast.cli",
    ]
    command += ["finetune", "classification", "--model", str(model_directory), "--train", str(files["train"])]
    command += ["--dev", str(files["dev"]), "-o", str(tmp_path / "two"), "--set", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0, found.stderr
    losses, two = (
        [(r["step"], r["loss"]) for r in tracking.read(tmp_path / name) if r["kind"] == "train"]
        for name in ("run", "two")
    )
    assert losses[0][0] == 5
    assert dict(two)[10] == pytest.approx(sum(loss for _, loss in losses[:2]) / 2, rel=1e-4)
    one, both = (Pipeline(tmp_path / name / "best", device="cpu") for name in ("run", "two"))
    texts = [line.split("\t")[0] for line in files["dev"].read_text().splitlines()[1:]]
    for a, b in zip(one(texts), both(texts), strict=True):
        assert (a["label"], a["probability"]) == (b["label"], pytest.approx(b["probability"], abs=1e-3))


def test_early_exits(configure, files, tmp_path):
    """A rule that is easily met lets rows go after the first pass, at little or no cost here."""
    assert finetune(configure("early_exit=true")) == 0
    best = tmp_path / "run" / "best"
    whole = Pipeline(best, device="cpu").evaluate([str(files["dev"])])
    assert whole["passes"] == 2
    early = Pipeline(best, ["exit.confidence=0.51"], device="cpu")
    figures = early.evaluate([str(files["dev"])])
    assert figures["passes"] < 1.5
    assert figures["accuracy"] > 0.7
    pipeline = Pipeline(best, device="cpu")
    points = curve(pipeline, [str(files["dev"])], repeats=1)
    assert [(p["patience"], p["confidence"]) for p in points[:2]] == [(None, None), (1, None)]
    assert (points[0]["passes"], points[0]["speedup"], points[1]["passes"]) == (2, 1, 1)
    assert points[0]["accuracy"] == whole["accuracy"]
    assert pipeline.task.config.exit == ExitOptions()  # the rule that it had is back
    with pytest.raises(ValueError, match="early_exit is for classification"):
        finetune(configure("early_exit=true", "data.kind=multi", f"output={tmp_path / 'other'}"))
