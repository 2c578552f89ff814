"""csrc/cpu: the masked-LM loss and its gradients against the reference in float64."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gemm_library as g
import token_library as t
from token_library import DTYPES, assert_close, call, empty, one_torch_thread, token_library, vector  # noqa: F401

pytestmark = t.needs_compiler
IGNORE = -100


@pytest.fixture(params=["", "avx512_bf16", "avx2"], ids=lambda isa: isa or "best")
def lib(request, token_library, monkeypatch):  # noqa: F811
    return t.with_isa(token_library, request.param, monkeypatch)


class Case:
    """Some tokens have a label; the x of all others is NaN, and so is their grad_loss."""

    def __init__(self, tokens: int, size: int, vocabulary: int, labelled: int, dtype=torch.float32, **options: Any):
        self.options = {"ignore_index": IGNORE, "label_smoothing": 0.0, "z_loss": 0.0} | options
        self.dtype = dtype
        self.x = torch.randn(tokens, size).to(dtype)
        self.table = (torch.randn(vocabulary, size) / size**0.25).to(dtype)
        self.bias = torch.randn(vocabulary)
        self.labels = torch.full((tokens,), self.options["ignore_index"])
        chosen = torch.randperm(tokens)[:labelled]
        self.labels[chosen] = torch.randint(vocabulary, chosen.shape)
        self.grad_loss = torch.randn(tokens)
        self.labelled = self.labels != self.options["ignore_index"]
        self.x[~self.labelled] = self.grad_loss[~self.labelled] = float("nan")

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """F.cross_entropy of the labelled tokens' logits, products in `dtype`; results of all tokens."""
        leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (self.x[self.labelled], self.table, self.bias)]
        x, table, bias = leaves
        logits = F.linear(x, table, bias)
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        labels, smoothing = self.labels[self.labelled], self.options["label_smoothing"]
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        logsumexp = logits.logsumexp(dim=-1)
        loss = loss + self.options["z_loss"] * logsumexp.square()
        upstream = self.grad_loss[self.labelled].to(loss.dtype)
        grads = torch.autograd.grad(loss, leaves, upstream)

        def everywhere(values: Tensor) -> Tensor:
            out = values.new_zeros(len(self.labels), *values.shape[1:])
            out[self.labelled] = values
            return out

        first = logits.argmax(dim=-1) == labels
        results = {"loss": everywhere(loss.detach()), "logsumexp": everywhere(logsumexp.detach())}
        results |= {"correct": everywhere(first), "grad_x": everywhere(grads[0])}
        return results | {"grad_table": grads[1], "grad_bias": grads[2]}

    def args(self, gap: int, names: tuple[str, ...]) -> tuple[t.LossArgs, dict[str, g.Guarded]]:
        (tokens, size), vocabulary = self.x.shape, len(self.table)
        args = t.LossArgs(dtype=g.CODES[self.dtype], tokens=tokens, size=size, vocabulary=vocabulary, **self.options)
        buffers = {
            name: g.guarded(x, size + gap) if x.dim() == 2 else vector(x)
            for name in names
            if (x := getattr(self, name)) is not None
        }
        return args, buffers

    def forward(self, lib, threads: int = 1, gap: int = 0) -> dict[str, Tensor]:
        args, buffers = self.args(gap, ("x", "table", "bias", "labels"))
        outputs = {name: empty(1, len(self.x), torch.float32) for name in ("loss", "logsumexp")}
        outputs["correct"] = empty(1, len(self.x), torch.uint8)
        buffers |= outputs
        t.fill(args, buffers)
        out = call(lib, "albert_masked_lm_loss", args, buffers, threads)
        return {name: out[name][0] for name in outputs}

    def backward(self, lib, logsumexp: Tensor, threads: int = 1, gap: int = 0, without: tuple[str, ...] = ()):
        args, buffers = self.args(gap, ("x", "table", "bias", "labels", "grad_loss"))
        buffers["logsumexp"] = vector(logsumexp)
        torch.manual_seed(7)
        self.start = {"grad_table": torch.randn(self.table.shape), "grad_bias": torch.randn(len(self.table))}
        outputs = {"grad_x": empty(*self.x.shape, self.dtype, gap)}
        outputs["grad_table"] = g.guarded(self.start["grad_table"], self.x.shape[1] + gap)
        outputs["grad_bias"] = vector(self.start["grad_bias"])
        buffers |= outputs
        t.fill(args, {name: buffer for name, buffer in buffers.items() if name not in without})
        out = call(lib, "albert_masked_lm_loss_backward", args, buffers, threads)
        return {name: out[name][0] if name == "grad_bias" else out[name] for name in outputs if name not in without}

    def check(self, lib, what: str = "", threads: tuple[int, ...] = (2, 1)) -> None:
        what = f"{what} {len(self.x)} tokens, {len(self.table)} x {self.x.shape[1]}"
        oracle, peer = self.expected(torch.float64), self.expected(self.dtype)
        forward = [self.forward(lib, count, gap) for count, gap in zip(threads, (3, 0), strict=True)]
        assert all(torch.equal(forward[1][name], x) for name, x in forward[0].items()), what
        out = forward[0]
        for name in ("loss", "logsumexp"):
            assert_close(out[name], oracle[name], peer[name], f"{name}, {what}", self.dtype)
            assert not out[name][~self.labelled].any()
        assert not out["correct"][~self.labelled].any()
        assert (out["correct"].bool() != oracle["correct"]).sum() <= 0.01 * len(self.x), "more than a rare tie"

        for count, gap in zip(threads, (2, 0), strict=True):
            grads = self.backward(lib, out["logsumexp"], count, gap)
            again = self.backward(lib, out["logsumexp"], count)
            assert all(torch.equal(again[name], x) for name, x in grads.items()), f"not the same twice: {what}"
            assert not grads["grad_x"][~self.labelled].any()
            # Backward knows the logsumexp rounded to float32, and exp(logit - logsumexp) is off by as much.
            floor = torch.finfo(torch.float32).eps / 2 * oracle["logsumexp"].abs().max().item()
            assert_close(grads["grad_x"], oracle["grad_x"], peer["grad_x"], f"grad_x, {what}", floor=floor)
            for name, start in self.start.items():
                expected, torchs = start.double() + oracle[name], start + peer[name].float()
                assert_close(grads[name], expected, torchs, f"{name}, {what}", self.dtype, floor)


