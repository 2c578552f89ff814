"""The masked-LM loss and its gradients alone: 2458 labelled of 16384 tokens, as in pretraining, and all labelled.

x [tokens, 128] and the word table [30000, 128] in bfloat16. A call is the loss and the gradients of x, table and bias;
peak is the most memory that it holds beyond its inputs. Those who take labelled rows are given their positions. Loss
and gradients are checked against float64 first; ours may be off by twice as much as this package's plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_stage import OURS, Case, Column, Stage, relative_error
from gpu_timing import peak_bytes
from torch import Tensor

from albert_fast import backends, ops
from albert_fast.bench.peers.albert_fast import forced_backend

COLUMNS = (
    Column("us", "microseconds"),
    Column("TFLOP/s", "tflops"),
    Column("x ours", "ratio", "{:.2f}"),
    Column("peak MB", "peak_megabytes", "{:,.1f}"),
    Column("error", "error", "{:.1e}"),
    Column("of", "limit", "{:.1e}"),
    Column("host us", "host"),
)

SIZES = (30000, 128, 16384, 2458)  # vocabulary, embedding, tokens, labelled
TINY_SIZES = (300, 16, 64, 10)

# Beyond this an error is wrong whatever the reference's.
_LARGEST = 0.05

# Tokens whose logits the oracle holds at a time.
_CHUNK = 2048

_OURS_LIMIT = 2.0

Gradients = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Problem:
    def __init__(self, device: torch.device, sizes: tuple[int, int, int, int], labelled: int) -> None:
        self.device, self.labelled = device, labelled
        vocabulary, embedding, tokens, _ = sizes

        def leaf(scale: float, *shape: int) -> Tensor:
            return (scale * torch.randn(shape, device=device)).bfloat16().requires_grad_()

        # Logits of a standard deviation near 1.
        self.x = leaf(1.0, tokens, embedding)
        self.table = leaf(embedding**-0.5, vocabulary, embedding)
        self.bias = leaf(0.1, vocabulary)
        self.labels = torch.randint(vocabulary, (tokens,), device=device)
        self.positions = torch.randperm(tokens, device=device)[:labelled].sort().values
        ignored = torch.ones(tokens, dtype=torch.bool, device=device).index_fill(0, self.positions, False)
        self.labels[ignored] = -100
        # Logits; the gradients of x and of the table. What is computed twice counts once.
        self.flop = 3 * 2 * labelled * vocabulary * embedding

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.table, self.bias

    def call(self, loss: Loss) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            value = loss(self.x, self.table, self.bias, self.labels)
            return value.detach(), *torch.autograd.grad(value, self.leaves)

        return run

    def exact(self) -> Gradients:
        x, table, bias = (tensor.detach().double() for tensor in self.leaves)
        found = {"loss": x.new_zeros(()), "x": torch.zeros_like(x)}
        found |= {"table": torch.zeros_like(table), "bias": torch.zeros_like(bias)}
        for positions in self.positions.split(_CHUNK):
            rows, labels = x[positions], self.labels[positions, None]
            grad = (rows @ table.t() + bias).log_softmax(dim=-1)  # [chunk, V]
            found["loss"] -= grad.gather(1, labels).sum() / self.labelled
            grad = grad.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=grad.dtype)) / self.labelled
            found["x"][positions] = grad @ table
            found["table"] += grad.t() @ rows
            found["bias"] += grad.sum(dim=0)
        return found

    def errors(self, results: tuple[Tensor, ...], expected: Gradients) -> dict[str, float]:
        named = zip(expected.items(), results, strict=True)
        return {name: relative_error(result, value) for (name, value), result in named}


def ours(x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return ops.masked_lm_loss(x, table, bias, labels)


def all_rows(x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """As transformers' models do."""
    return F.cross_entropy(F.linear(x, table, bias), labels)


def of_positions(loss: Loss, positions: Tensor) -> Loss:
    return lambda x, table, bias, labels: loss(x[positions], table, bias, labels[positions])


def compiled(loss: Loss, tiny: bool) -> Loss:
    return torch.compile(loss, dynamic=False, backend="eager" if tiny else "inductor")


def fused_by_torch() -> Loss:
    def loss(x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, table, labels, linear_bias=bias)  # type: ignore[attr-defined]

    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return loss


