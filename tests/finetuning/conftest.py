"""A small vocabulary, a small model with it, and words that mean something."""

import random
from pathlib import Path

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM
from albert_fast.tokenizer import AlbertTokenizer, train_vocabulary

GOOD = ["fine", "great", "warm", "moving", "clever"]
BAD = ["dull", "poor", "cold", "empty", "stupid"]
OTHER = ["film", "story", "actor", "scene", "music", "the", "a", "was", "and", "with", "rather", "quite"]


def sentence(draw: random.Random, good: bool) -> str:
    """Some words, three of which tell what is thought of it."""
    words = draw.choices(OTHER, k=draw.randint(3, 12)) + draw.choices(GOOD if good else BAD, k=3)
    draw.shuffle(words)
    return " ".join(words)


@pytest.fixture
def draw(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A model of a few thousand weights that nothing was trained on, with its vocabulary."""
    directory = tmp_path_factory.mktemp("model")
    draw = random.Random(3)
    text = "\n".join(sentence(draw, bool(i % 2)) for i in range(400))
    train_vocabulary([text], directory, vocab_size=55)
    tokenizer = AlbertTokenizer.from_pretrained(directory)
    config = AlbertConfig.base(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        num_hidden_layers=2,
        embedding_size=16,
        max_position_embeddings=64,
        initializer_range=0.15,
        classifier_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # else a test's weights depend on the tests before it, whatever seed it prints
        AlbertForMaskedLM(config).save_pretrained(directory)
    return directory
