"""Attention for few tokens: against the reference in float64, and what one sequence may not do to another."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from ops.parity import assert_as_accurate_as, judged_over_draws, offsets, relative_error
from torch import Tensor

from albert_fast import backends
from albert_fast.kernels.few_tokens_attention import MOST_SEQUENCES, MOST_TOKENS, few_tokens_attention, serves
from albert_fast.ops.attention import AttentionOptions, reference_forward

parametrize_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


@pytest.fixture(autouse=True)
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float32
    reason = backends.refusal(backends.TRITON, backends.Call("attention", device, dtype, head_dim=16))
    if reason is not None:
        pytest.skip(reason)


class Case:
    def __init__(
        self,
        lengths: list[int],
        head_dim: int = 16,
        heads: int = 2,
        *,
        beyond: int = 0,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device,
    ) -> None:
        self.cu_seqlens, self.heads = offsets(lengths, device), heads
        self.longest, self.scale = max(lengths), head_dim**-0.5 if scale is None else scale
        self.qkv = torch.randn(sum(lengths) + beyond, 3 * heads * head_dim).to(device, dtype)

    def run(self) -> Tensor:
        assert serves(self.qkv, self.cu_seqlens, self.heads, AttentionOptions(scale=self.scale))
        context = self.qkv.new_empty(self.qkv.shape[0], self.qkv.shape[1] // 3)
        few_tokens_attention(self.qkv, self.cu_seqlens, self.heads, self.scale, context)
        return context

    def reference(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        rows = self.cu_seqlens, self.cu_seqlens, self.longest, self.longest
        return reference_forward(query, key, value, *rows, AttentionOptions(scale=self.scale))[0]

    def check(self) -> None:
        assert_as_accurate_as(self.run(), self.reference(self.qkv), self.reference(self.qkv.double()))


@parametrize_dtype
@pytest.mark.parametrize("head_dim", [10, 16, 40, 64, 128])
@judged_over_draws
def test_head_sizes(head_dim, dtype, device):
    Case([9, 0, 1, 10, 7], head_dim, beyond=5, dtype=dtype, device=device).check()


@parametrize_dtype
@pytest.mark.parametrize("lengths", [[1], [16], [17], [1] * 20, [0, 0, 40], [15, 1, 16, 17, 0], [5] * 12 + [0] * 51])
@judged_over_draws
def test_sequences(lengths, dtype, device):
    Case(lengths, dtype=dtype, device=device).check()


@pytest.mark.parametrize("lengths", [[256], [130, 70, 0, 1], [3] * 60])
@judged_over_draws
def test_more_than_a_hundred_tokens(lengths, device):
    Case(lengths, 40, dtype=torch.float16, device=device).check()


@judged_over_draws
def test_any_lengths(device):
    tokens, batch = random.randint(1, MOST_TOKENS), random.randint(1, MOST_SEQUENCES)
    cuts = sorted(random.randint(0, tokens) for _ in range(batch + 1))
    lengths = [end - start for start, end in zip([0, *cuts[:-1]], cuts, strict=True)][:MOST_SEQUENCES]
    Case(lengths, 24, 1, beyond=random.randint(0, tokens - sum(lengths)), dtype=torch.float16, device=device).check()


@pytest.mark.parametrize("scale", [0.0, -0.6])
def test_scales(scale, device):
    Case([9, 20], scale=scale, device=device).check()


def test_scores_far_apart(device):
    Case([9, 20], scale=50.0, dtype=torch.float16, device=device).check()


# The interpreter computes with what is then masked.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tokens_of_no_sequence_get_zeros(device):
    """Before the first offset, and beyond the last one, also where there is no sequence at all."""
    case = Case([4, 9], beyond=10, device=device)
    case.qkv[16:] = float("nan")
    assert (case.run()[13:] == 0.0).all()
    case.cu_seqlens += 3
    context = case.run()
    assert (context[:3] == 0.0).all()
    assert torch.isfinite(context[3:16]).all()
    case.cu_seqlens = case.cu_seqlens[:1]
    assert (case.run() == 0.0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sequence(value, device):
    """Sequences that share a tile of queries, and such that do not."""
    case = Case([5, 3, 20, 7], beyond=4, device=device)
    expected, whole = case.run(), case.qkv
    ends = [*case.cu_seqlens.tolist(), whole.shape[0]]
    for begin, end in pairwise(ends):  # the last are of none
        case.qkv = whole.clone()
        case.qkv[random.randrange(begin, end)] = value
        context = case.run()
        assert torch.equal(context[:begin], expected[:begin])
        assert torch.equal(context[end:], expected[end:])
        assert end == ends[-1] or context[begin:end].isnan().any(dim=1).all()


def test_offsets_that_are_none_stay_inside(device):
    """Results mean nothing then, but what is beside them stays."""
    case = Case([30, 7, 12], device=device)
    guarded = torch.full((49 + 200, 32), 7.0, device=device)
    for values in ([3, 900, -50, 60], [0, -7, 400, 33], [60, 50, 40, 30]):
        offsets_of_none = torch.tensor(values, dtype=torch.int32, device=device)
        few_tokens_attention(case.qkv, offsets_of_none, 2, case.scale, guarded[100:149])
    assert (guarded[:100] == 7.0).all()
    assert (guarded[149:] == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_again(dtype, device):
    case = Case([40, 3, 17], dtype=dtype, device=device)
    once = case.run()
    for _ in range(3):
        assert torch.equal(case.run(), once)


def test_the_error_in_half_precision_is_that_of_rounding(device):
    case = Case([100, 28], 64, dtype=torch.float16, device=device)
    assert relative_error(case.run(), case.reference(case.qkv.double())) < 2**-10


def test_which_calls_it_serves():
    def serving(tokens: int, dtype: torch.dtype, head_dim: int = 64, batch: int = 1, **options: Any) -> bool:
        qkv = torch.empty(tokens, 3 * 4 * head_dim, dtype=dtype, device="meta")
        return serves(qkv, torch.empty(batch + 1, device="meta"), 4, AttentionOptions(**options))

    assert serving(MOST_TOKENS, torch.bfloat16)
    assert not serving(MOST_TOKENS + 1, torch.bfloat16, 16)
    assert serving(128, torch.float16, 128)
    assert not serving(129, torch.float16, 128)
    assert serving(64, torch.float32)
    assert serving(32, torch.float32, 128)
    assert not serving(65, torch.float32, 16)
    assert not serving(33, torch.float32, 128)
    assert serving(16, torch.bfloat16, batch=MOST_SEQUENCES)
    assert not serving(16, torch.bfloat16, batch=MOST_SEQUENCES + 1)
    assert serving(16, torch.bfloat16, scale=-1.0)
    for options in ({"causal": True}, {"dropout_p": 0.1}, {"bias": torch.zeros(1, 1, 16, 16)}):
        assert not serving(16, torch.bfloat16, **options)
