"""Run by test_repeated.py, as a process of its own: the encoder's loops, whose kernels a stand-in notes in place of a
GPU. Each call that is repeated is made a second time by its function, which has to start the same.
"""

import random
import sys
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from albert_fast.kernels import encoder, launch
from albert_fast.kernels.repeated import Repeated
from albert_fast.ops.encoder import EncoderOptions

CALLS = 40

Noted = tuple[Any, ...]

noted: list[Noted] = []


class Compiled(CompiledKernel):
    """Of a kernel and its constants; it is never compiled."""

    packed_metadata = ()
    module = None

    def __init__(self, *function: Any) -> None:
        self.function = function

    @property
    def run(self) -> Any:
        return self.note

    def note(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in rest[4:]]
        noted.append((x, y, z, stream, function, *arguments))


def compile_nothing(kernel: JITFunction, *_: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Compiled:
    return Compiled(kernel.fn.__name__, tuple(constants.items()))


counts = {"repeated": 0, "functions": 0}


def compared(self: Repeated, *tensors: Tensor | None, site: int = 0) -> None:
    ran = 0

    def watched(*tensors: Tensor | None, site: int) -> None:
        nonlocal ran
        ran += 1
        function(*tensors, site=site)

    function, self._function = self._function, watched
    noted.clear()
    call(self, *tensors, site=site)
    self._function = function
    counts["functions"] += ran
    if not ran:
        counts["repeated"] += 1
        again = list(noted)
        noted.clear()
        function(*tensors, site=site)
        assert again
        assert again == noted, f"{again} where the function starts {noted}"


call = Repeated.__call__


def draw_call(draw: random.Random) -> None:
    heads, head_dim, inner = 2, 16, 48
    width = heads * head_dim
    groups, inner_groups = draw.choice([(1, 1), (1, 1), (2, 1), (1, 2)])
    lengths = [draw.randrange(1, 9) for _ in range(draw.randrange(1, 4))]
    dropout_p = draw.choice([0.0, 0.1])
    options = EncoderOptions(
        num_layers=draw.choice([2, 4, 6]),
        num_groups=groups,
        inner_group_num=inner_groups,
        num_heads=heads,
        activation=draw.choice(["gelu_new", "gelu", "relu"]),
        eps=1e-12,
        hidden_dropout_p=draw.choice([0.0, dropout_p]),
        attention_dropout_p=draw.choice([0.0, dropout_p]),
        seed=torch.tensor(1) if dropout_p else None,
        bias=torch.zeros(len(lengths), heads, 8, 8) if draw.random() < 0.3 else None,
        recompute=draw.choice(["none", "ffn", "layer"]),
        return_all=draw.random() < 0.3,
    )
    dtype = draw.choice([torch.bfloat16, torch.float32])
    shapes = [(width, width), (width,)] * 4 + [(width,)] * 2
    shapes += [(inner, width), (inner,), (width, inner), *[(width,)] * 3]
    parameters = [torch.zeros(shape) for _ in range(groups * inner_groups) for shape in shapes]
    if draw.random() < 0.7:
        parameters = [parameter.to(dtype) for parameter in parameters]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden = torch.zeros(sum(lengths), width, dtype=dtype)
    encoder.GATHERED_TOKENS = draw.choice([1, 2 * sum(lengths), 1000])
    rest = (parameters, offsets, 8, options)
    if draw.random() < 0.4:
        encoder.encoder_inference(hidden, *rest)
    else:
        output, kept = encoder.encoder(hidden, *rest)
        encoder.encoder_backward(torch.zeros_like(output), kept, *rest)


def main(seed: int) -> None:
    draw = random.Random(seed)
    capability = draw.choice([80, 90])
    launch.architecture = lambda device: capability
    launch.tuning.enabled = lambda: False
    JITFunction.run = compile_nothing
    Repeated.__call__ = compared
    for _ in range(CALLS):
        draw_call(draw)
    print(f"{counts['repeated']} repeated, {counts['functions']} by the function")
    assert counts["repeated"] > counts["functions"] / 2, counts


if __name__ == "__main__":
    main(int(sys.argv[1]))
