"""How many operations the real tokens need, and how fast a device can do them.

MFU, the share of the possible that a run gets, is

    flops(config, lengths, training=True, labelled=labelled).total / (seconds * peak_flops(device, dtype) * ranks)

with the real tokens' lengths and the labelled tokens of all ranks.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from albert_fast import backends, devices, native
from albert_fast.config import AlbertConfig
from albert_fast.prepared import pack

# Activations, weights: [m, k] x [k, n]. Sizes at which libraries do well; the best of them counts.
_CPU_SIZES = ((512, 768, 3072), (1024, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048))
_GPU_SIZES = ((4096, 4096, 4096), (8192, 8192, 8192))

# Each size is repeated for this long, in seconds, and at least three times.
_PROBE_SECONDS = 0.2

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# Dense TFLOP/s of NVIDIA's data sheets (GeForce: of its white papers, sums in float32), where they print those with
# sparsity half of them: float16, bfloat16, TF32, float32. By words of the name that PyTorch gives; the first that fits.
_DATA_SHEETS: dict[str, tuple[float | None, ...]] = {
    "gb200": (2500, 2500, 1250, 80),
    "b200": (2250, 2250, 1125, 75),
    "h200 nvl": (836, 836, 418, 60),
    "h200": (989, 989, 494, 67),
    "gh200": (989, 989, 494, 67),
    "h100 nvl": (836, 836, 418, 60),
    "h100 pcie": (756, 756, 378, 51),
    "h100 hbm2e": (756, 756, 378, 51),
    "h100": (989, 989, 494, 67),  # SXM, "H100 80GB HBM3"
    "a100": (312, 312, 156, 19.5),
    "a30": (165, 165, 82, 10.3),
    "a40": (149.7, 149.7, 74.8, 37.4),
    "a10": (125, 125, 62.5, 31.2),
    "l40s": (362, 362, 183, 91.6),
    "l40": (181, 181, 90.5, 90.5),
    "l4": (121, 121, 60, 30.3),
    "rtx 5090": (209.5, 209.5, 104.8, 104.8),
    "rtx 4090": (165.2, 165.2, 82.6, 82.6),
    "rtx 3090": (71, 71, 35.6, 35.6),
    "v100 sxm2": (125, None, None, 15.7),
    "v100 pcie": (112, None, None, 14),
    "t4": (65, None, None, 8.1),
}


@dataclass(frozen=True)
class Operations:
    """Floating-point operations.

    Attributes:
        products: of activations with weights.
        attention: of activations with each other: the scores, and the probabilities times the values.
    """

    products: int
    attention: int

    @property
    def total(self) -> int:
        return self.products + self.attention


def flops(config: AlbertConfig, lengths: Sequence[int], training: bool, labelled: int) -> Operations:
    """Floating-point operations that the real tokens need; a multiply and an add are two.

    Only matrix products count, and each use of the shared layer does: 6 operations a parameter and token, the usual
    rule, is 8 to 21 times too low for ALBERT. Backward is twice forward; nothing is computed twice.

    Args:
        config: the model's shape.
        lengths: real tokens of each row.
        training: forward and backward, in place of forward alone.
        labelled: tokens whose logits are computed.
    """
    hidden, embedding = config.hidden_size, config.embedding_size
    tokens = sum(lengths)
    passes = config.num_hidden_layers * config.inner_group_num
    projections = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    attention = sum(4 * length**2 * hidden for length in lengths)
    head = labelled * 2 * (hidden * embedding + embedding * config.vocab_size)
    products = 2 * tokens * embedding * hidden + passes * projections + head
    times = 3 if training else 1
    return Operations(times * products, times * passes * attention)


def peak_flops(device: torch.device, dtype: torch.dtype, *, exceeded: float = 0.0) -> float | None:
    """Operations a second that matrix products can have at best: the denominator of MFU.

    A GPU's is that of the data sheet, by the device's name; float32 counts as TF32 where products may use it
    (`torch.backends.cuda.matmul.fp32_precision`). A CPU's is measured, with the threads that are set: a second
    or two, once.

    Args:
        device: where the products run.
        dtype: of their operands: bfloat16 under autocast.
        exceeded: a rate that was reached. What was measured on a CPU while others had a share of it may be less: it is
            measured again then, and the largest rate counts.

    Returns:
        None where the device or the dtype is not known.
    """
    if device.type == "cuda":
        tf32 = dtype == torch.float32 and devices.allows_tf32()
        return data_sheet(torch.cuda.get_device_name(device), "tf32" if tf32 else dtype)
    if device.type == "cpu" and dtype in _FLOATS:
        kind = dtype, torch.get_num_threads()
        if not exceeded < _measured.get(kind, 0.0):
            _measured[kind] = max(_measured.get(kind, 0.0), _fastest_rate(dtype))
        return _measured[kind]
    return None


_measured: dict[tuple[torch.dtype, int], float] = {}  # by dtype and threads


def data_sheet(name: str, numbers: torch.dtype | str) -> float | None:
    """Dense operations a second by NVIDIA's data sheet, of float16, bfloat16 and float32 or of "tf32".

    None for a GPU that is not in the table, a part of one (MIG), or a slower one of the same name (Laptop, Max-Q, D).
    """
    words = set(re.split("[^a-z0-9]+", name.lower()))
    if words & {"mig", "laptop", "max", "d"}:
        return None
    for model, rates in _DATA_SHEETS.items():
        if words.issuperset(model.split()):
            rate = dict(zip((torch.float16, torch.bfloat16, "tf32", torch.float32), rates, strict=True)).get(numbers)
            return None if rate is None else rate * 1e12
    return None


def _fastest_rate(dtype: torch.dtype) -> float:
    """That of a CPU's fastest call: sharing the machine with others makes it no slower than it is."""
    m, k, n = _CPU_SIZES[0]
    cpu = torch.device("cpu")
    return max(2 * m * k * n / min(_call_seconds(product, cpu)) for product in _products(dtype, cpu, m, k, n))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The best sustained rate of a matrix product here, in operations a second, with the threads that are set.

    Sustained: the median of the calls that follow each other for a while; the fastest of them may have had a clock that
    does not last. Whose product it is, and of what size, does not matter: torch's, or this package's own where the
    `cpu` backend has one. For int8 that is u8 x s8, torch's through oneDNN.
    """
    sizes = _GPU_SIZES if device.type == "cuda" else _CPU_SIZES
    rates = (
        2 * m * k * n / statistics.median(_call_seconds(product, device))
        for m, k, n in sizes
        for product in _products(dtype, device, m, k, n)
    )
    return max(rates)


def _call_seconds(product: Callable[[], object], device: torch.device) -> list[float]:
    product()
    calls = 10 if device.type == "cuda" else 1  # one call is too short for a GPU's clock
    seconds: list[float] = []
    end = time.perf_counter() + _PROBE_SECONDS
    while len(seconds) < 3 or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            product()
        _synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def _products(dtype: torch.dtype, device: torch.device, m: int, k: int, n: int) -> Iterator[Callable[[], object]]:
    """Products [m, k] x [k, n] with the weight prepared."""
    given = torch.float32 if dtype == torch.int8 else dtype
    x, weight = (torch.randn(shape, device=device).to(given) for shape in ((m, k), (n, k)))
    if dtype == torch.int8:
        yield _onednn_int8(x, weight)
    else:
        yield lambda: torch.nn.functional.linear(x, weight)
    native_product = device.type == "cpu" and backends.CPU.unavailable() is None and native.load() is None
    if native_product and dtype != torch.float16:
        (packed,), y = pack([weight], dtype), x.new_empty(m, n)
        yield lambda: torch.ops.albert_fast_native.product(x, packed, y)


def _onednn_int8(x: Tensor, weight: Tensor) -> Callable[[], object]:
    quantized = x.mul(20).clamp(0, 255).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight.mul(20).clamp(-127, 127).to(torch.int8), list(x.shape))
    scales, zeros = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)
    rest: tuple[Any, ...] = (1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(quantized, *rest)
