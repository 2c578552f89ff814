"""Attention alone, 8 x 512 with 12 heads of 64, on the CPU: GFLOP/s forward and backward, beside PyTorch's.

    python benchmarks/attention.py [--rows 8] [--length 512] [--repeats 30] [--json FILE]

Operations: 4 rows length² hidden forward (scores, and their product with the values), 10 backward (scores again, and
the gradients of probabilities, queries, keys and values). Taken in turn; medians. Parity first, as in the tests.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import albert_fast
from albert_fast import backends, ops
from albert_fast.bench.checkout import commit_of
from albert_fast.bench.formats import name_of
from albert_fast.bench.run import machine, versions

HEADS, HEAD_DIM = 12, 64


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn > 0:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(rows: int, length: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """A case of the report, with a row for each peer; ends the program where ours is wrong."""
    qkv = torch.randn(rows * length, 3, HEADS, HEAD_DIM).to(dtype).requires_grad_()
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32) * length
    query, key, value = (
        part.detach().reshape(rows, length, HEADS, HEAD_DIM).transpose(1, 2).contiguous().requires_grad_()
        for part in qkv.unbind(1)
    )
    grad = torch.randn(rows * length, HEADS * HEAD_DIM).to(dtype)
    grad_by_heads = grad.reshape(rows, length, HEADS, HEAD_DIM).transpose(1, 2).contiguous()

    def ours() -> Tensor:
        return ops.attention(qkv, cu_seqlens, length)

    def theirs() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    outputs = ours(), theirs()
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double()).detach()
    own = outputs[0].detach().reshape(rows, length, HEADS, HEAD_DIM).transpose(1, 2).double()
    errors = [((output.double() - exact).norm() / exact.norm()).item() for output in (own, outputs[1].detach())]
    if errors[0] > 2 * errors[1]:
        raise SystemExit(f"{dtype}: error {errors[0]:.1e}, PyTorch's {errors[1]:.1e}: no figures")

    with torch.no_grad():
        forward = interleaved({"albert_fast": ours, "pytorch": theirs}, repeats)
    backward = interleaved(
        {
            "albert_fast": lambda: torch.autograd.grad(outputs[0], qkv, grad, retain_graph=True),
            "pytorch": lambda: torch.autograd.grad(outputs[1], (query, key, value), grad_by_heads, retain_graph=True),
        },
        repeats,
    )
    gflop = 4e-9 * rows * length**2 * HEADS * HEAD_DIM
    found = [
        {
            "peer": peer,
            "error": error,
            "forward_milliseconds": forward[peer] * 1e3,
            "forward_gflops": gflop / forward[peer],
            "backward_milliseconds": backward[peer] * 1e3,
            "backward_gflops": 2.5 * gflop / backward[peer],
        }
        for peer, error in zip(forward, errors, strict=True)
    ]
    return {"name": f"{name_of(dtype)} {rows}x{length} {HEADS}x{HEAD_DIM}", "forward_gflop": gflop, "rows": found}


def show(case: dict[str, Any]) -> None:
    for row in case["rows"]:
        print(
            f"{case['name']}  {row['peer']:12} forward {row['forward_gflops']:6.1f} GFLOP/s  "
            f"backward {row['backward_gflops']:6.1f} GFLOP/s  error {row['error']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    args = parser.parse_args()
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json is {str(args.json)!r}; a file in a directory that is there was expected")
    call = backends.Call("attention", torch.device("cpu"), torch.float32, HEAD_DIM)
    served = backends.implementation("attention", call).__module__
    print(f"{torch.get_num_threads()} threads; served by {served}")
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        cases.append(measure(args.rows, args.length, dtype, args.repeats))
        show(cases[-1])
    if args.json is None:
        return
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(Path(albert_fast.__file__).parent),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "options": {"rows": args.rows, "length": args.length, "repeats": args.repeats},
        "served_by": served,
        "cases": cases,
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
