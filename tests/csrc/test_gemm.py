"""csrc/cpu: matrix products against float64, on every instruction set that this machine has."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
import gemm_library as g

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)

ISAS = ["", "avx512_base", "avx2"]
ACTIVATIONS = {
    g.NONE: lambda x: x,
    g.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    g.GELU_ERF: F.gelu,
    g.RELU: F.relu,
    g.TANH: torch.tanh,
}
DTYPES = {g.F32: torch.float32, g.BF16: torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    """torch's spinning threads would slow every other test process on the machine down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    g.build(base / "gemm")
    return base / "gemm"


@pytest.fixture(scope="session")
def library(folder):
    return g.load(folder / "libgemm.so")


@pytest.fixture(params=ISAS, ids=lambda isa: isa or "best")
def lib(request, library, monkeypatch):
    best = library.albert_isa().decode()
    if best == "none":
        pytest.skip("no AVX2")
    if request.param:
        monkeypatch.setenv("ALBERT_FAST_ISA", request.param)
        if library.albert_isa().decode() == best:
            pytest.skip(f"the machine has no more than {best}")
    return library


@pytest.fixture
def seed(request):
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")  # pytest shows it where the test fails
    torch.manual_seed(value)
    random.seed(value)
    return value


def error(value, reference):
    scale = reference.double().norm().item()
    if value.numel() <= 256:  # a few elements of order one may cancel
        scale = max(scale, value.numel() ** 0.5)
    return (value.double() - reference.double()).norm().item() / (scale if scale else 1.0)


def assert_close(value, reference, peer, what="", inputs=None):
    """At most twice the error of torch's own kernel, and never held to less than the output's own rounding, nor, over
    a few elements, to the luck of a draw. inputs: the dtype that both round x to, where it is not the output's."""
    ours, theirs = error(value, reference), error(peer, reference)
    floor = 0.25 * torch.finfo(value.dtype).eps
    if value.numel() <= 256:
        floor = torch.finfo(inputs or value.dtype).eps * 4
    assert ours <= max(2 * theirs, floor), f"{what}: {ours:.3g}, torch {theirs:.3g}"


def pack(lib, dtype, weight, threads=1):
    n, k = weight.shape
    source = weight.contiguous() if 0 in weight.shape else weight
    packed = g.aligned(lib.albert_packed_bytes(dtype, n, k))
    row, column = source.stride()
    par = g.parallel(threads)
    code = lib.albert_pack(dtype, g.CODES[weight.dtype], source.data_ptr(), row, column, n, k, packed.address, par)
    assert code == 0
    packed.check()
    return packed


def gemm(lib, x, packed, n, *, threads=1, y_dtype=torch.float32, gap=0, **options):
    """Calls albert_gemm with guarded copies of every operand; outputs are named in options by an empty string."""
    m = x.shape[0]
    args = g.Args(m=m, x_dtype=g.CODES[x.dtype], y_dtype=g.CODES[y_dtype], weight=packed.address)
    buffers = {"x": g.guarded(x, x.shape[1] + gap)}
    buffers["y"] = g.Guarded(m, n, y_dtype, n + gap).fill(float("nan"))
    for name, value in options.items():
        statistics = name in ("ln_mean", "ln_rstd")
        if isinstance(value, torch.Tensor):
            buffers[name] = g.guarded(value, n + gap) if value.dim() == 2 else g.guarded(value[None])
        elif value == "" and statistics:
            buffers[name] = g.Guarded(1, m, torch.float32).fill(float("nan"))
        elif value == "":
            buffers[name] = g.Guarded(m, n, y_dtype, n + gap).fill(float("nan"))
        elif value is not None:
            setattr(args, name, value)
    fields = dict(g.Args._fields_)
    for name, buffer in buffers.items():
        setattr(args, name, buffer.address)
        if name + "_stride" in fields:
            setattr(args, name + "_stride", buffer.stride)
    par = g.parallel(threads)
    size = lib.albert_gemm_workspace_bytes(args, threads)
    workspace = g.aligned(size).fill(0xFF)  # NaN whatever it is read as
    code = lib.albert_gemm(args, workspace.address, size, par)
    assert code == 0
    for buffer in (*buffers.values(), workspace):
        buffer.check()
    outputs = ["y", *(name for name, value in options.items() if isinstance(value, str))]
    results = {name: buffers[name].tensor.clone() for name in outputs}
    return results if len(results) > 1 else results["y"]


