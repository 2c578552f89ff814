"""Matrix products of training by cuBLASLt, with epilogues that PyTorch does not expose (csrc/cuda/products.h).

In float16 and bfloat16 with float32 sums. `refusal` says in one line why a device has none of them: what is missing, or
that a small product of each kind came out wrong. It is looked at once for each device and dtype.

A function below checks its arguments and returns a `Product`, which runs when it is called.

ALBERT_FAST_CUBLASLT=0 switches the products off; a path there is that of the library, which otherwise is PyTorch's.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor

from albert_fast import devices, native
from albert_fast.ops.checks import check, check_tensor

_CODES = {torch.float16: 0, torch.bfloat16: 1}
_UNALIGNED, _UNSUPPORTED, _NO_LIBRARY = 2, 3, 4  # albert_products_error

# Where the tensors are. Tests put a stand-in for cuBLASLt into its place that works on the host's memory.
_DEVICE_TYPE = "cuda"


class _Place(ctypes.Structure):
    """albert_products_place."""

    _fields_ = (("workspace", c_void_p), ("workspace_bytes", c_size_t), ("stream", c_void_p))


# ---------------------------------------------------------------------------------------------------- what is on hand


def setting() -> str:
    """ALBERT_FAST_CUBLASLT: "" where it is not set."""
    return os.environ.get("ALBERT_FAST_CUBLASLT", "")


@functools.cache
def _functions() -> ctypes.CDLL:
    """The native library.

    Raises:
        native.BuildError: there is none.
    """
    library = ctypes.CDLL(str(native.build(quiet=False)))
    pointer, place, i64 = c_void_p, ctypes.POINTER(_Place), c_int64
    of_products = [pointer, place, c_int, i64, i64, i64]
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "open": (c_int, [c_char_p, ctypes.POINTER(c_void_p), c_char_p, c_size_t]),
        "version": (c_int, [pointer]),
        "message": (c_char_p, [c_int]),
        "linear_gelu": (c_int, [*of_products, pointer, i64, pointer, pointer, pointer, i64, pointer, i64]),
        "gelu_gradient": (c_int, [*of_products, pointer, i64, pointer, pointer, i64, pointer, i64, pointer]),
        "weight_gradient": (c_int, [*of_products, pointer, i64, pointer, i64, pointer, c_int, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"albert_products_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def _message(code: int) -> str:
    return _functions().albert_products_message(code).decode()


# (path, device) -> albert_products*, or why there is none. Never closed: a captured graph may outlive whoever asked.
_opened: dict[tuple[str, torch.device], c_void_p | str] = {}
_refusals: dict[tuple[str, torch.device, torch.dtype], str | None] = {}


def _key(device: torch.device) -> tuple[str, torch.device]:
    path = setting()
    return ("" if path in ("0", "1") else path), device


def _open(device: torch.device) -> c_void_p | str:
    try:
        functions = _functions()
    except native.BuildError as error:
        return str(error).partition("\n")[0].rstrip(":")
    except OSError as error:
        return f"the native library cannot be loaded ({error}): `albert-fast build --force` makes it anew"
    products, said = c_void_p(), ctypes.create_string_buffer(512)
    path = _key(device)[0]
    with devices.current(device):
        code = functions.albert_products_open(path.encode() or None, ctypes.byref(products), said, len(said))
    if code == 0:
        return products
    detail = f" ({said.value.decode(errors='replace')})" if said.value else ""
    mend = f"set ALBERT_FAST_CUBLASLT to {'its path' if code == _NO_LIBRARY else 'that of another'}, or to 0"
    return f"{_message(code)}{detail}: {mend}"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of this kind have no product here; None where they have.

    While a CUDA graph is captured nothing is opened or tried: a kind that was not asked for before has none then.
    """
    if setting() == "0":
        return "ALBERT_FAST_CUBLASLT=0 switches it off"
    if device.type != _DEVICE_TYPE or torch.version.hip is not None:
        return "it serves tensors on NVIDIA GPUs"
    if dtype not in _CODES:
        return f"float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    kind = (*_key(device), dtype)
    if kind not in _refusals:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, and it was not tried before"
        if _key(device) not in _opened:
            _opened[_key(device)] = _open(device)
        opened = _opened[_key(device)]
        _refusals[kind] = opened if isinstance(opened, str) else _wrong(device, dtype)
    return _refusals[kind]


def version(device: torch.device) -> int:
    """cuBLASLt's, as major * 10000 + minor * 100 + patch, where `refusal` is None."""
    return _functions().albert_products_version(_opened[_key(device)])


_ALIGNED = 256  # a workspace


@functools.cache
def _workspace_bytes(device: torch.device) -> int:
    """What cuBLAS's documentation recommends."""
    return (32 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else 4) << 20


# ------------------------------------------------------------------------------------------------------- the products


