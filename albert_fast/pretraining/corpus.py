"""Texts -> a token store: read in one process, split into sentences and tokenized in several.

The files are read one after the other and cut into parts of about a million characters (reading.py); workers turn a
part into ids (encoding.py), and the parts are appended to the store in their order, so that its bytes do not depend on
the number of workers. Only a few parts are in memory at a time, however large a file or a document is.

Every few seconds everything so far is put on the disk, and then `unfinished.json`, which says how far that is. A run
that was stopped goes on from there when it is called again: texts that were finished are not read again, and must not
have changed; in the one that was being read the parts before that point are passed over, or, where it has changed since
(a bad line was mended), its parts are made anew. Documents without sentences are dropped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from albert_fast.pretraining import reading
from albert_fast.pretraining.encoding import Encoder, encoded
from albert_fast.pretraining.progress import Progress
from albert_fast.pretraining.reading import GO_ON, RECORDS, CorpusError, Options, Part, Reader, Source, kind_of
from albert_fast.pretraining.store import FILES, META, Counts, StoreWriter, TokenStore, read_meta, write_json
from albert_fast.tokenizer import AlbertTokenizer

UNFINISHED = "unfinished.json"
CHECKPOINT_SECONDS = 5.0
BYTES_A_WORKER = 8 << 20  # of text files, below which starting another process takes longer than it saves
FEW_SENTENCES = 8  # of a document, on average


@dataclass
class State:
    """What `unfinished.json` holds: what is made of what, and how far that is.

    Attributes:
        request: options and vocabulary, which a rerun must not change.
        sources: all texts, in order.
        source, part: the first of them, and the first of its parts, that is not in the store.
        counts: how much is in the store.
        begun: how much was in it where `source` begins.
        found: entries for meta.json of the sources before that.
        part_characters: what parts were counted in.
    """

    request: dict[str, Any]
    sources: list[Source]
    source: int = 0
    part: int = 0
    counts: Counts = field(default_factory=Counts)
    begun: Counts = field(default_factory=Counts)
    found: list[dict[str, Any]] = field(default_factory=list)
    part_characters: int = field(default_factory=lambda: reading.PART_CHARACTERS)

    def save(self, directory: Path) -> None:
        write_json(directory / UNFINISHED, {name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, directory: Path) -> State:
        try:
            content = json.loads((directory / UNFINISHED).read_bytes())
            content["sources"] = [Source(*source) for source in content["sources"]]
            content.update({name: Counts(*content[name]) for name in ("counts", "begun")})
            return cls(**content)
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"{directory / UNFINISHED} is damaged ({error!r}): begin anew with --force") from error

    def taken_up(self, new: State, directory: Path) -> State:
        """Where to go on for the request `new`.

        Raises:
            CorpusError: it is another one, or a text that is in the store already has changed.
        """
        _check_same(self.request, [source.name for source in self.sources], new, directory)
        for old, source in zip(self.sources[: self.source], new.sources, strict=False):
            if old != source:
                raise CorpusError(
                    f"{source.name} has changed since {directory} was begun ({old.size} bytes then, {source.size} now):"
                    " begin anew with --force, or give another -o"
                )
        here = slice(self.source, self.source + 1)
        taken_up = replace(self, sources=new.sources, part_characters=new.part_characters)
        if self.sources[here] != new.sources[here] or self.part_characters != new.part_characters:
            return replace(taken_up, part=0, counts=self.begun)
        return taken_up


def _check_same(request: dict[str, Any], names: list[str], new: State, directory: Path) -> None:
    """Raises CorpusError if what `directory` holds was made by another request."""
    new_names = [source.name for source in new.sources]
    differ = [
        f"{key} {request.get(key)!r}, not {value!r}" for key, value in new.request.items() if request.get(key) != value
    ]
    if names != new_names:
        at = next((pair for pair in zip(names, new_names, strict=False) if pair[0] != pair[1]), None)
        differ.append(f"{at[0]}, not {at[1]}" if at else f"{len(names)} texts, not {len(new_names)}")
    if differ:
        raise CorpusError(f"{directory} was made with {differ[0]}: give another -o, or make it anew with --force")


def fingerprint(tokenizer: AlbertTokenizer) -> dict[str, Any]:
    """What a store's request says of the vocabulary that it was made with."""
    options = {key: getattr(tokenizer, key) for key in ("do_lower_case", "keep_accents", "split_digit_comma")}
    return {"vocab_sha256": hashlib.sha256(tokenizer._model).hexdigest(), **options}


