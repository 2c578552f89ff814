"""How far a command is that reads files and makes tokens of them."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any


class Progress:
    """How far it is, on stderr: a bar of rich on a terminal, else a line now and then."""

    SECONDS = 10.0  # between lines

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._total = self._first_read = self._first_tokens = 0
        self._started = self._shown = time.monotonic()

    def begin(self, total: int, read: int, tokens: int) -> None:
        """Of `total` bytes `read` were read by an earlier run, which made `tokens` of them."""
        self._total, self._first_read, self._first_tokens = total, read, tokens
        self._started = self._shown = time.monotonic()
        if self.quiet or not sys.stderr.isatty():
            return
        try:
            rich = importlib.import_module("rich.progress")
            console = importlib.import_module("rich.console").Console(stderr=True)
        except ImportError:
            return
        columns = (rich.BarColumn(), rich.TaskProgressColumn(), rich.TextColumn("{task.description}"))
        self._bar = rich.Progress(*columns, rich.TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task("", total=total, completed=read)
        self._bar.start()

    def update(self, read: int, tokens: int) -> None:
        """Bytes read and tokens made, those of earlier runs included."""
        seconds = time.monotonic() - self._started
        made = (tokens - self._first_tokens) / max(seconds, 1e-9)
        text = f"{tokens / 1e6:.1f}M tokens, {made / 1e3:.0f}k/s" if tokens else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=read, description=text)
        elif not self.quiet and time.monotonic() - self._shown >= self.SECONDS:
            self._shown = time.monotonic()
            share = (read - self._first_read) / max(1, self._total - self._first_read)
            left = f"{seconds / share - seconds:.0f} s left" if share > 0.01 else ""
            words = [f"{read / max(1, self._total):.0%}", text, left]
            print(", ".join(word for word in words if word), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