class Product:
    """A product whose arguments were checked; calling it runs it on the current stream of their device.

    Attributes:
        name: of the C function.
        device, dtype: of its factors.
    """

    def __init__(self, name: str, factor: Tensor, arguments: tuple[Any, ...], keep: tuple[Tensor | None, ...]) -> None:
        self.name, self.device, self.dtype = name, factor.device, factor.dtype
        self._arguments = arguments
        self._keep = keep  # whose addresses the arguments are

    def __call__(self) -> bool:
        """False, and nothing was started, where cuBLASLt has no algorithm for these sizes or addresses.

        Raises:
            RuntimeError: cuBLASLt failed.
        """
        products = _opened[_key(self.device)]
        size = _workspace_bytes(self.device)
        with devices.current(self.device):
            # Belongs to the stream, and to the graph that is captured: the allocator sees to both.
            workspace = torch.empty(size + _ALIGNED - 1, dtype=torch.uint8, device=self.device)
            address = -(-workspace.data_ptr() // _ALIGNED) * _ALIGNED
            place = ctypes.byref(_Place(address, size, devices.stream_of(self.device)))
            function = getattr(_functions(), f"albert_products_{self.name}")
            code = function(products, place, _CODES[self.dtype], *self._arguments)
        if code in (_UNALIGNED, _UNSUPPORTED):
            return False
        if code != 0:
            raise RuntimeError(f"albert_fast: {self.name} by cuBLASLt failed: {_message(code)} (code {code})")
        return True


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, inner: Tensor) -> Product:
    """inner = x weightᵀ + bias and y = gelu(inner), the tanh form.

    Args:
        x: [tokens, in], float16 or bfloat16; all others alike. Rows of x, y and inner are contiguous each.
        weight, bias: [out, in] and [out], contiguous.
        y, inner: [tokens, out], written.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: `refusal` has a reason.
    """
    keep = (x, weight, bias, y, inner)
    kind = _kind("linear_gelu", keep)
    if kind not in _checked:
        (tokens, inputs), outputs = _sizes("x", x), weight.shape[0]
        _rows("x", x, (tokens, inputs), x)
        _whole("weight", weight, (outputs, inputs), x)
        _whole("bias", bias, (outputs,), x)
        _rows("y", y, (tokens, outputs), x)
        _rows("inner", inner, (tokens, outputs), x)
        _remember(kind)
    pointers = (x.data_ptr(), _row_stride(x), weight.data_ptr(), bias.data_ptr())
    written = (y.data_ptr(), _row_stride(y), inner.data_ptr(), _row_stride(inner))
    return Product("linear_gelu", x, (*x.shape, weight.shape[0], *pointers, *written), keep)


def gelu_gradient(grad: Tensor, weight: Tensor, inner: Tensor, grad_inner: Tensor, grad_bias: Tensor) -> Product:
    """grad_inner = (grad weight) gelu'(inner), and its sum over the tokens.

    Args:
        grad: [tokens, in], float16 or bfloat16; all others alike. Rows of the matrices of tokens are contiguous each.
        weight: [in, out], contiguous.
        inner: [tokens, out], what `linear_gelu` wrote.
        grad_inner: [tokens, out], written.
        grad_bias: [out], contiguous, written; rounded to its dtype.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: `refusal` has a reason.
    """
    keep = (grad, weight, inner, grad_inner, grad_bias)
    kind = _kind("gelu_gradient", keep)
    if kind not in _checked:
        (tokens, inputs), outputs = _sizes("grad", grad), weight.shape[-1]
        _rows("grad", grad, (tokens, inputs), grad)
        _whole("weight", weight, (inputs, outputs), grad)
        _rows("inner", inner, (tokens, outputs), grad)
        _rows("grad_inner", grad_inner, (tokens, outputs), grad)
        _whole("grad_bias", grad_bias, (outputs,), grad)
        _remember(kind)
    pointers = (grad.data_ptr(), _row_stride(grad), weight.data_ptr(), inner.data_ptr(), _row_stride(inner))
    written = (grad_inner.data_ptr(), _row_stride(grad_inner), grad_bias.data_ptr())
    return Product("gelu_gradient", grad, (*grad.shape, weight.shape[1], *pointers, *written), keep)


def weight_gradient(
    grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None = None, *, accumulate: bool
) -> Product:
    """grad_weight = gradᵀ x, or += with `accumulate`, and the sum of grad over the tokens.

    Args:
        grad: [tokens, out], float16 or bfloat16; rows contiguous each.
        x: [tokens, in], likewise.
        grad_weight: float32 [out, in], contiguous, written or added to.
        grad_bias: float32 [out], contiguous, written whatever `accumulate`; or None.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: `refusal` has a reason.
    """
    keep = (grad, x, grad_weight, grad_bias)
    kind = _kind("weight_gradient", keep)
    if kind not in _checked:
        (tokens, outputs), inputs = _sizes("grad", grad), x.shape[-1]
        _rows("grad", grad, (tokens, outputs), grad)
        _rows("x", x, (tokens, inputs), grad)
        _whole("grad_weight", grad_weight, (outputs, inputs), grad, torch.float32)
        if grad_bias is not None:
            _whole("grad_bias", grad_bias, (outputs,), grad, torch.float32)
        _remember(kind)
    (tokens, outputs), inputs = grad.shape, x.shape[1]
    factors = (grad.data_ptr(), _row_stride(grad), x.data_ptr(), _row_stride(x))
    written = (grad_weight.data_ptr(), int(accumulate), None if grad_bias is None else grad_bias.data_ptr())
    return Product("weight_gradient", grad, (tokens, inputs, outputs, *factors, *written), keep)


