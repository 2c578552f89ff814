"""gelu(x + bias) and its backward: every element is read once and written once.

The tanh form is computed as x sigmoid(2 u), which is the same number and loses nothing where 1 + tanh(u) cancels. The
backward pass can write gelu(x + bias) beside the gradient: the gradient of the weights that follow needs it, and
reading x once is enough for both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from albert_fast.kernels.column_sum import column_sum, first_sums, strips
from albert_fast.kernels.launch import ARCHITECTURES, Config, Tiles, cdiv, launch

# 256 columns are a whole warp with 16 bytes a thread.
_FORWARD = tuple(Config({"ROWS": rows, "COLUMNS": 256}) for rows in (4, 8))
_BACKWARD = tuple(Config({"ROWS": rows, "COLUMNS": 256, "STAGES": 3}) for rows in (8, 4))
_NARROW = Config({"ROWS": 4, "COLUMNS": 128, "STAGES": 3})
FORWARD_TILES = Tiles(
    interpreter=Config({"ROWS": 32, "COLUMNS": 256}),
    half=dict.fromkeys(ARCHITECTURES, _FORWARD),
    single=dict.fromkeys(ARCHITECTURES, _FORWARD[::-1]),
)
BACKWARD_TILES = Tiles(
    interpreter=Config({"ROWS": 32, "COLUMNS": 256, "STAGES": 1}),
    # With 8 rows the tanh form without a bias spills on 9.0, the erf form on 10.0.
    half={80: _BACKWARD, 90: (_NARROW, _BACKWARD[1]), 100: _BACKWARD[::-1]},
    single=dict.fromkeys(ARCHITECTURES, _BACKWARD[::-1]),
)

# Programs on each multiprocessor in the backward pass, as many as run at once.
_PROGRAMS = 4


@triton.jit
def activation(x, FORM: tl.constexpr):
    """gelu(x) of float32 x, and its slope."""
    if FORM == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif FORM == "none":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        # exp(-x²/2) / sqrt(2 pi)
        slope = cdf + x * (0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817))
    else:
        # 2 u = 2 sqrt(2/pi) (x + 0.044715 x³). Far out, where the square could overflow, sigmoid is 0 or 1.
        square = tl.minimum(x * x, 1e4)
        # exp(-|2 u|), in powers of two: sigmoid(2 u) and sigmoid(-2 u) from it, neither as 1 minus the other.
        tail = tl.exp2(-tl.abs(x * (2.302208198144325 + 0.1029432395800235 * square)))
        nearer = 1.0 / (1.0 + tail)
        farther = tail * nearer
        value = x * tl.where(x > 0.0, nearer, farther)
        # sigmoid(2 u) + x sigmoid(2 u) sigmoid(-2 u) (2 u)'
        inner = 1.5957691216057308 + 0.21406444881780076 * square
        slope = tl.where(x > 0.0, nearer, farther) + x * (nearer * farther) * inner
    return value, slope


@triton.jit(do_not_specialize=["tokens"])
def gelu_kernel(
    x,  # [tokens, columns]
    bias,  # [columns] or None
    y,  # [tokens, columns]
    tokens,
    columns,
    stride_x,
    stride_y,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Programs that follow one another share rows: pages of memory are read in order.
    # Rows on the first axis: the others hold 65535 programs.
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column_inside = column < columns
    mask = (row < tokens) & column_inside[None, :]
    value = tl.load(x + row * stride_x + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
    value = value.to(tl.float32)  # [ROWS, COLUMNS]
    if bias is not None:
        value += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    value, _ = activation(value, FORM)
    tl.store(y + row * stride_y + column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["tokens", "strip"])
def gelu_backward_kernel(
    grad_output,  # [tokens, columns]
    x,  # [tokens, columns]
    bias,  # [columns] or None
    grad_x,  # [tokens, columns]
    activated,  # [tokens, columns] or None
    partials,  # float32 [programs, columns] or None
    tokens,
    strip,
    columns,
    stride_grad,
    stride_x,
    stride_grad_x,
    stride_activated,
    FORM: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(1)
    column_inside = column < columns
    if bias is not None:
        b = tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)
    partial = column
    if partials is not None:
        partial = partials + program.to(tl.int64) * columns + column
    sums = first_sums(partial, column_inside, ROWS, COLUMNS, ACCUMULATE)
    last = tl.minimum(program * strip + strip, tokens)
    for start in tl.range(program * strip, last, ROWS, num_stages=STAGES):
        token = start + tl.arange(0, ROWS)
        mask = (token < last)[:, None] & column_inside[None, :]
        row = token.to(tl.int64)[:, None]
        grad = tl.load(grad_output + row * stride_grad + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            value += b[None, :]
        value, slope = activation(value, FORM)
        grad *= slope
        tl.store(grad_x + row * stride_grad_x + column[None, :], grad, mask=mask)
        if activated is not None:
            tl.store(activated + row * stride_activated + column[None, :], value, mask=mask)
        sums += grad
    if partials is not None:
        tl.store(partial, tl.sum(sums, axis=0), mask=column_inside)


def gelu(x: Tensor, bias: Tensor | None, form: str, out: Tensor | None = None) -> Tensor:
    """gelu(x + bias) of x [tokens, columns] with contiguous columns; `out`: likewise, may be x."""
    tokens, columns = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    launch(
        gelu_kernel,
        lambda blocks: (cdiv(tokens, blocks["ROWS"]), cdiv(columns, blocks["COLUMNS"])),
        x,
        bias,
        out,
        tokens,
        columns,
        x.stride(0),
        out.stride(0),
        tiles=FORWARD_TILES,
        dtype=x.dtype,
        key=(columns,),
        FORM=form,
    )
    return out


def gelu_backward(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    grad_x: Tensor | None = None,
    activated: Tensor | None = None,
    *,
    partials: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gelu`.

    Args:
        grad_output, x: [tokens, columns], columns contiguous.
        bias: [columns], contiguous, or None.
        grad_x: a buffer like x, or None; may be grad_output or x.
        activated: a buffer like x, which receives gelu(x + bias), or None; may be the one of grad_output and x that
            grad_x is not.
        partials: float32 [programs, columns], contiguous, to which is added what has the gradient of bias as its column
            sums; of `programs_of` rows. None: the gradient is returned.

    Returns:
        gradient of x, and that of bias in float32: None without a bias and with `partials`.
    """
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if grad_x is None else grad_x
    grad_bias = None
    if bias is not None and partials is None:
        grad_bias = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
    _backward(grad_output, x, bias, form, grad_x, activated, grad_bias, partials)
    return grad_x, grad_bias


