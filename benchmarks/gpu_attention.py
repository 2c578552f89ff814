"""Attention alone, forward and backward, at about 16k tokens: ours beside PyTorch's kernels.

Operations: 4 length² hidden for each row forward (scores, and their product with the values), 2.5 times as many
backward (the scores again, and four gradients); of real tokens only. Full rows, and rows of which 40 % is real on
average: ours and `varlen_attn` have those packed, PyTorch's others padded, with a mask.

Ours is called with the three parts of a packed projection, [tokens, 3, heads, head_dim]; gradients are of the parts, as
in the encoder. Every output and gradient is checked against float64 before any is timed: ours may be off by twice as
much as the worst of PyTorch's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from gpu_stage import OURS, Case, Column, Stage, relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from albert_fast import backends, ops
from albert_fast.bench.formats import name_of

COLUMNS = (
    Column("forward us", "forward_microseconds"),
    Column("TFLOP/s", "forward_tflops"),
    Column("x ours", "forward_ratio", "{:.2f}"),
    Column("backward us", "backward_microseconds"),
    Column("TFLOP/s", "backward_tflops"),
    Column("x ours", "backward_ratio", "{:.2f}"),
    Column("error", "error", "{:.1e}"),
    Column("of", "limit", "{:.1e}"),
    Column("host us", "forward_host"),
    Column("host us", "backward_host"),
)

SHAPES = ((128, 128), (32, 512), (8, 2048), (2, 8192))
HEADS = ((12, 64), (16, 128))
TINY_SHAPES = ((3, 33),)
TINY_HEADS = ((2, 16), (1, 32))
FILL = 0.4

# Beyond this an error is wrong whatever the others'.
_LARGEST = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-4}

# Scores of the oracle that are held at a time.
_SCORES = 2**26


@dataclass(frozen=True)
class Work:
    rows: int
    length: int
    heads: int
    head_dim: int
    ragged: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        fill = "ragged" if self.ragged else "full"
        return f"{name_of(self.dtype)} {self.rows}x{self.length} {self.heads}x{self.head_dim} {fill}"

    @functools.cached_property
    def lengths(self) -> list[int]:
        return ragged_lengths(self.rows, self.length) if self.ragged else [self.length] * self.rows

    @property
    def peers(self) -> tuple[str, ...]:
        if self.ragged:
            return (OURS, "varlen_attn", "sdpa cudnn, masked", "sdpa efficient, masked")
        return (OURS, "varlen_attn", "sdpa cudnn", "sdpa flash")

    @property
    def flop(self) -> int:
        return 4 * sum(length**2 for length in self.lengths) * self.heads * self.head_dim


def ragged_lengths(rows: int, length: int) -> list[int]:
    """Lengths from 1 to `length` in random order, the same ones each time; 40 % of `length` on average."""
    places = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    lengths = (1 + (length - 1) * places ** (1 / FILL - 1)).round().long()
    return lengths[torch.randperm(rows, generator=torch.Generator().manual_seed(0))].tolist()


@dataclass
class Way:
    """One implementation with its inputs.

    Attributes:
        inputs: query, key, value; leaves.
        packed: the output, or a gradient, as [tokens, heads, head_dim].
        grad: of the output, shaped like it.
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, Tensor, Tensor]
    packed: Callable[[Tensor], Tensor]
    grad: Tensor


