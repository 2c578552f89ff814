"""Random numbers that are a function of what they are for, and of nothing else.

An example must be the same whatever batch, worker or run makes it, so no generator may be advanced from one to the
next. Instead each number is a hash of its address (seed, epoch, example, purpose, place), for whole arrays at once. The
hash is splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): a Weyl
sequence through a 64-bit finaliser, a few nanoseconds a number in numpy. numpy's own counter-based generator, Philox,
takes tens of microseconds to start, and there would be several to start for each example.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]

_WORD = (1 << 64) - 1
_WEYL = 0x9E3779B97F4A7C15
_OTHER_WEYL = 0xD1B54A32D192ED03  # for the purposes, so that they and the places do not walk along one line


class Purpose(IntEnum):
    """What a number decides: two decisions about one thing must not share their bits."""

    SHORT = 1
    SHORT_LENGTH = 2
    SHUFFLE = 3
    CUT = 4
    ORDER_OF_SEGMENTS = 5
    OTHER_DOCUMENT = 6
    OTHER_SENTENCE = 7
    TRIM_FIRST = 8
    TRIM_SECOND = 9
    VIEW = 10
    CHOICE = 11
    LENGTH = 12
    SEGMENT = 13
    REPLACEMENT = 14
    RANDOM_ID = 15
    STRETCH = 16
    DIRECTION = 17


def mix(x: Bits) -> Bits:
    """splitmix64's finaliser: a bijection of 64-bit integers after which neighbours have nothing in common."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def example_keys(seed: int, epoch: int, index: NDArray[np.integer]) -> Bits:
    """One key for each example, uint64 of the shape of `index`."""
    key = mix(np.array([(seed + _WEYL) & _WORD], dtype=np.uint64))
    key = mix(key + np.uint64((epoch + 1) * _WEYL & _WORD))
    return mix(key + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(_WEYL))


def stream(keys: Bits, purpose: Purpose, part: NDArray[np.integer] | int = 0) -> Bits:
    """Where the sequence of random numbers of each key for one purpose begins; `part` tells apart several of them."""
    # Arrays, also of one number: numpy warns of scalars that wrap around, as they should here.
    parts = np.atleast_1d(np.asarray(part)).astype(np.uint64) * np.uint64(64) + np.uint64(purpose)
    return mix(keys + parts * np.uint64(_OTHER_WEYL))


def bits(streams: Bits, place: NDArray[np.integer] | int = 0) -> Bits:
    """64 random bits, number `place` of each stream; the two broadcast against each other."""
    # (place + 1) * weyl, modulo 2**64: signed integers multiply to the same low bits, without a copy to convert them.
    steps = np.atleast_1d(np.asarray(place, dtype=np.int64)).view(np.uint64) * np.uint64(_WEYL)
    steps += np.uint64(_WEYL)
    return mix(streams + steps)


def uniform(random_bits: Bits) -> NDArray[np.float64]:
    """Numbers in [0, 1), multiples of 2**-53."""
    return (random_bits >> np.uint64(11)) * 2.0**-53


def below(random_bits: Bits, bound: NDArray[np.integer] | int) -> NDArray[np.int64]:
    """Integers in [0, bound), bound < 2**31, each as likely as the others to within 2**-32 (multiply and shift)."""
    scaled = (random_bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)
    return (scaled >> np.uint64(32)).astype(np.int64)


def heads(streams: Bits, tosses: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of `tosses` fair coins show heads, for each stream: exactly binomial, by counting bits."""
    count = np.zeros(len(streams), dtype=np.int64)
    left, place = tosses.copy(), 0
    while True:
        rows = np.flatnonzero(left > 0)
        if not rows.size:
            return count
        word = bits(streams[rows], place)
        unused = np.uint64(64) - np.minimum(left[rows], 64).astype(np.uint64)
        # Eight bytes of a number to count the ones of; np.bitwise_count came only with numpy 2.
        octets = (word >> unused).view(np.uint8).reshape(-1, 8)
        count[rows] += _ONES[octets].sum(axis=1, dtype=np.int64)
        left[rows] -= 64
        place += 1


_ONES = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
