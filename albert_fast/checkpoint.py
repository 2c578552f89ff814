"""Weight files of Hugging Face directories: read, checked against a model, and written without risk to old
ones.

A directory's weights are reached through one *entry*: the first of `ENTRIES` that exists, either a whole
file or an index that names shards. Writing rests on that: a new entry becomes visible by one rename, or by
the removal of the entry that hid it, and no file that the visible entry refers to is touched before.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from albert_fast.config import AlbertConfig

# By precedence, as in transformers.
ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Says that a model runs in int8 (see `albert_fast.quantization`).
QUANTIZATION_FILE = "quantization.safetensors"
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
PREFIX = "albert."
ENCODER_PARTS = frozenset({"embeddings", "encoder", "pooler"})
OPTIONAL_PARTS = frozenset({"pooler", "predictions", "sop_classifier", "classifier", "qa_outputs"})
BUFFERS = ("*embeddings.position_ids", "*embeddings.token_type_ids")  # old checkpoints store these constants

_SHARD = re.compile(r"(model|pytorch_model)(-\d+)?-\d{5}-of-\d{5}\.(safetensors|bin)")


class CheckpointError(ValueError):
    """Weights that cannot be read, written or used; the message names the files or tensors and how to mend
    it."""


def read_state_dict(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU, with the dtypes and names of the file.

    `source` is a directory (the first of `ENTRIES` is read) or one file: .safetensors, .bin, .pt, .pth or
    an index (.index.json) with its shards beside it. Only the old names `gamma` and `beta` are changed, to
    `weight` and `bias`. A TensorFlow checkpoint of Google's (see `albert_fast.tensorflow_checkpoint`) is read
    with all its names changed to Hugging Face's. Tensors may stay mapped to the file: replace files, never
    write into them. Pickles are read as data, code in them is never run. Raises CheckpointError, naming the
    file, for anything missing, damaged or foreign.
    """
    from albert_fast import tensorflow_checkpoint  # which imports this module

    if (prefix := tensorflow_checkpoint.find(source)) is not None:
        return tensorflow_checkpoint.read_state_dict(prefix)
    path = Path(source)
    if path.is_dir():
        path = _entry(path)
    elif not path.exists():
        raise CheckpointError(f"{path} does not exist: give a local directory or file; nothing is downloaded")
    tensors = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    named = {re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", k)): v for k, v in tensors.items()}
    if len(named) != len(tensors):
        raise CheckpointError(f"{path} has old (gamma, beta) and new (weight, bias) names for the same tensor")
    return named


def _entry(directory: Path) -> Path:
    for name in ENTRIES:
        if (directory / name).exists():
            return directory / name
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:20]) or "nothing"
    raise CheckpointError(f"{directory} has no weights: looked for {', '.join(ENTRIES)}, found {found}")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise CheckpointError(f"{path} is no weight file: expected .safetensors, .bin, .pt, .pth or .index.json")
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty: fetch or save it anew")
        loaded = load_file(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # what the two readers raise on damage is not documented, and ranges widely
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise CheckpointError(f"{path} is damaged or of another format ({reason}): fetch it anew") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} is not a state dict but a {type(loaded).__name__}: save model.state_dict()")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = f"{name!r} is a {type(tensor).__name__}, not a named tensor"
            raise CheckpointError(f"{path} is not a state dict: {what}. Save model.state_dict() alone")
    return dict(loaded)


def _read_pickle(path: Path) -> object:
    try:
        # Only zip files (torch.save since 1.6) can be mapped; mapping saves a second copy in memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} would have to import {refused[1]}, which can run code, and is refused: only tensors "
                "are read. If you trust it, load it where it came from and save its state_dict() anew"
            ) from error
        raise


