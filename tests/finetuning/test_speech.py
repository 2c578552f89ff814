"""Speech recognition: files, and a run that tells two tones apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast import AlbertConfig
from albert_fast.audio import _mel_bands
from albert_fast.finetuning.config import CONFIGURATION
from albert_fast.finetuning.reading import DataError, Place
from albert_fast.finetuning.run import Pipeline, finetune
from albert_fast.finetuning.speech import Speech, Utterance
from albert_fast.finetuning.trainer import Finetuner
from albert_fast.speech import AlbertForCTC
from albert_fast.training import parallel, tracking

soundfile = pytest.importorskip("soundfile")
RATE, TONES = 8000, {"a": 500.0, "b": 1500.0}


def write(folder: Path, name: str, texts: list[str], rng: np.random.Generator) -> Path:
    """A table and its files: each letter a tone of 0.2 seconds, with a pause behind it."""
    folder.mkdir(exist_ok=True)
    lines = ["audio\ttext"]
    for number, text in enumerate(texts):
        time = np.arange(int(0.2 * RATE)) / RATE
        parts = [np.zeros(400)]
        for letter in text:
            tone = TONES[letter] * rng.uniform(0.95, 1.05)
            parts += [0.3 * np.sin(2 * np.pi * tone * time), np.zeros(int(rng.integers(400, 900)))]
        sound = np.concatenate(parts)
        sound += 0.003 * rng.normal(size=len(sound))
        soundfile.write(folder / f"{name}{number}.wav", sound.astype(np.float32), RATE)
        lines.append(f"{name}{number}.wav\t{text}")
    table = folder / f"{name}.tsv"
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture
def configure(model_directory, tmp_path, rng):
    def texts(count: int) -> list[str]:
        return ["".join(rng.choice(["a", "b"], rng.integers(1, 4))) for _ in range(count)]

    train, dev = (write(tmp_path / "sound", name, texts(count), rng) for name, count in (("train", 60), ("dev", 20)))
    shape = AlbertConfig.from_pretrained(model_directory)
    shape.save_pretrained(tmp_path / "shape")

    def make(*overrides: str):
        base = [
            "task=speech",
            f"model={tmp_path / 'shape' / 'config.json'}",
            f"data={{train: ['{train}'], dev: ['{dev}'], label: text, rate: {RATE}}}",
            f"output={tmp_path / 'run'}",
            "length=64",
            "epochs=40",
            "optimizer.learning_rate=0.004",
            "optimizer.bias_correction=true",
            "batch.size=10",
            "evaluate.every=60",
            "decoding.beams=3",
            "log={every: 20, quiet: true, peak_flops: 1e12}",
            "device=cpu",
        ]
        return CONFIGURATION.parse(None, [*base, *overrides])

    return make


def test_it_learns(configure, tmp_path):
    assert finetune(configure()) == 0
    evaluations = [record for record in tracking.read(tmp_path / "run") if record["kind"] == "evaluation"]
    assert evaluations[-1]["cer"] < 0.2
    pipeline = Pipeline(tmp_path / "run" / "best", device="cpu")
    (said,) = pipeline([str(tmp_path / "sound" / "dev0.wav")])
    assert said["text"]
    assert set(said["text"]) <= {"a", "b"}
    assert pipeline.task.labels == ["<blank>", "a", "b"]


def test_a_head_for_other_characters_is_left_out(configure, tmp_path):
    """What hears stays, and what says is new."""
    assert finetune(configure("schedule.steps=1", "epochs=null")) == 0
    best = tmp_path / "run" / "best"
    before = AlbertForCTC.from_pretrained(best).state_dict()
    table = tmp_path / "sound" / "train.tsv"
    table.write_text(table.read_text().replace("b", "c").replace("\tc", "\tbc", 1))
    with pytest.warns(
        UserWarning, match=r"newly initialized, because .* lacks them: classifier.weight, classifier.bias\."
    ):
        run = Finetuner(
            configure(f"model={best}", f"output={tmp_path / 'other'}", "data.dev=[]"), parallel.start("cpu")
        )
    after = run.learner.model.state_dict()
    assert after.pop("classifier.weight").shape[0] == 4
    after.pop("classifier.bias")
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert len(after) == len(before) - 2


def test_bad_files(configure, tmp_path):
    table = tmp_path / "sound" / "train.tsv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, "train0.wav\t" + "ab" * 40]))
    with pytest.raises(DataError, match=r"train\.tsv, line 62: .*too short for CTC"):
        Finetuner(configure(), parallel.start("cpu"))
    table.write_text("\n".join([*lines, "missing.wav\ta"]))
    with pytest.raises(DataError, match=r"train\.tsv, line 62: .*missing\.wav cannot be read"):
        Finetuner(configure(), parallel.start("cpu"))
    table.write_text("\n".join([*lines, "train0.wav\t "]))
    with pytest.raises(DataError, match=r"line 62: nothing is said"):
        Finetuner(configure(), parallel.start("cpu"))
    soundfile.write(tmp_path / "sound" / "short.wav", np.zeros(50, np.float32), RATE)
    table.write_text("\n".join([*lines, "short.wav\ta"]))
    with pytest.raises(DataError, match=r"line 62: .*50 samples, less than a frame"):
        Finetuner(configure(), parallel.start("cpu"))


@pytest.mark.parametrize("sample", [np.nan, np.inf, 1e30], ids=["nan", "infinite", "too_large"])
@pytest.mark.parametrize("own", [RATE, 2 * RATE], ids=["rate", "resampled"])
def test_samples_that_are_no_numbers(sample, own, model_directory, tmp_path):
    sound = np.zeros(own, np.float32)
    sound[own // 2] = sample
    soundfile.write(tmp_path / "a.wav", sound, own, subtype="FLOAT")
    config = CONFIGURATION.parse(None, [f"data.rate={RATE}"])
    task = Speech(config, None, {"labels": ["<blank>", "a"], "rate": RATE})
    with pytest.raises(DataError, match=r"input, line 1: .*a\.wav has samples that are not finite"):
        task.rows([Utterance(Place(Path("input"), 1), tmp_path / "a.wav", "a")], labelled=True)


@pytest.mark.parametrize("rate", [-1, 0, 1000])
def test_rates_that_are_too_low(rate):
    with pytest.raises(ValueError, match=f"data.rate is {rate}; at least 2400 was expected"):
        CONFIGURATION.parse(None, [f"data.rate={rate}"])
    assert (_mel_bands(2400, 64, 40).sum(1) > 0).all()
