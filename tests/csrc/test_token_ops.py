"""csrc/cpu: LayerNorm with its residual and dropout, activations and embeddings, against the references in float64."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gemm_library as g
import token_library as t
from token_library import DTYPES, assert_close, call, empty, one_torch_thread, token_library, vector  # noqa: F401

from albert_fast.ops.bias_gelu import bias_gelu_reference
from albert_fast.ops.dropout import keep_mask, token_coordinates
from albert_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm_reference
from albert_fast.ops.embed_layer_norm import embed_layer_norm_reference

pytestmark = t.needs_compiler
EPS = 1e-12
NAN = float("nan")


@pytest.fixture(params=["", "avx2"], ids=lambda isa: isa or "best")
def lib(request, token_library, monkeypatch):  # noqa: F811
    return t.with_isa(token_library, request.param, monkeypatch)


class Rows:
    """Packed rows, one of them empty, `beyond` tokens of no row, and a dropout."""

    def __init__(self, lengths: tuple[int, ...], dropout_p: float = 0.0, beyond: int = 0):
        self.dropout_p, self.site = dropout_p, random.choice([0, 7, 2**32 - 1])
        self.seed = torch.randint(-(2**63), 2**63 - 1, ())
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        self.used = sum(lengths)
        self.tokens = self.used + beyond
        self.buffer = vector(self.cu_seqlens)

    def c(self, cu_seqlens: bool = True) -> t.Dropout:
        rows = self.buffer.address if cu_seqlens else None
        seed = int(self.seed) % 2**64
        return t.Dropout(self.dropout_p, seed, self.site, rows, len(self.cu_seqlens) - 1)

    def options(self) -> dict[str, Any]:
        """Of a reference, for the tokens in use."""
        return {
            "eps": EPS,
            "dropout_p": self.dropout_p,
            "seed": self.seed,
            "site": self.site,
            "cu_seqlens": self.cu_seqlens,
        }


def gradients(function, tensors: dict[str, Tensor], upstream: Tensor, dtype: torch.dtype | None = None):
    """The output, and by name the gradient of each floating-point tensor, computed in `dtype` or as they are."""
    leaves = {
        name: (x.to(dtype) if dtype else x).detach().clone().requires_grad_() if x.is_floating_point() else x
        for name, x in tensors.items()
    }
    output = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), upstream.to(output.dtype), allow_unused=True)
    return {"output": output.detach()} | dict(zip(wanted, grads, strict=True))


def plus(start: Tensor, oracle: Tensor, peer: Tensor) -> tuple[Tensor, Tensor]:
    """What a gradient that is added to `start` should be, and what it is with PyTorch's."""
    return start.double() + oracle, start + peer.float()


# -------------------------------------------------------------------------------------------------- LayerNorm

F32, BF16 = torch.float32, torch.bfloat16
PAIRS = {"float32": (F32, F32), "x bfloat16": (BF16, F32), "residual bfloat16": (F32, BF16), "bfloat16": (BF16, BF16)}
SHAPES = [((1,), 1, 0), ((3, 0, 1, 15), 5, 2), ((17, 0, 63), 130, 1), ((127, 33), 768, 3), ((5,), 1027, 0)]