def _read_shards(index_path: Path) -> dict[str, Tensor]:
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is not a readable JSON file ({error}): fetch it anew") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index_path} has no "weight_map" of tensor names to files: fetch it anew')
    names_of: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # A plain name, so that an index from elsewhere cannot make us open files outside its directory.
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise CheckpointError(f"{index_path} puts {name} in {file!r}, expected the name of a file beside it")
        names_of.setdefault(file, []).append(name)
    if absent := sorted(file for file in names_of if not (index_path.parent / file).is_file()):
        raise CheckpointError(f"{index_path} names files that are not beside it: {', '.join(absent)}. Fetch them")
    tensors: dict[str, Tensor] = {}
    for file, names in names_of.items():
        shard = _read_file(index_path.parent / file)
        if lost := [name for name in names if name not in shard]:
            where = f"{index_path.parent / file} lacks tensors that {index_path.name} puts there"
            raise CheckpointError(f"{where}: {', '.join(lost)}. Fetch both anew")
        tensors.update((name, shard[name]) for name in names)
    return {name: tensors[name] for name in weight_map}


def write_state_dict(
    directory: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the weights of `directory` (made if need be); returns the files, the entry first, then its
    shards.

    Tensors of any device, dtype and stride; one that is the same memory as another (a tied weight) is
    stored once, under the name that transformers keeps. More than `max_shard_size` (bytes, or "5GB",
    "500MiB") goes into several files with an index, divided as Hugging Face does.
    `safe_serialization=False` writes pickles (.bin). `metadata` goes into the safetensors header.

    On any failure, KeyboardInterrupt included, the directory's weights are the old ones, untouched, or,
    once the new ones are visible, those, complete; nothing half-written stays. At the end every other
    weight file of the directory (older entries and shards) is gone. Raises CheckpointError for what cannot
    be stored, and whatever the file system raises.
    """
    if metadata and not safe_serialization:
        raise CheckpointError("metadata can only be stored in safetensors: drop it, or safe_serialization=False")
    directory = Path(directory)
    tensors = _distinct(state_dict)
    shards = _split(tensors, _bytes(max_shard_size))
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    directory.mkdir(parents=True, exist_ok=True)
    entry = directory / (f"{stem}.{suffix}" if len(shards) == 1 else f"{stem}.{suffix}.index.json")
    finals = [entry] if len(shards) == 1 else _fresh_names(directory, stem, suffix, len(shards))
    temporary = {final: _temporary(final) for final in (*finals, entry)}
    temporary[entry].touch()  # means "not yet renamed" to _roll_back
    try:
        for final, names in zip(finals, shards, strict=True):
            part = {name: _storable(tensors[name]) for name in names}
            if safe_serialization:
                _write_safetensors(temporary[final], part, metadata or {})
            else:
                torch.save(part, temporary[final])
            _flush(temporary[final])
        if len(shards) > 1:
            temporary[entry].write_text(_index(tensors, finals, shards), encoding="utf-8")
            _flush(temporary[entry])
        _commit(entry, temporary)
    except BaseException:
        _roll_back(entry, temporary)
        raise
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return [entry] if len(shards) == 1 else [entry, *finals]


def _commit(entry: Path, temporary: Mapping[Path, Path]) -> None:
    """Make the new files visible, then remove the old ones.

    Shards get names that no file had, so a reader finds the old checkpoint, whole, until the entry is
    renamed. That makes the new one visible at once, unless entries of higher precedence hide it: these are
    then removed, the highest last, so that none that it hid comes to light. Old shards go after that: who
    has read the old index before finds some missing, which is an error, never a mixture of two checkpoints.
    """
    for final, path in temporary.items():
        if final != entry:
            path.replace(final)
    temporary[entry].replace(entry)
    rank = ENTRIES.index(entry.name)
    for name in (*reversed(ENTRIES[:rank]), *ENTRIES[rank + 1 :]):
        entry.with_name(name).unlink(missing_ok=True)
    for path in list(entry.parent.iterdir()):
        if _SHARD.fullmatch(path.name) and path not in temporary:
            path.unlink(missing_ok=True)


def _roll_back(entry: Path, temporary: Mapping[Path, Path]) -> None:
    # The disk, not a flag, says how far it came: an interrupt may fall between a rename and the next line.
    renamed = not temporary[entry].exists()
    hidden = any(entry.with_name(name).exists() for name in ENTRIES[: ENTRIES.index(entry.name)])
    if not renamed or hidden:
        for final in temporary:
            if final != entry or renamed:
                final.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors lets nobody but the owner read
    save_file(tensors, path, metadata={**metadata, "format": "pt"})
    path.chmod(mode)


def _flush(path: Path) -> None:
    # Otherwise a power cut soon after the rename may leave an empty file under the final name.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _fresh_names(directory: Path, stem: str, suffix: str, count: int) -> list[Path]:
    """Hugging Face's names of shards; where one is taken, numbered ones, which an index may name just as
    well."""
    generation = 0
    while True:
        prefix = f"{stem}-{generation}" if generation else stem
        names = [directory / f"{prefix}-{i:05d}-of-{count:05d}.{suffix}" for i in range(1, count + 1)]
        if not any(path.exists() for path in names):
            return names
        generation += 1


def _distinct(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without aliases. Of tied names the first stays, but a decoder's yields to any other."""
    kept: dict[object, str] = {}
    for name in sorted(state_dict, key=lambda name: ".decoder." in name):  # stable
        tensor = state_dict[name]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            what = f"a {type(tensor).__name__}" + (f" ({tensor.device})" if isinstance(tensor, Tensor) else "")
            raise CheckpointError(f"{name} is {what}, expected a dense tensor that has values")
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        kept.setdefault(memory if tensor.numel() else name, name)
    names = set(kept.values())
    return {name: tensor for name, tensor in state_dict.items() if name in names}


def _storable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # A view would drag its whole storage into a pickle, and safetensors refuses views that overlap.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names by file, filled in order; a tensor beyond the limit has a file to itself. At least one file."""
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > limit:
            shards.append([name])
            continue
        if size + tensor.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += tensor.nbytes
    return [*shards, current] if current or not shards else shards


def _index(tensors: Mapping[str, Tensor], finals: list[Path], shards: list[list[str]]) -> str:
    totals = {
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
    }
    weight_map = {name: file.name for file, names in zip(finals, shards, strict=True) for name in names}
    return json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?", str(size).strip(), re.IGNORECASE)
    if found:
        power = " KMGT".index((found[2] or " ").upper())
        if (count := int(float(found[1]) * (1024 if found[3] else 1000) ** power)) > 0:
            return count
    raise CheckpointError(f'max_shard_size is {size!r}, expected bytes above 0, or for example "5GB" or "500MiB"')


def check_state_dict(
    state_dict: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    *,
    tied: Mapping[str, str] | None = None,
    ignore: Iterable[str] = (),
    newly_initialized: Iterable[str] = (),
) -> dict[str, Tensor]:
    """The tensors that a model takes, under its own names: all that it needs for `load_state_dict(…,
    strict=False)`.

    `expected` maps the model's names to shapes. The checkpoint may be a bare encoder's or a head's, and so
    may the model: "albert." is added or removed; other heads, a pooler that the model lacks, and old
    position_ids are left out. `tied` maps a tied name to the one it shares memory with: the checkpoint
    needs only one of them.

    `ignore` and `newly_initialized` are names or shell patterns in the model's naming ("classifier.*"):
    tensors of the checkpoint that are not wanted, and tensors of the model that it may lack. The latter are
    not in the result, so that they keep the model's initial values, and one UserWarning lists them.

    Raises one CheckpointError that lists every missing, unexpected and mis-shaped tensor.
    """
    ignore, newly_initialized, tied = (*BUFFERS, *ignore), tuple(newly_initialized), dict(tied or {})
    is_base = not any(name.startswith(PREFIX) for name in expected)
    from_base = not any(name.startswith(PREFIX) for name in state_dict)
    parts = {name.removeprefix(PREFIX).split(".")[0] for name in expected}
    found: dict[str, Tensor] = {}
    unused: list[str] = []
    unexpected: list[str] = []
    for original, tensor in state_dict.items():
        bare = original.removeprefix(PREFIX)
        part = bare.split(".")[0]
        of_encoder = part in ENCODER_PARTS if from_base else original != bare
        name = original if not of_encoder else bare if is_base else PREFIX + bare
        if name in expected or name in tied:
            found[name] = tensor
        elif _matches(name, ignore):
            continue
        # Another head, or a pooler that this model lacks. Beside a prefixed encoder everything is a head.
        elif part not in parts and (part in OPTIONAL_PARTS or (is_base and not of_encoder and not from_base)):
            unused.append(original)
        else:
            unexpected.append(original)
    conflicts = _share_tied(found, expected, tied)
    absent = [name for name in expected if name not in found]
    fresh = [name for name in absent if _matches(name, newly_initialized)]
    problems = {
        "missing (the checkpoint is incomplete, or of another class, or of another num_hidden_groups or "
        "inner_group_num than config.json says)": [name for name in absent if name not in fresh],
        "unexpected (the checkpoint is of another model; pass as ignore what is not wanted)": unexpected,
        "mis-shaped (config.json is not that of these weights: mend its sizes; for a head, give the "
        "num_labels of the checkpoint, or load its bare encoder)": _misfits(found, expected),
        "tied but different in the checkpoint (if it was trained untied, set tie_word_embeddings to false in "
        "config.json; otherwise remove the wrong one of each pair)": conflicts,
    }
    if any(problems.values()):
        groups = ["\n    ".join((f"{len(lines)} {kind}:", *lines)) for kind, lines in problems.items() if lines]
        raise CheckpointError("\n  ".join(("the checkpoint does not fit the model", *groups)))
    if fresh:
        left = f" Not used of the checkpoint: {', '.join(unused)}." if unused else ""
        warnings.warn(
            f"newly initialized, because the checkpoint lacks them: {', '.join(fresh)}. Train the model "
            f"before using it.{left}",
            stacklevel=3,  # the caller of from_pretrained
        )
    return {name: found[name] for name in expected if name in found}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _share_tied(found: dict[str, Tensor], expected: Mapping[str, object], tied: Mapping[str, str]) -> list[str]:
    """Give both names of each tied pair the tensor that was found; returns the pairs whose tensors differ."""
    conflicts = []
    for pair in tied.items():
        tensors = [found[name] for name in pair if name in found]
        if len(tensors) == 2 and not (tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)):
            conflicts.append(" and ".join(pair))
        elif tensors:
            found.update((name, tensors[0]) for name in pair if name in expected)
    return conflicts


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    lines = []
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is not None and tensor.shape != shape:
            lines.append(f"{name}: {tuple(tensor.shape)} in the checkpoint, {tuple(shape)} in the model")
        elif tensor is not None and not tensor.is_floating_point():
            lines.append(f"{name}: {tensor.dtype} in the checkpoint, a floating dtype in the model")
    return lines


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    dtype: torch.dtype | str | None = None,
    architecture: str | None = None,
) -> None:
    """Write a whole checkpoint anew: config.json, the weights, and the tokenizer's files copied as they are.

    `source` and `architecture` as in `read_directory`; `target` a directory that is empty or does not exist: it appears
    complete or not at all. `dtype` casts the floating tensors and is noted in the config; without it the values keep
    every bit. Raises CheckpointError or ConfigError.
    """
    target = vacant(target)
    config, weights, files = read_directory(source, architecture=architecture)
    config, weights = cast(config, weights, dtype)
    write_directory(target, config, weights, files, max_shard_size, safe_serialization)


