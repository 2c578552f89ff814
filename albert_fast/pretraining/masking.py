"""Which tokens are predicted, and what stands in their place: for a whole packed batch at once, in numpy.

The strategies, in the literature's terms where it has one:

random
    each token with probability `rate` (BERT; anew each epoch: RoBERTa).
whole_word
    whole words in random order up to the budget.
full
    whole words, each piece of them [MASK] (no 80/10/10).
ngram
    ALBERT's: n-grams of words, p(n) ∝ 1/n for n up to `max_ngram`, in random order up to the budget. n-grams that would
    overlap an earlier one are dropped, and those that would exceed the budget are shortened.
span
    SpanBERT's lengths: geometric(`span_p`) up to `max_span` words (3.8 on average), otherwise as `ngram`.
cross
    complementary views (Fully-Explored MLM, arXiv 2010.06040): the words (or tokens) are dealt into as many sets as
    there are views, and view k masks the k-th: together they mask each token exactly once.
cross_segment
    `ngram` within one of the two segments, so that it is predicted with the whole of the other in sight; another view
    takes the other segment.
tlm
    `random` in both segments, for pairs of translations (XLM, arXiv 1901.07291).
dmlm
    the tokens are chosen by the examples: a word that is predicted from its definition (see glossary.py).

The budget of a row (google-research/albert, create_pretraining_data.py) is
min(max_predictions, max(1, round(rate * length))), the length with [CLS] and [SEP], half a token rounded to even.

The one sequential thing is the choice of words, where each depends on those before. It runs for all rows side by side:
round t looks at every row's t-th candidate. Given the same random order and lengths it chooses exactly what the
original's loop chooses, in a few dozen rounds.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from albert_fast.ops.checks import check
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.training.randomness import Bits, Purpose, below, bits, stream, uniform

if TYPE_CHECKING:
    from albert_fast.tokenizer import AlbertTokenizer

STRATEGIES = ("random", "whole_word", "full", "ngram", "span", "cross", "cross_segment", "tlm", "dmlm")
MOST_ROWS, MOST_WORDS = 1 << 20, 1 << 16  # of a batch, and of a row: what one sort key has room for

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of each id. Made by `from_tokenizer` or `from_pieces`.

    Attributes:
        starts_word: bool [V], the piece begins a word.
        is_special: bool [V], <pad>, <unk>, [CLS], [SEP], [MASK].
    """

    starts_word: Flags
    is_special: Flags
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: AlbertTokenizer, *, letters: str = string.ascii_lowercase) -> Vocabulary:
        """Of a tokenizer's pieces; `letters` as in `from_pieces`."""
        return cls.from_pieces(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), letters=letters)

    @classmethod
    def from_pieces(cls, pieces: Sequence[str], *, letters: str = string.ascii_lowercase) -> Vocabulary:
        """Of the list of pieces, the piece of id 0 first.

        Args:
            letters: what a piece within a word consists of. The original's rule knows a to z, and every piece with
                another character (digits, é, ж) begins a word. Give another alphabet for a cased or foreign vocabulary.

        Raises:
            ValueError: a special token is missing.
        """
        ids = {piece: i for i, piece in enumerate(pieces)}
        names = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
        missing = [name for name in names if name not in ids]
        check(not missing, f"pieces has no {', '.join(missing)}; an ALBERT vocabulary was expected")
        starts = np.array([_starts_word(piece, frozenset(letters)) for piece in pieces])
        special = np.zeros(len(pieces), dtype=bool)
        special[[ids[name] for name in names]] = True
        return cls(starts, special, *(ids[name] for name in names))

    @property
    def vocab_size(self) -> int:
        return len(self.starts_word)


def _starts_word(piece: str, letters: frozenset[str]) -> bool:
    """The rule of the original's whole-word masking."""
    if piece.startswith(("▁", "<")) or piece in _PUNCTUATION:
        return True
    return any(c not in letters and c not in _PUNCTUATION for c in piece)


_PUNCTUATION = frozenset('!"#$%&()*+,-./:;?@[\\]^_`{|}~')


