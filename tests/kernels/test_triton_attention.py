"""The kernels of attention beyond what tests/ops asks of every backend: how rows are cut into tiles, and memory that is
given."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ops.parity import assert_all_close, offsets, random_seed, relative_error
from torch import Tensor

from albert_fast import triton_backend
from albert_fast.kernels import attention_backward as backward_module
from albert_fast.kernels import attention_forward as forward_module
from albert_fast.kernels.attention_backward import attention_backward
from albert_fast.kernels.attention_forward import attention
from albert_fast.kernels.attention_tile import first_beyond, row_range, slots, tile_of, tiles
from albert_fast.ops.attention import AttentionOptions, reference_backward, reference_forward
from albert_fast.ops.dropout import keep_mask


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cpu" if triton_backend.interpreted() else "cuda")


class Case:
    """Inputs of both functions, with NaN in the tokens of no row, as views of wider tensors."""

    def __init__(
        self,
        lengths_q: list[int],
        lengths_k: list[int] | None = None,
        *,
        device: torch.device,
        heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        beyond: int = 0,
        slack: int = 0,
        biased: bool = False,
        **options: Any,
    ) -> None:
        lengths_k = lengths_q if lengths_k is None else lengths_k
        self.cu_q, self.cu_k = offsets(lengths_q, device), offsets(lengths_k, device)
        self.max_q, self.max_k = max(lengths_q) + slack, max(lengths_k) + slack
        counts = [sum(lengths_q), sum(lengths_k), sum(lengths_k), sum(lengths_q)]
        wide = [torch.randn(n + beyond, 3, heads, head_dim, device=device).to(dtype) for n in counts]
        for tensor, n in zip(wide, counts, strict=True):
            tensor[n:] = float("nan")
        self.query, self.key, self.value, grad = (tensor[:, 1] for tensor in wide)
        self.grad_output = grad.flatten(1)
        if biased:
            bias = torch.randn(1, heads, self.max_q, self.max_k, device=device)
            options["bias"] = bias.masked_fill(torch.rand_like(bias) < 0.3, float("-inf"))
        if options.get("dropout_p"):
            options |= {"seed": random_seed(device), "site": random.randrange(50)}
        self.options = AttentionOptions(**{"scale": head_dim**-0.5, **options})

    @property
    def rows(self) -> tuple[Any, ...]:
        return self.cu_q, self.cu_k, self.max_q, self.max_k, self.options

    def run(self, **given: Any) -> dict[str, Tensor]:
        tensors = self.query, self.key, self.value
        output, logsumexp = attention(*tensors, *self.rows)
        grads = attention_backward(self.grad_output, *tensors, output, logsumexp, *self.rows, **given)
        return named(output, logsumexp, *grads)

    def expected(self) -> dict[str, Tensor]:
        """By the reference in float64."""
        tensors = self.query.double(), self.key.double(), self.value.double()
        output, logsumexp = reference_forward(*tensors, *self.rows)
        grads = reference_backward(self.grad_output.double(), *tensors, output, logsumexp, *self.rows)
        return named(output, logsumexp, *grads)

    def check(self, tolerance: float = 2e-6) -> None:
        assert_all_close(self.run(), self.expected(), tolerance)


def named(output: Tensor, logsumexp: Tensor, *grads: Tensor) -> dict[str, Tensor]:
    no_key = logsumexp == float("-inf")
    names = ("output", "logsumexp", "no key", "query", "key", "value")
    return dict(zip(names, (output, logsumexp.masked_fill(no_key, 0.0), no_key, *grads), strict=True))


@pytest.fixture
def small_tiles(monkeypatch):
    """Of queries and keys; not the same in all kernels."""
    for module, name, block_m, block_n in (
        (forward_module, "FORWARD_TILES", 16, 32),
        (backward_module, "GRAD_QUERY_TILES", 16, 16),
        (backward_module, "GRAD_KEY_VALUE_TILES", 32, 16),
    ):
        cut = [(block_m, block_n, 4, 1)]
        small = tiles((block_m, block_n), sm_80=cut, sm_90=cut, sm_100=cut, single=cut)
        monkeypatch.setattr(module, name, dict.fromkeys(getattr(module, name), small))
    monkeypatch.setattr(backward_module, "WHOLE_ROWS_TILES", {})


# ------------------------------------------------------------------------------------------------------ rows and tiles


@triton.jit
def _tiles_of_slots(found, cu_seqlens, tokens, batch, max_seqlen, step, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * step
    row, tile = tile_of(cu_seqlens, slot, tokens, batch, max_seqlen, BLOCK)
    _, length = row_range(cu_seqlens, row, tokens, batch, max_seqlen)
    found += tl.program_id(0) * 4
    tl.store(found, row)
    tl.store(found + 1, tile)
    tl.store(found + 2, length - tile * BLOCK)
    tl.store(found + 3, first_beyond(cu_seqlens, slot, tokens, batch, BLOCK))


@pytest.mark.parametrize("kind", ["long", "short", "one", "none"])
def test_every_tile_has_one_slot(kind, device):
    block = 16
    lengths = {
        "long": random.choices([0, 1, 15, 16, 17, 40, 150], k=6),
        "short": random.choices([15, 16], k=6),
        "one": [random.randint(0, 50)],
        "none": [],
    }[kind]
    beyond, cu_seqlens = random.randint(0, 40), offsets(lengths, device)
    tokens = sum(lengths) + beyond
    for max_seqlen in (max(lengths, default=0), max(lengths, default=0) + 100):
        count = slots(tokens, len(lengths), max_seqlen, block)
        found = torch.empty(count, 4, dtype=torch.int32, device=device)
        if count:
            _tiles_of_slots[(count,)](found, cu_seqlens, tokens, len(lengths), max_seqlen, 1, BLOCK=block)
        served = [(row, tile) for row, tile, left, _ in found.tolist() if left > 0]
        assert sorted(served) == [(row, tile) for row, n in enumerate(lengths) for tile in range(triton.cdiv(n, block))]
        zeroed = sum(min(block, tokens - first) for *_, first in found.tolist() if first < tokens)
        assert zeroed == beyond


def test_many_rows(device):
    """More than are looked through at once."""
    lengths = random.choices([0, 1, 3, 20, 70], k=1300)
    cu_seqlens = offsets(lengths, device)
    tokens = sum(lengths)
    step = slots(tokens, len(lengths), 70, 16) // 12
    found = torch.empty(12, 4, dtype=torch.int32, device=device)
    _tiles_of_slots[(12,)](found, cu_seqlens, tokens, len(lengths), 70, step, BLOCK=16)
    begins = [begin // 16 + row for row, begin in enumerate(cu_seqlens.tolist()[:-1])]
    for index, (row, tile, *_) in enumerate(found.tolist()):
        assert begins[row] + tile == index * step
        assert row == len(lengths) - 1 or index * step < begins[row + 1]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "everything": {"causal": True, "biased": True, "dropout_p": 0.2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("slack", [0, 200])
def test_several_tiles(variant, slack, device, small_tiles):
    """With a tight bound on the lengths each row has as many slots; with a loose one they are searched."""
    Case([33, 0, 50], [50, 3, 35], device=device, beyond=19, slack=slack, **VARIANTS[variant]).check()


@pytest.mark.parametrize("head_dim", [1, 24, 80])
def test_head_sizes(head_dim, device):
    Case([9, 20], [9, 3], head_dim=head_dim, device=device).check()


@pytest.mark.parametrize("scale", [0.0, -0.6])
def test_scales(scale, device):
    """Causal: the first queries see no key of their row."""
    Case([9, 20], [7, 25], device=device, scale=scale, causal=True).check()


# What is not stored may be infinite.
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("whole", [True, False])
def test_scores_far_below_zero(whole, device, monkeypatch):
    """exp(-logsumexp) is infinite: what stands beyond a row must not meet it."""
    if not whole:
        monkeypatch.setattr(backward_module, "WHOLE_ROWS_TILES", {})
    case = Case([20, 70], [20, 9], device=device, dtype=torch.float16, scale=0.5)
    case.query, case.key = case.query * 0.1 + 5.0, case.key * 0.1 - 5.0
    # The keys are so much alike that little is left of their sum, weighted with numbers whose sum is 0.
    assert_all_close(case.run(), case.expected(), 0.1)


# ------------------------------------------------------------------------------------------------------ two strategies


@pytest.mark.parametrize("longest", [40, 100])
@pytest.mark.parametrize("variant", ["plain", "causal", "dropout"])
def test_whole_rows_give_what_tiles_give(longest, variant, device, monkeypatch):
    """In one program with 5 products, and in two kernels with 7."""
    options = {"dropout_p": 0.3} if variant == "dropout" else VARIANTS[variant]
    case = Case(
        [longest, 0, 70, 5], [longest, 6, 33, 0], head_dim=32, dtype=torch.float16, beyond=3, device=device, **options
    )
    expected = case.expected()
    whole = case.run()
    monkeypatch.setattr(backward_module, "WHOLE_ROWS_TILES", {})
    for results in (whole, case.run()):
        assert_all_close(results, expected, 1e-3)
    assert not torch.equal(whole["query"], torch.zeros_like(whole["query"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_twice_the_same_bits(dtype, device):
    case = Case([70, 9], dtype=dtype, device=device, dropout_p=0.1)
    once, again = case.run(), case.run()
    assert all(torch.equal(once[name], again[name]) for name in once)


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("whole", [True, False])
def test_masks_are_those_of_the_reference(whole, device, monkeypatch, request):
    """Bit by bit: with unit vectors as values the output shows the probabilities, and with unit vectors as the
    gradient of the output that of the values does."""
    if not whole:
        request.getfixturevalue("small_tiles")
    lengths, heads, size = [21, 0, 32], 2, 32
    dtype = torch.float16 if whole else torch.float32
    case = Case(lengths, heads=heads, head_dim=size, dtype=dtype, device=device, dropout_p=0.4)
    unit = torch.eye(size, device=device, dtype=dtype)
    case.value = torch.cat([unit[:n] for n in lengths])[:, None].expand(-1, heads, -1)
    case.grad_output = case.value.flatten(1)
    results = case.run()
    for row, (begin, end) in enumerate(pairwise(case.cu_q.tolist())):
        n = end - begin
        for head in range(heads):
            positions = torch.arange(n, device=device)
            outer = torch.full_like(positions, row * heads + head)
            keep = keep_mask(case.options.seed, case.options.site, outer, positions, n, 0.4)
            output = results["output"][begin:end].unflatten(1, (heads, size))[:, head, :n]
            assert torch.equal(output != 0.0, keep)
            assert torch.equal(results["value"][begin:end, head, :n] != 0.0, keep.t())


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_that_is_given(device):
    """Gradients into views of one tensor, output and logsumexp into slices: what is beside them stays."""
    case = Case([30, 7], heads=2, beyond=4, device=device, dtype=torch.float16)
    tokens, width = case.query.shape[0], 32
    context, logsumexps = torch.full((tokens, 2 * width), 7.0), torch.full((3, 2, tokens), 7.0)
    context, logsumexps = context.to(device, torch.float16), logsumexps.to(device)
    tensors = case.query, case.key, case.value
    output, logsumexp = attention(*tensors, *case.rows, out=context[:, :width], logsumexp=logsumexps[1])
    assert output.data_ptr() == context.data_ptr()
    assert logsumexp.data_ptr() == logsumexps[1].data_ptr()
    grad = torch.full((tokens, 4, 2, 16), 7.0).to(device, torch.float16)
    grads = attention_backward(
        case.grad_output, *tensors, output, logsumexp, *case.rows, grads=(grad[:, 0], grad[:, 1], grad[:, 2])
    )
    expected = case.run()
    assert all(torch.equal(result, expected[name]) for name, result in named(output, logsumexp, *grads).items())
    assert (context[:, width:] == 7.0).all()
    assert (logsumexps[::2] == 7.0).all()
    assert (grad[:, 3] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_offsets_that_are_none_stay_inside(dtype, device, monkeypatch):
    """Nobody looks at their values on a GPU: results mean nothing then, but what is beside them stays."""
    monkeypatch.setattr("interpreter_checks.CHECKS_ORDER", False)  # sequences overlap
    case = Case([30, 7, 12], device=device, dtype=dtype, slack=30)
    tokens = case.query.shape[0]
    guarded = torch.full((5, tokens + 200, 1, 16), 7.0).to(device, dtype)
    inside = guarded[:, 100 : 100 + tokens]
    case.cu_q, case.cu_k = (
        torch.tensor(cu, dtype=torch.int32, device=device) for cu in ([3, 900, -50, 60], [0, -7, 400, 33])
    )
    tensors = case.query, case.key, case.value
    output, logsumexp = attention(*tensors, *case.rows, out=inside[0].flatten(1))
    attention_backward(case.grad_output, *tensors, output, logsumexp, *case.rows, grads=tuple(inside[1:4]))
    assert (guarded[:, :100] == 7.0).all()
    assert (guarded[:, 100 + tokens :] == 7.0).all()


def test_the_error_in_half_precision_is_that_of_rounding(device):
    case = Case([100, 128], head_dim=64, dtype=torch.float16, device=device)
    results, expected = case.run(), case.expected()
    for name in ("output", "query", "key", "value"):
        assert relative_error(results[name], expected[name]) < 2**-10
