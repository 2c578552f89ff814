"""Which commit was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(package: Path) -> str | None:
    """The hash of the commit that a package's directory is checked out from; "+dirty" where tracked files differ.

    None where there is no git, or where the package's parent is not the top of a checkout that tracks the package: one
    that is installed somewhere below another project's checkout says nothing of itself.
    """
    top = package.resolve().parent

    def git(*arguments: str) -> str:
        # Without optional locks: a look at the checkout never makes another's `git commit` fail.
        command = ["git", "--no-optional-locks", "-C", str(top), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != top or not git("ls-files", "--", package.name):
            return None
        differs = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+dirty" if differs else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def short(commit: str) -> str:
    """The hash's first digits, and whether files differ."""
    digits, plus, dirty = commit.partition("+")
    return digits[:7] + plus + dirty
