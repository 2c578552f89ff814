"""Texts -> a sentencepiece vocabulary with ALBERT's options."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from albert_fast.pretraining.encoding import sentences_of
from albert_fast.pretraining.progress import Progress
from albert_fast.pretraining.reading import CorpusError, Options, Reader, Source
from albert_fast.pretraining.sentences import LONGEST
from albert_fast.tokenizer import AlbertTokenizer, train_vocabulary
from albert_fast.vocabulary import TokenizerError

FEWEST_SAMPLED = 101  # sentencepiece takes no less


def train(
    texts: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    options: Options | None = None,
    *,
    size: int = 30000,
    sampled: int = 10_000_000,
    cased: bool = False,
    keep_accents: bool = False,
    progress: Progress | None = None,
) -> AlbertTokenizer:
    """Trains a vocabulary on sentences of texts; the same texts give the same one.

    Args:
        size: pieces, the five special ones included.
        sampled: sentences, drawn from all, that the trainer holds in memory; a few hundred bytes each.
        cased: keep capitals.
        keep_accents: keep accents and compatibility characters.

    Raises:
        CorpusError: a text is damaged, the directory is not empty, or `sampled` is less than 101.
        TokenizerError: there is too little text, or `size` is too small for its characters.
    """
    if sampled < FEWEST_SAMPLED:
        raise CorpusError(f"--sentences-sampled is {sampled}; at least {FEWEST_SAMPLED} was expected")
    options, progress = options or Options(), progress or Progress(quiet=True)
    sources = [Source.of(text) for text in texts]
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CorpusError(f"-o is {directory}, which is there already: give a new or an empty directory")
    failure: CorpusError | None = None

    def sentences() -> Iterator[str]:
        nonlocal failure
        before = 0
        try:
            for source in sources:
                reader = Reader(source, options)
                for part in reader.parts():
                    yield from itertools.chain.from_iterable(sentences_of(part, options.sentences))
                    progress.update(before + part.read, 0)
                if reader.first_skipped:
                    progress.say(f"bad lines passed over: {reader.skipped}, the first is {reader.first_skipped}")
                before += source.size
        except CorpusError as error:
            failure = error  # sentencepiece makes another error of it
            raise
        progress.say("all is read, training")

    sentencepiece.set_random_generator_seed(0)
    try:
        with progress:
            progress.begin(sum(source.size for source in sources), 0, 0)
            return train_vocabulary(
                sentences(),
                directory,
                vocab_size=size,
                do_lower_case=not cased,
                keep_accents=keep_accents,
                input_sentence_size=sampled,
                max_sentence_length=4 * LONGEST,  # in bytes; sentencepiece drops what is longer than 4192
            )
    except TokenizerError as error:
        if failure is not None:
            raise failure from None
        raise TokenizerError(str(error).replace(" vocab_size", " --size")) from error.__cause__
