"""Peers as plug-ins: a user's file or an installed package, right, wrong or absent."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM, cli, flops, ops
from albert_fast.bench import parity, peers, rates, run, worker
from albert_fast.bench.arguments import DEFAULT_PEERS, TRAINERS, Shape, add_to, options_from
from albert_fast.bench.case import run_case
from albert_fast.bench.suites.ops import OPERATIONS, operation_case
from albert_fast.bench.suites.setting import lengths_of, random_batch

CONFIG = AlbertConfig(
    vocab_size=2100,
    embedding_size=8,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout_prob=0.0,
)
SHAPE = Shape(3, 24, ragged=True)
CPU = torch.device("cpu")

OPERATION_PEER = """
import torch
import torch.nn.functional as F
from albert_fast.bench.peers import OperationPeer

class Mine(OperationPeer):
    name = "mine"
    packages = {packages}

    def bias_gelu(self, x, bias, approximate):
        return F.gelu(x + bias, approximate=approximate) * {factor}
"""

MODEL_PEER = """
from albert_fast.bench.peers.albert_fast import Reference
from albert_fast.bench.peers.base import TorchPeer
from albert_fast import AlbertForMaskedLM

class Mine(TorchPeer):
    name = "mine"
    packages = {packages}

    def module(self, config):
        return AlbertForMaskedLM(config)

    def inference(self, batch):
        return super().inference(batch) * {factor}
