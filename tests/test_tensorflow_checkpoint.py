"""Google's checkpoints: files that TensorFlow wrote (tests/fixtures/tensorflow), and hand-made ones for damage."""

import itertools
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.tensorflow.write import CLASSIFIER, CONFIG, PRETRAINING, encoder, values

import albert_fast
from albert_fast import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertModel,
    cli,
)
from albert_fast.checkpoint import CheckpointError, convert, read_state_dict
from albert_fast.config import ConfigError
from albert_fast.tensorflow_checkpoint import Bundle, crc32c, find, hugging_face_name, read, read_config

FIXTURES = Path(__file__).parent / "fixtures" / "tensorflow"

LAYER = "bert/encoder/transformer/group_{0}/inner_group_0/"
OUR_LAYER = "albert.encoder.albert_layer_groups.{0}.albert_layers.0."
# Hugging Face's modules by Google's.
MODULES = {
    "bert/embeddings/LayerNorm": "albert.embeddings.LayerNorm",
    "bert/encoder/embedding_hidden_mapping_in": "albert.encoder.embedding_hidden_mapping_in",
    "bert/pooler/dense": "albert.pooler",
    "cls/predictions/transform/dense": "predictions.dense",
    "cls/predictions/transform/LayerNorm": "predictions.LayerNorm",
    **{
        LAYER.format(group) + theirs: OUR_LAYER.format(group) + ours
        for group in range(2)
        for theirs, ours in {
            "attention_1/self/query": "attention.query",
            "attention_1/self/key": "attention.key",
            "attention_1/self/value": "attention.value",
            "attention_1/output/dense": "attention.dense",
            "LayerNorm": "attention.LayerNorm",
            "ffn_1/intermediate/dense": "ffn",
            "ffn_1/intermediate/output/dense": "ffn_output",
            "LayerNorm_1": "full_layer_layer_norm",
        }.items()
    },
}
LEAVES = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
NAMES = {
    "bert/embeddings/word_embeddings": "albert.embeddings.word_embeddings.weight",
    "bert/embeddings/position_embeddings": "albert.embeddings.position_embeddings.weight",
    "bert/embeddings/token_type_embeddings": "albert.embeddings.token_type_embeddings.weight",
    "cls/predictions/output_bias": "predictions.bias",
    "cls/seq_relationship/output_weights": "sop_classifier.classifier.weight",
    "cls/seq_relationship/output_bias": "sop_classifier.classifier.bias",
    "output_weights": "classifier.weight",
    "output_bias": "classifier.bias",
}


def expected(shapes, dtype=torch.float32, prefix=""):
    tensors = {}
    for variable, shape in shapes.items():
        module, _, leaf = variable.rpartition("/")
        value = values(prefix + variable, shape)
        name = NAMES[variable] if variable in NAMES else f"{MODULES[module]}.{LEAVES[leaf]}"
        tensors[name] = torch.from_numpy(value.T.copy() if leaf == "kernel" else value).to(dtype)
    return tensors


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
        assert got[name].is_contiguous(), name


# What TensorFlow wrote.


def test_plain():
    assert {path.name for path in (FIXTURES / "plain").glob("*data*")} == {
        f"model.ckpt-best.data-0000{shard}-of-00002" for shard in range(2)
    }
    wanted = expected({**encoder(), **PRETRAINING})
    for source in ("plain", "plain/model.ckpt-best", "plain/model.ckpt-best.index"):
        assert_same(read_state_dict(FIXTURES / source), wanted)
    step = Bundle(FIXTURES / "plain" / "model.ckpt-best").read("global_step")
    assert step.dtype == torch.int64
    assert step.shape == ()
    assert step.item() == 125000


def test_module():
    config, weights = read(find(FIXTURES / "hub"))
    assert_same(weights, expected({**encoder(), **PRETRAINING}, torch.bfloat16, "module/"))
    assert config.architectures == ["AlbertForPreTraining"]


