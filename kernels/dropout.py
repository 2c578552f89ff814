"""The masks of `albert_fast.ops.dropout` inside a kernel: the same bits, four elements to a call of Philox."""

import triton
import triton.language as tl


def limit(dropout_p: float) -> int:
    """The largest 32-bit integer whose element is kept: what kernels take as `keep_limit`."""
    return max(round((1.0 - dropout_p) * 2**32), 1) - 1


@triton.jit
def keep_mask(seed, site, outer, inner, group, keep_limit):
    """Which elements survive, bool [rows, 4 * groups].

    Args:
        seed: int64 scalar, the key.
        site: int32 scalar; outer, inner: int32 [rows, 1] or scalar; group: int32 [1, groups], column // 4: the
            counters. They have to be int32: with int64 ones Triton computes another Philox.
        keep_limit: uint32 scalar, `limit(dropout_p)`.
    """
    word0, word1, word2, word3 = tl.philox(seed, site, outer, inner, group)
    # The column takes integer column % 4: the last axis is the lower bit of it.
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    words = words.reshape(word0.shape[0], 4 * word0.shape[1])
    return words.to(tl.uint32, bitcast=True) <= keep_limit.to(tl.uint32)
