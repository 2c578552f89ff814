"""benchmarks/attention.py on a small shape: its report, which the README's marks can name."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from albert_fast.bench import readme

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"


@pytest.fixture
def run(monkeypatch):
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return run


def test_the_report(run, tmp_path, capsys):
    rows, length = random.randint(1, 3), random.randint(5, 40)
    arguments = ["--rows", str(rows), "--length", str(length), "--repeats", "2"]
    run(*arguments, "--json", str(tmp_path / "attention.json"))
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "attention.json").read_text())
    assert {"date", "commit", "machine", "versions", "served_by"} <= report.keys()
    assert report["machine"]["threads"] >= 1
    assert report["options"] == {"rows": rows, "length": length, "repeats": 2}
    assert [case["name"] for case in report["cases"]] == [
        f"{dtype} {rows}x{length} 12x64" for dtype in ("float32", "bfloat16")
    ]
    gflop = 4e-9 * rows * length**2 * 12 * 64
    for case in report["cases"]:
        assert [row["peer"] for row in case["rows"]] == ["albert_fast", "pytorch"]
        for row in case["rows"]:
            assert row["forward_gflops"] == pytest.approx(gflop / row["forward_milliseconds"] * 1e3)
            assert row["backward_gflops"] == pytest.approx(2.5 * gflop / row["backward_milliseconds"] * 1e3)
            assert 0 < row["error"] < 0.1
            assert f"{row['forward_gflops']:6.1f} GFLOP/s" in printed
    mark = (
        f"<!-- results:\nhere: attention.json#cases[bfloat16 {rows}x{length} 12x64].rows\n-->\n"
        "at <!-- = {here[pytorch].backward_gflops:.3f} --><!-- end -->"
    )
    rate = report["cases"][1]["rows"][1]["backward_gflops"]
    assert readme.rewritten(mark, tmp_path).endswith(f"-->{rate:.3f}<!-- end -->")


def test_a_directory_that_is_not_there(run, capsys):
    with pytest.raises(SystemExit):
        run("--json", "nowhere/attention.json")
    assert "--json is 'nowhere/attention.json'; a file in a directory that is there" in capsys.readouterr().err
