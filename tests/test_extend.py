"""A longer position table: what it holds, what else changes, and what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F

from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertForQuestionAnswering, AlbertModel, cli
from albert_fast.checkpoint import CheckpointError, convert, read_state_dict, write_state_dict
from albert_fast.extend import extend, extend_positions, interpolate

OLD = 16
SHAPE = {
    "vocab_size": 50,
    "embedding_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": OLD,
}
TABLE = "embeddings.position_embeddings.weight"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    AlbertForMaskedLM(AlbertConfig(**SHAPE)).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": OLD, "mask_token": "…"}))
    return folder


def rows(table, positions):
    """PyTorch's own interpolation, in float64."""
    return F.interpolate(table.double().t()[None], size=positions, mode="linear", align_corners=True)[0].t()


@pytest.mark.parametrize("positions", [OLD, OLD + 1, 31, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_table(dtype, positions):
    table = torch.randn(OLD, 5).to(dtype)
    found = interpolate(table, positions)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), rows(table, positions), rtol=eps, atol=64 * min(eps, 2**-23))
    assert torch.equal(found[0], table[0])
    assert torch.equal(found[-1], table[-1])


def test_old_rows_that_are_met_keep_every_bit():
    table = torch.randn(OLD, 5) / 3
    assert torch.equal(interpolate(table, OLD), table)
    assert torch.equal(interpolate(table, 546 * (OLD - 1) + 1)[::546], table)
    assert torch.equal(interpolate(table[:1], 3), table[:1].expand(3, 5))


def test_rounded_once():
    table = torch.randn(OLD, 64).bfloat16()
    assert torch.equal(interpolate(table, 37), interpolate(table.float(), 37).bfloat16())


@pytest.mark.parametrize("model_class", [AlbertModel, AlbertForMaskedLM, AlbertForQuestionAnswering])
@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
def test_all_else_keeps_every_bit(source, tmp_path, model_class, safetensors):
    folder = tmp_path / "other"
    model = model_class(AlbertConfig(**SHAPE, extra={"gap_size": 0}, hidden_act="gelu"))
    model.save_pretrained(folder, safe_serialization=safetensors)
    extend(folder, tmp_path / "long", 40)
    before, after = read_state_dict(folder), read_state_dict(tmp_path / "long")
    name = next(name for name in before if name.endswith(TABLE))
    torch.testing.assert_close(after.pop(name).double(), rows(before.pop(name), 40))
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    mine, theirs = (AlbertConfig.from_pretrained(folder).to_dict() for folder in (folder, tmp_path / "long"))
    assert theirs == {**mine, "max_position_embeddings": 40}
    ids = torch.randint(5, 50, (2, 40))
    model_class.from_pretrained(tmp_path / "long")(ids)


def test_dtype(source, tmp_path):
    convert(source, tmp_path / "short", dtype="bfloat16")
    extend(source, tmp_path / "long", 40, dtype="bfloat16")
    before, after = read_state_dict(source), read_state_dict(tmp_path / "long")
    for name, tensor in before.items():
        wanted = interpolate(tensor, 40) if name.endswith(TABLE) else tensor
        assert torch.equal(after[name], wanted.bfloat16())
    assert AlbertConfig.from_pretrained(tmp_path / "long").dtype == torch.bfloat16
    # Upwards: the table is not rounded on its way.
    extend(tmp_path / "short", tmp_path / "wide", 40, dtype="float32")
    table = read_state_dict(tmp_path / "wide")["albert." + TABLE]
    torch.testing.assert_close(table, rows(read_state_dict(tmp_path / "short")["albert." + TABLE], 40).float())


def test_old_constants_are_left_out(source, tmp_path):
    """Checkpoints of old versions of transformers have [1, 512] of them, which fit no other length."""
    constants = {"position_ids": torch.arange(OLD)[None], "token_type_ids": torch.zeros(1, OLD, dtype=torch.int64)}
    stored = {f"albert.embeddings.{name}": tensor for name, tensor in constants.items()}
    write_state_dict(source, {**read_state_dict(source), **stored})
    extend(source, tmp_path / "long", 40)
    assert not stored.keys() & read_state_dict(tmp_path / "long").keys()


@pytest.mark.parametrize(("length", "then"), [(OLD, 40), (10, 10), (10**30, 10**30), (None, None)])
def test_the_tokenizer(source, tmp_path, length, then):
    path = source / "tokenizer_config.json"
    values = {"mask_token": "…"} | ({} if length is None else {"model_max_length": length})
    path.write_text(json.dumps(values))
    extend(source, tmp_path / "long", 40)
    assert (tmp_path / "long" / "spiece.model").read_bytes() == b"pieces"
    found = json.loads((tmp_path / "long" / path.name).read_text())
    assert found == values | ({} if then is None else {"model_max_length": then})
    if length == then:
        assert (tmp_path / "long" / path.name).read_bytes() == path.read_bytes()


