"""What csrc/cuda/host says of right kernels, and of each kind of wrong ones, whatever order threads take."""

import ctypes
import random
import re
from pathlib import Path

import cuda_on_cpu
import pytest

from albert_fast import native

SOURCE = Path(__file__).with_name("watched_kernels.cpp")

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="there is no C++ compiler")

RIGHT = [
    "a barrier of the block",
    "what was read before a warp's instruction is written after it",
    "parts of four bytes",
    "copies that are waited for",
    "a barrier of the cluster",
    "a barrier of the grid",
    "a release and an acquire",
    "a word",
    "what the teller of a word has read is written",
    "arrivals",
]
NOTHING_ORDERS = "and nothing orders the two"
WRONG = {
    "no barrier of the block": NOTHING_ORDERS,
    "a warp's instruction is no barrier": NOTHING_ORDERS,
    "what another warp reads is written": NOTHING_ORDERS,
    "two write": f"writes 4 bytes of shared memory at 0, which .* wrote, {NOTHING_ORDERS}",
    "copies that nobody waits for": NOTHING_ORDERS,
    "a barrier of the block is none of the cluster": f"of scratch at 0, .* block [01], thread 0 .*, {NOTHING_ORDERS}",
    "what is written after the arrival": NOTHING_ORDERS,
    "a release before the barrier": NOTHING_ORDERS,
    "a word that was never cleared": "of words at 0, which nobody wrote",
    "a word that is still cleared": NOTHING_ORDERS,
    "a word orders nothing else": NOTHING_ORDERS,
    "what the teller of a word reads later is written": NOTHING_ORDERS,
    "arrivals that nobody waits for": NOTHING_ORDERS,
    "arrivals bring what was sent alone": NOTHING_ORDERS,
    "what is sent to a place that is still read": NOTHING_ORDERS,
    "arrivals before they are made": NOTHING_ORDERS,
    "a send to who is gone": "sends to another one that may be gone",
    "beyond the output": "block 1, thread 0 writes 4 bytes 1028 from the begin of the output, which has 1024",
    "before the output": "writes 4 bytes .* from the begin of a constant, which has 1024",
    "beyond shared memory": "reads 4 bytes .* from the begin of shared memory, which has 1024",
    "another block's shared memory": "thread 0 reads 4 bytes of block 0's shared memory, by an address of its own",
    "a write to what is constant": "writes to a constant, which is constant",
    "a constant that is written": "reads scratch as what nobody writes",
    "lanes that part": "lanes of a warp are at different instructions that need all of them",
    "a barrier that one does not reach": "waits at a barrier that the others never reach",
    "a word that nobody tells": "wait for what no other tells them",
    "a load that is not aligned": "is not aligned to its size",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What is said of a kernel by its name."""
    library = ctypes.CDLL(str(cuda_on_cpu.build(tmp_path_factory.mktemp("watched"), SOURCE)))
    function = library.run_watched
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_char_p, ctypes.c_uint]
    return lambda name: function(name.encode(), random.getrandbits(31)).decode()


@pytest.mark.parametrize("kernel", RIGHT)
def test_right_kernels(kernel, run):
    for _ in range(10):
        assert run(kernel) == ""


@pytest.mark.parametrize("kernel", WRONG)
def test_wrong_kernels(kernel, run):
    for _ in range(10):
        assert re.search(WRONG[kernel], run(kernel))
