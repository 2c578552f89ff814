"""`albert-fast bench` from its options to its report, on models that take no time."""

import argparse
import json

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertModel, cli
from albert_fast.bench import parity, peers, run
from albert_fast.bench.arguments import DEFAULT_PEERS, PEERS, Shape, add_to, options_from
from albert_fast.bench.data import Batch, load_tokenizer, make_batch, read_text
from albert_fast.bench.flops import flops
from albert_fast.bench.peers.albert_fast import AlbertFast
from albert_fast.bench.report import markdown, print_report
from albert_fast.bench.worker import Worker, WorkerError, interleave

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 2100,
    "embedding_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def config() -> AlbertConfig:
    return AlbertConfig(**TINY)


@pytest.fixture
def config_file(config, tmp_path):
    config.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny" / "config.json")


@pytest.fixture(scope="session")
def text():
    return read_text(())


@pytest.fixture(scope="session")
def tokenizer(text):
    return load_tokenizer(None, text)


@pytest.fixture
def batch(tokenizer, text) -> Batch:
    return make_batch(tokenizer, text, Shape(5, 24, ragged=True))


def options(*arguments: str):
    parser = argparse.ArgumentParser()
    add_to(parser)
    return options_from(parser.parse_args(arguments))


# ------------------------------------------------------------------------------------------------------------- options


def test_options():
    chosen = options("--shapes", "8x128, 4x16:ragged,8x128", "--mode", "training", "--threads", "3")
    assert chosen.shapes == (Shape(8, 128), Shape(4, 16, ragged=True))
    assert (chosen.modes, chosen.threads, chosen.repeats) == (("training",), 3, None)
    assert str(chosen.shapes[1]) == "4x16:ragged"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8"], "--shapes has '8'"),
        (["--shapes", ""], "--shapes is ''"),
        (["--shapes", "8x2"], "at least 3 tokens"),
        (["--dtype", "int3"], "--dtype has 'int3'"),
        (["--compare", "albert_fast,abacus"], "--compare has 'abacus'"),
        (["--threads", "0"], "--threads is '0'"),
        (["--repeats", "many"], "--repeats is 'many'"),
        (["--device", "tpu"], "--device has 'tpu'"),
        (["--config", "tiny"], "--config is 'tiny'"),
        (["--model", "nowhere"], "--model is 'nowhere'"),
        (["--text", "nowhere.txt"], "--text is 'nowhere.txt'"),
        (["--json", "nowhere/report.json"], "--json is 'nowhere/report.json'"),
        (["--shapes", "1x513"], "512 positions"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("shape", [Shape(3, 50), Shape(6, 40, ragged=True), Shape(16, 128, ragged=True)])
def test_batches_are_real_text(shape, tokenizer, text):
    batch, again = (make_batch(tokenizer, text, shape) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch.inputs().values(), again.inputs().values(), strict=True))
    assert batch.input_ids.shape == (shape.rows, shape.length)
    assert batch.lengths == batch.attention_mask.sum(dim=1).tolist()
    assert batch.fill == pytest.approx(0.4, abs=0.03) if shape.ragged else batch.fill == 1.0
    assert len(set(batch.lengths)) > 1 or not shape.ragged
    assert batch.labelled == max(1, round(0.15 * batch.tokens))
    labelled = batch.labels != -100
    assert (batch.input_ids[labelled] == tokenizer.mask_token_id).all()
    assert not labelled[batch.attention_mask == 0].any()
    restored = torch.where(labelled, batch.labels, batch.input_ids)[0, 1 : batch.lengths[0] - 1].tolist()
    assert tokenizer.unk_token_id not in restored
    assert len(tokenizer.decode(restored).split()) > 3


def test_the_users_own_text(tmp_path, tokenizer):
    file = tmp_path / "text.txt"
    file.write_text("One paragraph.\nIts second line.\n\n\nAnother one.\n")
    text = read_text([str(file)])
    assert text.paragraphs == ["One paragraph. Its second line.", "Another one."]
    with pytest.raises(ValueError, match="too little text"):
        make_batch(tokenizer, text, Shape(8, 128))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text([str(file)])
    file.write_text(" \n\n ")
    with pytest.raises(ValueError, match="no text"):
        read_text([str(file)])


def test_flops_are_those_that_torch_counts(config, batch):
    model = AlbertModel(config, add_pooling_layer=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch.inputs(), output_attentions=True)
    assert counter.get_total_flops() == flops(config, batch.lengths, training=False, labelled=0)


def test_flops_of_the_published_table():
    """ALBERT-base trains a sequence of 512 tokens, 15 % of them predicted, in 0.292 TFLOP."""
    assert flops(AlbertConfig.base(), [512], training=True, labelled=77) == pytest.approx(0.292e12, rel=2e-3)


# -------------------------------------------------------------------------------------------------------------- parity


def test_the_options_name_every_peer():
    assert set(PEERS) == set(peers.PEERS)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", [n if n in DEFAULT_PEERS else pytest.param(n, marks=pytest.mark.slow) for n in PEERS])
def test_every_peer_is_right(name, mode, config, batch):
    state = AlbertForMaskedLM(config).state_dict()
    expected = parity.oracle(config, state, batch, mode)
    peer = peers.PEERS[name]()
    served = 0
    for dtype, bound in (("float64", 1e-12), ("float32", 1e-4), ("bfloat16", 0.1), ("int8", 0.1)):
        if peer.refuses(mode, dtype, "cpu") is None:
            peer.build(config, state, dtype, CPU, batch)
            assert parity.error(parity.results(peer, batch, mode), expected) < bound, dtype
            served += 1
    if served == 0:
        pytest.skip(peer.refuses(mode, "float32", "cpu"))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_oracle_does_not_depend_on_its_chunks(mode, config, batch, monkeypatch):
    state = AlbertForMaskedLM(config).state_dict()
    at_once = parity.oracle(config, state, batch, mode)
    monkeypatch.setattr(parity, "_CHUNK_TOKENS", 1)
    by_rows = parity.oracle(config, state, batch, mode)
    assert at_once.keys() == by_rows.keys()
    assert parity.error(by_rows, at_once) < 1e-12


