"""What the bound on errors lets pass, and what not."""

import itertools
import math

import pytest
import torch

from ops.parity import assert_as_accurate_as, judged_over_draws

ROUNDING = torch.finfo(torch.float32).eps


def results(*times_of_peer: float):
    """A test whose actual error is so many times that of the peer, draw by draw; and the number of its draws."""
    times, draws = itertools.cycle(times_of_peer), []

    @judged_over_draws
    def test():
        draws.append(next(times))
        oracle = torch.randn(64, dtype=torch.float64)
        peer, actual = (oracle * (1 + factor * 4 * ROUNDING) for factor in (1, draws[-1]))
        assert_as_accurate_as(actual.float(), peer.float(), oracle)

    return test, draws


def test_one_draw_within_the_bound_is_enough():
    test, draws = results(1.7)
    test()
    assert len(draws) == 1


def test_an_unlucky_draw_is_judged_with_others():
    test, draws = results(2.5, *[1.2] * 7)
    test()
    assert len(draws) == 8


@pytest.mark.parametrize(
    "times", [[2.3], [9.0, *[0.5] * 7], [math.nan, *[0.5] * 7], [0.02 / ROUNDING, *[1.0] * 7]], ids=str
)
def test_errors_are_noticed(times):
    """Of every draw, or of one by far: nothing that was wrong once is forgotten."""
    test, draws = results(*times)
    with pytest.raises(AssertionError, match="relative error"):
        test()
    assert len(draws) == 8
