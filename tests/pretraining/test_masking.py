"""Masking against the original's procedure in plain Python, and each strategy's invariants."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from albert_fast.pretraining.masking import (
    IGNORE_INDEX,
    STRATEGIES,
    MaskingOptions,
    Rows,
    Vocabulary,
    Words,
    budgets,
    choose,
    greedy,
    mask,
    replace_tokens,
)
from albert_fast.training.randomness import Purpose, below, bits, example_keys, heads, stream, uniform

SPECIAL = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *SPECIAL,
    *[".", ",", "'", "2", "é"],
    *[f"▁{c}{d}" for c in "abcdefghij" for d in "abcdefghij"],
    *[f"{c}{d}" for c in "abcdefghij" for d in "abcdefghij"],
]
VOCABULARY = Vocabulary.from_pieces(PIECES)
BEGINNINGS, INNER = np.arange(5, 110), np.arange(110, 210)


# ------------------------------------------------------------------------------------ the original, in plain Python


def plain_words(pieces: Sequence[str]) -> list[list[int]]:
    """Candidates of whole-word masking: positions of the pieces of each word (create_pretraining_data.py)."""
    words: list[list[int]] = []
    for i, piece in enumerate(pieces):
        if piece in ("[CLS]", "[SEP]"):
            continue
        punctuation = '!"#$%&()*+,-./:;?@[\\]^_`{|}~'
        starts = piece[0] in "▁<" or piece in list(punctuation)
        starts = starts or any(not ("a" <= c <= "z") and c not in punctuation for c in piece)
        if words and not starts:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def plain_choice(words: list[list[int]], order: Sequence[int], drawn: Sequence[int], budget: int) -> set[int]:
    """Positions that are masked, when the candidates are looked at in this order with these lengths."""
    masked: set[int] = set()
    for start in order:
        if len(masked) >= budget:
            break
        n = drawn[start]
        while n > 0 and len(masked) + sum(map(len, words[start : start + n])) > budget:
            n -= 1
        candidate = {i for word in words[start : start + n] for i in word}
        if not candidate & masked:
            masked |= candidate
    return masked


def plain_ngram_mask(pieces: Sequence[str], generator: random.Random) -> set[int]:
    words = plain_words(pieces)
    order = generator.sample(range(len(words)), len(words))
    drawn = [generator.choices((1, 2, 3), weights=(1, 1 / 2, 1 / 3))[0] for _ in words]
    return plain_choice(words, order, drawn, min(77, max(1, round(len(pieces) * 0.15))))


# ----------------------------------------------------------------------------------------------------- random batches


@dataclass(frozen=True)
class Text:
    rows: list[list[int]]

    @property
    def ids(self) -> np.ndarray:
        return np.array([i for row in self.rows for i in row], dtype=np.int64)

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.rows)], dtype=np.int64)

    @property
    def segments(self) -> np.ndarray:
        ids, offsets = self.ids, self.offsets
        count = np.cumsum(ids == 3) - (ids == 3)
        return (count - np.repeat(count[np.minimum(offsets[:-1], len(ids) - 1)], np.diff(offsets))).astype(np.int64)

    def batch(self, seed: int, epoch: int = 0, view: np.ndarray | None = None, views: int = 1) -> Rows:
        keys = example_keys(seed, epoch, np.arange(len(self.rows)))
        return Rows(self.ids, self.offsets, keys, self.segments, view, views)


def text(
    rng: np.random.Generator, rows: int, shortest: int = 20, longest: int = 130, inner_share: float = 0.27
) -> Text:
    """Rows [CLS] A [SEP] B [SEP] of random words; the first piece of a segment may go on from nowhere."""
    found = []
    for _ in range(rows):
        length = int(rng.integers(shortest, longest + 1)) - 3
        inner = rng.random(length) < inner_share
        ids = np.where(inner, rng.choice(INNER, length), rng.choice(BEGINNINGS, length)).tolist()
        cut = int(rng.integers(1, length)) if length > 1 else length
        found.append([2, *ids[:cut], 3, *ids[cut:], 3])
    return Text(found)


def rows_of(flags: np.ndarray, batch: Rows) -> list[np.ndarray]:
    return np.split(flags, batch.offsets[1:-1])


def runs(flags: np.ndarray) -> list[int]:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return (edges[1::2] - edges[::2]).tolist()


def assert_same_law(a: Counter, b: Counter) -> None:
    """Chi-square of two samples; the bound is about eight standard deviations of the statistic."""
    cells = [c for c in set(a) | set(b) if a[c] + b[c] >= 20]
    total_a, total_b = sum(a[c] for c in cells), sum(b[c] for c in cells)
    scale = (total_b / total_a) ** 0.5
    statistic = sum((a[c] * scale - b[c] / scale) ** 2 / (a[c] + b[c]) for c in cells)
    freedom = len(cells) - 1
    assert statistic <= freedom + 8 * (2 * freedom) ** 0.5, (sorted(a.items()), sorted(b.items()))


# --------------------------------------------------------------------------------------------------- random numbers


def test_random_bits_are_uniform_and_neighbours_independent(seed: int) -> None:
    places = np.arange(1 << 10)
    keys = example_keys(seed, 0, places)
    grid = bits(stream(keys, Purpose.CHOICE)[:, None], places)  # [examples, places]
    others = {
        "next epoch": bits(stream(example_keys(seed, 1, places), Purpose.CHOICE)[:, None], places),
        "next seed": bits(stream(example_keys(seed + 1, 0, places), Purpose.CHOICE)[:, None], places),
        "other purpose": bits(stream(keys, Purpose.LENGTH)[:, None], places),
        "next part": bits(stream(keys, Purpose.CHOICE, 1)[:, None], places),
        "next place": np.roll(grid, 1, axis=1),
        "next example": np.roll(grid, 1, axis=0),
        "shifted both": np.roll(grid, (1, -1), axis=(0, 1)),
    }
    counts = np.bincount((grid >> np.uint64(56)).ravel().astype(np.int64), minlength=256)
    expected = grid.size / 256
    assert abs((np.square(counts - expected) / expected).sum() - 255) < 7 * (2 * 255) ** 0.5
    bound = 7 / grid.size**0.5
    for bit in range(0, 64, 7):
        assert abs((grid >> np.uint64(bit) & np.uint64(1)).mean() - 0.5) < bound
    values = uniform(grid)
    assert values.min() >= 0
    assert values.max() < 1
    centred = values - 0.5
    for name, other in others.items():
        correlation = (centred * (uniform(other) - 0.5)).mean() * 12
        assert abs(correlation) < bound, (name, correlation)
        differing = bits_set(grid ^ other).mean() / 64
        assert abs(differing - 0.5) < bound, (name, differing)


def bits_set(values: np.ndarray) -> np.ndarray:
    return np.unpackbits(values.view(np.uint8).reshape(*values.shape, 8), axis=-1).sum(axis=-1)


def test_below_and_heads(seed: int) -> None:
    streams = stream(example_keys(seed, 0, np.arange(20000)), Purpose.CHOICE)
    drawn = below(bits(streams), 7)
    assert_same_law(Counter(drawn.tolist()), Counter(dict.fromkeys(range(7), 100000)))
    tosses = np.full(20000, 100)
    tosses[:5] = 0
    found = heads(streams, tosses)
    assert found.min() == 0
    assert (found[:5] == 0).all()
    assert abs(found[5:].mean() - 50) < 7 * 5 / 141
    assert abs(found[5:].std() - 5) < 0.25


# -------------------------------------------------------------------------------------------------------- vocabulary


def test_words_begin_as_in_the_original() -> None:
    starts = dict(zip(PIECES, VOCABULARY.starts_word.tolist(), strict=True))
    assert all(starts[piece] for piece in ("▁aa", ".", ",", "'", "2", "é", "<unk>", "<pad>"))
    assert not starts["aa"]
    assert not Vocabulary.from_pieces([*SPECIAL, "--"]).starts_word[5]
    assert Vocabulary.from_pieces([*SPECIAL, "жд"]).starts_word[5]
    assert not Vocabulary.from_pieces([*SPECIAL, "жд"], letters="джз").starts_word[5]
    assert np.flatnonzero(VOCABULARY.is_special).tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------ n-grams


@pytest.mark.parametrize("max_ngram", [1, 3, 5])
def test_given_the_same_draws_the_choice_is_the_originals(rng: np.random.Generator, max_ngram: int) -> None:
    options = MaskingOptions(max_ngram=max_ngram, google_compat=True)
    sample = text(rng, 60, shortest=4, inner_share=rng.uniform(0.1, 0.7))
    batch = sample.batch(1)
    words = Words.find(batch, ~VOCABULARY.is_special[batch.ids], VOCABULARY, options)
    drawn = rng.integers(1, max_ngram + 1, len(words))
    order = words.shuffled(stream(batch.keys, Purpose.CHOICE))
    budget = budgets(batch.lengths, options)
    found = rows_of(words.tokens(greedy(words, order, drawn, budget)), batch)
    for r, row in enumerate(sample.rows):
        expected_words = plain_words([PIECES[i] for i in row])
        first, end = words.first_of_row[r : r + 2]
        assert end - first == len(expected_words)
        local = order[first:end] - first
        assert sorted(local) == list(range(end - first))
        expected = plain_choice(expected_words, local.tolist(), drawn[first:end].tolist(), int(budget[r]))
        assert set(np.flatnonzero(found[r]).tolist()) == expected


def test_ngram_masks_have_the_originals_law(seed: int, rng: np.random.Generator) -> None:
    sample = text(rng, 40, shortest=40)
    generator = random.Random(seed)
    rounds = 25
    ours: dict[str, Counter] = {"runs": Counter(), "tokens": Counter(), "words": Counter()}
    plain: dict[str, Counter] = {"runs": Counter(), "tokens": Counter(), "words": Counter()}
    ours_at, plain_at = np.zeros(len(sample.ids)), np.zeros(len(sample.ids))
    for epoch in range(rounds):
        batch = sample.batch(seed, epoch)
        flags = choose(batch, VOCABULARY, MaskingOptions(google_compat=True))
        ours_at += flags
        for r, row in enumerate(rows_of(flags, batch)):
            count(ours, row, sample.rows[r])
        for r, ids in enumerate(sample.rows):
            row = np.zeros(len(ids), dtype=bool)
            row[list(plain_ngram_mask([PIECES[i] for i in ids], generator))] = True
            plain_at[batch.offsets[r] : batch.offsets[r + 1]] += row
            count(plain, row, sample.rows[r])
    for name in ours:
        assert_same_law(ours[name], plain[name])
    # Each place by itself: a difference of two counts of `rounds` draws.
    scaled = (ours_at - plain_at) / np.sqrt(2 * rounds * 0.15 * 0.85)
    assert abs((scaled**2).mean() - 1) < 0.25


def count(counters: dict[str, Counter], flags: np.ndarray, ids: list[int]) -> None:
    words = plain_words([PIECES[i] for i in ids])
    counters["runs"].update(min(n, 8) for n in runs(flags))
    counters["tokens"][round(len(ids) * 0.15) - int(flags.sum())] += 1
    counters["words"].update(runs(np.array([flags[word[0]] for word in words])))


def test_ngrams_have_the_asked_lengths(seed: int) -> None:
    rows = Text([[2, *[5] * 200, 3]] * 4000)
    for options, law in (
        (MaskingOptions(max_predictions=3), np.array([6, 3, 2]) / 11),
        (MaskingOptions(max_predictions=3, favor_shorter=False), np.array([2, 3, 6]) / 11),
    ):
        batch = rows.batch(seed)
        words = Words.find(batch, ~VOCABULARY.is_special[batch.ids], VOCABULARY, options)
        assert np.allclose(options.length_law(), law)
        drawn = words.lengths(stream(batch.view_keys(), Purpose.LENGTH), options)
        share = np.bincount(drawn, minlength=4)[1:] / len(drawn)
        assert np.abs(share - law).max() < 0.005
        # Each row fills its three predictions exactly: the words all have one piece.
        assert all(row.sum() == 3 for row in rows_of(choose(batch, VOCABULARY, options), batch))


@pytest.mark.parametrize("google_compat", [False, True])
@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("strategy", ["whole_word", "full", "ngram", "span"])
def test_budgets_and_whole_words(
    seed: int, rng: np.random.Generator, strategy: str, most: int | None, google_compat: bool
) -> None:
    sample = text(rng, 300, shortest=4)
    batch = sample.batch(seed)
    options = MaskingOptions(strategy=strategy, max_predictions=most, google_compat=google_compat)
    flags = choose(batch, VOCABULARY, options)
    assert not flags[VOCABULARY.is_special[batch.ids]].any()
    filled = 0
    for r, row in enumerate(rows_of(flags, batch)):
        budget = min(most or 1000, max(1, round(len(sample.rows[r]) * 0.15)))
        assert row.sum() <= budget
        filled += row.sum() == budget
        words = plain_words([PIECES[i] for i in sample.rows[r]])
        if not google_compat:  # a word ends at [SEP]
            words = [part for word in words for part in (word, *split_at_gap(word)) if part]
            words = [word for word in words if word[-1] - word[0] == len(word) - 1]
        for word in words:
            assert len(set(row[word].tolist())) == 1
    assert filled > 270


def split_at_gap(word: list[int]) -> list[list[int]]:
    for i in range(1, len(word)):
        if word[i] != word[i - 1] + 1:
            return [word[:i], word[i:]]
    return []


def test_an_ngram_ends_with_its_segment_unless_compatible(seed: int) -> None:
    sample = Text([[2, 5, 3, 5, 3]] * 3000)
    for google_compat in (False, True):
        options = MaskingOptions(rate=0.4, favor_shorter=False, max_ngram=2, google_compat=google_compat)
        batch = sample.batch(seed)
        both = np.array([row.sum() == 2 for row in rows_of(choose(batch, VOCABULARY, options), batch)])
        # Two words are masked at any rate, alone or together; the segments' own words are what is looked at.
        assert both.all()
        words = Words.find(batch, ~VOCABULARY.is_special[batch.ids], VOCABULARY, options)
        assert (words.limit[::2] - np.arange(0, len(words), 2) == (2 if google_compat else 1)).all()


def test_a_word_ends_with_its_segment_unless_compatible(seed: int) -> None:
    batch = Text([[2, 110, 5, 3, 110, 111, 3], [2, 110, 3, 5, 110, 3]]).batch(seed)
    for google_compat, first_words, sizes in ((False, [0, 3, 5], [1, 1, 2, 1, 2]), (True, [0, 2, 4], [1, 3, 1, 2])):
        options = MaskingOptions(google_compat=google_compat)
        words = Words.find(batch, ~VOCABULARY.is_special[batch.ids], VOCABULARY, options)
        assert words.first_of_row.tolist() == first_words
        assert np.diff(words.before).tolist() == sizes


# ------------------------------------------------------------------------------------------------ the other strategies


def test_random_tokens(seed: int, rng: np.random.Generator) -> None:
    sample = text(rng, 1000)
    batch = sample.batch(seed)
    maskable = ~VOCABULARY.is_special[batch.ids]
    for strategy in ("random", "tlm"):
        flags = choose(batch, VOCABULARY, MaskingOptions(strategy=strategy))
        assert not flags[~maskable].any()
        assert abs(flags[maskable].mean() - 0.15) < 7 * (0.15 * 0.85 / maskable.sum()) ** 0.5 + 0.002
        assert all(row.any() for row in rows_of(flags, batch))
        if strategy == "tlm":
            for segment in (0, 1):
                assert abs(flags[maskable & (batch.segments == segment)].mean() - 0.15) < 0.02
    limited = choose(batch, VOCABULARY, MaskingOptions(strategy="random", max_predictions=5))
    assert all(1 <= row.sum() <= 5 for row in rows_of(limited, batch))
    assert not (limited & ~flags).any()
    # Neighbours are independent of each other.
    both = (flags[1:] & flags[:-1])[maskable[1:] & maskable[:-1]].mean()
    assert abs(both - 0.15**2) < 0.004


def test_spans(seed: int) -> None:
    options = MaskingOptions(strategy="span")
    law = options.length_law()
    assert len(law) == 10
    assert np.allclose(law[1:] / law[:-1], 0.8)
    assert (law * np.arange(1, 11)).sum() == pytest.approx(3.8, abs=0.01)
    # Rows with room for many spans, so that few are shortened; spans that touch look like one.
    sample = Text([[2, *[5, 120] * 1000, 3]] * 120)
    batch = sample.batch(seed)
    flags = choose(batch, VOCABULARY, MaskingOptions(strategy="span", rate=0.01))
    lengths = [n / 2 for row in rows_of(flags, batch) for n in runs(row)]
    assert 2.4 < np.mean(lengths) < 4.2
    assert max(lengths) > 6


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("views", [2, 7])
def test_complementary_views_mask_each_token_once(
    seed: int, rng: np.random.Generator, views: int, whole_words: bool
) -> None:
    sample = text(rng, 50, shortest=4)
    options = MaskingOptions(strategy="cross", whole_words=whole_words)
    times = np.zeros(len(sample.ids), dtype=int)
    for view in range(views):
        batch = sample.batch(seed, view=np.full(50, view), views=views)
        flags = choose(batch, VOCABULARY, options)
        times += flags
        for row, ids in zip(rows_of(flags, batch), sample.rows, strict=True):
            share = (len(ids) - 3) / views
            longest = max(map(len, plain_words([PIECES[i] for i in ids]))) if whole_words else 1
            assert abs(row.sum() - share) <= longest
    assert (times == ~VOCABULARY.is_special[sample.ids]).all()


def test_cross_segment_keeps_to_one_segment(seed: int, rng: np.random.Generator) -> None:
    sample = text(rng, 400)
    chosen = []
    for view in (0, 1):
        batch = sample.batch(seed, view=np.full(400, view), views=2)
        flags = rows_of(choose(batch, VOCABULARY, MaskingOptions(strategy="cross_segment")), batch)
        segments = rows_of(batch.segments, batch)
        found = [set(s[f].tolist()) for f, s in zip(flags, segments, strict=True)]
        assert all(len(one) <= 1 for one in found)
        for flag, segment, one in zip(flags, segments, found, strict=True):
            for which in one:
                assert flag.sum() <= max(1, round((segment == which).sum() * 0.15))
        chosen.append(found)
    assert all(not (a & b) for a, b in zip(*chosen, strict=True))
    assert 120 < sum(one == {0} for one in chosen[0]) < 280
    assert sum(map(bool, chosen[0])) > 350


# -------------------------------------------------------------------------------------------------------- replacement


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.1), (0.5, 0.0, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_what_stands_in_their_place(seed: int, rng: np.random.Generator, split: tuple[float, float, float]) -> None:
    batch = text(rng, 2000).batch(seed)
    options = MaskingOptions(strategy="random", split=split)
    ids, labels = mask(batch, VOCABULARY, options)
    chosen = labels != IGNORE_INDEX
    assert (chosen == choose(batch, VOCABULARY, options)).all()
    assert (ids[~chosen] == batch.ids[~chosen]).all()
    assert (labels[chosen] == batch.ids[chosen]).all()
    now, was = ids[chosen], batch.ids[chosen]
    masked, kept = (now == 4), (now == was)
    bound = 7 * (0.25 / chosen.sum()) ** 0.5
    assert abs(masked.mean() - split[0]) < bound
    assert abs(kept.mean() - split[1] - split[2] / 205) < bound
    is_random = ~masked & ~kept
    assert not VOCABULARY.is_special[now[is_random]].any()
    if split[2] == 0.5:
        assert len(np.unique(now[is_random])) == 205


def test_random_ids_of_the_whole_vocabulary_only_when_compatible(seed: int, rng: np.random.Generator) -> None:
    batch = text(rng, 500).batch(seed)
    options = MaskingOptions(split=(0.0, 0.0, 1.0), google_compat=True)
    ids, labels = mask(batch, VOCABULARY, options)
    assert set(range(5)) <= set(ids[labels != IGNORE_INDEX].tolist())


def test_full_and_given_tokens_are_always_masked(seed: int, rng: np.random.Generator) -> None:
    batch = text(rng, 100).batch(seed)
    ids, labels = mask(batch, VOCABULARY, MaskingOptions(strategy="full"))
    assert (ids[labels != IGNORE_INDEX] == 4).all()
    chosen = rng.random(len(batch.ids)) < 0.1
    ids, labels = replace_tokens(batch, chosen, VOCABULARY, MaskingOptions(strategy="dmlm"))
    assert (ids[chosen] == 4).all()
    assert ((labels != IGNORE_INDEX) == chosen).all()


def test_unknown_pieces_are_predicted_only_when_compatible(seed: int) -> None:
    batch = Text([[2, *[1] * 40, 3]]).batch(seed)
    assert not choose(batch, VOCABULARY, MaskingOptions()).any()
    assert choose(batch, VOCABULARY, MaskingOptions(google_compat=True)).sum() == 6


# ------------------------------------------------------------------------------------------------- purity and edges


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "dmlm"])
def test_a_row_is_masked_alone_as_in_any_batch(seed: int, rng: np.random.Generator, strategy: str) -> None:
    sample = text(rng, 30, shortest=4)
    view = rng.integers(0, 3, 30)
    batch = sample.batch(seed, view=view, views=3)
    options = MaskingOptions(strategy=strategy, split=(0.4, 0.2, 0.4))
    ids, labels = (rows_of(x, batch) for x in mask(batch, VOCABULARY, options))
    for r in rng.permutation(30)[:10]:
        alone = Text([sample.rows[r]])
        rows = Rows(alone.ids, alone.offsets, batch.keys[r : r + 1], alone.segments, view[r : r + 1], 3)
        one_ids, one_labels = mask(rows, VOCABULARY, options)
        assert (one_ids == ids[r]).all()
        assert (one_labels == labels[r]).all()
    for other in (sample.batch(seed + 1, view=view, views=3), sample.batch(seed, 1, view=view, views=3)):
        assert (mask(other, VOCABULARY, options)[1] != np.concatenate(labels)).any()


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "dmlm"])
@pytest.mark.parametrize("google_compat", [False, True])
def test_rows_without_words(seed: int, strategy: str, google_compat: bool) -> None:
    options = MaskingOptions(strategy=strategy, google_compat=google_compat)
    for rows in ([[2, 3, 3]], [[], [2, 110, 3, 3], []], [[2, 5, 110, 110, 3, 3], []], [[110, 110], [5]]):
        sample = Text(rows)
        batch = sample.batch(seed, view=np.zeros(len(rows), dtype=np.int64), views=2)
        ids, labels = mask(batch, VOCABULARY, options)
        assert len(ids) == len(labels) == len(sample.ids)
        assert not (labels != IGNORE_INDEX)[VOCABULARY.is_special[sample.ids]].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "wholeword"}, "strategy is 'wholeword'; one of random, whole_word"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": 15}, "rate is 15"),
        ({"max_predictions": 0}, "max_predictions is 0"),
        ({"max_ngram": 0}, "max_ngram is 0"),
        ({"span_p": 1.0}, "span_p is 1.0"),
        ({"max_span": 0}, "max_span is 0"),
        ({"split": (0.8, 0.1, 0.2)}, "split is"),
        ({"split": (0.8, 0.3, -0.1)}, "split is"),
        ({"strategy": "cross", "max_predictions": 20}, "must predict every token"),
    ],
)
def test_options_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskingOptions(**changes)


def test_batches_are_checked(seed: int) -> None:
    good = Text([[2, 5, 6, 3]]).batch(seed)
    with pytest.raises(ValueError, match="offsets does not fit ids"):
        mask(Rows(good.ids, good.offsets + 1, good.keys), VOCABULARY, MaskingOptions())
    with pytest.raises(ValueError, match="keys has 0 entries; one for each of the 1 rows"):
        mask(Rows(good.ids, good.offsets, good.keys[:0]), VOCABULARY, MaskingOptions())
    with pytest.raises(IndexError, match="ids has values from 202 to 206; the vocabulary has 6 pieces"):
        mask(Rows(good.ids + 200, good.offsets, good.keys), Vocabulary.from_pieces(PIECES[:6]), MaskingOptions())
    with pytest.raises(ValueError, match="segments is None"):
        mask(Rows(good.ids, good.offsets, good.keys), VOCABULARY, MaskingOptions(strategy="cross_segment"))
    with pytest.raises(ValueError, match="view is None"):
        mask(Rows(good.ids, good.offsets, good.keys), VOCABULARY, MaskingOptions(strategy="cross"))
    with pytest.raises(ValueError, match="'dmlm' has its tokens chosen by the glossary"):
        mask(good, VOCABULARY, MaskingOptions(strategy="dmlm"))
    with pytest.raises(ValueError, match=r"pieces has no \[MASK\]"):
        Vocabulary.from_pieces(PIECES[:4])
    long = Text([[5] * (1 << 16 | 1)]).batch(seed)
    with pytest.raises(ValueError, match="a row of 65537 tokens; at most 65536"):
        mask(long, VOCABULARY, MaskingOptions())


def test_a_tokenizers_vocabulary() -> None:
    class Tokenizer:
        def __len__(self) -> int:
            return len(PIECES)

        def convert_ids_to_tokens(self, ids: range) -> list[str]:
            return [PIECES[i] for i in ids]

    vocabulary = Vocabulary.from_tokenizer(Tokenizer())  # type: ignore[arg-type]
    assert (vocabulary.starts_word == VOCABULARY.starts_word).all()
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id) == (
        *range(5),
    )
