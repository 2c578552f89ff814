"""Run by test_launch.py, as a process of its own: compares what `launch` starts with what Triton itself would start.

Triton is given a driver that notes what it is told to start, in place of one for a GPU. Calls are drawn at random from
few values, so that most have been seen before.
"""

import random
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from albert_fast.kernels import launch as launching
from albert_fast.kernels.launch import Config, Tiles, launch

CALLS = 100

noted: list[tuple[Any, ...]] = []


class Utils:
    loaded = 0

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        Utils.loaded += 1
        return Utils.loaded, Utils.loaded, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class Driver:
    utils = Utils()

    class launcher_cls:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, *arguments: Any) -> None:
            x, y, _, _, function, *rest = arguments
            noted.append((x, y, function, *rest[4:]))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@triton.jit(do_not_specialize=["tokens"])
def kernel(x, bias, tokens, stride, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index * stride, mask=index < tokens) * scale
    if bias is not None:
        value += tl.load(bias)
    if FLAG:
        value += 1.0
    tl.store(x + index * stride, value, mask=index < tokens)


def main(seed: int) -> None:
    triton.runtime.driver.set_active(Driver())
    launching.architecture = lambda device: 90
    draw = random.Random(seed)
    config = Config({"BLOCK": 32})
    tiles = Tiles(config, half={80: [config]}, single={80: [config]})
    memory = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(CALLS):
        grid, tokens = draw.choice([(3,), (2, 4)]), draw.randrange(100)
        dtype, offset, bias, stride, scale, flag = torch.float32, 0, None, 7, draw.random(), False
        match draw.randrange(12):  # one thing is another
            case 0:
                dtype = torch.bfloat16
            case 1:
                offset = 1
            case 2:
                bias = memory[torch.float32]
            case 3:
                tokens = 2**31
            case 4:
                stride = draw.choice([1, 16, 32, 2**31])
            case 5:
                scale = 1
            case 6:
                flag = True
        x = memory[dtype][offset:]
        noted.clear()
        arguments = (x, bias, tokens, stride, scale)
        launch(kernel, lambda blocks, grid=grid: grid, *arguments, tiles=tiles, dtype=x.dtype, FLAG=flag)
        kernel[grid](*arguments, FLAG=flag, **config.options)
        ours, tritons = noted
        assert ours == tritons, f"{ours} where Triton starts {tritons}"
    kinds = len(launching._started)
    assert Utils.loaded <= kinds < CALLS // 4, (Utils.loaded, kinds)
    print(f"{Utils.loaded} compiled, {kinds} kinds of {CALLS} calls")


if __name__ == "__main__":
    main(int(sys.argv[1]))
