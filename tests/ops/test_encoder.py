"""The shared-layer loop against one written row by row and pass by pass, without packing."""

import math
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from albert_fast import backends
from albert_fast.activations import ACTIVATIONS
from albert_fast.ops import encoder
from albert_fast.ops.dropout import keep_mask
from albert_fast.ops.encoder import FUSED_ACTIVATIONS, RECOMPUTE, EncoderOptions, encoder_reference
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
    saved_elements,
)

EPS = 1e-12
LINEAR = ("query", "key", "value", "dense", "ffn", "ffn_output")
# In the order of the parameters; attention.LayerNorm stands after dense.
MODULES = ("query", "key", "value", "dense", "attention_norm", "ffn", "ffn_output", "norm")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"num_layers": 3, "num_groups": 2, "inner_group_num": 2},
    "dropout": {"hidden_dropout_p": 0.2, "attention_dropout_p": 0.3},
    "hidden dropout": {"hidden_dropout_p": 0.2},
    "attention dropout": {"attention_dropout_p": 0.2},
    "bias": {"bias": True},
    "all states": {"return_all": True},
    "one layer": {"hidden_dropout_p": 0.1, "attention_dropout_p": 0.1, "bias": True, "return_all": True},
    "everything": {
        "num_layers": 2,
        "num_groups": 2,
        "inner_group_num": 2,
        "hidden_dropout_p": 0.1,
        "attention_dropout_p": 0.1,
        "bias": True,
        "return_all": True,
    },
}
parametrize_variant = pytest.mark.parametrize("variant", VARIANTS)
parametrize_recompute = pytest.mark.parametrize("recompute", RECOMPUTE)