def test_a_missing_or_broken_result_is_an_error():
    expected = {"loss": torch.tensor(2.0), "weight": torch.ones(3)}
    assert parity.error(expected, expected) == 0.0
    assert parity.error({"loss": torch.tensor(2.0)}, expected) == float("inf")
    assert parity.error({**expected, "weight": torch.tensor([1.0, float("nan"), 1.0])}, expected) == float("inf")
    assert parity.error({**expected, "loss": torch.tensor(2.2)}, expected) == pytest.approx(0.1)


def test_who_is_wrong_or_absent_gets_no_figure(config_file, monkeypatch):
    class Absent(AlbertFast):
        name = "absent"
        packages = ("abacus_of_nowhere",)

    class Wrong(Worker):
        """Right but for one row of hidden states, and one gradient."""

        def results(self):
            results = super().results()
            if self.peer == "reference":
                for name in {"hidden states", "predictions.bias"} & set(results):
                    results[name][0] += 0.01
            return results

    monkeypatch.setitem(peers.PEERS, "absent", Absent)
    monkeypatch.setattr(run, "Worker", Wrong)
    arguments = ["--config", config_file, "--shapes", "2x16", "--repeats", "1"]
    chosen = run.replace(options(*arguments), compare=("albert_fast", "reference", "absent"))
    console = Console(record=True, width=100)
    report = run.run(chosen, console)
    for work in report["works"]:
        ours, wrong, absent = work["rows"]
        assert ours["passed"]
        assert ours["milliseconds"] > 0.0
        assert ours["speedup"] == 1.0
        assert wrong["passed"] is False
        assert "at most" in wrong["reason"]
        assert absent["passed"] is None
        for row in (wrong, absent):
            assert (row["milliseconds"], row["speedup"], row["times_floor"], row["tokens_per_second"]) == (None,) * 4
    print_report(report, console)
    printed = console.export_text()
    assert "WRONG" in printed
    assert "abacus_of_nowhere not installed" in printed


# -------------------------------------------------------------------------------------------------------------- timing


class Clock:
    """Stands in for a worker: its call takes one second more each time."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls, self.now = name, calls, 0.0

    def seconds(self) -> float:
        self.calls.append(self.name)
        self.now += 1.0
        return self.now


def test_calls_take_turns():
    calls, told = [], []
    seconds = interleave({name: Clock(name, calls) for name in "ab"}, 3, told.append)
    assert "".join(calls) == "ab" * 3
    assert told == calls
    assert seconds == {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}


def test_a_worker_computes_what_its_peer_does(config, batch):
    state = AlbertForMaskedLM(config).state_dict()
    worker = Worker("albert_fast", config, state, batch, "training", "float32")
    try:
        results, seconds, peak = worker.results(), worker.seconds(), worker.peak_bytes()
    finally:
        worker.close()
    peer = AlbertFast()
    peer.build(config, state, "float32", CPU, batch)
    expected = parity.results(peer, batch, "training")
    assert results.keys() == expected.keys()
    assert parity.error(results, expected) < 1e-6
    assert 0.0 < seconds < 60.0
    assert peak is None or peak > 100e6


def test_a_worker_that_fails_says_why(config):
    state = AlbertForMaskedLM(config).state_dict()
    too_long = Batch(*[torch.zeros(1, 640).long()] * 4, [640])
    worker = Worker("albert_fast", config, state, too_long, "inference", "float32")
    try:
        with pytest.raises(WorkerError, match=r"albert_fast failed: .*640"):
            worker.results()
    finally:
        worker.close()


# --------------------------------------------------------------------------------------------------------- all of it


def test_the_command(config_file, tmp_path, capsys):
    file = tmp_path / "report.json"
    arguments = ["--config", config_file, "--shapes", "2x16,3x24:ragged", "--dtype", "float32,bfloat16"]
    assert cli.main(["bench", *arguments, "--repeats", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert len(report["works"]) == 2 * 2 * 2
    for work in report["works"]:
        assert [row["peer"] for row in work["rows"]] == list(DEFAULT_PEERS)
        for row in work["rows"]:
            assert row["passed"] or row["reason"]
            assert row["milliseconds"] is None or len(row["all_milliseconds"]) == 2
        assert f"{work['mode']} {work['shape']}" in printed
    assert "pydoc_data.topics" in printed
    assert markdown(report).count("\n| ") >= 8 * 4


def test_a_model_and_its_vocabulary(tmp_path, tokenizer, capsys):
    model = AlbertForMaskedLM(AlbertConfig(**{**TINY, "hidden_dropout_prob": 0.1}))
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--shapes", "2x16", "--repeats", "1"]
    assert cli.main(["bench", *arguments, "--compare", "albert_fast"]) == 0
    tokenizer.save_pretrained(tmp_path / "model")
    assert cli.main(["bench", *arguments, "--compare", "albert_fast", "--layers", "1"]) == 0
    assert "1 passes" in capsys.readouterr().out
    AlbertForMaskedLM(AlbertConfig(**{**TINY, "vocab_size": 100})).save_pretrained(tmp_path / "small")
    assert cli.main(["bench", "--model", str(tmp_path / "small"), "--shapes", "2x16"]) == 2
    assert "pieces" in capsys.readouterr().err