def test_transformers_reads_it(source, tmp_path):
    transformers = pytest.importorskip("transformers")
    extend(source, tmp_path / "long", 40)
    theirs = transformers.AlbertForMaskedLM.from_pretrained(tmp_path / "long").eval()
    ours = AlbertForMaskedLM.from_pretrained(tmp_path / "long")
    ids = torch.randint(5, 50, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_command(source, tmp_path, capsys):
    command = ["extend", str(source), "-o", str(tmp_path / "long"), "--positions"]
    assert cli.main([*command, "40"]) == 0
    assert str(tmp_path / "long") in capsys.readouterr().out
    assert AlbertForMaskedLM.from_pretrained(tmp_path / "long").config.max_position_embeddings == 40
    assert cli.main([*command, "40"]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert cli.main([*command, "long"]) == 2
    assert "--positions is 'long'" in capsys.readouterr().err


def broken(change):
    return lambda folder: write_state_dict(folder, change(read_state_dict(folder)))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(lambda folder: None, "positions is 15; at least the 16", id="fewer"),
        pytest.param(
            lambda folder: AlbertForMaskedLM.from_pretrained(folder).quantize().save_pretrained(folder),
            "is quantized to int8, .* quantization.safetensors",
            id="quantized",
        ),
        pytest.param(
            broken(lambda w: {k: v for k, v in w.items() if not k.endswith(TABLE)}), f"has no {TABLE}", id="no table"
        ),
        pytest.param(
            broken(lambda w: {**w, "albert." + TABLE: torch.zeros(17, 8)}),
            r"torch.float32 \[17, 8\], expected floating \[16, 8\]",
            id="another table",
        ),
        pytest.param(
            lambda folder: (folder / "tokenizer_config.json").write_text("{"), "not a readable JSON", id="tokenizer"
        ),
    ],
)
def test_refused(source, tmp_path, damage, says):
    damage(source)
    with pytest.raises(CheckpointError, match=says):
        extend(source, tmp_path / "long", 15 if "15" in says else 40)
    assert not (tmp_path / "long").exists()


# ----------------------------------------------------------------------------------------------------------- in memory


def test_in_memory_as_on_disk(source, tmp_path):
    extend(source, tmp_path / "long", 40)
    expected = AlbertForMaskedLM.from_pretrained(tmp_path / "long")
    model = AlbertForMaskedLM.from_pretrained(source)
    extend_positions(model, 40)
    assert model.config == expected.config
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
    ids = torch.randint(5, 50, (2, 40))
    model.train()(ids, labels=ids).loss.backward()
    assert model.albert.embeddings.position_embeddings.weight.grad.shape == (40, 8)
    model.save_pretrained(tmp_path / "again")
    assert AlbertForMaskedLM.from_pretrained(tmp_path / "again").config.max_position_embeddings == 40


def test_frozen_stays_frozen(source):
    model = AlbertForMaskedLM.from_pretrained(source, dtype=torch.bfloat16).requires_grad_(False)
    extend_positions(model, 40)
    table = model.albert.embeddings.position_embeddings.weight
    assert not table.requires_grad
    assert table.dtype == torch.bfloat16


@pytest.mark.parametrize("accelerated", [False, True], ids=["transformers", "albert_fast.hf"])
def test_transformers_models(accelerated):
    transformers = pytest.importorskip("transformers")
    if accelerated:
        from albert_fast import hf as transformers
    from transformers import AlbertConfig as Config

    model = transformers.AlbertForMaskedLM(Config(**SHAPE)).eval()
    extend_positions(model, 40)
    ids = torch.randint(5, 50, (2, 40))
    ours = AlbertForMaskedLM(AlbertConfig(**{**SHAPE, "max_position_embeddings": 40})).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_refused_in_memory(source):
    model = AlbertForMaskedLM.from_pretrained(source)
    with pytest.raises(ValueError, match="positions is 15; at least the 16"):
        extend_positions(model, 15)
    with pytest.raises(ValueError, match="Linear without position_embeddings"):
        extend_positions(torch.nn.Linear(2, 2), 40)
    with pytest.raises(ValueError, match=r"quantized to int8, .*model.quantize\(False\)"):
        extend_positions(model.quantize(), 40)
    assert model.config.max_position_embeddings == OLD
