"""`albert-fast finetune`, `evaluate` and `predict`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from albert_fast.config import AlbertConfig
from albert_fast.finetuning.config import FinetuneConfig
from albert_fast.finetuning.objective import TaskObjective
from albert_fast.finetuning.reading import Place
from albert_fast.finetuning.rows import Row
from albert_fast.finetuning.task import Task, check_length, load_task
from albert_fast.finetuning.trainer import Finetuner, run_rows
from albert_fast.training import parallel
from albert_fast.training.loop import run_to_status


def finetune(config: FinetuneConfig) -> int:
    """Trains; the exit status: 0, 1 for a run that failed, 128 + the number of a signal that stopped it."""
    config.check_complete()
    return run_to_status(Finetuner, config, "albert-fast finetune")


class Pipeline:
    """A fine-tuned model with its task: examples in, predictions out.

    Args:
        directory: that `albert-fast finetune` wrote, such as OUT/best.
        overrides: of how files are read and texts are written, such as "data.text=sentence" or "decoding.beams=1";
            what the model was trained with is known.
        device: cpu, cuda …; None: a GPU where there is one.
        rows: of a batch.

    Raises:
        ValueError: the directory has no such model, or an override does not fit it.
    """

    def __init__(
        self,
        directory: str | Path,
        overrides: Sequence[str] = (),
        *,
        device: str | None = None,
        rows: int = 64,
    ) -> None:
        self.task: Task = load_task(Path(directory), overrides)
        check_length(self.task.length, AlbertConfig.from_pretrained(directory))
        self.world = parallel.start(device)
        model = self.task.model_class.from_pretrained(directory).to(self.world.device).eval()
        self.objective, self.batch_rows = TaskObjective(model, self.task), rows

    def __call__(self, examples: str | Sequence[Any]) -> Any:
        """What the model says.

        Args:
            examples: a line or several, as `Task.from_line` reads them; or examples that `Task.read` gave.

        Returns:
            A prediction for each, plain values; of one line, one.
        """
        if isinstance(examples, str):
            return self([examples])[0]
        read = [
            self.task.from_line(Place(Path("input"), number), each) if isinstance(each, str) else each
            for number, each in enumerate(examples, start=1)
        ]
        return self._predictions(read, self.task.rows(read, labelled=False))

    def _predictions(self, examples: Sequence[Any], rows: Sequence[Row]) -> list[Any]:
        outputs = run_rows(self.task, self.objective, rows, self.batch_rows, self.world)
        return self.task.predictions(examples, rows, outputs)

    def evaluate(self, paths: Sequence[str]) -> dict[str, float]:
        """The figures of labelled files. Raises DataError."""
        self.task.check_measures()
        examples = self.task.read_all(paths)
        return self.task.metrics(examples, self._predictions(examples, self.task.rows(examples, labelled=True)))

    def predict(self, paths: Sequence[str]) -> list[Any]:
        """The predictions of files; "-" is the standard input, a line each. Raises DataError."""
        found: list[Any] = []
        for path in paths:
            lines = [line.rstrip("\r\n") for line in sys.stdin] if path == "-" else None
            found += self(self.task.read_all([path], labelled=False) if lines is None else lines)
        return found
