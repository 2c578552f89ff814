"""Operations as PyTorch counts them, and the rates that they are held against."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from albert_fast import AlbertConfig, AlbertModel, flops

CPU = torch.device("cpu")

# The products that attention is made of, where PyTorch computes it with two of them.
BATCHED = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)


@pytest.fixture
def quick_probes(monkeypatch):
    """Products that take no time: nobody looks at the rate's value."""
    monkeypatch.setattr(flops, "_CPU_SIZES", ((64, 64, 64),) * 2)
    monkeypatch.setattr(flops, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(flops, "_measured", {})


def test_those_that_torch_counts():
    config = AlbertConfig(
        vocab_size=100,
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    lengths = [24, 7, 1]
    mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
    model = AlbertModel(config, add_pooling_layer=False).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(5, 100, (3, 24)) * mask, mask, output_attentions=True)
    products = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in products.items() if operation in BATCHED)
    counted = flops.flops(config, lengths, training=False, labelled=0)
    assert counter.get_total_flops() == counted.total
    assert attention == counted.attention


@pytest.mark.parametrize(("shape", "tera"), [("base", 0.292), ("large", 1.007), ("xlarge", 3.87), ("xxlarge", 7.58)])
def test_the_published_shapes(shape, tera):
    """TFLOP to train a sequence of 512 tokens, 15 % of them predicted."""
    config = getattr(AlbertConfig, shape)()
    counted = flops.flops(config, [512], training=True, labelled=77)
    assert counted.total == pytest.approx(tera * 1e12, rel=2e-3)


def test_a_rate_is_one_that_lasts_and_the_peak_is_the_fastest_call(monkeypatch, quick_probes):
    """Of several products the best one counts."""
    now = 0.0

    def product(*seconds):
        coming = itertools.cycle(seconds)

        def call():
            nonlocal now
            now += next(coming)

        return call

    monkeypatch.setattr(flops, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(flops, "_PROBE_SECONDS", 100.0)
    monkeypatch.setattr(flops, "_products", lambda *which: iter([product(1.0, 8.0, 8.0), product(3.0, 4.0, 4.0)]))
    assert flops.matrix_rate(torch.float32, CPU) == 2 * 64**3 / 4.0
    assert flops.peak_flops(CPU, torch.float32) == 2 * 64**3 / 1.0


def test_a_peak_that_was_exceeded_is_measured_again(monkeypatch, quick_probes):
    rates = iter([50.0, 40.0, 70.0])
    monkeypatch.setattr(flops, "_fastest_rate", lambda dtype: next(rates))
    asked = [flops.peak_flops(CPU, torch.float32, exceeded=rate) for rate in (0.0, 30.0, 60.0, 60.0, 69.0)]
    assert asked == [50.0, 50.0, 50.0, 70.0, 70.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_every_rate_is_found(dtype, quick_probes):
    assert flops.matrix_rate(dtype, CPU) > 0.0
    peak = flops.peak_flops(CPU, dtype)
    assert peak is None if dtype == torch.int8 else peak > 0.0


def test_the_peak_of_a_cpu_is_measured_once(monkeypatch):
    monkeypatch.setattr(flops, "_measured", {})
    asked = []
    fastest_rate = flops._fastest_rate
    monkeypatch.setattr(flops, "_fastest_rate", lambda dtype: asked.append(dtype) or fastest_rate(dtype))
    first = flops.peak_flops(CPU, torch.float32)
    assert flops.peak_flops(CPU, torch.float32) == first > 1e8
    assert asked == [torch.float32]


@pytest.mark.parametrize(
    ("name", "half", "full"),
    [
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 836, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 80GB HBM2e", 756, 51),
        ("NVIDIA H100 NVL", 836, 60),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla T4", None, 8.1),
        # Neither in the table nor like what is.
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None, None),
    ],
)
def test_data_sheets(name, half, full):
    for numbers, tera in ((torch.bfloat16, half), (torch.float32, full)):
        assert flops.data_sheet(name, numbers) == (None if tera is None else pytest.approx(tera * 1e12))
    assert flops.data_sheet(name, torch.int8) is None


def test_the_peak_of_a_gpu_is_its_data_sheet(monkeypatch):
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {cuda: "NVIDIA A100-SXM4-40GB"}[device])
    monkeypatch.setattr(flops.devices, "allows_tf32", lambda: False)
    assert flops.peak_flops(cuda, torch.float32) == 19.5e12
    monkeypatch.setattr(flops.devices, "allows_tf32", lambda: True)
    assert flops.peak_flops(cuda, torch.float32) == 156e12
    assert flops.peak_flops(cuda, torch.bfloat16) == flops.peak_flops(cuda, torch.float16) == 312e12
    assert flops.peak_flops(torch.device("meta"), torch.float32) is None
