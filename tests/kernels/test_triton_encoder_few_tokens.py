"""Inference for few tokens: against the reference in float64, in shapes that fit no tile, and what it leaves behind."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_as_accurate_as, judged_over_draws, relative_error
from ops.test_encoder import Case
from torch import Tensor

from albert_fast import backends
from albert_fast.kernels import encoder_few_tokens as few_tokens
from albert_fast.kernels.encoder import encoder_inference
from albert_fast.kernels.few_tokens_product import DEEP, GROUP, SQUARE, WIDE, Workspace, few_tokens_product
from albert_fast.kernels.launch import recording
from albert_fast.ops.encoder import encoder_reference

parametrize_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)


@pytest.fixture(autouse=True)
def few_tokens_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    monkeypatch.setenv("ALBERT_FAST_FEW_TOKENS", "1")
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float32
    reason = backends.refusal(backends.TRITON, backends.Call("encoder", device, dtype, head_dim=16))
    if reason is not None:
        pytest.skip(reason)


def run(case: Case) -> Tensor:
    hidden, *parameters = case.tensors.values()
    return encoder_inference(hidden, parameters, case.cu_seqlens, case.max_seqlen, case.full_options())


def results(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kernels, of PyTorch in the same dtype, and in float64."""
    actual = run(case)
    hidden, *parameters = case.tensors.values()
    rest = case.cu_seqlens, case.max_seqlen, case.full_options()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALBERT_FAST_BACKEND", "reference")
        peer = encoder_reference(hidden, parameters, *rest)
        return actual, peer, encoder_reference(hidden.double(), [p.double() for p in parameters], *rest)


@parametrize_dtype
@pytest.mark.parametrize(
    ("lengths", "hidden", "inner", "heads"),
    [
        ([1], 32, 64, 2),
        ([17, 0, 1, 15], 96, 200, 6),
        ([63, 64, 1], 64, 256, 1),
        ([130, 70], 144, 80, 9),
        ([33], 40, 40, 2),
        ([5], 128, 64, 1),
    ],
)
@judged_over_draws
def test_as_accurate_as_pytorch(lengths, hidden, inner, heads, dtype, device):
    case = Case(lengths, hidden, inner, num_heads=heads, num_layers=3, return_all=True, dtype=dtype, device=device)
    actual, peer, oracle = results(case)
    assert actual.shape == (4, sum(lengths), hidden)
    for index, parts in enumerate(zip(actual, peer, oracle, strict=True)):
        assert_as_accurate_as(*parts, name=f"after {index} passes")


@parametrize_dtype
@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@judged_over_draws
def test_layers_in_groups(activation, dtype, device):
    groups = {"num_layers": 3, "num_groups": 2, "inner_group_num": 2}
    case = Case([5, 0, 12], 64, 96, activation=activation, bias=True, dtype=dtype, device=device, **groups)
    assert_as_accurate_as(*results(case))


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "inner_group_num"), [(1, 1, 1), (2, 2, 1), (3, 2, 1), (2, 1, 2), (4, 2, 3)]
)
@judged_over_draws
def test_layers_that_follow_one_another(num_layers, num_groups, inner_group_num, device):
    """Each with the LayerNorm of whoever was before it."""
    groups = {"num_layers": num_layers, "num_groups": num_groups, "inner_group_num": inner_group_num}
    assert_as_accurate_as(*results(Case([5, 0, 12], 32, 48, dtype=torch.float16, device=device, **groups)))


@parametrize_dtype
@judged_over_draws
def test_any_sizes(dtype, device):
    tokens, heads = random.randint(1, 200), random.randint(1, 5)
    first = random.randint(0, tokens)
    sizes = heads * random.choice([16, 20, 24]), random.randint(1, 150)
    assert_as_accurate_as(*results(Case([first, tokens - first], *sizes, num_heads=heads, dtype=dtype, device=device)))


@parametrize_dtype
@judged_over_draws
def test_rows_with_a_large_mean(dtype, device):
    """50 times their deviation: PyTorch takes it from each element, this from the product's result."""
    case = Case([17, 3], 96, 128, num_heads=6, dtype=dtype, device=device)
    for module in ("dense", "ffn_output"):
        case.tensors[f"0.{module}.bias"] += 60.0
    actual, peer, oracle = results(case)
    assert relative_error(peer, oracle) < 0.5
    assert_as_accurate_as(actual, peer, oracle, factor=4.0 if dtype == torch.float32 else 2.0)