# Kinds of calls whose arguments were checked and found to fit: the checks take as long as some products.
_checked: set[tuple[Any, ...]] = set()
_MOST_CHECKED = 4096


def _kind(name: str, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """What the checks look at."""
    return name, setting(), *[None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _remember(kind: tuple[Any, ...]) -> None:
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked.add(kind)


def _sizes(name: str, factor: Tensor) -> tuple[int, int]:
    check_tensor(name, factor, (None, None), dtype=tuple(_CODES))
    if not isinstance(_opened.get(_key(factor.device)), c_void_p):  # whoever asked `refusal` has opened it
        reason = refusal(factor.device, factor.dtype)
        if reason is not None:
            raise RuntimeError(f"albert_fast: no products by cuBLASLt: {reason}")
    rows, columns = factor.shape
    check(rows > 0 and columns > 0, f"{name} is empty; at least one row and column were expected")
    return rows, columns


def _rows(name: str, tensor: Tensor, shape: tuple[int, int], like: Tensor) -> None:
    check_tensor(name, tensor, shape, like=like, dtype=like.dtype)
    contiguous = shape[1] == 1 or tensor.stride(1) == 1
    fits = contiguous and _row_stride(tensor) >= shape[1]
    check(fits, f"{name} has strides {tensor.stride()}; contiguous rows were expected")


def _row_stride(tensor: Tensor) -> int:
    rows, columns = tensor.shape
    return columns if rows == 1 else tensor.stride(0)


def _whole(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    check_tensor(name, tensor, shape, like=like, dtype=dtype or like.dtype)
    check(tensor.is_contiguous(), f"{name} has strides {tensor.stride()}; it was expected to be contiguous")


# ------------------------------------------------------------------------------------------------------ a first trial

# Far from rounding (2**-9), and further from what a matrix, a vector or a dtype taken for another would give.
_TOLERANCE = 0.02


def _wrong(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tries each product on small matrices: which of them are not what PyTorch computes in float32."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for name, trial in {"linear_gelu": _try_linear_gelu, "weight_gradient": _try_weight_gradient}.items():
            # Not random numbers: the generator's state is the caller's.
            numbers = functools.partial(_numbers, device=device, dtype=dtype)
            try:
                worst = trial(numbers)
            except RuntimeError as error:
                return str(error).removeprefix("albert_fast: ").partition("\n")[0]
            if worst is not None and not worst < _TOLERANCE:  # NaN, too
                return (
                    f"{name} by cuBLASLt is wrong by {worst:.3g}: please report it; 0 in ALBERT_FAST_CUBLASLT hides it"
                )
    return None


_Numbers = Callable[..., Tensor]


def _numbers(*shape: int, step: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device, dtype=torch.float64) * step).sin().to(dtype).view(shape)


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return difference.item()


def _try_linear_gelu(numbers: _Numbers) -> float | None:
    """With its gradient; None where cuBLASLt has no algorithm."""
    x, weight, bias = numbers(24, 64, step=0.7), numbers(128, 64, step=1.3), numbers(128, step=0.9)
    y, inner, grad_inner, grad_bias = (torch.full_like(x.new_empty(s), torch.nan) for s in [(24, 128)] * 3 + [(128,)])
    grad, weight_after = numbers(24, 32, step=1.1), numbers(32, 128, step=0.3)
    if not linear_gelu(x, weight, bias, y, inner)():
        return None
    if not gelu_gradient(grad, weight_after, inner, grad_inner, grad_bias)():
        return None
    expected = x.float() @ weight.float().t() + bias.float()
    slope = torch.ops.aten.gelu_backward(torch.ones_like(expected), expected, approximate="tanh")
    expected_grad = grad.float() @ weight_after.float() * slope
    return (
        _error(inner, expected)
        + _error(y, torch.nn.functional.gelu(expected, approximate="tanh"))
        + _error(grad_inner, expected_grad)
        + _error(grad_bias, expected_grad.sum(0))
    )


def _try_weight_gradient(numbers: _Numbers) -> float | None:
    grad, x = numbers(24, 128, step=0.7), numbers(24, 64, step=1.3)
    total = torch.ones(128, 64, device=grad.device)
    sums = torch.full_like(total[:, 0], torch.nan).contiguous()
    if not weight_gradient(grad, x, total, sums, accumulate=True)():
        return None
    return _error(total - 1.0, grad.float().t() @ x.float()) + _error(sums, grad.float().sum(0))