def quantized_weight(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.round(weight * (1 / scale)).double() * scale.double()


def quantize_rows(lib, x, threads=1):
    m, k = x.shape
    source, u8 = g.guarded(x), g.Guarded(m, k, torch.uint8, k + 3)
    scale, zero = g.Guarded(1, m, torch.float32), g.Guarded(1, m, torch.int32)
    code = lib.albert_quantize_rows(
        g.CODES[x.dtype],
        source.address,
        k,
        m,
        k,
        u8.address,
        u8.stride,
        scale.address,
        zero.address,
        g.parallel(threads),
    )
    assert code == 0
    for buffer in (u8, scale, zero):
        buffer.check()
    return u8.tensor.clone(), scale.tensor[0].clone(), zero.tensor[0].clone()


RAGGED = [(1, 1, 1), (1, 70, 33), (2, 33, 129), (15, 31, 17), (17, 96, 64), (63, 65, 300), (127, 48, 65)]
FEW_ROWS = [(2, 197, 73), (4, 143, 119), (5, 65, 130), (3, 87, 176), (5, 120, 300)]  # where MKL's sums are short
ALBERT = [(1, 768, 768), (16, 2304, 768), (33, 768, 3072), (29, 257, 770), (130, 768, 128), (61, 128, 768)]
LONG = [(31, 70, 10000), (5, 33, 8300)]  # panels that would fill L2: every kind of unit goes by slice by slice


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [g.F32, g.BF16])
def test_product(lib, seed, dtype, x_dtype):
    shapes = RAGGED + FEW_ROWS + ALBERT + LONG + [tuple(random.randint(1, 200) for _ in range(3)) for _ in range(3)]
    for m, n, k in shapes:
        weight = (torch.randn(n, k) / k**0.5).to(DTYPES[dtype])
        x, bias = torch.randn(m, k).to(x_dtype), torch.randn(n)
        packed = pack(lib, dtype, weight, threads=2)
        reference = x.double() @ weight.double().T + bias.double()
        common = torch.float32 if dtype == g.F32 and x_dtype == torch.float32 else torch.bfloat16
        peer = F.linear(x.to(common), weight.to(common), bias.to(common))
        for y_dtype in (torch.float32, torch.bfloat16):
            one = gemm(lib, x, packed, n, y_dtype=y_dtype, bias=bias, gap=3)
            two = gemm(lib, x, packed, n, y_dtype=y_dtype, bias=bias, threads=2)
            assert torch.equal(one, two), (m, n, k)
            assert torch.equal(one[-1:], gemm(lib, x[-1:], packed, n, y_dtype=y_dtype, bias=bias)), "one row alone"
            assert_close(one, reference, peer.to(y_dtype), f"{m} x {n} x {k}", common)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8(lib, seed, x_dtype):
    for m, n, k in [*RAGGED, *LONG, (16, 768, 768), (33, 128, 3072)]:
        weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n)
        x = (torch.randn(m, k) + 0.3).to(x_dtype)
        packed = pack(lib, g.INT8, weight)
        u8, scale, zero = quantize_rows(lib, x, threads=2)
        rows = (u8.double() - zero[:, None]) * scale[:, None].double()
        assert bool(((rows - x.double()).abs() <= 0.51 * scale[:, None]).all())
        # The integers are exact, so all that is left is the rounding of the scales.
        exact = rows @ quantized_weight(weight).T + bias.double()
        y = gemm(lib, x, packed, n, bias=bias, gap=1)
        assert error(y, exact) < 5e-7, (m, n, k)
        assert torch.equal(y, gemm(lib, x, packed, n, bias=bias, threads=2))
        assert torch.equal(y, gemm(lib, u8, packed, n, bias=bias, threads=2, x_scale=scale, x_zero=zero))
        half = gemm(lib, x, packed, n, bias=bias, y_dtype=torch.bfloat16)
        assert error(half, exact) < 4e-3