def read_directory(
    source: str | os.PathLike[str], *, architecture: str | None = None
) -> tuple[AlbertConfig, dict[str, Tensor], dict[str, Path]]:
    """A whole checkpoint: its config, its weights without aliases and old buffers, and its other files by their names,
    some of which may not exist.

    `source` is a directory, or a weight file with its config.json beside it, or a TensorFlow checkpoint (see
    `albert_fast.tensorflow_checkpoint`), for which alone `architecture` names the class to convert for. Raises
    CheckpointError or ConfigError.
    """
    from albert_fast import tensorflow_checkpoint  # which imports this module

    source = Path(source)
    if (prefix := tensorflow_checkpoint.find(source)) is not None:
        config, weights = tensorflow_checkpoint.read(prefix, architecture=architecture)
        vocabulary = tensorflow_checkpoint.vocabulary(prefix)
        files = {} if vocabulary is None else {"spiece.model": vocabulary}
    elif architecture is not None:
        raise CheckpointError(f"{source} is no TensorFlow checkpoint: only for one can architecture be given")
    else:
        weights = _distinct(read_state_dict(source))  # before a cast, which would separate what is tied
        directory = source if source.is_dir() else source.parent
        config = AlbertConfig.from_pretrained(directory)
        files = {name: directory / name for name in (*TOKENIZER_FILES, QUANTIZATION_FILE)}
    return config, {name: tensor for name, tensor in weights.items() if not _matches(name, BUFFERS)}, files


