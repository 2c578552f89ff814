"""csrc/cpu's recorder of steps: what it writes, where it stops, and that results do not know of it."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import attention_library as a
import gemm_library as g
import token_library as t
from token_library import one_torch_thread, token_library  # noqa: F401

pytestmark = t.needs_compiler

KINDS = (
    *("product", "weight gradient", "attention", "attention backward", "LayerNorm", "LayerNorm backward"),
    *("activation", "activation backward", "embeddings", "embeddings backward", "loss", "loss backward"),
)
KIND, PASS, BEGIN, END, SIZES, OPERATIONS = 0, 1, 2, 3, slice(4, 7), 7
CANARY = 0x5A5A5A5A


@pytest.fixture
def lib(token_library):  # noqa: F811
    if token_library.albert_isa() == b"none":
        pytest.skip("no AVX2")
    for name, result, arguments in (
        ("albert_trace_begin", c_int, [c_void_p, c_int64]),
        ("albert_trace_end", c_int64, []),
        ("albert_span_name", c_char_p, [c_int64]),
    ):
        function = getattr(token_library, name)
        function.restype, function.argtypes = result, arguments
    return token_library


def room(spans: int) -> g.Guarded:
    """Memory of that many spans, against a page that may not be touched."""
    return g.Guarded(spans, 8, torch.int64).fill(CANARY)


def gelu(lib: ctypes.CDLL, x: Tensor, threads: int = 1) -> Tensor:
    args = t.BiasGeluArgs(m=x.shape[0], n=x.shape[1], dtype=g.F32, activation=g.GELU_TANH)
    buffers = {"x": g.guarded(x), "y": t.empty(*x.shape, torch.float32)}
    t.fill(args, buffers)
    return t.call(lib, "albert_bias_gelu", args, buffers, threads)["y"]


def product(lib: ctypes.CDLL, x: Tensor, weight: Tensor) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    packed = g.aligned(lib.albert_packed_bytes(g.F32, n, k))
    assert lib.albert_pack(g.F32, g.F32, weight.data_ptr(), k, 1, n, k, packed.address, None) == 0
    y = t.empty(m, n, torch.float32)
    args = g.Args(m=m, x_dtype=g.F32, y_dtype=g.F32, weight=packed.address, x_stride=k, y_stride=n)
    args.x, args.y = x.data_ptr(), y.address
    size = lib.albert_gemm_workspace_bytes(args, 1)
    assert lib.albert_gemm(args, g.aligned(size).address, size, None) == 0
    return y.tensor.clone()


def weight_gradient(lib: ctypes.CDLL, grad: Tensor, x: Tensor) -> Tensor:
    (m, n), k = grad.shape, x.shape[1]
    out = torch.zeros(n, k)
    size = lib.albert_weight_gradient_workspace_bytes(g.F32, m, n, k)
    workspace = g.aligned(size)
    pointers = (grad.data_ptr(), n, x.data_ptr(), k, out.data_ptr(), k, None, workspace.address, size, None)
    assert lib.albert_weight_gradient(g.F32, m, n, k, *pointers) == 0
    return out


def layer_norm(lib: ctypes.CDLL, x: Tensor) -> Tensor:
    (m, n), y = x.shape, torch.empty_like(x)
    ones = torch.ones(n)
    arguments = (m, n, ones.data_ptr(), ones.data_ptr(), 1e-12, None, None, None)
    assert lib.albert_layer_norm(g.F32, x.data_ptr(), n, g.F32, y.data_ptr(), n, *arguments) == 0
    return y


def loss(lib: ctypes.CDLL, x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    args = t.LossArgs(dtype=g.F32, tokens=len(x), size=x.shape[1], vocabulary=len(table), ignore_index=-100)
    buffers = {"x": g.guarded(x), "table": g.guarded(table), "labels": t.vector(labels)}
    buffers["loss"] = t.empty(1, len(x), torch.float32)
    t.fill(args, buffers)
    return t.call(lib, "albert_masked_lm_loss", args, buffers, 1)["loss"]


def test_names(lib):
    assert tuple(lib.albert_span_name(kind).decode() for kind in range(len(KINDS))) == KINDS
    assert lib.albert_span_name(len(KINDS)) is None
    assert lib.albert_span_name(-1) is None


def test_what_is_recorded(lib):
    """Kinds, sizes, operations and times in order; the same bits as without."""
    m, n, k, words = (int(size) for size in torch.randint(1, 40, (4,)))
    x, grad, weight, table = (torch.randn(shape) for shape in ((m, k), (m, n), (n, k), (words, k)))
    labels = torch.randint(words, (m,)).masked_fill(torch.rand(m) < 0.5, -100)

    def everything() -> list[Tensor]:
        return [
            product(lib, x, weight),
            weight_gradient(lib, grad, x),
            layer_norm(lib, x),
            gelu(lib, x, threads=2),
            loss(lib, x, table, labels),
        ]

    without = everything()
    spans = room(9)
    before = time.perf_counter_ns()
    assert lib.albert_trace_begin(spans.address, 9) == 0
    results = everything()
    count = lib.albert_trace_end()
    after = time.perf_counter_ns()
    assert all(map(torch.equal, results, without))
    assert count == 5
    rows = spans.tensor.tolist()
    assert rows[5:] == [[CANARY] * 8] * 4
    rows = rows[:5]
    names = [KINDS[row[KIND]] for row in rows]
    assert names == ["product", "weight gradient", "LayerNorm", "activation", "loss"]
    assert [row[SIZES] for row in rows] == [[m, n, k], [m, n, k], [m, k, 0], [m, k, 0], [m, words, k]]
    labelled = int((labels != -100).sum())
    assert [row[OPERATIONS] for row in rows] == [2 * m * n * k, 2 * m * n * k, 0, 0, 2 * labelled * words * k]
    assert [row[PASS] for row in rows] == [-1] * 5
    times = [time for row in rows for time in (row[BEGIN], row[END])]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= after
    everything()
    assert lib.albert_trace_end() == 0, "it is off"
    assert spans.tensor.tolist()[:5] == rows


def test_attention_counts_the_pairs_of_its_rows(lib):
    library = a.load(Path(lib._name))
    offsets = [0, 3, 3, 10, 11]
    heads, head_dim = 2, 8
    tensors = tuple(torch.randn(12, heads, head_dim) for _ in range(3))
    problem = a.Call(library, tensors, offsets, offsets, scale=1.0)
    spans = room(2)
    assert lib.albert_trace_begin(spans.address, 2) == 0
    results = problem.forward()
    problem.backward(torch.randn(12, heads * head_dim), *results)
    assert lib.albert_trace_end() == 2
    forward, backward = spans.tensor.tolist()
    assert [KINDS[row[KIND]] for row in (forward, backward)] == ["attention", "attention backward"]
    assert forward[SIZES] == backward[SIZES] == [12, heads, head_dim]
    pairs = 9 + 0 + 49 + 1
    assert (forward[OPERATIONS], backward[OPERATIONS]) == tuple(times * pairs * heads * head_dim for times in (4, 8))


def test_no_more_than_there_is_room_for(lib):
    """The page behind the last span may not be touched; the steps that were too many are counted."""
    spans = room(2)
    assert lib.albert_trace_begin(spans.address, 2) == 0
    x = torch.randn(3, 4)
    results = [gelu(lib, x) for _ in range(5)]
    assert lib.albert_trace_end() == 5
    assert all(torch.equal(result, results[0]) for result in results)
    assert (spans.tensor[:, END] >= spans.tensor[:, BEGIN]).all()
    spans.check()


def test_a_thread_has_one_recorder_and_sees_itself_alone(lib):
    x = torch.randn(5, 6)
    mine, theirs = room(8), room(8)
    counts = {}

    def work(name: str, spans: g.Guarded, calls: int) -> None:
        assert lib.albert_trace_begin(spans.address, 8) == 0
        both.wait()
        for _ in range(calls):
            gelu(lib, x, threads=2)
        both.wait()
        counts[name] = lib.albert_trace_end()

    both = threading.Barrier(2)
    other = threading.Thread(target=work, args=("theirs", theirs, 5))
    other.start()
    work("mine", mine, 3)
    other.join()
    assert counts == {"mine": 3, "theirs": 5}
    for spans, count in ((mine, 3), (theirs, 5)):
        assert (spans.tensor[:count, KIND] == KINDS.index("activation")).all()
        assert (spans.tensor[count:] == CANARY).all()


def test_errors(lib):
    spans = room(1)
    assert lib.albert_trace_end() == 0
    assert lib.albert_trace_begin(None, 1) == g.BAD_ARGUMENT
    assert lib.albert_trace_begin(spans.address, -1) == g.BAD_ARGUMENT
    assert lib.albert_trace_begin(spans.address, 1) == 0
    assert lib.albert_trace_begin(room(1).address, 1) == g.BAD_ARGUMENT
    gelu(lib, torch.randn(2, 3))
    assert lib.albert_trace_end() == 1
    assert spans.tensor[0, KIND] == KINDS.index("activation"), "the first recorder went on"
    assert lib.albert_trace_begin(spans.address, 0) == 0
    gelu(lib, torch.randn(2, 3))
    assert lib.albert_trace_end() == 1