def test_int8_extremes(lib):
    """The largest products of each sign do not saturate."""
    k = 3072
    x = torch.ones(3, k)
    x[1] = -1
    x[2, ::2] = -1
    weight = torch.ones(4, k)
    weight[1] = -1
    weight[2, 1::2] = -1
    weight[3] = 0
    u8, scale, zero = quantize_rows(lib, x)
    reference = (u8.double() - zero[:, None]) * scale[:, None].double() @ weight.double().T
    assert error(gemm(lib, x, pack(lib, g.INT8, weight), 4), reference) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_epilogue(lib, seed, activation, y_dtype):
    dtype = g.F32 if y_dtype == torch.float32 else g.BF16
    function = ACTIVATIONS[activation]
    for m, n, k in [(1, 5, 40), (16, 70, 64), (131, 67, 130)]:
        weight, x = (torch.randn(n, k) / k**0.5).to(y_dtype), torch.randn(m, k).to(y_dtype)
        bias, residual = torch.randn(n).to(y_dtype), torch.randn(m, n).to(y_dtype)
        packed = pack(lib, dtype, weight)
        options = {"bias": bias.float(), "y_dtype": y_dtype, "activation": activation, "gap": 5}

        pre = x.double() @ weight.double().T + bias.double()
        reference = function(pre) + residual.double()
        peer_pre = F.linear(x, weight, bias)
        out = gemm(lib, x, packed, n, threads=2, pre_activation="", residual=residual, **options)
        assert_close(out["pre_activation"], pre, peer_pre, "pre_activation")
        assert_close(out["y"], reference, function(peer_pre) + residual, "y")
        plain = gemm(lib, x, packed, n, **options)
        assert_close(plain, function(pre), function(peer_pre), "without residual")

        if activation == g.NONE:
            continue
        # Backward: (x . weight^T) times the activation's derivative at a stored input.
        stored = (2 * torch.randn(m, n)).to(y_dtype)

        def gradient(point, direction):
            point = point.clone().requires_grad_()
            return torch.autograd.grad(function(point), point, direction)[0]

        options["bias"] = None
        reference = gradient(stored.double(), x.double() @ weight.double().T)
        peer = gradient(stored, F.linear(x, weight))
        out = gemm(lib, x, packed, n, activation_input=stored, **options)
        assert_close(out, reference, peer, "backward")


def test_residual_in_place(lib, seed):
    m, n, k = 37, 45, 64
    weight, x, y = torch.randn(n, k), torch.randn(m, k), torch.randn(m, n)
    packed = pack(lib, g.F32, weight)
    args = g.Args(m=m, weight=packed.address, x_stride=k, y_stride=n, residual_stride=n)
    source, out = g.guarded(x), g.guarded(y)
    args.x, args.y, args.residual = source.address, out.address, out.address
    size = lib.albert_gemm_workspace_bytes(args, 1)
    assert lib.albert_gemm(args, g.aligned(size).address, size, None) == 0
    out.check()
    assert_close(out.tensor, x.double() @ weight.double().T + y.double(), x @ weight.T + y)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_epilogue(lib, seed, y_dtype):
    dtype = g.F32 if y_dtype == torch.float32 else g.BF16
    for m, n, k in [(1, 5, 40), (3, 768, 64), (200, 70, 33), (40, 768, 3072)]:
        weight, x = (torch.randn(n, k) / k**0.5).to(y_dtype), torch.randn(m, k).to(y_dtype)
        bias, residual = torch.randn(n).to(y_dtype), (torch.randn(m, n) + 3).to(y_dtype)
        ln_weight, ln_bias = torch.rand(n) + 0.5, torch.randn(n)
        packed = pack(lib, dtype, weight)
        total = x.double() @ weight.double().T + bias.double() + residual.double()
        reference = F.layer_norm(total, (n,), ln_weight.double(), ln_bias.double(), 1e-12)
        peer_total = F.linear(x, weight, bias) + residual
        peer = F.layer_norm(peer_total, (n,), ln_weight.to(y_dtype), ln_bias.to(y_dtype), 1e-12)
        options = {"bias": bias.float(), "residual": residual, "y_dtype": y_dtype, "gap": 2}
        options |= {"ln_weight": ln_weight, "ln_bias": ln_bias, "ln_eps": 1e-12}
        out = gemm(lib, x, packed, n, threads=2, pre_norm="", ln_mean="", ln_rstd="", **options)
        assert_close(out["y"], reference, peer, "y")
        assert_close(out["pre_norm"], total, peer_total, "pre_norm")
        assert error(out["ln_mean"][0], total.mean(1)) < 1e-5
        assert error(out["ln_rstd"][0], total.var(1, correction=0).add(1e-12).rsqrt()) < 1e-5
        assert torch.equal(out["y"], gemm(lib, x, packed, n, **options))


