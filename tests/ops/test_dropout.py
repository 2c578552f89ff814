"""The dropout masks: Philox to the bit, and nothing but the seed and the element decides."""

import math
import random

import pytest
import torch
from torch import Tensor

from albert_fast.ops.dropout import check_dropout, dropout, keep_mask, philox, token_coordinates
from ops.parity import offsets, ragged_lengths, random_seed

WORD = 2**32

# Random123's known answers for philox4x32-10 (kat_vectors): key, counter, result.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD - 1,) * 2, (WORD - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_of_integers(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox-4x32-10 as in Salmon et al., section 4.2, in Python's integers."""
    (key0, key1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high2, low2 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) % WORD, (key1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def as_signed(key: tuple[int, int]) -> int:
    """The int64 whose words are the key."""
    value = key[0] + WORD * key[1]
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(key, counter, expected, device):
    seed = torch.tensor(as_signed(key), device=device)
    words = philox(seed, tuple(torch.tensor(c, device=device) for c in counter))
    assert tuple(int(word) for word in words) == expected
    assert philox_of_integers(key, counter) == expected


@pytest.mark.parametrize("negative", [False, True])
def test_philox_equals_that_of_integers(negative, device):
    key = (random.randrange(WORD), random.randrange(WORD // 2) + negative * WORD // 2)
    assert (as_signed(key) < 0) == negative
    counters = [[random.randrange(WORD) for _ in range(50)] for _ in range(4)]
    words = philox(torch.tensor(as_signed(key), device=device), tuple(torch.tensor(c, device=device) for c in counters))
    expected = [philox_of_integers(key, counter) for counter in zip(*counters, strict=True)]
    assert torch.stack(words, dim=-1).tolist() == [list(row) for row in expected]


def test_each_element_is_named_by_site_row_position_and_column(device):
    seed, site, dropout_p = random_seed(device), random.randrange(100), random.uniform(0.1, 0.9)
    columns = random.randint(1, 13)
    outer, inner = (torch.randint(0, 2**20, (6,), device=device) for _ in range(2))
    keep = keep_mask(seed, site, outer, inner, columns, dropout_p)
    assert keep.shape == (6, columns)
    key = (int(seed) % WORD, int(seed) // WORD % WORD)
    for element in range(6):
        for column in range(columns):
            counter = (site, int(outer[element]), int(inner[element]), column // 4)
            word = philox_of_integers(key, counter)[column % 4]
            assert bool(keep[element, column]) == (word < round((1 - dropout_p) * WORD))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_kept_share_is_one_minus_p(dropout_p, device):
    rows, columns = 300, 501
    positions = torch.arange(rows, device=device)
    keep = keep_mask(random_seed(device), 3, torch.zeros_like(positions), positions, columns, dropout_p)

    def assert_share(kept: Tensor, count: int) -> None:
        # Six standard deviations of a binomial: once in half a milliard tests.
        deviation = math.sqrt(count * dropout_p * (1 - dropout_p))
        assert (kept - count * (1 - dropout_p)).abs().max() < 6 * deviation

    assert_share(keep.sum(), rows * columns)
    assert_share(keep.sum(dim=0), rows)
    assert_share(keep.sum(dim=1), columns)
    # Neighbours are independent: both are kept as often as the product says.
    both = (keep[:, 1:] & keep[:, :-1]).double().mean()
    assert abs(both - (1 - dropout_p) ** 2) < 6 * 0.75 / math.sqrt(rows * (columns - 1))


def test_the_expectation_is_preserved(device):
    x = torch.rand(400, 300, device=device, dtype=torch.float64) + 0.5
    dropped = dropout(x, 0.3, random_seed(device), 0, None)
    deviation = (x.square().sum() * 0.3 / 0.7).sqrt()
    assert abs(dropped.sum() - x.sum()) < 6 * deviation
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)


def test_a_row_keeps_its_mask_whatever_its_neighbours_and_the_tokens_beyond_the_last(device):
    seed, columns = random_seed(device), 24
    lengths = ragged_lengths((1, 3, 5, 17))
    row = lengths.index(17)
    others = [length if index == row else random.randint(0, 9) for index, length in enumerate(lengths)]
    masks = []
    for packed, beyond in ((lengths, 0), (others, 4), ([17] * (row + 1), 0)):
        x = torch.ones(sum(packed) + beyond, columns, device=device)
        dropped = dropout(x, 0.5, seed, 2, offsets(packed, device))
        start = sum(packed[:row])
        masks.append(dropped[start : start + 17] != 0)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_a_tile_has_the_mask_of_the_whole(device):
    seed, positions = random_seed(device), torch.arange(40, device=device)
    rows = torch.full_like(positions, 3)
    whole = keep_mask(seed, 5, rows, positions, 64, 0.4)
    assert torch.equal(keep_mask(seed, 5, rows[8:], positions[8:], 37, 0.4), whole[8:, :37])


def test_seeds_sites_rows_and_positions_draw_different_masks(device):
    seed, positions = random_seed(device), torch.arange(20, device=device)
    zeros = torch.zeros_like(positions)
    masks = [
        keep_mask(seed, 0, zeros, positions, 32, 0.5),
        keep_mask(seed, 1, zeros, positions, 32, 0.5),
        keep_mask(seed + 1, 0, zeros, positions, 32, 0.5),
        keep_mask(seed ^ (1 << 40), 0, zeros, positions, 32, 0.5),
        keep_mask(seed, 0, zeros + 1, positions, 32, 0.5),
        keep_mask(seed, 0, zeros, positions + 20, 32, 0.5),
    ]
    for index, one in enumerate(masks):
        for other in masks[:index]:
            # 640 fair coins agree at half of the places, give or take.
            assert 0.3 < (one == other).double().mean() < 0.7


def test_coordinates_of_packed_tokens(device):
    lengths = [2, 0, 3, 0]
    row, position = token_coordinates(offsets(lengths, device), 7, device)
    assert row.tolist() == [0, 0, 2, 2, 2, 4, 4]  # the last two tokens are of no row
    assert position.tolist() == [0, 1, 0, 1, 2, 0, 1]
    row, position = token_coordinates(None, 3, device)
    assert row.tolist() == [0, 0, 0]
    assert position.tolist() == [0, 1, 2]


def test_no_dropout_is_the_identity(device):
    x = torch.randn(3, 4, device=device)
    assert dropout(x, 0.0, None, 0, None) is x


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, float("nan")])
def test_a_probability_out_of_range_raises(dropout_p, device):
    with pytest.raises(ValueError, match="dropout_p"):
        check_dropout(dropout_p, torch.tensor(1, device=device), device)


@pytest.mark.parametrize(
    "seed",
    [None, torch.tensor(1, dtype=torch.int32), torch.tensor([1, 2]), torch.tensor(1, device="meta")],
    ids=["none", "int32", "two", "meta"],
)
def test_a_bad_seed_raises(seed):
    with pytest.raises(ValueError, match="seed"):
        check_dropout(0.1, seed, torch.device("cpu"))
    check_dropout(0.0, seed, torch.device("cpu"))
