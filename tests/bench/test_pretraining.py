"""`albert-fast bench --pretrain`: the same rows, the same losses, and what is timed, on models that take no time."""

import argparse
import importlib.util
import json

import pytest
import torch
from rich.console import Console

from albert_fast import AlbertConfig, AlbertForPreTraining, cli
from albert_fast import flops as floating
from albert_fast.bench import pretraining, run
from albert_fast.bench.arguments import PRETRAINING, Shape, add_to, options_from
from albert_fast.bench.data import load_tokenizer, read_text
from albert_fast.bench.pretraining import LIMIT_AFTER_STEPS, OURS, THEIRS, Turns, train_ours, train_theirs
from albert_fast.bench.work import Work

CPU = torch.device("cpu")
SHAPES = [Shape(6, 32), Shape(6, 32, ragged=True)]
CONFIG = AlbertConfig(
    vocab_size=2100,
    embedding_size=8,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=64,
    classifier_dropout_prob=0.0,
)


@pytest.fixture(scope="module")
def text():
    return read_text(())


@pytest.fixture(scope="module")
def tokenizer(text):
    return load_tokenizer(None, text)


@pytest.fixture(scope="module")
def batches(tokenizer, text):
    return {shape: pretraining.make_batches(tokenizer, text, shape) for shape in SHAPES}


@pytest.fixture
def state():
    return AlbertForPreTraining(CONFIG).state_dict()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pretraining, "TURN", 0.0)
    monkeypatch.setattr(floating, "_CPU_SIZES", ((64, 64, 64),))
    monkeypatch.setattr(floating, "_PROBE_SECONDS", 0.0)


def carry_out(peer, orders, config, state, batches):
    """The answers of a peer to these orders, in this process."""
    if peer == THEIRS:
        for package in ("transformers", "accelerate", "datasets"):
            pytest.importorskip(package)
    answers = []
    turns = Turns(iter(orders), answers.append, len(batches), CPU)
    with pytest.raises(SystemExit):
        (train_ours if peer == OURS else train_theirs)(config, state, batches, CPU, turns)
    return answers


class Here:
    """Stands in for a process: all that it will be asked for is done at once."""

    def __init__(self, peer, config, state_dict, batches, device):
        self.answers = carry_out(peer, ["losses", "call", "peak"], config, state_dict, batches)

    def losses(self):
        return self.answers[0]

    def seconds(self):
        return self.answers[1]

    def peak_bytes(self):
        return self.answers[2]

    def close(self):
        pass


def new_work(shape=SHAPES[0]) -> Work:
    return Work(PRETRAINING, "float32", str(shape), 100, 1.0, 10, 1.0, 0.1, None, [])


# ------------------------------------------------------------------------------------------------------ options, data


