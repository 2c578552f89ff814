"""Sound to log-mel features, as Kaldi computes them, in PyTorch."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from albert_fast.ops.checks import check

WINDOW, SHIFT = 0.025, 0.010  # seconds
LOWEST = 20.0  # Hz
PREEMPHASIS = 0.97


def log_mel(samples: Tensor, rate: int, bins: int = 80) -> Tensor:
    """Log energies of mel bands, float32 [frames, bins], a frame each 10 ms of 25 ms (Kaldi's fbank: povey window, mean
    removed, pre-emphasis 0.97, power spectrum, 20 Hz to half the rate, no dither).

    Args:
        samples: [samples], full scale at 1.
        rate: samples a second.

    Raises:
        ValueError: shorter than a frame, or not one channel.
    """
    check(samples.dim() == 1, f"samples has shape {list(samples.shape)}; one channel, [samples], was expected")
    size, shift = round(rate * WINDOW), round(rate * SHIFT)
    check(
        len(samples) >= size,
        f"samples has {len(samples)} at a rate of {rate}; at least {size}, {WINDOW * 1000:g} ms, were expected",
    )
    frames = (samples.float() * 32768.0).unfold(0, size, shift)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = (frames - PREEMPHASIS * before) * _window(size)
    length = 1 << (size - 1).bit_length()
    power = torch.fft.rfft(frames, n=length).abs().square()
    energies = power[:, :-1] @ _mel_bands(rate, length, bins).T
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def normalized(features: Tensor) -> Tensor:
    """Each band with mean 0 and variance 1 over the utterance."""
    spread = features.std(dim=0, correction=0, keepdim=True).clamp(min=1e-5)
    return (features - features.mean(dim=0, keepdim=True)) / spread


def spec_augment(features: Tensor, bands: int, share: float, times: int = 2) -> Tensor:
    """Features [frames, bins] with `times` stripes of up to `bands` bins and of up to `share` of the frames set to 0,
    the mean (Park et al. 2019, SpecAugment). Draws from torch's generator."""
    features = features.clone()
    frames, bins = features.shape
    for dimension, most in ((1, min(bands, bins)), (0, int(share * frames))):
        for _ in range(times):
            width = int(torch.randint(most + 1, ()))
            start = int(torch.randint(features.shape[dimension] - width + 1, ()))
            features.narrow(dimension, start, width).zero_()
    return features


@functools.cache
def _window(size: int) -> Tensor:
    """Kaldi's "povey": a Hann window to the power of 0.85."""
    return torch.hann_window(size, periodic=False).pow(0.85)


def _mel(frequency: Tensor | float) -> Tensor:
    return 1127.0 * torch.log1p(torch.as_tensor(frequency, dtype=torch.float64) / 700.0)


@functools.cache
def _mel_bands(rate: int, length: int, bins: int) -> Tensor:
    """Triangles on the mel scale, [bins, length / 2]."""
    low, high = _mel(LOWEST), _mel(rate / 2)
    edges = low + (high - low) * torch.arange(bins + 2, dtype=torch.float64) / (bins + 1)
    mels = _mel(torch.arange(length // 2, dtype=torch.float64) * rate / length)
    left, center, right = (edges[i : i + bins, None] for i in range(3))
    rising, falling = (mels - left) / (center - left), (right - mels) / (right - center)
    return torch.minimum(rising, falling).clamp(min=0).float()


def positions(count: int, size: int, device: torch.device) -> Tensor:
    """Sines and cosines [count, size] (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(10000.0) / size))
    angles = torch.arange(count, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :size]


def read_audio(path: str, rate: int) -> Tensor:
    """The samples of a wav, flac or ogg file, at `rate`, channels averaged.

    Raises:
        ValueError: it cannot be read, or is empty.
    """
    import soundfile

    try:
        found, own = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"{path} cannot be read as sound: {error}") from None
    check(len(found) > 0, f"{path} is empty")
    samples = torch.from_numpy(found).mean(dim=1)
    if own == rate:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, own)
    return torch.from_numpy(resample_poly(samples.numpy(), rate // common, own // common)).float()
