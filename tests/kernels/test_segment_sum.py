"""Sums by id: segments shorter and longer than a chunk, ids that get nothing, tables that are added to."""

import random

import pytest
import torch
from torch import Tensor

from albert_fast import triton_backend
from albert_fast.kernels.segment_sum import segment_sum, sparse_segment_sum


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cpu" if triton_backend.interpreted() else "cuda")


def expected(ids: Tensor, rows: Tensor, size: int, skip: int | None = None) -> Tensor:
    wanted = (ids >= 0) & (ids < size) & (ids != (-1 if skip is None else skip))
    sums = torch.zeros(size, rows.shape[1], dtype=torch.float64, device=rows.device)
    return sums.index_add_(0, ids[wanted].long(), rows[wanted].double())


def draw(count: int, size: int, device: torch.device) -> Tensor:
    """Rare ids, some that occur hundreds of times, and runs of ids of about a chunk's length."""
    ids = torch.randint(size, (count,))
    ids[torch.rand(count) < 0.4] = random.randrange(size)
    ids[torch.rand(count) < 0.2] = random.randrange(size)
    return ids.to(device)


def check(sums: Tensor, wanted: Tensor, rows: Tensor) -> None:
    """Within the rounding of numbers of that size and of sums of some hundreds of them."""
    error = (sums.double() - wanted).abs().max().item() if sums.numel() else 0.0
    assert error <= 1e3 * torch.finfo(torch.float32).eps + wanted.abs().max().item() * torch.finfo(sums.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "size", "columns"), [(1, 1, 1), (63, 5, 128), (400, 40, 33), (500, 3, 150)])
def test_equals_index_add(count, size, columns, dtype, device):
    ids, rows = draw(count, size, device), torch.randn(count, columns, device=device).to(dtype)
    sums = segment_sum(ids, rows, size)
    assert sums.dtype == dtype
    check(sums, expected(ids, rows, size), rows)
    assert torch.equal(segment_sum(ids, rows, size), sums)


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 3, 20])
def test_segments_of_whole_chunks(chunks, id_dtype, device):
    """Boundaries of segments on those of chunks, one before and one after; more pieces than a program adds at once."""
    lengths = [32 * chunks + random.choice([-1, 0, 1]) for _ in range(3)]
    ids = torch.repeat_interleave(torch.tensor([2, 5, 6]), torch.tensor(lengths))[torch.randperm(sum(lengths))]
    ids, rows = ids.to(device, id_dtype), torch.randn(sum(lengths), 20, device=device)
    check(segment_sum(ids, rows, 8), expected(ids, rows, 8), rows)


def test_adds_to_a_table_and_leaves_the_rest_alone(device):
    ids, rows = draw(500, 20, device), torch.randn(500, 24, device=device).half()
    ids = 2 * ids
    table = torch.randn(40, 30, device=device)
    before = table.clone()
    out = table[:, 3:27]
    assert segment_sum(ids, rows, 40, out=out, accumulate=True) is out
    check(out, before[:, 3:27].double() + expected(ids, rows, 40), rows)
    table[:, 3:27] = before[:, 3:27]
    assert torch.equal(table[1::2], before[1::2])
    assert torch.equal(table[:, :3], before[:, :3])
    assert torch.equal(table[:, 27:], before[:, 27:])
    check(segment_sum(ids, rows, 40, out=out), expected(ids, rows, 40), rows)


def test_ids_that_get_nothing(device):
    ids, rows = draw(300, 50, device), torch.randn(300, 16, device=device)
    ids[::7] = 4
    ids[::5] = torch.tensor([-1, 50, 2**31, -(2**40), 2**16 + 4, 51], device=device).repeat(10)
    sums = segment_sum(ids, rows, 50, skip=4)
    check(sums, expected(ids, rows, 50, skip=4), rows)
    assert not sums[4].any()


@pytest.mark.parametrize("size", [2**15, 2**15 + 1])
def test_the_last_id_of_a_narrow_type(size, device):
    ids, rows = torch.tensor([size - 1, 0, size - 1], device=device), torch.randn(3, 2, device=device)
    check(segment_sum(ids, rows, size), expected(ids, rows, size), rows)


def test_no_rows(device):
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    assert not segment_sum(empty, torch.zeros(0, 4, device=device), 3).any()
    ones = torch.ones(3, 4, device=device)
    assert segment_sum(empty, torch.zeros(0, 4, device=device), 3, out=ones, accumulate=True).all()
    assert not segment_sum(empty, torch.zeros(0, 4, device=device), 3, out=ones).any()


@pytest.mark.parametrize("count", [1, 63, 64, 200])
def test_sparse_sums_lie_where_an_id_comes_first(count, device):
    ids = torch.randint(-1, 7, (count,), device=device) ** 2 % 30
    rows = torch.randn(count, 20, device=device)
    found, sums = sparse_segment_sum(ids, rows, 30, skip=4)
    dense = segment_sum(ids, rows, 30, skip=4)
    assert torch.equal(torch.zeros_like(dense).index_add_(0, found, sums), dense)
    assert (found[1:] >= found[:-1]).all()
    again = torch.cat([found[:1] < 0, found[1:] == found[:-1]])
    assert not sums[again & (found > 0)].any()
