"""Peak memory of a masked-LM training step, each in a process of its own."""

import subprocess
import sys

import pytest

from albert_fast.memory import peak_resident_bytes

STEP = """
import sys, torch
from albert_fast.memory import peak_resident_bytes
package, batch, seq = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
module = __import__(package)
shape = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
torch.manual_seed(0)
model = module.AlbertForMaskedLM(module.AlbertConfig(**shape)).train()
ids = torch.randint(5, 30000, (batch, seq))
labels = torch.where(torch.rand(batch, seq) < 0.15, ids, -100)
model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
print(peak_resident_bytes())
"""


def peak_bytes(package: str, batch: int, seq: int) -> int:
    """Peak resident memory of one forward and backward of ALBERT-base in float32."""
    command = [sys.executable, "-c", STEP, package, str(batch), str(seq)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_training_step_needs_at_most_70_percent_of_transformers():
    pytest.importorskip("transformers")
    if peak_resident_bytes() is None:
        pytest.skip("this system does not tell a process's peak memory")
    ours, theirs = (peak_bytes(package, 8, 512) for package in ("albert_fast", "transformers"))
    print(f"8 x 512, 15 % labels: {ours / 1e9:.2f} GB, transformers {theirs / 1e9:.2f} GB, ratio {ours / theirs:.2f}")
    assert ours <= 0.7 * theirs
