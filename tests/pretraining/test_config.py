"""The configuration of a run: presets, YAML, key=value, and what each mistake is answered with."""

import dataclasses
import json

import pytest

from albert_fast import AlbertConfig
from albert_fast.pretraining import config
from albert_fast.pretraining.config import ModelOptions, RowOptions, parse
from albert_fast.training.configuration import write
from albert_fast.training.options import SCHEDULES, ScheduleOptions
from albert_fast.training.schedules import Warmup

NEEDED = ["output=runs/x", "data.train=store"]


def test_the_presets_are_the_released_models():
    released = {f"{shape}-v{version}" for shape in ("base", "large", "xlarge", "xxlarge") for version in (1, 2)}
    assert set(config.preset_names()) == released | {"tiny", "small"}
    for name in config.preset_names():
        options = parse(name, NEEDED)
        options.check_complete()
        shape = options.model.build(30000)
        if name in ("tiny", "small"):
            assert (shape.hidden_size, shape.num_hidden_layers) == {"tiny": (128, 2), "small": (256, 4)}[name]
            continue
        named, version = name.split("-v")
        assert shape == getattr(AlbertConfig, named)(int(version))
        # The paper's recipe (section 4.1).
        assert options.batch.size == 4096
        assert options.examples.length == 512
        assert options.examples.order == "sop"
        assert options.examples.masking.strategy == "ngram"
        assert options.optimizer.name == "lamb"
        assert options.optimizer.learning_rate == 1.76e-3
        assert options.schedule.steps == (125_000 if version == "1" else 10_000_000 if named == "base" else 3_000_000)
        assert round(options.schedule.warmup * options.schedule.steps) == 3125
        assert options.batch.size % (8 * options.batch.micro) == 0


def test_the_original_schedule():
    """Of 125,000 steps with 3,125 of warm-up, to which training.md gives numbers."""
    options = parse("base-v1", NEEDED)
    rate = options.schedule.rate()
    assert 1.76e-3 * rate(3124 / 125_000) == pytest.approx(1.75944e-3, rel=1e-5)
    assert 1.76e-3 * rate(3125 / 125_000) == pytest.approx(1.71600e-3, rel=1e-5)


