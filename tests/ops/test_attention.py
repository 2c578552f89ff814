"""Attention against explicit loops over rows and heads, and against PyTorch's own kernels."""

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast import backends
from albert_fast.ops import attention, cross_attention
from albert_fast.ops.attention import AttentionOptions, attention_reference, attention_with_weights
from albert_fast.ops.dropout import keep_mask
from ops import parity
from ops.parity import (
    CountingBackend,
    assert_all_as_accurate_as,
    assert_all_close,
    assert_same_bits,
    differentiate,
    judged_over_draws,
    offsets,
    oracle_inputs,
    parametrize_dtype,
    parametrize_implementation,
    ragged_lengths,
    random_seed,
    rows_of,
)

NAMES = ("query", "key", "value")


class Case:
    """Rows of queries and keys, and what else a call takes; by default self-attention's lengths."""

    def __init__(
        self,
        lengths_q: list[int],
        lengths_k: list[int] | None = None,
        *,
        heads: int = 2,
        head_dim: int = 16,
        beyond: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        bias: tuple[bool, bool] | None = None,
        **options: Any,
    ) -> None:
        lengths_k = lengths_q if lengths_k is None else lengths_k
        self.batch, self.heads, self.head_dim = len(lengths_q), heads, head_dim
        self.cu_q, self.cu_k = offsets(lengths_q, device), offsets(lengths_k, device)
        # A bound need not be tight.
        self.max_q, self.max_k = max(lengths_q) + 2, max(lengths_k) + 1
        tokens = (sum(lengths_q) + beyond, *[sum(lengths_k) + beyond] * 2)
        self.tensors = {
            name: torch.randn(count, heads, head_dim, device=device).to(dtype)
            for name, count in zip(NAMES, tokens, strict=True)
        }
        self.upstream = torch.randn(tokens[0], heads * head_dim, device=device).to(dtype)
        self.options = options
        if bias is not None:
            shape = (self.batch if bias[0] else 1, heads if bias[1] else 1, self.max_q, self.max_k)
            mask = torch.randn(shape, device=device)
            self.options["bias"] = mask.masked_fill(torch.rand(shape, device=device) < 0.2, float("-inf"))
        if options.get("dropout_p"):
            self.options = {"seed": random_seed(device), "site": random.randrange(50)} | self.options

    def rows(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_q, self.cu_k, self.max_q, self.max_k

    def named_rows(self) -> dict[str, Any]:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return dict(zip(names, self.rows(), strict=True))

    def backend_call(self) -> backends.Call:
        query = self.tensors["query"]
        return backends.Call("attention", query.device, query.dtype, head_dim=self.head_dim)

    def full_options(self) -> AttentionOptions:
        return AttentionOptions(**{"scale": self.head_dim**-0.5, **self.options})

    def operator_arguments(self) -> tuple[Any, ...]:
        return *self.tensors.values(), *self.rows(), *self.full_options()

    def function(self, through_operator: bool = False) -> Callable[..., Tensor]:
        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if through_operator:
                return torch.ops.albert_fast.attention(query, key, value, *self.rows(), *self.full_options())[0]
            return cross_attention(query, key, value, *self.rows(), **self.options)

        return function

    def run(self, through_operator: bool = False) -> dict[str, Tensor]:
        return differentiate(self.function(through_operator), self.tensors, self.upstream)

    def expected(self) -> dict[str, Tensor]:
        """By explicit loops, in float64 on the CPU."""

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return by_rows(self, query, key, value, softmax_attention)

        return differentiate(function, oracle_inputs(self.tensors), self.upstream)

    def peer(self) -> dict[str, Tensor]:
        """PyTorch's fused attention row by row; with dropout, whose mask it cannot take, products and softmax."""
        kernel = softmax_attention if self.options.get("dropout_p") else fused_attention

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return by_rows(self, query, key, value, kernel)

        return differentiate(function, self.tensors, self.upstream)


def by_rows(case: Case, query: Tensor, key: Tensor, value: Tensor, kernel: Callable[..., Tensor]) -> Tensor:
    """Each head of each row by itself; the rows of no token and the tokens of no row stay zero."""
    options = case.full_options()
    output = torch.zeros_like(query)
    for row, (queries, keys) in enumerate(zip(rows_of(case.cu_q), rows_of(case.cu_k), strict=True)):
        length_q, length_k = queries.stop - queries.start, keys.stop - keys.start
        if length_q == 0 or length_k == 0:
            continue
        parts = []
        for head in range(case.heads):
            mask = torch.zeros(length_q, length_k, dtype=query.dtype, device=query.device)
            if options.bias is not None:
                one = options.bias[row % options.bias.shape[0], head % options.bias.shape[1]]
                mask = mask + one[:length_q, :length_k].to(mask)
            if options.causal:
                for i in range(length_q):
                    mask[i, max(0, i + length_k - length_q + 1) :] = float("-inf")
            factor = torch.ones_like(mask)
            if options.dropout_p:
                positions = torch.arange(length_q, device=query.device)
                outer = torch.full_like(positions, row * case.heads + head)
                keep = keep_mask(
                    options.seed.to(query.device), options.site, outer, positions, length_k, options.dropout_p
                )
                factor = keep.to(mask) / (1 - options.dropout_p)
            q, k, v = query[queries, head], key[keys, head], value[keys, head]
            parts.append(kernel(q, k, v, mask, factor, options.scale))
        output = output.index_copy(
            0, torch.arange(queries.start, queries.stop, device=query.device), torch.stack(parts, dim=1)
        )
    return output.flatten(1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factor: Tensor, scale: float) -> Tensor:
    scores = q @ k.t() * scale + mask
    forbidden = (scores == float("-inf")).all(dim=-1, keepdim=True)
    probabilities = scores.masked_fill(forbidden, 0.0).softmax(dim=-1).masked_fill(forbidden, 0.0)
    return (probabilities * factor) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, factor: Tensor, scale: float) -> Tensor:
    q, k, v = (x[None, None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0, 0]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "scale": {"scale": 0.7},
    "dropout": {"dropout_p": 0.3},
    "bias": {"bias": (False, False)},
    "bias of rows": {"bias": (True, False)},
    "bias of heads": {"bias": (False, True)},
    "everything": {"bias": (True, True), "causal": True, "dropout_p": 0.2, "scale": 0.5},
}
parametrize_variant = pytest.mark.parametrize("variant", VARIANTS)


