"""Which sentences make an example: the plan of an epoch.

Each document is cut into chunks of whole sentences, one after the other, anew in each epoch: a chunk has room for
`length` tokens, or with probability `short_probability` for a random number of them (google-research/albert,
create_pretraining_data.py). How large the chunk that begins at a sentence may be is a function of (seed, epoch,
sentence), so that the end of every possible chunk is found in numpy at once; following them from the first sentence on
is the only loop, of well under 0.1 us for each chunk.

Where this differs from the original, which `google_compat` brings back:

- A chunk is as long as fits, where the original's is the first that is too long, and nearly always truncated.
- Half of a one-sentence chunk cannot be swapped with the other half. The original takes the second segment from another
  document then, with label 1: next-sentence prediction amid sentence order (a third of the examples, where a line is a
  paragraph). Here a chunk has at least two sentences, is truncated when they are too long, and leaves no lone sentence
  behind at the end of a document. Documents of one sentence are dropped.
- The room is drawn for each chunk, not once for all chunks of a document.
- For "sop" a document is cut in stretches, half of them, others in each epoch, from their end. A sentence that does not
  fit is the next chunk's first, so that segments on that side are longer: with all text cut from its beginning, whoever
  called the longer segment the first was right in 55.7 % of the pairs of 128 tokens of novels.

A plan takes 12 bytes a chunk, about 65 while it is made, and 6 ns for each token of the corpus (measured); all else is
looked up when a batch is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from albert_fast.ops.checks import check
from albert_fast.pretraining.masking import MaskingOptions
from albert_fast.pretraining.store import TokenStore
from albert_fast.training.randomness import Bits, Purpose, below, bits, example_keys, stream, uniform

SENTENCE_ORDERS = ("sop", "nsp", "none")
BLOCK = 1 << 16  # sentences looked at together: what a core's cache holds
STRETCH = 128  # sentences that are cut from the same side, at least, and fewer than twice as many

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ExampleOptions:
    """What an example is.

    Attributes:
        length: most tokens of a row, special ones included.
        sentence_order: the second task. "sop": two consecutive segments, swapped in half of the examples (label 1);
            "nsp": the second is of another document in half of them (label 1); "none": one segment. None: "sop", or
            "none" for pairs that have another reason (parallel text, definitions).
        short_probability: share of the chunks that are of random size.
        masking: how tokens are chosen and replaced.
        views: examples made of each chunk, with masks of their own, next to each other. None: as many as strategy
            `cross` needs for `rate` (7 for 0.15), 2 for `cross_segment`, else 1.
        parallel: documents are pairs of translations, an example each. Always so with strategy `tlm`.
        definition_first: `dmlm` puts the definition before the context.
        most_per_word: most examples of one word in an epoch of `dmlm`, others in each; None: every occurrence, most of
            which are of a few frequent words.
        google_compat: chunks as the original's, see above; and masks.
    """

    length: int = 512
    sentence_order: str | None = None
    short_probability: float = 0.1
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    views: int | None = None
    parallel: bool = False
    definition_first: bool = True
    most_per_word: int | None = None
    google_compat: bool = False

    def __post_init__(self) -> None:
        check(self.length >= 8, f"length is {self.length}; at least 8 tokens were expected, [CLS] and [SEP] included")
        check(
            self.sentence_order is None or self.sentence_order in SENTENCE_ORDERS,
            f"sentence_order is {self.sentence_order!r}; one of {', '.join(SENTENCE_ORDERS)} was expected",
        )
        check(
            0 <= self.short_probability <= 1,
            f"short_probability is {self.short_probability}; a probability was expected",
        )
        check(self.views is None or self.views >= 1, f"views is {self.views}; at least 1 was expected")
        most = self.most_per_word
        check(most is None or most >= 1, f"most_per_word is {most}; at least 1 was expected, or None for no limit")
        strategy = self.masking.strategy
        if self.has_own_pairs:
            why = "parallel text" if self.parallel else f"strategy {strategy!r}"
            check(
                self.sentence_order in (None, "none"),
                f"sentence_order is {self.sentence_order!r} and {why} has pairs of its own: leave it None",
            )
        check(not (self.parallel and strategy == "dmlm"), "parallel is True and strategy is 'dmlm': choose one")
        check(
            strategy != "cross_segment" or self.is_pair,
            "strategy is 'cross_segment' and sentence_order 'none', which has no second segment: choose 'sop' or "
            "parallel text",
        )
        check(
            strategy != "cross" or self.number_of_views > 1,
            f"views is {self.views} and strategy 'cross', which splits the tokens among them: at least 2 was expected",
        )
        if self.google_compat != self.masking.google_compat:
            object.__setattr__(self, "masking", replace(self.masking, google_compat=self.google_compat))

    @property
    def is_parallel(self) -> bool:
        return self.parallel or self.masking.strategy == "tlm"

    @property
    def has_own_pairs(self) -> bool:
        return self.is_parallel or self.masking.strategy == "dmlm"

    @property
    def order(self) -> str:
        """The second task: "sop", "nsp" or "none"."""
        return self.sentence_order or ("none" if self.has_own_pairs else "sop")

    @property
    def has_second_task(self) -> bool:
        return self.order != "none"

    @property
    def is_pair(self) -> bool:
        return self.order != "none" or self.has_own_pairs

    @property
    def room(self) -> int:
        """Most tokens of a row without the special ones."""
        return self.length - (3 if self.is_pair else 2)

    @property
    def number_of_views(self) -> int:
        if self.views is not None:
            return self.views
        return {"cross": max(2, round(1 / self.masking.rate)), "cross_segment": 2}.get(self.masking.strategy, 1)


@dataclass(frozen=True)
class Plan:
    """The chunks of an epoch in the order in which they are shown.

    Attributes:
        first: int64 [chunks], the first sentence; it is the chunk's name, too, from which its randomness is made.
        sentences: int32 [chunks], how many.
    """

    first: Integers
    sentences: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.first)


def make_plan(store: TokenStore, options: ExampleOptions, seed: int, epoch: int) -> Plan:
    """The plan of an epoch: a function of its arguments.

    Raises:
        ValueError: the store gives no example.
    """
    if options.is_parallel:
        sizes = np.diff(store.document_offsets)
        odd = np.flatnonzero(sizes != 2)
        check(
            not len(odd),
            f"document {odd[:1].sum()} of the store has {sizes[odd[:1]].sum()} sentences; parallel text has documents "
            "of exactly two, a sentence and its translation",
        )
        first = np.asarray(store.document_offsets[:-1], dtype=np.int64)
        return shuffled(first, sizes.astype(np.int32), seed, epoch)
    found = [np.empty(0, dtype=np.int64)]
    counts = [np.empty(0, dtype=np.int64)]
    sentence, total = 0, len(store.sentence_offsets) - 1
    for low in range(0, total, BLOCK):
        high = min(low + BLOCK, total)
        if sentence >= high:
            continue
        start, count, following = _chunks(store, np.arange(low, high), options, seed, epoch)
        steps, here = following.tolist(), []
        while sentence < high:
            here.append(sentence - low)
            sentence = steps[sentence - low]
        found.append(start[here])
        counts.append(count[here])
    first, sentences = np.concatenate(found), np.concatenate(counts).astype(np.int32)
    if options.is_pair and not options.google_compat:
        pairs = sentences >= 2
        first, sentences = first[pairs], sentences[pairs]
    check(
        len(first) > 0,
        f"the store gives no example: sentence_order {options.order!r} needs documents of at least "
        f"{'two sentences: split the text into sentences' if options.is_pair else 'one sentence'}",
    )
    return shuffled(first, sentences, seed, epoch)


def plan_of_words(word: NDArray[np.int32], options: ExampleOptions, seed: int, epoch: int) -> Plan:
    """The plan of `dmlm`: its "sentences" are the numbers of the occurrences, whose words these are."""
    number = np.arange(len(word))
    if options.most_per_word is not None:
        draw = bits(stream(example_keys(seed, epoch, number), Purpose.CHOICE))
        number = np.lexsort((draw, word))
        grouped = word[number]
        rank = np.arange(len(word)) - np.searchsorted(grouped, grouped)
        number = np.sort(number[rank < options.most_per_word])
    return shuffled(number, np.ones(len(number), dtype=np.int32), seed, epoch)


def shuffled(first: Integers, sentences: NDArray[np.int32], seed: int, epoch: int) -> Plan:
    """The same chunks in the order of a random number for each."""
    order = np.argsort(bits(stream(example_keys(seed, epoch, first), Purpose.SHUFFLE)))
    return Plan(first[order], sentences[order])


def _chunks(
    store: TokenStore, place: Integers, options: ExampleOptions, seed: int, epoch: int
) -> tuple[Integers, Integers, Integers]:
    """For chunks that would begin at these places: their first sentences, how many they have, and the places where the
    next chunks begin. A place is a sentence; in a stretch that is cut from its end, as far from there."""
    offsets = store.sentence_offsets
    document = np.searchsorted(store.document_offsets, place, side="right") - 1
    begin, end = store.document_offsets[document], store.document_offsets[document + 1]
    keys = example_keys(seed, epoch, place)
    room = targets(store, place, keys, options, seed, epoch)
    if options.google_compat:
        count = np.searchsorted(offsets, offsets[place] + room) - place
        return place, np.minimum(count, end - place), np.minimum(place + count, end)
    count = np.searchsorted(offsets, offsets[place] + room, side="right") - 1 - place
    backwards = np.zeros(len(place), dtype=bool)
    if options.order == "sop":
        begin, end = _stretches(place, begin, end, seed, epoch)
        backwards = bits(stream(example_keys(seed, epoch, begin), Purpose.DIRECTION)) >> np.uint64(63) == 1
        last = begin + end - place
        count = np.where(backwards, last - np.searchsorted(offsets, offsets[last] - room), count)
    count = np.minimum(np.maximum(count, 2 if options.is_pair else 1), end - place)
    if options.is_pair:
        lone = end - place - count == 1
        count += np.where(lone, np.where(count > 2, -1, 1), 0)
    start = np.where(backwards, begin + end - place - count, place)
    if options.order != "nsp":
        return start, count, place + count
    # What another document's text stands in for is not lost: the next chunk begins with it.
    return start, count, place + np.where(coins(keys) & (count > 1), cuts(keys, count), count)


def _stretches(place: Integers, begin: Integers, end: Integers, seed: int, epoch: int) -> tuple[Integers, Integers]:
    """Where the stretches of these places begin and end, in documents that do so; the last takes what is left."""
    size = STRETCH + below(bits(stream(example_keys(seed, epoch, np.zeros(1, np.int64)), Purpose.STRETCH)), STRETCH)
    last = np.maximum((end - begin) // size, 1) - 1
    number = np.minimum((place - begin) // size, last)
    begin = begin + number * size
    return begin, np.where(number == last, end, begin + size)


def targets(store: TokenStore, first: Integers, keys: Bits, options: ExampleOptions, seed: int, epoch: int) -> Integers:
    """Tokens that chunks which begin at these sentences should have, int64 [chunks]."""
    if options.google_compat:
        document = np.searchsorted(store.document_offsets, first, side="right") - 1
        keys = example_keys(seed, epoch, store.document_offsets[document])
    is_short = uniform(bits(stream(keys, Purpose.SHORT))) < options.short_probability
    room = np.full(len(keys), options.room)
    room[is_short] = 2 + below(bits(stream(keys[is_short], Purpose.SHORT_LENGTH)), options.room - 1)
    return room


def cuts(keys: Bits, count: NDArray[np.integer]) -> Integers:
    """Sentences of the first segment of chunks of `count` sentences: 1 to count - 1, or 1 of 1."""
    return 1 + below(bits(stream(keys, Purpose.CUT)), np.maximum(count - 1, 1))


def coins(keys: Bits) -> NDArray[np.bool_]:
    """Whether the segments are swapped, or the second is another document's."""
    return bits(stream(keys, Purpose.ORDER_OF_SEGMENTS)) >> np.uint64(63) == 1
