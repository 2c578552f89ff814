"""Who may run beside whom: tests of several workers together, one that takes times alone."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turnstile(folder: Path, alone: bool) -> Iterator[None]:
    """The room has many who share it, of any process, or one alone; who waits for it holds the gate, and nobody passes.

    Unlocked by name, for a process that was forked inside keeps the files open.
    """
    with (folder / "gate.lock").open("w") as gate, (folder / "room.lock").open("w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)
