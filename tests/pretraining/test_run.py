"""`albert-fast pretrain` and `plot`, as a user calls them."""

from pathlib import Path

import pytest

from albert_fast import cli
from albert_fast.pretraining import run
from albert_fast.pretraining.trainer import Trainer
from albert_fast.training import tracking
from albert_fast.training.loop import TrainingFailed

from .conftest import small_run


@pytest.fixture
def arguments(store_directory: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "run.yaml").write_text("schedule: {steps: 3}\n")
    return ["pretrain", str(tmp_path / "run.yaml"), *small_run(store_directory, tmp_path / "run")]


def test_a_run_and_its_curves(arguments, tmp_path, capsys):
    assert cli.main([*arguments, "schedule.steps=3", "log.quiet=false"]) == 0
    shown = capsys.readouterr().err
    assert "step 3" in shown
    assert "held out" in shown
    assert [record["step"] for record in tracking.read(tmp_path / "run") if record["kind"] == "train"] == [1, 2, 3]
    assert cli.main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "run.png"), "--x", "step"]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_the_length_of_the_last_step(arguments, tmp_path):
    """A budget of seconds ends the run; its last step is saved and evaluated."""
    assert cli.main([*arguments, "schedule.steps=null", "schedule.seconds=0.5", "evaluate.every=10000"]) == 0
    records = tracking.read(tmp_path / "run")
    (evaluation,) = [record for record in records if record["kind"] == "evaluation"]
    last = [record for record in records if record["kind"] == "train"][-1]
    assert evaluation["step"] == last["step"]
    assert last["seconds"] >= 0.5
    assert last["progress"] == 1
    assert (tmp_path / "run" / "checkpoints" / f"step-{last['step']:08d}").is_dir()


def test_finding_a_batch_size(arguments, tmp_path, capsys):
    assert cli.main([*arguments, "batch.size=4", "--find-batch-size"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["rows", "tokens/s"]
    assert lines[-1].startswith("micro-batch: ")
    assert not (tmp_path / "run").exists()


def test_finding_a_batch_size_for_examples_that_are_too_long(arguments, capsys):
    assert cli.main([*arguments, "examples.length=65", "--find-batch-size"]) == 2
    assert "examples are of 65 tokens and the model has 64 positions" in capsys.readouterr().err


def test_overrides_after_an_option(arguments, capsys):
    command, config, *overrides = arguments
    assert cli.main([command, config, "--find-batch-size", *overrides, "examples.length=65"]) == 2
    assert "examples are of 65 tokens" in capsys.readouterr().err
    assert cli.main([command, config, *overrides, "--find-batch-size", "examples.length=65"]) == 2
    assert "examples are of 65 tokens" in capsys.readouterr().err
    for word in ("--batch.size=4", "--what", "batch.size"):
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--find-batch-size", word])
        assert f"unrecognized arguments: {word}" in capsys.readouterr().err


def test_full_rows():
    batch = run.full_rows(3, 16, 0.5, 40, second_task=True)
    assert batch.cu_seqlens.tolist() == [0, 16, 32, 48]
    assert batch.position_ids.tolist() == [*range(16)] * 3
    assert 0 < int((batch.labels != -100).sum()) < 48
    assert batch.packed().cu_seqlens is batch.cu_seqlens
    assert run.full_rows(1, 16, 0.5, 40, second_task=False).sentence_order_label is None


def test_the_keys(capsys):
    assert cli.main(["pretrain", "--keys"]) == 0
    shown = capsys.readouterr().out
    assert "base-v1" in shown
    assert "--optimizer.learning_rate" in shown


def test_a_run_that_fails(arguments, capsys, monkeypatch):
    def fail(self):
        raise TrainingFailed("step 4: the loss is nan")

    monkeypatch.setattr(Trainer, "run", fail)
    assert cli.main(arguments) == 1
    assert "albert-fast pretrain: step 4: the loss is nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["pretrain"], "CONFIG is missing"),
        (["pretrain", "huge"], "is no file and no preset"),
        (["pretrain", "tiny"], "output is not given"),
        (["pretrain", "tiny", "--find-batch-size"], "data.train is not given"),
        (["plot", "nowhere", "-o", "x.png"], "nowhere has no log.jsonl"),
    ],
    ids=["none", "unknown", "output", "store", "plot"],
)
def test_mistakes(more, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
