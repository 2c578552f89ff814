"""How fast this machine multiplies matrices and moves memory: what floors are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from albert_fast.bench.formats import FORMATS, Format
from albert_fast.bench.work import Work
from albert_fast.bench.worker import with_threads
from albert_fast.flops import Operations, matrix_rate

# Copies of each size are repeated at least for so long and so often, but not for longer, in seconds: where others
# compute a copy may wait for them for thousands of times as long as it takes.
_COPY_SECONDS, _LEAST_COPIES, _MOST_COPY_SECONDS = 0.05, 30, 0.5


def floor(operations: Operations, numbers: Format, rates: Mapping[torch.dtype, float]) -> float:
    """Seconds that the operations need at least, at the matrix rate of the numbers that they are done in.

    In int8 only the products with weights are: attention counts at bfloat16's rate.
    """
    return operations.products / rates[numbers.products] + operations.attention / rates[numbers.attention]


class Rates:
    """The best rates that a run has seen: a machine that others use shows them at times only.

    Attributes:
        products: operations a second, by number of threads and dtype.
        copies: bytes a second, read and written, by number of threads and how many are moved, in powers of two: what
            fits a cache moves faster.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.products: dict[int, dict[torch.dtype, float]] = {}
        self.copies: dict[tuple[int, int], float] = {}

    def probe(self, work: Work, again: bool = False) -> None:
        """Raises the rates that the work's floor needs to what is seen now; of products, which take seconds to probe,
        only where there are none yet, or `again`."""
        with with_threads(work.threads) as threads:
            if work.gflop and (again or not self._knows_products(work, threads)):
                rates = self.products.setdefault(threads, {})
                numbers = FORMATS[work.dtype]
                for dtype in dict.fromkeys((numbers.products, numbers.attention)):
                    rates[dtype] = max(rates.get(dtype, 0.0), matrix_rate(dtype, self.device))
            if work.megabytes:
                size = _power(work.megabytes * 1e6)
                self.copies[threads, size] = max(self.copies.get((threads, size), 0.0), copy_rate(size, self.device))

    def _knows_products(self, work: Work, threads: int) -> bool:
        numbers = FORMATS[work.dtype]
        return {numbers.products, numbers.attention} <= self.products.get(threads, {}).keys()

    def floor_milliseconds(self, work: Work) -> float | None:
        """The longer of computing and moving; None where neither is known of the work."""
        threads = work.threads or torch.get_num_threads()
        seconds = []
        if work.gflop:
            attention = round(work.attention_gflop * 1e9)
            operations = Operations(round(work.gflop * 1e9) - attention, attention)
            seconds.append(floor(operations, FORMATS[work.dtype], self.products[threads]))
        if work.megabytes:
            seconds.append(work.megabytes * 1e6 / self.copies[threads, _power(work.megabytes * 1e6)])
        return max(seconds) * 1e3 if seconds else None


def copy_rate(size: int, device: torch.device) -> float:
    """Bytes a second, read and written together, of the fastest copy that moves `size` bytes in all."""
    source = torch.zeros(max(1, size // 8), device=device)  # float32, half of it read and half written
    target = torch.empty_like(source)
    seconds: list[float] = []
    first = time.perf_counter()
    while (spent := time.perf_counter() - first) < _COPY_SECONDS or len(seconds) < _LEAST_COPIES:
        if seconds and spent > _MOST_COPY_SECONDS:
            break
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 8 * source.numel() / min(seconds)


def _power(size: float) -> int:
    """The power of two below."""
    return 1 << max(10, int(size).bit_length() - 1)