def liger() -> Loss:
    function = _found("liger_kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")

    def loss(x: Tensor, table: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        result = function(x, table, labels, bias)
        return result[0] if isinstance(result, tuple) else result

    return loss


def cut_cross_entropy() -> Loss:
    function = _found("cut_cross_entropy", "cut_cross_entropy", "linear_cross_entropy")
    return lambda x, table, bias, labels: function(x, table, labels, bias=bias)


def _found(package: str, module: str, name: str) -> Callable[..., Tensor]:
    if importlib.util.find_spec(package) is None:
        raise NotImplementedError(f"{package} is not installed")
    return getattr(importlib.import_module(module), name)


def losses(problem: Problem, tiny: bool) -> dict[str, Callable[[], Loss]]:
    """How each peer is made."""
    some = functools.partial(of_positions, positions=problem.positions)
    made: dict[str, Callable[[], Loss]] = {
        OURS: lambda: ours,
        "linear, cross_entropy": lambda: all_rows,
        "the same, compiled": lambda: compiled(all_rows, tiny),
        "F.linear_cross_entropy": fused_by_torch,
        "liger": liger,
        "cut_cross_entropy": cut_cross_entropy,
    }
    if problem.labelled < problem.x.shape[0]:
        made |= {
            "linear, cross_entropy of labelled rows": lambda: some(all_rows),
            "the same, compiled, of labelled rows": lambda: compiled(some(all_rows), tiny),
            "F.linear_cross_entropy of labelled rows": lambda: some(fused_by_torch()),
            "liger of labelled rows": lambda: some(liger()),
        }
    return made


PEERS = (
    OURS,
    "linear, cross_entropy",
    "the same, compiled",
    "F.linear_cross_entropy",
    "liger",
    "cut_cross_entropy",
)
PEERS_OF_LABELLED = (
    "linear, cross_entropy of labelled rows",
    "the same, compiled, of labelled rows",
    "F.linear_cross_entropy of labelled rows",
    "liger of labelled rows",
)


def measure(case: Case, sizes: tuple[int, int, int, int], labelled: int) -> None:
    stage = case.stage
    torch.compiler.reset()
    problem = Problem(stage.device, sizes, labelled)
    with case.attempt(None):
        expected = problem.exact()
        with forced_backend("reference"):
            yardstick = problem.errors(problem.call(ours)(), expected)
    calls: dict[str, Callable[[], object]] = {}
    makers = losses(problem, stage.tiny)
    for row in case.standing():
        with case.attempt(row):
            call = problem.call(makers[row.peer]())
            errors = problem.errors(call(), expected)
            limits = dict.fromkeys(errors, _LARGEST)
            if row.peer == OURS:
                eps = torch.finfo(torch.float32).eps  # of the loss, and of few gradients that happen to be exact
                limits = {name: min(_LARGEST, max(_OURS_LIMIT * yardstick[name], eps)) for name in errors}
            case.judge(row, errors, limits)
            peak = peak_bytes(call, stage.device)
            row.figures["peak_megabytes"] = None if peak is None else peak / 1e6
            calls[row.peer] = call
    del expected
    found = case.interleave("device", {peer: call for peer, call in calls.items() if case.rows[peer].passed})
    fastest = found[OURS].median if OURS in found else None
    for peer, one in found.items():
        case.rows[peer].figures |= {
            "microseconds": one.median * 1e6,
            "all_microseconds": [round(second * 1e6, 2) for second in one.seconds],
            "tflops": problem.flop / one.median / 1e12,
            "ratio": None if fastest is None else one.median / fastest,
            "starved": one.starved,
            "host": one.host,
        }


def main(arguments: list[str] | None = None) -> None:
    stage = Stage("loss", COLUMNS, arguments)
    sizes = TINY_SIZES if stage.tiny else SIZES
    vocabulary, embedding, tokens, some = sizes
    backend = backends.choose(backends.Call("masked_lm_loss", stage.device, torch.bfloat16)).name
    for labelled in (some, tokens):
        work = {"vocabulary": vocabulary, "embedding": embedding, "tokens": tokens, "labelled": labelled}
        peers = (*PEERS, *PEERS_OF_LABELLED) if labelled < tokens else PEERS
        stage.run(
            f"{labelled} of {tokens} tokens labelled",
            {**work, "dtype": "bfloat16", "backend": backend},
            peers,
            lambda case, labelled=labelled: measure(case, sizes, labelled),
        )


if __name__ == "__main__":
    main()