@dataclass(frozen=True)
class MaskingOptions:
    """How tokens are chosen and replaced.

    Attributes:
        strategy: one of `STRATEGIES`.
        rate: share of the tokens that are predicted. `cross` has 1 / views instead.
        max_predictions: most predicted tokens of a row; None: as many as `rate` asks for. The released models had 20 at
            length 512.
        max_ngram: longest n-gram, in words.
        favor_shorter: p(n) ∝ 1/n; False: the same probabilities the other way round.
        span_p, max_span: of the geometric law of `span`, and its longest span, in words.
        split: what becomes of a predicted token: [MASK], itself, a random id. `full` and `dmlm` are always [MASK].
        whole_words: `cross` deals words, not tokens.
        google_compat: as the original in everything that shows: <unk> is predicted too, random ids can be special
            tokens, and n-grams reach across [SEP] (as do words, after a truncation within one).
    """

    strategy: str = "ngram"
    rate: float = 0.15
    max_predictions: int | None = None
    max_ngram: int = 3
    favor_shorter: bool = True
    span_p: float = 0.2
    max_span: int = 10
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    whole_words: bool = True
    google_compat: bool = False

    def __post_init__(self) -> None:
        check(
            self.strategy in STRATEGIES, f"strategy is {self.strategy!r}; one of {', '.join(STRATEGIES)} was expected"
        )
        check(0 < self.rate < 1, f"rate is {self.rate}; a share between 0 and 1 was expected, such as 0.15")
        most = self.max_predictions
        check(most is None or most >= 1, f"max_predictions is {most}; at least 1 was expected, or None for no limit")
        check(self.max_ngram >= 1, f"max_ngram is {self.max_ngram}; at least 1 was expected")
        check(0 < self.span_p < 1, f"span_p is {self.span_p}; a probability between 0 and 1 was expected")
        check(self.max_span >= 1, f"max_span is {self.max_span}; at least 1 was expected")
        check(
            len(self.split) == 3 and min(self.split) >= 0 and abs(sum(self.split) - 1) < 1e-6,
            f"split is {self.split}; three shares ([MASK], kept, random) that add up to 1 were expected",
        )
        check(
            self.strategy != "cross" or most is None,
            f"max_predictions is {most} and strategy 'cross', which must predict every token: leave it None",
        )

    def length_law(self) -> NDArray[np.float64]:
        """Probability of 1, 2, … words."""
        if self.strategy == "span":
            law = (1 - self.span_p) ** np.arange(self.max_span)
        elif self.strategy in ("whole_word", "full"):
            law = np.ones(1)
        else:
            law = 1 / np.arange(1, self.max_ngram + 1)
            law = law if self.favor_shorter else law[::-1]
        return law / law.sum()


