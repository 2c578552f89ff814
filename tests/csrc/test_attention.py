"""csrc/cpu: attention against float64, forward and backward, on every instruction set that this machine has."""

from __future__ import annotations

import os
import platform
import random
import shutil
import sys
from functools import partial
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from albert_fast.ops.attention import AttentionOptions, _formula, attention_reference, reference_backward

sys.path.insert(0, str(Path(__file__).parent))
import attention_library as a
import gemm_library as g

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)

ISAS = ["", "avx512_bf16", "avx2"]
DTYPES = [torch.float32, torch.bfloat16]
RAGGED = [1, 15, 17, 0, 63, 127, 64]


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    """torch's spinning threads would slow every other test process on the machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    return a.load(g.build(base / "gemm"))


@pytest.fixture(params=ISAS, ids=lambda isa: isa or "default")
def lib(request, library, monkeypatch):
    default = library.albert_isa()
    if default == b"none":
        pytest.skip("no AVX2")
    if request.param:
        monkeypatch.setenv("ALBERT_FAST_ISA", request.param)
        if library.albert_isa() == default:
            pytest.skip(f"the same as {default.decode()}")
    return library


class Problem:
    """Inputs, their gradients by torch in float64 (the oracle) and in the inputs' own dtype (the peer)."""

    def __init__(self, lengths_q, lengths_k, heads, head_dim, dtype, *, tail=0, spread=1.0, **options):
        self.cu_q, self.cu_k = ([0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k))
        self.used = (self.cu_q[-1], self.cu_k[-1], self.cu_k[-1])
        self.dtype, self.width = dtype, heads * head_dim
        self.again = partial(Problem, lengths_q, lengths_k, heads, head_dim, dtype, tail=tail, spread=spread, **options)
        shapes = [(used + tail, heads, head_dim) for used in self.used]
        self.inputs = tuple((torch.randn(shape) * spread).to(dtype) for shape in shapes)
        self.grad_output = torch.randn(self.used[0] + tail, self.width).to(dtype)
        for tensor, used in zip((*self.inputs, self.grad_output), (*self.used, self.used[0]), strict=True):
            tensor[used:] = float("nan")  # belongs to no row
        self.options = {"scale": head_dim**-0.5, **options}

    def call(self, lib, layout="tokens"):
        options = dict(self.options)
        seed = options.pop("seed", None)
        if seed is not None:
            options["seed"] = seed.item() % 2**64
        return a.Call(lib, self.inputs, self.cu_q, self.cu_k, layout=layout, **options)

    def reference(self, dtype, function):
        """function(...) of the used tokens, and the gradients of its first result."""
        inputs = [x[:used].to(dtype).requires_grad_() for x, used in zip(self.inputs, self.used, strict=True)]
        bias = self.options.get("bias")
        if bias is not None:
            bias = bias.to(torch.promote_types(dtype, bias.dtype))
        options = AttentionOptions(**{**self.options, "bias": bias})
        offsets = [torch.tensor(cu, dtype=torch.int32) for cu in (self.cu_q, self.cu_k)]
        results = function(*inputs, *offsets, options)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(
            results[0], inputs, self.grad_output[: self.used[0]].to(dtype), allow_unused=True, materialize_grads=True
        )
        return [x.detach() for x in (*results[:2], *grads)]

    def peers(self):
        """The ways in which torch computes it in the inputs' dtype: its fused attention where that has no dropout and
        knows what to do (a row without keys gives it NaN), and the formula, its gradients by autograd and as written
        out, from rowsum(dO O)."""
        peers = [self.reference(self.dtype, formula)]
        if self.options.get("dropout_p", 0.0) == 0.0:
            fused = self.reference(self.dtype, attention_reference)
            fused.insert(1, peers[0][1])
            if not any(x.isnan().any() for x in fused):
                return [fused]
        inputs = [x[:used] for x, used in zip(self.inputs, self.used, strict=True)]
        output, lse = peers[0][:2]
        offsets = [torch.tensor(cu, dtype=torch.int32) for cu in (self.cu_q, self.cu_k)]
        options = AttentionOptions(**self.options)
        grad_output = self.grad_output[: self.used[0]]
        written = reference_backward(grad_output, *inputs, output, lse, *offsets, 0, 0, options)
        return [*peers, [output, lse, *written]]


