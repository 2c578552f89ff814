"""Where the common tests come from: the source distribution of the transformers that is installed, and what it lacks.

Nothing of it is in this repository. pip brings it, once, into a cache folder, and a few modules which the common tests
import but which are not distributed are made beside it, with no more in them than is needed to import them.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# What the common tests import of the rest of transformers' tests.
LACKING = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    # Tests of exporting, which are not distributed.
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    # Asked only whether a tester is one; ALBERT does not generate.
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    # Fields of any configuration, with other values than their defaults.
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = dict(\n"
    "    return_dict=False, output_hidden_states=True, output_attentions=True, dtype='float16',\n"
    "    chunk_size_feed_forward=3, architectures=['AlbertModel'], id2label={0: 'only'}, label2id={'only': 0},\n"
    "    problem_type='regression',\n"
    ")\n",
}


def default_cache() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "albert_fast" / "transformers_suite"


def prepared(cache: Path) -> Path:
    """The folder with the common tests of the version installed; makes it where it is not there yet."""
    version = importlib.metadata.version("transformers")
    folder = cache / f"transformers-{version}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Made elsewhere and moved: a folder that is there is complete.
        with tempfile.TemporaryDirectory(dir=cache) as made:
            _unpack(_downloaded(version, Path(made)), Path(made))
            unpacked = Path(made) / folder.name
            for name, text in LACKING.items():
                path = unpacked / name
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text)
            unpacked.rename(folder)
    return folder


def _downloaded(version: str, folder: Path) -> Path:
    """pip prepares the metadata of what it downloads, for which setuptools has to be installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    command += ["--no-build-isolation", "--dest", str(folder), f"transformers=={version}"]
    if (status := subprocess.run(command).returncode) != 0:
        raise SystemExit(f"pip could not download the sources of transformers {version}: it ended with {status}")
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SystemExit(f"pip left {len(archives)} archives of transformers {version}; one .tar.gz was expected")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    """The tests, and pyproject.toml, which has their markers. Not the sources: the package installed is tested."""
    with tarfile.open(archive) as tar:
        wanted = [m for m in tar.getmembers() if m.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])]
        if not any(member.name.endswith("tests/test_modeling_common.py") for member in wanted):
            raise SystemExit(f"{archive.name} has no tests/test_modeling_common.py, which was expected")
        tar.extractall(folder, wanted, filter="data")