def test_the_same_bits_again(device):
    case = Case([40, 31], 96, 384, num_heads=6, return_all=True, dtype=torch.float16, device=device)
    once = run(case)
    for _ in range(3):
        assert torch.equal(run(case), once)


def test_return_all_begins_with_the_input_and_ends_with_what_is_returned_without(device):
    case = Case([20], 64, 96, return_all=True, dtype=torch.float16, device=device)
    every = run(case)
    assert torch.equal(every[0], case.tensors["hidden"])
    case.options["return_all"] = False
    assert torch.equal(every[-1], run(case))


def test_parameters_in_another_dtype_than_the_products(device):
    """As under autocast."""
    case = Case([9], 64, 96, dtype=torch.float32, device=device)
    exact = run(case)
    case.tensors["hidden"] = case.tensors["hidden"].half()
    half = run(case)
    assert half.dtype == torch.float16
    assert relative_error(half, exact) < 1e-2


def test_parameters_of_several_dtypes(device):
    case = Case([9], 64, 96, dtype=torch.float16, device=device)
    expected = run(case)
    for name in list(case.tensors)[2::3]:
        case.tensors[name] = case.tensors[name].float()
    assert torch.equal(run(case), expected)


def test_dropout_of_the_probabilities(device):
    """Is the general attention's."""
    case = Case([9, 5], 64, 96, attention_dropout_p=0.5, dtype=torch.float32, device=device)
    assert_as_accurate_as(*results(case))


def test_tokens_of_no_row_disturb_nobody(device):
    case = Case([7, 4], 64, 96, beyond=6, dtype=torch.float16, device=device)
    whole = run(case)
    case.tensors["hidden"] = case.tensors["hidden"][:11]
    assert torch.isfinite(whole).all()
    assert torch.equal(whole[:11], run(case))


@parametrize_dtype
@pytest.mark.parametrize("of_half", [False, True])
@pytest.mark.parametrize(("width", "inner"), [(16, 70), (40, 24), (96, 200)])
def test_weights_with_layer_norm(width, inner, of_half, dtype, device):
    """And what a fold leaves beside them: the weights without, and counters of 0."""
    case = Case([1], width, inner, dtype=torch.float16 if of_half else dtype, device=device)
    layer, before = (few_tokens._Layer.of(list(case.tensors.values())[1:], dtype) for _ in range(2))
    before = before._replace(norm_weight=torch.randn_like(before.norm_weight))
    counters = torch.randint(1, 9, (3 * width,), dtype=torch.int32, device=device)
    plain = torch.empty(3 * width, width, dtype=dtype, device=device), torch.empty(3 * width, device=device)
    qkv, ffn = few_tokens.fold(layer, before, dtype, counters, plain=plain, with_ffn=True)
    weight = torch.cat([layer.query_weight, layer.key_weight, layer.value_weight])
    bias = torch.cat([layer.query_bias, layer.key_bias, layer.value_bias])
    assert torch.equal(plain[0], weight.to(dtype))
    assert torch.equal(plain[1], bias.float())
    assert not counters.any()
    norms = (before.norm_weight, before.norm_bias), (layer.attention_norm_weight, layer.attention_norm_bias)
    given = (weight, bias), (layer.ffn_weight, layer.ffn_bias)
    for folded, (weight, bias), (gamma, beta) in zip((qkv, ffn), given, norms, strict=True):
        weight = weight.to(dtype).float()
        assert torch.equal(folded.weight, (weight * gamma.float()).to(dtype))
        torch.testing.assert_close(folded.sums, folded.weight.float().sum(1))
        torch.testing.assert_close(folded.bias, weight @ beta.float() + bias.float())
    again, none = few_tokens.fold(layer, before, dtype, counters, plain=None, with_ffn=False)
    assert all(torch.equal(*pair) for pair in zip(again, qkv, strict=True))
    assert all(tensor.shape[0] == 0 for tensor in none)


def test_five_kernels_a_pass():
    case = Case([100, 28], 768, 3072, num_heads=12, num_layers=12, dtype=torch.bfloat16, device="meta")
    with recording() as launches:
        run(case)
    product, attention = "few_tokens_product_kernel", "few_tokens_attention_kernel"
    of_pass = [product, attention, product, product, product]
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["fold_kernel", *of_pass * 12, "layer_norm_forward_kernel"]


