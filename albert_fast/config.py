"""AlbertConfig: the fields of a Hugging Face ALBERT config.json, each of them checked."""

from __future__ import annotations

import difflib
import json
import math
import os
import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from albert_fast.activations import ACTIVATIONS

CONFIG_NAME = "config.json"
MODEL_TYPE = "albert"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_NOT_GIVEN: Any = None

SIZES = (
    "vocab_size",
    "embedding_size",
    "hidden_size",
    "num_hidden_layers",
    "num_hidden_groups",
    "num_attention_heads",
    "intermediate_size",
    "inner_group_num",
    "max_position_embeddings",
    "type_vocab_size",
)
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob")
_FLAGS = ("tie_word_embeddings", "return_dict", "output_hidden_states", "output_attentions")
# Written only where they differ from the default: they describe a use of the weights, not the weights.
_OPTIONAL = (
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "dtype",
    "architectures",
)


class ConfigError(ValueError):
    """A config that cannot be used; the message names the field or file, its value, and how to mend it."""


def _refuse(name: str, value: object, expected: str, mend: str) -> ConfigError:
    return ConfigError(f"AlbertConfig.{name} is {value!r}, expected {expected}: {mend}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # to Python a bool is an int


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _default_labels(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


@dataclass(kw_only=True)
class AlbertConfig:
    """The shape of an ALBERT and how its heads are used; the defaults are Hugging Face's (xxlarge, v2).

    `extra` keeps the keys of a config.json that this package does not read (`transformers_version`,
    `gap_size`, `position_embedding_type`, …) and writes them back unchanged. `num_labels` is the length of
    `id2label`; `num_labels=n` gives the labels LABEL_0 … LABEL_{n-1}. `dtype` is a `torch.dtype` or its name,
    kept as a `torch.dtype`. `chunk_size_feed_forward` is accepted and ignored.

    Raises ConfigError (a ValueError) for the first field that cannot be right. Fields may be assigned later:
    call `validate()` again after that.
    """

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_layers: int = 12
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout_prob: float = 0.1
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    tie_word_embeddings: bool = True
    chunk_size_feed_forward: int = 0
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    return_dict: bool = True
    output_hidden_states: bool = False
    output_attentions: bool = False
    dtype: torch.dtype | str | None = None
    architectures: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    num_labels: int = field(default=_NOT_GIVEN)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps num_labels and the names of the labels in step, when one of them is assigned later."""
        super().__setattr__(name, value)
        if not self.__dict__.get("_initialized"):
            return
        if name == "num_labels" and value != len(self.id2label or ()):
            self._name_labels(value)
        elif name == "id2label" and isinstance(value, dict):
            super().__setattr__("num_labels", len(value))

    def _name_labels(self, count: int) -> None:
        if not _is_int(count) or count < 1:
            raise _refuse("num_labels", count, "an int of at least 1", "pass the number of classes")
        self.id2label = _default_labels(count)
        self.label2id = {label: index for index, label in self.id2label.items()}

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):
            named = getattr(torch, self.dtype.removeprefix("torch."), None)
            if isinstance(named, torch.dtype):  # validate() refuses the rest
                self.dtype = named
        if self.id2label is None and self.label2id and isinstance(self.label2id, dict):
            self.id2label = {index: label for label, index in self.label2id.items()}
        if self.id2label is None:
            self._name_labels(2 if self.num_labels is _NOT_GIVEN else self.num_labels)
        elif isinstance(self.id2label, dict):
            try:  # JSON keys are strings
                self.id2label = {int(index): label for index, label in self.id2label.items()}
            except (TypeError, ValueError):
                mend = "number the labels 0, 1, …"
                raise _refuse("id2label", self.id2label, "a dict of int to str", mend) from None
            if self.num_labels is not _NOT_GIVEN and self.num_labels != len(self.id2label):
                mend = "drop num_labels, or drop id2label and label2id for the names LABEL_0, LABEL_1, …"
                raise _refuse("num_labels", self.num_labels, f"{len(self.id2label)}, the length of id2label", mend)
        if self.label2id is None and isinstance(self.id2label, dict):
            self.label2id = {label: index for index, label in self.id2label.items()}
        self.num_labels = len(self.id2label or ())
        self.validate()
        self._initialized = True

    def validate(self) -> None:
        """Check every field. Raises ConfigError: the field, its value, what was expected, how to mend it."""
        for name in SIZES:
            if not _is_int(value := getattr(self, name)) or value < 1:
                raise _refuse(name, value, "an int of at least 1", "write it as a plain whole number")
        for name in _PROBABILITIES:
            if not _is_number(value := getattr(self, name)) or not 0 <= value < 1:
                raise _refuse(name, value, "a probability in [0, 1)", "use 0.0 for no dropout")
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise _refuse(name, value, "a bool", "use true or false, without quotes")
        if self.hidden_size % self.num_attention_heads:
            below = self.hidden_size - self.hidden_size % self.num_attention_heads
            sizes = " or ".join(str(size) for size in (below, below + self.num_attention_heads) if size)
            expected = f"a multiple of num_attention_heads = {self.num_attention_heads}"
            mend = f"use {sizes}, or another number of heads"
            raise _refuse("hidden_size", self.hidden_size, expected, mend)
        if self.num_hidden_groups > self.num_hidden_layers:
            expected = f"between 1 and num_hidden_layers = {self.num_hidden_layers}"
            mend = "with 1, as released, all layers share one set of weights"
            raise _refuse("num_hidden_groups", self.num_hidden_groups, expected, mend)
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            mend = "gelu_new is what ALBERT was trained with"
            if self.hidden_act in ("prelu", "xielu"):
                mend = f"activations with parameters are not supported; {mend}"
            raise _refuse("hidden_act", self.hidden_act, f"one of {', '.join(ACTIVATIONS)}", mend)
        if not _is_number(self.layer_norm_eps) or self.layer_norm_eps <= 0:
            raise _refuse("layer_norm_eps", self.layer_norm_eps, "a number above 0", "ALBERT uses 1e-12")
        if not _is_number(self.initializer_range) or self.initializer_range < 0:
            raise _refuse("initializer_range", self.initializer_range, "a number of at least 0", "use 0.02")
        if not _is_int(chunk := self.chunk_size_feed_forward) or chunk < 0:
            raise _refuse("chunk_size_feed_forward", chunk, "an int of at least 0", "use 0")
        self._validate_tokens()
        self._validate_labels()
        dtype, names = self.dtype, self.architectures
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise _refuse("dtype", dtype, "a floating torch dtype, its name, or None", 'for example "bfloat16"')
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise _refuse("architectures", names, "a list of class names or None", "use None")
        if not isinstance(self.extra, dict) or not all(isinstance(key, str) for key in self.extra):
            raise _refuse("extra", self.extra, "a dict with str keys", "use {}")
        if known := sorted(self.extra.keys() & {*_FIELDS, "num_labels", "model_type"}):
            raise _refuse("extra", known, "keys that are no fields of AlbertConfig", "set the fields themselves")

    def _validate_tokens(self) -> None:
        pad, end = self.pad_token_id, self.eos_token_id
        if pad is not None and not (_is_int(pad) and 0 <= pad < self.vocab_size):
            expected = f"None or an int in [0, vocab_size = {self.vocab_size})"
            raise _refuse("pad_token_id", pad, expected, "use the tokenizer's id of <pad>, or None")
        # Stored only; eos may be a list. Not held against the vocabulary: small ones keep ALBERT's ids 2
        # and 3.
        if self.bos_token_id is not None and not _is_int(self.bos_token_id):
            raise _refuse("bos_token_id", self.bos_token_id, "an int or None", "use the tokenizer's id of [CLS]")
        if end is not None and not all(_is_int(each) for each in (end if isinstance(end, list) else [end])):
            raise _refuse("eos_token_id", end, "an int, a list of ints, or None", "use the tokenizer's id of [SEP]")

    def _validate_labels(self) -> None:
        labels, ids = self.id2label, self.label2id
        if not isinstance(labels, dict) or not labels or not all(isinstance(v, str) for v in labels.values()):
            mend = "name the labels, or pass num_labels"
            raise _refuse("id2label", labels, "a dict of int to str, not empty", mend)
        if not isinstance(ids, dict) or not all(isinstance(k, str) and _is_int(v) for k, v in ids.items()):
            raise _refuse("label2id", ids, "a dict of str to int", "leave it out: it follows from id2label")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            mend = "leave it None to have it found from the labels"
            raise _refuse("problem_type", self.problem_type, f"None or one of {', '.join(PROBLEM_TYPES)}", mend)
        if self.problem_type == "single_label_classification" and len(labels) == 1:
            mend = 'use num_labels=2, or problem_type="regression" for one output'
            raise _refuse("problem_type", self.problem_type, "two labels or more", mend)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> AlbertConfig:
        """From the keys of a config.json (string keys in `id2label` included); `overrides` take precedence.

        Keys that are no fields go to `extra`. `hidden_act` is taken as Hugging Face means it: "gelu" is the
        erf form (in Google's own albert_config.json it means the tanh form, "gelu_new" here). Raises
        ConfigError.
        """
        if (found := values.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise _refuse("model_type", found, repr(MODEL_TYPE), "this is the config of another kind of model")
        known = {*_FIELDS, "num_labels"}
        if unknown := sorted(overrides.keys() - known):  # most likely misspelt; a file's are kept in `extra`
            close = difflib.get_close_matches(unknown[0], known, n=1)
            raise _refuse(unknown[0], overrides[unknown[0]], "no such field", f"perhaps you meant {close}")
        fields_given = {key: value for key, value in values.items() if key in known}
        extra = {key: value for key, value in values.items() if key not in {*known, "model_type", "torch_dtype"}}
        if fields_given.get("dtype") is None:
            fields_given["dtype"] = values.get("torch_dtype")  # the key's name before transformers 5
        if fields_given.get("id2label") is not None:
            fields_given.pop("num_labels", None)  # id2label wins where a file has both, as in transformers
        if not overrides.keys().isdisjoint({"num_labels", "id2label"}):  # then none of the file's labels stays
            for key in ("num_labels", "id2label", "label2id"):
                fields_given.pop(key, None)
        return cls(**{**fields_given, **overrides}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """What goes to config.json; `from_dict` gives an equal config back."""
        values: dict[str, Any] = {**self.extra, "model_type": MODEL_TYPE}
        default = {**_DEFAULTS, "id2label": _default_labels(2), "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
        for name in _FIELDS:
            if name not in _OPTIONAL or getattr(self, name) != default[name]:
                values[name] = getattr(self, name)
        if "dtype" in values:
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **overrides: Any) -> AlbertConfig:
        """Read one JSON file. Raises ConfigError when it is missing, is not JSON, or holds no object."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: copy the model's {CONFIG_NAME} there") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
            raise ConfigError(f"{path} is not valid JSON ({error}): fetch it anew") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object of fields")
        try:
            return cls.from_dict(values, **overrides)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **overrides: Any) -> AlbertConfig:
        """Read `directory`/config.json; nothing is downloaded. Raises ConfigError."""
        if not Path(directory).is_dir():
            mend = f"give a local directory with a {CONFIG_NAME}; models on a hub are downloaded beforehand"
            raise ConfigError(f"{directory} is not a directory: {mend}")
        return cls.from_json_file(Path(directory) / CONFIG_NAME, **overrides)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `directory`/config.json; the directory is made. A reader finds the old file or the new
        one."""
        self.validate()
        try:
            text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError) as error:
            raise _refuse("extra", self.extra, "values that JSON can hold", str(error)) from None
        Path(directory).mkdir(parents=True, exist_ok=True)
        temporary = Path(directory) / f".{CONFIG_NAME}.{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(Path(directory) / CONFIG_NAME)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def base(cls, version: int = 2, **overrides: Any) -> AlbertConfig:
        """ALBERT base: 12 layers of 768, 12 heads. Version 1 was trained with dropout 0.1, 2 without.

        All named shapes use the tanh form of GELU ("gelu_new"), which both versions were trained with.
        Published version 1 configs may name "gelu" (the erf form) instead: `from_pretrained` takes a file
        at its word.
        """
        return cls._named(version, overrides, hidden_size=768, num_attention_heads=12)

    @classmethod
    def large(cls, version: int = 2, **overrides: Any) -> AlbertConfig:
        """ALBERT large: 24 layers of 1024, 16 heads. Versions as in `base`."""
        return cls._named(version, overrides, hidden_size=1024, num_attention_heads=16, num_hidden_layers=24)

    @classmethod
    def xlarge(cls, version: int = 2, **overrides: Any) -> AlbertConfig:
        """ALBERT xlarge: 24 layers of 2048, 16 heads. Versions as in `base`."""
        return cls._named(version, overrides, hidden_size=2048, num_attention_heads=16, num_hidden_layers=24)

    @classmethod
    def xxlarge(cls, version: int = 2, **overrides: Any) -> AlbertConfig:
        """ALBERT xxlarge: 12 layers of 4096, 64 heads. Both versions were trained without dropout."""
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return cls._named(version, {**without, **overrides})

    @classmethod
    def _named(cls, version: int, overrides: dict[str, Any], **shape: Any) -> AlbertConfig:
        if version not in (1, 2):
            raise _refuse("version", version, "1 or 2", "ALBERT was released in these two versions")
        if "hidden_size" in shape:
            shape["intermediate_size"] = 4 * shape["hidden_size"]
        dropout = 0.1 if version == 1 else 0.0
        shape.update(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        return cls(**{**shape, **overrides})


_DEFAULTS = {f.name: f.default for f in fields(AlbertConfig) if f.name not in ("extra", "num_labels")}
_FIELDS = tuple(_DEFAULTS)
