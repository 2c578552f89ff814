"""Examples: what a row consists of, that it is a pure function of (seed, epoch, index), and how fast they come."""

import itertools
import pickle
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast.pretraining.examples import Batch, Batches, Examples, truncated
from albert_fast.pretraining.glossary import Entry, Glossary, GlossaryError, find_occurrences, read_glossary
from albert_fast.pretraining.masking import MaskingOptions, Vocabulary
from albert_fast.pretraining.plan import ExampleOptions
from albert_fast.pretraining.store import TokenStore
from albert_fast.training.randomness import example_keys

SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
SIZE = 4000
# Pieces that begin a word and pieces that go on, about as in English text.
NAMES = ["".join(letters) for letters in itertools.product("abcdefghijklmnop", repeat=3)][: SIZE - 5]
PIECES = [*SPECIAL, *(f"▁{name}" if i < 2700 else name for i, name in enumerate(NAMES))]
VOCABULARY = Vocabulary.from_pieces(PIECES)
CLS, SEP, MASK = 2, 3, 4
# Nothing is replaced: the rows show their text.
SEEN = MaskingOptions(split=(0.0, 1.0, 0.0))


def random_store(
    rng: np.random.Generator, documents: int = 60, sentences: int = 20, mean: float = 22.0, smallest: int = 1
) -> TokenStore:
    """Documents of random sentences of random pieces, about two thirds of which begin a word."""
    counts = rng.integers(smallest, 2 * sentences, documents)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.6, counts.sum()), 2, 400).astype(np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens = rng.integers(5, SIZE, offsets[-1], dtype=np.uint16)
    return TokenStore(tokens, offsets, np.concatenate(([0], np.cumsum(counts))), SIZE)


def numbered_store(sizes: list[list[int]]) -> TokenStore:
    """Documents of sentences of these sizes; token t of the store is id 5 + t."""
    count = iter(range(5, SIZE))
    return TokenStore.from_documents([[[next(count) for _ in range(n)] for n in document] for document in sizes], SIZE)


def rows_of(batch: Batch) -> list[list[int]]:
    offsets = batch.cu_seqlens.tolist()
    ids = torch.where(batch.labels != -100, batch.labels, batch.input_ids).tolist()
    return [ids[a:b] for a, b in itertools.pairwise(offsets)]


def segments_of(row: list[int]) -> tuple[list[int], list[int]]:
    assert row[0] == CLS
    assert row[-1] == SEP
    assert row.count(CLS) == 1
    middle = row.index(SEP)
    return row[1:middle], row[middle + 1 : -1]


def same(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


# ---------------------------------------------------------------------------------------------- sentence-order pairs


def test_pairs_are_consecutive_sentences_of_one_document(rng: np.random.Generator, seed: int) -> None:
    # All tokens differ, so each says where it is from.
    sizes = [[int(n) for n in rng.integers(1, 12, rng.integers(1, 9))] for _ in range(90)]
    store = numbered_store(sizes)
    ends = (store.sentence_offsets[1:] + 5).tolist()
    document_of = np.repeat(np.arange(len(store)), np.diff(store.sentence_offsets[store.document_offsets]))
    examples = Examples(store, VOCABULARY, ExampleOptions(length=40, masking=SEEN), seed=seed)
    seen: Counter = Counter()
    for epoch in range(3):
        batch = examples.batch(epoch, range(examples.size(epoch)))
        assert batch.sentence_order_label is not None
        for row, label in zip(rows_of(batch), batch.sentence_order_label.tolist(), strict=True):
            first, second = segments_of(row)
            assert len(row) <= 40
            assert first
            assert second
            if label:
                first, second = second, first
            seen[label] += 1
            text = first + second
            assert len(set(document_of[np.array(text) - 5].tolist())) == 1
            assert text == list(range(text[0], text[-1] + 1)) or len(row) == 40  # truncated ones have a gap
            assert first[-1] + 1 in ends or len(row) == 40
    assert abs(seen[1] - seen[0]) < 7 * (seen[0] + seen[1]) ** 0.5


def test_nothing_is_lost_but_documents_of_one_sentence(rng: np.random.Generator, seed: int) -> None:
    sizes = [[int(n) for n in rng.integers(1, 8, rng.integers(1, 9))] for _ in range(90)]
    store = numbered_store(sizes)
    examples = Examples(store, VOCABULARY, ExampleOptions(length=30, masking=SEEN), seed=seed)
    for epoch in range(3):
        found = [i for row in rows_of(examples.batch(epoch, range(examples.size(epoch)))) for i in row if i > MASK]
        assert len(found) == len(set(found))
        lost = set(range(5, len(store.tokens) + 5)) - set(found)
        alone = {i for d in range(len(store)) if len(store[d]) == 1 for i in store[d][0].tolist()}
        # Three sentences that are too long for a row, where the last would have been alone, are truncated.
        assert alone <= lost
        assert len(lost - alone) < 0.02 * len(store.tokens)


def test_chunks_are_new_in_each_epoch_and_some_are_short(rng: np.random.Generator, seed: int) -> None:
    store = random_store(rng, documents=300)
    shares = []
    for short_probability in (0.0, 0.1, 0.9):
        for order in ("sop", "none"):
            options = ExampleOptions(
                length=128, masking=SEEN, short_probability=short_probability, sentence_order=order
            )
            examples = Examples(store, VOCABULARY, options, seed=seed)
            plans = [set(zip(p.first.tolist(), p.sentences.tolist(), strict=True)) for p in map(examples.plan, (0, 1))]
            # Where the order is asked for, other documents are cut from their end.
            assert (plans[0] == plans[1]) == (short_probability == 0 and order == "none")
        lengths = examples.batch(0, range(examples.size(0))).cu_seqlens.diff()
        shares.append((lengths < 64).float().mean().item())
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize(("documents", "sentences"), [(3000, 20), (2, 30_000)])
def test_lengths_do_not_tell_the_order(documents: int, sentences: int, rng: np.random.Generator, seed: int) -> None:
    """Were all documents cut from their beginning, the longer segment would be the text's first in 55 of 100 pairs."""
    store = random_store(rng, documents, sentences, smallest=sentences)
    examples = Examples(store, VOCABULARY, ExampleOptions(length=128), seed=seed)
    batch = examples.batch(0, range(examples.size(0)))
    assert batch.sentence_order_label is not None
    offsets = batch.cu_seqlens.numpy()
    second = np.add.reduceat(batch.token_type_ids.numpy(), offsets[:-1]) - 1
    first = np.diff(offsets) - second - 3
    swapped, differ = batch.sentence_order_label.numpy() == 1, first != second
    right = ((first < second) == swapped)[differ]
    assert len(right) > 5_000
    assert abs(right.mean() - 0.5) < 6 * 0.5 / len(right) ** 0.5


def test_a_documents_end_is_as_near_as_its_beginning(rng: np.random.Generator, seed: int) -> None:
    """What does not fill a chunk lies at the beginning of about half of the documents, at the end of the others."""
    sizes = [[10] * 11 for _ in range(400)]
    store = TokenStore.from_documents([[[5] * n for n in document] for document in sizes], SIZE)
    plan = Examples(store, VOCABULARY, ExampleOptions(length=43, short_probability=0.0), seed=seed).plan(0)
    assert set(plan.sentences.tolist()) == {4, 3}
    odd = plan.first[plan.sentences == 3] % 11
    assert set(odd.tolist()) == {0, 8}
    assert abs((odd == 0).mean() - 0.5) < 0.15


def test_a_plan_visits_each_sentence_once_in_random_order(rng: np.random.Generator, seed: int) -> None:
    store = random_store(rng)
    for order in ("sop", "none"):
        options = ExampleOptions(length=128, sentence_order=order)
        plan = Examples(store, VOCABULARY, options, seed=seed).plan(4)
        visited = np.concatenate([np.arange(f, f + n) for f, n in zip(plan.first, plan.sentences, strict=True)])
        assert len(np.unique(visited)) == len(visited)
        total = len(store.sentence_offsets) - 1
        alone = int((np.diff(store.document_offsets) == 1).sum())
        assert len(visited) == total - (alone if order == "sop" else 0)
        assert abs(np.corrcoef(plan.first, np.arange(len(plan)))[0, 1]) < 7 / len(plan) ** 0.5


def test_a_plan_does_not_depend_on_its_blocks(
    rng: np.random.Generator, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = random_store(rng)
    plans = []
    for block in (1 << 20, 7):
        monkeypatch.setattr("albert_fast.pretraining.plan.BLOCK", block)
        plans.append(Examples(store, VOCABULARY, ExampleOptions(length=64), seed=seed).plan(0))
    assert (plans[0].first == plans[1].first).all()
    assert (plans[0].sentences == plans[1].sentences).all()


def test_random_next_segments(rng: np.random.Generator, seed: int) -> None:
    sizes = [[int(n) for n in rng.integers(2, 7, rng.integers(2, 9))] for _ in range(100)]
    store = numbered_store(sizes)
    document_of = np.repeat(np.arange(len(store)), np.diff(store.sentence_offsets[store.document_offsets]))
    examples = Examples(store, VOCABULARY, ExampleOptions(length=40, sentence_order="nsp", masking=SEEN), seed=seed)
    counts: Counter = Counter()
    sizes_of_second: dict[int, list[int]] = {0: [], 1: []}
    for epoch in range(10):
        batch = examples.batch(epoch, range(examples.size(epoch)))
        assert batch.sentence_order_label is not None
        for row, label in zip(rows_of(batch), batch.sentence_order_label.tolist(), strict=True):
            first, second = (set(document_of[np.array(part) - 5].tolist()) for part in segments_of(row))
            assert len(first) == len(second) == 1
            assert (first != second) == bool(label)
            counts[label] += 1
            sizes_of_second[label].append(len(segments_of(row)[1]))
    assert abs(counts[0] - counts[1]) < 7 * (counts[0] + counts[1]) ** 0.5
    # Another document's segment may end with its document, and is a little shorter for that; no longer.
    assert 0.5 * np.mean(sizes_of_second[0]) < np.mean(sizes_of_second[1]) < 1.1 * np.mean(sizes_of_second[0])


def test_without_a_second_task_there_is_one_segment(rng: np.random.Generator, seed: int) -> None:
    examples = Examples(random_store(rng), VOCABULARY, ExampleOptions(length=64, sentence_order="none"), seed=seed)
    batch = examples.batch(0, range(50))
    assert batch.sentence_order_label is None
    assert "sentence_order_label" not in batch.padded()
    assert (batch.token_type_ids == 0).all()
    assert all(row.count(SEP) == 1 and len(row) <= 64 for row in rows_of(batch))


def test_compatible_chunks_overshoot_and_lone_sentences_get_another_document(seed: int) -> None:
    # One sentence a chunk, as with a paragraph a line.
    store = numbered_store([[30, 30, 30], [30], [30, 30]] * 6)
    document_of = np.repeat(np.arange(len(store)), np.diff(store.sentence_offsets[store.document_offsets]))
    options = ExampleOptions(length=28, masking=SEEN, short_probability=0.0, google_compat=True)
    examples = Examples(store, VOCABULARY, options, seed=seed)
    assert options.masking.google_compat
    assert examples.size(0) == 36
    batch = examples.batch(0, range(36))
    assert (batch.sentence_order_label == 1).all()
    for row in rows_of(batch):
        first, second = segments_of(row)
        assert len(row) == 28
        assert document_of[first[0] - 5] != document_of[second[0] - 5]
    default = Examples(store, VOCABULARY, ExampleOptions(length=28, masking=SEEN), seed=seed)
    labels = default.batch(0, range(default.size(0))).sentence_order_label
    assert labels is not None
    assert len(labels) == 12  # those of one sentence are out, those of three are truncated
    # Chunks are too long rather than too short.
    store = numbered_store([[10] * 50])
    options = ExampleOptions(length=28, masking=SEEN, short_probability=0.0, google_compat=True)
    plan = Examples(store, VOCABULARY, options).plan(0)
    assert set(plan.sentences[plan.first < 48].tolist()) == {3}
    plan = Examples(store, VOCABULARY, ExampleOptions(length=28, masking=SEEN, short_probability=0.0)).plan(0)
    assert set(plan.sentences.tolist()) == {2}


def test_the_compatible_room_is_drawn_once_for_a_document(rng: np.random.Generator, seed: int) -> None:
    store = TokenStore.from_documents([[[5] * 2] * 200 for _ in range(40)], SIZE)
    spread = {}
    for google_compat in (False, True):
        options = ExampleOptions(length=103, short_probability=0.5, google_compat=google_compat)
        plan = Examples(store, VOCABULARY, options, seed=seed).plan(0)
        inner = plan.first % 200 + plan.sentences < 195  # not the last of a document
        spread[google_compat] = [len(set(plan.sentences[inner & (plan.first // 200 == d)].tolist())) for d in range(40)]
    assert max(spread[True]) == 1
    assert np.mean(spread[False]) > 1.5


def plain_truncation(a: int, b: int, room: int) -> tuple[int, int]:
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    return a, b


def test_truncation_is_the_originals(rng: np.random.Generator, seed: int) -> None:
    length = rng.integers(1, 90, (3000, 2))
    room = int(rng.integers(20, 90))
    start = rng.integers(0, 1000, (3000, 2))
    new_start, new_length = truncated(start, length, room, example_keys(seed, 0, np.arange(3000)))
    for (a, b), found in zip(length.tolist(), new_length.tolist(), strict=True):
        assert tuple(found) == plain_truncation(a, b, room)
    front, cut = new_start - start, length - new_length
    assert ((front >= 0) & (front <= cut)).all()
    # Half of what is cut is cut at the front: binomial.
    tosses = cut.sum()
    assert abs(front.sum() - tosses / 2) < 7 * (tosses / 4) ** 0.5
    many = cut > 20
    assert ((front - cut / 2)[many] ** 2 / (cut[many] / 4)).mean() == pytest.approx(1, abs=0.3)


# ------------------------------------------------------------------------------------------------------------- purity


STRATEGIES = ("random", "whole_word", "full", "ngram", "span", "cross", "cross_segment")


@pytest.mark.parametrize("google_compat", [False, True])
@pytest.mark.parametrize("order", ["sop", "nsp"])
def test_an_example_is_the_same_alone_and_in_any_batch(
    rng: np.random.Generator, seed: int, order: str, google_compat: bool
) -> None:
    store = random_store(rng)
    for strategy in STRATEGIES:
        options = ExampleOptions(
            length=64, sentence_order=order, masking=MaskingOptions(strategy=strategy), google_compat=google_compat
        )
        examples = Examples(store, VOCABULARY, options, seed=seed)
        size = examples.size(2)
        index = rng.permutation(size)[:40]
        batch = examples.batch(2, index)
        offsets = batch.cu_seqlens.tolist()
        other = Examples(store, VOCABULARY, options, seed=seed)
        for i in (0, 17, 39):
            one = other.batch(2, [int(index[i])])
            part = slice(offsets[i], offsets[i + 1])
            assert torch.equal(one.input_ids, batch.input_ids[part])
            assert torch.equal(one.labels, batch.labels[part])
            assert torch.equal(one.token_type_ids, batch.token_type_ids[part])
            assert torch.equal(one.position_ids, batch.position_ids[part])
            assert one.sentence_order_label is not None
            assert batch.sentence_order_label is not None
            assert one.sentence_order_label[0] == batch.sentence_order_label[i]
        assert same(pickle.loads(pickle.dumps(examples)).batch(2, index), batch)
        assert not same(Examples(store, VOCABULARY, options, seed=seed + 1).batch(2, range(40)), batch)


def test_the_same_chunk_has_other_masks_in_another_epoch(rng: np.random.Generator, seed: int) -> None:
    # One document of two sentences: the same chunk each time.
    store = TokenStore.from_documents([rng.integers(5, SIZE, (2, 30)).tolist()], SIZE)
    examples = Examples(store, VOCABULARY, ExampleOptions(length=128), seed=seed)
    masks = {tuple(sorted(segments_and_labels(examples.batch(epoch, [0])))) for epoch in range(20)}
    assert len(masks) == 20


def segments_and_labels(batch: Batch) -> list[int]:
    return batch.labels[batch.labels != -100].tolist()


def test_views_of_a_chunk_are_neighbours(rng: np.random.Generator, seed: int) -> None:
    options = ExampleOptions(length=64, masking=MaskingOptions(strategy="cross", rate=0.25))
    assert options.number_of_views == 4
    examples = Examples(random_store(rng), VOCABULARY, options, seed=seed)
    assert examples.size(0) == 4 * len(examples.plan(0))
    batch = examples.batch(0, range(4, 8))
    rows = rows_of(batch)
    assert rows[0] == rows[1] == rows[2] == rows[3]
    predicted = (batch.labels.view(4, -1) != -100).sum(dim=0)
    assert torch.equal(predicted, (torch.tensor(rows[0]) > MASK).long())


# ---------------------------------------------------------------------------------------------------------- batches


def test_batches_as_packed_and_padded(rng: np.random.Generator, seed: int) -> None:
    examples = Examples(random_store(rng), VOCABULARY, ExampleOptions(length=64), seed=seed)
    batch = examples.batch(0, range(9))
    assert batch.rows == 9
    assert batch.max_seqlen == 64
    assert batch.cu_seqlens.dtype == torch.int32
    for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).shape == (batch.tokens,)
    packed, padded = batch.packed(), batch.padded()
    assert torch.equal(packed.pad(batch.input_ids), padded["input_ids"])
    assert torch.equal(packed.pad(batch.labels, fill=-100), padded["labels"])
    assert torch.equal(packed.pack(padded["token_type_ids"]), batch.token_type_ids)
    assert padded["attention_mask"].sum(dim=1).tolist() == batch.cu_seqlens.diff().tolist()
    assert (padded["input_ids"][padded["attention_mask"] == 0] == 0).all()
    for row in range(9):
        a, b = batch.cu_seqlens[row : row + 2].tolist()
        assert batch.position_ids[a:b].tolist() == list(range(b - a))
        first, second = segments_of(rows_of(batch)[row])
        assert batch.token_type_ids[a:b].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    meta = batch.to("meta")
    assert meta.labels.device.type == "meta"
    assert meta.pad_id == batch.pad_id


def test_workers_ranks_and_resuming_give_the_same_batches(rng: np.random.Generator, seed: int) -> None:
    examples = Examples(random_store(rng, documents=30), VOCABULARY, ExampleOptions(length=64), seed=seed)
    batches = Batches(examples, 1, 8)
    plain = [batches[step] for step in range(len(batches))]
    assert len(plain) == examples.size(1) // 8
    for workers in (0, 2):
        loaded = list(batches.loader(3, workers=workers))
        assert len(loaded) == len(plain) - 3
        assert all(map(same, loaded, plain[3:]))
    shares = [Batches(examples, 1, 8, rank=rank, ranks=2) for rank in range(2)]
    for step, whole in enumerate(plain):
        rows = rows_of(whole)
        for rank, share in enumerate(shares):
            assert rows_of(share[step]) == rows[rank::2]
    assert list(batches.loader(len(batches))) == []


# --------------------------------------------------------------------------------------- parallel text and definitions


def test_translations(rng: np.random.Generator, seed: int) -> None:
    documents = [[rng.integers(5, SIZE, rng.integers(1, 40)).tolist() for _ in range(2)] for _ in range(50)]
    store = TokenStore.from_documents(documents, SIZE)
    for masking in (MaskingOptions(strategy="tlm"), MaskingOptions(strategy="cross_segment")):
        options = ExampleOptions(length=64, masking=masking, parallel=True)
        examples = Examples(store, VOCABULARY, options, seed=seed)
        views = options.number_of_views
        assert examples.size(0) == 50 * views
        plan = examples.plan(0)
        rows = rows_of(examples.batch(0, range(50 * views)))
        for i, row in enumerate(rows):
            source, target = documents[plan.first[i // views] // 2]
            first, second = segments_of(row)
            assert len(row) <= 64
            if len(source) + len(target) <= 61:
                assert (first, second) == (source, target)
    assert ExampleOptions(masking=MaskingOptions(strategy="tlm")).is_parallel


def test_definitions(rng: np.random.Generator, seed: int) -> None:
    begins, goes_on = 10, 3000  # a piece that begins a word, and one that goes on
    word, longer = [begins, goes_on], [begins, goes_on, goes_on + 1]
    sentences = [
        [20, *word, 21],
        [*longer, 22],
        [23, *word],
        [24, begins],
        [25, begins, goes_on],
        [26] * 40 + word + [27] * 40,
    ]
    store = TokenStore.from_documents(
        [sentences[:2], sentences[2:4], [[28, *word[:1]], [goes_on, 29]], sentences[4:]], SIZE
    )
    glossary = Glossary.from_ids([(word, [100, 101, 102]), (word, [103]), ([24, begins], [104]), ([999], [105])])
    found = find_occurrences(store, VOCABULARY, glossary)
    flat = store.tokens.tolist()
    expected = []
    for s in range(len(store.sentence_offsets) - 1):
        a, b = store.sentence_offsets[s : s + 2].tolist()
        for number, pieces in enumerate(glossary.words):
            for i in range(a, b - len(pieces) + 1):
                end = i + len(pieces)
                if flat[i:end] == list(pieces) and (end == b or VOCABULARY.starts_word[flat[end]]):
                    expected.append((i, number))
    assert list(zip(found.position.tolist(), found.word.tolist(), strict=True)) == sorted(expected)
    assert len(expected) == 5

    used = set()
    for definition_first in (True, False):
        options = ExampleOptions(length=30, masking=MaskingOptions(strategy="dmlm"), definition_first=definition_first)
        examples = Examples(store, VOCABULARY, options, seed=seed, glossary=glossary)
        assert examples.size(0) == 5
        for epoch in range(10):
            batch = examples.batch(epoch, range(5))
            assert batch.sentence_order_label is None
            offsets = batch.cu_seqlens.tolist()
            for r, row in enumerate(rows_of(batch)):
                assert len(row) <= 30
                parts = segments_of(row)
                definition, context = parts if definition_first else parts[::-1]
                labels = batch.labels[offsets[r] : offsets[r + 1]]
                ids = batch.input_ids[offsets[r] : offsets[r + 1]]
                predicted = labels[labels != -100].tolist()
                segment = batch.token_type_ids[offsets[r] : offsets[r + 1]][labels != -100]
                assert (segment == int(definition_first)).all()
                assert (ids[labels != -100] == MASK).all()
                assert predicted in (word, [24, begins])
                assert definition in ([104] if predicted == [24, begins] else [100, 101, 102], [103])
                used.add(tuple(definition))
                assert any(context == s or (len(s) > 20 and len(context) >= 20) for s in sentences)
    assert len(used) == 3

    few = Examples(store, VOCABULARY, replace(options, most_per_word=2), seed=seed, glossary=glossary)
    plans = [few.plan(epoch).first.tolist() for epoch in range(30)]
    assert all(sorted(found.word[plan].tolist()) == [0, 0, 1] for plan in plans)
    assert set(itertools.chain.from_iterable(plans)) == set(range(5))


def test_words_are_found_across_blocks(rng: np.random.Generator, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = random_store(rng, documents=12, smallest=5)
    offsets = store.sentence_offsets
    words = [
        store.tokens[offsets[s] : offsets[s] + n].tolist() for s, n in zip(range(0, 60, 7), [1, 2, 3] * 3, strict=True)
    ]
    glossary = Glossary.from_ids([(w, [9]) for w in words])
    found = []
    for block in (1 << 22, 11):
        monkeypatch.setattr("albert_fast.pretraining.glossary.BLOCK", block)
        found.append(find_occurrences(store, VOCABULARY, glossary))
    assert (found[0].position == found[1].position).all()
    assert (found[0].word == found[1].word).all()


def test_glossaries_are_read(tmp_path: Path) -> None:
    path = tmp_path / "glossary.tsv"
    path.write_text("\ufeffbank\tland beside a river\n\nbank\ta place for money\r\nice cream\tfrozen milk\n", "utf-8")
    assert read_glossary(path) == [
        Entry("bank", "land beside a river"),
        Entry("bank", "a place for money"),
        Entry("ice cream", "frozen milk"),
    ]

    class Tokenizer:
        def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
            assert not add_special_tokens
            return {"input_ids": [[5 + len(word) for word in text.split()] for text in texts]}

    glossary = Glossary.encode(read_glossary(path), Tokenizer())  # type: ignore[arg-type]
    assert glossary.words == [(9,), (8, 10)]
    assert glossary.first_definition.tolist() == [0, 2, 3]
    assert glossary.definition_offsets.tolist() == [0, 4, 8, 10]
    for content, message in (
        (b"bank\tland\nriver water\n", "glossary.tsv, line 2 is 'river water'; a word, one tab"),
        (b"bank\t\n", "line 1"),
        (b"a\tb\tc\n", "line 1"),
        (b"a\tb\n\xff\tc\n", "line 2 is not UTF-8"),
        (b"\n\n", "has no entry"),
    ):
        path.write_bytes(content)
        with pytest.raises(GlossaryError, match=message):
            read_glossary(path)
    with pytest.raises(GlossaryError, match="cannot be read"):
        read_glossary(tmp_path / "missing.tsv")
    with pytest.raises(GlossaryError, match="entries is empty"):
        Glossary.encode([], Tokenizer())  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 7}, "length is 7"),
        ({"sentence_order": "order"}, "sentence_order is 'order'; one of sop, nsp, none"),
        ({"short_probability": 1.5}, "short_probability is 1.5"),
        ({"views": 0}, "views is 0"),
        ({"most_per_word": 0}, "most_per_word is 0"),
        ({"parallel": True, "sentence_order": "sop"}, "sentence_order is 'sop' and parallel text has pairs"),
        ({"masking": MaskingOptions(strategy="tlm"), "sentence_order": "nsp"}, "strategy 'tlm' has pairs of its own"),
        ({"parallel": True, "masking": MaskingOptions(strategy="dmlm")}, "choose one"),
        ({"sentence_order": "none", "masking": MaskingOptions(strategy="cross_segment")}, "has no second segment"),
        ({"views": 1, "masking": MaskingOptions(strategy="cross")}, "views is 1 and strategy 'cross'"),
    ],
)
def test_options_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleOptions(**changes)


def test_arguments_are_checked(rng: np.random.Generator) -> None:
    store = random_store(rng, documents=3, smallest=2)
    dmlm = ExampleOptions(masking=MaskingOptions(strategy="dmlm"))
    glossary = Glossary.from_ids([([5], [6])])
    with pytest.raises(ValueError, match="a vocabulary of 4000 pieces and vocabulary has 5"):
        Examples(store, Vocabulary.from_pieces(SPECIAL))
    with pytest.raises(ValueError, match="store has no document"):
        Examples(TokenStore.from_documents([], SIZE), VOCABULARY)
    with pytest.raises(ValueError, match="store has one document and sentence_order 'nsp'"):
        Examples(numbered_store([[3, 3]]), VOCABULARY, ExampleOptions(sentence_order="nsp"))
    with pytest.raises(
        ValueError, match="the store gives no example: sentence_order 'sop' needs documents of at least"
    ):
        Examples(numbered_store([[3], [4]]), VOCABULARY).plan(0)
    with pytest.raises(ValueError, match="glossary is None and strategy 'dmlm'"):
        Examples(store, VOCABULARY, dmlm)
    with pytest.raises(ValueError, match="glossary is given and strategy 'ngram'"):
        Examples(store, VOCABULARY, glossary=glossary)
    with pytest.raises(ValueError, match="none of the 1 words of the glossary occurs"):
        Examples(store, VOCABULARY, dmlm, glossary=Glossary.from_ids([([5, 5], [6])]))
    long, narrow = numbered_store([[9, 1]]), ExampleOptions(length=8, masking=MaskingOptions(strategy="dmlm"))
    with pytest.raises(ValueError, match="length is 8 and no word of the glossary fits"):
        Examples(long, VOCABULARY, narrow, glossary=Glossary.from_ids([(range(5, 14), [6])]))
    with pytest.raises(ValueError, match="document 1 of the store has 3 sentences; parallel text"):
        Examples(numbered_store([[1, 1], [1, 1, 1]]), VOCABULARY, ExampleOptions(parallel=True)).plan(0)
    examples = Examples(store, VOCABULARY, ExampleOptions(length=64))
    size = examples.size(0)
    with pytest.raises(IndexError, match=f"indices has values from 0 to {size}; epoch 0 has {size} examples"):
        examples.batch(0, [0, size])
    with pytest.raises(ValueError, match="indices is empty"):
        examples.batch(0, [])
    with pytest.raises(ValueError, match="epoch is -1"):
        examples.plan(-1)
    with pytest.raises(ValueError, match="rank is 2 of 2 ranks"):
        Batches(examples, 0, 4, rank=2, ranks=2)
    with pytest.raises(ValueError, match="batch_size is 3; a multiple of the 2 ranks"):
        Batches(examples, 0, 3, ranks=2)
    with pytest.raises(ValueError, match="batch_size is 100000 and epoch 0 has"):
        Batches(examples, 0, 100000)
    with pytest.raises(IndexError, match=f"step is {size}; epoch 0 has {size}"):
        Batches(examples, 0, 1)[size]
    with pytest.raises(ValueError, match=f"step is {size + 1}; 0 to {size}"):
        Batches(examples, 0, 1).loader(size + 1)


# ---------------------------------------------------------------------------------------------------------------- rate


@pytest.mark.parametrize("documents", [400, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [128, 512])
def test_a_process_makes_a_million_tokens_a_second(
    rng: np.random.Generator, seed: int, length: int, documents: int, unpoisoned_memory: None
) -> None:
    store = random_store(rng, documents=documents, sentences=25)
    assert len(store.tokens) > 500 * documents
    examples = Examples(store, VOCABULARY, ExampleOptions(length=length), seed=seed)
    rows = 64 * 512 // length
    best, whole = 0.0, 0.0
    for epoch in range(3):
        began = time.process_time()
        batches = Batches(examples, epoch, rows)
        planned = time.process_time()
        tokens = sum(batches[step].tokens for step in range(len(batches)))
        ended = time.process_time()
        best, whole = max(best, tokens / (ended - planned)), max(whole, tokens / (ended - began))
        share = (planned - began) / (ended - began)
        print(
            f"length {length}, {rows} rows a batch: {tokens} tokens, {tokens / (ended - planned):.3g} tokens/s, "
            f"with the plan ({share:.1%} of the time) {tokens / (ended - began):.3g}"
        )
    assert whole > 1e6, f"{whole:.3g} tokens/s with the plan, {best:.3g} without"
