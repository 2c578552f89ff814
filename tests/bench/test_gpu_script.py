"""`make gpu`: the report of its two halves, and its exit status."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize(("statuses", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1)])
def test_the_report_and_the_status(statuses, expected, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    commands = []

    def run(command, seconds, **environment):
        commands.append(command)
        assert seconds > 0
        if "bench" in command:
            Path(command[command.index("--json") + 1]).write_text('{"works": []}')
        return {"status": statuses[len(commands) - 1]}

    monkeypatch.setattr(script, "run", run)
    assert script.main(tmp_path / "new" / "folder", ["--shapes", "1x16"]) == expected
    report = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert report["bench_report"] == {"works": []}
    assert report["environment"]["torch"]
    assert "pytest" in commands[0]
    assert commands[1][-2:] == ["--shapes", "1x16"]


def test_a_command_is_run_shown_and_timed(capsys):
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    result = script.run(["sh", "-c", "echo hello; exit 3"], 30)
    assert result["status"] == 3
    assert result["tail"] == ["hello"]
    assert not result["timed_out"]
    assert "hello" in capsys.readouterr().out
    slow = script.run(["sleep", "30"], 1)
    assert slow["timed_out"]
    assert slow["status"] != 0
