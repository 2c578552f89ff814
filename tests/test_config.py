"""AlbertConfig: what it accepts, what it refuses and how it says so, and its files read and written with
transformers."""

import dataclasses
import json
import random
import re

import pytest
import torch

from albert_fast.activations import ACTIVATIONS
from albert_fast.config import PROBLEM_TYPES, AlbertConfig, ConfigError

SMALL = {
    "vocab_size": 50,
    "embedding_size": 8,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
# Fields that transformers' config has as well, under the same names.
SHARED = [f.name for f in dataclasses.fields(AlbertConfig) if f.name != "extra"]


def random_fields() -> dict:
    seed = random.SystemRandom().randrange(2**31)
    print("seed", seed)
    rng = random.Random(seed)
    heads, layers = rng.randint(1, 9), rng.randint(1, 9)
    return {
        "vocab_size": rng.randint(10, 99),
        "embedding_size": rng.randint(1, 99),
        "hidden_size": heads * rng.randint(1, 9),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_hidden_groups": rng.randint(1, layers),
        "inner_group_num": rng.randint(1, 3),
        "intermediate_size": rng.randint(1, 99),
        "hidden_act": rng.choice(sorted(ACTIVATIONS)),
        "hidden_dropout_prob": rng.random(),
        "attention_probs_dropout_prob": rng.choice([0, 0.0, 0.5]),
        "classifier_dropout_prob": rng.random(),
        "max_position_embeddings": rng.randint(1, 99),
        "type_vocab_size": rng.randint(1, 4),
        "initializer_range": rng.random(),
        "layer_norm_eps": rng.random(),
        "pad_token_id": rng.choice([None, 0, 9]),
        "bos_token_id": rng.choice([None, 5]),
        "eos_token_id": rng.choice([None, 6, [6, 7]]),
        "tie_word_embeddings": rng.random() < 0.5,
        "problem_type": rng.choice([None, *PROBLEM_TYPES]),
        "return_dict": rng.random() < 0.5,
        "output_hidden_states": rng.random() < 0.5,
        "dtype": rng.choice([None, "float32", "bfloat16", "float16"]),
        "architectures": rng.choice([None, ["AlbertForMaskedLM"]]),
        "num_labels": rng.randint(2, 5),
    }


def test_defaults_are_those_of_transformers():
    ours, theirs = AlbertConfig(), pytest.importorskip("transformers").AlbertConfig()
    assert {name: getattr(ours, name) for name in SHARED} == {name: getattr(theirs, name) for name in SHARED}


@pytest.mark.parametrize("repetition", range(5))
def test_files_of_transformers_load_here_and_ours_there(tmp_path, repetition):
    transformers = pytest.importorskip("transformers")
    fields = random_fields()
    theirs = transformers.AlbertConfig(**fields, a_key_of_tomorrow={"x": [1]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = AlbertConfig.from_pretrained(tmp_path / "theirs")
    assert {name: getattr(ours, name) for name in SHARED} == {name: getattr(theirs, name) for name in SHARED}
    assert ours.extra["a_key_of_tomorrow"] == {"x": [1]}

    AlbertConfig(**fields, extra={"a_key_of_tomorrow": {"x": [1]}}).save_pretrained(tmp_path / "ours")
    again = transformers.AlbertConfig.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == transformers.AlbertConfig.from_pretrained(tmp_path / "theirs").to_dict()


def test_a_file_round_trips_with_every_foreign_key(tmp_path):
    config = AlbertConfig(**random_fields(), extra={"gap_size": 0, "transformers_version": "2.3", "e": [{"f": None}]})
    config.save_pretrained(tmp_path / "new" / "directory")
    assert AlbertConfig.from_pretrained(tmp_path / "new" / "directory") == config
    assert AlbertConfig.from_dict(config.to_dict()) == config
    assert [path.name for path in (tmp_path / "new" / "directory").iterdir()] == ["config.json"]
    values = json.loads((tmp_path / "new" / "directory" / "config.json").read_text())
    assert values["model_type"] == "albert"
    assert values["gap_size"] == 0


def test_labels():
    assert AlbertConfig().num_labels == 2
    config = AlbertConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config.num_labels = 1
    assert (config.id2label, config.label2id) == ({0: "LABEL_0"}, {"LABEL_0": 0})
    named = AlbertConfig.from_dict({"id2label": {"0": "no", "1": "yes", "2": "perhaps"}})
    assert (named.num_labels, named.label2id) == (3, {"no": 0, "yes": 1, "perhaps": 2})
    assert AlbertConfig(label2id={"no": 0, "yes": 1, "perhaps": 2}).id2label == named.id2label
    assert dataclasses.replace(named, hidden_dropout_prob=0.5).id2label == named.id2label
    assert AlbertConfig.from_dict(named.to_dict(), num_labels=5).num_labels == 5  # for another task's head
    assert AlbertConfig.from_dict({"num_labels": 7, "id2label": {"0": "a"}}).num_labels == 1
    with pytest.raises(ConfigError, match=r"num_labels is 4, expected 3.*id2label"):
        AlbertConfig(id2label=named.id2label, num_labels=4)


def test_dtype_is_a_torch_dtype_whatever_the_key():
    assert AlbertConfig(dtype="bfloat16").dtype is torch.bfloat16
    assert AlbertConfig(dtype=torch.float16).to_dict()["dtype"] == "float16"
    assert AlbertConfig.from_dict({"torch_dtype": "float16"}).dtype is torch.float16
    assert "torch_dtype" not in AlbertConfig.from_dict({"torch_dtype": "float16"}).to_dict()


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "layers", "dropout_of_v1"),
    [
        ("base", 768, 12, 12, 0.1),
        ("large", 1024, 16, 24, 0.1),
        ("xlarge", 2048, 16, 24, 0.1),
        ("xxlarge", 4096, 64, 12, 0),
    ],
)
def test_named_shapes(name, hidden, heads, layers, dropout_of_v1):
    for version, dropout in ((1, dropout_of_v1), (2, 0)):
        config = getattr(AlbertConfig, name)(version=version)
        assert (config.hidden_size, config.intermediate_size) == (hidden, 4 * hidden)
        assert (config.num_attention_heads, config.num_hidden_layers) == (heads, layers)
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (dropout, dropout)
        assert (config.embedding_size, config.hidden_act) == (128, "gelu_new")
    assert getattr(AlbertConfig, name)(hidden_dropout_prob=0.3, num_labels=5).hidden_dropout_prob == 0.3
    with pytest.raises(ConfigError, match="version is 3, expected 1 or 2"):
        getattr(AlbertConfig, name)(version=3)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", "30000", "an int of at least 1"),
        ("vocab_size", True, "an int of at least 1"),
        ("num_hidden_layers", 2.0, "an int of at least 1"),
        ("embedding_size", 0, "an int of at least 1"),
        ("hidden_size", 25, "multiple of num_attention_heads = 3: use 24 or 27"),
        ("num_hidden_groups", 13, "between 1 and num_hidden_layers = 12"),
        ("num_hidden_groups", 0, "an int of at least 1"),
        ("hidden_dropout_prob", 1.0, r"\[0, 1\)"),
        ("attention_probs_dropout_prob", -0.1, r"\[0, 1\)"),
        ("classifier_dropout_prob", None, r"\[0, 1\)"),
        ("classifier_dropout_prob", float("nan"), r"\[0, 1\)"),
        ("layer_norm_eps", 0.0, "above 0"),
        ("layer_norm_eps", "1e-12", "above 0"),
        ("initializer_range", float("inf"), "at least 0"),
        ("hidden_act", "gelu_newer", "one of gelu, "),
        ("hidden_act", "prelu", "activations with parameters are not supported"),
        ("hidden_act", "xielu", "activations with parameters are not supported"),
        ("hidden_act", ["gelu"], "one of gelu, "),
        ("pad_token_id", 50, r"\[0, vocab_size = 50\)"),
        ("pad_token_id", -1, r"\[0, vocab_size = 50\)"),
        ("bos_token_id", "2", "an int or None"),
        ("eos_token_id", [3, None], "a list of ints"),
        ("tie_word_embeddings", "false", "a bool"),
        ("return_dict", 1, "a bool"),
        ("chunk_size_feed_forward", -1, "at least 0"),
        ("num_labels", 0, "at least 1"),
        ("id2label", {"first": "a"}, "a dict of int to str"),
        ("id2label", ["a", "b"], "a dict of int to str"),
        ("id2label", {}, "not empty"),
        ("label2id", {"a": "0"}, "a dict of str to int"),
        ("problem_type", "classification", "None or one of regression"),
        ("dtype", "float31", "a floating torch dtype"),
        ("dtype", "int8", "a floating torch dtype"),
        ("architectures", "AlbertModel", "a list"),
        ("extra", {"hidden_size": 24}, "no fields of AlbertConfig"),
    ],
)
def test_errors_name_the_field_the_value_and_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError, match=rf"(?s)AlbertConfig\.{field} is .*, expected .*{expected}") as caught:
        AlbertConfig(**{**SMALL, field: value})
    assert str(value) in str(caught.value) or field == "extra"
    assert re.search(r": \S.+$", str(caught.value))  # how to mend it


