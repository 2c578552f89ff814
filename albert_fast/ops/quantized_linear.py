"""x weightᵀ + bias in 8-bit integers: how an encoder that was quantized multiplies (Jacob et al., arXiv 1712.05877,
section 2, with the scales of LLM.int8(), arXiv 2208.07339, section 3.1: one a token and one an output channel).

    weight [n, k] ~ weight_scale[n] · q,           q int8 in [-127, 127], weight_scale = max |weight| / 127
    x [tokens, k] ~ x_scale[token] · (u - zero),   u uint8, the range widened to hold 0, so that 0 is exact
    y = x_scale · weight_scale · (Σ u q - zero · Σ q) + bias

Activations are quantized when they are multiplied. Sums are exact in int32 (k up to 65536).

Rounding the weight adds (weight_scale q - weight) x to y, most of which is the same for all tokens where the inputs
have a mean: with `mean`, that of x over tokens, the bias is corrected by (weight - weight_scale q) mean (Nagel et al.,
arXiv 1906.04721, section 4.2).

Precision is lost in rounding x and weight to 8 bits, and nowhere else; rows of x that hold NaN or infinity give NaN.
There is no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [n, k] -> int8 [n, k] and the float32 scale of each output channel [n]."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1) / 127.0
    inverse = torch.where(scale > 0.0, 1.0 / scale, 0.0)
    return (weight * inverse[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, k] -> uint8 [tokens, k], the float32 scale and the int32 zero point of each token [tokens]."""
    x = x.float()
    low, high = x.amin(dim=1).clamp(max=0.0), x.amax(dim=1).clamp(min=0.0)
    scale = (high - low) / 255.0
    inverse = torch.where(scale > 1e-36, 1.0 / scale, 0.0)
    zero = (-low * inverse + 0.5).floor()
    quantized = (x * inverse[:, None] + zero[:, None]).clamp(0, 255).round()
    finite = x.isfinite().all(dim=1)
    scale = torch.where(finite, scale, torch.nan)
    return quantized.nan_to_num(255.0).to(torch.uint8), scale, zero.nan_to_num(0.0).to(torch.int32)


def rounding_error(weight: Tensor) -> Tensor:
    """weight - weight_scale q, [n, k] float32."""
    q, scale = quantize_weight(weight)
    return weight.float() - q.float() * scale[:, None]


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None) -> Tensor:
    """The product, by the formula above.

    Args:
        x: [tokens, k], floating point.
        weight: [n, k], floating point; quantized here.
        bias: [n].
        mean: [k], what x is on average; None: the bias is not corrected.

    Returns:
        [tokens, n], the dtype of x.
    """
    if mean is not None:
        bias = bias.float() + rounding_error(weight) @ mean.float()
    q, weight_scale = quantize_weight(weight)
    u, x_scale, zero = quantize_rows(x)
    # Sums of up to 65536 products of 8 bits are exact in float64, which a matrix product is fast in.
    sums = u.double() @ q.double().t() - zero.double()[:, None] * q.double().sum(dim=1)
    return (sums * x_scale.double()[:, None] * weight_scale.double() + bias.double()).to(x.dtype)
