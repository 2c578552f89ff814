"""The encoder's products that begin or end with an activation, or with a sum over the tokens: in one kernel of cuBLASLt
(`albert_fast.cublaslt`), or a product of PyTorch's and kernels of this package.

In half precision, and for the tanh form of GELU where there is an activation. Which of the two is chosen for each
product by timing both, once for each kind of call, as `albert_fast.kernels.tuning` does for configurations: dtype,
widths, and tokens rounded up to a power of two. With ALBERT_FAST_AUTOTUNE=0, and while a CUDA graph is captured before
a kind was timed, a rule decides: cuBLASLt on compute capability 9.0 to below 12.0, but for the gradient of GELU, which
takes it 2.2 times as long as a product and a kernel apart (H200, cuBLASLt 13.1; benchmarks/NOTES.md). Before Hopper its
GELU was seen to end in a second kernel (github.com/karpathy/llm.c, #338; by default it fuses from Hopper on, #653), and
on 12.0 to be slower than a kernel apart (github.com/sgl-project/sglang, #34350).

ALBERT_FAST_CUBLASLT=1 takes cuBLASLt wherever it serves, 0 nowhere.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from albert_fast import cublaslt, devices
from albert_fast.kernels import tuning
from albert_fast.kernels.bias_gelu import gelu, gelu_backward
from albert_fast.kernels.column_sum import add_strip_sums
from albert_fast.kernels.launch import architecture, next_power_of_2
from albert_fast.kernels.repeated import Repeated

FUSED, APART = "cuBLASLt", "apart"


class Products:
    """The products of one call of the encoder, whose passes all have the same sizes.

    Args:
        like: [tokens, hidden]; its device and dtype are those of all matrices but the float32 ones.
        form: of the activation.
    """

    def __init__(self, like: Tensor, form: str) -> None:
        self._form, self._like = form, like
        self._ways: dict[tuple[object, ...], str] = {}
        self._gelu = Repeated(functools.partial(_gelu, form))
        self._gelu_backward = Repeated(functools.partial(_gelu_backward, form))

    @functools.cached_property
    def _by_cublaslt(self) -> bool:
        """Found when a product first asks: inference has none that do, and opens no library for them."""
        return _serves(self._like)

    def linear_activation(self, x: Tensor, weight: Tensor, bias: Tensor, inner: Tensor, out: Tensor) -> Tensor:
        """inner = x weightᵀ + bias, out = act(inner).

        Args:
            x: [tokens, in], contiguous; all others alike.
            weight, bias: [out, in] and [out].
            inner, out: [tokens, out], written; `out` may be `inner`, which then is not kept.

        Returns:
            `out`.
        """

        def fused() -> bool:
            return cublaslt.linear_gelu(x, weight, bias, out, inner)()

        def apart() -> None:
            torch.addmm(bias, x, weight.t(), out=inner)
            self._gelu(inner, None if out is inner else out)

        if out is inner or self._form != "tanh" or not self._by_cublaslt:
            apart()
        else:
            self._run(Products.linear_activation, x, weight.shape, fused, apart, (inner, out))
        return out

    def activation_gradient(
        self, grad: Tensor, weight: Tensor, inner: Tensor, grad_inner: Tensor, activated: Tensor, partials: Tensor
    ) -> None:
        """grad_inner = (grad weight) act'(inner), activated = act(inner), and the sums of grad_inner over strips of
        tokens.

        Args:
            grad: [tokens, in], contiguous; all others alike.
            weight: [in, out].
            inner: [tokens, out], of `linear_activation`.
            grad_inner, activated: [tokens, out], written.
            partials: float32 [programs, out], added to as by `gelu_backward`. The sum over all tokens by cuBLASLt,
                which rounds it to the dtype of `grad`, is added to the first row.
        """

        def apart() -> None:
            torch.mm(grad, weight, out=grad_inner)
            self._gelu_backward(grad_inner, inner, activated, partials)

        if self._form != "tanh" or not self._by_cublaslt:
            apart()
            return

        def fused() -> bool:
            grad_bias = grad.new_empty(weight.shape[1])
            if not cublaslt.gelu_gradient(grad, weight, inner, grad_inner, grad_bias)():
                return False
            self._gelu(inner, activated)  # the activations were not kept
            partials[0].add_(grad_bias)
            return True

        self._run(Products.activation_gradient, grad, weight.shape, fused, apart, (grad_inner, activated, partials))

    def add_weight_gradient(
        self, total: Tensor | None, grad: Tensor, x: Tensor, partials: Tensor | None = None
    ) -> Tensor:
        """total + gradᵀ x in float32, in place, and the sums of parts of grad over strips of tokens.

        Args:
            total: float32 [out, in]; None is zero.
            grad: [tokens, out], contiguous; as many tokens as are gathered.
            x: [tokens, in], likewise.
            partials: float32 [strips, 2, out / 3], added to as by `add_strip_sums`: the sums of the first third of
                grad's columns, queries', and of the last, values'; or None.

        Returns:
            `total`, or a new tensor.
        """
        accumulate = total is not None
        if total is None:
            total = grad.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)

        def thirds(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (3, -1))[..., ::2, :]

        def apart() -> None:
            _add_product(total, grad, x, 1.0 if accumulate else 0.0)
            if partials is not None:
                add_strip_sums(thirds(grad), partials)

        # Without sums this is the product that PyTorch has.
        if partials is None or not self._by_cublaslt:
            apart()
            return total

        def fused() -> bool:
            grad_bias = total.new_empty(grad.shape[1])
            if not cublaslt.weight_gradient(grad, x, total, grad_bias, accumulate=accumulate)():
                return False
            partials[0].add_(thirds(grad_bias))
            return True

        widths = (*total.shape, accumulate)
        self._run(Products.add_weight_gradient, grad, widths, fused, apart, (total, partials))
        return total

    def _run(
        self,
        what: Callable[..., object],
        x: Tensor,
        widths: Sequence[int],
        fused: Callable[[], bool],
        apart: Callable[[], None],
        written: Sequence[Tensor],
    ) -> None:
        """Runs one of both; `apart` also where cuBLASLt has no algorithm after all."""

        def run(way: str) -> None:
            if way == APART or not fused():
                apart()

        kind = (what, x.shape[0], *widths)
        way = self._ways.get(kind)
        if way is None:
            way = self._ways[kind] = _choose(what, x, tuple(widths), run, written)
        run(way)


def _gelu(form: str, x: Tensor, out: Tensor | None, *, site: int) -> None:
    gelu(x, None, form, out=x if out is None else out)


def _gelu_backward(form: str, grad_x: Tensor, inner: Tensor, activated: Tensor, partials: Tensor, *, site: int) -> None:
    """In place of the gradient of the output."""
    gelu_backward(grad_x, inner, None, form, grad_x=grad_x, activated=activated, partials=partials)


def _add_product(total: Tensor, grad: Tensor, x: Tensor, beta: float) -> None:
    if grad.dtype == torch.float32:
        torch.addmm(total, grad.t(), x, beta=beta, out=total)
    elif not grad.is_cuda:  # PyTorch has products with wider results on GPUs only
        torch.addmm(total, grad.t().float(), x.float(), beta=beta, out=total)
    else:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, beta=beta, out=total)


# ------------------------------------------------------------------------------------------------------- which of both


def _serves(x: Tensor) -> bool:
    if x.dtype not in (torch.float16, torch.bfloat16) or x.device.type == "meta" or x.shape[0] == 0:
        return False
    reason = cublaslt.refusal(x.device, x.dtype)
    if reason is not None and x.is_cuda and cublaslt.setting() != "0" and not _capturing(x):
        _warn(reason)
    return reason is None


@functools.cache  # once
def _warn(reason: str) -> None:
    message = f"albert_fast: no products by cuBLASLt: {reason}. Kernels apart serve in their place"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _choose(
    what: Callable[..., object],
    x: Tensor,
    widths: tuple[int, ...],
    run: Callable[[str], None],
    written: Sequence[Tensor],
) -> str:
    if cublaslt.setting() == "1":
        return FUSED
    ways = (FUSED, APART) if _by_rule(what, x.device) else (APART, FUSED)
    if not x.is_cuda or not tuning.enabled():
        return ways[0]
    kind = (next_power_of_2(x.shape[0]), *widths, f"cuBLASLt {cublaslt.version(x.device)}")
    with devices.current(x.device):
        return tuning.choices(x.device).best((what, x.dtype, kind, (), ()), ways, run, written)


def _by_rule(what: Callable[..., object], device: torch.device) -> bool:
    return what is not Products.activation_gradient and device.type == "cuda" and 90 <= architecture(device) < 120