def test_assigned_fields_are_checked_by_validate_and_before_saving(tmp_path):
    config = AlbertConfig(**SMALL)
    config.hidden_size = 25
    for check in (config.validate, lambda: config.save_pretrained(tmp_path)):
        with pytest.raises(ConfigError, match="hidden_size is 25"):
            check()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="problem_type"):
        AlbertConfig(problem_type="single_label_classification", num_labels=1)


def test_foreign_models_and_misspelt_overrides_are_refused():
    with pytest.raises(ConfigError, match="model_type is 'bert', expected 'albert'"):
        AlbertConfig.from_dict({"model_type": "bert"})
    with pytest.raises(ConfigError, match=r"hidden_sise is 24.*hidden_size"):
        AlbertConfig.from_dict({}, hidden_sise=24)
    assert AlbertConfig.from_dict({"hidden_sise": 24}).extra == {"hidden_sise": 24}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        (b"", "not valid JSON"),
        (b'{"vocab_size": 30000,', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b'{"vocab_size": 0}', "vocab_size is 0"),
    ],
)
def test_bad_files_give_one_error_that_names_them(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        AlbertConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_name_of_a_hub_is_not_downloaded(tmp_path):
    with pytest.raises(ConfigError, match=r"not a directory.*downloaded beforehand"):
        AlbertConfig.from_pretrained(tmp_path / "albert-base-v2")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    AlbertConfig(**SMALL).save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("albert_fast.config.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        AlbertConfig.base().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="values that JSON can hold"):
        AlbertConfig(extra={"model": object()}).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