class Problem:
    """Random inputs of a case, packed, and the ways to compute on them."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.tokens = sum(work.lengths)
        self.cu_seqlens = torch.tensor([0, *work.lengths]).cumsum(0).to(device, torch.int32)
        shape = (self.tokens, work.heads, work.head_dim)
        self.qkv = torch.randn(self.tokens, 3, work.heads, work.head_dim, device=device, dtype=work.dtype)
        self.grad = torch.randn(shape, device=device, dtype=work.dtype)

    def way(self, peer: str) -> Way:
        on_gpu = self.device.type == "cuda"
        # A CPU has neither cuDNN nor the memory-efficient kernel.
        cudnn = SDPBackend.CUDNN_ATTENTION if on_gpu else SDPBackend.MATH
        efficient = SDPBackend.EFFICIENT_ATTENTION if on_gpu else SDPBackend.FLASH_ATTENTION
        ways = {
            OURS: self.ours,
            "varlen_attn": self.varlen,
            "sdpa flash": lambda: self.full(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": lambda: self.full(cudnn),
            "sdpa efficient, masked": lambda: self.masked(efficient),
            "sdpa cudnn, masked": lambda: self.masked(cudnn),
        }
        return ways[peer]()

    def leaves(self, change: Callable[[Tensor], Tensor] = lambda part: part) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (change(part).detach().requires_grad_() for part in self.qkv.unbind(1))
        return query, key, value

    def ours(self) -> Way:
        parts = self.leaves()
        rows = (self.cu_seqlens, self.cu_seqlens, self.work.length, self.work.length)
        by_heads = self.grad.shape
        return Way(lambda: ops.cross_attention(*parts, *rows), parts, lambda x: x.view(by_heads), self.grad.flatten(1))

    def varlen(self) -> Way:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        parts = self.leaves(Tensor.contiguous)
        rows = (self.cu_seqlens, self.cu_seqlens, self.work.length, self.work.length)
        return Way(lambda: varlen_attn(*parts, *rows), parts, lambda x: x, self.grad)

    def full(self, backend: SDPBackend) -> Way:
        """As models have them: [rows, length, heads, head_dim] in memory, seen as [rows, heads, length, head_dim]."""
        by_rows = (self.work.rows, self.work.length)

        def change(part: Tensor) -> Tensor:
            return part.contiguous().unflatten(0, by_rows).transpose(1, 2)

        parts = self.leaves(change)

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*parts)

        return Way(forward, parts, lambda x: x.transpose(1, 2).flatten(0, 1), change(self.grad))

    def masked(self, backend: SDPBackend) -> Way:
        lengths = torch.tensor(self.work.lengths, device=self.device)
        real = torch.arange(self.work.length, device=self.device) < lengths[:, None]  # [rows, length]
        mask = real[:, None, None, :].expand(-1, 1, self.work.length, -1)

        def change(part: Tensor) -> Tensor:
            padded = part.new_zeros(*real.shape, *part.shape[1:])
            padded[real] = part
            return padded.transpose(1, 2)

        parts = self.leaves(change)

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*parts, attn_mask=mask)

        return Way(forward, parts, lambda x: x.transpose(1, 2)[real], change(self.grad))

    def results(self, way: Way) -> dict[str, Tensor]:
        output = way.forward()
        grads = torch.autograd.grad(output, way.inputs, way.grad)
        tensors = dict(zip(("output", "query", "key", "value"), (output, *grads), strict=True))
        return {name: way.packed(tensor.detach()) for name, tensor in tensors.items()}

    def exact(self) -> dict[str, Tensor]:
        """The formula in float64: some heads of a row at a time."""
        found = {name: torch.empty_like(self.grad, dtype=torch.float64) for name in ("output", "query", "key", "value")}
        scale = self.work.head_dim**-0.5
        for tokens, heads in self.parts():
            q, k, v = (x.double().transpose(0, 1) for x in self.qkv[tokens, :, heads].unbind(1))
            grad = self.grad[tokens, heads].double().transpose(0, 1)  # [heads, length, head_dim]
            probabilities = (q @ k.mT * scale).softmax(dim=-1)
            grad_probabilities = grad @ v.mT
            grad_scores = grad_probabilities - (grad_probabilities * probabilities).sum(dim=-1, keepdim=True)
            grad_scores = grad_scores * probabilities * scale
            of_part = (probabilities @ v, grad_scores @ k, grad_scores.mT @ q, probabilities.mT @ grad)
            for target, part in zip(found.values(), of_part, strict=True):
                target[tokens, heads] = part.transpose(0, 1)
        return found

    def parts(self) -> Iterator[tuple[slice, slice]]:
        start = 0
        for length in self.work.lengths:
            together = max(1, _SCORES // length**2)
            for first in range(0, self.work.heads, together):
                yield slice(start, start + length), slice(first, first + together)
            start += length


def measure(work: Work, case: Case) -> None:
    problem = Problem(work, case.stage.device)
    with case.attempt(None):
        expected = problem.exact()
    ways: dict[str, Way] = {}
    errors: dict[str, dict[str, float]] = {}
    for row in case.standing():
        with case.attempt(row):
            way = problem.way(row.peer)
            found = problem.results(way)
            errors[row.peer] = {name: relative_error(found[name], expected[name]) for name in expected}
            ways[row.peer] = way
            del found
    del expected
    largest = _LARGEST[work.dtype]
    theirs = [error for peer, error in errors.items() if peer != OURS and max(error.values()) <= largest]
    for peer, error in errors.items():
        limits = dict.fromkeys(error, largest)
        if peer == OURS and theirs:
            worst = {name: max(their[name] for their in theirs) for name in error}
            limits = {name: min(2.0 * worst[name], largest) for name in error}
        case.judge(case.rows[peer], error, limits)

    def forward(way: Way) -> Callable[[], Tensor]:
        return torch.no_grad()(way.forward)

    def backward(way: Way) -> Callable[[], object]:
        output = way.forward()
        return lambda: torch.autograd.grad(output, way.inputs, way.grad, retain_graph=True)

    times = {"forward": (forward, 1.0), "backward": (backward, 2.5)}
    for direction, (call, share) in times.items():
        functions: dict[str, Callable[[], object]] = {}
        for row in case.standing():
            with case.attempt(row):
                functions[row.peer] = call(ways[row.peer])
        timed = case.interleave("device", functions)
        ours = timed[OURS].median if OURS in timed else None
        for peer, one in timed.items():
            case.rows[peer].figures |= {
                f"{direction}_microseconds": one.median * 1e6,
                f"{direction}_all_microseconds": [round(second * 1e6, 2) for second in one.seconds],
                f"{direction}_tflops": share * work.flop / one.median / 1e12,
                f"{direction}_ratio": None if ours is None else one.median / ours,
                f"{direction}_starved": one.starved,
                f"{direction}_host": one.host,
            }


def works(tiny: bool) -> Iterator[Work]:
    """The most wanted ones first."""
    shapes, heads = (TINY_SHAPES, TINY_HEADS) if tiny else (SHAPES, HEADS)
    for dtype, head, ragged in (
        (torch.bfloat16, heads[0], False),
        (torch.bfloat16, heads[0], True),
        (torch.bfloat16, heads[1], False),
        (torch.float16, heads[0], False),
        (torch.bfloat16, heads[1], True),
        (torch.float16, heads[1], False),
    ):
        for rows, length in shapes:
            # As many real tokens as full rows would have.
            yield Work(round(rows / FILL) if ragged else rows, length, *head, ragged, dtype)


def main(arguments: list[str] | None = None) -> None:
    stage = Stage("attention", COLUMNS, arguments)
    for work in works(stage.tiny):
        call = backends.Call("attention", stage.device, work.dtype, work.head_dim)
        facts = {**asdict(work), "dtype": name_of(work.dtype), "tokens": sum(work.lengths), "gflop": work.flop / 1e9}
        facts["backend"] = backends.choose(call).name
        stage.run(work.name, facts, work.peers, lambda case, work=work: measure(work, case))


if __name__ == "__main__":
    main()