def build(
    texts: Sequence[str | os.PathLike[str]],
    tokenizer: AlbertTokenizer,
    directory: str | os.PathLike[str],
    options: Options | None = None,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> TokenStore:
    """Makes a token store of texts, or goes on with one; a finished one of the same request is opened as it is.

    Args:
        texts: .txt, .jsonl or .parquet files; .gz of the first two.
        tokenizer: its files are saved into the store.
        directory: of the store.
        workers: processes; as many as there are cores and work for when not given.
        force: remove the store that is there.

    Raises:
        CorpusError: a text is damaged, the disk is full, or the directory holds something else.
    """
    options = options or Options()
    sources = [Source.of(text) for text in texts]
    if not sources:
        raise CorpusError("there are no texts: name at least one")
    total = sum(source.size for source in sources)
    workers = workers or min(_cores(), 1 + total // BYTES_A_WORKER)
    request = {k: v for k, v in asdict(options).items() if k != "skip_bad_lines"} | fingerprint(tokenizer)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CorpusError(f"-o is {directory}, which is a file; a directory was expected")
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        state = _state(directory, State(request, sources), force)
        if state is None:
            return TokenStore.open(directory)
        _write(state, tokenizer, directory, options, workers, progress or Progress(quiet=True))
    return TokenStore.open(directory)


def summary(store: TokenStore) -> str:
    """What is in a store, and a hint where its documents are too short to be meant."""
    tokens, sentences, documents = len(store.tokens), len(store.sentence_offsets) - 1, len(store)
    text = f"{store.directory}: {tokens} tokens, {sentences} sentences, {documents} documents"
    skipped = sum(entry["skipped"] for entry in store.meta["sources"])
    text += f"; bad lines passed over: {skipped}" if skipped else ""
    plain = [entry for entry in store.meta["sources"] if kind_of(entry["name"]) not in RECORDS]
    if plain and store.meta["request"]["documents"] == "blank" and sentences < FEW_SENTENCES * documents:
        text += f"\n{sentences / documents:.1f} sentences a document: if blank lines stand between paragraphs, and a "
        text += "file is a document, make it anew with --documents file"
    return text


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory is this process's alone; the lock ends with the process, however that ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CorpusError(f"another process is writing {directory}: wait for it, or give another -o") from None
    except OSError:
        pass  # some network file systems lock no directories
    try:
        yield
    finally:
        os.close(handle)


def _state(directory: Path, new: State, force: bool) -> State | None:
    """Where to begin; None where all is done."""
    finished, unfinished = directory / META, directory / UNFINISHED
    if force:
        # meta.json first: half a store must never look whole.
        for name in (META, UNFINISHED, *FILES):
            (directory / name).unlink(missing_ok=True)
    if finished.exists():
        meta = read_meta(directory)
        found = meta.get("sources", [])
        _check_same(meta.get("request", {}), [entry["name"] for entry in found], new, directory)
        for entry, source in zip(found, new.sources, strict=True):
            now = "" if entry["size"] == source.size else f"it has {source.size}"
            # Of as many bytes as before; older stores do not say when the text was written.
            if not now and entry.get("mtime_ns", source.mtime_ns) != source.mtime_ns:
                now = "" if entry["sha256"] == source.sha256() else "they are others"
            if now:
                raise CorpusError(
                    f"{directory} was made of {source.name} when it had {entry['size']} bytes, now {now}: make it anew "
                    "with --force, or give another -o"
                )
        unfinished.unlink(missing_ok=True)
        return None
    if unfinished.exists():
        return State.load(directory).taken_up(new, directory)
    others = [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
    if others and not force:
        raise CorpusError(f"{directory} holds {others[0]}, and no token store: give a new or an empty directory as -o")
    new.save(directory)
    return new


def _write(
    state: State, tokenizer: AlbertTokenizer, directory: Path, options: Options, workers: int, progress: Progress
) -> None:
    """Reads what is not in the store yet, and finishes it."""

    def parts() -> Iterator[Part]:
        for index in range(state.source, len(state.sources)):
            reader = Reader(state.sources[index], options)
            known = state.part if index == state.source else 0
            yield from (part for part in reader.parts() if part.number >= known)
            if reader.first_skipped:
                progress.say(f"bad lines passed over: {reader.skipped}, the first is {reader.first_skipped}")

    # Read by `parts` at its own pace, while `now` follows what is written.
    now = replace(state, found=list(state.found))
    before = sum(source.size for source in state.sources[: state.source])
    total = sum(source.size for source in state.sources)
    resume = state.counts if state.source or state.part else None
    if resume:
        progress.say(f"going on after {state.source} of {len(state.sources)} texts, {resume.tokens} tokens")
    size, read, saved = 0, before, time.monotonic()
    try:
        with StoreWriter(directory, tokenizer.vocab_size, resume=resume) as writer, progress:
            progress.begin(total, before, writer.counts.tokens)

            def save() -> None:
                now.counts = writer.checkpoint()
                now.save(directory)

            try:
                with closing(encoded(parts(), Encoder(tokenizer, options.sentences), workers)) as blocks:
                    for part, block in blocks:
                        writer.extend(*block)
                        size = writer.size
                        now.part = part.number + 1
                        read = before + part.read
                        if part.found is not None:
                            now.found.append(part.found)
                            before += now.sources[now.source].size
                            now.source, now.part, now.begun = now.source + 1, 0, writer.counts
                        progress.update(read, writer.counts.tokens)
                        if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                            save()
                            saved = time.monotonic()
            except CorpusError as error:
                save()
                raise CorpusError(f"{error}; what was made before that is kept") from error
            if not writer.counts.tokens:
                names = ", ".join(source.name for source in state.sources[:3])
                raise CorpusError(f"there is no sentence in {names}: name texts that have some")
            tokenizer.save_pretrained(directory)
            writer.finish(request=state.request, sources=now.found)
        (directory / UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CorpusError(_full_disk(directory, size, read / max(1, total))) from error


def _full_disk(directory: Path, size: int, share: float) -> str:
    more = f"about {size / share - size:.2g} bytes more are needed" if share > 0.01 else "more is needed"
    return f"the disk is full: {directory} has {size} bytes for {share:.0%} of the texts, {more}; free them and {GO_ON}"
