"""The mean of several checkpoints, and what is refused for having none."""

import shutil

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM, cli
from albert_fast.checkpoint import CheckpointError, average, read_state_dict, write_state_dict

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def run(tmp_path):
    """Three checkpoints of one run."""
    folders = [tmp_path / f"step-{step}" for step in range(3)]
    for folder in folders:
        AlbertForMaskedLM(AlbertConfig(**SHAPE)).save_pretrained(folder)
        (folder / "spiece.model").write_bytes(folder.name.encode())
    return folders


def rewrite(folder, change):
    write_state_dict(folder, change(read_state_dict(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean(run, tmp_path, dtype):
    for folder in run:
        rewrite(folder, lambda weights: {**{k: v.to(dtype) for k, v in weights.items()}, "ids": torch.arange(4)})
    before = [read_state_dict(folder) for folder in run]
    average(run, tmp_path / "mean")
    mean = read_state_dict(tmp_path / "mean")
    assert mean.keys() == before[0].keys()
    assert torch.equal(mean.pop("ids"), torch.arange(4))
    for name, tensor in mean.items():
        assert tensor.dtype == dtype
        wanted = torch.stack([weights[name].double() for weights in before]).mean(0)
        # Rounded once, after the sum's own rounding, which is of the size of the weights and not of their mean.
        sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        atol = 2 * sums * max(weights[name].abs().max().item() for weights in before)
        torch.testing.assert_close(tensor.double(), wanted, rtol=torch.finfo(dtype).eps, atol=atol)
    assert (tmp_path / "mean" / "spiece.model").read_bytes() == b"step-0"
    assert AlbertConfig.from_pretrained(tmp_path / "mean") == AlbertConfig.from_pretrained(run[0])


def test_command(run, tmp_path, capsys):
    assert cli.main(["average", *map(str, run), "-o", str(tmp_path / "mean")]) == 0
    assert str(tmp_path / "mean") in capsys.readouterr().out
    AlbertForMaskedLM.from_pretrained(tmp_path / "mean")
    assert cli.main(["average", *map(str, run), "-o", str(tmp_path / "mean")]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert cli.main(["average", str(run[0]), "-o", str(tmp_path / "one")]) == 2
    assert "has 1 checkpoints, expected at least two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {**w, "more": torch.ones(2)}, r"in the weights: more is torch.float32 \[2\], expected absent"),
        (
            lambda w: {k: v for k, v in w.items() if k != "predictions.bias"},
            r"predictions.bias is absent, expected torch.float32 \[50\]",
        ),
        (lambda w: {**w, "predictions.bias": torch.ones(49)}, r"predictions.bias is torch.float32 \[49\], expected "),
        (lambda w: {k: v.half() for k, v in w.items()}, r"is torch.float16 \[50\], expected torch.float32 \[50\]"),
    ],
)
def test_other_weights(run, tmp_path, change, says):
    rewrite(run[1], change)
    with pytest.raises(CheckpointError, match=says) as caught:
        average(run, tmp_path / "mean")
    assert str(run[1]) in str(caught.value)
    assert not (tmp_path / "mean").exists()


def test_other_configs_and_numbers(run, tmp_path):
    config = AlbertConfig.from_pretrained(run[2])
    config.hidden_act = "gelu"
    config.extra["transformers_version"] = "of another day"
    config.save_pretrained(run[2])
    with pytest.raises(
        CheckpointError, match=r"step-2 .*step-0 in config.json: hidden_act is gelu, expected gelu_new$"
    ):
        average(run, tmp_path / "mean")
    for number, folder in enumerate(run[:2]):
        rewrite(folder, lambda weights, number=number: {**weights, "ids": torch.tensor([number])})
    with pytest.raises(CheckpointError, match="other whole numbers in ids"):
        average(run[:2], tmp_path / "mean")
    shutil.rmtree(run[1])
    with pytest.raises(ValueError, match="step-1"):
        average(run[:2], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
