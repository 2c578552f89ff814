"""benchmarks/host.py: what it counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "host.py"


def test_what_is_counted():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALBERT_FAST_")}
    command = [sys.executable, str(SCRIPT), "--repeats", "3"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {
        name.strip(): [int(number) for number in numbers.split()]
        for name, numbers in re.findall(r"^(\S.*?)\s{2,}([\d ]+)$", result.stdout, re.MULTILINE)
    }
    step, ragged, inference, replay = rows.values()
    # Embeddings, weights with LayerNorm in them, five kernels in each of twelve passes, the last LayerNorm.
    assert inference[0] == 1 + 1 + 12 * 5 + 1
    assert step[0] == ragged[0] > 12 * 7
    assert replay[0] == 0
    for _, functions, median, least in rows.values():
        assert 50 < functions < 20_000
        assert 0 < least <= median
    # A kernel that a pass repeats takes a few calls in Python, not the fifty of the first one.
    assert (step[1] - replay[1]) / step[0] < 90