@pytest.mark.parametrize("dtype", [g.F32, g.BF16])
def test_weight_gradient(lib, seed, dtype):
    shapes = [(1, 1, 1), (2, 17, 33), (31, 15, 70), (515, 70, 48), (1025, 45, 129), (2051, 30, 31), (64, 768, 128)]
    shapes.append(tuple(random.randint(30, 150) for _ in range(3)))
    for m, n, k in shapes:
        grad_output, x = torch.randn(m, n).to(DTYPES[dtype]), torch.randn(m, k).to(DTYPES[dtype])
        start, bias_start = torch.randn(n, k), torch.randn(n)
        reference = start.double() + grad_output.double().T @ x.double()
        bias_reference = bias_start.double() + grad_output.double().sum(0)
        results = []
        for threads, gap in ((1, 5), (2, 0)):
            a, b = g.guarded(grad_output, n + gap), g.guarded(x, k + gap)
            out, bias = g.guarded(start, k + gap), g.guarded(bias_start[None])
            size = lib.albert_weight_gradient_workspace_bytes(dtype, m, n, k)
            workspace = g.aligned(size).fill(0xFF)
            code = lib.albert_weight_gradient(
                dtype, m, n, k, a.address, a.stride, b.address, b.stride, out.address, out.stride, bias.address,
                workspace.address, size, g.parallel(threads),
            )  # fmt: skip
            assert code == 0
            for buffer in (a, b, out, bias, workspace):
                buffer.check()
            results.append((out.tensor.clone(), bias.tensor[0].clone()))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True)), (m, n, k)
        gradient, bias = results[0]
        assert_close(gradient, reference, start + (grad_output.T @ x).float(), f"{m} x {n} x {k}")
        assert_close(bias, bias_reference, bias_start + grad_output.sum(0).float(), f"bias {m} x {n}")


@pytest.mark.parametrize("dtype", [g.F32, g.BF16, g.INT8])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_pack_transposed(lib, seed, dtype, source):
    """Packed from the transpose or from any strides, the same bytes as from a contiguous copy."""
    for n, k in [(1, 1), (45, 70), (130, 37), (64, 128)]:
        weight = torch.randn(k, n).to(source)
        columns = torch.randn(n, 2 * k).to(source)
        for view in (weight.T, columns[:, ::2]):
            one, two = pack(lib, dtype, view, threads=2), pack(lib, dtype, view.contiguous())
            assert torch.equal(one.tensor, two.tensor)


def test_quantize_rows_special(lib):
    x = torch.zeros(5, 37)
    x[1, 3] = float("nan")
    x[2, 36] = float("inf")
    x[3] = torch.linspace(1, 2, 37)
    x[4] = 1e-44
    u8, scale, zero = quantize_rows(lib, x)
    assert bool((u8[0] == zero[0]).all())
    assert scale[0] == 0
    assert bool(scale[1:3].isnan().all())
    assert zero[3] == 0  # the range of a positive row starts at 0
    assert error((u8[3].double() - zero[3]) * scale[3].double(), x[3].double()) < 3e-3
    assert bool((u8[4] == zero[4]).all())


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm(lib, seed, x_dtype, y_dtype):
    for m, n in [(1, 1), (7, 5), (33, 768), (3, 131)]:
        x = (torch.randn(m, n) + 20).to(x_dtype)
        weight, bias = torch.randn(n), torch.randn(n)
        source, out = g.guarded(x, n + 1), g.Guarded(m, n, y_dtype, n + 2).fill(float("nan"))
        w, b = g.guarded(weight[None]), g.guarded(bias[None])
        mean, rstd = g.Guarded(1, m, torch.float32), g.Guarded(1, m, torch.float32)
        code = lib.albert_layer_norm(
            g.CODES[x_dtype], source.address, n + 1, g.CODES[y_dtype], out.address, n + 2, m, n, w.address, b.address,
            1e-5, mean.address, rstd.address, g.parallel(2),
        )  # fmt: skip
        assert code == 0
        for buffer in (source, out, mean, rstd):
            buffer.check()
        reference = F.layer_norm(x.double(), (n,), weight.double(), bias.double(), 1e-5)
        assert_close(out.tensor, reference, F.layer_norm(x.float(), (n,), weight, bias, 1e-5).to(y_dtype))
        assert error(mean.tensor[0], x.double().mean(1)) < 1e-6


