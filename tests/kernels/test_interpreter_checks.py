"""What tests/interpreter_checks.py says of kernels that are right, and of those that are not."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("the checks are of Triton's interpreter", allow_module_level=True)

from triton.runtime.errors import InterpreterError  # noqa: E402

SIZE = tl.constexpr(16)
MEETS = r": program \d (reads|writes) what program \d (reads|writes), and nothing orders the two"


@triton.jit
def masked_kernel(x, y, count, BEYOND: tl.constexpr, OTHER: tl.constexpr):
    columns = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = columns < count + BEYOND
    values = tl.load(x + columns, mask=mask, other=3) if OTHER else tl.load(x + columns, mask=mask)
    tl.store(y + columns, values)


@triton.jit
def store_beyond_kernel(y):
    tl.store(y + tl.arange(0, SIZE), 1.0)


@triton.jit
def shift_kernel(x, BY: tl.constexpr):
    """Each program adds to its block what lies before it."""
    columns = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    before = tl.load(x + columns - BY, mask=columns >= BY, other=0)
    tl.store(x + columns, tl.load(x + columns) + before)


@triton.jit
def reread_kernel(x, y, BARRIER: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(x + columns, 1.0)
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + columns, tl.load(x + SIZE - 1 - columns))


@triton.jit
def one_place_kernel(y, SAME: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(y + columns // 2, columns.to(tl.float32) * (0 if SAME else 1))


@triton.jit
def last_adds_kernel(parts, count, total, COUNTS: tl.constexpr, BARRIER: tl.constexpr):
    """Who comes last adds up what all have left."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(parts + program, 1.0)
    if BARRIER:
        tl.debug_barrier()
    before = tl.atomic_add(count, 1, sem="acq_rel")
    if before == programs - 1 or (not COUNTS and before == 1):
        tl.store(total + (before != programs - 1), tl.sum(tl.load(parts + tl.arange(0, 4))))


def test_what_a_mask_leaves_out():
    x, y = torch.ones(20), torch.zeros(32)
    masked_kernel[(2,)](x, y, 20, BEYOND=0, OTHER=True)
    assert torch.equal(y, torch.cat([x, torch.full((12,), 3.0)]))
    masked_kernel[(2,)](x, y, 20, BEYOND=0, OTHER=False)
    assert y[20:].isnan().all()
    assert torch.equal(y[:20], x)
    for dtype, expected in ((torch.bfloat16, None), (torch.int32, 2**31 - 1)):
        y = torch.zeros(32, dtype=dtype)
        masked_kernel[(2,)](x.to(dtype), y, 20, BEYOND=0, OTHER=False)
        assert y[20:].isnan().all() if expected is None else (y[20:] == expected).all()


def test_outside_of_what_is_given():
    with pytest.raises(InterpreterError, match="masked_kernel: program 1 reads 64 to 84 of a tensor of 80 bytes"):
        masked_kernel[(2,)](torch.ones(20), torch.zeros(32), 20, BEYOND=1, OTHER=True)
    with pytest.raises(InterpreterError, match="store_beyond_kernel: program 0 writes 0 to 64 of a tensor of 60 bytes"):
        store_beyond_kernel[(1,)](torch.zeros(15))


def test_what_another_program_writes():
    x = torch.ones(64)
    shift_kernel[(4,)](x, BY=0)
    assert torch.equal(x, torch.full((64,), 2.0))
    for by in (1, 16):
        with pytest.raises(RuntimeError, match=f"shift_kernel{MEETS}"):
            shift_kernel[(4,)](torch.ones(64), BY=by)


def test_what_is_read_again():
    reread_kernel[(1,)](torch.zeros(16), torch.zeros(16), BARRIER=True)
    with pytest.raises(RuntimeError, match=r"reread_kernel: program 0 writes what it reads again without a barrier"):
        reread_kernel[(1,)](torch.zeros(16), torch.zeros(16), BARRIER=False)


def test_two_values_for_one_place():
    one_place_kernel[(1,)](torch.zeros(8), SAME=True)
    with pytest.raises(InterpreterError, match=r"one_place_kernel: program 0 writes two values to one place at a time"):
        one_place_kernel[(1,)](torch.zeros(8), SAME=False)


def test_programs_that_count():
    def run(**options):
        total = torch.zeros(2)
        last_adds_kernel[(4,)](torch.zeros(4), torch.zeros(1, dtype=torch.int32), total, **options)
        return total

    assert run(COUNTS=True, BARRIER=True)[0] == 4
    with pytest.raises(RuntimeError, match=f"last_adds_kernel{MEETS}"):
        run(COUNTS=False, BARRIER=True)
    with pytest.raises(RuntimeError, match=r"last_adds_kernel: program \d writes what (program \d|it) reads"):
        run(COUNTS=True, BARRIER=False)
