"""Where a run is in its text, and the rows of its next step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from albert_fast.ops.checks import check
from albert_fast.pretraining.config import DataOptions, PretrainConfig
from albert_fast.pretraining.corpus import fingerprint
from albert_fast.pretraining.examples import Batch, Batches, Examples
from albert_fast.pretraining.glossary import Glossary, read_glossary
from albert_fast.pretraining.masking import Vocabulary
from albert_fast.pretraining.store import TokenStore
from albert_fast.tokenizer import AlbertTokenizer
from albert_fast.training.schedules import LengthStages

HELD_OUT_SEED = 0  # of held-out examples, so that runs of other seeds are compared on the same ones


class Corpus:
    """The text of a run, opened: what is trained on, what is held out, and the vocabulary.

    Raises:
        ValueError: something is missing or does not fit.
    """

    def __init__(self, data: DataOptions) -> None:
        store = TokenStore.open(data.train)
        vocab = Path(data.vocab or data.train)
        self.tokenizer = AlbertTokenizer(vocab) if vocab.is_file() else AlbertTokenizer.from_pretrained(vocab)
        if data.vocab is None:
            _check_vocabulary(f"data.train is {data.train!r}", store, self.tokenizer, "make it anew with --force")
        else:
            given = f"data.vocab is {data.vocab!r} and data.train {data.train!r}"
            _check_vocabulary(given, store, self.tokenizer, "leave data.vocab out, or make the store anew with it")
        letters = {} if data.letters is None else {"letters": data.letters}
        self.vocabulary = Vocabulary.from_tokenizer(self.tokenizer, **letters)
        self.glossary: Glossary | None = None
        if data.glossary is not None:
            self.glossary = Glossary.encode(read_glossary(data.glossary), self.tokenizer)
        cut = len(store) - data.dev_documents
        check(
            cut > 0,
            f"data.dev_documents is {data.dev_documents} and the store has {len(store)} documents: none is left to "
            "train on",
        )
        self.train = store.part(0, cut) if data.dev_documents else store
        self.held_out = store.part(cut, len(store)) if data.dev_documents else None
        if data.dev is not None:
            self.held_out = TokenStore.open(data.dev)
            mend = f"make it anew with `albert-fast corpus --vocab {vocab}`"
            _check_vocabulary(f"data.dev is {data.dev!r}", self.held_out, self.tokenizer, mend)


def _check_vocabulary(given: str, store: TokenStore, tokenizer: AlbertTokenizer, mend: str) -> None:
    """Another vocabulary of as many pieces fits the ids, too, but they are other words."""
    request = store.meta.get("request", {})
    now = fingerprint(tokenizer)
    different = [key for key in now if key in request and request[key] != now[key]]
    check(
        not different,
        f"{given}, which was made with another vocabulary than the run's ({', '.join(different)} differs): {mend}",
    )


class Feed:
    """The rows of each step, in order, in micro-batches of one rank.

    The position is kept in rows of all ranks together, so that another number of ranks goes on with the same rows.

    Attributes:
        stage: number of the length stage; a new one begins with a new epoch.
        epoch, row: the next step begins with this row.
        tokens: given out so far, on all ranks.
        examples, held_out: of the stage's length, to train on and to evaluate on (None: nothing is held out).
    """

    def __init__(self, corpus: Corpus, config: PretrainConfig, *, rank: int = 0, ranks: int = 1) -> None:
        self.corpus, self.config, self.rank, self.ranks = corpus, config, rank, ranks
        self.lengths: LengthStages = config.stages
        self.epoch = self.row = self.tokens = 0
        for stage in reversed(range(len(self.lengths.stages))):  # what a later one lacks shows now
            self._enter(stage)
            self._check_rows(config.batch.size)
        self._rest: Iterator[Batch] | None = None  # of the epoch, from `row` on
        self._micro = 0  # rows of the micro-batches in it, of all ranks

    @property
    def length(self) -> int:
        return self.lengths.stages[self.stage][1]

    def take(self, progress: float, rows: int, micro: int) -> list[Batch]:
        """The next `rows` rows, this rank's, in micro-batches of `micro` rows. `done` or `give_back` has to
        follow.

        Raises:
            ValueError: an epoch has fewer.
        """
        stage = self.lengths.index(progress)
        if stage != self.stage:
            self._next_epoch()
            self._enter(stage)
        if self.row + rows > self.examples.size(self.epoch):
            self._next_epoch()
            self._check_rows(rows)
        if self._rest is None or self._micro != micro * self.ranks:
            self._micro = micro * self.ranks
            batches = Batches(self.examples, self.epoch, self._micro, rank=self.rank, ranks=self.ranks, first=self.row)
            self._rest = iter(batches.loader(workers=self.config.data.workers))
        return list(itertools.islice(self._rest, rows // self._micro))

    def done(self, rows: int, tokens: int) -> None:
        """The rows that were taken are trained on; they had so many tokens on all ranks."""
        self.row += rows
        self.tokens += tokens

    def give_back(self) -> None:
        """What was taken was not trained on: it comes again."""
        self._rest = None

    def state_dict(self) -> dict[str, int]:
        return {"stage": self.stage, "epoch": self.epoch, "row": self.row, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        stage, self.epoch, self.row, self.tokens = (state[key] for key in ("stage", "epoch", "row", "tokens"))
        check(
            stage < len(self.lengths.stages),
            f"batch.stages has {len(self.lengths.stages)} stages and the run is in number {stage + 1}: only later ones "
            "can be changed",
        )
        self._enter(stage)
        self._rest = None

    def _next_epoch(self) -> None:
        self.epoch, self.row, self._rest = self.epoch + 1, 0, None

    def _enter(self, stage: int) -> None:
        self.stage = stage
        corpus, data = self.corpus, self.config.data
        self.examples = self._examples(f"data.train is {data.train!r}", corpus.train, self.config.seed, self.epoch)
        self.held_out = None
        if corpus.held_out is not None:
            cut = f"data.dev_documents is {data.dev_documents}, hold out more"
            given = cut if data.dev is None else f"data.dev is {data.dev!r}"
            self.held_out = self._examples(given, corpus.held_out, HELD_OUT_SEED, 0)

    def _check_rows(self, rows: int) -> None:
        size = self.examples.size(self.epoch)
        check(size >= rows, f"batch.size is {rows} and an epoch has {size} examples: lower it, or give more text")

    def _examples(self, given: str, store: TokenStore, seed: int, epoch: int) -> Examples:
        options, corpus = self.config.examples_of(self.length), self.corpus
        try:
            examples = Examples(store, corpus.vocabulary, options, seed=seed, glossary=corpus.glossary)
            examples.size(epoch)  # raises where there is none
        except ValueError as error:
            raise ValueError(f"{given}: {error}") from None
        return examples
