"""The loop on a GPU: what it keeps, how it gathers passes for the weight gradients, and what it leaves alone."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from ops.parity import assert_all_close, assert_same_bits, check_operator, differentiate, offsets
from torch import Tensor

from albert_fast import backends
from albert_fast.kernels import encoder as loop
from albert_fast.kernels import launch
from albert_fast.ops import encoder
from albert_fast.ops.encoder import EncoderOptions

WIDTH, INTERMEDIATE, HEADS = 32, 64, 2


def options(**changed: Any) -> EncoderOptions:
    values: dict[str, Any] = {"num_layers": 3, "num_groups": 1, "inner_group_num": 1, "num_heads": HEADS}
    values |= {"activation": "gelu_new", "eps": 1e-12, "hidden_dropout_p": 0.0, "attention_dropout_p": 0.0}
    values |= {"seed": None, "bias": None, "recompute": "none", "return_all": False}
    return EncoderOptions(**{**values, **changed})


def parameters(layers: int = 1, width: int = WIDTH, intermediate: int = INTERMEDIATE) -> list[Tensor]:
    square, vector = (width, width), (width,)
    shapes: list[tuple[int, ...]] = [square, vector] * 4
    shapes += [vector, vector, (intermediate, width), (intermediate,), (width, intermediate), vector, vector, vector]
    return [torch.randn(shape) * 0.2 + (shape == vector) * 0.5 for _ in range(layers) for shape in shapes]


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    reason = backends.refusal(backends.TRITON, backends.Call("encoder", device, torch.float32, head_dim=16))
    if reason is not None:
        pytest.skip(reason)


def gradients(
    hidden: Tensor, weights: list[Tensor], cu_seqlens: Tensor, longest: int, given: EncoderOptions, upstream: Tensor
) -> dict[str, Tensor]:
    arguments = {name: value for name, value in given._asdict().items() if name not in ("quantized", "input_means")}

    def run(hidden: Tensor, **weights: Tensor) -> Tensor:
        return encoder(hidden, list(weights.values()), cu_seqlens, longest, **arguments)

    return differentiate(run, {"hidden": hidden, **{f"{i:02}": w for i, w in enumerate(weights)}}, upstream)


@pytest.mark.parametrize("heads", [12, 16])
def test_keeps_at_most_20_bytes_of_hidden_a_token_and_pass(heads):
    tokens, width, passes = 1000, 64 * heads, 12
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
    matrices = [torch.empty(4 * width, width, device="meta")] * 16
    kept = loop.kept_shapes(hidden, matrices, options(num_layers=passes, num_heads=heads))
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in kept]
    statistics = (heads + 4) * tokens * passes * 4
    its_input = tokens * width * 2
    assert sum(sizes) <= 20 * width * tokens * passes + statistics + its_input
    of_ffn = loop.kept_shapes(hidden, matrices, options(num_layers=passes, num_heads=heads, recompute="ffn"))
    assert sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in of_ffn) <= 0.65 * sum(sizes)


@pytest.mark.parametrize("layer_of_pass", [[0] * 12, [0, 0, 1, 1, 1, 2], [0, 1, 0, 1], [0]])
@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_runs_are_neighbouring_passes_of_one_layer(layer_of_pass, most):
    runs = list(loop._runs(layer_of_pass, most))
    assert [index for first, last in runs for index in range(first, last)] == list(range(len(layer_of_pass)))
    for first, last in runs:
        assert 1 <= last - first <= most
        assert len(set(layer_of_pass[first:last])) == 1
    for (first, last), (_, following) in pairwise(runs):
        could_be_one = layer_of_pass[first] == layer_of_pass[following - 1] and following - first <= most
        assert not could_be_one or last - first == most


@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gathered_passes_give_the_gradients_of_single_ones(recompute, groups, device, monkeypatch):
    lengths = [5, 0, 12]
    given = options(num_groups=groups, recompute=recompute, hidden_dropout_p=0.2)
    given = given._replace(seed=torch.tensor(random.getrandbits(62), device=device))
    hidden, weights = torch.randn(17, WIDTH).to(device), [w.to(device) for w in parameters(groups)]
    arguments = (hidden, weights, offsets(lengths, device), max(lengths), given, torch.randn(17, WIDTH).to(device))
    results = []
    for gathered in (17, 2 * 17 + 5):
        monkeypatch.setattr(loop, "GATHERED_TOKENS", gathered)
        results.append(gradients(*arguments))
    assert_same_bits(gradients(*arguments), results[-1])
    if device.type == "cpu":  # compilers may fuse a product and a sum in a kernel that writes the next input, too
        # Gradients of vectors but for queries' and values' biases do not see what is gathered.
        of_passes = [f"{16 * group + i:02}" for group in range(groups) for i in (3, 7, 8, 9, 11, 13, 14, 15)]
        assert_same_bits(*({name: result[name] for name in of_passes} for result in results))
    biases_of_keys = {f"{16 * group + 3:02}": 1.0 for group in range(groups)}  # zero but for rounding
    assert_all_close(results[0], results[1], 1e-5, scales=biases_of_keys)
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "reference")
    assert_all_close(results[0], gradients(*arguments), 1e-4, scales=biases_of_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_biases_of_keys_have_no_gradient(dtype, device):
    """Exact zeros, with a bias of the scores and dropout of the probabilities."""
    seed, bias = torch.tensor(random.getrandbits(62), device=device), torch.randn(2, HEADS, 9, 9).to(device, dtype)
    given = options(attention_dropout_p=0.3, seed=seed, bias=bias)
    hidden, weights = torch.randn(13, WIDTH).to(device, dtype), [w.to(device, dtype) for w in parameters()]
    found = gradients(hidden, weights, offsets([9, 4], device), 9, given, torch.randn(13, WIDTH).to(device, dtype))
    assert not found["03"].any()
    assert all(found[name].any() for name in ("01", "05"))


def test_sums_once_for_all_passes(device, monkeypatch):
    """Launches of backward: one for the sums of each kind of vector, inputs of passes by the LayerNorms before them."""
    monkeypatch.setattr(loop, "GATHERED_TOKENS", 3 * 8)
    hidden, weights = torch.randn(8, WIDTH, device="meta"), [w.to("meta") for w in parameters()]
    arguments = (weights, offsets([8], device).to("meta"), 8, options(num_layers=6))
    with launch.recording():
        _, kept = loop.encoder(hidden, *arguments)
    with launch.recording() as launches:
        loop.encoder_backward(hidden, kept, *arguments)
    names = [recorded.kernel.__name__ for recorded in launches]
    counts = {"column_sum_kernel": 4, "strip_sum_kernel": 2, "layer_norm_apply_kernel": 1, "gelu_backward_kernel": 6}
    assert {name: names.count(name) for name in counts} == counts


def test_tokens_of_no_row_disturb_nobody(device):
    """Fixed capacity: what lies beyond the last row is computed, and gives nothing."""
    lengths, spare = [7, 4], 6
    cu_seqlens = offsets(lengths, device)
    hidden, weights = torch.randn(11 + spare, WIDTH).to(device), [w.to(device) for w in parameters()]
    upstream = torch.randn(11 + spare, WIDTH).to(device)
    upstream[11:] = 0.0
    whole = gradients(hidden, weights, cu_seqlens, 7, options(), upstream)
    exact = gradients(hidden[:11], weights, cu_seqlens, 7, options(), upstream[:11])
    assert torch.isfinite(whole["output"]).all()
    whole["output"], whole["hidden"] = whole["output"][:11], whole["hidden"][:11]
    assert_all_close(whole, exact, 1e-5, scales={"03": 1.0})


def test_parameters_in_another_dtype_than_the_products(device):
    """As under autocast: gradients of float32 parameters are float32, and were never rounded to float16."""
    hidden, weights = torch.randn(9, WIDTH).to(device), [w.to(device) for w in parameters()]
    upstream = torch.randn(9, WIDTH).to(device)
    exact = gradients(hidden, weights, offsets([9], device), 9, options(), upstream)
    with torch.autocast(device.type, torch.float16):
        half = gradients(hidden.half(), weights, offsets([9], device), 9, options(), upstream.half())
    for name, tensor in half.items():
        assert tensor.dtype == (torch.float16 if name in ("output", "hidden") else torch.float32)
    assert not all(torch.equal(half[name], half[name].half().float()) for name in ("00", "08"))
    assert_all_close({n: t.float() for n, t in half.items()}, exact, 2e-2, scales={"03": 1.0})


@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
def test_autocast_changes_nothing_within(recompute, device):
    """Forward or backward: what the kernels are given is in the dtype of the tokens, products and all."""
    hidden, weights = torch.randn(9, WIDTH).to(device), [w.to(device) for w in parameters()]
    given = options(recompute=recompute, return_all=True)
    upstream = torch.randn(given.num_layers + 1, 9, WIDTH).to(device)
    arguments = (hidden, weights, offsets([9], device), 9, given, upstream)
    without = gradients(*arguments)
    with torch.autocast(device.type, torch.bfloat16):
        under = gradients(*arguments)
    assert all(tensor.dtype == torch.float32 for tensor in under.values())
    assert_same_bits(under, without)


def test_the_operators_where_autograd_tracks_no_views(device):
    """Under a dispatch mode, as opcheck has one: results are whole, and share no memory."""
    hidden, weights = torch.randn(5, WIDTH).to(device), [w.to(device) for w in parameters()]
    given = options(num_layers=2, return_all=True)
    upstream = torch.randn(3, 5, WIDTH).to(device)
    arguments = (hidden, weights, offsets([5], device), 5, *given.of_training())
    check_operator(torch.ops.albert_fast.encoder.default, arguments)
    _, kept = torch.ops.albert_fast.encoder(*arguments)
    backward = (upstream, kept, *arguments[1:])
    check_operator(torch.ops.albert_fast.encoder_backward.default, backward, tuple(range(len(backward))))


def test_inference_mode(device):
    hidden, weights = torch.randn(5, WIDTH).to(device), [w.to(device) for w in parameters()]
    arguments = (hidden, weights, offsets([5], device), 5, options(return_all=True))
    expected = loop.encoder_inference(*arguments)
    with torch.inference_mode():
        assert torch.equal(loop.encoder_inference(*arguments), expected)


def test_no_tensor_of_the_size_of_all_passes_beside_what_is_kept(device, monkeypatch):
    monkeypatch.setattr(loop, "GATHERED_TOKENS", 1)
    made: list[int] = []
    new_empty: Callable[..., Tensor] = torch.Tensor.new_empty

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = new_empty(self, *args, **kwargs)
        made.append(result.numel())
        return result

    hidden, weights = torch.randn(40, WIDTH).to(device), [w.to(device) for w in parameters()]
    monkeypatch.setattr(torch.Tensor, "new_empty", watched)
    kept = loop.encoder(hidden, weights, offsets([40], device), 40, options())[1]
    made.clear()
    loop.encoder_backward(hidden, kept, weights, offsets([40], device), 40, options())
    assert max(made) <= 40 * max(INTERMEDIATE, 3 * WIDTH)