def test_finetuned():
    prefix = find(FIXTURES / "finetuned")
    assert prefix.name == "model.ckpt-10"
    config, weights = read(prefix)
    assert_same(weights, expected({**encoder(), **CLASSIFIER}))
    assert config.architectures == ["AlbertForSequenceClassification"]
    config, answers = read(prefix, architecture="AlbertForQuestionAnswering")
    assert config.architectures == ["AlbertForQuestionAnswering"]
    assert torch.equal(answers["qa_outputs.weight"], weights["classifier.weight"])
    assert torch.equal(answers["qa_outputs.bias"], weights["classifier.bias"])
    assert "classifier.weight" not in answers
    config, bare = read(prefix, architecture="AlbertModel")
    assert config.architectures == ["AlbertModel"]
    assert_same(bare, {name.removeprefix("albert."): each for name, each in expected(encoder()).items()})


def test_partitioned():
    with pytest.raises(CheckpointError, match=r"word_embeddings of .*model.ckpt.index is divided into 2 slices"):
        read_state_dict(FIXTURES / "partitioned")


def test_config():
    config = read_config(FIXTURES / "plain" / "model.ckpt-best")
    assert config.hidden_act == "gelu_new"
    for name, value in CONFIG.items():
        if name in ("net_structure_type", "gap_size", "num_memory_blocks", "down_scale_factor"):
            assert config.extra[name] == value
        elif name != "hidden_act":
            assert getattr(config, name) == value
    assert config.classifier_dropout_prob == 0.1