@dataclass(frozen=True)
class Rows:
    """A packed batch to be masked.

    Attributes:
        ids: int64 [tokens], special tokens included.
        offsets: int64 [rows + 1]: row r is the tokens offsets[r] to offsets[r + 1].
        keys: uint64 [rows], of `randomness.example_keys`: the same key gives the same masks.
        segments: integer [tokens], 0 or 1; for `cross_segment`.
        view: int64 [rows], which view of its example a row is, of `views` in all.
    """

    ids: Ids
    offsets: NDArray[np.int64]
    keys: Bits
    segments: NDArray[np.integer] | None = None
    view: NDArray[np.int64] | None = None
    views: int = 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def per_token(self, values: NDArray) -> NDArray:
        """[rows] -> [tokens]."""
        return np.repeat(values, self.lengths)

    def view_keys(self) -> Bits:
        """Keys that differ from view to view, uint64 [rows]."""
        return stream(self.keys, Purpose.VIEW, 0 if self.view is None else self.view)

    def places(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and position in it of some tokens (ascending indices into the batch), int64 each."""
        counts = np.diff(np.searchsorted(tokens, self.offsets))
        row = np.repeat(np.arange(len(counts)), counts)
        return row, tokens - self.offsets[row]


def mask(rows: Rows, vocabulary: Vocabulary, options: MaskingOptions) -> tuple[Ids, Ids]:
    """Chooses tokens and replaces them.

    Returns:
        the ids as the model gets them, and the labels (-100 where nothing is predicted): int64 [tokens] each.

    Raises:
        ValueError: a field of `rows` does not fit; the message names it.
    """
    return replace_tokens(rows, choose(rows, vocabulary, options), vocabulary, options)


def choose(rows: Rows, vocabulary: Vocabulary, options: MaskingOptions) -> Flags:
    """Which tokens are predicted, bool [tokens]. Arguments and errors as `mask`."""
    strategy = options.strategy
    check(strategy != "dmlm", "strategy 'dmlm' has its tokens chosen by the glossary: make batches with Examples")
    _check_rows(rows, vocabulary)
    maskable = ~vocabulary.is_special[rows.ids]
    if options.google_compat:
        maskable |= rows.ids == vocabulary.unk_id
    lengths = rows.lengths
    if strategy in ("random", "tlm"):
        return _choose_tokens(rows, maskable, options)
    if strategy == "cross_segment":
        check(rows.segments is not None, "segments is None; 0 or 1 for each token was expected by 'cross_segment'")
        assert rows.segments is not None
        coin = (bits(stream(rows.keys, Purpose.SEGMENT)) >> np.uint64(63)).astype(np.int64)
        segment = (coin + (0 if rows.view is None else rows.view)) % 2
        here = rows.segments == rows.per_token(segment)
        maskable &= here
        lengths = np.diff(np.concatenate(([0], np.cumsum(here)))[rows.offsets])
    words = Words.find(rows, maskable, vocabulary, options)
    if strategy == "cross":
        return words.tokens(_deal(rows, words))
    return words.tokens(_choose_words(rows.view_keys(), words, budgets(lengths, options), options))


def budgets(lengths: NDArray[np.int64], options: MaskingOptions) -> NDArray[np.int64]:
    """Most predicted tokens of rows of these lengths, int64 [rows]."""
    # np.rint and Python's round both take half to even.
    budget = np.maximum(1, np.rint(lengths * options.rate)).astype(np.int64)
    return budget if options.max_predictions is None else np.minimum(budget, options.max_predictions)


def replace_tokens(rows: Rows, chosen: Flags, vocabulary: Vocabulary, options: MaskingOptions) -> tuple[Ids, Ids]:
    """Ids and labels with the chosen tokens replaced, each piece by itself. Returns as `mask`."""
    ids, labels = rows.ids.copy(), np.full(len(rows.ids), IGNORE_INDEX, dtype=np.int64)
    tokens = np.flatnonzero(chosen)
    labels[tokens] = rows.ids[tokens]
    if options.strategy in ("full", "dmlm"):
        ids[tokens] = vocabulary.mask_id
        return ids, labels
    row, position = rows.places(tokens)
    keys = rows.view_keys()
    toss = uniform(bits(stream(keys, Purpose.REPLACEMENT)[row], position))
    masked, kept, _ = options.split
    ids[tokens[toss < masked]] = vocabulary.mask_id
    is_random = toss >= masked + kept if options.split[2] > 0 else np.zeros(len(toss), dtype=bool)
    draw = bits(stream(keys, Purpose.RANDOM_ID)[row[is_random]], position[is_random])
    if options.google_compat:
        ids[tokens[is_random]] = below(draw, vocabulary.vocab_size)
    else:
        ordinary = np.flatnonzero(~vocabulary.is_special)
        ids[tokens[is_random]] = ordinary[below(draw, len(ordinary))]
    return ids, labels


@dataclass(frozen=True)
class Words:
    """The words of a batch, in order.

    Attributes:
        of_token: integer [tokens], the word of each maskable token; at others anything within the table.
        maskable: bool [tokens].
        before: int64 [words + 1], maskable tokens before each word: differences are numbers of pieces.
        row: int64 [words].
        first_of_row: int64 [rows + 1].
        limit: int64 [words], the word at which an n-gram that begins here must end.
    """

    of_token: NDArray[np.integer]
    maskable: Flags
    before: NDArray[np.int64]
    row: NDArray[np.int64]
    first_of_row: NDArray[np.int64]
    limit: NDArray[np.int64]

    @classmethod
    def find(cls, rows: Rows, maskable: Flags, vocabulary: Vocabulary, options: MaskingOptions) -> Words:
        """The words of the maskable tokens; with strategy `cross` and without whole_words each token is one."""
        count = np.cumsum(maskable)
        begins = maskable.copy()
        if options.strategy != "cross" or options.whole_words:
            begins &= vocabulary.starts_word[rows.ids]
            if options.google_compat:
                # The original's word goes on after [SEP]; only the first of a row cannot go on from another row.
                count_before_row = np.concatenate(([0], count))[rows.offsets[:-1]]
                first = np.searchsorted(count, count_before_row + 1)
                begins[first[first < rows.offsets[1:]]] = True
            else:
                after_special = ~maskable[:-1] & maskable[1:]
                begins[1:] |= after_special
                starts = rows.offsets[:-1][rows.lengths > 0]
                begins[starts] |= maskable[starts]
        token = np.flatnonzero(begins)
        before = np.append(count[token] - 1, count[-1] if len(count) else 0)
        first_of_row = np.searchsorted(token, rows.offsets)
        in_row = np.diff(first_of_row)
        limit = np.repeat(first_of_row[1:], in_row)
        if not options.google_compat:
            # An n-gram ends before the next token that is not maskable: where the words are not next to each other.
            gap = np.flatnonzero(np.diff(token) != np.diff(before)[:-1]) + 1
            ends = np.append(gap, len(token))
            limit = np.minimum(limit, ends[np.searchsorted(gap, np.arange(len(token)), side="right")])
        return cls(
            of_token=np.maximum(np.cumsum(begins) - 1, 0),
            maskable=maskable,
            before=before,
            row=np.repeat(np.arange(len(in_row)), in_row),
            first_of_row=first_of_row,
            limit=limit,
        )

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def place(self) -> NDArray[np.int64]:
        """Each word's number in its row, int64 [words]."""
        return np.arange(len(self)) - self.first_of_row[self.row]

    def lengths(self, streams: Bits, options: MaskingOptions) -> NDArray[np.integer]:
        """How many words an n-gram that begins at each word shall have, [words]."""
        law = np.cumsum(options.length_law())[:-1]
        if not len(law):
            return np.ones(len(self), dtype=np.int64)
        return np.searchsorted(law, uniform(bits(streams[self.row], self.place)), side="right") + 1

    def shuffled(self, streams: Bits) -> NDArray[np.int64]:
        """The words of each row in random order, rows one after the other: int64 [words]."""
        # Sorting (row, random, place) as one integer is several times faster than sorting indices by a key.
        key = bits(streams[self.row], self.place) >> np.uint64(36) << np.uint64(16)
        key |= self.place.astype(np.uint64)
        key |= self.row.astype(np.uint64) << np.uint64(44)
        key.sort()
        return (key & np.uint64(MOST_WORDS - 1)).astype(np.int64) + self.first_of_row[self.row]

    def tokens(self, chosen: Flags) -> Flags:
        """bool [words] -> bool [tokens]."""
        return chosen[self.of_token] & self.maskable if len(self) else np.zeros_like(self.maskable)


def _choose_words(keys: Bits, words: Words, budget: NDArray[np.int64], options: MaskingOptions) -> Flags:
    """n-grams of words in random order up to the budget, bool [words]."""
    order = words.shuffled(stream(keys, Purpose.CHOICE))
    drawn = words.lengths(stream(keys, Purpose.LENGTH), options)
    return greedy(words, order, drawn, budget)


def greedy(words: Words, order: NDArray[np.int64], drawn: NDArray[np.integer], budget: NDArray[np.int64]) -> Flags:
    """The original's loop over the candidates of a row, for all rows side by side.

    A candidate is taken with as many of its drawn words as the budget allows, unless it touches an earlier one.

    Args:
        order: int64 [words], of `Words.shuffled`.
        drawn: [words], words of the n-gram that begins at each word.
        budget: int64 [rows], in tokens.

    Returns:
        bool [words].
    """
    widest = int(drawn.max(initial=1))
    step = np.arange(widest)
    # [words, widest + 1]: tokens of the first 0, 1, 2, … words from here on, too many for any budget beyond what was
    # drawn, and beyond the limit, where the original's n-grams are cut, too.
    reach = np.minimum(drawn, words.limit - np.arange(len(words)))
    end = np.minimum(np.arange(len(words))[:, None] + np.arange(widest + 1), len(words))
    tokens = words.before[end] - words.before[:-1, None]
    tokens[np.arange(widest + 1) > reach[:, None]] = np.iinfo(np.int64).max

    taken = np.zeros(len(words) + widest, dtype=bool)  # beyond the end: nothing is there
    in_row = np.diff(words.first_of_row)
    row = np.flatnonzero((in_row > 0) & (budget > 0))
    left, start, count = budget[row], words.first_of_row[row], in_row[row]
    turn = 0
    while left.size:
        word = order[start + turn]
        n = (tokens[word, 1:] <= left[:, None]).sum(axis=1)  # as many words as there is room for
        gram = word[:, None] + step
        inside = step < n[:, None]
        touches = (taken[gram] & inside).any(axis=1)
        n[touches] = 0
        taken[gram[step < n[:, None]]] = True
        left -= tokens[word, n]
        turn += 1
        goes_on = (left > 0) & (turn < count)
        if not goes_on.all():
            left, start, count = left[goes_on], start[goes_on], count[goes_on]
    return taken[: len(words)]


def _choose_tokens(rows: Rows, maskable: Flags, options: MaskingOptions) -> Flags:
    """Each token by itself, bool [tokens]; at least one of a row with any, and at most max_predictions."""
    row, position = rows.places(np.flatnonzero(maskable))
    draw = bits(stream(rows.view_keys(), Purpose.CHOICE)[row], position)
    likely = draw < np.uint64(int(options.rate * 2.0**64))
    counts = np.bincount(row[likely], minlength=len(rows.keys))
    most = options.max_predictions
    odd = counts == 0 if most is None else (counts == 0) | (counts > most)
    if odd.any():
        # The token with the lowest draw in place of none; those with the lowest in place of too many.
        here = np.flatnonzero(odd[row])
        ascending = here[np.lexsort((draw[here], row[here]))]
        first = np.searchsorted(row[ascending], row[ascending])
        allowed = np.where(counts == 0, 1, most or 0)[row[ascending]]
        likely[ascending] = np.arange(len(ascending)) - first < allowed
    chosen = np.zeros(len(maskable), dtype=bool)
    chosen[maskable] = likely
    return chosen


def _deal(rows: Rows, words: Words) -> Flags:
    """The words of each row's view, bool [words]: dealt in random order into sets of about as many tokens."""
    check(rows.view is not None and rows.views > 1, "view is None; which of its views each row is was expected")
    assert rows.view is not None
    chosen = np.zeros(len(words), dtype=bool)
    if not len(words):
        return chosen
    # The same order in every view of an example.
    order = words.shuffled(stream(rows.keys, Purpose.CHOICE))
    pieces = np.diff(words.before)[order]
    dealt = np.cumsum(pieces) - pieces - words.before[words.first_of_row[words.row]]
    total = np.diff(words.before[words.first_of_row])[words.row]
    chosen[order] = dealt * rows.views // total == rows.view[words.row]
    return chosen


def _check_rows(rows: Rows, vocabulary: Vocabulary) -> None:
    count = len(rows.offsets) - 1
    check(
        count >= 0 and rows.offsets[0] == 0 and rows.offsets[-1] == len(rows.ids) and rows.lengths.min(initial=0) >= 0,
        f"offsets does not fit ids: rows + 1 numbers from 0 to {len(rows.ids)} that never fall were expected",
    )
    check(len(rows.keys) == count, f"keys has {len(rows.keys)} entries; one for each of the {count} rows was expected")
    if len(rows.ids):
        low, high = int(rows.ids.min()), int(rows.ids.max())
        check(
            low >= 0 and high < vocabulary.vocab_size,
            f"ids has values from {low} to {high}; the vocabulary has {vocabulary.vocab_size} pieces: are the tokens "
            "of another vocabulary?",
            IndexError,
        )
    check(count < MOST_ROWS, f"ids has {count} rows; fewer than {MOST_ROWS} were expected: make smaller batches")
    longest = int(rows.lengths.max(initial=0))
    check(longest <= MOST_WORDS, f"ids has a row of {longest} tokens; at most {MOST_WORDS} were expected")
