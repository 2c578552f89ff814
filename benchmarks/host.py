"""The host's part of what runs on a GPU, without one: all that is done for a call but to start kernels.

    python benchmarks/host.py [--repeats 200]

An ALBERT of base's twelve passes with tiny sizes, on CPU tensors: Triton's kernels are found, and not started; products
are PyTorch's own, of a few microseconds. What a GPU adds is not in it: CUDA's launches and its allocator. Two versions
are compared in turn, by calls of Python's and PyTorch's functions, which are the same in each run, and by time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ |= {"ALBERT_FAST_BACKEND": "triton", "ALBERT_FAST_AUTOTUNE": "0", "ALBERT_FAST_FEW_TOKENS": "1"}
os.environ.pop("TRITON_INTERPRET", None)

import torch
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertModel, graphs, triton_backend
from albert_fast.kernels import launch

LENGTH = 8

started = 0


class Unstarted(CompiledKernel):
    """A kernel that was neither compiled nor loaded."""

    function, module, packed_metadata = 0, None, ()

    def __init__(self) -> None: ...

    @property
    def run(self) -> Callable[..., None]:
        return self.count

    def count(self, *_: Any) -> None:
        global started
        started += 1


def without_a_gpu() -> None:
    JITFunction.run = lambda self, *arguments, **options: Unstarted()
    launch.architecture = lambda device: 90
    triton_backend.unavailable = lambda: None
    triton_backend.declines = lambda call: None
    graphs.check_on_gpu = lambda model: None
    graphs._inference = lambda model, inputs, options: (lambda outputs: lambda: outputs)(model(**inputs, **options))


def calls() -> dict[str, Callable[[], object]]:
    tiny = {"vocab_size": 300, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    config = replace(AlbertConfig.base(), **tiny, num_attention_heads=2)
    ids, mask = torch.randint(2, 300, (1, LENGTH)), torch.ones(1, LENGTH, dtype=torch.int64)
    labels = torch.where(torch.arange(LENGTH) % 2 == 0, ids, -100)
    ragged = {"input_ids": ids, "attention_mask": mask.index_fill(1, torch.tensor(LENGTH - 1), 0)}

    def training(dropout_p: float, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
        dropout = {"hidden_dropout_prob": dropout_p, "attention_probs_dropout_prob": dropout_p}
        model = AlbertForMaskedLM(replace(config, **dropout)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()

        return step

    model = AlbertModel(config).eval().bfloat16()
    graph = albert_fast.graphed(model, [(1, LENGTH)])
    return {
        "training step": training(0.0, {"input_ids": ids}),
        "training step, ragged, dropout": training(0.1, ragged),
        "inference of few tokens": torch.no_grad()(lambda: model(ids)),
        "a graph's replay": torch.no_grad()(lambda: graph(ids)),
    }


def functions_called(call: Callable[[], object]) -> int:
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="timed calls of each kind")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # whose products of a few rows take longer to set up
    without_a_gpu()
    print(f"{'':32}{'kernels':>8}{'functions':>10}{'median us':>11}{'least us':>10}")
    for name, call in calls().items():
        for _ in range(5):
            call()
        before = started
        functions = functions_called(call)
        kernels, times = started - before, []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - begin))
        print(f"{name:32}{kernels:8}{functions:10}{statistics.median(times):11.0f}{min(times):10.0f}")


if __name__ == "__main__":
    main()
