"""Spoken numbers of several digits from the Free Spoken Digit Dataset: `python make_digits.py RECORDINGS.zip OUT`.

Makes train.tsv, dev.tsv and test.tsv with their wav files: 2 to 5 recordings of one speaker, one after the other with
pauses between. Test takes are the official ones, 0 to 4, dev takes 5 and 6; no recording is in two of them. With
--speaker NAME all of that speaker's recordings are test's, and nobody else's.
"""

from __future__ import annotations

import argparse
import io
import random
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
RATE = 8000


def read(archive: Path) -> dict[tuple[str, int, int], np.ndarray]:
    """The recordings, by speaker, digit and take."""
    found = {}
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if name.endswith(".wav"):
                digit, speaker, take = Path(name).stem.split("_")
                samples, rate = soundfile.read(io.BytesIO(opened.read(name)), dtype="float32")
                assert rate == RATE, (name, rate)
                found[speaker, int(digit), int(take)] = samples
    return found


def part_of(speaker: str, take: int, held_out: str | None) -> str | None:
    if held_out is not None:
        if speaker == held_out:
            return "test"
        return "dev" if take < 2 else "train"
    return "test" if take < 5 else "dev" if take < 7 else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--speaker", default=None)
    parser.add_argument("--train", type=int, default=4000, help="utterances to make")
    parser.add_argument("--test", type=int, default=400, help="utterances of dev and of test")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw, recordings = random.Random(args.seed), read(args.archive)
    parts: dict[str, dict[str, list[tuple[int, np.ndarray]]]] = defaultdict(lambda: defaultdict(list))
    for (speaker, digit, take), samples in recordings.items():
        parts[part_of(speaker, take, args.speaker) or ""][speaker].append((digit, samples))
    for part, count in (("train", args.train), ("dev", args.test), ("test", args.test)):
        folder = args.output / part
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["audio\ttext"]
        for number in range(count):
            speaker = draw.choice(sorted(parts[part]))
            chosen = [draw.choice(parts[part][speaker]) for _ in range(draw.randint(2, 5))]
            sound = [np.zeros(draw.randint(400, 1600), np.float32)]
            for _, samples in chosen:
                sound += [samples, np.zeros(draw.randint(400, 1600), np.float32)]
            soundfile.write(folder / f"{number}.wav", np.concatenate(sound), RATE)
            lines.append(f"{part}/{number}.wav\t{' '.join(WORDS[digit] for digit, _ in chosen)}")
        (args.output / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
