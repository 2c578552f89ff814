"""Where a run is in its text: each row once an epoch, whatever the number of ranks, from wherever it goes on."""

import json
import shutil

import pytest
import torch

from albert_fast.pretraining.feed import Corpus, Feed
from albert_fast.pretraining.store import META, TokenStore


def rows_of(batches) -> list[tuple[int, ...]]:
    found = []
    for batch in batches:
        ids = torch.where(batch.labels != -100, batch.labels, batch.input_ids)
        found += [tuple(row.tolist()) for row in ids.split(batch.cu_seqlens.diff().tolist())]
    return found


def feeds(config, ranks: int) -> list[Feed]:
    corpus = Corpus(config.data)
    return [Feed(corpus, config, rank=rank, ranks=ranks) for rank in range(ranks)]


def take(some: list[Feed], rows: int, micro: int, progress: float = 0.0) -> set[tuple[int, ...]]:
    """Of all ranks together."""
    batches = [feed.take(progress, rows, micro) for feed in some]
    for feed in some:
        feed.done(rows, sum(batch.tokens for of_one in batches for batch in of_one))
    return {row for of_one in batches for row in rows_of(of_one)}


def test_an_epoch_has_each_row_once(make_config):
    (feed,) = feeds(make_config(), 1)
    size, seen = feed.examples.size(0), []
    for _ in range(size // 8):
        seen += rows_of(feed.take(0.0, 8, 4))
        feed.done(8, 0)
    assert feed.epoch == 0
    assert len(set(seen)) == len(seen) == size // 8 * 8
    feed.take(0.0, 8, 4)
    feed.done(8, 0)
    assert (feed.epoch, feed.row) == (1, 8)


def test_ranks_share_the_rows_of_one(make_config):
    config = make_config()
    one, two, four = feeds(config, 1), feeds(config, 2), feeds(config, 4)
    for rows, micro in ((8, 2), (16, 2), (8, 1)):
        expected = take(one, rows, 4)
        assert len(expected) == rows
        assert take(two, rows, micro) == expected
        assert take(four, rows, 2) == expected
    assert one[0].state_dict() == two[1].state_dict() == four[3].state_dict()


def test_it_goes_on_with_another_number_of_ranks(make_config):
    config = make_config()
    one = feeds(config, 1)
    take(one, 8, 8)
    take(one, 4, 4)
    state = one[0].state_dict()
    two = feeds(config, 2)
    for feed in two:
        feed.load_state_dict(state)
    assert take(two, 16, 2) == take(one, 16, 16)
    assert one[0].tokens == two[0].tokens


def test_what_was_not_trained_on_comes_again(make_config):
    (feed,) = feeds(make_config(), 1)
    first = rows_of(feed.take(0.0, 8, 8))
    feed.give_back()
    assert rows_of(feed.take(0.0, 8, 8)) == first
    feed.done(8, 0)
    assert rows_of(feed.take(0.0, 8, 8)) != first


def test_stages_begin_with_an_epoch(make_config):
    (feed,) = feeds(make_config("batch.stages=[[0.5, 16], [0.5, 48]]"), 1)
    assert max(map(len, rows_of(feed.take(0.0, 8, 8)))) <= 16
    feed.done(8, 0)
    assert 16 < max(map(len, rows_of(feed.take(0.5, 8, 8)))) <= 48
    assert (feed.epoch, feed.row, feed.length) == (1, 0, 48)
    feed.give_back()
    state = feed.state_dict()
    (again,) = feeds(make_config("batch.stages=[[0.5, 16], [0.5, 48]]"), 1)
    again.load_state_dict(state)
    assert rows_of(again.take(0.6, 8, 8)) == rows_of(feed.take(0.6, 8, 8))
    (shorter,) = feeds(make_config(), 1)
    with pytest.raises(ValueError, match=r"batch.stages has 1 stages and the run is in number 2"):
        shorter.load_state_dict(state)


def test_held_out_documents(make_config):
    corpus = Corpus(make_config().data)
    assert len(corpus.train) == 72
    assert len(corpus.held_out) == 8
    whole = Corpus(make_config("data.dev_documents=0").data)
    assert whole.held_out is None
    for document in (0, 71):
        assert [list(s) for s in corpus.train[document]] == [list(s) for s in whole.train[document]]
    for document in range(8):
        assert [list(s) for s in corpus.held_out[document]] == [list(s) for s in whole.train[72 + document]]


def test_a_batch_that_no_epoch_has(make_config):
    (feed,) = feeds(make_config(), 1)
    with pytest.raises(ValueError, match=r"batch\.size is 100000 and an epoch has"):
        feed.take(0.0, 100000, 100000)


def test_a_batch_that_outgrows_an_epoch(make_config):
    """In the middle of one; its micro-batches alone would fit."""
    (feed,) = feeds(make_config(), 1)
    feed.take(0.0, 8, 8)
    feed.done(8, 0)
    too_many = feed.examples.size(0) // 8 * 8 + 16
    with pytest.raises(ValueError, match=f"is {too_many} and an epoch has"):
        feed.take(0.0, too_many, 8)


def write_store(directory, like, documents) -> str:
    """A store of documents of sentences of ids, with the vocabulary of another."""
    shutil.copytree(like, directory)
    made = TokenStore.from_documents(documents, 100)
    for name in ("tokens", "sentence_offsets", "document_offsets"):
        getattr(made, name).tofile(directory / f"{name}.bin")
    counts = {"tokens": len(made.tokens), "sentences": len(made.sentence_offsets) - 1, "documents": len(made)}
    (directory / META).write_text(json.dumps({**json.loads((like / META).read_text()), **counts}))
    return str(directory)


@pytest.mark.parametrize(
    ("documents", "given", "message"),
    [
        ([1] * 20, ["data.train={}"], r"data\.train is '.*': the store gives no example"),
        ([1] * 20, ["data.dev={}", "data.dev_documents=0"], r"data\.dev is '.*': the store gives no example"),
        ([2] * 20 + [1] * 8, ["data.train={}"], r"data\.dev_documents is 8, hold out more: the store gives no example"),
        ([2] * 20, ["data.train={}", "batch.size=13"], r"batch\.size is 13 and an epoch has 12 examples"),
        (
            [400] * 9,
            ["data.train={}", "batch.stages=[[0.9, 8], [0.1, 48]]", "batch.size=100"],
            r"batch\.size is 100 and an epoch has \d\d examples",
        ),
    ],
    ids=["train", "dev", "held out", "batch", "last stage"],
)
def test_too_little_text_shows_before_the_run(documents, given, message, make_config, store_directory, tmp_path):
    """Documents of so many sentences."""
    store = write_store(tmp_path / "store", store_directory, [[[7, 8, 9]] * sentences for sentences in documents])
    with pytest.raises(ValueError, match=message):
        feeds(make_config(*[key.format(store) for key in given]), 1)


@pytest.mark.parametrize("key", ["vocab_sha256", "do_lower_case"])
def test_a_store_of_another_vocabulary(key, make_config, store_directory, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(store_directory, other)
    meta = json.loads((other / META).read_text())
    meta["request"][key] = False
    (other / META).write_text(json.dumps(meta))
    for given, name in (
        ([f"data.dev={other}", "data.dev_documents=0"], "data.dev is"),
        ([f"data.train={other}"], "data.train is"),
        ([f"data.train={other}", f"data.vocab={store_directory}"], "data.vocab is"),
    ):
        with pytest.raises(ValueError, match=rf"{name} .* another vocabulary than the run's \({key} differs\)"):
            Corpus(make_config(*given).data)
    del meta["request"]  # made by a program, not by `albert-fast corpus`
    (other / META).write_text(json.dumps(meta))
    assert len(Corpus(make_config(f"data.train={other}").data).train) == 72
