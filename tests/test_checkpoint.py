"""Weight files: the same bytes as transformers both ways, whole on every failure, clear on every kind of
damage."""

import contextlib
import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from albert_fast import checkpoint
from albert_fast.checkpoint import (
    CheckpointError,
    check_state_dict,
    convert,
    read_state_dict,
    write_state_dict,
)
from albert_fast.config import AlbertConfig, ConfigError

SIZES = {
    "vocab_size": 50,
    "embedding_size": 8,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_hidden_groups": 2,
    "max_position_embeddings": 16,
}
TIED = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}


@pytest.fixture
def generator():
    seed = torch.seed() % 2**31
    print("seed", seed)
    return torch.Generator().manual_seed(seed)


def random_weights(generator, seven=7):
    return {
        "embeddings.weight": torch.randn(11, seven, generator=generator),
        "half.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "scalar": torch.randn((), generator=generator),
        "none": torch.empty(0, 4),
        "bias": torch.randn(13, generator=generator).to(torch.float16),
    }


def hf_model(name, generator, dtype=torch.float32, **overrides):
    """A transformers model with fresh random values, written and read by transformers' own code in these
    tests."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, name)(transformers.AlbertConfig(**{**SIZES, **overrides})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        bits = torch.uint8
        assert torch.equal(got[name].reshape(-1).view(bits), tensor.contiguous().reshape(-1).view(bits)), name


def files(directory):
    return sorted(path.name for path in Path(directory).iterdir())


# With transformers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["5GB", 3000])
def test_files_of_transformers(tmp_path, generator, dtype, shard_size):
    model = hf_model("AlbertForPreTraining", generator, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert ("model.safetensors" in files(tmp_path)) == (shard_size == "5GB")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in TIED}
    assert_same(read_state_dict(tmp_path), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["5GB", 3000])
@pytest.mark.parametrize("safe", [True, False])
def test_transformers_reads_ours(tmp_path, generator, dtype, shard_size, safe):
    model = hf_model("AlbertForPreTraining", generator, dtype)
    AlbertConfig(**SIZES).save_pretrained(tmp_path)
    write_state_dict(tmp_path, model.state_dict(), max_shard_size=shard_size, safe_serialization=safe)
    again, info = type(model).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert_same(again.state_dict(), model.state_dict())
    assert_same(read_state_dict(tmp_path), {k: v for k, v in model.state_dict().items() if k not in TIED})


def test_files_are_those_that_transformers_writes(tmp_path, generator):
    model = hf_model("AlbertForMaskedLM", generator)
    for size in ("1GB", 9000, 3000, 100):
        theirs, ours = tmp_path / f"theirs{size}", tmp_path / f"ours{size}"
        model.save_pretrained(theirs, max_shard_size=size)
        written = write_state_dict(ours, model.state_dict(), max_shard_size=size)
        assert [path.parent for path in written] == [ours] * len(written)
        assert files(ours) == sorted(path.name for path in written)
        assert files(ours) == [name for name in files(theirs) if name != "config.json"]
        for name in files(ours):
            if name.endswith(".json"):
                assert (ours / name).read_text() == (theirs / name).read_text()
            else:
                with safe_open(ours / name, "pt") as mine, safe_open(theirs / name, "pt") as other:
                    assert set(mine.keys()) == set(other.keys())
                    assert mine.metadata() == other.metadata() == {"format": "pt"}


def test_generations_of_shards_are_read_by_transformers(tmp_path, generator):
    AlbertConfig(**SIZES).save_pretrained(tmp_path)
    for _ in range(3):
        model = hf_model("AlbertForMaskedLM", generator)
        write_state_dict(tmp_path, model.state_dict(), max_shard_size=3000)
    assert_same(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("old_format", [True, False])
def test_pickles_of_torch(tmp_path, generator, old_format):
    model = hf_model("AlbertForMaskedLM", generator)
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert_same(read_state_dict(tmp_path), model.state_dict())
    assert_same(read_state_dict(path), model.state_dict())


# Reading.


def test_precedence_and_single_files(tmp_path, generator):
    names = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    weights = [random_weights(generator) for _ in names]
    for rank, (name, safe, size) in enumerate(zip(names, (1, 1, 0, 0), (1e9, 300, 1e9, 300), strict=True)):
        write_state_dict(tmp_path / name, weights[rank], max_shard_size=int(size), safe_serialization=bool(safe))
        for path in (tmp_path / name).iterdir():
            path.rename(tmp_path / f"{path.name}.moved")
        (tmp_path / name).rmdir()
    for path in tmp_path.iterdir():
        path.rename(tmp_path / path.name.removesuffix(".moved"))
    for rank, name in enumerate(names):
        assert_same(read_state_dict(tmp_path / name), weights[rank])
    for rank, name in enumerate(names):
        assert_same(read_state_dict(tmp_path), weights[rank])
        (tmp_path / name).unlink()


def test_old_names(tmp_path, generator):
    old = {"a.LayerNorm.gamma": torch.randn(3, generator=generator), "a.LayerNorm.beta": torch.ones(3)}
    write_state_dict(tmp_path, {**old, "gamma.w_beta": torch.zeros(1)})
    assert set(read_state_dict(tmp_path)) == {"a.LayerNorm.weight", "a.LayerNorm.bias", "gamma.w_beta"}
    write_state_dict(tmp_path, {**old, "a.LayerNorm.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="gamma"):
        read_state_dict(tmp_path)


def header_says(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


SAFETENSORS_DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "no header": lambda p: p.write_bytes(p.read_bytes()[:5]),
    "half a header": lambda p: p.write_bytes(p.read_bytes()[:50]),
    "body too short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "body too long": lambda p: p.write_bytes(p.read_bytes() + b"x"),
    "huge header": lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]),
    "other header length": lambda p: p.write_bytes(struct.pack("<Q", 60) + p.read_bytes()[8:]),
    "not JSON": lambda p: p.write_bytes(p.read_bytes().replace(b'{"', b'["', 1)),
    "unknown dtype": lambda p: header_says(p, lambda h: {k: {**v, "dtype": "F13"} for k, v in h.items()}),
    "wrong shape": lambda p: header_says(p, lambda h: {k: {**v, "shape": [9]} for k, v in h.items()}),
    "out of the file": lambda p: header_says(p, lambda h: {k: {**v, "data_offsets": [0, 99]} for k, v in h.items()}),
    "an HTML page": lambda p: p.write_bytes(b"<!DOCTYPE html><html>404 not found</html>"),
    "a git-lfs pointer": lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
}


@pytest.mark.parametrize("damage", SAFETENSORS_DAMAGE)
def test_damaged_safetensors(tmp_path, generator, damage):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3, generator=generator)}, path)
    SAFETENSORS_DAMAGE[damage](path)
    with pytest.raises(CheckpointError, match=r"is (empty|damaged)") as caught:
        read_state_dict(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 3, 20, 100, 0.5, 0.99])
def test_truncated_pickles(tmp_path, generator, kept, old_format):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(300, generator=generator)}, path, _use_new_zipfile_serialization=not old_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"is (empty|damaged)") as caught:
        read_state_dict(tmp_path)
    assert str(path) in str(caught.value)


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("made-by-unpickling",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": RunsCode()}, r"import \S*mkdir, which can run code, and is refused"),
        (torch.nn.Linear(2, 2), r"import torch.nn.modules.linear.Linear, which can run code"),
        ({"epoch": 3, "a": torch.ones(1)}, "'epoch' is a int, not a named tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict"),
        ({0: torch.ones(1)}, "0 is a Tensor, not a named tensor"),
        ([torch.ones(1)], "not a state dict but a list"),
    ],
)
def test_pickles_that_are_no_state_dicts(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says) as caught:
        read_state_dict(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in str(caught.value)
    assert not (tmp_path / "made-by-unpickling").exists()


def test_plain_pickles_and_bytes(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content in (pickle.dumps({"a": 1}, protocol=2), b"garbage" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("", "not a readable JSON"),
        ("[]", 'no "weight_map"'),
        ('{"weight_map": {}}', 'no "weight_map"'),
        (
            '{"weight_map": {"a": "gone.safetensors", "b": "too.safetensors"}}',
            "beside it: gone.*, too.safetensors",
        ),
        ('{"weight_map": {"a": "../outside.safetensors"}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": "/outside.safetensors"}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": "..\\\\outside.safetensors"}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": ".."}}', "expected the name of a file beside it"),
        ('{"weight_map": {"a": 3}}', "expected the name of a file beside it"),
        (
            '{"weight_map": {"a": "here.safetensors", "b": "here.safetensors"}}',
            "here.safetensors lacks .*: b",
        ),
        ('{"weight_map": {"a": "config.json"}}', "is no weight file"),
    ],
)
def test_bad_indexes(tmp_path, index, says):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    save_file({"a": torch.ones(1)}, inside / "here.safetensors")
    (inside / "config.json").write_text("{}")
    (inside / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_state_dict(inside)
    assert str(inside) in str(caught.value)


def test_links_out_of_the_directory_are_followed(tmp_path, generator):
    # The cache of huggingface_hub keeps a model as links to blobs.
    weights = random_weights(generator)
    write_state_dict(tmp_path / "blobs", weights, max_shard_size=300)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_same(read_state_dict(tmp_path / "snapshot"), weights)


def test_nothing_to_read(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"looked for model.safetensors, .*index.json, found tf_model.h5"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight file: expected .safetensors"):
        read_state_dict(tmp_path / "tf_model.h5")
    with pytest.raises(CheckpointError, match="absent does not exist"):
        read_state_dict(tmp_path / "absent")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        read_state_dict(tmp_path)


# Writing.


def test_tensors_of_any_stride_and_shared_memory(tmp_path, generator):
    packed = torch.randn(6, 4, generator=generator)
    weights = {
        "transposed": packed.t(),
        "first": packed[:4],
        "overlapping": packed[2:],
        "expanded": packed[0, :1].expand(5),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "empty": torch.empty(0),
        "also empty": torch.empty(0),
    }
    for safe in (True, False):
        (path,) = write_state_dict(tmp_path, weights, safe_serialization=safe)
        assert_same(read_state_dict(tmp_path), {name: tensor.detach() for name, tensor in weights.items()})
        assert files(tmp_path) == [path.name]
    assert path.stat().st_size < 6000


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_tied_tensors_are_stored_once_under_the_name_of_transformers(tmp_path, generator, safe, order):
    word, bias = torch.randn(50, 8, generator=generator), torch.randn(50, generator=generator)
    weights = {name: word if "weight" in name else bias for name in [*TIED.values(), *TIED][::order]}
    for size in ("5GB", 1000):
        write_state_dict(tmp_path, weights, safe_serialization=safe, max_shard_size=size)
        assert_same(read_state_dict(tmp_path), {name: weights[name] for name in TIED.values()})


def test_metadata_and_modes(tmp_path, generator):
    (path,) = write_state_dict(tmp_path, random_weights(generator), metadata={"step": "12"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "12"}
    (tmp_path / "reference").touch()
    assert path.stat().st_mode == (tmp_path / "reference").stat().st_mode
    with pytest.raises(CheckpointError, match="metadata"):
        write_state_dict(tmp_path, {}, metadata={"step": "12"}, safe_serialization=False)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (3, "x is a int"),
        (torch.ones(2, 2).to_sparse(), "expected a dense tensor"),
        (torch.ones(2, device="meta"), "meta"),
    ],
)
def test_what_cannot_be_stored(tmp_path, tensor, says):
    with pytest.raises(CheckpointError, match=says):
        write_state_dict(tmp_path, {"x": tensor})
    assert not files(tmp_path)


@pytest.mark.parametrize("size", [0, -5, "5 apples", "GB", True, 2.5, None])
def test_bad_shard_sizes(tmp_path, size):
    if size == 2.5:
        assert checkpoint._bytes("2.5KB") == 2500
        assert checkpoint._bytes("1.5KiB") == 1536
        return
    with pytest.raises(CheckpointError, match=rf"max_shard_size is {size!r}, expected"):
        write_state_dict(tmp_path, {}, max_shard_size=size)


KINDS = [(size, safe) for size in ("5GB", 300) for safe in (True, False)]


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_overwriting_leaves_only_the_new(tmp_path, generator, old, new):
    (tmp_path / "optimizer.bin").write_bytes(b"kept")
    for size, safe in (old, new, new):
        weights = random_weights(generator)
        written = write_state_dict(tmp_path, weights, max_shard_size=size, safe_serialization=safe)
        assert_same(read_state_dict(tmp_path), weights)
    assert files(tmp_path) == sorted([*(path.name for path in written), "optimizer.bin"])


class Counted:
    """Runs `before(n)` ahead of the n-th change to the directory: every rename and every removal of a
    weight file."""

    def __init__(self, monkeypatch, before):
        self.calls = 0
        for name in ("replace", "unlink"):
            original = getattr(Path, name)

            def changed(path, *args, original=original, **kwargs):
                if not (original.__name__ == "unlink" and path.suffix == ".tmp"):
                    self.calls += 1
                    before(self.calls)
                return original(path, *args, **kwargs)

            monkeypatch.setattr(Path, name, changed)


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_a_reader_finds_the_old_or_the_new_at_every_moment(tmp_path, monkeypatch, generator, old, new):
    weights = [random_weights(generator), random_weights(generator)]
    write_state_dict(tmp_path, weights[0], max_shard_size=old[0], safe_serialization=old[1])
    seen = []

    def look(_):
        found = read_state_dict(tmp_path)
        seen.append(next(i for i in (0, 1) if torch.equal(found["bias"], weights[i]["bias"])))
        assert_same(found, weights[seen[-1]])

    with monkeypatch.context() as patch:
        counted = Counted(patch, look)
        write_state_dict(tmp_path, weights[1], max_shard_size=new[0], safe_serialization=new[1])
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert len(seen) == counted.calls
    assert_same(read_state_dict(tmp_path), weights[1])


def test_older_checkpoints_under_the_old_one_never_come_to_light(tmp_path, monkeypatch, generator):
    weights = [random_weights(generator) for _ in range(3)]
    write_state_dict(tmp_path / "single", weights[1])
    write_state_dict(tmp_path, weights[0], max_shard_size=300)
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model.safetensors")

    def look(_):
        found = read_state_dict(tmp_path)
        assert any(torch.equal(found["bias"], weights[i]["bias"]) for i in (1, 2))

    with monkeypatch.context() as patch:
        Counted(patch, look)
        write_state_dict(tmp_path, weights[2], safe_serialization=False)
    assert_same(read_state_dict(tmp_path), weights[2])
    assert files(tmp_path) == ["pytorch_model.bin", "single"]


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failing_at_every_step_leaves_a_whole_checkpoint(tmp_path, monkeypatch, generator, old, new, error):
    weights = [random_weights(generator), random_weights(generator)]
    for step in range(1, 50):
        directory = tmp_path / str(step)
        write_state_dict(directory, weights[0], max_shard_size=old[0], safe_serialization=old[1])
        before = files(directory)

        def fail(call, step=step):
            if call == step:
                raise error

        with monkeypatch.context() as patch:
            counted = Counted(patch, fail)
            with contextlib.suppress(type(error)):
                write_state_dict(directory, weights[1], max_shard_size=new[0], safe_serialization=new[1])
                assert counted.calls < step  # every step has had its turn
                return
        assert not [name for name in files(directory) if name.endswith(".tmp")]
        found = read_state_dict(directory)
        if torch.equal(found["bias"], weights[0]["bias"]):
            assert_same(found, weights[0])
            assert set(files(directory)) <= set(before)
        else:
            assert_same(found, weights[1])
    pytest.fail("did not end")


@pytest.mark.parametrize("old", [None, *KINDS])
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failing_while_writing_leaves_the_old(tmp_path, monkeypatch, generator, old, new, error):
    weights = [random_weights(generator), random_weights(generator)]
    if old:
        write_state_dict(tmp_path, weights[0], max_shard_size=old[0], safe_serialization=old[1])
    before = files(tmp_path)
    for module, name in ((checkpoint, "save_file"), (torch, "save")):
        original, calls = getattr(module, name), []

        def full(tensors, path, *args, original=original, calls=calls, **kwargs):
            original(tensors, path, *args, **kwargs)
            calls.append(path)
            if len(calls) == (1 if new[0] == "5GB" else 2):
                Path(path).write_bytes(Path(path).read_bytes()[:10])
                raise error

        monkeypatch.setattr(module, name, full)
    with pytest.raises(type(error)):
        write_state_dict(tmp_path, weights[1], max_shard_size=new[0], safe_serialization=new[1])
    assert files(tmp_path) == before
    if old:
        assert_same(read_state_dict(tmp_path), weights[0])


# Checking.


NAMES = [
    "AlbertModel",
    "AlbertForPreTraining",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertForMultipleChoice",
    "AlbertForQuestionAnswering",
]
OF_HEADS = (
    "predictions.*",
    "sop_classifier.*",
    "classifier.*",
    "qa_outputs.*",
    "albert.pooler.*",
    "pooler.*",
)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
@pytest.mark.filterwarnings("ignore:newly initialized")
def test_any_class_into_any_class_as_transformers_does(tmp_path, generator, source, target):
    saved = hf_model(source, generator, num_labels=1 if "MultipleChoice" in source + target else 2)
    saved.save_pretrained(tmp_path)
    expected, info = getattr(pytest.importorskip("transformers"), target).from_pretrained(
        tmp_path, output_loading_info=True
    )
    model = hf_model(target, generator, num_labels=saved.config.num_labels)
    weights = check_state_dict(read_state_dict(tmp_path), shapes(model), tied=TIED, newly_initialized=OF_HEADS)
    left = set(shapes(model)) - set(weights)
    # transformers lists one name of a tied pair that is absent, we both.
    assert left - set(TIED) == set(info["missing_keys"]) - set(TIED)
    model.load_state_dict(weights, strict=False)
    kept = [name for name in model.state_dict() if name not in left]
    assert_same({n: model.state_dict()[n] for n in kept}, {n: expected.state_dict()[n] for n in kept})


def test_newly_initialized_are_listed_in_one_warning(generator):
    masked, classifier = (
        hf_model("AlbertForMaskedLM", generator),
        hf_model("AlbertForSequenceClassification", generator),
    )
    allowed = ("classifier.*", "albert.pooler.*")
    with pytest.warns(UserWarning, match="newly initialized") as caught:
        weights = check_state_dict(masked.state_dict(), shapes(classifier), newly_initialized=allowed)
    assert len(caught) == 1
    for name in ("albert.pooler.weight", "albert.pooler.bias", "classifier.weight", "classifier.bias"):
        assert name in str(caught[0].message)
        assert name not in weights
    assert "predictions.dense.weight" in str(caught[0].message).split("Not used")[1]
    with pytest.raises(CheckpointError, match=r"2 missing[^:]*:\n    albert.pooler.weight\n    albert.pooler.bias$"):
        check_state_dict(masked.state_dict(), shapes(classifier), newly_initialized=["classifier.*"])


@pytest.mark.filterwarnings("error")
def test_what_is_left_out_silently(generator):
    model, masked = hf_model("AlbertModel", generator), hf_model("AlbertForMaskedLM", generator)
    ids = torch.arange(16)[None]
    with_pooler = {
        **masked.state_dict(),
        "albert.pooler.weight": torch.ones(24, 24),
        "albert.embeddings.position_ids": ids,
    }
    assert_same(check_state_dict(with_pooler, shapes(masked), tied=TIED), masked.state_dict())
    own_head = {f"albert.{name}": tensor for name, tensor in model.state_dict().items()}
    own_head["my_head.weight"] = torch.ones(3)
    assert_same(check_state_dict(own_head, shapes(model)), model.state_dict())
    extra = {**model.state_dict(), "embeddings.position_ids": ids, "lora.a": torch.ones(3)}
    assert_same(check_state_dict(extra, shapes(model), ignore=["lora.*"]), model.state_dict())


def test_tied_names(generator):
    model = hf_model("AlbertForMaskedLM", generator)
    whole = model.state_dict()
    for half in (TIED.keys(), TIED.values()):  # either name of a pair will do
        got = check_state_dict({k: v for k, v in whole.items() if k not in half}, shapes(model), tied=TIED)
        assert_same(got, whole)
    registered_once = {name: shape for name, shape in shapes(model).items() if name not in TIED}
    assert set(check_state_dict(whole, registered_once, tied=TIED)) == set(registered_once)
    whole["predictions.decoder.bias"] = whole["predictions.bias"] + 1
    with pytest.raises(CheckpointError, match=r"1 tied but different.*\n    predictions.decoder.bias and predictions"):
        check_state_dict(whole, shapes(model), tied=TIED)
    assert_same(check_state_dict(whole, shapes(model)), whole)  # untied by the config


def test_one_error_lists_everything(generator):
    model = hf_model("AlbertForSequenceClassification", generator)
    weights = model.state_dict()
    del weights["classifier.bias"], weights["albert.pooler.bias"]
    weights["classifier.weight"] = torch.ones(3, 24)
    weights["albert.encoder.embedding_hidden_mapping_in.bias"] = torch.ones(24, dtype=torch.int8)
    weights["albert.encoder.surprise"] = torch.ones(1)
    weights["another.surprise"] = torch.ones(1)
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(weights, shapes(model))
    assert "2 missing" in str(caught.value)
    assert "2 unexpected" in str(caught.value)
    assert "2 mis-shaped" in str(caught.value)
    listed = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    ")]
    assert listed == [
        "albert.pooler.bias",
        "classifier.bias",
        "albert.encoder.surprise",
        "another.surprise",
        "albert.encoder.embedding_hidden_mapping_in.bias: torch.int8 in the checkpoint, a floating dtype in the model",
        "classifier.weight: (3, 24) in the checkpoint, (2, 24) in the model",
    ]


# Converting.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "float16"])
@pytest.mark.parametrize("safe", [True, False])
def test_convert(tmp_path, generator, dtype, safe):
    model = hf_model("AlbertForMaskedLM", generator)
    source, target = tmp_path / "in", tmp_path / "somewhere" / "out"
    model.config.save_pretrained(source)
    torch.save(
        {**model.state_dict(), "albert.embeddings.position_ids": torch.arange(16)[None]},
        source / "weights.pt",
    )
    (source / "spiece.model").write_bytes(b"pieces")
    (source / "optimizer.pt").write_bytes(b"not ours")
    convert(source / "weights.pt", target, dtype=dtype, safe_serialization=safe, max_shard_size=3000)
    assert (target / "spiece.model").read_bytes() == b"pieces"
    assert not (target / "optimizer.pt").exists()
    again, info = type(model).from_pretrained(target, output_loading_info=True)  # in the dtype of the config
    assert not any(info.values())
    expected = model if dtype is None else model.to(getattr(torch, str(dtype).removeprefix("torch.")))
    assert_same(again.state_dict(), expected.state_dict())
    assert set(read_state_dict(target)) == set(model.state_dict()) - set(TIED)
    convert(target, tmp_path / "back")
    assert_same(read_state_dict(tmp_path / "back"), read_state_dict(target))


def test_convert_all_or_nothing(tmp_path, monkeypatch, generator):
    AlbertConfig(**SIZES).save_pretrained(tmp_path / "in")
    with pytest.raises(CheckpointError, match="has no weights"):
        convert(tmp_path / "in", tmp_path / "out")
    write_state_dict(tmp_path / "in", random_weights(generator))
    for directory in ("in", "in/config.json"):
        with pytest.raises(CheckpointError, match="not an empty directory"):
            convert(tmp_path / "in", tmp_path / directory)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "copyfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "in", tmp_path / "out")
    assert files(tmp_path) == ["in"]
    (tmp_path / "out").mkdir()  # empty is as good as absent
    convert(tmp_path / "in", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "in")
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        convert(tmp_path / "in", tmp_path / "third")
    assert files(tmp_path) == ["in", "out"]
