"""What the machine does: matrix products, copies, and what it costs to start a kernel.

- bfloat16 8192³: the rate that the others are held against.
- A copy from GPU memory to GPU memory: bytes read and written.
- The products of an ALBERT-base layer as cuBLAS does them: forward y = x Wᵀ, the gradient of x = dy W, and that of W =
  dyᵀ x, for the fused projection, the attention's output and the two of the feed-forward part.
- The gradient of W for all passes at once (they share W): one product with float32 sums over passes × tokens, beside
  one for each pass, added up in bfloat16 as autograd would.
- Kernels that do next to nothing: started one by one, waiting in the queue, and as nodes of a CUDA graph.
"""

from __future__ import annotations

import torch
from gpu_stage import Case, Column, Stage
from gpu_timing import matrix_tflops, once, recorded
from torch import Tensor

COLUMNS = (
    Column("us", "microseconds", "{:,.1f}"),
    Column("TFLOP/s", "tflops", "{:,.1f}"),
    Column("TB/s", "terabytes_per_second", "{:.3f}"),
)

HIDDEN, PASSES = 768, 12

# Kernels started in a row; ten times as many have to fit into the launch queue.
LAUNCHES = 50


class Rates:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.device = stage.device
        self.passes = 2 if stage.tiny else PASSES
        self.hidden = 32 if stage.tiny else HIDDEN

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def enter(self, case: Case, name: str, flop: float = 0.0, moved: float = 0.0, seconds: float = 0.0) -> None:
        case.rows[name].passed = True
        case.rows[name].figures |= {
            "microseconds": seconds * 1e6,
            "tflops": flop / seconds / 1e12 if flop else None,
            "terabytes_per_second": moved / seconds / 1e12 if moved else None,
        }

    def ceilings(self, case: Case) -> None:
        size = 64 if self.stage.tiny else 8192
        with case.attempt(case.rows["product"]):
            rate = matrix_tflops(self.device, size)
            self.enter(case, "product", flop=2 * size**3, seconds=2 * size**3 / rate / 1e12)
            self.stage.facts["matrix_tflops"] = rate
        with case.attempt(case.rows["copy"]):
            source = torch.randn(2**14 if self.stage.tiny else 2**30, device=self.device)
            target = torch.empty_like(source)
            copy = once("device", lambda: target.copy_(source), self.device).median
            self.enter(case, "copy", moved=2 * source.nbytes, seconds=copy)
            self.stage.facts["copy_terabytes_per_second"] = 2 * source.nbytes / copy / 1e12

    def products(self, case: Case, tokens: int) -> None:
        for name, (inner, outer) in self.weights().items():
            x, dy, weight = self.randn(tokens, inner), self.randn(tokens, outer), self.randn(outer, inner)
            functions = {
                f"{name} forward": lambda x=x, weight=weight: torch.mm(x, weight.t()),
                f"{name} gradient of x": lambda dy=dy, weight=weight: torch.mm(dy, weight),
                f"{name} gradient of W": lambda dy=dy, x=x: torch.mm(dy.t(), x),
            }
            for peer, one in case.interleave("device", functions).items():
                self.enter(case, peer, flop=2 * tokens * inner * outer, seconds=one.median)

    def weight_gradients(self, case: Case, tokens: int) -> None:
        for name, (inner, outer) in self.weights().items():
            dy = self.randn(self.passes * tokens, outer)
            x = self.randn(self.passes * tokens, inner)
            total = torch.zeros(outer, inner, device=self.device)

            def at_once(dy: Tensor = dy, x: Tensor = x, total: Tensor = total) -> Tensor:
                if self.device.type == "cpu":
                    return torch.addmm(total, dy.t().float(), x.float(), beta=0.0)
                return torch.addmm(total, dy.t(), x, beta=0.0, out_dtype=torch.float32)

            def one_by_one(dy: Tensor = dy, x: Tensor = x) -> Tensor:
                total = None
                for dy_of, x_of in zip(dy.chunk(self.passes), x.chunk(self.passes), strict=True):
                    product = torch.mm(dy_of.t(), x_of)
                    total = product if total is None else total.add_(product)
                assert total is not None
                return total

            functions = {f"{name} at once, float32": at_once, f"{name} one by one": one_by_one}
            for peer, one in case.interleave("device", functions).items():
                self.enter(case, peer, flop=2 * self.passes * tokens * inner * outer, seconds=one.median)

    def launches(self, case: Case) -> None:
        x = torch.zeros(32, device=self.device)

        def many() -> None:
            for _ in range(LAUNCHES):
                x.add_(1.0)

        with case.attempt(case.rows["started one by one"]):
            self.enter(case, "started one by one", seconds=once("latency", many, self.device).median / LAUNCHES)
        with case.attempt(case.rows["waiting in the queue"]):
            self.enter(case, "waiting in the queue", seconds=once("device", many, self.device).median / LAUNCHES)
        with case.attempt(case.rows["node of a graph"]):
            graph = recorded(many, self.device)
            self.enter(case, "node of a graph", seconds=once("device", graph, self.device).median / LAUNCHES)
        with case.attempt(case.rows["graph of one, and waiting for it"]):
            graph = recorded(lambda: x.add_(1.0), self.device)
            seconds = once("latency", graph, self.device).median
            self.enter(case, "graph of one, and waiting for it", seconds=seconds)

    def weights(self) -> dict[str, tuple[int, int]]:
        hidden, intermediate = self.hidden, 4 * self.hidden
        return {
            "query, key, value": (hidden, 3 * hidden),
            "output": (hidden, hidden),
            "ffn": (hidden, intermediate),
            "ffn output": (intermediate, hidden),
        }


def main(arguments: list[str] | None = None) -> None:
    stage = Stage("rates", COLUMNS, arguments)
    rates = Rates(stage)
    stage.run("ceilings", {}, ("product", "copy"), rates.ceilings)
    directions = ("forward", "gradient of x", "gradient of W")
    ways = ("at once, float32", "one by one")
    for tokens in (16, 32) if stage.tiny else (2048, 16384):
        peers = [f"{name} {direction}" for name in rates.weights() for direction in directions]
        stage.run(f"products of {tokens} tokens", {"tokens": tokens}, peers, lambda c, n=tokens: rates.products(c, n))
        peers = [f"{name} {way}" for name in rates.weights() for way in ways]
        title = f"gradients of W over {rates.passes} passes of {tokens} tokens"
        stage.run(title, {"tokens": tokens}, peers, lambda c, n=tokens: rates.weight_gradients(c, n))
    starts = ("started one by one", "waiting in the queue", "node of a graph", "graph of one, and waiting for it")
    stage.run("launches", {"launches": LAUNCHES}, starts, rates.launches)


if __name__ == "__main__":
    main()
