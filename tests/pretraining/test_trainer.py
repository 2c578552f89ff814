"""Runs: that they learn, and that nothing which happens to them loses work or changes a bit of what they compute."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from albert_fast import AlbertForMaskedLM, AlbertForPreTraining
from albert_fast.pretraining.config import PretrainConfig, parse
from albert_fast.pretraining.trainer import Trainer
from albert_fast.tokenizer import AlbertTokenizer
from albert_fast.training import loop, parallel, tracking
from albert_fast.training.checkpoints import Checkpoints, CheckpointWriteError, load_tensors
from albert_fast.training.learner import Learner
from albert_fast.training.loop import TrainingFailed

from .conftest import small_run

DROPOUT = "model.version=1"


def train(config: PretrainConfig) -> int:
    return Trainer(config, parallel.start("cpu", config.parallel.tensor)).run()


def records(config: PretrainConfig | Path, kind: str = "train") -> list[dict]:
    output = config if isinstance(config, Path) else Path(config.output)
    return [record for record in tracking.read(output) if record["kind"] == kind]


def events(config: PretrainConfig) -> list[str]:
    return [record["name"] for record in records(config, "event")]


def what_was_computed(config: PretrainConfig | Path) -> list[dict]:
    """The train records without what a clock or the machine has to do with."""
    clocks = ("seconds", "tokens_per_second", "mfu", "memory", "seconds_left")
    return [{k: v for k, v in record.items() if k not in clocks} for record in records(config)]


def tensors(output: Path) -> dict[str, torch.Tensor]:
    """All of the last checkpoint."""
    latest = Checkpoints(output / "checkpoints", 1).latest()
    assert latest is not None
    metadata = FileSystemReader(latest / "tensors").read_metadata().state_dict_metadata
    found = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in metadata.items()}
    load_tensors(latest, found, parallel.start("cpu"))
    return found


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


# ------------------------------------------------------------------------------------------------------------ learning


def test_it_learns(make_config):
    config = make_config(
        "schedule.steps=220", "batch.size=16", "save.every=200", "evaluate.every=110", "optimizer.ema=0.9"
    )
    assert train(config) == 0
    log = records(config)
    assert [record["step"] for record in log] == list(range(1, 221))
    assert log[0]["below_unigram"] < 0.1
    evaluations = records(config, "evaluation")
    assert [record["step"] for record in evaluations] == [110, 220]
    assert evaluations[-1]["weights"] == "ema"
    assert evaluations[-1]["below_unigram"] > max(0.15, evaluations[0]["below_unigram"])
    assert all(0 < record["mfu"] < 1 and record["memory"] > 0 for record in log)
    assert log[-1]["seconds_left"] == 0


def test_a_rate_above_the_peak_measures_it_again(make_config, monkeypatch):
    """As where another program had the processor while it was measured."""
    asked: list[float] = []

    def peak(device, dtype, *, exceeded: float = 0.0) -> float:
        asked.append(exceeded)
        return max(1.0, 2.0 * exceeded)

    monkeypatch.setattr(loop, "peak_flops", peak)
    config = make_config("log.peak_flops=null", "schedule.steps=2")
    assert train(config) == 0
    assert all(0.0 < record["mfu"] < 1.0 for record in records(config))
    assert asked[0] == 0.0
    assert 1 <= len(asked[1:]) <= 2
    assert all(rate > 1.0 for rate in asked[1:])


def test_a_run_that_begins_as_the_unigram_model(make_config):
    """But for what the small first weights add at random."""
    config = make_config("model.initialization=neighbors", "schedule.steps=1", "batch.size=64")
    train(config)
    assert abs(records(config)[0]["below_unigram"]) < 0.5
    assert records(config)[0]["unigram_loss"] < 4.5  # of 100 pieces, log(100) would be 4.6


def test_what_a_run_leaves(make_config):
    config = make_config("save.keep=2", "optimizer.ema=0.5")
    train(config)
    output = Path(config.output)
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000006"]
    for name in ("model", "ema"):
        directory = output / "checkpoints" / "step-00000006" / name
        model = AlbertForPreTraining.from_pretrained(directory)
        assert model.config.architectures == ["AlbertForPreTraining"]
        assert len(AlbertTokenizer.from_pretrained(directory)) == 100
        written, prefix = tensors(output), "average" if name == "ema" else "model"
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, written[f"{prefix}/{key}"])
    assert json.loads((output / "config.yaml").read_text())["schedule"]["steps"] == 6


def test_without_a_second_task(make_config):
    config = make_config("examples.sentence_order=none", "schedule.steps=2")
    train(config)
    assert "sentence_order_loss" not in records(config)[-1]
    AlbertForMaskedLM.from_pretrained(Path(config.output) / "checkpoints" / "step-00000002" / "model")


def test_the_average_of_the_weights(make_config, monkeypatch):
    """The moving average, by its definition; the first step's weights begin it."""
    seen = []
    update = Learner.update

    def noted(self, rate):
        update(self, rate)
        seen.append({k: v.detach().clone() for k, v in self.model.named_parameters()})

    monkeypatch.setattr(Learner, "update", noted)
    config = make_config("schedule.steps=4", "optimizer.ema=0.7")
    train(config)
    found = tensors(Path(config.output))
    for name in seen[0]:
        expected = seen[0][name]
        for weights in seen[1:]:
            expected = 0.7 * expected + 0.3 * weights[name]
        torch.testing.assert_close(found[f"average/{name}"], expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- one batch, many ways


def test_accumulation_equals_one_batch(make_config, tmp_path):
    """The labels of micro-batches differ: a mean of their means would be another gradient."""
    whole = make_config("schedule.steps=3", "examples.short_probability=0.5")
    parts = make_config("schedule.steps=3", "examples.short_probability=0.5", "batch.micro=2", f"output={tmp_path}/b")
    train(whole)
    train(parts)
    a, b = tensors(Path(whole.output)), tensors(Path(parts.output))
    # The first moments are sums of gradients: errors of the sum's order alone.
    for name in a:
        if name.startswith("optimizer/exp_avg/"):
            assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm() + 1e-9, name
    for one, other in zip(records(whole), records(parts), strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-4


def test_the_weight_of_the_second_task(make_config, tmp_path):
    """At 0 its head learns nothing; in between the first gradient is the sum of both with that weight."""
    moments = {}
    for weight in (0.0, 0.25, 1.0):
        output = f"output={tmp_path}/{weight}"
        config = make_config("schedule.steps=1", f"sentence_order_weight={weight}", "optimizer.clip=null", output)
        train(config)
        moments[weight] = tensors(Path(config.output))
    names = [name for name in moments[0.0] if name.startswith("optimizer/exp_avg/")]
    head = "optimizer/exp_avg/sop_classifier.classifier.weight"
    assert not moments[0.0][head].any()
    assert moments[1.0][head].any()
    for name in names:
        without, some, whole = (moments[weight][name] for weight in (0.0, 0.25, 1.0))
        error = (some - without - 0.25 * (whole - without)).norm()
        assert error <= 1e-3 * (whole.norm() + without.norm()) + 1e-9, name


def test_workers_change_nothing(make_config, tmp_path):
    none, two = make_config(DROPOUT), make_config(DROPOUT, "data.workers=2", f"output={tmp_path}/b")
    train(none)
    train(two)
    assert what_was_computed(none) == what_was_computed(two)
    assert_same_bits(Path(none.output), Path(two.output))


def test_growing_batches_and_lengths(make_config):
    config = make_config(
        "schedule.steps=10",
        "batch.micro=2",
        "batch.start=2",
        "batch.ramp=0.5",
        "batch.stages=[[0.6, 16], [0.4, 48]]",
    )
    train(config)
    log = records(config)
    assert [record["batch_size"] for record in log] == [2, 2, 4, 4, 6, 8, 8, 8, 8, 8]
    assert [record["length"] for record in log] == [16] * 6 + [48] * 4
    assert [record["epoch"] for record in log] == [0] * 6 + [1] * 4


def test_two_processes_equal_one(store_directory, tmp_path):
    """A run goes on with another number of processes, and another engine: 1, 2, FSDP2, tensor parallelism, 1 again."""
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    train(parse(None, on_and_on(store_directory, one, 10)))
    train(parse(None, on_and_on(store_directory, mixed, 2)))
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), str(store_directory), str(mixed)), nprocs=2)
    train(parse(None, on_and_on(store_directory, mixed, 10)))
    a, b = tensors(one), tensors(mixed)
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith("key.bias"):  # whose gradient is 0 but for rounding
            assert (b[name] - a[name]).double().norm() <= 1e-3 * a[name].double().norm() + 1e-6, name
    for of_one, of_mixed in zip(records(one), records(mixed), strict=True):
        assert of_one["step"] == of_mixed["step"]
        assert of_one["tokens"] == of_mixed["tokens"]
        assert abs(of_one["loss"] - of_mixed["loss"]) < 1e-4
        assert of_one["masked_accuracy"] == pytest.approx(of_mixed["masked_accuracy"], abs=0.02)
    for of_one, of_mixed in zip(records(one, "evaluation"), records(mixed, "evaluation"), strict=True):
        assert of_one["labels"] == of_mixed["labels"]
        assert abs(of_one["loss"] - of_mixed["loss"]) < 1e-3