@parametrize_dtype
@pytest.mark.parametrize(("depth", "columns"), [(40, 24), (96, 200), (300, 72), (64, 64)])
def test_the_product_and_what_it_leaves(depth, columns, dtype, device):
    """With a residual through LayerNorm: the sums, their statistics, and counters that are 0 again."""
    tokens, eps = 45, 1e-12
    weight, vectors = torch.randn(columns, depth) / depth**0.5, torch.randn(3, columns)
    given = [torch.randn(tokens, depth), weight, torch.randn(tokens, columns) * 3 + 1, *vectors]
    x, weight, residual, bias, gamma, beta = given = [tensor.to(device, dtype) for tensor in given]
    statistics, workspace, y = statistics_of(residual), Workspace.of(x, columns), torch.empty_like(residual)
    workspace.counters.zero_()
    options: dict[str, Any] = {"residual": residual, "norm": (gamma, beta), "statistics": statistics}
    options |= {"eps": eps, "workspace": workspace, "new_statistics": torch.empty_like(statistics)}
    for _ in range(2):
        few_tokens_product(x, weight, bias, y, **options)
        assert not workspace.counters.any()
    x, weight, residual, bias, gamma, beta = (tensor.double() for tensor in given)
    expected = x @ weight.t() + bias + F.layer_norm(residual, (columns,), gamma, beta, eps)
    assert relative_error(y, expected) < max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(options["new_statistics"], statistics_of(y), rtol=1e-4, atol=1e-4)


def statistics_of(y: Tensor) -> Tensor:
    """Mean and squared deviations by group, float32 [2, tokens, groups]."""
    groups = [group.double() for group in y.split(GROUP, dim=1)]
    deviations = [(group - group.mean(1, keepdim=True)).square().sum(1) for group in groups]
    return torch.stack([torch.stack([group.mean(1) for group in groups], 1), torch.stack(deviations, 1)]).float()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_of_a_graph():
    case = Case([100, 28], 768, 3072, num_heads=12, num_layers=12, dtype=torch.bfloat16, device="cuda")
    expected = run(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(case)
    for _ in range(100):
        output.zero_()
        graph.replay()
        assert torch.equal(output, expected)


def test_which_calls_it_serves(monkeypatch):
    def serves(tokens: int, dtype: torch.dtype, setting: str | None = None, width: int = 768, **options: Any) -> bool:
        monkeypatch.delenv("ALBERT_FAST_FEW_TOKENS", raising=False)
        if setting is not None:
            monkeypatch.setenv("ALBERT_FAST_FEW_TOKENS", setting)
        given = Case([1])
        given.options |= options
        return few_tokens.serves(torch.empty(tokens, width, dtype=dtype, device="meta"), given.full_options())

    assert serves(1, torch.bfloat16)
    assert serves(few_tokens.MOST_TOKENS, torch.float16)
    assert not serves(few_tokens.MOST_TOKENS + 1, torch.bfloat16)
    assert not serves(128, torch.float32)
    assert serves(128, torch.float32, "1")
    assert serves(1000, torch.bfloat16, "1")
    assert not serves(128, torch.bfloat16, "0")
    for setting in (None, "1"):
        assert not serves(0, torch.bfloat16, setting)
        assert not serves(128, torch.bfloat16, setting, width=2048)
        assert not serves(128, torch.bfloat16, setting, hidden_dropout_p=0.1)


@pytest.mark.parametrize("tiles", [WIDE, SQUARE, DEEP], ids=["wide", "square", "deep"])
def test_workspaces_hold_the_tiles_of_every_configuration(tiles):
    configs = [config for table in (tiles.half, tiles.single) for of_one in table.values() for config in of_one]
    for config in (tiles.interpreter, *configs):
        m, n, split = (config.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "SPLIT"))
        assert n % GROUP == 0
        for tokens, columns in [(1, 32), (129, 768), (256, 1024), (200, 40)]:
            workspace = Workspace.of(torch.empty(tokens, 1, device="meta"), columns)
            programs = -(-tokens // m) * -(-columns // n)
            assert split == 1 or programs <= workspace.counters.numel()
            assert split == 1 or programs * split * m * n <= workspace.partials.numel()
