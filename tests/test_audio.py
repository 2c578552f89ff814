"""Log-mel features against Kaldi's, and what is done with them."""

import numpy as np
import pytest
import torch

from albert_fast.audio import log_mel, normalized, positions, read_audio, spec_augment


def sound(rng: np.random.Generator, rate: int, seconds: float) -> np.ndarray:
    """Some tones that come and go, and noise."""
    time = np.arange(int(rate * seconds)) / rate
    tones = sum(
        rng.uniform(0.02, 0.2)
        * np.sin(2 * np.pi * rng.uniform(60, rate / 2) * time + rng.uniform(0, 6))
        * (0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 6) * time))
        for _ in range(5)
    )
    return (tones + 0.01 * rng.normal(size=len(time))).astype(np.float32)


@pytest.mark.parametrize(("rate", "bins"), [(16000, 80), (8000, 40), (44100, 80)], ids=["16k", "8k", "44k"])
def test_kaldis(rate, bins, rng):
    kaldi = pytest.importorskip("kaldi_native_fbank")
    samples = sound(rng, rate, rng.uniform(0.3, 1.2))
    options = kaldi.FbankOptions()
    options.frame_opts.samp_freq, options.frame_opts.dither = rate, 0.0
    options.mel_opts.num_bins = bins
    online = kaldi.OnlineFbank(options)
    online.accept_waveform(rate, (samples * 32768).tolist())
    online.input_finished()
    expected = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
    found = log_mel(torch.from_numpy(samples), rate, bins).numpy()
    assert found.shape == expected.shape
    # A band that is nearly empty is a difference of large numbers: rounding is a share of the frame's energy.
    found_energy, energy = (np.exp(each.astype(np.float64)) for each in (found, expected))
    assert (np.abs(found_energy - energy) <= 1e-3 * energy + 1e-7 * energy.max(1, keepdims=True)).all()
    assert np.abs(found - expected).mean() < 1e-3


def test_bad_sound():
    with pytest.raises(ValueError, match="samples has 100 at a rate of 16000; at least 400"):
        log_mel(torch.zeros(100), 16000)
    with pytest.raises(ValueError, match=r"shape \[2, 500\]; one channel"):
        log_mel(torch.zeros(2, 500), 16000)


def test_normalized(rng):
    features = torch.from_numpy(rng.normal(3, 2, [50, 8])).float()
    features[:, 2] = 7.0
    found = normalized(features)
    assert found.mean(0).abs().max() < 1e-4
    assert (found.std(0, correction=0)[[0, 1, 3]] - 1).abs().max() < 1e-4
    assert torch.equal(found[:, 2], torch.zeros(50))


def test_stripes(rng, seed):
    torch.manual_seed(seed)
    features = torch.from_numpy(rng.uniform(1, 2, [60, 20])).float()
    whole = features.clone()
    hidden = []
    for _ in range(1000):
        found = spec_augment(features, 5, 0.1)
        gone = found == 0
        assert torch.equal(found[~gone], features[~gone])
        rows, columns = gone.all(1), gone.all(0)
        assert torch.equal(gone, rows[:, None] | columns[None, :])
        assert rows.sum() <= 12
        assert columns.sum() <= 10
        hidden.append(float(columns.sum()))
    assert torch.equal(features, whole)
    # Two stripes of 0 to 5 bands each, which may overlap: 4.69 ± 0.07.
    assert 4.2 < np.mean(hidden) < 5.2


def test_positions():
    found = positions(7, 10, torch.device("cpu"))
    assert found.shape == (7, 10)
    assert found[3, 4] == pytest.approx(np.sin(3 / 10000 ** (4 / 10)), abs=1e-6)
    assert found[3, 5] == pytest.approx(np.cos(3 / 10000 ** (4 / 10)), abs=1e-6)


def test_files(rng, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples = sound(rng, 8000, 0.5)
    soundfile.write(tmp_path / "a.flac", np.stack([samples, samples], 1), 8000)
    found = read_audio(str(tmp_path / "a.flac"), 8000)
    np.testing.assert_allclose(found.numpy(), samples, atol=1e-4)
    assert len(read_audio(str(tmp_path / "a.flac"), 16000)) == 2 * len(samples)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"b\.wav cannot be read as sound"):
        read_audio(str(tmp_path / "b.wav"), 8000)
    soundfile.write(tmp_path / "c.wav", np.zeros(0, np.float32), 8000)
    with pytest.raises(ValueError, match="is empty"):
        read_audio(str(tmp_path / "c.wav"), 8000)