VARIANTS = {"plain": {}, "smoothing": {"label_smoothing": 0.1}, "z-loss": {"z_loss": 1e-2}}
VARIANTS["both"] = VARIANTS["smoothing"] | VARIANTS["z-loss"]
RAGGED = [(1, 1, 1, 1), (5, 8, 3, 2), (40, 33, 101, 15), (63, 16, 450, 63), (300, 128, 1013, 170)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_cross_entropy(lib, dtype, variant):
    for shape in [*RAGGED, (*(random.randint(16, 200) for _ in range(3)), 16)]:
        Case(*shape, dtype=DTYPES[dtype], **VARIANTS[variant]).check(lib)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_of_tokens(lib, dtype):
    """More labelled tokens than are done at a time, and so wide rows that a block is small."""
    Case(2500, 24, 700, 2350, DTYPES[dtype], label_smoothing=0.1).check(lib)
    Case(300, 1030, 260, 290, DTYPES[dtype]).check(lib)


def test_any_number_of_threads(lib):
    case = Case(200, 40, 3000, 130, label_smoothing=0.1)
    case.check(lib, threads=(5, 3))
    case.check(lib, threads=(40, 1))


def test_the_bias_may_be_missing(lib):
    case = Case(50, 20, 120, 30)
    expected = case.expected(torch.float64), case.expected(torch.float32)
    case.bias.zero_()
    with_zeros = case.forward(lib)
    case.bias = None
    assert torch.equal(case.forward(lib)["loss"], with_zeros["loss"])
    assert expected


def test_gradients_in_part(lib):
    case = Case(50, 20, 120, 30)
    logsumexp = case.forward(lib)["logsumexp"]
    whole = case.backward(lib, logsumexp)
    for name in whole:
        part = case.backward(lib, logsumexp, without=(name,))
        assert all(torch.equal(whole[other], x) for other, x in part.items())


@pytest.mark.parametrize("kind", ["large", "far below 0"])
def test_large_logits_and_forbidden_words(lib, kind):
    """Exponentials that overflow without the maximum taken out, and words that can never be."""
    case = Case(60, 16, 500, 40)
    if kind == "large":
        case.bias *= 1e4
        case.bias[7] = -float("inf")
        case.bias[100:400] = -1e30
        case.labels[case.labelled] = torch.randint(10, 100, (40,))
    else:
        case.bias.fill_(-200.0)  # exp of the shift itself would overflow
    oracle, peer = case.expected(torch.float64), case.expected(torch.float32)
    out = case.forward(lib, 2)
    for name in ("loss", "logsumexp"):
        assert_close(out[name], oracle[name], peer[name], name)
    grads = case.backward(lib, out["logsumexp"], 2)
    # exp(logit - logsumexp) is right to within the rounding of a logsumexp of that size
    tolerance = 2 * torch.finfo(torch.float32).eps * out["logsumexp"].abs().max()
    for name, gradient in grads.items():
        difference = gradient.double() - case.start[name].double() if name in case.start else gradient.double()
        assert (difference - oracle[name]).norm() / oracle[name].norm() <= tolerance, name


def test_special_values(lib):
    case = Case(12, 8, 300, 12)
    case.x[3, 5] = float("nan")
    case.bias[290] = -float("inf")
    out = case.forward(lib)
    assert bool(out["loss"].isnan().nonzero().flatten().tolist() == [3])
    case.bias[20] = float("inf")
    expected = torch.logsumexp(F.linear(case.x, case.table, case.bias), -1)
    out = case.forward(lib)["logsumexp"]
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())


