"""The token store: what goes in comes out, and what is no store is not taken for one."""

import json
import pickle
import random

import numpy as np
import pytest

from albert_fast.pretraining.store import (
    DOCUMENTS,
    META,
    SENTENCES,
    TOKENS,
    Counts,
    StoreError,
    StoreWriter,
    TokenStore,
)


def random_documents(vocab_size: int, count: int = 20) -> list[list[np.ndarray]]:
    """Some sentences are empty, and some documents."""
    rng = np.random.default_rng(random.getrandbits(64))
    return [[rng.integers(0, vocab_size, rng.integers(0, 9)) for _ in range(rng.integers(0, 6))] for _ in range(count)]


def as_lists(documents) -> list[list[list[int]]]:
    """Without what is empty."""
    kept = [[list(map(int, sentence)) for sentence in document if len(sentence)] for document in documents]
    return [document for document in kept if document]


def contents(store: TokenStore) -> list[list[list[int]]]:
    return as_lists(store[i] for i in range(len(store)))


def write(directory, documents, vocab_size=100) -> TokenStore:
    with StoreWriter(directory, vocab_size) as writer:
        for document in documents:
            writer.append(document)
        writer.finish()
    return TokenStore.open(directory)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(30000, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_round_trip(vocab_size, dtype, tmp_path):
    documents = [*random_documents(vocab_size), [np.array([0, vocab_size - 1])]]
    for store in (write(tmp_path / "a" / "b", documents, vocab_size), TokenStore.from_documents(documents, vocab_size)):
        assert contents(store) == as_lists(documents)
        assert store.tokens.dtype == dtype
        assert store.sentence_offsets.dtype == store.document_offsets.dtype == np.int64
        assert store.vocab_size == vocab_size
        assert store.sentence_offsets[-1] == len(store.tokens)
        assert store.document_offsets[-1] == len(store.sentence_offsets) - 1
        assert (np.diff(store.sentence_offsets) > 0).all()
        assert (np.diff(store.document_offsets) > 0).all()
        assert str(len(store)) in repr(store)
        with pytest.raises(IndexError, match=f"{len(store)}; 0 to"):
            store[len(store)]


def test_it_is_mapped_and_read_only(tmp_path):
    store = write(tmp_path, random_documents(100))
    assert isinstance(store.tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.tokens[0] = 1


@pytest.mark.parametrize("documents", [[], [[]], [[[]], []]])
def test_an_empty_store(documents, tmp_path):
    for store in (write(tmp_path / "s", documents), TokenStore.from_documents(documents, 100)):
        assert (len(store), len(store.tokens)) == (0, 0)
        assert store.sentence_offsets.tolist() == store.document_offsets.tolist() == [0]


def test_pickling(tmp_path, monkeypatch):
    documents = random_documents(100)
    monkeypatch.chdir(tmp_path)
    on_disk, in_memory = write("store", documents), TokenStore.from_documents(documents, 100)
    data = pickle.dumps(on_disk)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    for copy in (pickle.loads(data), pickle.loads(pickle.dumps(in_memory))):
        assert contents(copy) == as_lists(documents)
        assert copy.vocab_size == 100


def test_parts_of_documents(tmp_path):
    """A document may come in pieces; a piece may be empty, and end nothing."""
    documents = random_documents(100)
    lengths = np.array([len(sentence) for document in documents for sentence in document])
    tokens = np.concatenate([sentence for document in documents for sentence in document])
    ends = np.cumsum([len(document) for document in documents])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    with StoreWriter(tmp_path, 100) as writer:
        at = 0
        while at < len(lengths):
            to = min(len(lengths), at + random.randint(0, 4))
            here = ends[(ends >= at) & (ends <= to)] - at
            writer.extend(tokens[starts[at] : starts[to]], lengths[at:to], here)
            at = to
        writer.finish(note="from parts")
    store = TokenStore.open(tmp_path)
    assert contents(store) == as_lists(documents)
    assert store.meta["note"] == "from parts"


def test_resuming_cuts_off_what_came_after_the_checkpoint(tmp_path):
    documents = random_documents(100)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write(whole, documents)
    with StoreWriter(broken, 100) as writer:
        for document in documents[:10]:
            writer.append(document)
        counts = writer.checkpoint()
        writer.append([np.arange(100)])
    with StoreWriter(broken, 100, resume=Counts(*counts)) as writer:
        for document in documents[10:]:
            writer.append(document)
        writer.finish()
    for name in (TOKENS, SENTENCES, DOCUMENTS, META):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_resuming_from_more_than_there_is(tmp_path):
    with StoreWriter(tmp_path, 100) as writer:
        writer.append([np.arange(5)])
    with pytest.raises(StoreError, match=r"tokens\.bin is damaged .*10 bytes of the 12"):
        StoreWriter(tmp_path, 100, resume=Counts(6, 1, 1))


def test_an_unfinished_store_is_none(tmp_path):
    with StoreWriter(tmp_path, 100) as writer:
        writer.append([np.arange(5)])
        writer.checkpoint()
        with pytest.raises(StoreError, match="was not finished: run the command"):
            TokenStore.open(tmp_path)


def test_a_finished_store_is_not_overwritten(tmp_path):
    write(tmp_path, random_documents(100))
    with pytest.raises(StoreError, match="holds a finished store"):
        StoreWriter(tmp_path, 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / META).write_text("{"), "meta.json is damaged"),
        (lambda d: (d / META).write_text("[]"), "meta.json is damaged"),
        (lambda d: (d / META).write_text('{"version": 1}'), "meta.json is damaged .*tokens"),
        (lambda d: (d / META).write_text('{"version": 99}'), "version 99; 1 was expected"),
        (lambda d: change_meta(d, dtype="float32"), "float32"),
        (lambda d: change_meta(d, vocab_size=70000), "uint16"),
        (lambda d: change_meta(d, tokens=1), "tokens.bin is damaged .*bytes; 2 were expected"),
        (lambda d: (d / TOKENS).unlink(), "tokens.bin is damaged .*missing"),
        (lambda d: (d / TOKENS).write_bytes((d / TOKENS).read_bytes()[:-1]), "tokens.bin is damaged"),
        (
            lambda d: (d / SENTENCES).write_bytes(bytes((d / SENTENCES).stat().st_size)),
            "sentence_offsets.bin is damaged",
        ),
        (
            lambda d: (d / DOCUMENTS).write_bytes(bytes((d / DOCUMENTS).stat().st_size)),
            "document_offsets.bin is damaged",
        ),
    ],
)
def test_damage(damage, message, tmp_path):
    write(tmp_path, [*random_documents(100), [np.arange(9)]])
    damage(tmp_path)
    with pytest.raises(StoreError, match=message):
        TokenStore.open(tmp_path)


def change_meta(directory, **changes) -> None:
    meta = json.loads((directory / META).read_text())
    (directory / META).write_text(json.dumps({**meta, **changes}))


def test_no_store_at_all(tmp_path):
    with pytest.raises(StoreError, match="nowhere is not a directory"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="is no token store"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("sentence", [[3, 100], [-1], [0.5], [[1]]])
def test_ids_outside_the_vocabulary(sentence, tmp_path):
    with pytest.raises(StoreError, match="document holds"):
        TokenStore.from_documents([[sentence]], 100)
    with StoreWriter(tmp_path, 100) as writer, pytest.raises(StoreError, match="document holds"):
        writer.append([np.array(sentence)])


@pytest.mark.parametrize("vocab_size", [0, -1, (1 << 32) + 1])
def test_vocab_sizes_that_cannot_be(vocab_size):
    with pytest.raises(StoreError, match=str(vocab_size)):
        TokenStore.from_documents([], vocab_size)