def formula(*arguments):
    return _formula(*arguments)[:2]


def error(value, reference):
    finite = torch.isfinite(reference)
    assert torch.equal(finite, torch.isfinite(value))
    difference = (value.double() - reference)[finite].norm().item()
    return difference / max(reference[finite].norm().item(), value.numel() ** 0.5 * 1e-3, 1e-30)


def check(problem, lib, layout="tokens", threads=2):
    """Outputs and gradients at most twice as far from float64 as torch's own; the same for any number of threads.

    How much a sharp softmax amplifies rounding is the luck of a draw: where one is further off, it is the mean of four.
    """
    found = errors(problem, lib, layout, threads)
    if any(off > limit for off, limit in found.values()):
        draws = [found, *(errors(problem.again(), lib, layout, threads) for _ in range(3))]
        found = {name: tuple(sum(draw[name][i] for draw in draws) / 4 for i in range(2)) for name in found}
    for name, (off, limit) in found.items():
        assert off <= limit, f"{name}: {off:.3g}, by torch's own {limit:.3g} is allowed"


def errors(problem, lib, layout, threads):
    """By name the error of the output or gradient, and what torch's own errors allow."""
    call = problem.call(lib, layout)
    output, lse = call.forward(threads)
    assert torch.equal(output, call.forward(1, logsumexp=False)[0])
    grads = call.backward(problem.grad_output, output, lse, threads)
    assert all(map(torch.equal, grads, call.backward(problem.grad_output, output, lse, threads)))

    used_q = problem.used[0]
    assert not output[used_q:].any()
    assert bool((lse[..., used_q:] == float("-inf")).all())
    assert not any(grad[used:].any() for grad, used in zip(grads, problem.used, strict=True))
    exact = problem.reference(torch.float64, formula)
    peers = problem.peers()
    ours = [output[:used_q], lse[..., :used_q], *(x[:used] for x, used in zip(grads, problem.used, strict=True))]
    names = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")
    found = {}
    for i, (name, mine, right) in enumerate(zip(names, ours, exact, strict=True)):
        if mine.numel() == 0:
            continue
        limit = 2 * max(error(peer[i], right) for peer in peers)
        if mine.numel() <= 512:  # the rounding of one query's logsumexp may decide
            limit = max(limit, 4 * torch.finfo(mine.dtype).eps, 2e-6)
        found[name] = error(mine, right), limit
    return found


def dropout(p=0.1):
    return {
        "dropout_p": p,
        "seed": torch.tensor(random.randrange(-(2**63), 2**63)),
        "site": random.randrange(2**32),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["fused", "tokens", "heads"])
def test_ragged(lib, seed, dtype, layout):
    lengths = random.sample(RAGGED, len(RAGGED))
    check(Problem(lengths, lengths, 3, 64, dtype, tail=3), lib, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 24, 32, 40, 64, 80, 96, 128])
def test_head_dim(lib, seed, dtype, head_dim):
    lengths = [random.randrange(1, 90) for _ in range(2)]
    check(Problem(lengths, lengths, 2, head_dim, dtype, **dropout(random.choice([0.0, 0.2]))), lib, "fused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long(lib, seed, dtype):
    """Several runs of keys, several groups of queries; one head for several threads."""
    check(Problem([511], [511], 1, 64, dtype), lib, threads=3)
    check(Problem([300, 13], [555, 258], 1, 32, dtype, **dropout()), lib, threads=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1e-12])
def test_dropout(lib, seed, dtype, p):
    """One wrong bit of the mask shows as an error far beyond rounding."""
    lengths = [17, 1, 130, 65]
    check(Problem(lengths, lengths[::-1], 3, 16, dtype, **dropout(p)), lib)


