"""The kernels of the masked-LM loss where the parity suite does not look: how the work is cut, odd sizes and strides,
labels that are no words, the range of float16."""

import importlib
import math
import random

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_same_bits, relative_error
from torch import Tensor

from albert_fast.kernels import masked_lm_loss as forward_kernels
from albert_fast.kernels import masked_lm_loss_table as backward_kernels
from albert_fast.kernels.labelled_tokens import labelled_tokens
from albert_fast.kernels.launch import recording
from albert_fast.kernels.masked_lm_loss import masked_lm_loss, masked_lm_loss_kept
from albert_fast.kernels.masked_lm_loss_table import masked_lm_loss_backward

IGNORED = -100
OPTIONS = {"plain": (0.0, 0.0), "smoothing": (0.1, 0.0), "z-loss": (0.0, 1e-2), "both": (0.2, 1e-3)}
# Against float64; float16 rounds dz and the sum of the table's rows.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3}

# Of a forward and a backward, in order; and PyTorch's operators that launch none (`to` does by `_to_copy`).
KERNELS = [
    "labelled_tokens_kernel",
    "masked_lm_loss_kernel",
    "merge_kernel",
    "loss_reduction_kernel",
    "gather_kernel",
    "table_gradient_kernel",
]
WITHOUT_KERNELS = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::view", "aten::detach", "aten::to"}

parametrize_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
parametrize_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def inputs(
    tokens: int, size: int, vocabulary: int, labelled: int, dtype: torch.dtype = torch.float32, device="cpu"
) -> tuple[Tensor, ...]:
    """x, table, bias, labels; logits of about the size that they have in training."""
    x, table = torch.randn(tokens, size), torch.randn(vocabulary, size) * 3.0 / math.sqrt(size)
    bias, labels = torch.randn(vocabulary), torch.full((tokens,), IGNORED)
    chosen = torch.randperm(tokens)[:labelled]
    labels[chosen] = torch.randint(vocabulary, chosen.shape)
    return x.to(device, dtype), table.to(device, dtype), bias.to(device, dtype), labels.to(device)


def run(
    tensors: tuple[Tensor, ...], grad_loss: Tensor, options: tuple[float, float], reduction: str = "none"
) -> dict[str, Tensor]:
    loss, reduced, logsumexp, correct, *kept = masked_lm_loss(*tensors, IGNORED, *options, reduction, True)
    grads = masked_lm_loss_backward(grad_loss, *tensors, logsumexp, *kept, IGNORED, *options, reduction)
    names = ("loss", "logsumexp", "correct", "token_grads", "x", "table", "bias", "reduced")
    return dict(zip(names, (loss, logsumexp, correct, kept[0], *grads, reduced), strict=True))


def expected(tensors: tuple[Tensor, ...], grad_loss: Tensor, options: tuple[float, float]) -> dict[str, Tensor]:
    """In float64, with all logits. A label that is no word is none of the columns."""
    x, table, bias = (tensor.to("cpu", torch.float64).requires_grad_() for tensor in tensors[:3])
    labels = tensors[3].cpu()
    smoothing, z_loss = options
    logits = F.linear(x, table, bias)
    logsumexp = logits.logsumexp(dim=-1)
    onehot = labels.unsqueeze(-1) == torch.arange(table.shape[0])
    target = torch.where(onehot, logits, 0.0).sum(dim=-1)
    labelled = labels != IGNORED
    loss = logsumexp - (1.0 - smoothing) * target + z_loss * logsumexp.square()
    if smoothing > 0.0:
        loss = loss - smoothing * logits.mean(dim=-1)
    loss = torch.where(labelled, loss, 0.0)
    (token_grads,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    grads = torch.autograd.grad(loss, (x, table, bias), grad_loss.to("cpu", torch.float64))
    return {
        "loss": loss.detach(),
        "logsumexp": torch.where(labelled, logsumexp, 0.0).detach(),
        "correct": (logits.argmax(dim=-1) == labels) & labelled,
        "token_grads": token_grads,
        **dict(zip(("x", "table", "bias"), grads, strict=True)),
    }


def check(
    tensors: tuple[Tensor, ...],
    options: tuple[float, float] = (0.0, 0.0),
    grad_loss: Tensor | None = None,
    tolerance: float | None = None,
) -> dict[str, Tensor]:
    """Runs, compares with float64, and returns what was found."""
    x, labels = tensors[0], tensors[3]
    grad_loss = torch.randn(x.shape[0], device=x.device) if grad_loss is None else grad_loss
    actual, right = run(tensors, grad_loss, options), expected(tensors, grad_loss, options)
    assert actual.pop("reduced").numel() == 0
    assert torch.equal(actual.pop("correct").cpu(), right.pop("correct"))
    if x.shape[1] > forward_kernels.MOST_COLUMNS:
        assert actual.pop("token_grads").numel() == 0
    for name, result in actual.items():
        error = relative_error(result, right[name])
        assert error <= (tolerance or TOLERANCES[x.dtype]), f"{name}: relative error {error:.3g}"
        if name in ("loss", "logsumexp", "token_grads", "x"):
            assert not result[labels == IGNORED].any(), f"{name} of tokens without a label"
    return actual


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_labelled_tokens(tokens, device):
    labels = torch.where(torch.rand(tokens) < 0.3, torch.randint(9, (tokens,)), -1).to(device)
    for ignore_index in (-1, 4, -7):
        positions, count = (torch.empty(size, dtype=torch.int32, device=device) for size in (tokens, 1))
        labelled_tokens(labels, ignore_index, positions, count)
        right = (labels != ignore_index).nonzero().squeeze(1)
        assert positions[: count.item()].tolist() == right.tolist()


@parametrize_dtype
@parametrize_options
def test_equals_float64(options, dtype, device):
    tokens, size, vocabulary, labelled = random.choice([(90, 33, 500, 67), (70, 16, 257, 70), (9, 128, 130, 1)])
    check(inputs(tokens, size, vocabulary, labelled, dtype, device), options)


@pytest.mark.parametrize("size", [1, 130, 257, 512, 513])
def test_any_number_of_columns(size, device):
    check(inputs(20, size, 70, 11, device=device), OPTIONS["both"])


@pytest.mark.parametrize("processors", [1, 2, 7])
def test_however_the_work_is_shared(processors, device, monkeypatch):
    """One program with all blocks of rows, blocks whose parts begin anywhere, several rounds, and rounds of nothing."""
    monkeypatch.setattr(forward_kernels, "_ROWS", 64 // processors)
    monkeypatch.setattr(forward_kernels, "multiprocessors", lambda device: processors)
    for labelled in (97, 5):
        tensors = inputs(100, 16, 700, labelled, device=device)
        results = masked_lm_loss(*tensors, IGNORED, *OPTIONS["both"], "none", True)
        loss, _, logsumexp, correct, token_grads, *_ = results
        right = expected(tensors, torch.ones(100), OPTIONS["both"])
        assert torch.equal(correct.cpu(), right["correct"])
        for name, result in {"loss": loss, "logsumexp": logsumexp, "token_grads": token_grads}.items():
            assert relative_error(result, right[name]) <= TOLERANCES[torch.float32], name


@parametrize_dtype
def test_twice_the_same_bits(dtype, device, unpoisoned_memory):
    tensors = inputs(60, 32, 300, 40, dtype, device)
    grad_loss = torch.randn(60, device=device)
    assert_same_bits(*(run(tensors, grad_loss, OPTIONS["both"]) for _ in range(2)))


def test_which_logit_is_the_first_largest(device):
    """Sure ones and unsure ones, and ties in the same tile and in others: of integers, so that they are exact."""
    x, table = torch.randint(-2, 3, (160, 16)), torch.randint(-2, 3, (300, 16))
    x[:80] //= 2  # a few logits share the largest value; of the others, one has nearly all of the probability
    bias = torch.randint(-2, 3, (300,))
    logits = x @ table.t() + bias
    labels = logits.sort(dim=-1, descending=True, stable=True).indices[torch.arange(160), torch.randint(3, (160,))]
    tensors = (tensor.to(device, torch.float32) for tensor in (x, table, bias))
    correct = masked_lm_loss(*tensors, labels.to(device), IGNORED, 0.0, 0.0, "none", False)[3].cpu()
    assert torch.equal(correct, labels == logits.argmax(dim=-1))
    assert correct.any()
    assert not correct.all()


@parametrize_options
def test_labels_that_are_no_words(options, device):
    x, table, bias, labels = inputs(60, 16, 200, 40, device=device)
    wrong = labels.clone()
    where = (labels != IGNORED).nonzero().squeeze(1)[:4]
    wrong[where] = torch.tensor([-1, 200, 2**40, -(2**62)], device=device)
    results = check((x, table, bias, wrong), options)
    assert all(result.isfinite().all() for result in results.values())


@parametrize_options
def test_biases_that_are_large_and_forbid_words(options, device):
    x, table, bias, labels = inputs(40, 16, 300, 40, device=device)
    bias = bias * 1e3
    bias[64:192] = -1e9 if options[0] > 0.0 else float("-inf")  # whole tiles
    bias[250] = -1e4 if options[0] > 0.0 else torch.finfo(torch.float32).min
    labels %= 64
    grad_loss = torch.randn(40, device=device)
    results = run((x, table, bias, labels), grad_loss, options)
    assert all(result.isfinite().all() for result in results.values())
    right = expected((x, table, bias, labels), grad_loss, options)
    for name in ("loss", "logsumexp", "x", "table", "bias"):
        # As exact as float32 holds logits of that size.
        assert relative_error(results[name], right[name]) <= 2e-3, name


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1e3])
def test_gradients_in_float16_keep_their_bits(scale, device):
    """Of 1 / tokens, of a loss scaled by GradScaler, and of tokens with gradients of different sizes."""
    x, table, bias, labels = inputs(90, 32, 400, 80, torch.float16, device)
    grad_loss = torch.randn(90, device=device) * scale
    grad_loss[::2] *= 1e-3
    # The table in float32, as under autocast: its gradient is not rounded to float16.
    tensors = (x, table.float(), bias.float(), labels)
    actual, right = run(tensors, grad_loss, OPTIONS["both"]), expected(tensors, grad_loss, OPTIONS["both"])
    for name in ("table", "bias"):
        assert actual[name].dtype == torch.float32
        assert relative_error(actual[name], right[name]) <= 1e-3, name


def test_infinite_gradients_are_not_hidden(device):
    tensors = inputs(20, 16, 100, 20, torch.float16, device)
    grad_loss = torch.ones(20, device=device)
    grad_loss[3] = float("inf")
    assert not run(tensors, grad_loss, OPTIONS["plain"])["table"].isfinite().all()
    grad_loss[3] = float("nan")
    assert not run(tensors, grad_loss, OPTIONS["plain"])["table"].isfinite().all()


def test_no_gradient_at_all_is_zero(device):
    tensors = inputs(40, 16, 100, 30, torch.float16, device)
    results = run(tensors, torch.zeros(40, device=device), OPTIONS["both"])
    assert not any(results[name].any() for name in ("x", "table", "bias"))


def test_strides(device):
    x, table, bias, labels = inputs(40, 32, 150, 30, device=device)
    grad_loss = torch.randn((), device=device).expand(40)
    wide = torch.stack([x, x], dim=1)[:, 0]  # rows apart
    transposed = table.t().contiguous().t()
    apart = tuple(torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (x, table, bias, labels))
    right = run((x, table, bias, labels), grad_loss.contiguous(), OPTIONS["both"])
    for tensors in ((wide, transposed, bias, labels), apart):
        assert_same_bits(run(tensors, grad_loss, OPTIONS["both"]), right)


@pytest.mark.parametrize("labelled", [0, 1, 170])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("size", "dtype"), [(32, torch.float32), (32, torch.float16), (513, torch.float32)], ids=str)
def test_reduced_on_the_device(size, dtype, reduction, labelled, device):
    """Tokens of several blocks of the sum, and the gradient of the number that comes of them."""
    tensors = inputs(170, size, 300, labelled, dtype, device)
    grad_loss = torch.randn((), device=device)
    results = run(tensors, grad_loss, OPTIONS["both"], reduction)
    divisor = max(1, labelled) if reduction == "mean" else 1
    right = expected(tensors, (grad_loss / divisor).expand(170), OPTIONS["both"])
    for name in ("x", "table", "bias"):
        assert relative_error(results[name], right[name]) <= TOLERANCES[dtype], name
    exact = results["loss"].double().sum() / divisor
    assert relative_error(results["reduced"], exact) <= 1e-6