def test_empty(lib):
    packed = pack(lib, g.F32, torch.randn(5, 3))
    assert gemm(lib, torch.randn(0, 3), packed, 5).shape == (0, 5)
    nothing = pack(lib, g.F32, torch.zeros(5, 0))
    bias = torch.randn(5)
    assert torch.equal(gemm(lib, torch.zeros(2, 0), nothing, 5, bias=bias), bias.expand(2, 5))
    assert gemm(lib, torch.randn(2, 3), pack(lib, g.F32, torch.zeros(0, 3)), 0).shape == (2, 0)


def test_errors(library, monkeypatch):
    if library.albert_isa() == b"none":
        pytest.skip("no AVX2")
    n, k = 40, 30
    packed, x = pack(library, g.F32, torch.randn(n, k)), g.guarded(torch.randn(4, k))
    y = g.Guarded(4, n, torch.float32)

    def call(size=None, address=None, **changes):
        args = g.Args(m=4, x=x.address, x_stride=k, weight=packed.address, y=y.address, y_stride=n)
        needed = library.albert_gemm_workspace_bytes(args, 1)
        for name, value in changes.items():
            setattr(args, name, value)
        workspace = g.aligned(needed)
        size = needed if size is None else size
        return library.albert_gemm(args, workspace.address + (address or 0), size, None)

    assert call(size=0) == g.SMALL_WORKSPACE
    assert call(address=4) == g.UNALIGNED
    assert call(m=-1) == g.BAD_ARGUMENT
    assert call(x_stride=k - 1) == g.BAD_ARGUMENT
    assert call(y_stride=n - 1) == g.BAD_ARGUMENT
    assert call(x_dtype=g.U8) == g.BAD_ARGUMENT
    assert call(y_dtype=7) == g.BAD_ARGUMENT
    assert call(activation=9) == g.BAD_ARGUMENT
    assert call(ln_weight=x.address) == g.BAD_ARGUMENT
    assert call(activation_input=x.address, activation_input_stride=n) == g.BAD_ARGUMENT
    assert call(weight=None) == g.BAD_WEIGHT
    assert call(weight=packed.address + 64) == g.BAD_WEIGHT
    if library.albert_isa() != b"avx2":
        monkeypatch.setenv("ALBERT_FAST_ISA", "avx2")
        assert call() == g.BAD_WEIGHT
        monkeypatch.delenv("ALBERT_FAST_ISA")
    assert bool((y.inside == g.CANARY).all())
    assert call() == 0


def test_concurrent_calls(lib, seed):
    """Calls from several threads, each with a workspace, do not disturb one another, nor the rounding mode."""
    m, n, k = 65, 300, 257
    packed = pack(lib, g.F32, torch.randn(n, k))
    inputs = [torch.randn(m, k) for _ in range(4)]
    alone = [gemm(lib, x, packed, n) for x in inputs]
    libm = ctypes.CDLL("libm.so.6")
    before = libm.fegetround()
    together = [None] * len(inputs)

    def work(i):
        together[i] = gemm(lib, inputs[i], packed, n, threads=2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert libm.fegetround() == before


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_math(folder, library, isa):
    if isa not in library.albert_isa().decode() and not (isa == "avx2" and library.albert_isa() != b"none"):
        pytest.skip(f"no {isa}")
    result = subprocess.run([str(folder / f"gemm_test_{isa}"), "math"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
