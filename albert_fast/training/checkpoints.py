"""A run's checkpoints: whole or not there, readable by any number of processes.

    RUN/checkpoints/step-00001000/
        state.json     where the run is: step, epoch, row, seconds, what the watch has seen …
        tensors/       weights, moments and moving average, by torch.distributed.checkpoint
        model/         the weights as a Hugging Face directory with its vocabulary
        ema/           the moving average likewise, where there is one

A checkpoint is written under another name, brought to the disk and renamed: a process may be killed at any moment.
Where writing fails (a full disk, most often), what was written of it is removed and the last good one stays.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from albert_fast.ops.checks import check
from albert_fast.training.parallel import World

_NAME = re.compile(r"step-(\d{8})")
STATE, TENSORS = "state.json", "tensors"


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the ones before it are as they were."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: where they are; made when the first one is written.
        keep: how many of the last ones stay.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def all(self) -> list[Path]:
        """Complete ones, the oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def latest(self) -> Path | None:
        found = self.all()
        return found[-1] if found else None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: dict[str, Tensor],
        export: Callable[[Path], None],
        world: World,
    ) -> Path:
        """Writes a checkpoint and removes those that are too many. Every rank calls it, with its parts of the tensors.

        Args:
            state: plain JSON values.
            export: writes further directories into the one that it is given; called on the first rank alone.

        Raises:
            CheckpointWriteError: on every rank, if any could not write its part.
        """
        final = self.directory / f"step-{step:08d}"
        if final.is_dir():  # of this very step: stopped before another was done
            return final
        partial = self.directory / f".{final.name}.partial"
        failures: list[str] = []
        if world.is_main:
            with _kept(failures):
                for stale in self.directory.glob(".step-*.partial"):
                    shutil.rmtree(stale)
                (partial / TENSORS).mkdir(parents=True)
        self._agree("".join(failures), partial, world)
        with _kept(failures):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.save(tensors, checkpoint_id=partial / TENSORS, no_dist=world.size == 1)
            if world.is_main:
                export(partial)
                (partial / STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")
                _bring_to_disk(partial)
        self._agree("".join(failures), partial, world)
        if world.is_main:
            partial.rename(final)
            _flush(self.directory)
            for old in self.all()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        world.barrier()
        return final

    def _agree(self, failure: str, partial: Path, world: World) -> None:
        """Raises on all ranks where one has failed; what there is of the checkpoint is removed."""
        if world.largest(float(bool(failure))) == 0:
            return
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        why = failure or "another process could not write its part"
        free = shutil.disk_usage(self.directory if self.directory.is_dir() else Path.cwd()).free
        raise CheckpointWriteError(
            f"{partial.parent}: the checkpoint could not be written ({why}). {free / 1e9:.2f} GB are free there; the "
            "checkpoints before it are whole"
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is damaged ({error}): remove it, and the run goes on from the one before"
        ) from None


def load_tensors(checkpoint: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Fills tensors, or this rank's parts of them, in place.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    try:
        shapes = dcp.FileSystemReader(checkpoint / TENSORS).read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            check(
                name in shapes or not name.startswith("average/"),
                f"optimizer.ema is given and {checkpoint} has no moving average: give optimizer.ema=null, as the run "
                "had it, or choose another output",
            )
            found = list(getattr(shapes.get(name), "size", ()))
            check(
                found == list(tensor.shape) and name in shapes,
                f"{checkpoint} has {name} of shape {found if name in shapes else None}, and the model's is "
                f"{list(tensor.shape)}: it is another model's. Choose another output",
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, checkpoint_id=checkpoint / TENSORS, no_dist=world.size == 1)
    except (CheckpointException, OSError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} is damaged ({_first_line(error)}): remove it, and the run goes on from the one before"
        ) from error


@contextmanager
def _kept(failures: list[str]) -> Iterator[None]:
    """Failures to write go into the list: other ranks must hear of them before anything is raised."""
    try:
        yield
    except (OSError, CheckpointException, RuntimeError) as error:
        failures.append(_first_line(error))


def _first_line(error: BaseException) -> str:
    """What went wrong in a few words; of a CheckpointException, the first rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error) or type(error).__name__).splitlines()[0]


def _bring_to_disk(directory: Path) -> None:
    """fsync of every file and directory below: renamed before its content is safe, a checkpoint may come up empty."""
    for parent, _, names in os.walk(directory):
        for name in names:
            _flush(Path(parent) / name)
        _flush(Path(parent))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