class NormCase:
    def __init__(self, rows: Rows, n: int, pair: str):
        self.rows, self.n = rows, n
        x_dtype, residual_dtype = PAIRS[pair]
        self.wide = torch.promote_types(x_dtype, residual_dtype)
        self.tensors = {
            "x": torch.randn(rows.tokens, n).to(x_dtype),
            "bias": torch.randn(n),
            "residual": (torch.randn(rows.tokens, n) + 2).to(residual_dtype),
            "weight": torch.rand(n) + 0.5,
            "ln_bias": torch.randn(n),
        }
        for name in ("x", "residual"):  # of no row, and not to be looked at
            self.tensors[name][rows.used :] = NAN
        self.grad_y = torch.randn(rows.tokens, n).to(self.wide)
        self.grad_y[rows.used :] = NAN
        self.evaluate()

    def evaluate(self) -> None:
        rows = self.rows
        used = {name: x[: rows.used] if x.dim() == 2 else x for name, x in self.tensors.items()}
        arguments = (lambda **leaves: dropout_add_layer_norm_reference(**leaves, **rows.options()), used)
        self.oracle = gradients(*arguments, self.grad_y[: rows.used], torch.float64)
        self.peer = gradients(*arguments, self.grad_y[: rows.used])

    def args(self, gap: int, names: tuple[str, ...]) -> tuple[t.LayerNormArgs, dict[str, g.Guarded]]:
        buffers = {
            name: g.guarded(x, self.n + gap) if x.dim() == 2 else vector(x)
            for name, x in (self.tensors | {"grad_y": self.grad_y}).items()
            if name in names
        }
        x_dtype, residual_dtype = (g.CODES[self.tensors[name].dtype] for name in ("x", "residual"))
        args = t.LayerNormArgs(
            m=self.rows.tokens, n=self.n, x_dtype=x_dtype, residual_dtype=residual_dtype, eps=EPS, dropout=self.rows.c()
        )
        return args, buffers

    def outputs(self, gap: int, kept: bool) -> dict[str, g.Guarded]:
        out = {name: empty(self.rows.tokens, self.n, self.wide, gap) for name in ("y", "pre_norm")[: 1 + kept]}
        return out | ({name: empty(1, self.rows.tokens, F32) for name in ("mean", "rstd")} if kept else {})

    def forward(self, lib, threads=1, gap=0, kept=True):
        args, buffers = self.args(gap, ("x", "bias", "residual", "weight", "ln_bias"))
        buffers |= self.outputs(gap, kept)
        t.fill(args, buffers)
        return call(lib, "albert_dropout_add_layer_norm", args, buffers, threads)

    def backward(self, lib, keep: dict[str, Tensor], threads=1, gap=0, without: tuple[str, ...] = ()):
        """keep: pre_norm, mean and rstd as forward stored them, or some of them."""
        inputs = ("x", "bias", "residual") if "pre_norm" not in keep else ()
        args, buffers = self.args(gap, ("weight", "grad_y", *inputs))
        for name, value in keep.items():
            buffers[name] = g.guarded(value, self.n + gap) if name == "pre_norm" else g.guarded(value)
        for name in ("residual", "x"):
            buffers[f"grad_{name}"] = empty(self.rows.tokens, self.n, self.tensors[name].dtype, gap)
        self.start = {f"grad_{name}": torch.randn(self.n) for name in ("weight", "ln_bias", "bias")}
        buffers |= {name: vector(value) for name, value in self.start.items()}
        t.fill(args, {name: buffer for name, buffer in buffers.items() if name not in without})
        return call(lib, "albert_layer_norm_backward", args, buffers, threads)

    def check_gradients(self, actual: dict[str, Tensor], what: str) -> None:
        used = self.rows.used
        for name in ("x", "residual"):
            assert not actual[f"grad_{name}"][used:].any()
            assert_close(actual[f"grad_{name}"][:used], self.oracle[name], self.peer[name], f"{what}: {name}")
        for name in ("weight", "ln_bias", "bias"):
            expected, peer = plus(self.start[f"grad_{name}"], self.oracle[name], self.peer[name])
            assert_close(actual[f"grad_{name}"][0], expected, peer, f"{what}: {name}", self.wide)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("pair", PAIRS)
