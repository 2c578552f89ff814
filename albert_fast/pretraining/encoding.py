"""Parts of texts -> sentences -> ids, in several processes.

What becomes a sentence: with "split" what sentences.py says (lines that were wrapped are joined first), with "line" one
a line. Sentences without tokens are dropped where the ids are stored.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import NamedTuple

import numpy as np

from albert_fast.pretraining.reading import GO_ON, CorpusError, Part
from albert_fast.pretraining.sentences import bounded, split, unwrapped, wrap_width
from albert_fast.pretraining.store import token_dtype
from albert_fast.tokenizer import AlbertTokenizer


def sentences_of(part: Part, mode: str) -> list[list[str]]:
    """The sentences of each of a part's documents."""
    if mode == "line":
        return [[piece for line in lines for piece in bounded(line)] for lines in part.documents]
    width = wrap_width([line for lines in part.documents for line in lines]) if part.same_width else None
    result = []
    for lines in part.documents:
        paragraphs = unwrapped(lines, width if part.same_width else wrap_width(lines))
        result.append([sentence for paragraph in paragraphs for sentence in split(paragraph)])
    return result


class Block(NamedTuple):
    """What a part becomes: the arguments of `StoreWriter.extend`."""

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray


class Encoder:
    """Part -> Block."""

    def __init__(self, tokenizer: AlbertTokenizer, sentences: str) -> None:
        self.tokenizer = tokenizer
        self.sentences = sentences
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, part: Part) -> Block:
        documents = sentences_of(part, self.sentences)
        ids = self._ids([sentence for document in documents for sentence in document])
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), self._dtype, int(lengths.sum()))
        ends = np.fromiter(itertools.accumulate(map(len, documents)), np.int64, len(documents))
        return Block(tokens, lengths, ends[:-1])

    def _ids(self, sentences: list[str]) -> list[list[int]]:
        """Ids without special tokens: "[MASK]" in a text is text."""
        tokenizer = self.tokenizer
        if tokenizer.split_digit_comma:
            return [tokenizer._ids(sentence) for sentence in sentences]
        # One thread: there is a process for each core.
        return tokenizer._spm.encode([tokenizer.clean(sentence) for sentence in sentences], num_threads=1)


_encoder: Encoder | None = None  # a worker's


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    parent = multiprocessing.parent_process()

    def watch() -> None:
        # Its queue would not tell that the parent was killed.
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ctrl_c_is_for_the_parent() -> Iterator[None]:
    """A process that starts here never sees Ctrl-C, from its first moment on: the parent ends its workers."""
    # Started now, for starting it would lift the block.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(part: Part) -> Block:
    assert _encoder is not None
    return _encoder(part)


def encoded(parts: Iterator[Part], encoder: Encoder, workers: int) -> Generator[tuple[Part, Block], None, None]:
    """Each part, without its text, and its block, in order. Of more than one worker each is a process of its own.

    Where reading fails, the parts before it come first, and then the error.
    """
    if workers == 1:
        for part in parts:
            yield part._replace(documents=[]), encoder(part)
        return
    failure: CorpusError | None = None
    waiting: deque[tuple[Part, Future[Block]]] = deque()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    try:
        more = True
        while more or waiting:
            while more and len(waiting) < 2 * workers:
                try:
                    part = next(parts)
                except StopIteration:
                    more = False
                except CorpusError as error:
                    failure, more = error, False
                else:
                    with _ctrl_c_is_for_the_parent():
                        future = pool.submit(_work, part)
                    waiting.append((part._replace(documents=[]), future))
            if waiting:
                part, future = waiting.popleft()
                yield part, future.result()
    except BrokenProcessPool:
        raise CorpusError(f"a worker process was killed, for want of memory? With fewer --workers, {GO_ON}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failure is not None:
        raise failure