def test_of_several_largest_logits_the_first_counts(lib):
    vocabulary = 1000
    case = Case(40, 4, vocabulary, 40)
    case.table.zero_()
    case.bias.fill_(1.0)[:2] = 0.0
    case.labels = torch.tensor([0, 2, 3, 31, 32, 112, 224, 448, 999, 2]).repeat(4)
    out = case.forward(lib, 2)
    assert torch.equal(out["correct"].bool(), case.labels == 2)
    assert_close(out["logsumexp"], torch.full((40,), 998.0 * torch.e + 2).double().log(), out["logsumexp"], "logsumexp")


def test_correct_is_the_argmax(lib):
    case = Case(300, 32, 2000, 300)
    best = F.linear(case.x.double(), case.table.double(), case.bias.double()).topk(2, dim=-1).indices
    case.labels = torch.where(torch.rand(300) < 0.5, best[:, 0], best[:, 1])
    assert torch.equal(case.forward(lib, 2)["correct"].bool(), case.labels == best[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_label_at_all(lib, dtype):
    for tokens in (0, 9):
        case = Case(tokens, 16, 50, 0, DTYPES[dtype])
        out = case.forward(lib)
        assert not any(out[name].any() for name in ("loss", "logsumexp", "correct"))
        grads = case.backward(lib, out["logsumexp"])
        assert not grads["grad_x"].any()
        assert all(torch.equal(grads[name], start) for name, start in case.start.items())


def test_another_ignore_index(lib):
    Case(60, 16, 50, 30, ignore_index=3).check(lib)
    Case(60, 16, 50, 30, ignore_index=-1).check(lib)


def test_errors(lib):
    case = Case(20, 16, 50, 10)
    args, buffers = case.args(0, ("x", "table", "bias", "labels"))
    buffers["loss"] = empty(1, 20, torch.float32)
    t.fill(args, buffers)
    size = lib.albert_masked_lm_loss_workspace_bytes(args, 1)
    workspace = g.aligned(size + 64)

    def forward(workspace_size=size, offset=0, **changes) -> int:
        changed = t.LossArgs.from_buffer_copy(args)
        for name, value in changes.items():
            setattr(changed, name, value)
        return lib.albert_masked_lm_loss(changed, workspace.address + offset, workspace_size, None)

    wrong = [vector(torch.where(case.labelled, label, IGNORE)) for label in (-1, 50, 2**40)]
    for changes in (
        {"tokens": -1},
        {"size": 17},
        {"dtype": g.INT8},
        {"x_stride": 15},
        {"table_stride": 15},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"z_loss": -1.0},
        {"z_loss": float("nan")},
        {"ignore_index": 51},
        *({"labels": labels.address} for labels in wrong),
    ):
        assert forward(**changes) == g.BAD_ARGUMENT, changes
    assert forward(workspace_size=size - 1) == g.SMALL_WORKSPACE
    assert forward(offset=8) == g.UNALIGNED
    assert bool(buffers["loss"].tensor.isnan().all())
    assert forward() == 0
