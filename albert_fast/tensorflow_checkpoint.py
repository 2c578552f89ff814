"""Google's ALBERT checkpoints, read without TensorFlow: TensorFlow 1 files, TF-Hub modules, fine-tuned models.

A checkpoint is a *prefix*, such as model.ckpt-best: PREFIX.index says which tensors there are, and
PREFIX.data-00000-of-00001 (and further shards) hold their bytes. The index is a table of LevelDB (sorted keys in
blocks, each block with a checksum) whose values are small protocol buffers: see doc/table_format.md of google/leveldb,
and tensor_bundle.proto and lib/io/format.cc of tensorflow/tensorflow. `Bundle` reads any such file; the rest of the
module knows ALBERT: what its variables are called at Google and at Hugging Face, and how their configs differ.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from albert_fast.checkpoint import ENTRIES, CheckpointError
from albert_fast.config import AlbertConfig

GOOGLE_CONFIG = "albert_config.json"
VOCABULARY = "30k-clean.model"

# Finding.


def find(source: str | os.PathLike[str]) -> Path | None:
    """The prefix of the TensorFlow checkpoint that `source` names, or None where it names something else.

    `source` is a prefix, one of its files, a directory with one checkpoint (of several, the one that the file
    `checkpoint` names), or a TF-Hub module (variables/variables.index). A directory that also holds weights of Hugging
    Face is none. Raises CheckpointError for a directory with several checkpoints and no word on which.
    """
    path = Path(source)
    if not path.is_dir():
        name = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
        return path.with_name(name) if name and path.with_name(f"{name}.index").is_file() else None
    if any((path / name).exists() for name in ENTRIES):
        return None
    for directory in (path, path / "variables"):
        if found := sorted(file.with_suffix("") for file in directory.glob("*.index") if file.is_file()):
            return found[0] if len(found) == 1 else _latest(directory, found)
    return None


def _latest(directory: Path, prefixes: list[Path]) -> Path:
    says = directory / "checkpoint"
    if says.is_file() and (name := re.search(r'^model_checkpoint_path: "(.+)"', says.read_text(errors="replace"))):
        prefix = directory / Path(name[1]).name  # the directory may have moved since
        if prefix in prefixes:
            return prefix
    names = ", ".join(prefix.name for prefix in prefixes)
    raise CheckpointError(f"{directory} has several TensorFlow checkpoints: give the path of one, such as {names}")


def _beside(prefix: Path, *names: str) -> Path | None:
    """The file of one of these names, where a release or a TF-Hub module puts it."""
    for directory in (prefix.parent, prefix.parent / "assets", prefix.parent.parent / "assets", prefix.parent.parent):
        for name in names:
            if (directory / name).is_file():
                return directory / name
    return None


def vocabulary(prefix: Path) -> Path | None:
    """The sentencepiece model that was released with the checkpoint, if it is still with it."""
    return _beside(prefix, VOCABULARY, "spiece.model")


# The config.


def read_config(prefix: Path) -> AlbertConfig:
    """From Google's albert_config.json beside the checkpoint, or in a TF-Hub module's assets.

    Google's "gelu" is the tanh form, which Hugging Face calls "gelu_new". Keys that AlbertConfig does not have
    (`net_structure_type` and others that ALBERT's own code ignores) go to `extra`. A config.json of Hugging Face
    will do, too, and is taken at its word. Raises CheckpointError where there is none, ConfigError for a bad one.
    """
    path = _beside(prefix, GOOGLE_CONFIG)
    if path is None:
        if (ours := _beside(prefix, "config.json")) is not None:
            return AlbertConfig.from_json_file(ours)
        raise CheckpointError(
            f"{prefix.parent} has no {GOOGLE_CONFIG}, nor has assets/ there or beside it: copy the one that the model "
            "was trained with into the checkpoint's directory"
        )
    config = AlbertConfig.from_json_file(path)
    return dataclasses.replace(config, hidden_act="gelu_new") if config.hidden_act == "gelu" else config


# The names.

_LAYER = r"bert/encoder/transformer/group_(\d+)/inner_group_(\d+)/"
_OUR_LAYER = r"albert.encoder.albert_layer_groups.\1.albert_layers.\2."
# Modules: what is called kernel and bias, or gamma and beta, in them is weight and bias at Hugging Face.
_MODULES = {
    r"bert/embeddings/LayerNorm": r"albert.embeddings.LayerNorm",
    r"bert/encoder/embedding_hidden_mapping_in": r"albert.encoder.embedding_hidden_mapping_in",
    _LAYER + r"attention_1/self/(query|key|value)": _OUR_LAYER + r"attention.\3",
    _LAYER + r"attention_1/output/dense": _OUR_LAYER + r"attention.dense",
    _LAYER + r"LayerNorm": _OUR_LAYER + r"attention.LayerNorm",
    _LAYER + r"ffn_1/intermediate/dense": _OUR_LAYER + r"ffn",
    _LAYER + r"ffn_1/intermediate/output/dense": _OUR_LAYER + r"ffn_output",
    _LAYER + r"LayerNorm_1": _OUR_LAYER + r"full_layer_layer_norm",
    r"bert/pooler/dense": r"albert.pooler",
    r"cls/predictions/transform/(dense|LayerNorm)": r"predictions.\1",
}
_LEAVES = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_TENSORS = {
    r"bert/embeddings/(word|position|token_type)_embeddings": r"albert.embeddings.\1_embeddings.weight",
    r"cls/predictions/output_bias": r"predictions.bias",
    r"cls/seq_relationship/output_weights": r"sop_classifier.classifier.weight",
    r"cls/seq_relationship/output_bias": r"sop_classifier.classifier.bias",
    r"output_weights": r"classifier.weight",
    r"output_bias": r"classifier.bias",
    r"cls/squad/output_weights": r"qa_outputs.weight",
    r"cls/squad/output_bias": r"qa_outputs.bias",
}
# What an optimizer leaves in a checkpoint.
_NOT_WEIGHTS = re.compile(r"(.*/)?((adam|lamb)_[mv]|global_step|AdamWeightDecayOptimizer(_1)?|LAMBOptimizer(_1)?)")
# What each class has besides the encoder.
_HEADS = {
    "AlbertForPreTraining": ("predictions", "sop_classifier"),
    "AlbertForMaskedLM": ("predictions",),
    "AlbertForSequenceClassification": ("classifier",),
    "AlbertForTokenClassification": ("classifier",),
    "AlbertForMultipleChoice": ("classifier",),
    "AlbertForQuestionAnswering": ("qa_outputs",),
    "AlbertModel": (),
}
# Where the checkpoint alone has to tell, the first of these whose heads are there.
_BY_HEAD = (
    "AlbertForQuestionAnswering",
    "AlbertForSequenceClassification",
    "AlbertForPreTraining",
    "AlbertForMaskedLM",
    "AlbertModel",
)


def hugging_face_name(variable: str) -> str | None:
    """What Hugging Face calls Google's variable, or None where it has none such."""
    variable = variable.removeprefix("module/")
    module, _, leaf = variable.rpartition("/")
    candidates = [(variable, pattern, name) for pattern, name in _TENSORS.items()]
    if leaf in _LEAVES:
        candidates += [(module, pattern, f"{name}.{_LEAVES[leaf]}") for pattern, name in _MODULES.items()]
    for text, pattern, name in candidates:
        if found := re.fullmatch(pattern, text):
            return found.expand(name)
    return None


def read_state_dict(prefix: Path, *, architecture: str | None = None, verify: bool = True) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names, in the checkpoint's dtypes; optimizers' state is left out.

    Kernels are transposed ([in, out] there, [out, in] here), embeddings and `output_weights` are not.

    Args:
        prefix: see `find`.
        architecture: the class to read for, one of `_HEADS`: other heads are left out, also those that no class here
            has. When None, all that the checkpoint has is read. A fine-tuned head that is called output_weights is
            `classifier`; for AlbertForQuestionAnswering it is `qa_outputs`.
        verify: compare the checksum of each tensor.

    Raises:
        CheckpointError: a file is missing or damaged, a variable is not ALBERT's, or the class's head is not there.
    """
    if architecture is not None and architecture not in _HEADS:
        raise CheckpointError(f"architecture is {architecture!r}, expected one of {', '.join(_HEADS)}")
    bundle = Bundle(prefix)
    variables: dict[str, str] = {}  # by our names
    unknown: list[str] = []
    for variable in bundle.entries:
        name = hugging_face_name(variable)
        if name is None:
            if not _NOT_WEIGHTS.fullmatch(variable):
                unknown.append(variable)
            continue
        if architecture == "AlbertForQuestionAnswering":
            name = re.sub(r"^classifier\.", "qa_outputs.", name)
        if name in variables:
            raise CheckpointError(
                f"{prefix} has both {variables[name]} and {variable}, expected one of them for {name}"
            )
        variables[name] = variable
    heads = {name.split(".")[0] for name in variables} - {"albert"}
    if architecture is not None:
        wanted = ("albert", *_HEADS[architecture])
        if absent := [head for head in wanted[1:] if head not in heads]:
            found = f"found {', '.join(sorted(heads)) or 'none'}"
            raise CheckpointError(f"{prefix} has no {' and no '.join(absent)}, the head of {architecture}: {found}")
        variables = {name: variables[name] for name in variables if name.split(".")[0] in wanted}
        unknown = [name for name in unknown if name.removeprefix("module/").startswith("bert/")]
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointError(
            f"{prefix} has variables that no class here has: {some}. Expected those of Google's TensorFlow 1 code, "
            "such as bert/pooler/dense/kernel; if only a head is foreign, name a class: AlbertModel has no heads"
        )
    tensors = {name: bundle.read(variable, verify) for name, variable in variables.items()}
    return {
        name: tensor.t().contiguous() if variables[name].endswith("/kernel") else tensor
        for name, tensor in tensors.items()
    }


def read(
    prefix: Path, *, architecture: str | None = None, verify: bool = True
) -> tuple[AlbertConfig, dict[str, Tensor]]:
    """Config and weights of a Hugging Face directory; `architectures` is what was asked for, or told by the heads.

    Raises CheckpointError, ConfigError: as `read_state_dict` and `read_config`, or the two do not fit.
    """
    config = read_config(prefix)
    weights = read_state_dict(prefix, architecture=architecture, verify=verify)
    heads = {name.split(".")[0] for name in weights} - {"albert"}
    if architecture is None:
        architecture = next(each for each in _BY_HEAD if heads.issuperset(_HEADS[each]))
    _check_sizes(prefix, config, weights)
    changes: dict[str, object] = {"architectures": [architecture]}
    labelled = ("AlbertForSequenceClassification", "AlbertForTokenClassification")
    if architecture in labelled and (labels := len(weights["classifier.weight"])) != config.num_labels:
        changes.update(num_labels=labels, id2label=None, label2id=None)
    if architecture == "AlbertModel":  # which Hugging Face writes without a prefix
        weights = {name.removeprefix("albert."): tensor for name, tensor in weights.items()}
    return dataclasses.replace(config, **changes), weights  # type: ignore[arg-type]


def _check_sizes(prefix: Path, config: AlbertConfig, weights: dict[str, Tensor]) -> None:
    """The sizes that a config of another model would most likely have wrong, before anything is written."""
    layer = "albert.encoder.albert_layer_groups.{}.albert_layers.{}."
    last = layer.format(config.num_hidden_groups - 1, config.inner_group_num - 1)
    expected = {
        "albert.embeddings.word_embeddings.weight": (config.vocab_size, config.embedding_size),
        "albert.embeddings.position_embeddings.weight": (config.max_position_embeddings, config.embedding_size),
        "albert.embeddings.token_type_embeddings.weight": (config.type_vocab_size, config.embedding_size),
        "albert.encoder.embedding_hidden_mapping_in.weight": (config.hidden_size, config.embedding_size),
        f"{last}ffn.weight": (config.intermediate_size, config.hidden_size),
    }
    for name, shape in expected.items():
        found = tuple(weights[name].shape) if name in weights else "nothing"
        if found != shape:
            raise CheckpointError(
                f"{prefix} has {found} for {name}, expected {shape} by {GOOGLE_CONFIG}: take the config of this model"
            )
    layers = {match[0] for name in weights if (match := re.match(layer.format(r"\d+", r"\d+"), name))}
    if len(layers) != (count := config.num_hidden_groups * config.inner_group_num):
        says = f"expected {count} (num_hidden_groups * inner_group_num) by {GOOGLE_CONFIG}"
        raise CheckpointError(f"{prefix} has {len(layers)} layers of its own, {says}: take the config of this model")


# The files.

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_BLOCK_TRAILER = 5  # one byte for the compression, four for the checksum
# DataType of tensorflow/core/framework/types.proto.
_DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `size` bytes from `offset` in the shard, row by row."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    slices: int  # partitioned variables: the number of parts, each of which has an entry of its own


class Bundle:
    """The tensors of one checkpoint; `entries` by name, read one at a time.

    Raises CheckpointError, naming the file, for what is missing, damaged or of a form that is not read here: compressed
    indexes (TensorFlow writes none), big-endian data, partitioned variables, strings.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index = prefix.with_name(f"{prefix.name}.index")
        try:
            raw = self.index.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self.index} cannot be read: {error.strerror}") from error
        try:
            table = dict(_table(raw))
            header = _message(table.pop(b""))
            if _last(header, 2):
                raise CheckpointError("is of a big-endian machine, expected little-endian: save it on another machine")
            self.shards = _last(header, 1)
            # A key that starts with 0 is of a part of a partitioned variable, whose whole has its own.
            self.entries = {key.decode(): _entry(value) for key, value in table.items() if key[0]}
        except CheckpointError as error:
            raise CheckpointError(f"{self.index} {error}") from None
        except (IndexError, KeyError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{self.index} is damaged or no index of TensorFlow ({reason}): fetch it anew"
            ) from error

    def read(self, name: str, verify: bool = True) -> Tensor:
        """One tensor, on the CPU, in the file's dtype."""
        entry = self.entries[name]
        path = self.prefix.with_name(f"{self.prefix.name}.data-{entry.shard:05d}-of-{self.shards:05d}")
        what = f"{name} of {self.index}"
        if entry.slices:
            mend = "save it again without a partitioner"
            raise CheckpointError(f"{what} is divided into {entry.slices} slices, expected a whole variable: {mend}")
        if entry.dtype not in _DTYPES:
            known = ", ".join(f"{key} ({str(dtype).removeprefix('torch.')})" for key, dtype in _DTYPES.items())
            raise CheckpointError(f"{what} has TensorFlow's data type {entry.dtype}, expected one of {known}")
        dtype = _DTYPES[entry.dtype]
        expected = int(np.prod(entry.shape, dtype=np.int64)) * dtype.itemsize
        if entry.size != expected:
            says = f"{entry.size} bytes for {list(entry.shape)} of {dtype}, expected {expected}"
            raise CheckpointError(f"{what} is damaged, it says {says}: fetch it anew")
        tensor = torch.empty(entry.shape, dtype=dtype)
        data = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with path.open("rb") as file:
                file.seek(entry.offset)
                count = file.readinto(data.data)
        except OSError as error:
            mend = f"copy all {self.shards} data files beside the index"
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}. {mend}") from error
        if count < entry.size:
            end = entry.offset + entry.size
            raise CheckpointError(f"{path} is cut off: {name} ends at byte {end}, beyond its end. Fetch it anew")
        if verify and _masked(crc32c(data)) != entry.checksum:
            raise CheckpointError(f"{path} is damaged: the checksum of {name} is not the index's. Fetch it anew")
        return tensor


