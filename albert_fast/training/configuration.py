"""Reading a configuration: a YAML file or a preset's name, and `key=value` on the command line.

jsonargparse reads types and values off the dataclasses.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from albert_fast.ops.checks import check
from albert_fast.training.options import RunOptions

Options = TypeVar("Options", bound=RunOptions)


@dataclass(frozen=True)
class Configuration(Generic[Options]):
    """How a command's configuration is read.

    Args:
        kind: the dataclass.
        program: the command's name, for messages.
        presets: a directory of YAML files.
    """

    kind: type[Options]
    program: str
    presets: Path

    def parse(self, source: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Options:
        """The configuration of a YAML file or a preset, and overrides such as "optimizer.learning_rate=1e-3".

        Raises:
            ValueError: no such file or preset, an unknown key, or a value that does not fit; the message names it.
        """
        parser = self._parser()
        arguments = []
        if source is not None:
            arguments.append(f"--config={self._file(source)}")
        for override in overrides:
            key, found, value = override.partition("=")
            check(
                bool(found) and key.replace(".", "").replace("_", "").isalnum(),
                f"{override!r} was given; key=value was expected, such as batch.size=256",
            )
            arguments.append(f"--{key}={value}")
        with _readable_errors(source):
            parsed = parser.parse_args(arguments)
            values = parser.instantiate(parsed).as_dict()
        values.pop("config", None)
        return self.kind(**values)

    def describe(self) -> str:
        """All keys, their types and defaults."""
        text = io.StringIO()
        self._parser().print_help(text)
        return text.getvalue()

    def preset_names(self) -> list[str]:
        return sorted(path.stem for path in self.presets.glob("*.yaml"))

    def _parser(self) -> Any:
        try:
            import jsonargparse
        except ImportError:
            raise ValueError(
                f"{self.program} reads its configuration with jsonargparse, which is not installed: "
                "pip install 'albert_fast[train]'"
            ) from None
        parser = jsonargparse.ArgumentParser(prog=self.program, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="a YAML file")
        parser.add_class_arguments(self.kind)
        return parser

    def _file(self, source: str | os.PathLike[str]) -> Path:
        path = Path(source)
        preset = self.presets / f"{path.name}.yaml"
        if path.is_file():
            return path
        check(
            path.name == str(source) and preset.is_file(),
            f"{source} is no file and no preset; a YAML file, or one of {', '.join(self.preset_names())}, was expected",
        )
        return preset


def write(options: RunOptions, path: Path) -> None:
    """As YAML (its subset JSON), for `parse`; the old file or the new one is there, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(options.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def _readable_errors(source: object) -> Iterator[None]:
    """What jsonargparse raises, as one line."""
    import jsonargparse

    try:
        yield
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{source or 'the configuration'}: {' '.join(lines)}") from None