# -------------------------------------------------------------------------------------------------- against the formula


@parametrize_implementation
@parametrize_variant
@pytest.mark.parametrize("lengths_of_keys", ["the same", "others"])
def test_equals_the_formula(implementation, variant, lengths_of_keys, device, monkeypatch):
    lengths_q = ragged_lengths(parity.SHORT_LENGTHS)
    # Other lengths: more keys than queries (a cache), fewer, and none at all.
    lengths_k = None if lengths_of_keys == "the same" else random.sample(lengths_q, len(lengths_q))
    case = Case(lengths_q, lengths_k, beyond=random.randint(0, 3), device=device, **VARIANTS[variant])
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    assert_all_close(case.run(through_operator), case.expected())


@parametrize_implementation
@parametrize_dtype
@pytest.mark.parametrize("variant", ["plain", "dropout", "bias"])
@judged_over_draws
def test_is_as_accurate_as_pytorch(implementation, dtype, variant, device, monkeypatch):
    head_dim = random.choice([16, 40, 64, 128])
    lengths = ragged_lengths((1, 15, 17, 63, 127))
    case = Case(lengths, head_dim=head_dim, dtype=dtype, device=device, **VARIANTS[variant])
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    assert_all_as_accurate_as(case.run(through_operator), case.peer(), case.expected())


@parametrize_implementation
@judged_over_draws
def test_a_long_row(implementation, device, monkeypatch):
    case = Case([511, 0], heads=1, dtype=torch.float32, device=device, dropout_p=0.1)
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    assert_all_as_accurate_as(case.run(through_operator), case.peer(), case.expected())


def masked_by(level: float, dtype: torch.dtype, device: torch.device) -> Case:
    """Half of the queries have it added to the scores of all of their keys, as padding often has."""
    case = Case(ragged_lengths((3, 17, 40)), dtype=dtype, device=device, bias=(True, False))
    bias = case.options["bias"].nan_to_num(neginf=0.0)
    padding = torch.rand(bias.shape[:3], device=device) < 0.5
    case.options["bias"] = bias + level * padding[..., None]
    return case


@parametrize_implementation
@pytest.mark.parametrize("dtype", parity.ACCELERATED, ids=str)
@pytest.mark.parametrize("level", [-1e4, -1e6, -1e9])
def test_under_a_large_bias_the_probabilities_of_the_backward_add_up_to_one(
    implementation, dtype, level, device, monkeypatch
):
    case = masked_by(level, dtype, device)
    case.upstream = torch.ones_like(case.upstream)
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    grad_value = case.run(through_operator)["value"].double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for queries, keys in zip(rows_of(case.cu_q), rows_of(case.cu_k), strict=True):
        count = torch.full_like(grad_value[0], queries.stop - queries.start)
        torch.testing.assert_close(grad_value[keys].sum(dim=0), count, rtol=tolerance, atol=0.0)