"""


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """What a test adds is gone after it."""
    for name in ("PEERS", "OPERATION_PEERS"):
        monkeypatch.setattr(peers, name, dict(getattr(peers, name)))
    monkeypatch.setattr(peers, "PLUG_INS", {})
    monkeypatch.setattr("albert_fast.bench.suites.ops.OPERATION_PEERS", peers.OPERATION_PEERS)
    monkeypatch.setattr("albert_fast.bench.suites.model.PEERS", peers.PEERS)
    monkeypatch.setattr(flops, "_CPU_SIZES", ((64, 64, 64),))
    monkeypatch.setattr(flops, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(rates, "_COPY_SECONDS", 0.0)


def write(path, text: str, factor: float = 1.0, packages: tuple[str, ...] = ()) -> str:
    path.write_text(text.format(factor=factor, packages=packages))
    return str(path)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_an_operation_of_a_users_file(factor, mode, tmp_path):
    peers.add(write(tmp_path / "my_peer.py", OPERATION_PEER, factor))
    work = run_case(operation_case("bias_gelu", CONFIG, SHAPE, mode, turn=0.0), 2)
    rows = {row.peer: row for row in work.rows}
    assert list(rows) == ["albert_fast", "reference", "pytorch", "mine"]
    assert rows["albert_fast"].passed
    assert rows["mine"].passed is (factor == 1.0)
    figures = (rows["mine"].milliseconds, rows["mine"].speedup, rows["mine"].tokens_per_second)
    if factor == 1.0:
        assert all(figure > 0.0 for figure in figures)
        assert len(rows["mine"].all_milliseconds) == 2
    else:
        assert figures == (None, None, None)
        assert rows["mine"].error == pytest.approx(0.01, rel=0.5)
        assert "wrong: its error is" in rows["mine"].reason


def test_who_is_absent_is_listed_with_the_reason(tmp_path):
    peers.add(write(tmp_path / "my_peer.py", OPERATION_PEER, packages=("abacus_of_nowhere",)))
    row = run_case(operation_case("bias_gelu", CONFIG, SHAPE, "inference", turn=0.0), 1).rows[-1]
    assert (row.peer, row.passed, row.milliseconds) == ("mine", None, None)
    assert row.reason == "abacus_of_nowhere not installed: pip install abacus_of_nowhere"


def test_who_raises_is_marked_failed(tmp_path):
    text = OPERATION_PEER.replace("return F", "raise ArithmeticError('beads')\n        return F")
    peers.add(write(tmp_path / "my_peer.py", text))
    row = run_case(operation_case("bias_gelu", CONFIG, SHAPE, "inference", turn=0.0), 1).rows[-1]
    assert (row.peer, row.passed, row.milliseconds) == ("mine", False, None)
    assert row.reason == "ArithmeticError: beads"


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_model_of_a_users_file_in_the_command(factor, tmp_path, capsys):
    """In processes of their own: each learns of the file."""
    CONFIG.save_pretrained(tmp_path)
    file = write(tmp_path / "my_peer.py", MODEL_PEER, factor)
    report = tmp_path / "report.json"
    arguments = ["--config", str(tmp_path / "config.json"), "--shapes", "3x24", "--mode", "inference", "--repeats", "1"]
    status = cli.main(["bench", *arguments, "--compare", "albert_fast", "--peer", file, "--json", str(report)])
    (work,) = json.loads(report.read_text())["works"]
    ours, mine = work["rows"]
    assert status == 0  # only this package's own errors fail the command
    assert (ours["peer"], mine["peer"]) == ("albert_fast", "mine")
    assert ours["passed"]
    assert mine["passed"] is (factor == 1.0)
    assert (mine["speedup"] is None) is (factor != 1.0)
    assert ("WRONG" in capsys.readouterr().out) is (factor != 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has these peers: none; one class of Peer"),
        (OPERATION_PEER + "class Other(Mine):\n    name = 'other'\n", "has these peers: Mine, Other"),
        (OPERATION_PEER.replace('"mine"', '"pytorch"'), "is named 'pytorch', as another one is"),
        (OPERATION_PEER.replace('name = "mine"', ""), "Mine has no `name`"),
        ("import abacus_of_nowhere\n" + OPERATION_PEER, "name what it needs in `packages`"),
        ("\n\ndef abacus(:\n", "SyntaxError: invalid syntax (my_peer.py, line 3)"),
        ("ABACUS.beads\n" + OPERATION_PEER, "NameError: name 'ABACUS' is not defined"),
    ],
    ids=["none", "two", "taken", "nameless", "import", "syntax", "raises"],
)
def test_a_wrong_file_is_one_line(text, message, tmp_path, capsys):
    file = write(tmp_path / "my_peer.py", text)
    assert cli.main(["bench", "--suite", "ops", "--peer", file]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert "mine" not in peers.OPERATION_PEERS


def test_no_file(capsys):
    assert cli.main(["bench", "--suite", "ops", "--peer", "nowhere.py"]) == 2
    assert "--peer is 'nowhere.py', which does not exist" in capsys.readouterr().err


def test_a_peer_that_the_run_is_not_for_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "run_case", lambda *arguments: pytest.fail("measured"))
    operation = write(tmp_path / "operation.py", OPERATION_PEER)
    whole = write(tmp_path / "whole.py", MODEL_PEER)
    for file, arguments, message in (
        (operation, [], "is 'mine', an OperationPeer; a Peer was expected"),
        (operation, ["--suite", "model", "--quick"], "is 'mine', an OperationPeer, for the operations that it has"),
        (operation, ["--suite", "ops", "--quick", "--only", "encoder"], "no such case is chosen"),
        (whole, ["--suite", "ops", "--quick"], "is 'mine', a Peer, for --suite model or train; no such case is chosen"),
        (whole, ["--pretrain"], "--pretrain and --peer: at most one of them was expected"),
    ):
        assert cli.main(["bench", *arguments, "--peer", file]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_options_name_files():
    parser = argparse.ArgumentParser()
    add_to(parser)
    assert options_from(parser.parse_args(["--peer", __file__])).peers == (__file__,)


# -------------------------------------------------------------------------------------------------------- entry points


def test_an_installed_package(monkeypatch):
    class Theirs(peers.OperationPeer):
        name = "theirs"
        bias_gelu = staticmethod(ops.bias_gelu)

    class Point:
        name = "theirs"

        def load(self):
            return Theirs

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, name="theirs": [Point()])
    assert peers.add_installed() == [Theirs]
    assert peers.add_installed() == [Theirs]  # once is enough
    assert list(peers.PLUG_INS) == ["theirs"]
    work = run_case(operation_case("bias_gelu", CONFIG, SHAPE, "inference", turn=0.0), 1)
    assert work.rows[-1].peer == "theirs"
    assert work.rows[-1].passed


class Points:
    """Entry points, by name what they load."""

    def __init__(self, **found):
        self.found = found

    def __call__(self, group, name=None):
        return [point for point in map(self._point, self.found) if name in (None, point.name)]

    def _point(self, name):
        def load():
            if isinstance(self.found[name], Exception):
                raise self.found[name]
            return self.found[name]

        return argparse.Namespace(name=name, load=load)


def test_an_installed_model_in_the_command(tmp_path, capsys, monkeypatch):
    """By default, or where --compare or --peer names it."""

    class Whole(peers.PEERS["reference"]):
        name = "my-whole"

    class Theirs(peers.OperationPeer):
        name = "theirs"

    def measured(options, console):
        chosen.append(options.compare)
        raise ValueError("chosen")

    chosen: list[tuple[str, ...]] = []
    monkeypatch.setattr(importlib.metadata, "entry_points", Points(whole=Whole, theirs=Theirs))
    monkeypatch.setattr(run, "run", measured)
    for arguments, expected in (
        ([], (*DEFAULT_PEERS, "my-whole")),
        (["--compare", "reference"], ("reference",)),
        (["--compare", "my-whole,reference"], ("my-whole", "reference")),
        (["--compare", "reference", "--peer", "whole"], ("reference", "my-whole")),
        (["--compare", "my-whole", "--peer", "whole"], ("my-whole",)),
        (["--pretrain"], TRAINERS),
    ):
        assert cli.main(["bench", *arguments]) == 2
        assert "chosen" in capsys.readouterr().err
        assert chosen.pop() == expected
    for arguments, message in (
        (["--compare", "theirs"], "--compare has 'theirs'"),
        (["--peer", "theirs"], "--peer theirs is 'theirs', an OperationPeer"),
        (["--peer", "nobody"], "--peer is 'nobody'; a Python file, or an entry point of albert_fast.peers"),
    ):
        assert cli.main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not chosen


@pytest.mark.parametrize("error", [ImportError("no abacus"), RuntimeError("no beads")], ids=["import", "other"])
def test_an_installed_peer_that_is_broken_is_left_out(error, monkeypatch):
    class Whole(peers.PEERS["reference"]):
        name = "whole"

    monkeypatch.setattr(importlib.metadata, "entry_points", Points(broken=error, whole=Whole))
    with pytest.warns(UserWarning, match=rf"an installed peer is left out: broken cannot be imported \(.*{error}"):
        assert peers.add_installed() == [Whole]
    assert list(peers.PLUG_INS) == ["whole"]
    with pytest.raises(ValueError, match=rf"--peer broken cannot be imported \(.*{error}"):
        peers.add("broken")


def test_no_entry_point():
    with pytest.raises(ValueError, match=r"an entry point of albert_fast\.peers"):
        peers.add("nobody")


# --------------------------------------------------------------------------------------------------------- who is there


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [Shape(3, 17), Shape(9, 40, ragged=True)], ids=str)
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_every_peer_of_operations_is_right(operation, shape, dtype, mode):
    # Sizes at which roundings average out: a sum of few numbers is by chance twice as inexact as PyTorch's.
    embedding = 8 if operation == "masked_lm_loss" else 64
    config = dataclasses.replace(CONFIG, embedding_size=embedding, hidden_size=128, intermediate_size=192)
    case = operation_case(operation, config, shape, mode, dtype, turn=0.0)
    work = run_case(case, 1)
    assert {row.peer for row in work.rows} >= {"albert_fast", "reference"}
    assert operation == "encoder" or "pytorch" in case.peers
    for row in work.rows:
        assert row.passed or (row.passed is None and row.reason), f"{row.peer}: {row.reason}"
        if row.peer in ("albert_fast", "reference", "pytorch"):
            # What is in bfloat16 is off by more than anything in float32 may be, and nothing is exact.
            least, most = (1e-4, 0.1) if dtype == "bfloat16" else (1e-10, 1e-5)
            if (operation, mode) == ("masked_lm_loss", "inference"):
                least = -1.0  # one number may be
            assert least < row.error < most
            assert row.milliseconds > 0.0


def test_who_needs_a_gpu_says_so_without_one():
    for name in ("liger", "cut-cross-entropy", "flash-attn"):
        assert peers.OPERATION_PEERS[name]().refuses("training", "bfloat16", "cpu") == "it has cuda, not cpu"
    assert peers.PEERS["transformers-flash"]().refuses("inference", "bfloat16", "cpu") == "it has cuda, not cpu"
    reason = peers.PEERS["transformers-flash"]().refuses("inference", "bfloat16", "cuda")
    assert reason is None or "flash_attn not installed: pip install flash-attn" in reason


def test_who_comes_with_an_extra_says_which(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    for name, expected in (
        ("transformers-sdpa", "transformers not installed: pip install 'albert_fast[bench]'"),
        ("openvino", "transformers and openvino and nncf not installed: pip install 'albert_fast[peers]'"),
    ):
        assert peers.PEERS[name]().refuses("inference", "float32", "cpu") == expected
    assert "pip install 'albert_fast[peers]'" in peers.PEERS["onnxruntime"]().refuses("inference", "float32", "cpu")


def test_dynamic_int8_quantizes_the_shared_layer_once():
    pytest.importorskip("transformers")
    batch = random_batch(CONFIG, SHAPE, lengths_of(SHAPE))
    state = AlbertForMaskedLM(CONFIG).state_dict()
    peer = peers.PEERS["transformers-int8"]()
    peer.build(CONFIG, state, "int8", CPU, batch)
    linear = [m for m in peer.model.albert.encoder.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(linear) == 7  # of a layer: query, key, value, dense, ffn, ffn_output; and the embeddings' projection
    expected = parity.oracle(CONFIG, state, batch, "inference")
    error = parity.error(parity.results(peer, batch, "inference"), expected)
    assert 1e-4 < error < parity.LARGEST["inference", "int8"]


def test_a_worker_is_asked_for_one_call():
    batch = random_batch(CONFIG, SHAPE, lengths_of(SHAPE))
    process = worker.Worker(
        "albert_fast", CONFIG, AlbertForMaskedLM(CONFIG).state_dict(), batch, "inference", "float32"
    )
    try:
        process.results()
        process.call()
        assert process.seconds() > 0.0
    finally:
        process.close()