def test_layer_norm(lib, pair, dropout_p):
    for lengths, n, beyond in SHAPES:
        rows = Rows(lengths, dropout_p, beyond)
        case = NormCase(rows, n, pair)
        what = f"{lengths} x {n}"
        out = case.forward(lib, threads=2, gap=3)
        assert_close(out["y"][: rows.used], case.oracle["output"], case.peer["output"], what)
        for name in ("y", "pre_norm"):
            assert not out[name][rows.used :].any()
        total = out["pre_norm"][: rows.used].double()
        assert_close(out["mean"][0, : rows.used], total.mean(1), total.float().mean(1), what)
        if n > 1:
            rstd = total.var(1, correction=0).add(EPS).rsqrt()
            assert_close(out["rstd"][0, : rows.used] / rstd, torch.ones_like(rstd), torch.ones_like(rstd), what, F32)
        assert not out["mean"][0, rows.used :].any()
        alone = case.forward(lib, kept=False)
        assert torch.equal(alone["y"], out["y"])

        kept = {name: out[name] for name in ("pre_norm", "mean", "rstd")}
        backward = case.backward(lib, kept, threads=2, gap=1)
        if n > 1:  # a row of one column has a variance of zero
            case.check_gradients(backward, what)
        for threads, keep in ((1, kept), (3, {"pre_norm": kept["pre_norm"]}), (2, {}), (1, {})):
            again = case.backward(lib, keep, threads)
            if n > 1:
                case.check_gradients(again, f"{what}, {list(keep)}")
            same = keep == kept
            for name in ("grad_x", "grad_residual") if same else ():
                assert torch.equal(again[name], backward[name])


def test_layer_norm_backward_is_the_same_for_any_number_of_threads(lib):
    case = NormCase(Rows((300, 0, 211), 0.1), 192, "bfloat16")
    results = []
    for threads in (1, 2, 5):
        torch.manual_seed(3)  # of what the sums are added to
        results.append(case.backward(lib, {}, threads))
    for name in ("grad_x", "grad_residual", "grad_weight", "grad_ln_bias", "grad_bias"):
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.equal(results[0][name], results[2][name]), name


def test_layer_norm_backward_in_part(lib):
    case = NormCase(Rows((9,), 0.2), 33, "float32")
    whole = case.backward(lib, {})
    for name in ("grad_x", "grad_residual", "grad_weight", "grad_ln_bias", "grad_bias"):
        part = case.backward(lib, {}, without=(name,))
        for other in {"grad_x", "grad_residual"} - {name}:
            assert torch.equal(part[other], whole[other])


def test_layer_norm_in_place(lib):
    """y may be residual or x, and the gradients grad_y."""
    case = NormCase(Rows((9, 30), 0.2), 65, "bfloat16")
    expected = case.forward(lib)["y"]
    for name in ("x", "residual"):
        args, buffers = case.args(2, ("x", "bias", "residual", "weight", "ln_bias"))
        t.fill(args, buffers | {"y": buffers[name]})
        assert torch.equal(call(lib, "albert_dropout_add_layer_norm", args, buffers, 2)[name], expected)
    expected = case.backward(lib, {})
    for name in ("grad_x", "grad_residual"):
        args, buffers = case.args(2, ("x", "bias", "residual", "weight", "grad_y"))
        t.fill(args, buffers | {name: buffers["grad_y"]})
        assert torch.equal(call(lib, "albert_layer_norm_backward", args, buffers, 2)["grad_y"], expected[name])


def test_a_large_mean_does_not_swallow_the_variance(lib):
    case = NormCase(Rows((33,)), 128, "float32")
    case.tensors["residual"] += 3000
    case.evaluate()
    out = case.forward(lib)
    assert_close(out["y"], case.oracle["output"], case.peer["output"], "y")
    case.check_gradients(case.backward(lib, {}), "again")
    case.check_gradients(case.backward(lib, {name: out[name] for name in ("pre_norm", "mean", "rstd")}), "kept")


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999, 1e-4, 1e-12, 1 - 1e-12])
def test_the_mask_bit_for_bit(lib, dropout_p):
    """The sum is the factor itself where x is 1 and residual is 0."""
    rows = Rows((3, 0, 70), dropout_p)
    n = random.choice([1, 63, 66, 259])
    case = NormCase(rows, n, "float32")
    case.tensors["x"].fill_(1.0)
    for name in ("residual", "bias"):
        case.tensors[name].zero_()
    row, position = token_coordinates(rows.cu_seqlens, rows.tokens, torch.device("cpu"))
    keep = keep_mask(rows.seed, rows.site, row, position, n, dropout_p)
    expected = keep.float() * (1.0 / (1.0 - dropout_p))
    assert torch.equal(case.forward(lib, threads=2)["pre_norm"], expected)
    case.grad_y = torch.randn_like(case.grad_y)
    out = case.backward(lib, {}, threads=2)
    assert torch.equal(out["grad_x"], out["grad_residual"] * expected)
    rows.cu_seqlens = torch.tensor([0, rows.tokens]).int()
    rows.buffer = vector(rows.cu_seqlens)
    with_one_row = case.forward(lib)["pre_norm"]
    args, buffers = case.args(0, ("x", "bias", "residual", "weight", "ln_bias"))
    args.dropout = rows.c(cu_seqlens=False)
    buffers |= case.outputs(0, True)
    t.fill(args, buffers)
    assert torch.equal(call(lib, "albert_dropout_add_layer_norm", args, buffers)["pre_norm"], with_one_row)


