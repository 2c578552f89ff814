"""The floor: how many operations the real tokens need, and how fast this machine goes on multiplying matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from albert_fast import backends, native
from albert_fast.bench.formats import Format
from albert_fast.config import AlbertConfig
from albert_fast.prepared import pack

# Activations, weights: [m, k] x [k, n]. Sizes at which libraries do well; the best of them counts.
_CPU_SIZES = ((512, 768, 3072), (1024, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048))
_GPU_SIZES = ((4096, 4096, 4096), (8192, 8192, 8192))

# Each size is repeated for this long, in seconds, and at least three times.
_PROBE_SECONDS = 0.2


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


def floor(operations: Operations, numbers: Format, rates: Mapping[torch.dtype, float]) -> float:
    """Seconds that the operations need at least, at the matrix rate of the numbers that they are done in.

    In int8 only the products with weights are: attention counts at bfloat16's rate.
    """
    return operations.products / rates[numbers.products] + operations.attention / rates[numbers.attention]


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
        2 * m * k * n / _median_seconds(product, device)
        for m, k, n in sizes
        for product in _products(dtype, device, m, k, n)
    )
    return max(rates)


def _median_seconds(product: Callable[[], object], device: torch.device) -> float:
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
    return statistics.median(seconds)


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
