"""The command line, as a user calls it."""

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM, checkpoint, cli
from albert_fast.backends import BACKENDS, OPERATIONS
from albert_fast.checkpoint import read_state_dict

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}


def test_env_names_a_backend_for_each_operation(capsys):
    assert cli.main(["env"]) == 0
    served = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    assert set(OPERATIONS) <= set(served)
    assert {served[operation] for operation in OPERATIONS} <= {backend.name for backend in BACKENDS}


def test_env_with_an_unknown_forced_backend(capsys, monkeypatch):
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "abacus")
    assert cli.main(["env", "--device", "cpu"]) == 2
    assert "abacus" in capsys.readouterr().err


def test_convert(tmp_path, capsys):
    model = AlbertForMaskedLM(AlbertConfig(**SHAPE))
    model.save_pretrained(tmp_path / "in")
    target = str(tmp_path / "out")
    assert cli.main(["convert", str(tmp_path / "in"), target, "--dtype", "bfloat16", "--max-shard-size", "20KB"]) == 0
    assert target in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in read_state_dict(target).items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())
    assert AlbertForMaskedLM.from_pretrained(target).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "out"], "nowhere"),
        (["convert", "{model}", "out", "--dtype", "int3"], "int3"),
        (["convert", "{model}", "out", "--max-shard-size", "some"], "some"),
        (["convert", "{model}", "{model}"], "exists"),
        (["env", "--device", "abacus"], "abacus"),
    ],
)
def test_mistakes_are_one_line_on_stderr(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    AlbertForMaskedLM(AlbertConfig(**SHAPE)).save_pretrained(tmp_path / "model")
    arguments = [argument.format(model=tmp_path / "model") for argument in arguments]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c(capsys, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "convert", stop)
    assert cli.main(["convert", "in", "out"]) == 130
    assert capsys.readouterr().err == "albert-fast: stopped by Ctrl-C\n"


def test_help_and_version(capsys):
    assert cli.main([]) == 2
    assert "bench" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip()