# -------------------------------------------------------------------------------------------------- activations

FORMS = {"tanh": g.GELU_TANH, "none": g.GELU_ERF, "relu": g.RELU}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_bias_gelu(lib, form, dtype):
    dtype = DTYPES[dtype]
    for m, n in [(1, 1), (3, 5), (70, 33), (129, 256), (17, 3072)]:
        x, bias, grad_y = (2 * torch.randn(m, n)).to(dtype), torch.randn(n), torch.randn(m, n).to(dtype)
        x[0, 0], bias[0] = -0.5, 0.5  # where relu has its corner
        arguments = (lambda **leaves: bias_gelu_reference(**leaves, approximate=form), {"x": x, "bias": bias}, grad_y)
        oracle = gradients(*arguments, torch.float64)
        peer = gradients(arguments[0], {"x": x, "bias": bias.to(dtype)}, grad_y)
        start, results = torch.randn(n), []
        for threads, gap in ((2, 3), (1, 0)):
            args = t.BiasGeluArgs(m=m, n=n, dtype=g.CODES[dtype], activation=FORMS[form])
            buffers = {"x": g.guarded(x, n + gap), "bias": vector(bias), "y": empty(m, n, dtype, gap)}
            t.fill(args, buffers)
            y = call(lib, "albert_bias_gelu", args, buffers, threads)["y"]
            del buffers["y"]
            buffers |= {"grad_y": g.guarded(grad_y, n + gap), "grad_x": empty(m, n, dtype, gap)}
            buffers["grad_bias"] = vector(start)
            t.fill(args, buffers)
            out = call(lib, "albert_bias_gelu_backward", args, buffers, threads)
            results.append((y, out["grad_x"], out["grad_bias"]))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True)), (m, n)
        y, grad_x, grad_bias = results[0]
        assert_close(y, oracle["output"], peer["output"], f"y {m} x {n}")
        assert_close(grad_x, oracle["x"], peer["x"], f"grad_x {m} x {n}")
        assert_close(grad_bias[0], *plus(start, oracle["bias"], peer["bias"]), f"grad_bias {m} x {n}", dtype)


# -------------------------------------------------------------------------------------------------- embeddings

WORDS, POSITIONS, TYPES = 50, 300, 3