class Case:
    def __init__(
        self,
        lengths: list[int],
        hidden: int = 16,
        inner: int = 24,
        *,
        beyond: int = 0,
        bias: bool = False,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        self.lengths, self.cu_seqlens, self.max_seqlen = lengths, offsets(lengths, device), max(lengths) + 1
        self.options = {"num_layers": 2, "num_heads": 2, "eps": EPS, **options}
        self.num_layers_of_weights = options.get("num_groups", 1) * options.get("inner_group_num", 1)
        tokens = sum(lengths) + beyond
        self.tensors = {"hidden": torch.randn(tokens, hidden).to(device, dtype)}
        for layer in range(self.num_layers_of_weights):
            for module in MODULES:
                rows = inner if module == "ffn" else hidden
                columns = inner if module == "ffn_output" else hidden
                linear = module in LINEAR
                weight = torch.randn(rows, columns) / columns**0.5 if linear else 1 + 0.2 * torch.randn(rows)
                self.tensors[f"{layer}.{module}.weight"] = weight.to(device, dtype)
                self.tensors[f"{layer}.{module}.bias"] = (0.2 * torch.randn(rows)).to(device, dtype)
        if self.options.get("hidden_dropout_p") or self.options.get("attention_dropout_p"):
            self.options["seed"] = random_seed(device)
        if bias:
            shape = (len(lengths), 1, self.max_seqlen, self.max_seqlen)
            mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.1, float("-inf"))
            self.options["bias"] = mask.to(device)
        state = (tokens, hidden)
        shape = (self.passes + 1, *state) if options.get("return_all") else state
        self.upstream = torch.randn(shape).to(device, dtype)

    @property
    def passes(self) -> int:
        return self.options["num_layers"] * self.options.get("inner_group_num", 1)

    def full_options(self) -> EncoderOptions:
        defaults = {"num_groups": 1, "inner_group_num": 1, "activation": "gelu_new", "hidden_dropout_p": 0.0}
        defaults |= {"attention_dropout_p": 0.0, "seed": None, "bias": None, "recompute": "none"}
        return EncoderOptions(**{**defaults, "return_all": False, **self.options})

    def operator_arguments(self) -> tuple[Any, ...]:
        hidden, *parameters = self.tensors.values()
        return hidden, parameters, self.cu_seqlens, self.max_seqlen, *self.full_options().of_training()

    def public(self, hidden: Tensor, attentions: list[Tensor] | None = None, **parameters: Tensor) -> Tensor:
        rows = (self.cu_seqlens, self.max_seqlen)
        return encoder(hidden, list(parameters.values()), *rows, attentions=attentions, **self.options)

    def operator(self, hidden: Tensor, **parameters: Tensor) -> Tensor:
        arguments = (list(parameters.values()), self.cu_seqlens, self.max_seqlen, *self.full_options().of_training())
        return torch.ops.albert_fast.encoder(hidden, *arguments)[0]

    def implementation(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
        hidden, options = self.tensors["hidden"], self.full_options()
        call = backends.Call(
            "encoder",
            hidden.device,
            hidden.dtype,
            head_dim=hidden.shape[1] // options.num_heads,
            activation=options.activation,
        )
        return self.operator if parity.use(name, call, monkeypatch) else self.public

    def layer_of_pass(self) -> list[int]:
        """By hand: the layers are dealt to the groups in equal shares, in order."""
        options = self.full_options()
        return [
            layer * options.num_groups // options.num_layers * options.inner_group_num + inner
            for layer in range(options.num_layers)
            for inner in range(options.inner_group_num)
        ]

    def formula(self, hidden: Tensor, **parameters: Tensor) -> Tensor:
        """Each row by itself, with PyTorch's modules' functions, in the dtype of the tensors."""
        options = self.full_options()
        tokens = torch.arange(hidden.shape[0], device=hidden.device)
        states = [hidden]
        for pass_index, layer in enumerate(self.layer_of_pass()):
            state = torch.zeros_like(hidden)
            for row, where in enumerate(rows_of(self.cu_seqlens)):
                if where.start < where.stop:
                    rows = self.one_pass(states[-1][where], row, pass_index, layer, parameters, options)
                    state = state.index_copy(0, tokens[where], rows)
            states.append(state)
        return torch.stack(states) if options.return_all else states[-1]

    def one_pass(
        self,
        x: Tensor,
        row: int,
        pass_index: int,
        layer: int,
        parameters: dict[str, Tensor],
        options: EncoderOptions,
    ) -> Tensor:
        weights = {
            module: (parameters[f"{layer}.{module}.weight"], parameters[f"{layer}.{module}.bias"]) for module in MODULES
        }
        length, width = x.shape
        heads, head_dim = options.num_heads, width // options.num_heads
        positions = torch.arange(length, device=x.device)

        def factor(site: int, outer: Tensor, columns: int, dropout_p: float) -> Tensor:
            if dropout_p == 0.0:
                return torch.ones((), dtype=x.dtype, device=x.device)
            seed = options.seed.to(x.device)
            keep = keep_mask(seed, site, outer.to(x.device), positions, columns, dropout_p)
            return keep.to(x.dtype) / (1 - dropout_p)

        def linear(x: Tensor, module: str) -> Tensor:
            return F.linear(x, *weights[module])

        query, key, value = (linear(x, module).view(length, heads, head_dim).transpose(0, 1) for module in LINEAR[:3])
        mask = None if options.bias is None else options.bias[row, :, :length, :length].to(query)
        if options.attention_dropout_p == 0.0:
            attended = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=mask)[0]
        else:
            scores = query @ key.transpose(1, 2) / math.sqrt(head_dim)
            scores = scores if mask is None else scores + mask
            nothing = (scores == float("-inf")).all(dim=-1, keepdim=True)
            weights_of_keys = scores.masked_fill(nothing, 0.0).softmax(dim=-1).masked_fill(nothing, 0.0)
            outer = (row * heads + torch.arange(heads))[:, None]
            attended = (
                weights_of_keys * factor(1 + 2 * pass_index, outer, length, options.attention_dropout_p)
            ) @ value
        projected = linear(attended.transpose(0, 1).reshape(length, width), "dense")
        dropped = projected * factor(2 + 2 * pass_index, torch.full((length,), row), width, options.hidden_dropout_p)
        h = F.layer_norm(x + dropped, (width,), *weights["attention_norm"], eps=EPS)
        inner = ACTIVATIONS[options.activation](linear(h, "ffn"))
        return F.layer_norm(h + linear(inner, "ffn_output"), (width,), *weights["norm"], eps=EPS)

    def expected(self) -> dict[str, Tensor]:
        return differentiate(self.formula, oracle_inputs(self.tensors), self.upstream)

    def peer(self) -> dict[str, Tensor]:
        return differentiate(self.formula, self.tensors, self.upstream)

    def scales(self, expected: dict[str, Tensor]) -> dict[str, float]:
        """A bias of the keys shifts all scores of a query alike: its gradient is zero but for rounding.

        So it is measured against that of the queries, eight times over: rounding is no fixed multiple of a peer's.
        """
        return {
            f"{layer}.key.bias": 8 * expected[f"{layer}.query.bias"].norm().item()
            for layer in range(self.num_layers_of_weights)
        }

    def assert_close(self, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert_all_close(actual, expected, 1e-11, self.scales(expected))


# -------------------------------------------------------------------------------------------------- against the formula


@parametrize_implementation
@parametrize_variant
def test_equals_the_formula(implementation, variant, device, monkeypatch):
    case = Case(ragged_lengths((1, 3, 15, 17)), device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    case.assert_close(differentiate(function, case.tensors, case.upstream), case.expected())


@parametrize_implementation
@parametrize_dtype
@pytest.mark.parametrize("variant", ["plain", "dropout"])
@judged_over_draws
def test_is_as_accurate_as_pytorch(implementation, dtype, variant, device, monkeypatch):
    lengths = ragged_lengths((1, 15, 17, 63))
    case = Case(lengths, 64, 128, num_layers=3, dtype=dtype, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    actual, expected = differentiate(function, case.tensors, case.upstream), case.expected()
    assert_all_as_accurate_as(actual, case.peer(), expected, case.scales(expected))


def twelve_passes_of_a_model_of_base_size(implementation, dtype, device, monkeypatch):
    case = Case(ragged_lengths(), 768, 3072, num_layers=12, num_heads=12, dtype=dtype, device=device)
    function = case.implementation(implementation, monkeypatch)
    return case, differentiate(function, case.tensors, case.upstream), case.expected()


@pytest.mark.slow
@parametrize_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@judged_over_draws
def test_twelve_passes_are_as_accurate_as_pytorch(implementation, dtype, device, monkeypatch):
    case, actual, expected = twelve_passes_of_a_model_of_base_size(implementation, dtype, device, monkeypatch)
    assert_all_as_accurate_as(actual, case.peer(), expected, case.scales(expected))


@pytest.mark.slow
@parametrize_implementation
def test_twelve_passes_equal_the_formula(implementation, device, monkeypatch):
    case, actual, expected = twelve_passes_of_a_model_of_base_size(implementation, torch.float64, device, monkeypatch)
    # What is expected is no more exact: twelve passes of rounding on either side.
    assert_all_close(actual, expected, 1e-13, case.scales(expected))


@parametrize_implementation
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(implementation, activation, device, monkeypatch):
    if implementation != parity.REFERENCE and activation not in FUSED_ACTIVATIONS:
        pytest.skip("the operator knows the activations of fused kernels; autograd serves the others")
    case = Case([5, 0, 3], activation=activation, device=device)
    if activation == "sqrtsoftplus":
        # Its slope in the far negative is rounding only.
        case.tensors["0.ffn.bias"] += 2
    function = case.implementation(implementation, monkeypatch)
    case.assert_close(differentiate(function, case.tensors, case.upstream), case.expected())


@pytest.mark.parametrize(("num_layers", "num_groups", "inner"), [(12, 1, 1), (5, 2, 1), (6, 4, 2), (3, 3, 3)])
def test_which_layer_a_pass_uses(num_layers, num_groups, inner):
    case = Case([1], num_layers=num_layers, num_groups=num_groups, inner_group_num=inner)
    assert case.full_options().layer_of_pass() == case.layer_of_pass()


@parametrize_implementation
@pytest.mark.parametrize("variant", ["dropout", "groups", "everything"])
def test_recomputing_changes_nothing(implementation, variant, device, monkeypatch):
    case = Case([9, 0, 4], device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    kept = differentiate(function, case.tensors, case.upstream)
    for recompute in ("ffn", "layer"):
        case.options["recompute"] = recompute
        case.assert_close(differentiate(function, case.tensors, case.upstream), kept)


@parametrize_implementation
def test_recomputing_keeps_less(implementation, device, monkeypatch):
    case = Case([40, 24], 32, 128, num_layers=6, device=device)
    function = case.implementation(implementation, monkeypatch)
    leaves = {name: tensor.requires_grad_() for name, tensor in case.tensors.items()}
    totals = []
    for recompute in RECOMPUTE:
        case.options["recompute"] = recompute
        with saved_elements() as sizes:
            function(**leaves)
        totals.append(sum(sizes))
    none, ffn, layer = totals
    assert layer < 0.5 * ffn < 0.45 * none


@parametrize_implementation
@pytest.mark.parametrize("state", [0, 1, 2])
def test_a_gradient_into_one_state(implementation, state, device, monkeypatch):
    case = Case([5, 3], return_all=True, device=device)
    function = case.implementation(implementation, monkeypatch)
    chosen = torch.zeros_like(case.upstream)
    chosen[state] = case.upstream[state]
    case.upstream = chosen
    actual = differentiate(function, case.tensors, case.upstream)
    case.assert_close(actual, case.expected())
    torch.testing.assert_close(actual["output"][0], case.tensors["hidden"])
    if state == 0:
        assert not any(actual[name].any() for name in list(case.tensors)[1:])


@parametrize_variant
def test_the_attentions(variant, device):
    lengths = [5, 0, 3, 3]
    case = Case(lengths, device=device, **VARIANTS[variant])
    without = differentiate(case.public, case.tensors, case.upstream)
    attentions: list[Tensor] = []
    with_them = differentiate(partial(case.public, attentions=attentions), case.tensors, case.upstream)
    case.assert_close(with_them, without)
    assert len(attentions) == case.passes
    for weights in attentions:
        assert weights.shape == (4, 2, case.max_seqlen, case.max_seqlen)
        for row, length in enumerate(lengths):
            own = weights[row, :, :length, :length]
            assert weights[row].count_nonzero() == own.count_nonzero()
            if not case.options.get("attention_dropout_p") and "bias" not in case.options:
                torch.testing.assert_close(own.sum(dim=-1), own.new_ones(own.shape[:-1]))


# ---------------------------------------------------------------------------------------------------------- edge cases


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_a_batch_is_its_rows_alone(implementation, variant, device, monkeypatch):
    """With dropout, too: rows before it are emptied, so that the row keeps its number."""
    lengths = ragged_lengths((1, 2, 5, 9))
    case = Case(lengths, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    together = differentiate(function, case.tensors, case.upstream)
    sums: Counter[str] = Counter()
    tensors, upstream = case.tensors, case.upstream
    for row, where in enumerate(rows_of(offsets(lengths))):
        case.cu_seqlens = offsets([n if index == row else 0 for index, n in enumerate(lengths)], device)
        case.tensors = {**tensors, "hidden": tensors["hidden"][where]}
        alone = differentiate(function, case.tensors, upstream[..., where, :])
        output, grad = alone.pop("output"), alone.pop("hidden")
        torch.testing.assert_close(output, together["output"][..., where, :])
        torch.testing.assert_close(grad, together["hidden"][where])
        for name, grad in alone.items():
            sums[name] = sums[name] + grad
    del together["output"], together["hidden"]
    case.assert_close(sums, together)


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "dropout", "everything"])
def test_tokens_of_no_row_change_nothing(implementation, variant, device, monkeypatch):
    """Their own outputs mean nothing; without a gradient into them, they leave none."""
    case = Case([3, 0, 6], beyond=4, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    case.upstream[..., 9:, :] = 0
    with_them = differentiate(function, case.tensors, case.upstream)
    assert all(result.isfinite().all() for result in with_them.values())
    assert not with_them["hidden"][9:].any()
    case.tensors["hidden"], case.upstream = case.tensors["hidden"][:9], case.upstream[..., :9, :]
    without = differentiate(function, case.tensors, case.upstream)
    with_them["hidden"], with_them["output"] = with_them["hidden"][:9], with_them["output"][..., :9, :]
    case.assert_close(with_them, without)


@parametrize_implementation
@parametrize_recompute
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_nothing_at_all(implementation, recompute, variant, device, monkeypatch):
    case = Case([0, 0], recompute=recompute, device=device, **VARIANTS[variant])
    results = differentiate(case.implementation(implementation, monkeypatch), case.tensors, case.upstream)
    assert results["output"].shape[-2:] == (0, 16)
    assert not any(result.any() for result in results.values())


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_strided_inputs(implementation, variant, device, monkeypatch):
    case = Case([5, 0, 4], device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    expected = differentiate(function, case.tensors, case.upstream)
    doubled = {name: torch.stack([tensor] * 2, dim=-1) for name, tensor in case.tensors.items()}
    case.cu_seqlens = torch.stack([case.cu_seqlens] * 2, dim=-1)[:, 0]

    def strided(**tensors: Tensor) -> Tensor:
        return function(**{name: tensor[..., 0] for name, tensor in tensors.items()})

    actual = differentiate(strided, doubled, case.upstream.mT.contiguous().mT)
    case.assert_close({name: x if name == "output" else x[..., 0] for name, x in actual.items()}, expected)


@parametrize_implementation
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_twice_the_same_bits(implementation, variant, device, monkeypatch, unpoisoned_memory):
    if device.type == "cuda" and "reference" in implementation:
        pytest.skip("PyTorch's own kernels do not promise it on CUDA")
    case = Case([63, 17, 15], 32, 64, dtype=torch.float32, device=device, **VARIANTS[variant])
    function = case.implementation(implementation, monkeypatch)
    first, second = (differentiate(function, case.tensors, case.upstream) for _ in range(2))
    assert_same_bits(first, second)


@parametrize_implementation
def test_weights_changed_in_place_are_seen(implementation, device, monkeypatch):
    """Whatever a backend prepares from the weights follows them."""
    case = Case([5, 3], device=device)
    function = case.implementation(implementation, monkeypatch)
    with torch.no_grad():
        before = function(**case.tensors)
        for name in ("0.query.weight", "0.ffn.bias", "0.norm.weight"):
            case.tensors[name].mul_(1.5)
        after = function(**case.tensors)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, case.formula(**case.tensors))


def test_operations_are_those_of_the_real_tokens(device, monkeypatch):
    """Products with weights: exactly proportional to the tokens; attention: to the sum of the squared lengths."""
    sdpa_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    hidden, inner, lengths = 16, 24, [31, 0, 7, 1, 7]

    def count_sdpa(query: list[int], key: list[int], value: list[int], *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def flops(lengths: list[int], dropout_p: float) -> tuple[int, int]:
        case = Case(lengths, hidden, inner, attention_dropout_p=dropout_p, num_layers=3, device=device)
        function = case.implementation(parity.REFERENCE, monkeypatch)
        with FlopCounterMode(display=False, custom_mapping={sdpa_on_cpu: count_sdpa}) as counter:
            function(**case.tensors)
        counts = dict(counter.get_flop_counts()["Global"])
        linear = counts.pop(torch.ops.aten.addmm, 0) + counts.pop(torch.ops.aten.mm, 0)
        return linear, sum(counts.values())

    for dropout_p in (0.0, 0.1):
        linear, attention = flops(lengths, dropout_p)
        assert linear == 3 * 2 * sum(lengths) * (4 * hidden**2 + 2 * hidden * inner)
        assert attention == 3 * 4 * sum(length**2 for length in lengths) * hidden


# -------------------------------------------------------------------------------------------------- operator, compiler


@pytest.mark.parametrize("variant", ["plain", "one layer"])
@parametrize_recompute
def test_gradcheck_of_the_reference(variant, recompute):
    case = Case([2, 0, 1], 4, 3, recompute=recompute, **VARIANTS[variant])
    hidden, *parameters = (tensor.requires_grad_() for tensor in case.tensors.values())
    rows, options = (case.cu_seqlens, case.max_seqlen), case.full_options()

    def function(hidden: Tensor, *parameters: Tensor) -> Tensor:
        return encoder_reference(hidden, list(parameters), *rows, options)

    assert torch.autograd.gradcheck(function, (hidden, *parameters), fast_mode=True)


@pytest.mark.parametrize(("variant", "recompute"), [("plain", "none"), *[("one layer", r) for r in RECOMPUTE]])
def test_opcheck(variant, recompute, device):
    options = {"num_layers": 1, "recompute": recompute, **VARIANTS[variant]}
    case = Case([2, 0, 3], 8, 12, dtype=torch.float32, device=device, **options)
    arguments = case.operator_arguments()
    bias = 4 + EncoderOptions._fields.index("bias")
    parity.check_operator(torch.ops.albert_fast.encoder.default, arguments, without_gradient=(bias,))
    _, kept = torch.ops.albert_fast.encoder(*arguments)
    backward = (case.upstream, kept, *arguments[1:])
    operator = torch.ops.albert_fast.encoder_backward.default
    parity.check_operator(operator, backward, without_gradient=tuple(range(len(backward))))


@pytest.mark.parametrize("variant", ["dropout", "all states"])
def test_compiled_with_any_number_of_tokens(variant, device):
    backend = CountingBackend()
    case = Case([12], num_layers=1, device=device, **VARIANTS[variant])

    def loss(cu_seqlens, hidden, **parameters):
        rows = (cu_seqlens, 13)
        return encoder(hidden * 2.0, list(parameters.values()), *rows, **case.options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for lengths in ([5, 2], [3, 1], [1, 9]):
        tensors = {**case.tensors, "hidden": torch.randn(sum(lengths), 16, dtype=torch.float64, device=device)}
        cu_seqlens = offsets(lengths, device)
        actual, expected = (differentiate(partial(function, cu_seqlens), tensors) for function in (compiled, loss))
        case.assert_close(actual, expected)
    assert backend.count <= 2, "one graph for the first shape and one for all others"


@pytest.mark.slow
@parametrize_recompute
def test_compiled_by_inductor(recompute, device):
    case = Case([17, 0, 15], dtype=torch.float32, device=device, recompute=recompute, hidden_dropout_p=0.1)
    compiled = torch.compile(case.public, fullgraph=True)
    actual = differentiate(compiled, case.tensors, case.upstream)
    expected = differentiate(case.public, case.tensors, case.upstream)
    assert_all_close(actual, expected, 1e-4, case.scales(expected))


# -------------------------------------------------------------------------------------------------------------- errors


def with_parameter(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], Any]:
    def changed(arguments: dict[str, Any]) -> list[Tensor]:
        parameters = list(arguments["parameters"])
        parameters[index] = change(parameters[index])
        return parameters

    return changed


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("hidden", lambda a: a["hidden"][None], ValueError, "hidden is .* shape"),
        ("hidden", lambda a: a["hidden"].long(), TypeError, "hidden is int64"),
        ("parameters", lambda a: a["parameters"][:-1], ValueError, "parameters has 15 tensors; 16 were"),
        ("parameters", with_parameter(0, lambda w: w[:-1]), ValueError, r"parameters\[0\] is .* shape"),
        ("parameters", with_parameter(7, lambda w: w[None]), ValueError, r"parameters\[7\] is .* shape"),
        ("parameters", with_parameter(10, lambda w: w.sum()), ValueError, r"parameters\[10\] is .* shape"),
        ("parameters", with_parameter(11, lambda w: w[:-1]), ValueError, r"parameters\[11\] is .* shape"),
        ("parameters", with_parameter(15, lambda w: w.to("meta")), ValueError, r"parameters\[15\] is on meta"),
        ("parameters", with_parameter(4, lambda w: w.double()), TypeError, r"parameters\[4\] is float64"),
        ("cu_seqlens", lambda a: a["cu_seqlens"].long(), TypeError, "cu_seqlens is int64"),
        ("cu_seqlens", lambda a: a["cu_seqlens"].flip(0), ValueError, "cu_seqlens is .* never fall"),
        ("cu_seqlens", lambda a: a["cu_seqlens"] * 2, ValueError, "cu_seqlens is .* 8 tokens"),
        ("max_seqlen", lambda a: 4, ValueError, "max_seqlen is 4"),
        ("num_layers", lambda a: 0, ValueError, "num_layers is 0"),
        ("num_groups", lambda a: 0, ValueError, "num_groups is 0"),
        ("num_groups", lambda a: 3, ValueError, "num_groups is 3 and num_layers 2"),
        ("num_groups", lambda a: 2, ValueError, "parameters has 16 tensors; 32 were"),
        ("inner_group_num", lambda a: 0, ValueError, "inner_group_num is 0"),
        ("num_heads", lambda a: 3, ValueError, "num_heads is 3; a divisor of the hidden size 16"),
        ("num_heads", lambda a: 0, ValueError, "num_heads is 0"),
        ("activation", lambda a: "gelu_old", ValueError, "activation is 'gelu_old'; one of gelu, "),
        ("recompute", lambda a: "all", ValueError, "recompute is 'all'; one of none, ffn, layer"),
        ("hidden_dropout_p", lambda a: 1.0, ValueError, "dropout_p is 1.0"),
        ("hidden_dropout_p", lambda a: 0.1, ValueError, "seed is None"),
        ("attention_dropout_p", lambda a: -0.1, ValueError, "dropout_p is -0.1"),
        ("attention_dropout_p", lambda a: 0.1, ValueError, "seed is None"),
        ("bias", lambda a: torch.zeros(5, 5), ValueError, "bias is "),
        ("bias", lambda a: torch.zeros(1, 1, 5, 5, dtype=torch.bool), TypeError, "bias is bool"),
        ("bias", lambda a: torch.zeros(1, 1, 5, 5, requires_grad=True), ValueError, "bias requires"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("with_attentions", [False, True], ids=["", "attentions"])
def test_a_wrong_argument_is_named(name, value, error, match, with_attentions):
    case = Case([5, 3], dtype=torch.float32)
    hidden, *parameters = case.tensors.values()
    arguments = {"hidden": hidden, "parameters": parameters, "cu_seqlens": case.cu_seqlens, "max_seqlen": 5}
    arguments |= case.options
    if with_attentions:
        arguments["attentions"] = []
    encoder(**arguments)
    arguments[name] = value(arguments)
    with pytest.raises(error, match=match):
        encoder(**arguments)


@judged_over_draws
def test_parameters_of_another_dtype_are_for_autocast(device):
    """float32 parameters and a bfloat16 stream: refused, but under autocast, where F.linear casts them."""
    case = Case([random.randint(1, 9), 3], dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        actual = differentiate(case.public, case.tensors, case.upstream)
        peer = differentiate(case.formula, case.tensors, case.upstream)
    expected = case.expected()
    assert_all_as_accurate_as(actual, peer, expected, case.scales(expected))
