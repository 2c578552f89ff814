"""Memory of a training step on one long row: linear in its length with the kernels.

The claim is for them alone. The `reference` keeps the probabilities of attention, [heads, length, length] in each pass;
it stands here to show that the measure would see it.
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from albert_fast import native
from albert_fast.memory import peak_resident_bytes

# One process for all lengths, ascending: the peak so far is that of the last one. Dropout is on, as masks take memory.
# Each run is a child of one that took a step already, which is most of the time.
STEPS = """
import json, os, sys, torch
from albert_fast import AlbertConfig, AlbertForPreTraining, PackedBatch, kept_memory
from albert_fast.memory import peak_resident_bytes
torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(vocab_size=1000, hidden_size=64, num_attention_heads=2, intermediate_size=256, num_hidden_layers=3)
dropout = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
model = AlbertForPreTraining(AlbertConfig(**shape, **dropout, max_position_embeddings=8192)).train()

def step(length):
    kept = {}
    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    ids = torch.randint(5, 1000, (length,))
    labels = torch.where(torch.rand(length) < 0.15, ids, -100)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(PackedBatch.from_sequences([ids]), labels=labels, sentence_order_label=torch.tensor([1])).loss
    loss.backward()
    return sum(kept.values())

step(128)
runs, *lengths = map(int, sys.argv[1:])
for run in range(runs):
    child = os.fork()
    if child == 0:
        step(128)  # what lies in files is its own from here on
        kept_memory.release()
        before = peak_resident_bytes()
        print(json.dumps([(step(length), peak_resident_bytes() - before) for length in lengths]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


class Memory(NamedTuple):
    """Bytes for each length: that the graph keeps for backward, and that the process needed at most for all of it."""

    kept: list[int]
    peak: list[int]


def measure(backend: str, lengths: list[int], runs: int) -> Memory:
    """The medians of some runs: a peak that the system tells is off by megabytes now and then."""
    if peak_resident_bytes() is None:
        pytest.skip("this system does not tell a process's peak memory")
    command = [sys.executable, "-c", STEPS, *map(str, (runs, *lengths))]
    environment = {**os.environ, "ALBERT_FAST_BACKEND": backend}
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    of_each = np.array([json.loads(line) for line in said.splitlines()])  # [runs, lengths, 2]
    memory = Memory(*np.median(of_each, axis=0).astype(int).T.tolist())
    for name, values in memory._asdict().items():
        print(f"{backend}, {name}: {', '.join(f'{n}: {b / 1e6:.1f} MB' for n, b in zip(lengths, values, strict=True))}")
    return memory


def growth(values: list[int]) -> float:
    """Of three lengths, each twice the last: what the second doubling adds over what the first does. 2 is linear."""
    short, middle, long = values
    return (long - middle) / (middle - short)


@pytest.mark.skipif(native.load() is not None, reason=f"no native library: {native.load()}")
@pytest.mark.parametrize("longest", [4096, pytest.param(8192, marks=pytest.mark.slow)])
def test_memory_is_linear(longest: int) -> None:
    memory = measure("cpu", [longest // 4, longest // 2, longest], runs=5)
    for values in memory:
        assert values[2] <= 2.2 * values[1]
        assert growth(values) <= 2.4


def test_the_reference_is_quadratic() -> None:
    memory = measure("reference", [256, 512, 1024], runs=3)
    for values in memory:
        assert growth(values) > 3