def bias_of(dtype, batch, heads, queries, keys, forbidden):
    bias = torch.randn(batch, heads, queries, keys).to(dtype)
    return bias.masked_fill(torch.rand(bias.shape) < forbidden, float("-inf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_bias(lib, seed, dtype, causal):
    queries, keys = [40, 1, 77, 0, 15], [35, 70, 77, 4, 0]
    for bias_dtype in DTYPES:
        for batch, heads in [(1, 1), (5, 2), (5, 1), (1, 2)]:
            bias = bias_of(bias_dtype, batch, heads, 77, 80, random.choice([0.0, 0.4]))
            bias[-1, -1, 3] = float("-inf")  # a query that may attend to nothing
            options = dropout(random.choice([0.0, 0.3]))
            check(Problem(queries, keys, 2, 24, dtype, tail=1, causal=causal, bias=bias, **options), lib)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_bias_backward_has_the_scores_of_forward(lib, seed, dtype):
    """To the last bit: of a large score a rounding is much. Of a query's only key exp(score - largest) is 1 then."""
    queries, keys = torch.arange(140), torch.randperm(140)
    bias = torch.full((1, 1, 140, 140), float("-inf"))
    for size in (1.0, 1e6):
        bias[0, 0, queries, keys] = size * torch.randn(140)
        problem = Problem([140], [140], 2, random.choice([16, 40, 64, 128]), dtype, spread=3.0, bias=bias)
        call = problem.call(lib)
        grad_value = call.backward(problem.grad_output, *call.forward())[2]
        assert torch.equal(grad_value[keys].flatten(1), problem.grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal(lib, seed, dtype):
    lengths = [1, 66, 300, 0, 31]
    check(Problem(lengths, lengths, 2, 64, dtype, causal=True), lib, "fused", threads=3)
    check(Problem([1, 20, 80, 0, 9], lengths, 2, 16, dtype, causal=True, **dropout()), lib)
    check(Problem([300], [33], 1, 16, dtype, causal=True), lib, threads=3)  # most queries see nothing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(lib, seed, dtype):
    """Scores that are large, of either sign, or all the same."""
    for scale, spread in [(0.3, 4.0), (-0.2, 1.0), (0.0, 1.0)]:
        check(Problem([70, 5], [70, 300], 2, 32, dtype, scale=scale, spread=spread), lib)
    problem = Problem([40], [40], 1, 16, dtype, scale=1.0, spread=100.0)
    output, lse = problem.call(lib).forward()
    exact = problem.reference(torch.float64, formula)
    assert error(output, exact[0]) < 4e-3
    assert error(lse, exact[1]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_forbidden_leaks(lib, seed, dtype):
    """Keys that no query may attend to have gradient zero exactly, and NaN in one row stays in that row."""
    bias = torch.zeros(1, 1, 50, 60)
    bias[..., 7] = float("-inf")
    problem = Problem([50], [60], 2, 16, dtype, bias=bias)
    call = problem.call(lib)
    _, grad_key, grad_value = call.backward(problem.grad_output, *call.forward())
    assert not grad_key[7].any()
    assert not grad_value[7].any()

    problem = Problem([20, 20], [20, 20], 1, 16, dtype)
    problem.inputs[1][25] = float("nan")
    call = problem.call(lib)
    output, lse = call.forward(2)
    grads = call.backward(problem.grad_output, output, lse, 2)
    for x in (output, lse.t(), *grads):
        assert not x[:20].isnan().any()
        assert bool(x[20:].isnan().any())


def rounded(x, levels, dim):
    """x in steps of its largest magnitude along dim over `levels`."""
    step = x.abs().amax(dim, keepdim=True) / levels
    return torch.where(step > 0, (x / step).round() * step, 0.0)


def quantized_formula(problem):
    """What `quantized` promises (attention.h), in float64 but for what is rounded on purpose."""
    bias, rows = problem.options.get("bias"), []
    for r in range(len(problem.cu_q) - 1):
        starts = [problem.cu_q[r : r + 2], *[problem.cu_k[r : r + 2]] * 2]
        q, k, v = (x[i:j].double().transpose(0, 1) for x, (i, j) in zip(problem.inputs, starts, strict=True))
        queries, keys = q.shape[1], k.shape[1]
        if keys == 0 or queries == 0:
            rows.append(torch.zeros(queries, problem.width, dtype=torch.float64))
            continue
        k = rounded(k - k.mean(1, keepdim=True), 127, 2)
        scores = rounded(q, 127, 2) @ k.transpose(1, 2) * problem.options["scale"]
        if bias is not None:
            scores = scores + bias.double()[r % bias.shape[0], :, :queries, :keys]
        if problem.options.get("causal"):
            forbidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
            scores = scores.masked_fill(forbidden, float("-inf"))
        top = scores.amax(2, keepdim=True)
        p = (scores - torch.where(top.isfinite(), top, 0.0)).exp()
        total = p.sum(2, keepdim=True)
        output = p @ rounded(v, 1023, 1) / torch.where(total > 0, total, 1.0)
        rows.append(output.transpose(0, 1).flatten(1))
    return torch.cat(rows) if rows else torch.zeros(0, problem.width, dtype=torch.float64)


def check_quantized(problem, lib, layout="fused", limit=4e-3, rounding=5e-4):
    """limit: against attention without rounding. rounding: what that of the probabilities and a tie may change."""
    problem.options["quantized"] = 1
    call = problem.call(lib, layout)
    output = call.forward(2, logsumexp=False)[0]
    assert torch.equal(output, call.forward(1, logsumexp=False)[0])
    del problem.options["quantized"]
    used = problem.used[0]
    assert not output[used:].any()
    exact = problem.reference(torch.float64, formula)[0]
    assert error(output[:used], exact) < max(limit, 2 * torch.finfo(problem.dtype).eps)
    if b"vnni" in lib.albert_isa():
        bound = rounding if problem.dtype == torch.float32 else 4e-3
        assert error(output[:used], quantized_formula(problem)) < bound
    else:
        assert torch.equal(output, problem.call(lib, layout).forward(2, logsumexp=False)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized(lib, seed, dtype):
    lengths = random.sample(RAGGED, len(RAGGED))
    for layout in ("fused", "tokens", "heads"):
        check_quantized(Problem(lengths, lengths, 3, 64, dtype, tail=3), lib, layout, 1e-2)
    for head_dim in (1, 7, 24, 64, 80, 128):
        # So many that what is left by chance, where values cancel out or there are few, does not decide.
        lengths, heads = [random.randrange(1, 90), random.randrange(60, 90)], max(2, 32 // head_dim)
        check_quantized(Problem(lengths, lengths, heads, head_dim, dtype), lib, limit=3e-2)
    check_quantized(Problem([300, 13], [555, 258], 2, 32, dtype), lib, "tokens", 1e-2)  # several runs of keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_masks(lib, seed, dtype):
    queries, keys = [40, 1, 77, 0, 15], [35, 70, 77, 4, 0]
    for bias_dtype in DTYPES:
        for batch, heads in [(1, 1), (5, 2)]:
            bias = bias_of(bias_dtype, batch, heads, 77, 80, 0.4)
            bias[-1, -1, 3] = float("-inf")  # a query that may attend to nothing
            for causal in (0, 1):
                problem = Problem(queries, keys, 2, 24, dtype, tail=1, bias=bias, causal=causal)
                check_quantized(problem, lib, "tokens", 2e-2)
    check_quantized(Problem([300], [33], 1, 16, dtype, causal=1), lib, "tokens", 2e-2)


def test_quantized_long_tail(lib, seed):
    """Many small probabilities beside a large one, which 8 bits would lose: their sum is half of the output."""
    query, key = torch.zeros(500, 1, 16), torch.zeros(500, 1, 16)
    query[..., 0] = 1.0
    key[..., 0] = 0.3 * torch.randn(500, 1)
    key[0, 0, 0] = 6.2  # exp(6.2) = 493 times as probable as the others on average
    problem = Problem([500], [500], 1, 16, torch.float32, scale=1.0)
    problem.inputs = (query, key, problem.inputs[2] + 1.0)
    check_quantized(problem, lib, "tokens", 1e-2, rounding=3e-3)


def test_quantized_extremes(lib, seed):
    """Keys that share a large part, zeros, the largest sums of integers, and NaN that stays in its row."""
    problem = Problem([90], [90], 2, 64, torch.float32)
    problem.inputs[1].add_(100 * torch.randn(2, 64))  # of which the softmax sees nothing, float32's mean some
    check_quantized(problem, lib, limit=1e-2, rounding=3e-3)
    problem = Problem([300], [300], 1, 64, torch.float32)
    problem.inputs[0].zero_()
    problem.inputs[2].fill_(3.0)
    check_quantized(problem, lib, limit=1e-3)
    problem.inputs[2].zero_()
    check_quantized(problem, lib, limit=1e-3)
    for i in range(3):
        problem = Problem([20, 20], [20, 20], 1, 16, torch.float32)
        problem.inputs[i][25] = random.choice([float("nan"), float("inf")])
        problem.options["quantized"] = 1
        output = problem.call(lib).forward(2, logsumexp=False)[0]
        assert bool(output[:20].isfinite().all())
        assert not output[20:].isfinite().all()


def test_empty(lib):
    for lengths_q, lengths_k in [([], []), ([0], [0]), ([0, 0], [3, 0]), ([5, 0], [0, 0])]:
        for tail in (0, 2):
            check(Problem(lengths_q, lengths_k, 2, 16, torch.float32, tail=tail), lib)


def test_errors(lib):
    problem = Problem([4, 3], [4, 3], 2, 16, torch.float32)
    call = problem.call(lib)
    out = g.Guarded(7, 32, torch.float32)
    offsets = [g.guarded(torch.tensor([x], dtype=torch.int32)) for x in ([0, 4, 8], [1, 4, 7], [0, 5, 4], [0, 4, 7])]
    call.args.output, call.args.output_stride, call.args.cu_seqlens_q = out.address, out.stride, offsets[3].address
    size = lib.albert_attention_workspace_bytes(call.args, 1)
    workspace = g.aligned(size + 64)

    def code(size=size, shift=0, **changes):
        before = {name: getattr(call.args, name) for name in changes}
        for name, value in changes.items():
            setattr(call.args, name, value)
        result = lib.albert_attention(call.args, workspace.address + shift, size, None)
        for name, value in before.items():
            setattr(call.args, name, value)
        return result

    assert code(size=size - 1) == g.SMALL_WORKSPACE
    assert code(shift=4) == g.UNALIGNED
    bad = [{"cu_seqlens_q": x.address} for x in offsets[:3]]
    bad += [{"cu_seqlens_k": None}, {"dtype": g.U8}, {"head_dim": 0}, {"head_dim": 129}, {"heads": -1}, {"batch": -1}]
    bad += [{"dropout_p": 1.0}, {"dropout_p": -0.1}, {"dropout_p": float("nan")}, {"output_stride": 31}]
    bad += [{"quantized": 1, "dropout_p": 0.1}, {"quantized": 1, "logsumexp": out.address}]
    bad += [{"key_token_stride": -1}, {"tokens_k": 6}, {"bias": out.address, "bias_dtype": g.INT8}]
    for changes in bad:
        assert code(**changes) == g.BAD_ARGUMENT, changes
    gradients = a.Gradients(grad_output=out.address, grad_output_stride=32)
    size = lib.albert_attention_backward_workspace_bytes(call.args, 1)
    workspace = g.aligned(size)
    backward = [call.args, gradients, workspace.address, size, None]
    assert lib.albert_attention_backward(*backward) == g.BAD_ARGUMENT  # no logsumexp
    call.args.logsumexp = out.address
    assert lib.albert_attention_backward(*backward) == g.BAD_ARGUMENT  # gradients without strides
    assert bool((out.inside == g.CANARY).all())
    assert code() == 0