@parametrize_implementation
def test_a_bias_beside_which_scores_are_nothing(implementation, device, monkeypatch):
    """In float32 all scores are the bias then, and all keys alike: in PyTorch, too."""
    case = masked_by(-1e9, torch.float32, device)

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return by_rows(case, query, key, value, softmax_attention)

    expected = differentiate(formula, case.tensors, case.upstream)
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    assert_all_close(case.run(through_operator), expected, 1e-5)


@pytest.mark.slow
@parametrize_implementation
@parametrize_dtype
@parametrize_variant
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@judged_over_draws
def test_is_as_accurate_as_pytorch_at_every_length(implementation, dtype, variant, head_dim, device, monkeypatch):
    case = Case(ragged_lengths(), heads=3, head_dim=head_dim, dtype=dtype, device=device, **VARIANTS[variant])
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    assert_all_as_accurate_as(case.run(through_operator), case.peer(), case.expected())


@parametrize_implementation
def test_self_attention_is_a_view_of_the_general_form(implementation, device, monkeypatch):
    case = Case(ragged_lengths(parity.SHORT_LENGTHS), device=device, causal=True, dropout_p=0.1)
    parity.use(implementation, case.backend_call(), monkeypatch)
    qkv = torch.stack(list(case.tensors.values()), dim=1)
    actual = differentiate(
        lambda qkv: attention(qkv, case.cu_q, case.max_q, **case.options), {"qkv": qkv}, case.upstream
    )
    expected = case.expected()
    grads = torch.stack([expected[name] for name in NAMES], dim=1)
    assert_all_close(actual, {"output": expected["output"], "qkv": grads})


@parametrize_variant
def test_the_logsumexp_and_the_weights(variant, device):
    lengths = ragged_lengths((1, 3, 15))
    case = Case(lengths, random.sample(lengths, 4), beyond=2, device=device, **VARIANTS[variant])
    tensors, options = list(case.tensors.values()), case.full_options()
    output, weights = attention_with_weights(*tensors, *case.rows(), options)
    assert weights.shape == (case.batch, case.heads, case.max_q, case.max_k)
    logsumexp = torch.ops.albert_fast.attention(*case.operator_arguments())[1]
    assert logsumexp.dtype == torch.float64
    values = case.tensors["value"]
    seen = torch.zeros_like(output)
    unseen = logsumexp.new_full((case.heads, len(tensors[0])), float("-inf"))
    for row, (queries, keys) in enumerate(zip(rows_of(case.cu_q), rows_of(case.cu_k), strict=True)):
        length_q, length_k = queries.stop - queries.start, keys.stop - keys.start
        own = weights[row, :, :length_q, :length_k]
        assert weights[row].count_nonzero() == own.count_nonzero(), "a weight beyond the row's length"
        seen[queries] = torch.einsum("hqk,khd->qhd", own, values[keys]).flatten(1)
        scores = torch.einsum("qhd,khd->hqk", tensors[0][queries], tensors[1][keys]) * options.scale
        if options.bias is not None:
            bias = options.bias.to(scores).expand(case.batch, case.heads, -1, -1)
            scores = scores + bias[row, :, :length_q, :length_k]
        if options.causal:
            ahead = torch.arange(length_k, device=device) - torch.arange(length_q, device=device)[:, None]
            scores = scores.masked_fill(ahead > length_k - length_q, float("-inf"))
        unseen[:, queries] = scores.logsumexp(dim=-1)
    torch.testing.assert_close(seen, output)
    if options.bias is not None:
        largest, of_sum = logsumexp
        logsumexp = (largest + of_sum) * math.log(2)
    torch.testing.assert_close(logsumexp, unseen)


@pytest.mark.parametrize("variant", ["plain", "causal", "dropout", "everything"])
def test_gradcheck_of_the_reference(variant):
    case = Case([3, 0, 2], [2, 1, 3], heads=2, head_dim=2, beyond=1, **VARIANTS[variant])
    leaves = [tensor.requires_grad_() for tensor in case.tensors.values()]

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_reference(query, key, value, case.cu_q, case.cu_k, case.full_options())

    assert torch.autograd.gradcheck(function, leaves)


