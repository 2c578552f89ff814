"""A masked-LM training step of whole models: forward, backward and fused AdamW on about 16k real tokens.

Float32 weights under autocast to bfloat16. 32 x 512 full, and 80 rows of up to 512 of which 40 % is real on average:
transformers computes the padding. Full rows also as CUDA graphs, with and without cuBLASLt's products: a step is
hundreds of kernels, which the host starts one by one otherwise. The loss and every gradient are checked against
float64 first, as in `albert-fast bench`. MFU counts each use of the shared layer and real tokens only
(`albert_fast.flops`), and is held against the data sheet's dense bfloat16 rate and against that of an 8192³ product
here. Peak is the most GPU memory that the peer's weights, optimizer and step hold together. Who finds no memory beside
the others is tried again alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpu_attention import FILL, ragged_lengths
from gpu_models import Compiled, GraphedApart, GraphedTraining, configuration, make_batch, weights
from gpu_stage import OURS, Case, Column, Row, Stage
from gpu_timing import held_bytes, matrix_tflops, peak_bytes
from torch import Tensor

from albert_fast import AlbertConfig
from albert_fast.bench import parity
from albert_fast.bench.data import Batch
from albert_fast.bench.formats import FORMATS
from albert_fast.bench.peers import PEERS, Peer, serving_backends
from albert_fast.flops import data_sheet, flops

COLUMNS = (
    Column("ms", "milliseconds", "{:,.2f}"),
    Column("tokens/s", "tokens_per_second", "{:,.0f}"),
    Column("MFU", "mfu", "{:.1%}"),
    Column("of measured", "mfu_of_measured", "{:.1%}"),
    Column("x ours", "ratio", "{:.2f}"),
    Column("peak GB", "peak_gigabytes", "{:.2f}"),
    Column("x ours", "memory_ratio", "{:.2f}"),
    Column("error", "error", "{:.1e}"),
    Column("of", "limit", "{:.1e}"),
)

DTYPE = "autocast"
COMPILED = Compiled.name

# The last ones are the first to find no memory.
ALL = (OURS, COMPILED, "transformers-sdpa", "transformers-eager")

# Graphs are of one shape: for full rows.
GRAPHED = {peer.name: peer for peer in (GraphedTraining, GraphedApart)}

# A compiler's first step, in seconds.
_COMPILING = 240.0


@dataclass(frozen=True)
class Work:
    config: str
    rows: int
    length: int
    ragged: bool

    @property
    def name(self) -> str:
        return f"{self.config} {self.rows}x{self.length} {'ragged' if self.ragged else 'full'}"

    @property
    def lengths(self) -> list[int]:
        return ragged_lengths(self.rows, self.length) if self.ragged else [self.length] * self.rows


class Trainer:
    """A peer and its optimizer."""

    def __init__(self, peer: Peer, batch: Batch) -> None:
        self.peer, self.batch = peer, batch
        parameters = peer.model.parameters()  # type: ignore[attr-defined]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)

    def step(self) -> None:
        self.peer.loss_and_gradients(self.batch)
        self.optimizer.step()


class Comparison:
    """The peers of a case at its work."""

    def __init__(self, case: Case, work: Work) -> None:
        self.case, self.work, self.stage = case, work, case.stage
        device = self.stage.device
        self.config: AlbertConfig = configuration(work.config, self.stage.tiny)
        with case.attempt(None):
            self.state_dict: dict[str, Tensor] = weights(self.config, device)
            self.batch = make_batch(self.config, work.lengths, work.length, device)
            self.flop = flops(self.config, self.batch.lengths, True, self.batch.labelled).total
            expected = parity.oracle(self.config, self.state_dict, self.batch, "training")
            self.limits = parity.limits(self.config, self.state_dict, self.batch, "training", DTYPE, expected)
            # The peers need the GPU's memory.
            self.expected = {name: value.cpu() for name, value in expected.items()}
            self.state_dict = {name: value.cpu() for name, value in self.state_dict.items()}
        case.work |= {"tokens": self.batch.tokens, "labelled": self.batch.labelled, "gflop": self.flop / 1e9}
        case.work["backends"] = serving_backends(self.config, device, FORMATS[DTYPE].activations)

    def peer(self, name: str) -> Peer:
        if name != COMPILED:
            return (PEERS | GRAPHED)[name]()
        peer = Compiled()
        peer.tried = self.stage.tiny
        return peer

    def prepare(self, row: Row) -> Trainer | None:
        """Builds the peer, checks it, and measures the memory of its second step; None where it is wrong."""
        device = self.stage.device
        self.stage.free()
        before = held_bytes(device)
        peer = self.peer(row.peer)
        with device:  # initial weights, which are not used, take long on a CPU
            peer.build(self.config, self.state_dict, DTYPE, device, self.batch)
        expected = {name: value.to(device) for name, value in self.expected.items()}
        error = parity.error(parity.results(peer, self.batch, "training"), expected)
        del expected
        limit = self.limits[0 if row.peer.startswith(OURS) else 1]
        self.case.judge(row, {"loss and gradients": error}, {"loss and gradients": limit})
        if not row.passed:
            return None
        trainer = Trainer(peer, self.batch)
        trainer.step()
        if row.peer in GRAPHED:  # whose memory is not what the allocator counts
            return trainer
        own = held_bytes(device) - before
        peak = peak_bytes(trainer.step, device)
        row.figures["peak_gigabytes"] = None if peak is None else (own + peak) / 1e9
        return trainer

    def measure(self, rows: Sequence[Row]) -> None:
        trainers: dict[str, Trainer] = {}
        for row in rows:
            with self.case.attempt(row, _COMPILING):
                trainer = self.prepare(row)
                if trainer is not None:
                    trainers[row.peer] = trainer
        functions = {peer: trainer.step for peer, trainer in trainers.items()}
        for peer, one in self.case.interleave("steps", functions, turns=3).items():
            rate = self.flop / one.median
            best = data_sheet(self.stage.facts["device"], torch.bfloat16)
            self.case.rows[peer].figures |= {
                "milliseconds": one.median * 1e3,
                "all_milliseconds": [round(second * 1e3, 3) for second in one.seconds],
                "tokens_per_second": self.batch.tokens / one.median,
                "tflops": rate / 1e12,
                "mfu": None if best is None else rate / best,
                "mfu_of_measured": rate / 1e12 / self.stage.facts["matrix_tflops"],
                "alone": len(rows) == 1,
            }

    def compare(self) -> None:
        """Every peer's figures over ours."""
        ours = self.case.rows[OURS].figures
        for row in self.case.rows.values():
            for ratio, of in (("ratio", "milliseconds"), ("memory_ratio", "peak_gigabytes")):
                both = (row.figures.get(of), ours.get(of))
                row.figures[ratio] = both[0] / both[1] if both[0] and both[1] else None


