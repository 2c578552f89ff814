"""transformers' own common tests of a model, run on its ALBERT with this package behind it.

    python benchmarks/transformers_suite/run.py --door none|accelerate|classes|attention [--head-size 64] [pytest's …]
    python benchmarks/transformers_suite/run.py --compare [--head-size 64] [pytest's …]

What the doors are is in `doors.py`. A run fails where a test does, and where no call took the fast path. `--compare`
runs all of them and prints what became of the tests; it fails where one that passes without a door does not with one,
unless that is expected.

The tests are those of the version installed: pip brings its source distribution into a cache folder (`--cache`) at the
first run. Of ALBERT's own tests these are the common ones, with the configuration of `albert_tests.py`; who has a whole
tree of transformers' tests runs those of its model by `--tests FOLDER`, the folder that `tests` is in.
`--head-size` changes the size in either. At the sizes of transformers' tests a head has so few dimensions that kernels
decline; 64 is what every published ALBERT has.

Needs, beside the extra `dev`: parameterized, accelerate, peft, pillow; with `--tests` also pytest-timeout and datasets.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from doors import DOORS
from sources import default_cache, prepared

HERE = Path(__file__).resolve().parent

# By the name to import, that to install.
NEEDED = {
    "accelerate": "accelerate",
    "parameterized": "parameterized",
    "peft": "peft",
    "PIL": "pillow",
    "psutil": "psutil",
    "pytest": "pytest",
    "setuptools": "setuptools",
}

# It asks whether a model's attention is called "sdpa", and here it is not.
EXPECTED = {"attention": {"test_sdpa_can_dispatch_non_composite_models"}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--door", choices=list(DOORS), default="none")
    parser.add_argument("--compare", action="store_true", help="every door, beside none")
    parser.add_argument("--head-size", type=int)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="%(default)s by default")
    parser.add_argument("--tests", type=Path, help="a folder with the whole of transformers' tests")
    args, rest = parser.parse_known_args()
    check_packages()
    if args.head_size is not None:
        rest = ["--head-size", str(args.head_size), *rest]
    folder = prepared(args.cache.resolve()) if args.tests is None else args.tests.resolve()
    tests = HERE / "albert_tests.py" if args.tests is None else folder / "tests/models/albert/test_modeling_albert.py"
    if not tests.exists():
        raise SystemExit(f"{tests} does not exist; --tests expects the folder that transformers' tests are in")
    if not args.compare:
        return run(folder, tests, ["--door", args.door, *rest])
    with tempfile.TemporaryDirectory() as reports:
        found = {}
        for door in DOORS:
            path = Path(reports) / f"{door}.json"
            run(folder, tests, ["--door", door, "--outcomes", str(path), *rest])
            found[door] = json.loads(path.read_text()) if path.exists() else None
    return compare(found)


def check_packages() -> None:
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"not installed: {', '.join(missing)}. "
            f"Expected: {sys.executable} -m pip install -c constraints.txt {' '.join(missing)}"
        )


def run(folder: Path, tests: Path, options: list[str]) -> int:
    """pytest in `folder`, with its configuration, but with neither its options nor its log on the terminal."""
    command = [sys.executable, "-m", "pytest", "-p", "doors", str(tests), "--rootdir", str(folder)]
    if (folder / "pyproject.toml").exists():
        command += ["-c", str(folder / "pyproject.toml")]
    command += ["-o", "addopts=", "-o", "log_cli=0", "-q", "--disable-warnings", *options]
    paths = [str(HERE), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = "1"  # the models are so small that threads only wait for each other
    return subprocess.run(command, cwd=folder, env=os.environ | environment).returncode


def compare(found: dict[str, dict[str, Any] | None]) -> int:
    """Prints what became of the tests at each door. Returns 1 where it is worse than without one, else 0."""
    stock = found["none"]
    if stock is None:
        raise SystemExit("the run without a door ended before it was through")
    print(f"\n{'door':12}{'passed':>8}{'skipped':>8}{'failed':>8}{'subtests':>16}{'fast':>8}{'own':>8}")
    lines, worse = [], False
    for door, report in found.items():
        if report is None:
            print(f"{door:12}ended before it was through")
            worse = True
            continue
        counts, subtests = Counter(report["tests"].values()), report["subtests"]
        told = f"{subtests.get('passed', 0)} + {subtests.get('failed', 0)} failed"
        fast, own = (f"{report[kind]:8}" if door != "none" else f"{'-':>8}" for kind in ("fast", "own"))
        print(f"{door:12}{counts['passed']:8}{counts['skipped']:8}{counts['failed']:8}{told:>16}{fast}{own}")
        worse = worse or (door != "none" and not report["fast"])
        for test in sorted(stock["tests"].keys() | report["tests"].keys()):
            before, after = (tests["tests"].get(test, "not there") for tests in (stock, report))
            if before == after:
                continue
            name = test.rpartition("::")[2]
            expected = name in EXPECTED.get(door, ())
            worse = worse or (before == "passed" and not expected)
            lines.append(f"{door}: {name}: {before} without a door, {after} with it{', as expected' * expected}")
    print(*lines, sep="\n")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