def test_a_file_and_what_overrides_it(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("""
output: here
data: {train: store}
batch: {size: 64, micro: 8, stages: [[0.9, 128], [0.1, 512]]}
examples: {masking: {strategy: span, max_span: 5, split: [0.5, 0.25, 0.25]}}
schedule: {steps: 100}
""")
    options = parse(path, ["batch.size=128", "optimizer.betas=[0.9, 0.98]", "model.overrides={num_hidden_layers: 3}"])
    assert options.output == "here"
    assert options.batch.size == 128
    assert options.batch.micro == 8
    assert options.stages(0.95) == 512
    assert options.examples_of(512).length == 512
    assert options.examples.masking.max_span == 5
    assert options.optimizer.betas == (0.9, 0.98)
    assert options.model.build(1000).num_hidden_layers == 3


def test_what_is_written_is_read(tmp_path):
    options = parse("tiny", [*NEEDED, "batch.stages=[[0.5, 64], [0.5, 128]]", "seed=3"])
    write(options, tmp_path / "config.yaml")
    assert parse(tmp_path / "config.yaml") == options
    assert json.loads((tmp_path / "config.yaml").read_text())["seed"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.siz=3", "batch.siz"),
        ("batch.size=x", "batch.size"),
        ("batch.size=0", "batch.size is 0; at least 1"),
        ("nonsense", "key=value was expected"),
        ("optimizer.name=sgd", "optimizer.name is 'sgd'; one of lamb, adamw"),
        ("schedule.shape=linear", "schedule.shape is 'linear'; one of albert, constant"),
        ("examples.masking.rate=2", "rate is 2"),
        ("examples.masking.strategy=all", "strategy is 'all'"),
        ("parallel.engine=deepspeed", "parallel.engine is 'deepspeed'; one of ddp, fsdp"),
        ("precision=float16", "precision is 'float16'; one of float32, bfloat16"),
        ("model.shape=huge", "model.shape is 'huge'; base, large"),
        ("model.recompute=all", "model.recompute is 'all'"),
        ("batch.stages=[[0.5, 128]]", "1, the whole run, was expected"),
        ("optimizer.clip=0", "optimizer.clip is 0"),
        ("optimizer.ema=1", "optimizer.ema is 1"),
        ("health.action=hope", "health.action is 'hope'; one of rollback, stop"),
        (
            "model.overrides={num_hidden_layer: 3}",
            "has 'num_hidden_layer', which AlbertConfig has not: the nearest is ",
        ),
        ("save.keep=0", "save.keep is 0"),
        ("save.seconds=-1", "save.seconds is -1"),
        ("batch.start=0", "batch.start is 0"),
        ("batch.ramp=2", "batch.ramp is 2"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas is (0.9, 1.0)"),
        ("schedule.warmup=-1", "schedule.warmup is -1"),
        ("schedule.warmup=0.8", "schedule.warmup is 0.8 and schedule.decay 0.3; together at most 1"),
        ("schedule.decay=0", "schedule.decay is 0"),
        ("schedule.floor=2", "schedule.floor is 2"),
        ("schedule.power=0", "schedule.power is 0"),
        ("schedule.seconds=-1", "schedule.seconds is -1"),
        ("schedule.steps=5", "schedule.steps is 5 and schedule.seconds is 120.0; exactly one of them"),
        ("log.every=0", "log.every is 0"),
    ],
)
def test_mistakes(override, message):
    with pytest.raises(ValueError) as failure:
        parse("tiny", [override])
    assert message in str(failure.value)
    assert "\n" not in str(failure.value)


def test_both_kinds_of_held_out_text():
    with pytest.raises(ValueError, match="at most one was expected"):
        parse("tiny", ["data.dev=x", "data.dev_documents=3"])


def test_an_exponential_ends_above_nothing():
    with pytest.raises(ValueError, match=r"schedule\.floor is 0, which an exponential never reaches"):
        parse("tiny", ["schedule.shape=exponential", "schedule.floor=0"])
    assert parse("tiny", ["schedule.shape=exponential"]).schedule.rate()(1.0) == 0.01


def test_steps_and_seconds():
    assert parse("tiny", ["schedule.steps=5", "schedule.seconds=null"]).schedule.budget().steps == 5


def test_no_such_file():
    with pytest.raises(ValueError, match=r"is no file and no preset; .*base-v1, .*tiny"):
        parse("tiny-v3")


def test_what_is_missing():
    for given, message in (([], "output is not given"), (["output=x"], "data.train is not given")):
        with pytest.raises(ValueError, match=message):
            parse("tiny", given).check_complete()
    with pytest.raises(ValueError, match="exactly one"):
        parse(None, NEEDED).check_complete()


def test_micro_batches_of_all_ranks():
    assert RowOptions(size=64, micro=8).ramped(2).multiple == 16
    assert RowOptions(size=64).ramped(4).multiple == 64
    assert RowOptions(size=64, micro=100).ramped(2).multiple == 64
    with pytest.raises(ValueError, match="a multiple of the 3 ranks"):
        RowOptions(size=64).ramped(3)
    with pytest.raises(ValueError, match=r"batch\.micro is 24 and each rank has 32 rows of batch\.size 64"):
        RowOptions(size=64, micro=24).ramped(2)
    for start in (24, 80):
        with pytest.raises(ValueError, match=rf"batch\.start is {start}; a multiple of 16, .* at most batch\.size 64"):
            RowOptions(size=64, micro=8, start=start).ramped(2)


@pytest.mark.parametrize("shape", SCHEDULES)
def test_each_schedule_rises_and_stays_in_range(shape):
    rate = ScheduleOptions(steps=10, shape=shape, warmup=0.2).rate()
    assert isinstance(rate, Warmup)
    values = [rate(i / 100) for i in range(101)]
    assert values[0] == 0
    assert max(values) <= 1
    assert min(values) >= 0
    assert values[10] == pytest.approx(0.5)
    assert shape == "constant" or values[100] < 0.02


def test_a_model_to_go_on_from(tmp_path):
    AlbertConfig.base(vocab_size=500).save_pretrained(tmp_path)
    options = ModelOptions(start_from=str(tmp_path), overrides={"hidden_dropout_prob": 0.1})
    assert options.build(500).hidden_dropout_prob == 0.1
    with pytest.raises(ValueError, match="vocab_size is 500 and the store's vocabulary has 600"):
        options.build(600)
    preset = parse("tiny", [*NEEDED, f"model.start_from={tmp_path}", "model.initialization=original"]).model
    with pytest.raises(ValueError, match=r"model\.overrides has embedding_size 64 and model\.start_from 128: give "):
        preset.build(500)
    for overrides in ("{}", "{num_hidden_layers: 12, hidden_dropout_prob: 0.1}"):
        given = [f"model.start_from={tmp_path}", "model.initialization=original", f"model.overrides={overrides}"]
        assert parse("tiny", [*NEEDED, *given]).model.build(500).num_hidden_layers == 12
    file = ModelOptions(shape=str(tmp_path / "config.json"))
    assert file.build(600) == dataclasses.replace(AlbertConfig.base(), vocab_size=600)


def test_the_keys_are_described():
    text = config.describe()
    for key in ("--batch.size", "--examples.masking.strategy", "--schedule.warmup", "--optimizer.ema"):
        assert key in text