def test_options():
    parser = argparse.ArgumentParser()
    add_to(parser)
    options = options_from(parser.parse_args(["--pretrain"]))
    assert (options.modes, options.dtypes, options.compare) == ((PRETRAINING,), ("float32",), (OURS, THEIRS))
    assert [shape.ragged for shape in options.shapes] == [False, True]
    options = options_from(parser.parse_args(["--pretrain", "--shapes", "4x512:ragged"]))
    assert options.shapes == (Shape(4, 512, ragged=True),)
    assert not options_from(parser.parse_args([])).pretrain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "training"], "--pretrain and --mode"),
        (["--dtype", "bfloat16"], "--pretrain and --dtype"),
        (["--compare", "albert_fast"], "--pretrain and --compare"),
        (["--shapes", "2x7"], "--shapes has '2x7'"),
        (["--shapes", "90000x128"], "too little text"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line(arguments, message, tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    assert cli.main(["bench", "--pretrain", "--config", str(tmp_path / "config.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("shape", [Shape(8, 128), Shape(8, 128, ragged=True)], ids=str)
def test_batches(shape, tokenizer, text):
    first, again = (pretraining.make_batches(tokenizer, text, shape) for _ in range(2))
    assert [batch.input_ids.tolist() for batch in first] == [batch.input_ids.tolist() for batch in again]
    assert first[0].input_ids.tolist() != first[1].input_ids.tolist()
    assert [batch.rows for batch in first] == [8, 8]
    fill = sum(pretraining.lengths(first)) / (16 * 128)
    assert 0.6 < fill < 0.85 if shape.ragged else fill == 1.0
    assert pretraining.labelled(first) == pytest.approx(0.15 * 16 * 128 * fill, rel=0.1)
    assert all(batch.sentence_order_label is not None for batch in first)


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_do_the_same_steps(shape, state, batches, monkeypatch):
    """At a rate at which the losses of four passes tell whether gradients, clipping and AdamW are the same."""
    monkeypatch.setattr(pretraining, "LEARNING_RATE", 0.01)
    expected = pretraining.oracle(CONFIG, state, batches[shape][0], CPU)
    orders = ["losses"] * 4
    ours, theirs = (torch.tensor(carry_out(peer, orders, CONFIG, state, batches[shape])) for peer in (OURS, THEIRS))
    assert ours[0, 0] == pytest.approx(expected, rel=1e-6)
    assert (ours[0] - ours[3]).min() > 0.2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        pytest.param([8.0 * (1 + 2e-4), 8.0], "its first loss is 8.001600, off by 2.0e-04", id="first"),
        pytest.param([float("nan"), 8.0], "its first loss is nan", id="nan"),
        pytest.param([8.0, 8.0 * (1 + 2 * LIMIT_AFTER_STEPS)], "after 1 steps its loss is 8.016", id="after steps"),
        pytest.param([8.0, float("nan")], "after 1 steps its loss is nan", id="nan after steps"),
    ],
)
def test_who_is_wrong_gets_no_figure(losses, says, state, batches, monkeypatch):
    class Fixed:
        def __init__(self, peer, *rest):
            self.of = losses if peer == THEIRS else [8.0, 8.0]

        def losses(self):
            return self.of

        def seconds(self):
            return 0.5

        def peak_bytes(self):
            return None

        def close(self):
            pass

    monkeypatch.setattr(pretraining, "Trained", Fixed)
    monkeypatch.setattr(pretraining, "refuses", lambda peer: None)
    monkeypatch.setattr(pretraining, "oracle", lambda *rest: 8.0)
    work = new_work()
    pretraining.compare(work, CONFIG, state, batches[SHAPES[0]], CPU, 1)
    ours, theirs = work.rows
    assert ours.passed
    assert (ours.milliseconds, ours.tokens_per_second, ours.speedup) == (500.0, 200.0, 1.0)
    assert theirs.passed is False
    assert says in theirs.reason
    assert (theirs.milliseconds, theirs.tokens_per_second, theirs.speedup) == (None,) * 3


def test_without_the_trainer(state, batches, monkeypatch):
    absent = lambda package: None if package == "accelerate" else object()  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.setattr(pretraining, "Trained", Here)
    work = new_work()
    pretraining.compare(work, CONFIG, state, batches[SHAPES[0]], CPU, 1)
    ours, theirs = work.rows
    assert ours.milliseconds > 0.0
    assert theirs.passed is None
    assert theirs.reason == "accelerate not installed: pip install accelerate"


# -------------------------------------------------------------------------------------------------------------- timing


def test_turns(monkeypatch):
    """Three passes of two steps: the first does not count, and a turn lasts until the others took long enough."""
    now, lasts = 0.0, iter([5.0, 5.0, 0.1, 0.1, 0.3, 0.4, 0.1, 0.3, 9.0, 9.0])
    monkeypatch.setattr(pretraining, "TURN", 1.0)
    monkeypatch.setattr(pretraining.time, "perf_counter", lambda: now)
    answers = []
    turns = Turns(iter(["losses", "call", "peak", "call"]), answers.append, 2, CPU)
    for step, seconds in enumerate(lasts):
        turns.begin()
        now += seconds
        turns.end(torch.tensor(float(step)))
    with pytest.raises(SystemExit):
        turns.begin()
    losses, short, peak, long = answers
    assert losses == [0.0, 1.0]
    assert short == pytest.approx((0.7 + 0.4) / 2 / 2)
    assert peak is None or peak > 10**6
    assert long == pytest.approx(9.0)


# --------------------------------------------------------------------------------------------------------- all of it


@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "processes"])
def test_the_command(processes, tmp_path, capsys, monkeypatch):
    for package in ("transformers", "accelerate", "datasets"):
        pytest.importorskip(package)
    if not processes:
        monkeypatch.setattr(pretraining, "Trained", Here)
    CONFIG.save_pretrained(tmp_path)
    file = tmp_path / "report.json"
    shapes = ",".join(map(str, SHAPES))
    arguments = ["--config", str(tmp_path / "config.json"), "--shapes", shapes, "--repeats", "2", "--json", str(file)]
    assert cli.main(["bench", "--pretrain", *arguments]) == 0
    printed = capsys.readouterr().out
    full, ragged = json.loads(file.read_text())["works"]
    assert full["fill"] == 1.0
    assert ragged["fill"] < 0.97
    for work in (full, ragged):
        assert work["mode"] == PRETRAINING
        assert work["labelled"] == pytest.approx(0.15 * work["tokens"], rel=0.3)
        assert work["floor_milliseconds"] > 0.0
        for row, peer in zip(work["rows"], (OURS, THEIRS), strict=True):
            assert row["peer"] == peer
            assert row["passed"], row["reason"]
            assert len(row["all_milliseconds"]) == 2
            assert row["tokens_per_second"] == pytest.approx(work["tokens"] / row["milliseconds"] * 1e3)
    assert "float32 pretraining 6x32" in printed
    assert f"{ragged['fill']:.0%} real, {ragged['labelled']} labels" in printed


def test_floors_are_of_one_step(tmp_path, tokenizer, text, monkeypatch):
    """Of a batch that comes twice, so that a step is known."""
    CONFIG.save_pretrained(tmp_path)
    batch = pretraining.make_batches(tokenizer, text, SHAPES[1])[0]
    monkeypatch.setattr(pretraining, "make_batches", lambda *rest: [batch, batch])
    monkeypatch.setattr(pretraining, "Trained", Here)
    monkeypatch.setattr(pretraining, "refuses", lambda peer: "absent" if peer == THEIRS else None)
    parser = argparse.ArgumentParser()
    add_to(parser)
    options = options_from(
        parser.parse_args(
            ["--pretrain", "--config", str(tmp_path / "config.json"), "--shapes", "6x32", "--repeats", "1"]
        )
    )
    (work,) = run.run(options, Console(quiet=True))["works"]
    labelled = int((batch.labels != -100).sum())
    assert (work["tokens"], work["labelled"]) == (batch.tokens, labelled)
    rows = batch.cu_seqlens.diff().tolist()
    assert work["gflop"] == pytest.approx(floating.flops(CONFIG, rows, True, labelled).total / 1e9)
