"""Examples made on the fly, new in every epoch, and a pure function of (seed, epoch, index).

The store keeps the text alone. What an example consists of, where its segments are cut, whether they are swapped and
which tokens are masked is worked out when its batch is made, in numpy for the whole batch, packed without padding. No
generator has a state: a batch is the same in any process, at any time, and a run goes on at step n without looking at
the steps before.

A process makes 2 to 4 million tokens a second on one core, in batches of 16 thousand tokens or more; in those of 4
thousand, half a million to 1.5 million (n-gram masks, sentence order, 128 and 512 tokens a row, measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from albert_fast.ops.checks import check
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.packing import PackedBatch
from albert_fast.pretraining.glossary import Glossary, Occurrences, find_occurrences
from albert_fast.pretraining.masking import Rows, Vocabulary, mask, replace_tokens
from albert_fast.pretraining.plan import ExampleOptions, Integers, Plan, coins, cuts, make_plan, plan_of_words, targets
from albert_fast.pretraining.store import TokenStore
from albert_fast.training.randomness import Bits, Purpose, below, bits, example_keys, heads, stream

KEPT_PLANS = 2  # the current epoch's, and the next one's that a loader may already read


@dataclass(frozen=True)
class Batch:
    """A packed batch, on the CPU; the names are those of PackedBatch.

    Attributes:
        input_ids, token_type_ids, position_ids: int64 [tokens]; row r is the tokens cu_seqlens[r] to cu_seqlens[r + 1].
        labels: int64 [tokens], the id where one is to be predicted and -100 elsewhere.
        cu_seqlens: int32 [rows + 1].
        max_seqlen: an upper bound of the rows' lengths, the same for all batches.
        pad_id: what `padded` fills with.
        sentence_order_label: int64 [rows], 1 for swapped segments (sop) or another document's (nsp); None without a
            second task.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    pad_id: int
    sentence_order_label: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def tokens(self) -> int:
        return len(self.input_ids)

    def packed(self) -> PackedBatch:
        """The inputs as a model takes them; `PackedBatch.pad` brings its outputs into [rows, max_seqlen]."""
        return PackedBatch(
            cu_seqlens=self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            batch_size=self.rows,
            seq_length=self.max_seqlen,
            indices=self._places(),
            input_ids=self.input_ids,
            token_type_ids=self.token_type_ids,
            position_ids=self.position_ids,
        )

    def padded(self) -> dict[str, Tensor]:
        """The same for other trainers: input_ids, token_type_ids, attention_mask and labels [rows, max_seqlen], and
        sentence_order_label [rows]."""
        places = self._places()

        def pad(values: Tensor, fill: int) -> Tensor:
            flat = values.new_full((self.rows * self.max_seqlen,), fill)
            flat[places] = values
            return flat.view(self.rows, self.max_seqlen)

        inputs = {
            "input_ids": pad(self.input_ids, self.pad_id),
            "token_type_ids": pad(self.token_type_ids, 0),
            "attention_mask": pad(torch.ones_like(self.input_ids), 0),
            "labels": pad(self.labels, IGNORE_INDEX),
        }
        if self.sentence_order_label is not None:
            inputs["sentence_order_label"] = self.sentence_order_label
        return inputs

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        """The batch with its tensors on `device`; options as `Tensor.to`."""
        return self._map(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _places(self) -> Tensor:
        """Each token's place in the flattened padded batch, int64 [tokens]."""
        lengths = self.cu_seqlens.diff().long()
        row = torch.repeat_interleave(torch.arange(self.rows, device=lengths.device), lengths, output_size=self.tokens)
        return row * self.max_seqlen + self.position_ids

    def _map(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


class Examples:
    """All examples of a corpus, by epoch and index.

    Args:
        store: the corpus.
        vocabulary: of the tokenizer that made it.
        options: what an example is.
        seed: any integer; another one gives other examples.
        glossary: the words and definitions of strategy `dmlm`.

    Raises:
        ValueError: the store is of another vocabulary, or does not go with the options.
    """

    def __init__(
        self,
        store: TokenStore,
        vocabulary: Vocabulary,
        options: ExampleOptions | None = None,
        *,
        seed: int = 0,
        glossary: Glossary | None = None,
    ) -> None:
        self.store, self.vocabulary, self.seed = store, vocabulary, seed
        self.options = options = options or ExampleOptions()
        check(
            store.vocab_size == vocabulary.vocab_size,
            f"store has tokens of a vocabulary of {store.vocab_size} pieces and vocabulary has {vocabulary.vocab_size}:"
            " give the tokenizer that made the store",
        )
        check(len(store.document_offsets) > 1, "store has no document; at least one was expected")
        check(
            options.order != "nsp" or len(store.document_offsets) > 2,
            "store has one document and sentence_order 'nsp' needs another for the random segment: choose 'sop', or "
            "put a blank line between documents",
        )
        needed = options.masking.strategy == "dmlm"
        given = "given" if glossary is not None else "None"
        check(
            needed == (glossary is not None),
            f"glossary is {given} and strategy {options.masking.strategy!r}: 'dmlm' needs one, and nothing else does",
        )
        self.glossary = glossary
        self._occurrences: Occurrences | None = None
        if glossary is not None:
            self._occurrences = self._that_fit(find_occurrences(store, vocabulary, glossary), glossary)
        # Plain arrays: a memmap's own indexing is several times slower.
        self._tokens = np.asarray(store.tokens)
        self._plans: dict[int, Plan] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokens": None, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = np.asarray(self.store.tokens)

    def plan(self, epoch: int) -> Plan:
        """The epoch's chunks in the order of their examples; the last few plans are kept."""
        if epoch not in self._plans:
            check(epoch >= 0, f"epoch is {epoch}; at least 0 was expected")
            while len(self._plans) >= KEPT_PLANS:
                self._plans.pop(next(iter(self._plans)))
            if self._occurrences is not None:
                self._plans[epoch] = plan_of_words(self._occurrences.word, self.options, self.seed, epoch)
            else:
                self._plans[epoch] = make_plan(self.store, self.options, self.seed, epoch)
        return self._plans[epoch]

    def size(self, epoch: int) -> int:
        """Examples of an epoch. It differs a little from epoch to epoch, as the chunks do."""
        return len(self.plan(epoch)) * self.options.number_of_views

    def batch(self, epoch: int, indices: Sequence[int] | NDArray[np.integer] | range) -> Batch:
        """The examples of these indices.

        Raises:
            IndexError: the epoch has fewer.
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        check(len(index) > 0, "indices is empty; at least one example was expected")
        plan, views = self.plan(epoch), self.options.number_of_views
        low, high, size = int(index.min()), int(index.max()), len(plan) * views
        check(
            low >= 0 and high < size,
            f"indices has values from {low} to {high}; epoch {epoch} has {size} examples",
            IndexError,
        )
        chunk, view = np.divmod(index, views)
        first, sentences = plan.first[chunk], plan.sentences[chunk].astype(np.int64)
        keys = example_keys(self.seed, epoch, first)
        if self._occurrences is not None:
            return self._definitions(first, keys)
        start, length, label = self._segments(epoch, first, sentences, keys)
        start, length = truncated(start, length, self.options.room, keys)
        rows, segments = self._rows([self._tokens, self._tokens], start, length, keys, view)
        ids, labels = mask(rows, self.vocabulary, self.options.masking)
        return self._batch(rows, segments, ids, labels, None if self.options.order == "none" else label)

    def _segments(
        self, epoch: int, first: Integers, sentences: Integers, keys: Bits
    ) -> tuple[Integers, Integers, Integers]:
        """Where the two segments begin in the store [rows, 2], their tokens [rows, 2], and the second task's label
        [rows]."""
        options, offsets = self.options, self.store.sentence_offsets
        begin, end = offsets[first], offsets[first + sentences]
        label = np.zeros(len(first), dtype=np.int64)
        if not options.is_pair:
            return np.stack([begin, end], axis=1), np.stack([end - begin, label], axis=1), label
        if options.has_own_pairs:
            cut = offsets[first + 1]
            return np.stack([begin, cut], axis=1), np.stack([cut - begin, end - cut], axis=1), label
        lone = sentences == 1
        cut = offsets[first + cuts(keys, sentences)]
        start, length = np.stack([begin, cut], axis=1), np.stack([cut - begin, end - cut], axis=1)
        other = lone if options.order == "sop" else lone | coins(keys)
        if options.order == "sop":
            swapped = coins(keys) & ~lone
            start[swapped], length[swapped] = start[swapped, ::-1], length[swapped, ::-1]
            label[swapped] = 1
        if other.any():
            wanted = length[other, 1]
            if options.google_compat:
                target = targets(self.store, first[other], keys[other], options, self.seed, epoch)
                wanted = np.maximum(target - length[other, 0], 1)
            start[other, 1], length[other, 1] = self._of_other_documents(first[other], wanted, keys[other])
            label[other] = 1
        return start, length, label

    def _of_other_documents(self, first: Integers, wanted: Integers, keys: Bits) -> tuple[Integers, Integers]:
        """Sentences from a random one of a random other document on, until there are as many tokens as wanted."""
        offsets, documents = self.store.sentence_offsets, self.store.document_offsets
        document = np.searchsorted(documents, first, side="right") - 1
        count = len(documents) - 1
        other = below(bits(stream(keys, Purpose.OTHER_DOCUMENT)), max(1, count - 1))
        other += (other >= document) & (count > 1)
        low, high = documents[other], documents[other + 1]
        sentence = low + below(bits(stream(keys, Purpose.OTHER_SENTENCE)), high - low)
        start = offsets[sentence]
        end = offsets[np.minimum(np.searchsorted(offsets, start + wanted), high)]
        if not self.options.google_compat:
            # As long as what it stands in for, so that its length does not give it away.
            end = np.minimum(end, start + wanted)
        return start, end - start

    def _definitions(self, number: Integers, keys: Bits) -> Batch:
        """Examples of words in their contexts, from their numbers among the occurrences."""
        assert self.glossary is not None
        assert self._occurrences is not None
        glossary, offsets, room = self.glossary, self.store.sentence_offsets, self.options.room
        position, word = self._occurrences.position[number], self._occurrences.word[number]
        pieces = self._sizes(glossary)[word]
        candidates = glossary.first_definition[word]
        definition = candidates + below(
            bits(stream(keys, Purpose.OTHER_SENTENCE)), glossary.first_definition[word + 1] - candidates
        )
        definition_start = glossary.definition_offsets[definition]
        definition_length = np.minimum(glossary.definition_offsets[definition + 1] - definition_start, room // 2)
        # The sentence, or as much of it around the word as there is room for.
        sentence = np.searchsorted(offsets, position, side="right") - 1
        begin, end = offsets[sentence], offsets[sentence + 1]
        length = np.minimum(end - begin, room - definition_length)
        start = np.clip(position - (length - pieces) // 2, begin, end - length)

        context = 1 if self.options.definition_first else 0
        sources = [glossary.definitions, self._tokens] if context else [self._tokens, glossary.definitions]
        starts = np.stack([start, definition_start], axis=1)
        lengths = np.stack([length, definition_length], axis=1)
        if context:
            starts, lengths = starts[:, ::-1], lengths[:, ::-1]
        rows, segments = self._rows(sources, starts, lengths, keys, None)
        before = rows.offsets[:-1] + 1 + (lengths[:, 0] + 1 if context else 0)
        chosen = np.zeros(len(rows.ids), dtype=bool)
        chosen[ranges(before + position - start, pieces)] = True
        ids, labels = replace_tokens(rows, chosen, self.vocabulary, self.options.masking)
        return self._batch(rows, segments, ids, labels, None)

    def _that_fit(self, occurrences: Occurrences, glossary: Glossary) -> Occurrences:
        """Those whose word has room beside its definition."""
        room = self.options.room - self.options.room // 2
        fits = self._sizes(glossary)[occurrences.word] <= room
        check(bool(fits.any()), f"length is {self.options.length} and no word of the glossary fits: raise it")
        return Occurrences(occurrences.position[fits], occurrences.word[fits])

    @staticmethod
    def _sizes(glossary: Glossary) -> Integers:
        return np.array([len(word) for word in glossary.words], dtype=np.int64)

    def _rows(
        self, sources: list[NDArray[Any]], start: Integers, length: Integers, keys: Bits, view: Integers | None
    ) -> tuple[Rows, Integers]:
        """[CLS] A [SEP] B [SEP], or [CLS] A [SEP]: the rows one after the other, and their segments [tokens]."""
        pair = self.options.is_pair
        offsets = np.concatenate(([0], np.cumsum(length.sum(axis=1) + (3 if pair else 2))))
        ids = np.empty(offsets[-1], dtype=np.int64)
        segments = np.zeros(offsets[-1], dtype=np.int64)
        ids[offsets[:-1]] = self.vocabulary.cls_id
        ids[offsets[1:] - 1] = self.vocabulary.sep_id
        a = offsets[:-1] + 1
        ids[ranges(a, length[:, 0])] = sources[0][ranges(start[:, 0], length[:, 0])]
        if pair:
            b = a + length[:, 0] + 1
            ids[b - 1] = self.vocabulary.sep_id
            places = ranges(b, length[:, 1])
            ids[places] = sources[1][ranges(start[:, 1], length[:, 1])]
            segments[places] = 1
            segments[offsets[1:] - 1] = 1
        return Rows(ids, offsets, keys, segments, view, self.options.number_of_views), segments

    def _batch(self, rows: Rows, segments: Integers, ids: Integers, labels: Integers, label: Integers | None) -> Batch:
        lengths = rows.lengths
        return Batch(
            input_ids=torch.from_numpy(ids),
            token_type_ids=torch.from_numpy(segments),
            position_ids=torch.from_numpy(ranges(np.zeros_like(lengths), lengths)),
            labels=torch.from_numpy(labels),
            cu_seqlens=torch.from_numpy(rows.offsets.astype(np.int32)),
            max_seqlen=self.options.length,
            pad_id=self.vocabulary.pad_id,
            sentence_order_label=None if label is None else torch.from_numpy(label),
        )


def ranges(start: Integers, length: Integers) -> Integers:
    """start[0], start[0] + 1, …, length[0] of them, then start[1], …: one after the other."""
    end = np.cumsum(length)
    counted = np.repeat(start - end + length, length)
    counted += np.arange(len(counted))
    return counted


def truncated(start: Integers, length: Integers, room: int, keys: Bits) -> tuple[Integers, Integers]:
    """Segments [rows, 2] cut to `room` tokens a row as the original does: token by token from the longer one (the
    second, where they are equal), at its front or its back with the same probability."""
    a, b = length[:, 0], length[:, 1]
    rows = np.flatnonzero(a + b > room)
    if not rows.size:
        return start, length
    a, b = a[rows], b[rows]
    kept_a = np.minimum(a, np.maximum(room - b, room - room // 2))
    kept = np.stack([kept_a, room - kept_a], axis=1)
    cut = length[rows] - kept
    front = [
        heads(stream(keys[rows], purpose), cut[:, segment])
        for segment, purpose in enumerate((Purpose.TRIM_FIRST, Purpose.TRIM_SECOND))
    ]
    start, length = start.copy(), length.copy()
    start[rows] += np.stack(front, axis=1)
    length[rows] = kept
    return start, length


class Batches(Dataset[Batch]):
    """The batches of one epoch, for torch's DataLoader: item n is step n's rows of one rank.

    Rank r of R has the rows r, r + R, … of each global batch, so the ranks together see what one would see. The
    examples that do not fill the last batch are left out; the next epoch has them at other places.

    Args:
        batch_size: rows of the global batch, a multiple of `ranks`.
        first: the example of the epoch that the first batch begins with.

    Raises:
        ValueError: an argument does not fit, or there are fewer examples than a batch has.
    """

    def __init__(
        self, examples: Examples, epoch: int, batch_size: int, *, rank: int = 0, ranks: int = 1, first: int = 0
    ) -> None:
        check(ranks >= 1 and 0 <= rank < ranks, f"rank is {rank} of {ranks} ranks; 0 to {ranks - 1} was expected")
        check(
            batch_size >= 1 and batch_size % ranks == 0,
            f"batch_size is {batch_size}; a multiple of the {ranks} ranks was expected, each has as many rows",
        )
        self.examples, self.epoch, self.batch_size, self.rank, self.ranks = examples, epoch, batch_size, rank, ranks
        size = examples.size(epoch)
        check(0 <= first <= size, f"first is {first}; 0 to {size} was expected, the examples of the epoch")
        self.first, self.steps = first, (size - first) // batch_size
        check(
            size >= batch_size,
            f"batch_size is {batch_size} and epoch {epoch} has {size} examples: lower it or give more text",
        )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self.steps:
            raise IndexError(f"step is {step}; epoch {self.epoch} has {self.steps}")
        start = self.first + step * self.batch_size
        return self.examples.batch(self.epoch, range(start + self.rank, start + self.batch_size, self.ranks))

    def loader(self, step: int = 0, *, workers: int = 0, pin_memory: bool = False, **options: Any) -> DataLoader[Batch]:
        """A DataLoader from `step` on, at no cost for the steps before. Its batches and their order do not depend on
        the number of workers. `options` are the DataLoader's."""
        check(0 <= step <= self.steps, f"step is {step}; 0 to {self.steps} was expected, the steps of the epoch")
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(step, self.steps),
            num_workers=workers,
            pin_memory=pin_memory,
            **options,
        )