@pytest.mark.parametrize("name", ["AlbertModel", "AlbertForMaskedLM", "AlbertForPreTraining"])
def test_converted_is_transformers_own(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    convert(FIXTURES / "plain", tmp_path / "out", architecture=name)
    model, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert model.config.architectures == [name]
    assert model.config.hidden_act == "gelu_new"
    ids = torch.randint(20, (2, 5))
    ours = globals()[name].from_pretrained(tmp_path / "out")
    for mine, theirs in zip(ours(ids).to_tuple(), model.eval()(ids).to_tuple(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def google(variables, ids, segments):
    """Google's ALBERT as its variables are named there, in numpy: logits of words and of the sentences' order."""

    def dense(x, scope):
        return x @ variables[f"{scope}/kernel"] + variables[f"{scope}/bias"]

    def layer_norm(x, scope):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * variables[f"{scope}/gamma"] + variables[f"{scope}/beta"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def heads(x):  # [tokens, hidden] -> [2 heads, tokens, 4]
        return x.reshape(len(x), 2, 4).transpose(1, 0, 2)

    x = variables["bert/embeddings/word_embeddings"][ids] + variables["bert/embeddings/token_type_embeddings"][segments]
    x = layer_norm(x + variables["bert/embeddings/position_embeddings"][: len(ids)], "bert/embeddings/LayerNorm")
    x = dense(x, "bert/encoder/embedding_hidden_mapping_in")
    for number in range(3):
        layer = f"bert/encoder/transformer/group_{int(number / 3 * 2)}/inner_group_0"
        query, key, value = (heads(dense(x, f"{layer}/attention_1/self/{name}")) for name in ("query", "key", "value"))
        scores = query @ key.transpose(0, 2, 1) / 2
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        context = (weights @ value).transpose(1, 0, 2).reshape(len(ids), 8)
        x = layer_norm(x + dense(context, f"{layer}/attention_1/output/dense"), f"{layer}/LayerNorm")
        inner = gelu(dense(x, f"{layer}/ffn_1/intermediate/dense"))
        x = layer_norm(x + dense(inner, f"{layer}/ffn_1/intermediate/output/dense"), f"{layer}/LayerNorm_1")
    head = layer_norm(gelu(dense(x, "cls/predictions/transform/dense")), "cls/predictions/transform/LayerNorm")
    words = head @ variables["bert/embeddings/word_embeddings"].T + variables["cls/predictions/output_bias"]
    pooled = np.tanh(dense(x[0], "bert/pooler/dense"))
    order = pooled @ variables["cls/seq_relationship/output_weights"].T + variables["cls/seq_relationship/output_bias"]
    return words, order


def test_computes_what_google_computes():
    prefix = find(FIXTURES / "plain")
    bundle = Bundle(prefix)
    variables = {name: bundle.read(name).double().numpy() for name in bundle.entries}
    model = AlbertForPreTraining.from_pretrained(prefix, config=read_config(prefix), dtype=torch.float64)
    ids, segments = torch.randint(1, 20, (9,)), torch.tensor([0] * 5 + [1] * 4)
    got = model(ids[None], token_type_ids=segments[None])
    words, order = google(variables, ids.numpy(), segments.numpy())
    torch.testing.assert_close(got.prediction_logits[0].detach().numpy(), words, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.sop_logits[0].detach().numpy(), order, rtol=1e-9, atol=1e-9)


def test_from_pretrained_without_converting():
    prefix = find(FIXTURES / "plain")
    model = AlbertForPreTraining.from_pretrained(prefix.parent, config=read_config(prefix))
    wanted = expected({**encoder(), **PRETRAINING})
    assert_same({name: model.state_dict()[name] for name in wanted}, wanted)


def test_command(tmp_path, capsys):
    source = tmp_path / "in"
    shutil.copytree(FIXTURES / "finetuned", source)
    (source / "30k-clean.model").write_bytes(b"pieces")
    assert cli.main(["convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert (tmp_path / "out" / "spiece.model").read_bytes() == b"pieces"
    model = AlbertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    question = ["--architecture", "AlbertForQuestionAnswering"]
    assert cli.main(["convert", str(source / "model.ckpt-5"), str(tmp_path / "qa"), *question]) == 0
    AlbertForQuestionAnswering.from_pretrained(tmp_path / "qa")
    assert cli.main(["convert", str(tmp_path / "qa"), str(tmp_path / "again"), *question]) == 2
    assert "no TensorFlow checkpoint" in capsys.readouterr().err
    assert cli.main(["convert", str(source), str(tmp_path / "no"), "--architecture", "AlbertForMaskedLM"]) == 2
    assert "has no predictions, the head of AlbertForMaskedLM: found classifier" in capsys.readouterr().err
    assert cli.main(["convert", str(source), str(tmp_path / "no"), "--architecture", "Albert"]) == 2
    assert "expected one of AlbertForPreTraining" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


# A writer of the same format, for what TensorFlow would not write.


def varint(number):
    low = b""
    while number > 127:
        low, number = low + bytes([number & 127 | 128]), number >> 7
    return low + bytes([number])


def field(number, value):
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def checksum(data):
    """CRC-32C bit by bit, masked as it is stored."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def block(items, kind=0):
    raw, last = b"", b""
    for key, value in items:
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(last, key, strict=False)))
        raw += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    raw += struct.pack("<II", 0, 1) + bytes([kind])  # where keys are whole: at the start only
    return raw + checksum(raw)


def table(items, kind=0, per_block=3):
    raw, handles = b"", []
    for start in range(0, len(items), per_block):
        part = block(items[start : start + per_block], kind)
        handles.append((items[start : start + per_block][-1][0], varint(len(raw)) + varint(len(part) - 5)))
        raw += part
    footer = b""
    for part in (block([]), block(handles)):
        footer += varint(len(raw)) + varint(len(part) - 5)
        raw += part
    return raw + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


TYPES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.int32: 3,
    torch.uint8: 4,
    torch.int64: 9,
    torch.bfloat16: 14,
    torch.float16: 19,
}


def write(prefix, tensors, *, header=b"", kind=0, changed=None):
    """`changed`: bytes behind the entry of each of the named variables, which override its fields."""
    data, items = b"", []
    for name, tensor in sorted(tensors.items()):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
        entry = field(1, TYPES[tensor.dtype]) + field(2, shape) + field(4, len(data)) + field(5, len(raw))
        items.append((name.encode(), entry + b"\x35" + checksum(raw) + (changed or {}).get(name, b"")))
        data += raw
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.index").write_bytes(table([(b"", field(1, 1) + header), *items], kind))
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    return prefix


def of_encoder(**more):
    shapes = {**encoder(), **more}
    return {name: torch.from_numpy(values(name, shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype != torch.uint8])
def test_dtypes_and_shapes(tmp_path, dtype):
    tensors = {
        f"{'x' * length}/{length}": torch.randint(-100, 100, (length, 3)).to(dtype) for length in (0, 1, 2, 31, 300)
    }
    tensors["scalar"] = torch.tensor(7).to(dtype)
    bundle = Bundle(write(tmp_path / "model.ckpt", tensors))
    assert list(bundle.entries) == sorted(tensors)
    assert_same({name: bundle.read(name) for name in tensors}, tensors)


def test_checksums():
    # RFC 3720, B.4, and the check value of the CRC catalogue
    for data, crc in {
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        b"123456789": 0xE3069283,
        b"": 0,
    }.items():
        assert crc32c(np.frombuffer(data, np.uint8)) == crc
    for size in (1, 2, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 5000):
        data = random.randbytes(size)
        crc = crc32c(np.frombuffer(data, np.uint8))
        assert struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) == checksum(data)


def with_config(prefix, **changes):
    prefix.with_name("albert_config.json").write_text(json.dumps({**CONFIG, **changes}))
    return prefix


@pytest.mark.parametrize(
    ("rows", "architecture"),
    [(1, None), (3, None), (3, "AlbertForTokenClassification"), (1, "AlbertForMultipleChoice")],
)
def test_heads_by_shape(tmp_path, rows, architecture):
    prefix = with_config(write(tmp_path / "model.ckpt", of_encoder(output_weights=(rows, 8), output_bias=(rows,))))
    convert(prefix, tmp_path / "out", architecture=architecture)
    config = AlbertConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == [architecture or "AlbertForSequenceClassification"]
    assert config.num_labels == (2 if architecture == "AlbertForMultipleChoice" else rows)
    getattr(albert_fast, config.architectures[0]).from_pretrained(tmp_path / "out")


def test_squad(tmp_path):
    weights = of_encoder(**{"cls/squad/output_weights": (2, 8), "cls/squad/output_bias": (2,)})
    convert(with_config(write(tmp_path / "model.ckpt", weights)), tmp_path / "out")
    model = AlbertForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.config.architectures == ["AlbertForQuestionAnswering"]
    assert torch.equal(model.qa_outputs.weight, weights["cls/squad/output_weights"])


def test_foreign_variables(tmp_path):
    prefix = with_config(write(tmp_path / "model.ckpt", of_encoder(**{"start_logits/dense/kernel": (8, 1)})))
    with pytest.raises(CheckpointError, match=r"no class here has: start_logits/dense/kernel\..*AlbertModel"):
        read(prefix)
    convert(prefix, tmp_path / "out", architecture="AlbertModel")
    AlbertModel.from_pretrained(tmp_path / "out")
    prefix = write(tmp_path / "bert", of_encoder(**{"bert/encoder/layer_0/output/dense/kernel": (16, 8)}))
    for architecture in (None, "AlbertModel"):
        with pytest.raises(CheckpointError, match=r"bert/encoder/layer_0/output/dense/kernel"):
            read(prefix, architecture=architecture)
    prefix = write(tmp_path / "twice", of_encoder(**{"module/bert/pooler/dense/bias": (8,)}))
    with pytest.raises(CheckpointError, match=r"has both bert/pooler/dense/bias and module/bert/pooler/dense/bias"):
        read(prefix)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 16}, r"\(8, 4\) for albert.encoder.embedding_hidden_mapping_in.weight, expected \(16, 4\)"),
        ({"vocab_size": 30}, r"\(20, 4\) for albert.embeddings.word_embeddings.weight, expected \(30, 4\)"),
        ({"intermediate_size": 32}, r"ffn.weight, expected \(32, 8\)"),
        ({"num_hidden_groups": 3}, r"nothing for .*groups.2.*ffn.weight"),
        ({"num_hidden_groups": 1}, r"has 2 layers of its own, expected 1 "),
        ({"hidden_act": "gelu!"}, r"albert_config.json: AlbertConfig.hidden_act is 'gelu!'"),
    ],
)
def test_config_of_another_model(tmp_path, changes, says):
    prefix = with_config(write(tmp_path / "model.ckpt", of_encoder()), **changes)
    with pytest.raises((CheckpointError, ConfigError), match=says):
        convert(prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_config(tmp_path):
    prefix = write(tmp_path / "model.ckpt", of_encoder())
    with pytest.raises(CheckpointError, match=r"has no albert_config.json, nor has assets/"):
        convert(prefix, tmp_path / "out")
    AlbertConfig.from_dict({**CONFIG, "hidden_act": "gelu"}).save_pretrained(tmp_path)
    assert read_config(prefix).hidden_act == "gelu"  # Hugging Face's word for the erf form


# Damage.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": 1}, r"model.ckpt.index is compressed \(snappy\)"),
        ({"kind": 7}, r"model.ckpt.index is compressed \(method 7\)"),
        ({"header": field(2, 1)}, r"model.ckpt.index is of a big-endian machine"),
        ({"changed": {"b": field(1, 7)}}, r"b of .*index has TensorFlow's data type 7, expected one of 1 \(float32\)"),
        ({"changed": {"b": field(7, b"")}}, r"b of .*index is divided into 1 slices"),
        ({"changed": {"b": field(5, 9)}}, r"it says 9 bytes for \[3\] of torch.float32, expected 12"),
        ({"changed": {"b": field(4, 9)}}, r"data-00000-of-00001 is cut off: b ends at byte 21"),
        ({"changed": {"b": field(4, 0)}}, r"data-00000-of-00001 is damaged: the checksum of b"),
        ({"changed": {"b": field(3, 4)}}, r"data-00004-of-00001 cannot be read: No such file.*all 1 data files"),
    ],
)
def test_unreadable(tmp_path, options, says):
    prefix = write(tmp_path / "model.ckpt", {"a": torch.ones(2), "b": torch.arange(3.0)}, **options)
    with pytest.raises(CheckpointError, match=says):
        Bundle(prefix).read("b")


def test_verify_is_optional(tmp_path):
    prefix = write(tmp_path / "model.ckpt", {"a": torch.ones(3)})
    Path(f"{prefix}.data-00000-of-00001").write_bytes(torch.full((3,), 2.0).numpy().tobytes())
    assert Bundle(prefix).read("a", verify=False).tolist() == [2, 2, 2]
    with pytest.raises(CheckpointError, match="checksum"):
        Bundle(prefix).read("a")


def test_damaged_indexes(tmp_path):
    whole = (FIXTURES / "finetuned" / "model.ckpt-10.index").read_bytes()
    path = tmp_path / "model.ckpt.index"
    shown = Bundle(FIXTURES / "finetuned" / "model.ckpt-10").entries
    for size in {0, 1, 47, 48, 100, len(whole) - 1, *random.choices(range(len(whole)), k=10)}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model.ckpt.index is damaged or no index"):
            Bundle(path.with_suffix(""))
    complaints = []
    for at in random.choices(range(len(whole)), k=60):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            entries = Bundle(path.with_suffix("")).entries
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            assert entries == shown  # bytes that nobody reads: the footer's padding
    assert all(str(path) in complaint for complaint in complaints)


def test_finding(tmp_path):
    assert find(tmp_path) is None
    assert find(tmp_path / "absent") is None
    for name in ("a.ckpt-1", "a.ckpt-2"):
        write(tmp_path / name, {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"has several TensorFlow checkpoints: .* as a.ckpt-1, a.ckpt-2"):
        find(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/where/it/was/a.ckpt-1"\n')
    assert find(tmp_path) == tmp_path / "a.ckpt-1"
    for name in ("a.ckpt-2", "a.ckpt-2.index", "a.ckpt-2.data-00000-of-00001", "a.ckpt-2.meta"):
        assert find(tmp_path / name) == tmp_path / "a.ckpt-2"
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert find(tmp_path) is None  # a directory of Hugging Face first of all
    assert find(tmp_path / "model.safetensors.index.json") is None


def test_names_that_are_not_weights():
    assert hugging_face_name("bert/pooler/dense/kernel/adam_m") is None
    assert hugging_face_name("xbert/pooler/dense/kernel") is None
    assert hugging_face_name("module/bert/pooler/dense/kernel") == "albert.pooler.weight"


def test_the_masked_head_is_tied(tmp_path):
    convert(FIXTURES / "plain", tmp_path / "out")
    model = AlbertForMaskedLM.from_pretrained(tmp_path / "out")
    assert model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight
