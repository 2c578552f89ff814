"""The CUDA C++ kernels: parity, the same bits each time, and what is declined.

Without a GPU the kernels' own source runs on the CPU (csrc/cuda/host.h), with every thread of every block, in an order
drawn anew, and what they do to memory is watched: that a barrier is missing shows there. With one the same tests run on
it.
"""

import os
import random
import warnings
from ctypes import CDLL
from dataclasses import replace

import cuda_on_cpu
import pytest
import torch
from ops.parity import assert_as_accurate_as, oracle_inputs
from ops.test_encoder import Case
from torch import Tensor

from albert_fast import AlbertConfig, AlbertModel, backends, cuda_backend, native, native_cuda
from albert_fast.backends import Call, EncoderSizes
from albert_fast.ops import encoder

SHARED_BYTES = 227 * 1024

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and native.compiler() is None, reason="neither a GPU nor a C++ compiler"
)


@pytest.fixture(autouse=True)
def on_cpu_without_gpu(monkeypatch, device):
    monkeypatch.setattr(cuda_backend, "_reasons", {})
    monkeypatch.setattr(cuda_backend, "_fit_alone", {})
    monkeypatch.setenv("ALBERT_FAST_CLUSTER", "0")
    if device.type == "cpu":
        monkeypatch.setenv("ALBERT_FAST_CUDA_ON_CPU", "1")


def machine(
    device,
    multiprocessors: int,
    clusters: bool,
    shared_bytes: int = SHARED_BYTES,
    *,
    words: bool = False,
    watched: bool = True,
) -> None:
    """What the CPU is to be; a GPU stays what it is, with clusters used or not."""
    os.environ["ALBERT_FAST_CLUSTER"] = "0" if clusters else "1"  # until the fixture undoes it
    if words:
        del os.environ["ALBERT_FAST_CLUSTER"]
    if device.type == "cpu":
        seed = random.getrandbits(31)
        native_cuda.load().albert_host_machine(multiprocessors, shared_bytes, clusters, seed, watched)


def served(case: Case, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Tensor] | None = None) -> Tensor:
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "cuda")
    hidden, *parameters = (tensors or case.tensors).values()
    with torch.inference_mode():
        output = encoder(hidden, parameters, case.cu_seqlens, case.max_seqlen, **case.options)
    monkeypatch.delenv("ALBERT_FAST_BACKEND")
    return output


def check(case: Case, output: Tensor) -> None:
    oracle = case.formula(**oracle_inputs(case.tensors))
    dtype = case.tensors["hidden"].dtype
    peer = case.formula(**{name: tensor.to(dtype) for name, tensor in case.tensors.items()})
    real = int(case.cu_seqlens[-1])  # the formula has zeros beyond the rows
    assert_as_accurate_as(output[..., :real, :], peer[..., :real, :], oracle[..., :real, :])


# With how many multiprocessors the CPU plays them without clusters.
SHAPES = {
    "two heads": (3, {"lengths": [5, 0, 1, 15], "hidden": 64, "inner": 128}),
    "odd counts": (5, {"lengths": [17, 2], "hidden": 96, "inner": 160, "num_heads": 3}),
    "wide heads": (6, {"lengths": [33], "hidden": 128, "inner": 96, "num_heads": 1, "num_layers": 1}),
    "many chunks": (17, {"lengths": [3], "hidden": 32, "inner": 1088, "num_heads": 1, "num_layers": 1}),
}
# What the kernel has instances for, hidden, inner and heads: on the CPU small ones play those of ALBERT base.
COMPILED_SIZES = {"cpu": (64, 96, 2), "cuda": (768, 3072, 12)}
parametrize_clusters = pytest.mark.parametrize("clusters", [False, True], ids=["no clusters", "clusters"])


@parametrize_clusters
@pytest.mark.parametrize("shape", SHAPES)
def test_parity(shape, clusters, device, monkeypatch):
    multiprocessors, sizes = SHAPES[shape]
    machine(device, 24 if clusters and multiprocessors > 8 else 8 if clusters else multiprocessors, clusters)
    for dtype in random.sample([torch.bfloat16, torch.float16], 2 if shape == "two heads" else 1):
        case = Case(**sizes, dtype=dtype, device=device)
        check(case, served(case, monkeypatch))


def test_more_heads_than_clusters(device, monkeypatch):
    machine(device, 8, True)
    case = Case([9, 8], 160, 64, num_heads=5, num_layers=1, dtype=torch.bfloat16, device=device)
    check(case, served(case, monkeypatch))


def test_parity_over_several_clusters(device, monkeypatch):
    machine(device, 19, True)  # two clusters, and blocks that are of none
    case = Case([30, 1, 20], 128, 96, num_heads=4, dtype=torch.float16, device=device)
    check(case, served(case, monkeypatch))


def test_parity_of_as_many_tokens_as_it_serves(device, monkeypatch):
    machine(device, 5, False)
    lengths = [63, 1, 64]
    random.shuffle(lengths)
    case = Case(lengths, 32, 32, num_heads=1, num_layers=1, dtype=torch.bfloat16, device=device)
    check(case, served(case, monkeypatch))


@parametrize_clusters
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled sizes", "any sizes"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 8])
def test_parity_of_all_counts_of_tiles(tiles, compiled, clusters, device, monkeypatch):
    """Warps share out tiles first and then the sums."""
    machine(device, 8 if clusters else 3, clusters)
    hidden, inner, heads = COMPILED_SIZES[device.type] if compiled else (32, 64, 1)
    tokens = 16 * tiles - random.randrange(16)
    lengths = [n for n in (tokens // 3, 1, tokens - tokens // 3 - 1) if n > 0]
    case = Case(lengths, hidden, inner, num_heads=heads, dtype=torch.bfloat16, device=device)
    check(case, served(case, monkeypatch))
    if device.type == "cpu":
        instance = 0 if not compiled else 1 if clusters else 3 if tiles == 1 else 2
        assert native_cuda.load().albert_host_instance() == instance


# What the instance that waits for words in place of barriers has, up to 16 tokens.
SIZES_OF_WORDS = {"cpu": (128, 256, 2), "cuda": (768, 3072, 12)}


def case_of_words(device, lengths: list[int], *, watched: bool = True, **options) -> Case:
    """With a machine for it."""
    machine(device, random.randrange(16, 20), True, words=True, watched=watched)
    hidden, inner, heads = SIZES_OF_WORDS[device.type]
    return Case(lengths, hidden, inner, num_heads=heads, device=device, **{"dtype": torch.bfloat16, **options})


def assert_served_by_words(device, served: bool = True) -> None:
    if device.type == "cpu":
        assert (native_cuda.load().albert_host_instance() == 4) == served


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([16], {"num_layers": 3, "return_all": True}),
        ([1], {"num_layers": 1, "dtype": torch.float16}),
        ([3, 0, 1, 5], {"dtype": torch.float16, "return_all": True}),
        ([2, 4], {"activation": "relu", "beyond": 3}),
        ([9], {"activation": "gelu", "num_layers": 4}),
    ],
)
def test_parity_by_words(lengths, options, device, monkeypatch):
    case = case_of_words(device, lengths, **options)
    output = served(case, monkeypatch)
    assert_served_by_words(device)
    check(case, output)
    os.environ["ALBERT_FAST_CLUSTER"] = "1"
    check(case, served(case, monkeypatch))
    assert_served_by_words(device, served=False)


def test_words_of_ones_are_told(device, monkeypatch):
    """Memory that nobody has written yet reads as NaN; so may what a block computed, and what comes from outside."""
    case = case_of_words(device, [4, 3, 2], num_layers=2)
    ones = torch.tensor(-1, dtype=torch.int16, device=device).view(torch.bfloat16)
    case.tensors["hidden"][4:6] = ones
    output = served(case, monkeypatch)
    assert_served_by_words(device)
    assert output[4:7].isnan().all()
    assert output[:4].isfinite().all()
    assert output[7:].isfinite().all()
    for name in ("0.ffn.bias", "0.key.bias", "0.ffn_output.bias", "0.attention_norm.bias"):
        before, case.tensors[name] = case.tensors[name], torch.full_like(case.tensors[name], ones.item())
        case.tensors[name].copy_(ones)
        assert served(case, monkeypatch)[:4].isnan().all()
        case.tensors[name] = before


@pytest.mark.parametrize("reason", ["17 tokens", "other sizes", "no room", "few multiprocessors", "no clusters"])
def test_where_nothing_waits_for_words(reason, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("asks what the CPU plays")
    case = case_of_words(device, [17 if reason == "17 tokens" else 5], num_layers=1)
    if reason == "other sizes":
        case = Case([5], 128, 288, num_heads=2, num_layers=1, dtype=torch.bfloat16, device=device)
    elif reason == "no room":
        machine(device, 96, True)
        plan, shape = native_cuda.ResidentPlan(), native_cuda.Shape(128, 256, 2, 0, 0, 1, 0)
        assert native_cuda.load().albert_resident_plan_of(shape, plan) == 0
        machine(device, 96, True, plan.shared_bytes, words=True)
    elif reason == "few multiprocessors":
        machine(device, 15, True, words=True)
    elif reason == "no clusters":
        machine(device, 16, False, words=True)
    check(case, served(case, monkeypatch))
    assert_served_by_words(device, served=False)


def test_rows_of_one_value(device, monkeypatch):
    """The variance is then none at all, and not a little less."""
    machine(device, 8, True)
    case = Case([5, 9], 64, 96, dtype=torch.float16, device=device, num_layers=1)
    for name, tensor in case.tensors.items():
        if ".norm." not in name:
            tensor.fill_(100.0 if name.endswith("ffn_output.bias") else 0.0)
    output = served(case, monkeypatch)
    assert torch.equal(output, case.tensors["0.norm.bias"].expand_as(output))


def test_parity_with_little_room(device, monkeypatch):
    """A cluster's blocks then add up two tiles at a time."""
    if device.type == "cuda":
        pytest.skip("asks what the CPU plays")
    machine(device, 8, True)
    plan = native_cuda.ResidentPlan()
    library = native_cuda.load()
    assert library.albert_resident_plan_of(native_cuda.Shape(64, 64, 2, 0, 0, 0), plan) == 0
    norms = 4 * 64 * 4  # bytes that it would rather spare
    machine(device, 8, True, plan.shared_bytes - norms - 1)
    case = Case([60, 1, 20], 64, 64, num_heads=2, dtype=torch.bfloat16, device=device)
    check(case, served(case, monkeypatch))
    less = native_cuda.ResidentPlan()
    assert library.albert_resident_plan_of(native_cuda.Shape(64, 64, 2, 0, 0, 8), less) == 0
    assert less.shared_bytes < plan.shared_bytes - norms
    assert less.cluster == plan.cluster == 8


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations_and_all_states(activation, device, monkeypatch):
    machine(device, 3, False)
    options = {"activation": activation, "return_all": True, "num_layers": 3}
    case = Case([4, 7], 64, 96, dtype=torch.float16, device=device, **options)
    output = served(case, monkeypatch)
    check(case, output)
    assert torch.equal(output[0], case.tensors["hidden"])


def test_float32_parameters(device, monkeypatch):
    """As autocast gives them: rounded once, when they are read."""
    machine(device, 8, True)
    case = Case([4, 7], 64, 96, dtype=torch.float16, device=device)

    def run(hidden: Tensor, *parameters: Tensor) -> Tensor:
        options = case.full_options()
        return cuda_backend.encoder_inference(hidden, list(parameters), case.cu_seqlens, case.max_seqlen, options)

    hidden, *parameters = case.tensors.values()
    expected = run(hidden, *parameters)
    assert torch.equal(run(hidden, *(p.float() for p in parameters)), expected)
    between = [p.float() * (1 + torch.finfo(p.dtype).eps / 8) for p in parameters]  # rounds to the same
    assert_as_accurate_as(run(hidden, *between), expected, expected.cpu().double())
    mixed = [p.float() if i % 3 else p for i, p in enumerate(parameters)]
    assert torch.equal(run(hidden, *mixed), expected)


def test_tensors_that_lie_badly(device, monkeypatch):
    machine(device, 4, False)
    case = Case([6], 64, 96, dtype=torch.float16, device=device)
    expected = served(case, monkeypatch)

    def shifted(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    for change in (shifted, lambda x: x.t().contiguous().t() if x.ndim == 2 else x.repeat_interleave(2)[::2]):
        moved = {name: change(tensor) for name, tensor in case.tensors.items()}
        assert torch.equal(served(case, monkeypatch, moved), expected)


@pytest.mark.parametrize("tokens", [64, 65])
def test_few_tokens_take_no_clusters(tokens, device, monkeypatch):
    machine(device, 8, True)
    monkeypatch.delenv("ALBERT_FAST_CLUSTER")
    case = Case([tokens], 64, 96, dtype=torch.bfloat16, device=device)
    check(case, served(case, monkeypatch))
    if device.type == "cpu":
        assert native_cuda.load().albert_host_instance() == (2 if tokens == 64 else 1)


def test_graphs_of_many_tokens_are_for_others(device):
    machine(device, 8, True)
    sizes = EncoderSizes(17, 64, 96, 2, 1, False, False)
    call = Call("encoder", device, torch.bfloat16, 32, "gelu_new", sizes=sizes)
    assert cuda_backend.declines(call) is None
    with backends.for_graphs():
        assert "CUDA graph" in cuda_backend.declines(call)
        assert cuda_backend.declines(replace(call, sizes=sizes._replace(tokens=16))) is None
    assert cuda_backend.declines(call) is None


@pytest.mark.parametrize(
    ("tokens", "clusters", "words"), [(16, False, False), (17, False, False), (16, True, False), (16, False, True)]
)
def test_same_bits_each_time(tokens, clusters, words, device, monkeypatch):
    """Whatever order the threads take: 100 times on the CPU, 10,000 on a GPU."""
    lengths = [3, tokens - 3]
    if words:
        case = case_of_words(device, lengths, watched=False, num_layers=1, dtype=torch.float16)
    else:
        machine(device, 8 if clusters else 3, clusters, watched=False)
        hidden, inner, heads = COMPILED_SIZES[device.type]
        case = Case(lengths, hidden, inner, num_heads=heads, num_layers=1, dtype=torch.float16, device=device)
    first = served(case, monkeypatch)
    assert_served_by_words(device, served=words)
    for _ in range(10_000 if device.type == "cuda" else 10 if clusters else 100):
        assert torch.equal(served(case, monkeypatch), first)


@pytest.fixture(scope="module")
def library_of_base(tmp_path_factory) -> CDLL:
    """The machine with the kernels' instances as a GPU has them, of ALBERT base."""
    folder = tmp_path_factory.mktemp("base")
    return native_cuda.open_library(cuda_on_cpu.build(folder, None, "-DALBERT_SIZES_OF_BASE"))


@pytest.mark.slow
@pytest.mark.parametrize(("instance", "tokens"), [(1, 80), (2, 40), (3, 16), (4, 16)])
def test_albert_base_as_a_gpu_has_it(instance, tokens, library_of_base, device, monkeypatch):
    """On the CPU as many threads as there, watched: some minutes."""
    if device.type == "cuda":
        pytest.skip("the other tests are of these instances there")
    monkeypatch.setattr(native_cuda, "load", lambda: library_of_base)
    machine(device, 132 if instance in (1, 4) else 108, instance in (1, 4), words=instance == 4)
    case = Case([3, 0, tokens - 3], 768, 3072, num_heads=12, num_layers=2, dtype=torch.bfloat16, device=device)
    check(case, served(case, monkeypatch))
    assert library_of_base.albert_host_instance() == instance


def test_rows_beyond_the_last_sequence(device, monkeypatch):
    machine(device, 4, False)
    case = Case([5, 9], 64, 64, beyond=6, dtype=torch.float16, device=device)
    output = served(case, monkeypatch)
    check(case, output)
    assert output.isfinite().all()


@pytest.mark.parametrize("offsets", [[0, 50, 3], [-7, 2, 100], [9, 4, 0], [2**31 - 1, -(2**31), 5]])
def test_offsets_that_are_none_are_not_followed(offsets, device, monkeypatch):
    machine(device, 3, False)
    case = Case([5, 9], 64, 64, dtype=torch.float16, device=device)
    call = cuda_backend.encoder_inference
    hidden, *parameters = case.tensors.values()
    wrong = torch.tensor(offsets, dtype=torch.int32, device=device)
    assert call(hidden, parameters, wrong, 10, case.full_options()).isfinite().all()


def test_a_nan_stays_in_its_sequence(device, monkeypatch):
    """Sequences that share the rows of one matrix instruction, and their keys one chunk of another."""
    machine(device, 4, False)
    case = Case([3, 5, 20], 64, 64, dtype=torch.float16, device=device)
    case.tensors["hidden"][4, 5] = float("nan")
    output = served(case, monkeypatch)
    assert output[3:8].isnan().all()
    assert output[:3].isfinite().all()
    assert output[8:].isfinite().all()


def test_a_model(device, monkeypatch):
    """The whole of it, padded, with the reference beside the kernel."""
    machine(device, 4, False)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "embedding_size": 16, "vocab_size": 99}
    config = AlbertConfig(**sizes, num_attention_heads=2, num_hidden_layers=3)
    model = AlbertModel(config).eval().to(device, torch.bfloat16)
    input_ids = torch.randint(5, 99, (3, 11), device=device)
    mask = torch.arange(11, device=device) < torch.tensor([[11], [4], [1]], device=device)
    asked = []

    def declines(call: Call) -> str | None:
        asked.append((call.operation, reason := cuda_backend.declines(call)))
        return reason

    def run(*chosen: backends.Backend) -> Tensor:
        monkeypatch.setattr(backends, "BACKENDS", list(chosen))
        with torch.inference_mode():
            return model(input_ids, attention_mask=mask).last_hidden_state

    cuda = backends.Backend("cuda", cuda_backend.unavailable, declines, cuda_backend.load)
    actual, expected = run(cuda, backends.REFERENCE), run(backends.REFERENCE)
    assert ("encoder", None) in asked
    exact = model.double()
    assert_as_accurate_as(actual, expected, run(backends.REFERENCE).cpu())
    assert exact is model


# ------------------------------------------------------------------------------------------------------- what serves

SIZES = EncoderSizes(tokens=16, hidden=64, inner=96, heads=2, layers=1, has_bias=False, has_dropout=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": torch.device("meta")}, "tensors"),
        ({"operation": "attention"}, "inference alone"),
        ({"training": True}, "inference alone"),
        ({"dtype": torch.float32}, "not float32"),
        ({"activation": "silu"}, "not silu"),
        ({"quantized": True}, "int8"),
        ({"sizes": None}, "not known"),
        ({"sizes": SIZES._replace(tokens=129)}, "not 129"),
        ({"sizes": SIZES._replace(tokens=0)}, "not 0"),
        ({"sizes": SIZES._replace(layers=2)}, "not 2"),
        ({"sizes": SIZES._replace(has_bias=True)}, "bias"),
        ({"sizes": SIZES._replace(has_dropout=True)}, "dropout"),
        ({"sizes": SIZES._replace(hidden=72)}, "not 72"),
        ({"sizes": SIZES._replace(heads=4)}, "and 16"),
        ({"sizes": SIZES._replace(hidden=2048, inner=8192, heads=16)}, "not 2048"),
    ],
)
def test_declines(changes, message, device):
    machine(device, 8, True)
    call = Call("encoder", device, torch.bfloat16, 32, "gelu_new", sizes=SIZES)
    assert cuda_backend.declines(call) is None
    reason = cuda_backend.declines(Call(**{**vars(call), **changes}))
    assert reason is not None
    assert message in reason


LARGE = {"hidden": 1024, "inner": 4096, "heads": 16}


@pytest.mark.parametrize(
    ("sizes", "multiprocessors", "shared_kilobytes", "clusters", "fits"),
    [
        ({"hidden": 768, "inner": 3072, "heads": 12}, 108, 163, False, True),  # A100
        ({"hidden": 768, "inner": 3072, "heads": 12}, 132, 227, True, True),  # H100
        ({"hidden": 768, "inner": 2048, "heads": 12}, 84, 99, False, False),  # PL-BERT on an RTX A6000
        (LARGE, 108, 163, False, False),
        (LARGE, 132, 227, True, True),
        (LARGE, 148, 227, True, True),  # B200
    ],
)
def test_models_that_fit(sizes, multiprocessors, shared_kilobytes, clusters, fits, device):
    if device.type == "cuda":
        pytest.skip("asks what the CPU plays")
    machine(device, multiprocessors, clusters, shared_kilobytes * 1024)
    call = Call("encoder", device, torch.bfloat16, 64, "gelu_new", sizes=SIZES._replace(**sizes))
    reason = cuda_backend.declines(call)
    assert reason is None if fits else "does not fit" in reason


def test_without_a_compiler_the_next_backend_serves(tmp_path, device, monkeypatch):
    """After one warning, with the reason at hand."""
    monkeypatch.setenv("ALBERT_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    native_cuda._load.cache_clear()
    try:
        call = Call("encoder", device, torch.bfloat16, 32, "gelu_new", sizes=SIZES)
        with pytest.warns(RuntimeWarning, match=r"there is no .*install"):
            assert "there is no" in cuda_backend.declines(call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "there is no" in cuda_backend.declines(call)
    finally:
        native_cuda._load.cache_clear()


def test_wrong_architectures():
    with pytest.raises(native.BuildError, match=r"'sm_80' is none; 80, 90a or 100"):
        native_cuda.build(("sm_80",))