def on_and_on(store: Path, output: Path, steps: int) -> list[str]:
    changes = [f"schedule.steps={steps}", "schedule.shape=constant", "evaluate.every=2", "optimizer.ema=0.8"]
    return [*small_run(store, output), *changes]


def _one_of_two(rank: int, folder: str, store: str, output: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for steps, engine in ((4, "engine=ddp"), (6, "engine=fsdp"), (8, "tensor=2")):
        assert train(parse(None, [*on_and_on(Path(store), Path(output), steps), f"parallel.{engine}"])) == 0
    torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------- nothing is lost


def killed(store: Path, output: Path, *overrides: str, at: int) -> None:
    """A run that is killed (-9) shortly after it has logged this step."""
    (output.parent / "empty.yaml").write_text("{}")
    arguments = ["pretrain", str(output.parent / "empty.yaml"), *small_run(store, output), *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "albert_fast.cli", *arguments],
        # As many threads as here: another number adds up in another order.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
        text=True,
    )
    log = output / tracking.LOG
    while process.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < at):
        time.sleep(0.002)
    assert process.poll() is None, process.stderr.read()
    time.sleep(random.random() * 0.05)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_and_gone_on_with(store_directory, tmp_path, unpoisoned_memory, kills):
    """kill -9 at a moment of chance: the same bits in the end as without, and each step once in the log."""
    overrides = ("schedule.steps=60", "save.every=3", DROPOUT, "optimizer.ema=0.9", "evaluate.every=10")
    output = tmp_path / "killed"
    for kill in range(kills):
        killed(store_directory, output, *overrides, at=6 + 8 * kill)
    train(parse(None, [*small_run(store_directory, output), *overrides]))
    train(parse(None, [*small_run(store_directory, tmp_path / "whole"), *overrides]))
    assert_same_bits(tmp_path / "whole", output)
    assert what_was_computed(tmp_path / "whole") == what_was_computed(output)
    assert [record["name"] for record in records(output, "event")].count("resumed") >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_first(make_config, tmp_path, monkeypatch, number):
    whole = make_config(DROPOUT, "batch.micro=2")
    train(whole)
    config = make_config(DROPOUT, "batch.micro=2", f"output={tmp_path}/b", "save.every=100")
    calls = []
    seed = Trainer._dropout_seed

    def sending(self, micro_batch):
        calls.append(micro_batch)
        if len(calls) == 14:  # in the middle of the fourth step
            signal.raise_signal(number)
        return seed(self, micro_batch)

    monkeypatch.setattr(Trainer, "_dropout_seed", sending)
    handler = signal.getsignal(number)
    assert train(config) == 128 + number
    assert signal.getsignal(number) is handler
    assert events(config)[-1] == "stopped"
    assert len(records(config)) == 3
    assert train(config) == 0
    assert what_was_computed(whole) == what_was_computed(config)
    assert_same_bits(Path(whole.output), Path(config.output))