def measure(case: Case, work: Work) -> None:
    torch.compiler.reset()
    comparison = Comparison(case, work)
    comparison.measure(case.standing())
    for row in case.rows.values():
        if row.reason is not None and row.reason.startswith("OutOfMemoryError"):
            case.stage.free()
            row.reason = row.passed = None
            comparison.measure([row])
    comparison.compare()


def works(tiny: bool) -> tuple[Work, ...]:
    rows, length = (2, 16) if tiny else (32, 512)
    configs = ("base",) if tiny else ("base", "xxlarge")
    both = ((rows, False), (round(rows / FILL), True))
    return tuple(Work(config, many, length, ragged) for config in configs for many, ragged in both)


def main(arguments: list[str] | None = None) -> None:
    stage = Stage("training", COLUMNS, arguments)
    if "matrix_tflops" not in stage.facts:
        stage.facts["matrix_tflops"] = matrix_tflops(stage.device, 64 if stage.tiny else 8192)
    for work in works(stage.tiny):
        facts = {"config": work.config, "rows": work.rows, "length": work.length, "dtype": DTYPE}
        peers = (OURS, *GRAPHED, *ALL[1:]) if stage.device.type == "cuda" and not work.ragged else ALL
        stage.run(work.name, facts, peers, lambda case, work=work: measure(case, work))


if __name__ == "__main__":
    main()