def cast(
    config: AlbertConfig, weights: dict[str, Tensor], dtype: torch.dtype | str | None
) -> tuple[AlbertConfig, dict[str, Tensor]]:
    """The floating tensors in `dtype`, which the config then notes; None: the same as they are."""
    if dtype is None:
        return config, weights
    config = replace(config, dtype=dtype)
    return config, {k: v.to(config.dtype) if v.is_floating_point() else v for k, v in weights.items()}


def average(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write the mean of the weights of several checkpoints of one run, as a new Hugging Face directory.

    `sources` are at least two Hugging Face directories; `target` as in `convert`. Sums are in float32 (float64 for
    float64), one checkpoint in memory at a time beside them; the dtypes stay. Config and tokenizer are the
    first's; its int8 settings are not taken over: quantize the mean. Raises CheckpointError, naming
    the file and what differs, where configs, names, shapes, dtypes or whole numbers are not the same.
    """
    if len(sources) < 2:
        raise CheckpointError(f"sources has {len(sources)} checkpoints, expected at least two to average")
    first, target = Path(sources[0]), vacant(target)
    config = AlbertConfig.from_pretrained(first)
    weights = _distinct(read_state_dict(first))
    floats = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    sums = {k: v.to(torch.promote_types(v.dtype, torch.float32), copy=True) for k, v in floats.items()}
    for source in sources[1:]:
        mine, theirs = config.to_dict(), AlbertConfig.from_pretrained(source).to_dict()
        _same(source, first, "in config.json", _without_versions(theirs), _without_versions(mine))
        added = _distinct(read_state_dict(source))
        _same(source, first, "in the weights", _described(added), _described(weights))
        for name, tensor in added.items():
            if name in sums:
                sums[name] += tensor
            elif not torch.equal(tensor, weights[name]):
                raise CheckpointError(f"{source} has other whole numbers in {name} than {first}: they have no mean")
    mean = {**weights, **{k: (sums[k] / len(sources)).to(v.dtype) for k, v in floats.items()}}
    files = {name: first / name for name in TOKENIZER_FILES}
    write_directory(target, config, mean, files, max_shard_size)


def _without_versions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in config.items() if not key.endswith("_version")
    }  # of the libraries that wrote it


def _described(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in weights.items()}


def _same(source: object, first: object, where: str, theirs: Mapping[str, object], mine: Mapping[str, object]) -> None:
    differ = [
        f"{name} is {theirs.get(name, 'absent')}, expected {mine.get(name, 'absent')}"
        for name in (*mine, *(theirs.keys() - mine.keys()))
        if theirs.get(name) != mine.get(name)
    ]
    if differ:
        raise CheckpointError(f"{source} does not match {first} {where}: " + "; ".join(differ))


def vacant(target: str | os.PathLike[str]) -> Path:
    """`target`, absolute. Raises CheckpointError unless it is an empty directory or does not exist."""
    target = Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory: name a new one")
    return target


def write_directory(
    target: Path,
    config: AlbertConfig,
    weights: Mapping[str, Tensor],
    files: Mapping[str, Path | bytes],
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
) -> None:
    """Config, weights and, by their new names, copies of those `files` that exist or what they are to hold; made aside
    and renamed."""
    staging = _temporary(target)
    try:
        config.save_pretrained(staging)
        write_state_dict(staging, weights, max_shard_size=max_shard_size, safe_serialization=safe_serialization)
        for name, content in files.items():
            if isinstance(content, bytes):
                (staging / name).write_bytes(content)
            elif content.is_file():
                shutil.copyfile(content, staging / name)
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