def _table(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table: the footer leads to the index block, and that to the data blocks."""
    if len(raw) < _FOOTER or int.from_bytes(raw[-8:], "little") != _MAGIC:
        raise ValueError("the last 8 bytes are not a table's")
    footer = raw[-_FOOTER:]
    at = _varint(footer, _varint(footer, 0)[1])[1]  # behind the handle of the meta index, which is empty
    for _, handle in _block(raw, footer[at:]):
        yield from _block(raw, handle)


def _block(raw: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A key is stored as the part that it does not share with the one before it."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block = raw[offset : offset + size + _BLOCK_TRAILER]
    if len(block) != size + _BLOCK_TRAILER:
        raise ValueError(f"a block ends at byte {offset + size}, beyond the file's end")
    kind = block[size]
    if kind:
        how = "snappy" if kind == 1 else f"method {kind}"
        raise CheckpointError(f"is compressed ({how}), expected plain blocks, as TensorFlow writes them: save it again")
    if _masked(crc32c(np.frombuffer(block[: size + 1], np.uint8))) != int.from_bytes(block[size + 1 :], "little"):
        raise ValueError(f"the checksum of the block at byte {offset} is wrong")
    restarts = int.from_bytes(block[size - 4 : size], "little")  # for searching; whoever reads all needs none
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        own, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


# Protocol buffers, as far as the three messages need them.


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _message(data: bytes) -> list[tuple[int, int | bytes]]:
    """The fields of a message by number, in the order of the bytes."""
    fields: list[tuple[int, int | bytes]] = []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(data, at)
        elif tag & 7 in (1, 5):
            width = 8 if tag & 7 == 1 else 4
            value, at = int.from_bytes(data[at : at + width], "little"), at + width
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"a field of wire type {tag & 7}")
        fields.append((tag >> 3, value))
    return fields


def _last(fields: list[tuple[int, int | bytes]], number: int) -> int:
    """A field that holds one number; 0 when it is absent."""
    return next((value for field, value in reversed(fields) if field == number and isinstance(value, int)), 0)


def _entry(data: bytes) -> Entry:
    fields = _message(data)
    sizes = []
    for number, shape in fields:
        if number == 2 and isinstance(shape, bytes):
            sizes += [
                _last(_message(dim), 1) for field, dim in _message(shape) if field == 2 and isinstance(dim, bytes)
            ]
    return Entry(
        dtype=_last(fields, 1),
        shape=tuple(sizes),
        shard=_last(fields, 3),
        offset=_last(fields, 4),
        size=_last(fields, 5),
        checksum=_last(fields, 6),
        slices=sum(number == 7 for number, _ in fields),
    )


# CRC-32C (Castagnoli). A table gives the state two bytes later. numpy follows many stretches of the data at once: the
# state is linear in the bytes, so that the one of two stretches follows from theirs. About 100 MB/s.


def _advance(states: np.ndarray) -> np.ndarray:
    """The states after eight more bits, all 0."""
    for _ in range(8):
        states = np.where(states & 1, (states >> 1) ^ np.uint32(0x82F63B78), states >> 1)
    return states


_AFTER_16_BITS = _advance(_advance(np.arange(1 << 16, dtype=np.uint32)))


def _apply(columns: np.ndarray, states: np.ndarray) -> np.ndarray:
    """A linear map of 32 bits, given as what it makes of each bit, on each of the states."""
    bits = (states[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(bits * columns, axis=1)


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of bytes (uint8, one dimension)."""
    size = len(data)
    power = max(1, (size.bit_length() + 1) // 2)  # a stretch has 2^power bytes, and there are about as many
    count = 1 << max(0, max(0, size - 1).bit_length() - power)
    padded = np.zeros(count << power, np.uint8)
    padded[len(padded) - size :] = data  # zeros in front leave a state of 0 as it is
    start = np.array([0xFFFFFFFF], np.uint32)
    if size >= 4:  # to start with ones is to invert the first four bytes
        padded[len(padded) - size :][:4] ^= 0xFF
        start[:] = 0
    states = np.zeros(count, np.uint32)
    for words in np.ascontiguousarray(padded.view("<u2").reshape(count, -1).T):
        states = _AFTER_16_BITS[(states ^ words) & 0xFFFF] ^ (states >> 16)
    columns = _advance(np.uint32(1) << np.arange(32, dtype=np.uint32))
    for _ in range(power):
        columns = _apply(columns, columns)
    while len(states) > 1:
        states = _apply(columns, states[0::2]) ^ states[1::2]
        columns = _apply(columns, columns)
    for _ in range(size if size < 4 else 0):
        start = _advance(start)
    return int(states[0] ^ start[0]) ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """As it is stored: a checksum of bytes that hold their own checksum would be a weak one."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