def test_a_million_tokens_are_reduced(device):
    losses = torch.rand(2**20 + 77, device=device)
    count = torch.tensor([2**19 + 1], dtype=torch.int32, device=device)
    mean = torch.empty((), device=device)
    blocks = forward_kernels.REDUCTION_TILES.half[80][0].blocks
    forward_kernels.loss_reduction_kernel[(1,)](losses, count, mean, len(losses), MEAN=True, **blocks)
    assert relative_error(mean, losses.double().sum() / (2**19 + 1)) <= 1e-6


def test_without_training_no_gradients_are_kept(device):
    tensors = inputs(40, 32, 150, 30, device=device)
    options = (IGNORED, *OPTIONS["both"])
    *results, token_grads, positions, count = masked_lm_loss(*tensors, *options, "mean", True)
    *same, nothing, _, _ = masked_lm_loss(*tensors, *options, "mean", False)
    assert_same_bits(dict(enumerate(same)), dict(enumerate(results)))
    for training, kept in ((True, token_grads), (False, nothing)):
        shapes = [tensor.shape for tensor in masked_lm_loss_kept(tensors[0], training)]
        assert shapes == [kept.shape, positions.shape, count.shape]
    # A backward that is asked for all the same.
    grad_loss = torch.randn((), device=device)
    grads = (
        masked_lm_loss_backward(grad_loss, *tensors, results[2], kept, positions, count, *options, "mean")
        for kept in (token_grads, nothing)
    )
    assert_same_bits(*(dict(enumerate(some)) for some in grads))


@parametrize_dtype
def test_what_is_launched_does_not_depend_on_values(dtype):
    """On tensors without any: nothing can be waited for, and a CUDA graph can hold it."""
    x, table, labels = (
        torch.empty(1000, 128, dtype=dtype, device="meta"),
        torch.empty(30000, 128, dtype=dtype, device="meta"),
        torch.empty(1000, dtype=torch.int64, device="meta"),
    )
    with recording() as launches:
        run((x, table, table[:, 0], labels), torch.empty((), device="meta"), OPTIONS["both"], "mean")
    assert [launch.kernel.__name__ for launch in launches] == KERNELS


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_step_launches_these_kernels_and_none_of_pytorch(reduction, device, monkeypatch, unpoisoned_memory):
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "triton")
    module = importlib.import_module("albert_fast.ops.masked_lm_loss")
    monkeypatch.setattr(module, "values_can_be_read", lambda labels: False)  # as on a GPU
    x, table, bias, labels = inputs(40, 32, 150, 30, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, table, bias)]
    grad_loss = torch.ones((), device=device)
    with recording() as launches, torch.profiler.profile() as profile:
        loss = module.masked_lm_loss(*leaves, labels, ignore_index=IGNORED, reduction=reduction)
        torch.autograd.grad(loss, leaves, grad_loss)
    assert [launch.kernel.__name__ for launch in launches] == KERNELS
    operators = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
    assert operators <= WITHOUT_KERNELS


@pytest.mark.parametrize("block_e", [128, 256, 512])
def test_tiles_fit_the_buffers(block_e):
    def configs(tables):
        tiles = tables[block_e]
        return [
            tiles.interpreter,
            *(c for table in (tiles.half, tiles.single) for some in table.values() for c in some),
        ]

    for config in configs(forward_kernels.TILES):
        block_m, per_sm = config.blocks["BLOCK_M"], config.blocks["PER_SM"]
        assert block_m * per_sm <= forward_kernels._MOST_ROWS_IN_PROGRAMS
        assert forward_kernels._ROWS % block_m == 0
        assert all(block_m % merge.blocks["ROWS"] == 0 for merge in configs(forward_kernels.MERGE_TILES))
    for config in configs(backward_kernels.TILES):
        assert backward_kernels._PADDING.value % config.blocks["BLOCK_N"] == 0
