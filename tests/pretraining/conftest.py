"""A small corpus on disk, and runs on it."""

import pydoc_data.topics
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from albert_fast.pretraining.config import PretrainConfig, parse
from albert_fast.pretraining.corpus import build
from albert_fast.tokenizer import AlbertTokenizer, train_vocabulary

WORDS = sorted({word.lower() for word in pydoc_data.topics.topics["strings"].split() if word.isalpha()})[::4][
    :60
]  # few enough to be pieces


TOPICS = 6


def random_text(documents: int, draw: random.Random) -> str:
    """Documents whose words are of one topic each, which the context tells: something to learn, and quickly."""
    lines = []
    for document in range(documents):
        words = WORDS[document % TOPICS :: TOPICS]
        for _ in range(draw.randint(6, 20)):
            lines.append(" ".join(draw.choices(words, k=draw.randint(4, 14))) + ".")
        lines.append("")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def store_directory(tmp_path_factory) -> Path:
    """A token store of 80 documents with a vocabulary of 100 pieces."""
    directory = tmp_path_factory.mktemp("corpus")
    text = random_text(80, random.Random(5))
    train_vocabulary([text], directory / "vocabulary", vocab_size=100)
    (directory / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = AlbertTokenizer.from_pretrained(directory / "vocabulary")
    build([directory / "text.txt"], tokenizer, directory / "store", workers=1)
    return directory / "store"


@pytest.fixture
def make_config(store_directory: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """make_config("schedule.steps=8", …): a run of a model that takes milliseconds a step, in tmp_path / "run"."""

    def make(*overrides: str) -> PretrainConfig:
        return parse(None, [*small_run(store_directory, tmp_path / "run"), *overrides])

    return make


def small_run(store: Path, output: Path) -> list[str]:
    return [
        f"output={output}",
        f"data.train={store}",
        "data.dev_documents=8",
        "model.overrides={hidden_size: 32, num_attention_heads: 2, intermediate_size: 64, num_hidden_layers: 2, "
        "embedding_size: 16, max_position_embeddings: 64, initializer_range: 0.15}",
        "examples.length=48",
        "batch.size=8",
        "optimizer={name: adamw, learning_rate: 0.005, bias_correction: true, betas: [0.9, 0.98]}",
        "schedule.steps=6",
        "save.every=2",
        "evaluate.every=3",
        "evaluate.rows=24",
        "log.every=1",
        "log.quiet=true",
        "log.peak_flops=1e12",
        "device=cpu",
    ]