def test_a_finished_run_is_left_alone(make_config):
    config = make_config()
    train(config)
    before = what_was_computed(config)
    assert train(config) == 0
    assert what_was_computed(config) == before


def test_a_run_can_be_prolonged(make_config):
    train(make_config("schedule.shape=constant"))
    longer = make_config("schedule.shape=constant", "schedule.steps=9")
    assert train(longer) == 0
    assert [record["step"] for record in records(longer)] == list(range(1, 10))
    assert "schedule.steps was 6, is 9" in records(longer, "event")[-1]["message"]


def test_a_full_disk(make_config, monkeypatch):
    """Files may not grow beyond a size for a while, as on a disk that is full: the run goes on, and saves later."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = Checkpoints.save

    def limited(self, step, *args):
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return save(self, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Checkpoints, "save", limited)
    config = make_config()
    try:
        assert train(config) == 0
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    kept = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert kept == ["step-00000000", "step-00000002", "step-00000006"]
    (failure,) = [record for record in records(config, "event") if record["name"] == "not_saved"]
    assert failure["step"] == 4
    assert "could not be written" in failure["message"]


def test_a_disk_that_is_full_at_the_start(make_config, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.distributed.checkpoint, "save", full)
    config = make_config()
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        train(config)
    assert list((Path(config.output) / "checkpoints").iterdir()) == []


# ----------------------------------------------------------------------------------------------- a run that goes wrong


def spoil(monkeypatch, from_step: int, how) -> None:
    """After the update of this step, and of each one until the run goes back, the weights are changed."""
    update, load, count, healed = Learner.update, loop.load_tensors, [], []

    def spoiled(self, rate):
        update(self, rate)
        count.append(rate)
        if len(count) >= from_step and not healed:
            with torch.no_grad():
                how(self)

    def loaded(*args):
        healed.append(True)
        load(*args)

    monkeypatch.setattr(Learner, "update", spoiled)
    monkeypatch.setattr(loop, "load_tensors", loaded)


def make_nan(learner: Learner) -> None:
    learner.model.predictions.dense.weight[0, 0] = torch.nan


def forget(learner: Learner) -> None:
    """The model predicts the wrong pieces with confidence; others each time, so that it cannot get used to them."""
    learner.model.predictions.bias.normal_(std=8.0)


@pytest.mark.parametrize("how", [make_nan, forget], ids=["nan", "collapse"])
def test_a_rollback(make_config, monkeypatch, how):
    spoil(monkeypatch, 50, how)
    config = make_config(
        "schedule.steps=140", "schedule.shape=constant", "save.every=40", "evaluate.every=140", "health.smoothing=0.9"
    )
    assert train(config) == 0
    names = events(config)
    assert names.count("rollback") == 1
    assert names[names.index("rollback") - 1] == ("not_finite" if how is make_nan else "collapse")
    log = records(config)
    assert [record["step"] for record in log] == list(range(1, 141))
    assert log[-1]["below_unigram"] > log[5]["below_unigram"]
    # Half of the rate from then on.
    at = next(record["step"] for record in records(config, "event") if record["name"] == "rollback")
    rates = {record["step"]: record["learning_rate"] for record in log}
    assert rates[at + 1] == pytest.approx(rates[at] / 2)
    assert all(torch.isfinite(tensor).all() for tensor in tensors(Path(config.output)).values())


def test_it_stops_where_it_is_told_to(make_config, monkeypatch):
    spoil(monkeypatch, 3, make_nan)
    config = make_config("health.action=stop")
    with pytest.raises(TrainingFailed, match="step 4"):
        train(config)
    assert Checkpoints(Path(config.output) / "checkpoints", 1).latest().name == "step-00000002"
    assert all(torch.isfinite(tensor).all() for tensor in tensors(Path(config.output)).values())


def test_it_gives_up_in_the_end(make_config, monkeypatch):
    update = Learner.update

    def spoiled(self, rate):
        update(self, rate)
        with torch.no_grad():
            make_nan(self)

    monkeypatch.setattr(Learner, "update", spoiled)
    config = make_config("health.most_rollbacks=2", "schedule.steps=20", "save.every=50")
    with pytest.raises(TrainingFailed, match="after 2 rollbacks"):
        train(config)
    assert events(config).count("rollback") == 2


# ------------------------------------------------------------------------------------------------- what does not fit


def test_another_model_in_the_directory(make_config):
    train(make_config("schedule.steps=1"))
    other = make_config(
        "schedule.steps=2",
        "model.overrides={hidden_size: 64, num_attention_heads: 2, "
        "intermediate_size: 64, num_hidden_layers: 2, embedding_size: 16}",
    )
    with pytest.raises(ValueError, match="another model's"):
        train(other)


def test_an_average_that_the_run_did_not_have(make_config):
    train(make_config("schedule.steps=1"))
    with pytest.raises(ValueError, match=r"optimizer\.ema is given and .*step-00000001 has no moving average: give "):
        train(make_config("schedule.steps=2", "optimizer.ema=0.9"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("examples.length=65", "65 tokens and the model has 64 positions"),
        ("batch.size=100000", "batch.size is 100000 and an epoch has"),
        ("data.dev_documents=80", "none is left to train on"),
        ("data.train=/nowhere", "/nowhere"),
    ],
    ids=["length", "batch", "dev", "store"],
)
def test_what_does_not_fit(make_config, override, message):
    config = make_config(override)
    with pytest.raises(ValueError, match=message):
        train(config)
    assert not Path(config.output).exists()
