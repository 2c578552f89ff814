"""What tests/interpreter.py does in place of Triton's interpreter gives what that gives."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("about Triton's interpreter", allow_module_level=True)

from triton.language import random  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402


@triton.jit
def philox_kernel(words, seed, site, SCALARS: tl.constexpr):
    rows, columns = tl.arange(0, 4), tl.arange(0, 8)
    outer = site if SCALARS else rows[:, None]
    place = words + (rows[:, None] * 8 + columns[None, :]) * 4
    word0, word1, word2, word3 = tl.philox(seed, site, outer, 5 + rows[:, None], columns[None, :])
    tl.store(place, word0)
    tl.store(place + 1, word1)
    tl.store(place + 2, word2)
    tl.store(place + 3, word3)


@pytest.mark.parametrize("scalars", [False, True])
def test_philox(scalars, monkeypatch):
    words = torch.zeros(2, 4, 8, 4, dtype=torch.int32)
    seed, site = int(torch.randint(-(2**63), 2**63 - 1, ())), int(torch.randint(2**31, ()))
    philox_kernel[(1,)](words[0], seed, site, scalars)
    monkeypatch.setattr(random, "philox_impl", random.philox_impl.rounds)
    philox_kernel[(1,)](words[1], seed, site, scalars)
    assert words[0].unique().numel() > 100
    assert torch.equal(words[0], words[1])


@triton.jit
def broadcast_kernel(x, y, WRONG: tl.constexpr):
    rows, columns = tl.arange(0, 4), tl.arange(0, 8)
    sums = tl.load(x + rows)[:, None] * 2 + columns[None, :] + (rows if WRONG else columns)
    tl.store(y + rows[:, None] * 8 + columns[None, :], tl.where(columns[None, :] < 6, sums, -1.0))


def test_broadcasts():
    x, y = torch.randn(4), torch.zeros(4, 8)
    broadcast_kernel[(1,)](x, y, False)
    columns = torch.arange(8)
    assert torch.equal(y, torch.where(columns < 6, x[:, None] * 2 + columns + columns, -1.0))
    with pytest.raises(InterpreterError, match="incompatible dimensions"):
        broadcast_kernel[(1,)](x, y, True)
