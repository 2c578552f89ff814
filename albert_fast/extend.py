"""A longer position table for a trained model, by interpolation: a start from which to train on long sequences.

Row p of the new table lies where row p (old - 1) / (new - 1) of the old one would be, between two of its rows; the
first and the last stay as they are. Every position but the first moves, so the result wants some steps of training at
the new length, on short texts as well as long ones, before it is as good as the old model was.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from albert_fast.checkpoint import (
    PREFIX,
    QUANTIZATION_FILE,
    CheckpointError,
    cast,
    read_directory,
    vacant,
    write_directory,
)
from albert_fast.ops.checks import check

TABLE = "embeddings.position_embeddings.weight"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def extend(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    positions: int,
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint anew with a table of `positions` rows.

    `source`, `target` and `dtype` are those of `checkpoint.convert`; without `dtype` every other tensor keeps every
    bit. Besides the table and max_position_embeddings one thing changes: a tokenizer_config.json whose model_max_length
    is the old number gets the new one. Raises CheckpointError or ConfigError, also for a model that is quantized to
    int8: its calibration is of the old positions.
    """
    target = vacant(target)
    config, weights, files = read_directory(source)
    if files.get(QUANTIZATION_FILE, Path()).is_file():
        raise CheckpointError(
            f"{source} is quantized to int8, measured with the old positions: remove its {QUANTIZATION_FILE}, extend, "
            "train, and quantize the result"
        )
    old = config.max_position_embeddings
    name = next((name for name in weights if name.removeprefix(PREFIX) == TABLE), None)
    if name is None:
        raise CheckpointError(f"{source} has no {TABLE}, with or without {PREFIX!r} before it: is it an ALBERT?")
    table = weights[name]
    if table.dim() != 2 or table.shape[0] != old or not table.is_floating_point():
        raise CheckpointError(
            f"{source} has a {name} that is {table.dtype} {list(table.shape)}, expected floating [{old}, "
            f"{config.embedding_size}]: config.json is not that of these weights"
        )
    _check_positions(positions, old)
    contents: dict[str, Path | bytes] = {**files}
    if (path := files.get(_TOKENIZER_CONFIG, Path())).is_file():
        contents[_TOKENIZER_CONFIG] = _longer_texts(path, old, positions)
    # The table gets its last rounding here: in its own dtype, or in the new one.
    result = interpolate(
        table if dtype is None else table.to(torch.promote_types(table.dtype, torch.float32)), positions
    )
    config, weights = cast(replace(config, max_position_embeddings=positions), {**weights, name: result}, dtype)
    write_directory(target, config, weights, contents, max_shard_size)


def extend_positions(model: nn.Module, positions: int) -> None:
    """Gives a model `positions` positions, in place. Make its optimizer, and its CUDA graphs, after that.

    Args:
        model: one of this package's, or of transformers' ALBERT models.
        positions: at least as many as it has.

    Raises:
        ValueError: there would be fewer positions, the model is quantized, or it has no table of positions.
    """
    embeddings = next(
        (m for m in model.modules() if isinstance(getattr(m, "position_embeddings", None), nn.Embedding)), None
    )
    check(
        embeddings is not None, f"model is a {type(model).__name__} without position_embeddings; an ALBERT was expected"
    )
    check(
        not any(getattr(module, "quantized", False) for module in model.modules()),
        "model is quantized to int8, measured with the old positions: model.quantize(False), extend it, train it, and "
        "quantize it then",
    )
    assert embeddings is not None
    table = embeddings.position_embeddings
    assert isinstance(table, nn.Embedding)
    _check_positions(positions, table.num_embeddings)
    old = table.weight
    table.weight = nn.Parameter(interpolate(old.detach(), positions), requires_grad=old.requires_grad)
    table.num_embeddings = positions
    # transformers' constants, [1, positions]
    for name, buffer in list(embeddings.named_buffers(recurse=False)):
        if name == "position_ids":
            embeddings.position_ids = torch.arange(positions, device=buffer.device).unsqueeze(0)
        elif name == "token_type_ids":
            embeddings.token_type_ids = buffer.new_zeros(1, positions)
    config = getattr(model, "config", None)
    if config is not None:
        config.max_position_embeddings = positions


def interpolate(table: Tensor, positions: int) -> Tensor:
    """[old, E] -> [positions, E], linear between rows whose ends meet; in float32 (float64 stays), rounded once."""
    old = table.shape[0]
    # In whole numbers: what falls on an old row is that row, exactly.
    place = torch.arange(positions, device=table.device) * (old - 1)
    steps = max(positions - 1, 1)
    below, share = place // steps, (place % steps).double() / steps
    values = table.to(torch.promote_types(table.dtype, torch.float32))
    above = (below + 1).clamp(max=old - 1)
    return torch.lerp(values[below], values[above], share.to(values.dtype).unsqueeze(1)).to(table.dtype)


def _check_positions(positions: int, old: int) -> None:
    check(
        positions >= old,
        f"positions is {positions}; at least the {old} that the model has were expected",
        CheckpointError,
    )


def _longer_texts(path: Path, old: int, positions: int) -> Path | bytes:
    """tokenizer_config.json for texts of `positions` tokens: `path` itself, where it does not limit them to `old`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file ({error}): fetch it anew") from error
    if not isinstance(values, dict) or values.get("model_max_length") != old:
        return path
    values["model_max_length"] = positions
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
