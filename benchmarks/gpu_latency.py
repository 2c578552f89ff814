"""How long one text takes: ALBERT-base's encoder in bfloat16, one row of 16 to 512 tokens, eager and as CUDA graphs.

us is how long the caller waits; device us how long the GPU works, with the launches enqueued before. The last hidden
states are checked against float64 first, as in `albert-fast bench`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_models import CompiledForLatency, Graphed, configuration, make_batch, weights
from gpu_stage import OURS, Case, Column, Row, Stage

from albert_fast.bench import parity
from albert_fast.bench.peers import PEERS, Peer, serving_backends

COLUMNS = (
    Column("us", "microseconds", "{:,.0f}"),
    Column("x ours", "ratio", "{:.2f}"),
    Column("device us", "device_microseconds", "{:,.0f}"),
    Column("host us", "device_host"),
    Column("error", "error", "{:.1e}"),
    Column("of", "limit", "{:.1e}"),
)

DTYPE = "bfloat16"
LENGTHS, TINY_LENGTHS = (8, 16, 64, 128, 512), (8,)
ALL = (Graphed.name, OURS, CompiledForLatency.name, "transformers-sdpa")
ON_A_CPU = ALL[1:]

# A compiler's first call, in seconds.
_COMPILING = 180.0


def make_peer(name: str, tiny: bool) -> Peer:
    if name == Graphed.name:
        return Graphed()
    if name == CompiledForLatency.name:
        peer = CompiledForLatency()
        peer.tried = tiny
        return peer
    return PEERS[name]()


def measure(case: Case, length: int) -> None:
    stage = case.stage
    torch.compiler.reset()
    config = configuration("base", stage.tiny)
    with case.attempt(None):
        state_dict = weights(config, stage.device)
        batch = make_batch(config, [length], length, stage.device)
        expected = parity.oracle(config, state_dict, batch, "inference")
        ours, theirs = parity.limits(config, state_dict, batch, "inference", DTYPE, expected)
    case.work["backends"] = serving_backends(config, stage.device, torch.bfloat16)
    functions: dict[str, Callable[[], object]] = {}

    def prepare(row: Row) -> None:
        peer = make_peer(row.peer, stage.tiny)
        with stage.device:
            peer.build(config, state_dict, DTYPE, stage.device, batch)
        peer.model.eval()  # type: ignore[attr-defined]
        error = parity.error(parity.results(peer, batch, "inference"), expected)
        limit = ours if row.peer in (OURS, Graphed.name) else theirs
        case.judge(row, {"hidden states": error}, {"hidden states": limit})
        functions[row.peer] = lambda: peer.inference(batch)

    for row in case.standing():
        with case.attempt(row, _COMPILING):
            prepare(row)
    right = {peer: function for peer, function in functions.items() if case.rows[peer].passed}
    found = case.interleave("latency", right, turns=10)
    best = found.get(Graphed.name) or found.get(OURS)
    for peer, one in found.items():
        case.rows[peer].figures |= {
            "microseconds": one.median * 1e6,
            "all_microseconds": [round(second * 1e6, 1) for second in one.seconds],
            "ratio": None if best is None else one.median / best.median,
        }
    for peer, one in case.interleave("device", {peer: right[peer] for peer in found}, most_calls=3).items():
        case.rows[peer].figures |= {"device_microseconds": one.median * 1e6, "device_host": one.host}


def main(arguments: list[str] | None = None) -> None:
    stage = Stage("latency", COLUMNS, arguments)
    for length in TINY_LENGTHS if stage.tiny else LENGTHS:
        work = {"rows": 1, "length": length, "dtype": DTYPE, "config": "base"}
        peers = ALL if stage.device.type == "cuda" else ON_A_CPU
        stage.run(f"1x{length}", work, peers, lambda case, length=length: measure(case, length))


if __name__ == "__main__":
    main()
