"""The encoder that keeps its layer in shared memory: what that design rests on, and ALBERT-base's encoder alone.

Figures first: barriers, loads from L2, a graph's node (csrc/cuda/probe.h says what each is). Then 12 passes over 8 to
128 tokens, one row and ragged ones, replayed as a CUDA graph: as the `cuda` backend chooses (up to 16 tokens by words,
csrc/cuda/resident_words.h), in clusters, without, as the Triton part's kernels for few tokens, and as those around
cuBLAS's products; each is checked against float64 first, by the bound of the parity tests. Twice: after something else
has taken L2, so that the weights come from memory, and one replay after the other, which finds them in L2.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from gpu_models import configuration, environment, weights
from gpu_stage import OURS, Case, Column, Row, Stage, relative_error
from gpu_timing import recorded
from torch import Tensor

from albert_fast import AlbertForMaskedLM, backends, native_cuda
from albert_fast.ops import encoder

COLUMNS = (
    Column("us", "microseconds", "{:,.2f}"),
    Column("one after the other", "chained_microseconds", "{:,.2f}"),
    Column("x ours", "ratio", "{:.2f}"),
    Column("GB/s", "gigabytes_per_second", "{:,.0f}"),
    Column("TFLOP/s", "tflops", "{:,.0f}"),
    Column("error", "error", "{:.1e}"),
    Column("of", "limit", "{:.1e}"),
)

PROBED = "what it rests on"
BATCHES, TINY_BATCHES = ([8], [16], [32], [64], [128], [40, 9, 30, 17, 32]), ([3, 2],)

CLUSTERS, BLOCKS = f"{OURS} in clusters", f"{OURS} without clusters"
TRITON, CUBLAS = f"{OURS} by Triton", f"{OURS} by Triton and cuBLAS"
CLUSTER_OF = {CLUSTERS: "0", BLOCKS: "1"}
PROBES = {
    "grid barrier": ("grid_barrier", "microseconds"),
    "cluster barrier": ("cluster_barrier", "microseconds"),
    "node of a graph": ("graph_node", "microseconds"),
    "from L2 to shared memory, each multiprocessor": ("shared_bytes", "gigabytes_per_second"),
    "from L2 to registers, each multiprocessor": ("register_bytes", "gigabytes_per_second"),
    "mma.sync": ("multiply", "tflops"),
}


class Figures(ctypes.Structure):
    """albert_probe_figures of csrc/cuda/probe.h."""

    names = ("grid_barrier", "cluster_barrier", "shared_bytes", "register_bytes", "graph_node", "multiply")
    _fields_ = (("multiprocessors", ctypes.c_int), *((name, ctypes.c_float) for name in names))


def probe(case: Case) -> None:
    library = native_cuda.load()
    if isinstance(library, str):
        raise RuntimeError(library)
    figures = Figures()
    error = library.albert_probe(ctypes.byref(figures))
    if error:
        raise RuntimeError(library.albert_cuda_error(error).decode())
    for name, (field, unit) in PROBES.items():
        case.rows[name].passed = True
        case.rows[name].figures[unit] = getattr(figures, field)
        case.stage.facts[field] = getattr(figures, field)


def served_by(peer: str) -> AbstractContextManager[None]:
    cluster = {"ALBERT_FAST_CLUSTER": CLUSTER_OF[peer]} if peer in CLUSTER_OF else {}
    few_tokens = {"ALBERT_FAST_FEW_TOKENS": "0" if peer == CUBLAS else "1"} if peer in (TRITON, CUBLAS) else {}
    return environment(ALBERT_FAST_BACKEND="triton" if few_tokens else "cuda", **cluster, **few_tokens)


def measure(case: Case, lengths: list[int]) -> None:
    stage = case.stage
    config = configuration("base", stage.tiny)
    config = replace(config, num_attention_heads=2) if stage.tiny else config
    with case.attempt(None):
        model = AlbertForMaskedLM(config)
        model.load_state_dict(weights(config, torch.device("cpu")))
        layer = model.albert.encoder.to(stage.device, torch.bfloat16)
        parameters = [parameter.detach() for parameter in layer.parameters_of_layers()]
        tokens = sum(lengths)
        hidden = torch.randn(tokens, config.hidden_size, device=stage.device, dtype=torch.bfloat16)
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(stage.device, torch.int32)

        def run(hidden: Tensor = hidden, parameters: list[Tensor] = parameters) -> Tensor:
            options = {"num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads}
            with torch.inference_mode():
                return encoder(hidden, parameters, offsets, max(lengths), activation=config.hidden_act, **options)

        def by_reference(dtype: torch.dtype) -> Tensor:
            before, backends.BACKENDS = backends.BACKENDS, [backends.REFERENCE]
            try:
                return run(hidden.to(dtype), [parameter.to(dtype) for parameter in parameters])
            finally:
                backends.BACKENDS = before

        expected = by_reference(torch.float64)
        limit = 2 * relative_error(by_reference(torch.bfloat16), expected)
    functions: dict[str, Callable[[], object]] = {}

    def prepare(row: Row) -> None:
        with served_by(row.peer):
            case.judge(row, {"hidden states": relative_error(run(), expected)}, {"hidden states": limit})
            functions[row.peer] = recorded(run, stage.device)

    for row in case.standing():
        with case.attempt(row):
            prepare(row)
    right = {peer: function for peer, function in functions.items() if case.rows[peer].passed}
    found = case.interleave("device", right, turns=10)
    best = found.get(OURS)
    for peer, one in found.items():
        case.rows[peer].figures |= {
            "microseconds": one.median * 1e6,
            "ratio": None if best is None else one.median / best.median,
        }
    for peer, one in case.interleave("chained", right, turns=10).items():
        case.rows[peer].figures["chained_microseconds"] = one.median * 1e6


def name_of(lengths: list[int]) -> str:
    return f"{sum(lengths)} tokens" + (f" in {len(lengths)} rows" if len(lengths) > 1 else "")


def main(arguments: list[str] | None = None) -> None:
    stage = Stage("resident", COLUMNS, arguments)
    on_gpu = stage.device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("ALBERT_FAST_CUDA_ON_CPU", "1")  # the kernel's source on the CPU
    if on_gpu:
        stage.run(PROBED, {}, tuple(PROBES), probe)
    for lengths in TINY_BATCHES if stage.tiny else BATCHES:
        peers = (OURS, CLUSTERS, BLOCKS, *([TRITON, CUBLAS] if on_gpu else []))
        stage.run(name_of(lengths), {"lengths": lengths}, peers, lambda case, lengths=lengths: measure(case, lengths))


if __name__ == "__main__":
    main()
