"""Where the benchmarks print: text as it is, and one line of what is going on. Rich is imported when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """What is printed is of others, too: their [brackets] are no markup, and their :names: no emoji.

    Raises:
        ValueError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ValueError(
            f"the benchmarks print with rich, which cannot be imported ({error}): pip install 'albert_fast[bench]'"
        ) from None
    return Console(markup=False, emoji=False, highlight=False)


@contextlib.contextmanager
def show_progress(console: Console, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows one line of what is going on, and how many of `total` are done. On a terminal it is the same line;
    otherwise each is printed once, of those that are counted only what came of them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not console.is_terminal:
        seen = set()

        def print_once(text: str, done: int | None = None) -> None:
            if text not in seen and (total is None or done is not None):
                seen.add(text)
                console.print(text, soft_wrap=total is not None)

        yield print_once
        return
    bar = (BarColumn(), MofNCompleteColumn()) if total is not None else ()
    columns = (SpinnerColumn(), *bar, TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done=None: progress.update(task, description=text, completed=done)


@contextlib.contextmanager
def show_findings(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, and each line of what was found."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)

        def say(line: str) -> None:
            console.print(line, soft_wrap=True)
            progress.advance(task)

        yield say