class EmbedCase:
    def __init__(self, rows: Rows, size: int, dtype: torch.dtype, ids: torch.dtype, embeds: bool, padding_idx=None):
        self.rows, self.size, self.dtype, self.ids = rows, size, dtype, ids
        used = rows.used
        self.padding_idx = padding_idx
        self.tensors = {
            "inputs": torch.randn(used, size).to(dtype) if embeds else torch.randint(WORDS, (used,)).to(ids),
            "position_ids": torch.randint(POSITIONS, (used,)).to(ids),
            "token_type_ids": torch.randint(TYPES, (used,)).to(torch.int32 if ids == torch.int64 else torch.int64),
        }
        shapes = {"word": (WORDS, size), "position": (POSITIONS, size), "token_type": (TYPES, size)}
        self.tensors |= {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
        self.tensors |= {"weight": torch.randn(size).to(dtype), "bias": torch.randn(size).to(dtype)}
        self.grad_y = torch.randn(used, size).to(dtype)
        self.options = rows.options() | {"padding_idx": padding_idx}

    def results(self, dtype=None):
        function = lambda **leaves: embed_layer_norm_reference(**leaves, **self.options)  # noqa: E731
        return gradients(function, self.tensors, self.grad_y, dtype)

    def call(self, lib, name: str, threads: int, gap: int):
        tokens, size = self.rows.tokens, self.size
        args = t.EmbedArgs(tokens=tokens, size=size, dtype=g.CODES[self.dtype], eps=EPS, dropout=self.rows.c())
        args.padding_idx = -1 if self.padding_idx is None else self.padding_idx
        buffers: dict[str, g.Guarded] = {}
        backward = name.endswith("backward")

        def padded(x: Tensor) -> Tensor:
            """With tokens of no row, whose ids are beyond any table."""
            nonsense = NAN if x.is_floating_point() else random.choice([-1, 2**31 - 1])
            return torch.cat([x, x.new_full((tokens - len(x), *x.shape[1:]), nonsense)])

        embeds = self.tensors["inputs"].is_floating_point()
        if embeds:
            buffers["inputs"] = g.guarded(padded(self.tensors["inputs"]), size + gap)
        for kind, ids in (("word", "inputs"), ("position", "position_ids"), ("token_type", "token_type_ids")):
            e, table = getattr(args, kind), self.tensors[kind]
            if kind == "word" and embeds:
                continue
            own = {"ids": vector(padded(self.tensors[ids])), "table": g.guarded(table, size + gap)}
            e.id_bytes, e.rows, e.stride = self.tensors[ids].dtype.itemsize, len(table), size + gap
            if backward:
                self.start[kind] = torch.randn(table.shape)
                own["gradient"] = g.guarded(self.start[kind], size + gap)
            t.fill(e, own)
            buffers |= {f"{kind} {part}": buffer for part, buffer in own.items()}
        vectors = {"weight": vector(self.tensors["weight"].float()), "bias": vector(self.tensors["bias"].float())}
        if backward:
            buffers |= {"weight": vectors["weight"], "grad_y": g.guarded(padded(self.grad_y), size + gap)}
            self.start |= {part: torch.randn(size) for part in ("weight", "bias")}
            buffers |= {f"grad_{part}": vector(self.start[part]) for part in ("weight", "bias")}
            if embeds:
                buffers["grad_inputs"] = empty(tokens, size, self.dtype, gap)
        else:
            buffers |= vectors | {"y": empty(tokens, size, self.dtype, gap)}
        t.fill(args, {part: buffer for part, buffer in buffers.items() if " " not in part})
        return call(lib, name, args, buffers, threads)

    def forward(self, lib, threads=1, gap=0) -> Tensor:
        return self.call(lib, "albert_embed_layer_norm", threads, gap)["y"]

    def backward(self, lib, threads=1, gap=0) -> dict[str, Tensor]:
        """By the references' names; what the sums were added to is taken off, and added again for comparisons."""
        self.start: dict[str, Tensor] = {}
        torch.manual_seed(5)
        out = self.call(lib, "albert_embed_layer_norm_backward", threads, gap)
        out = {name.removesuffix(" gradient"): x for name, x in out.items() if name.endswith("gradient")} | {
            name.removeprefix("grad_"): x for name, x in out.items() if name.startswith("grad_") and name != "grad_y"
        }
        return {name: x[0] if name in ("weight", "bias") else x for name, x in out.items()}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_embed_layer_norm(lib, embeds, dtype, dropout_p):
    shapes = [((1,), 8, 0), ((3, 0, 15), 33, 2), ((127, 60), 128, 1)]
    for (lengths, size, beyond), ids in zip(shapes, itertools.cycle([torch.int64, torch.int32])):
        rows = Rows(lengths, dropout_p, beyond)
        case = EmbedCase(rows, size, DTYPES[dtype], ids, embeds, random.choice([None, 0, 7]))
        what = f"{lengths} x {size}"
        oracle, peer = case.results(torch.float64), case.results()
        y = case.forward(lib, 2, gap=3)
        assert torch.equal(y, case.forward(lib))
        assert not y[rows.used :].any()
        assert_close(y[: rows.used], oracle["output"], peer["output"], what)

        grads = case.backward(lib, 1, gap=1)
        for threads in (2, 5, 23):
            assert all(torch.equal(x, grads[name]) for name, x in case.backward(lib, threads).items())
        if embeds:
            inputs = grads.pop("inputs")
            assert not inputs[rows.used :].any()
            assert_close(inputs[: rows.used], oracle["inputs"], peer["inputs"], f"inputs {what}")
        for name, gradient in grads.items():
            assert_close(gradient, *plus(case.start[name], oracle[name], peer[name]), f"{name} {what}", case.dtype)
        if not embeds and case.padding_idx is not None:
            assert torch.equal(grads["word"][case.padding_idx], case.start["word"][case.padding_idx])


# -------------------------------------------------------------------------------------------------- the rest


def test_nothing_to_do(lib):
    for tokens, n in ((0, 7), (4, 0)):
        case = NormCase(Rows((tokens,)), max(n, 1), "float32")
        case.n = n
        case.tensors = {name: x[..., :n] for name, x in case.tensors.items()}
        case.grad_y = case.grad_y[:, :n]
        assert case.forward(lib)["y"].shape == (tokens, n)
        out = case.backward(lib, {})
        assert all(torch.equal(out[name][0], start) for name, start in case.start.items())


def test_errors(lib):
    case = NormCase(Rows((4,), 0.1), 40, "float32")
    args, buffers = case.args(0, ("x", "bias", "residual", "weight", "ln_bias", "grad_y"))
    buffers |= case.outputs(0, True)
    buffers["grad_x"] = empty(4, 40, F32)
    t.fill(args, buffers)

    def forward(**changes) -> int:
        changed = t.LayerNormArgs.from_buffer_copy(args)
        for name, value in changes.items():
            target = changed.dropout if hasattr(t.Dropout, name) else changed
            setattr(target, name, value)
        return lib.albert_dropout_add_layer_norm(changed, None)

    falling, long, late = (vector(torch.tensor(x).int()) for x in ([0, 3, 2], [0, 2, 5], [1, 2, 4]))
    for changes in (
        {"m": -1},
        {"n": 41},
        {"x_dtype": g.INT8},
        {"residual_dtype": 9},
        {"y_stride": 39},
        {"mean": None},
        {"p": 1.0},
        {"p": -0.1},
        {"p": NAN},
        *({"cu_seqlens": offsets.address, "batch": 2} for offsets in (falling, long, late)),
    ):
        assert forward(**changes) == g.BAD_ARGUMENT, changes
    assert lib.albert_dropout_add_layer_norm(None, None) == g.BAD_ARGUMENT
    size = lib.albert_layer_norm_backward_workspace_bytes(args, 1)
    workspace = g.aligned(size + 64)
    assert lib.albert_layer_norm_backward(args, workspace.address, size - 1, None) == g.SMALL_WORKSPACE
    assert lib.albert_layer_norm_backward(args, workspace.address + 4, size, None) == g.UNALIGNED
    for name in ("y", "pre_norm", "grad_x"):
        assert bool(buffers[name].tensor.isnan().all()), "written in spite of the error"
    assert forward() == 0

    gelu = t.BiasGeluArgs(m=1, n=1, activation=g.TANH)
    assert lib.albert_bias_gelu(gelu, None) == g.BAD_ARGUMENT

    embed = EmbedCase(Rows((3,)), 8, F32, torch.int64, False)
    for name in ("inputs", "position_ids", "token_type_ids"):
        for wrong in (-1, 300):
            right = embed.tensors[name]
            embed.tensors[name] = torch.full_like(right, wrong)
            with pytest.raises(AssertionError):
                embed.forward(lib)
            embed.tensors[name] = right
    embed.forward(lib)