# -------------------------------------------------------------------------------------------------- operator, compiler


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_opcheck(variant, device):
    case = Case([3, 0, 5], [4, 2, 5], dtype=torch.float32, device=device, **VARIANTS[variant])
    arguments = case.operator_arguments()
    bias = len(arguments) - 1
    parity.check_operator(torch.ops.albert_fast.attention.default, arguments, without_gradient=(bias,))
    output, logsumexp = torch.ops.albert_fast.attention(*arguments)
    backward = (torch.randn_like(output), *arguments[:3], output, logsumexp, *arguments[3:])
    every = tuple(range(len(backward)))
    parity.check_operator(torch.ops.albert_fast.attention_backward.default, backward, without_gradient=every)


def test_no_gradient_is_lost_through_the_logsumexp(device):
    """It has none: asking for one must say so, not leave out a term."""
    case = Case([3, 5], device=device)
    query, *others = case.operator_arguments()
    _, logsumexp = torch.ops.albert_fast.attention(query.requires_grad_(), *others)
    assert not logsumexp.requires_grad


@parametrize_variant
def test_compiled_with_any_number_of_tokens(variant, device):
    backend = CountingBackend()

    def loss(query, key, value, cu_q, cu_k, options):
        return cross_attention(query * 1.0, key, value, cu_q, cu_k, 16, 16, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for lengths in ([3, 0, 5], [2, 7, 4], [9, 1, 1]):
        # Never so few keys that the mask may leave each query one: the gradient would be zero but for rounding.
        case = Case(lengths, random.sample([4, 9, 6], 3), device=device, site=4, **VARIANTS[variant])
        options = dict(case.options)
        if "bias" in options:
            options["bias"] = F.pad(options["bias"], (0, 16 - case.max_k, 0, 16 - case.max_q))
        results = [
            differentiate(partial(function, cu_q=case.cu_q, cu_k=case.cu_k, options=options), case.tensors)
            for function in (compiled, loss)
        ]
        assert_all_close(*results)
    assert backend.count <= 2, "one graph for the first shape and one for all others"


@pytest.mark.slow
def test_compiled_by_inductor(device):
    case = Case([3, 0, 5], device=device, dtype=torch.float32, dropout_p=0.2)

    def loss(query, key, value):
        return cross_attention(query * 2.0, key, value, *case.rows(), **case.options).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    assert_all_close(differentiate(compiled, case.tensors), differentiate(loss, case.tensors), 1e-5)


# ---------------------------------------------------------------------------------------------------------- edge cases


@parametrize_implementation
@parametrize_dtype
@pytest.mark.parametrize("reason", ["bias", "causal", "no keys"])
@judged_over_draws
def test_queries_without_keys_give_zeros(implementation, dtype, reason, device, monkeypatch):
    """A query that may attend to nothing: zeros, zero gradients, and its neighbours as if it were not there."""
    lengths = {"bias": ([25, 63], [25, 63]), "causal": ([40, 63], [37, 63]), "no keys": ([25, 63], [0, 63])}
    lengths_q, lengths_k = lengths[reason]
    case = Case(lengths_q, lengths_k, dtype=dtype, device=device, causal=reason == "causal")
    nothing = slice(0, 3 if reason == "causal" else 25)
    if reason == "bias":
        mask = torch.zeros(2, 1, case.max_q, case.max_k, device=device)
        mask[0] = float("-inf")
        case.options["bias"] = mask
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    actual = case.run(through_operator)
    assert not actual["output"][nothing].any()
    assert not actual["query"][nothing].any()
    assert_all_as_accurate_as(actual, case.peer(), case.expected())


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_tokens_of_no_row_change_nothing(implementation, variant, device, monkeypatch):
    case = Case([3, 0, 6], [2, 1, 4], beyond=4, device=device, **VARIANTS[variant])
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    for name in NAMES:
        case.tensors[name][-4:] = float("nan")
    case.upstream[-4:] = float("nan")
    results = case.run(through_operator)
    for name, result in results.items():
        assert not result[-4:].any(), f"{name} beyond the last row is not zero"
        assert result.isfinite().all(), name


@parametrize_implementation
def test_nothing_at_all(implementation, device, monkeypatch):
    for lengths in ([0, 0], []):
        for beyond in (0, 3):
            case = Case([0], beyond=beyond, device=device)
            case.cu_q = case.cu_k = offsets(lengths, device)
            results = case.run(parity.use(implementation, case.backend_call(), monkeypatch))
            assert results["output"].shape == (beyond, 32)
            assert not any(result.any() for result in results.values())


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_strided_inputs(implementation, variant, device, monkeypatch):
    """Slices of wider tensors, and a bias that is expanded, read in place."""
    case = Case([3, 0, 6], device=device, **VARIANTS[variant])
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    if "bias" in case.options:
        case.options["bias"] = case.options["bias"][:1].expand(3, -1, -1, -1)
    expected = case.run(through_operator)
    wide = {
        "query": torch.cat([case.tensors["query"]] * 2, dim=-1),
        "key": case.tensors["key"].transpose(0, 1).contiguous(),
        "value": case.tensors["value"].repeat_interleave(2, dim=-1),
    }

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return case.function(through_operator)(query[..., : case.head_dim], key.transpose(0, 1), value[..., ::2])

    # The gradient of the output, too, with strides.
    upstream = torch.stack([case.upstream] * 2, dim=-1)[..., 0]
    actual = differentiate(function, wide, upstream)
    assert_all_close(
        {
            "output": actual["output"],
            "query": actual["query"][..., : case.head_dim],
            "key": actual["key"].transpose(0, 1),
            "value": actual["value"][..., ::2],
        },
        expected,
    )
    assert not actual["query"][..., case.head_dim :].any()
    assert not actual["value"][..., 1::2].any()


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_twice_the_same_bits(implementation, variant, device, monkeypatch, unpoisoned_memory):
    if device.type == "cuda" and "reference" in implementation:
        pytest.skip("PyTorch's own kernels do not promise it on CUDA")
    case = Case(ragged_lengths((17, 63, 127)), dtype=torch.float32, device=device, **VARIANTS[variant])
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    assert_same_bits(case.run(through_operator), case.run(through_operator))


@parametrize_implementation
def test_a_row_does_not_see_its_neighbours(implementation, device, monkeypatch):
    """With dropout, too: the row's index names the mask, not its place among the tokens."""
    case = Case([4, 0, 9, 3], device=device, dropout_p=0.3)
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    together = case.run(through_operator)
    alone = Case([0, 0, 9, 0], device=device, dropout_p=0.3)
    alone.options, alone.max_q, alone.max_k = case.options, 9, 11
    alone.tensors = {name: tensor[4:13] for name, tensor in case.tensors.items()}
    alone.upstream = case.upstream[4:13]
    assert_all_close(alone.run(through_operator), {name: x[4:13] for name, x in together.items()})


@parametrize_implementation
def test_a_decoder_with_a_cache(implementation, device, monkeypatch):
    """Causal, the last query sees the last key: one step at a time gives what all steps at once give."""
    case = Case([6, 4], device=device, causal=True)
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    at_once = case.run(through_operator)["output"]
    for step, cached in ((1, (6, 4)), (2, (5, 3))):
        last = Case([step, step], list(cached), device=device, causal=True)
        rows_q = [slice(cached[0] - step, cached[0]), slice(6 + cached[1] - step, 6 + cached[1])]
        rows_k = [slice(0, cached[0]), slice(6, 6 + cached[1])]
        last.tensors = {
            name: torch.cat([tensor[rows] for rows in (rows_q if name == "query" else rows_k)])
            for name, tensor in case.tensors.items()
        }
        output = last.run(through_operator)["output"]
        torch.testing.assert_close(output, torch.cat([at_once[rows] for rows in rows_q]))


@parametrize_implementation
def test_the_mean_over_seeds_is_the_output_without_dropout(implementation, device, monkeypatch):
    case = Case([9], device=device, dtype=torch.float32, dropout_p=0.4)
    through_operator = parity.use(implementation, case.backend_call(), monkeypatch)
    outputs = []
    for _ in range(60):
        case.options["seed"] = random_seed(device)
        outputs.append(case.function(through_operator)(**case.tensors))
    case.options["dropout_p"] = 0.0
    expected = case.function(through_operator)(**case.tensors)
    outputs = torch.stack(outputs)
    deviation = outputs.std(dim=0) / len(outputs) ** 0.5
    assert ((outputs.mean(dim=0) - expected).abs() <= 6.5 * deviation).all()


# -------------------------------------------------------------------------------------------------------------- errors


def wrong(name: str, value: Callable[[dict[str, Any]], Any], error: type[Exception], match: str) -> Any:
    """One argument replaced; the message names it."""
    return pytest.param(name, value, error, match, id=f"{name}: {match}")


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        wrong("query", lambda a: a["query"].flatten(1), ValueError, "query is .* shape"),
        wrong("query", lambda a: a["query"].long(), TypeError, "query is int64.*floating"),
        wrong("key", lambda a: a["key"][..., :-1], ValueError, "key is .* shape"),
        wrong("key", lambda a: a["key"].flatten(1), ValueError, "key is .* shape"),
        wrong("key", lambda a: a["key"].sum(), ValueError, "key is .* shape"),
        wrong("key", lambda a: a["key"].double(), TypeError, "key is float64.*float32 was expected"),
        wrong("key", lambda a: a["key"].to("meta"), ValueError, "key is on meta"),
        wrong("value", lambda a: a["value"][:-1], ValueError, "value is .* shape"),
        wrong("value", lambda a: a["value"].half(), TypeError, "value is float16"),
        wrong("value", lambda a: a["value"].to("meta"), ValueError, "value is on meta"),
        wrong("cu_seqlens_q", lambda a: a["cu_seqlens_q"].long(), TypeError, "cu_seqlens_q is int64.*int32"),
        wrong("cu_seqlens_q", lambda a: a["cu_seqlens_q"][None], ValueError, "cu_seqlens_q is .* shape"),
        wrong("cu_seqlens_q", lambda a: a["cu_seqlens_q"][:0], ValueError, "cu_seqlens_q is empty"),
        wrong("cu_seqlens_q", lambda a: a["cu_seqlens_q"].to("meta"), ValueError, "cu_seqlens_q is on meta"),
        wrong("cu_seqlens_q", lambda a: a["cu_seqlens_q"] + 1, ValueError, "cu_seqlens_q is .* begin with 0"),
        wrong("cu_seqlens_q", lambda a: a["cu_seqlens_q"].flip(0), ValueError, "cu_seqlens_q is .* never fall"),
        wrong("cu_seqlens_k", lambda a: a["cu_seqlens_k"] * 2, ValueError, "cu_seqlens_k is .* tokens given"),
        wrong("cu_seqlens_k", lambda a: a["cu_seqlens_k"][:-1], ValueError, "cu_seqlens_k"),
        wrong("max_seqlen_q", lambda a: 4, ValueError, "max_seqlen"),
        wrong("max_seqlen_k", lambda a: 4, ValueError, "max_seqlen"),
        wrong("dropout_p", lambda a: 1.0, ValueError, "dropout_p is 1.0"),
        wrong("dropout_p", lambda a: -0.5, ValueError, "dropout_p is -0.5"),
        wrong("dropout_p", lambda a: 0.5, ValueError, "seed is None"),
        wrong("bias", lambda a: torch.zeros(5, 5), ValueError, "bias is .* was expected"),
        wrong("bias", lambda a: torch.zeros(2, 1, 5, 5), ValueError, "bias is .* was expected"),
        wrong("bias", lambda a: torch.zeros(1, 3, 5, 5), ValueError, "bias is .* was expected"),
        wrong("bias", lambda a: torch.zeros(1, 1, 5, 4), ValueError, "bias is .* was expected"),
        wrong("bias", lambda a: torch.ones(1, 1, 5, 5, dtype=torch.bool), TypeError, "bias is bool"),
        wrong("bias", lambda a: torch.zeros(1, 1, 5, 5, device="meta"), ValueError, "bias is on meta"),
        wrong("bias", lambda a: torch.zeros(1, 1, 5, 5, requires_grad=True), ValueError, "bias requires"),
    ],
)
def test_a_wrong_argument_is_named(name, value, error, match):
    case = Case([5, 0, 3], dtype=torch.float32)
    case.max_q = case.max_k = 5
    arguments: dict[str, Any] = {**case.tensors, **case.named_rows()}
    cross_attention(**arguments)
    arguments[name] = value(arguments)
    with pytest.raises(error, match=match):
        cross_attention(**arguments)


def test_a_wrong_projection_is_named():
    cu_seqlens = offsets([4])
    with pytest.raises(ValueError, match="qkv"):
        attention(torch.zeros(4, 2, 2, 8), cu_seqlens, 4)
    with pytest.raises(ValueError, match="qkv"):
        attention(torch.zeros(4, 48), cu_seqlens, 4)


def test_a_bias_that_was_learned_may_be_used_for_inference(device):
    case = Case([5], device=device)
    bias = torch.zeros(1, 1, case.max_q, case.max_k, device=device, requires_grad=True)
    with torch.no_grad():
        cross_attention(**case.tensors, **case.named_rows(), bias=bias)