def programs_of(device: torch.device, tokens: int, columns: int) -> int:
    """How many strips of rows there are in the backward pass."""
    return strips(device, tokens, _PROGRAMS, sharing=max(1, cdiv(columns, 256)))


def _backward(
    grad_output: Tensor,
    x: Tensor,
    bias: Tensor | None,
    form: str,
    grad_x: Tensor,
    activated: Tensor | None,
    grad_bias: Tensor | None,
    partials: Tensor | None = None,
) -> None:
    """grad_bias, of any dtype, is written, or `partials` added to."""
    tokens, columns = x.shape
    programs = programs_of(x.device, tokens, columns) if partials is None else len(partials)
    accumulate = partials is not None
    if grad_bias is not None:
        partials = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    launch(
        gelu_backward_kernel,
        lambda blocks: (cdiv(columns, blocks["COLUMNS"]), programs),
        grad_output,
        x,
        bias,
        grad_x,
        activated,
        partials,
        tokens,
        cdiv(tokens, max(programs, 1)),
        columns,
        *(0 if tensor is None else tensor.stride(0) for tensor in (grad_output, x, grad_x, activated)),
        tiles=BACKWARD_TILES,
        dtype=x.dtype,
        key=(columns, activated is not None),
        FORM=form,
        ACCUMULATE=accumulate,
    )
    if grad_bias is not None:
        assert partials is not None
        column_sum(partials, (grad_bias,))


# -------------------------------------------------------------------------------------------------------- the operation


def _two_dimensional(x: Tensor) -> Tensor:
    """[rows, columns] with contiguous columns; a view where it can be."""
    columns = x.shape[-1]
    x = x.reshape(-1, columns) if columns else x.reshape(0, 0)
    return x if x.stride(1) == 1 or columns <= 1 else x.contiguous()


def bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gelu(_two_dimensional(x), bias.contiguous(), approximate, out=_two_dimensional(y))
    return y


def bias_gelu_backward(grad_output: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    _backward(
        _two_dimensional(grad_output),
        _two_dimensional(x),
        bias.contiguous(),
        approximate,
        _two_dimensional(grad_x),
        None,
        grad_bias,
    )
    return grad_x, grad_bias
