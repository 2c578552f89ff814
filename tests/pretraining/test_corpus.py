"""Corpus -> token store: every kind of file, any number of workers, interruptions and bad input."""

import fcntl
import gzip
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from albert_fast import cli
from albert_fast.pretraining import corpus, encoding, progress, reading
from albert_fast.pretraining.corpus import CorpusError, Options, build
from albert_fast.pretraining.store import META, StoreError, StoreWriter, TokenStore
from albert_fast.tokenizer import AlbertTokenizer, train_vocabulary

WORDS = [word for word in pydoc_data.topics.topics["strings"].split() if word.isalpha()]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("vocabulary")
    train_vocabulary([pydoc_data.topics.topics["strings"]] * 3, directory, vocab_size=300)
    return directory


@pytest.fixture(scope="session")
def tokenizer(vocabulary) -> AlbertTokenizer:
    return AlbertTokenizer.from_pretrained(vocabulary)


def random_sentence() -> str:
    words = random.choices(WORDS, k=random.randint(1, 12))
    return " ".join(words).capitalize() + random.choice(".!?")


def random_documents(count: int = 12) -> list[list[str]]:
    return [[random_sentence() for _ in range(random.randint(1, 8))] for _ in range(count)]


def as_plain(documents: list[list[str]]) -> str:
    """The original's input: a sentence a line, a blank line between documents."""
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


def as_jsonl(documents: list[list[str]], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: "\n".join(lines)}) + "\n" for i, lines in enumerate(documents))


def ids(tokenizer: AlbertTokenizer, documents: list[list[str]]) -> list[list[list[int]]]:
    return [[tokenizer.encode(text, add_special_tokens=False) for text in document] for document in documents]


def contents(store: TokenStore) -> list[list[list[int]]]:
    return [[sentence.tolist() for sentence in store[i]] for i in range(len(store))]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def small_parts(monkeypatch, characters: int = 200) -> None:
    monkeypatch.setattr(reading, "PART_CHARACTERS", characters)
    monkeypatch.setattr(corpus, "CHECKPOINT_SECONDS", 0.0)


# ----------------------------------------------------------------------------------------------------- kinds of files


def test_every_kind_of_file(tokenizer, tmp_path):
    documents = random_documents()
    plain, records = as_plain(documents).encode(), as_jsonl(documents).encode()
    (tmp_path / "a.txt").write_bytes(plain)
    (tmp_path / "b.txt").write_bytes(reading.BOM + plain.replace(b"\n", b"\r\n"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(plain[:100]) + gzip.compress(plain[100:]))
    (tmp_path / "d.jsonl").write_bytes(records)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(records.replace(b"\n", b"\n\n")))
    texts = sorted(tmp_path.iterdir())
    for text in texts:
        store = build([text], tokenizer, tmp_path / f"{text.name}.store")
        assert contents(store) == ids(tokenizer, documents), text
    together = build(texts, tokenizer, tmp_path / "all")
    assert contents(together) == 5 * ids(tokenizer, documents)
    assert [source["size"] for source in together.meta["sources"]] == [text.stat().st_size for text in texts]
    assert together.vocab_size == len(tokenizer)
    assert not (tmp_path / "all" / corpus.UNFINISHED).exists()
    copy = AlbertTokenizer.from_pretrained(tmp_path / "all")
    assert copy._model == tokenizer._model


def test_parquet(tokenizer, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = random_documents()
    table = arrow.table({"id": range(len(documents)), "words": ["\n".join(lines) for lines in documents]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    store = build([tmp_path / "a.parquet"], tokenizer, tmp_path / "store", Options(field="words"))
    assert contents(store) == ids(tokenizer, documents)
    with pytest.raises(CorpusError, match=r"a\.parquet has no column 'text' but id, words; .*--field"):
        build([tmp_path / "a.parquet"], tokenizer, tmp_path / "other")
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[4:400] = os.urandom(396)
    (tmp_path / "b.parquet").write_bytes(damaged)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is not enough")
    for name in ("b", "c"):
        with pytest.raises(CorpusError, match=rf"{name}\.parquet, row \d+: .*fetch it anew"):
            build([tmp_path / f"{name}.parquet"], tokenizer, tmp_path / "bad", Options(field="words"), force=True)
    parquet.write_table(arrow.table({"text": ["A word.", None, "Two words."]}), tmp_path / "d.parquet")
    with pytest.raises(CorpusError, match=r"d\.parquet, row 2: 'text' is NoneType"):
        build([tmp_path / "d.parquet"], tokenizer, tmp_path / "none")
    store = build([tmp_path / "d.parquet"], tokenizer, tmp_path / "none", Options(skip_bad_lines=True))
    assert len(store) == 2


def test_parquet_without_pyarrow(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="pip install pyarrow"):
        build([tmp_path / "a.parquet"], tokenizer, tmp_path / "store")


@pytest.mark.parametrize(
    ("documents", "text", "expected"),
    [
        ("blank", "A b.\nC d.\n\n\n \nE f.", [["A b.", "C d."], ["E f."]]),
        ("file", "A b.\nC d.\n\n\n \nE f.", [["A b.", "C d.", "E f."]]),
        ("line", "A b. C d.\n\nE f.\n", [["A b.", "C d."], ["E f."]]),
        ("blank", "A b.\nC d.", [["A b.", "C d."]]),
    ],
)
def test_documents(documents, text, expected, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    store = build([tmp_path / "a.txt"], tokenizer, tmp_path / "store", Options(documents=documents))
    assert contents(store) == ids(tokenizer, expected)


def test_sentences(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Dr. A went. He came.\nHe left")
    split = build([tmp_path / "a.txt"], tokenizer, tmp_path / "split")
    line = build([tmp_path / "a.txt"], tokenizer, tmp_path / "line", Options(sentences="line"))
    assert contents(split) == ids(tokenizer, [["Dr. A went.", "He came.", "He left"]])
    assert contents(line) == ids(tokenizer, [["Dr. A went. He came.", "He left"]])


def test_special_tokens_in_a_text_are_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A [MASK] and [CLS]<pad>[SEP] here.\n")
    store = build([tmp_path / "a.txt"], tokenizer, tmp_path / "store")
    special = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id}
    assert not special & set(store.tokens.tolist())


def test_split_digit_comma(vocabulary, tmp_path):
    tokenizer = AlbertTokenizer.from_pretrained(vocabulary, split_digit_comma=True)
    (tmp_path / "a.txt").write_text("In 2000, it was 1,000, too.")
    store = build([tmp_path / "a.txt"], tokenizer, tmp_path / "store")
    assert contents(store) == ids(tokenizer, [["In 2000, it was 1,000, too."]])


def test_a_file_without_line_ends(tokenizer, tmp_path, monkeypatch):
    """It is cut at blanks, and never within a character."""
    monkeypatch.setattr(reading, "LONGEST_LINE", 64)
    words = ["".join(random.choices("aé日😀", k=random.randint(1, 8))) for _ in range(300)]
    (tmp_path / "a.txt").write_text(" ".join(words), encoding="utf-8")
    (tmp_path / "b.txt").write_text("".join(words), encoding="utf-8")
    for name in ("a.txt", "b.txt"):
        reader = reading.Reader(reading.Source.of(tmp_path / name), Options(documents="line"))
        (part,) = reader.parts()
        (document,) = (lines for lines in part.documents if lines)
        joint = " " if name == "a.txt" else ""
        assert joint.join(line for line in document if line) == joint.join(words)
        assert max(len(line.encode()) for line in document) <= 64 + 32


# --------------------------------------------------------------------------------------------- parts and interruptions


def test_parts_do_not_show(tokenizer, tmp_path, monkeypatch):
    documents = random_documents(60)
    (tmp_path / "a.txt").write_text(as_plain(documents))
    build([tmp_path / "a.txt"], tokenizer, tmp_path / "whole", Options(sentences="line"))
    small_parts(monkeypatch, random.randint(1, 300))
    store = build([tmp_path / "a.txt"], tokenizer, tmp_path / "parts", Options(sentences="line"))
    assert contents(store) == ids(tokenizer, documents)
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_workers_do_not_show(tokenizer, tmp_path, monkeypatch):
    """The bytes are those of one process; what comes before a bad file is kept, too."""
    small_parts(monkeypatch, 2000)
    texts = [tmp_path / f"{n}.txt" for n in range(3)]
    for text in texts:
        text.write_text(as_plain(random_documents(60)))
    build(texts, tokenizer, tmp_path / "one", workers=1)
    good, before = texts[2].read_bytes(), texts[2].stat()
    texts[2].write_bytes(b"\xff\n")
    with pytest.raises(CorpusError, match=r"2\.txt, line 1: .*is kept"):
        build(texts, tokenizer, tmp_path / "two", workers=2)
    assert corpus.State.load(tmp_path / "two").source == 2
    texts[2].write_bytes(good)
    os.utime(texts[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    build(texts, tokenizer, tmp_path / "two", workers=1)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


KILLED = """
import sys, time
from albert_fast.pretraining import corpus, reading
from albert_fast.tokenizer import AlbertTokenizer

reading.PART_CHARACTERS, corpus.CHECKPOINT_SECONDS = 2000, 0.0
extend = corpus.StoreWriter.extend

def slowly(*arguments):
    time.sleep(0.1)
    extend(*arguments)

if __name__ == "__main__":
    corpus.StoreWriter.extend = slowly
    vocabulary, store, *texts = sys.argv[1:]
    corpus.build(texts, AlbertTokenizer.from_pretrained(vocabulary), store, workers=2)
"""


def test_killed_and_called_again(vocabulary, tokenizer, tmp_path, monkeypatch):
    texts = [str(tmp_path / f"{n}.jsonl") for n in range(2)]
    for text in texts:
        Path(text).write_text(as_jsonl(random_documents(300)))
    store, script = tmp_path / "store", tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, vocabulary, store, *texts])
    enough = random.randint(1, 8)
    try:
        wait_for(lambda: (store / corpus.UNFINISHED).exists() and corpus.State.load(store).part >= enough, process)
        children = children_of(process.pid)
        assert len(children) >= 2
        with pytest.raises(CorpusError, match="another process is writing"):
            build(texts, tokenizer, store)
    finally:
        process.kill()
        process.wait()
    # Nobody is left behind.
    wait_for(lambda: not any(alive(child) for child in children))
    with pytest.raises(StoreError, match="was not finished"):
        TokenStore.open(store)
    before = corpus.State.load(store)
    assert before.counts.tokens > 0
    monkeypatch.setattr(reading, "PART_CHARACTERS", 2000)
    build(texts, tokenizer, store, workers=1)
    build(texts, tokenizer, tmp_path / "uninterrupted", workers=1)
    assert files_of(store) == files_of(tmp_path / "uninterrupted")


def wait_for(condition, process=None, seconds=60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("no /proc here")
    return [int(child) for child in path.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def stop_after(monkeypatch, parts: int, error: BaseException) -> None:
    """The store can be written to only so often."""
    small_parts(monkeypatch)
    extend, left = StoreWriter.extend, iter(range(parts))

    def limited(self, *arguments):
        if next(left, None) is None:
            raise error
        extend(self, *arguments)

    monkeypatch.setattr(StoreWriter, "extend", limited)


def test_it_goes_on_from_anywhere(tokenizer, tmp_path, monkeypatch):
    small_parts(monkeypatch)
    texts = []
    for n in range(4):
        texts.append(tmp_path / f"{n}.txt")
        texts[-1].write_text(as_plain(random_documents(n * 4)))
    build(texts, tokenizer, tmp_path / "whole")
    rounds = 0
    for _ in range(100):
        with monkeypatch.context() as patch:
            stop_after(patch, random.randint(1, 4), RuntimeError("stopped"))
            try:
                build(texts, tokenizer, tmp_path / "store")
                break
            except RuntimeError:
                rounds += 1
    assert rounds > 1
    assert files_of(tmp_path / "store") == files_of(tmp_path / "whole")


def test_ctrl_c(vocabulary, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text(as_plain(random_documents(60)))
    command = ["corpus", str(tmp_path / "a.txt"), "--vocab", str(vocabulary), "-o", str(tmp_path / "store")]
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        assert cli.main(command) == 130
        assert "goes on" in capsys.readouterr().err
    small_parts(monkeypatch)
    assert cli.main(command) == 0
    assert "going on after 0 of 1 texts" in capsys.readouterr().err


def test_ctrl_c_while_a_vocabulary_is_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("A word.\n" * 10)
    parts = reading.Reader.parts

    def stopped(self):
        yield from parts(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(reading.Reader, "parts", stopped)
    assert cli.main(["vocab", str(tmp_path / "a.txt"), "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "albert-fast: stopped by Ctrl-C\n"
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_killed(tokenizer, tmp_path, monkeypatch):
    class Broken(ThreadPoolExecutor):
        def __init__(self, *arguments, **options):
            super().__init__(1)

        def submit(self, *arguments):
            raise BrokenProcessPool

    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Broken)
    (tmp_path / "a.txt").write_text("A word.")
    with pytest.raises(CorpusError, match=r"worker process was killed, .* fewer --workers, run the same command again"):
        build([tmp_path / "a.txt"], tokenizer, tmp_path / "store", workers=2)


def test_a_full_disk(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(as_plain(random_documents(60)))
    with monkeypatch.context() as patch:
        stop_after(patch, 3, OSError(28, "No space left on device"))
        with pytest.raises(CorpusError, match=r"disk is full: .* \d+ bytes .* more are needed.* same command again"):
            build([tmp_path / "a.txt"], tokenizer, tmp_path / "store")
    small_parts(monkeypatch)
    assert len(build([tmp_path / "a.txt"], tokenizer, tmp_path / "store")) == 60


def test_another_request_is_refused(tokenizer, vocabulary, tmp_path, monkeypatch):
    a, b, store = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "store"
    for text in (a, b):
        text.write_text(as_plain(random_documents(20)))

    def all_are_refused() -> None:
        with pytest.raises(CorpusError, match=r"documents 'blank', not 'file': .*--force"):
            build([a, b], tokenizer, store, Options(documents="file"))
        with pytest.raises(CorpusError, match=r"2 texts, not 1: "):
            build([a], tokenizer, store)
        with pytest.raises(CorpusError, match=r"a\.txt, not .*b\.txt: "):
            build([b, a], tokenizer, store)
        with pytest.raises(CorpusError, match="do_lower_case True, not False: "):
            build([a, b], AlbertTokenizer.from_pretrained(vocabulary, do_lower_case=False), store)

    with monkeypatch.context() as patch:
        stop_after(patch, 3, RuntimeError("stopped"))
        with pytest.raises(RuntimeError, match="stopped"):
            build([a, b], tokenizer, store)
        all_are_refused()
    finished = build([a, b], tokenizer, store)
    all_are_refused()
    before = files_of(store)
    assert contents(build([a, b], tokenizer, store)) == contents(finished)
    assert files_of(store) == before
    a.write_text("Much shorter.")
    with pytest.raises(CorpusError, match=r"a\.txt when it had \d+ bytes, now it has 13"):
        build([a, b], tokenizer, store)
    assert files_of(store) == before
    again = build([a], tokenizer, store, Options(documents="file"), force=True)
    assert contents(again) == ids(tokenizer, [["Much shorter."]])


def test_changed_texts(tokenizer, tmp_path):
    """Those in the store must be as they were; one that stopped it may be mended, and those after it."""
    texts = [tmp_path / f"{n}.txt" for n in range(3)]
    documents = [random_documents(5) for _ in texts]
    for text, content in zip(texts, documents, strict=True):
        text.write_text(as_plain(content))
    texts[1].write_bytes(as_plain(documents[1]).encode() + b"\xff")
    with pytest.raises(CorpusError, match=r"1\.txt, line \d+"):
        build(texts, tokenizer, tmp_path / "store")
    os.utime(texts[0], (1, 1))
    with pytest.raises(CorpusError, match=r"0\.txt has changed since .*store was begun"):
        build(texts, tokenizer, tmp_path / "store")
    texts[0].unlink()
    with pytest.raises(CorpusError, match=r"0\.txt cannot be read"):
        build(texts, tokenizer, tmp_path / "store")
    texts[0].write_text(as_plain(documents[0]))
    with pytest.raises(CorpusError, match=r"1\.txt, line \d+"):
        build(texts, tokenizer, tmp_path / "store", force=True)
    texts[1].write_text(as_plain(documents[1]))
    texts[2].write_text("Another one.")
    store = build(texts, tokenizer, tmp_path / "store")
    assert contents(store) == ids(tokenizer, [*documents[0], *documents[1], ["Another one."]])


def test_a_text_that_changes_when_all_is_done(tokenizer, tmp_path):
    text, store = tmp_path / "a.txt", tmp_path / "store"
    for name, change in (("Another size.", "it has 13"), ("A word!", "they are others")):
        text.write_text("A word.")
        build([text], tokenizer, store, force=True)
        os.utime(text, (1, 1))  # a copy of it, say
        build([text], tokenizer, store)
        text.write_text(name)
        with pytest.raises(CorpusError, match=f"was made of .*a.txt when it had 7 bytes, now {change}: make it anew"):
            build([text], tokenizer, store)
    meta = json.loads((store / "meta.json").read_text())
    del meta["sources"][0]["mtime_ns"]  # as older ones are
    (store / "meta.json").write_text(json.dumps(meta))
    build([text], tokenizer, store)


def test_a_text_that_changes_while_it_is_read(tokenizer, tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text(as_plain(random_documents()))
    plain = reading.Reader._plain

    def growing(self, stream):
        yield from plain(self, stream)
        with open(text, "a") as file:
            file.write("More.")

    monkeypatch.setattr(reading.Reader, "_plain", growing)
    with pytest.raises(CorpusError, match=r"a\.txt changed while it was read"):
        build([text], tokenizer, tmp_path / "store")


def test_directories_that_hold_something_else(tokenizer, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("A word.")
    with pytest.raises(CorpusError, match=r"holds a\.txt, and no token store"):
        build([text], tokenizer, tmp_path)
    with pytest.raises(CorpusError, match="is a file; a directory was expected"):
        build([text], tokenizer, text)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / corpus.UNFINISHED).write_text("{")
    with pytest.raises(CorpusError, match=r"unfinished\.json is damaged .*--force"):
        build([text], tokenizer, tmp_path / "store")
    handle = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CorpusError, match="another process is writing"):
        build([text], tokenizer, tmp_path / "store", force=True)
    os.close(handle)
    assert len(build([text], tokenizer, tmp_path / "store", force=True)) == 1


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ("a.txt", b"Good.\nB\xe9d.\nGood.\n", r"a\.txt, line 2: byte 1 is not UTF-8"),
    ("a.txt.gz", gzip.compress(b"Good.\n\n\xff\n"), r"a\.txt\.gz, line 3: byte 0 is not UTF-8"),
    ("a.jsonl", b'{"text": "Good."}\n\n{"text": "B\n', r"a\.jsonl, line 3: it is not valid JSON"),
    ("a.jsonl", b'{"text": "Good."}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: byte 10 is not UTF-8"),
    (
        "a.jsonl",
        b'{"text": "Good."}\n{"body": "x"}\n',
        r"a\.jsonl, line 2: it has no field 'text' but fields body; .*--field",
    ),
    ("a.jsonl", b'{"text": "Good."}\n[1]\n', r"a\.jsonl, line 2: it has no field 'text' but list"),
    ("a.jsonl", b'{"text": "Good."}\n{"text": 3}\n', r"a\.jsonl, line 2: 'text' is int 3; text was expected"),
    ("a.jsonl", b'{"text": "Good."}\n{"text": "\\ud800"}\n', r"a\.jsonl, line 2: .*surrogate"),
    ("a.jsonl", b'{"text": "Good."}\n' + b"[" * 100000 + b"\n", r"a\.jsonl, line 2: it is not valid JSON"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_lines(name, content, message, vocabulary, tokenizer, tmp_path, capsys):
    text, store = tmp_path / name, tmp_path / "store"
    text.write_bytes(content)
    command = ["corpus", str(text), "--vocab", str(vocabulary), "-o", str(store)]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(CorpusError, match=message):
        build([text], tokenizer, store)
    assert not (store / META).exists()
    # The same command, but for one option, goes on where it stopped.
    assert cli.main([*command, "--skip-bad-lines"]) == 0
    captured = capsys.readouterr()
    assert "bad lines passed over: 1, the first is" in captured.err
    assert f"{name}, line " in captured.err
    assert "bad lines passed over: 1" in captured.out
    good = content if content[:2] != b"\x1f\x8b" else gzip.decompress(content)
    assert contents(TokenStore.open(store)) == ids(tokenizer, [["Good."] * good.count(b"Good.")])


def test_a_record_that_is_too_long(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_RECORD", 1 << 20)
    text = tmp_path / "a.jsonl"
    text.write_text(as_jsonl([["Good."], ["x" * (3 << 20)], ["Good."]]))
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: it is longer than 1 MiB"):
        build([text], tokenizer, tmp_path / "store")
    store = build([text], tokenizer, tmp_path / "store", Options(skip_bad_lines=True))
    assert contents(store) == ids(tokenizer, [["Good."], ["Good."]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "the gzip data end too early"),
        (lambda data: data[: len(data) // 2] + bytes(50) + data[len(data) // 2 + 50 :], "it cannot be read on"),
        (lambda data: b"not gzip at all", "it cannot be read on"),
    ],
)
def test_damaged_gzip(damage, message, tokenizer, tmp_path):
    text = tmp_path / "a.txt.gz"
    text.write_bytes(damage(gzip.compress(as_plain(random_documents(300)).encode())))
    with pytest.raises(CorpusError, match=rf"a\.txt\.gz, line \d+: {message}"):
        build([text], tokenizer, tmp_path / "store", Options(skip_bad_lines=True))
    assert not (tmp_path / "store" / META).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus", "nowhere.txt", "--vocab", "{v}", "-o", "out"], "nowhere.txt cannot be read"),
        (["corpus", "{d}", "--vocab", "{v}", "-o", "out"], "is a directory: name its files"),
        (["corpus", "a.json", "--vocab", "{v}", "-o", "out"], "name it .jsonl"),
        (["corpus", "a.txt", "--vocab", "nowhere", "-o", "out"], "nowhere is not a directory"),
        (["corpus", "a.txt", "--vocab", "{v}", "-o", "out", "--workers", "0"], "--workers is '0'"),
        (
            ["corpus", "a.txt", "--vocab", "{v}", "-o", "out", "--documents", "page"],
            "--documents is 'page'; blank, file or",
        ),
        (["corpus", "a.txt", "--vocab", "{v}", "-o", "out", "--sentences", "x"], "--sentences is 'x'; split or line"),
        (["vocab", "a.txt", "-o", "out", "--size", "many"], "--size is 'many'"),
        (["vocab", "a.txt", "-o", "out", "--sentences-sampled", "99"], "--sentences-sampled is 99; at least 101"),
        (["vocab", "a.txt", "-o", "{v}"], "is there already"),
        (
            ["vocab", "a.txt", "-o", "out"],
            "30000 pieces can be trained on this text: give more text or a smaller --size",
        ),
        (["vocab", "a.txt", "-o", "out", "--size", "7"], "7 pieces can be trained on this text: give a larger --size"),
        (["vocab", "empty.txt", "-o", "out"], "there is no text to train a vocabulary on: give some"),
        (["vocab", "a.txt", "bad.txt", "-o", "out"], "bad.txt, line 1: byte 0 is not UTF-8"),
    ],
)
def test_mistakes_are_one_line_on_stderr(arguments, message, vocabulary, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("A word.\n" * 10)
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").touch()
    assert cli.main([argument.format(v=vocabulary, d=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.replace("all is read, training\n", "").count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_texts_without_a_sentence(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(CorpusError, match=r"no sentence in .*a\.txt"):
        build([tmp_path / "a.txt"], tokenizer, tmp_path / "store")
    assert not (tmp_path / "store" / META).exists()
    with pytest.raises(CorpusError, match="at least one"):
        build([], tokenizer, tmp_path / "store")


# -------------------------------------------------------------------------------------------------------- the commands


def test_vocab_and_corpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress.Progress, "SECONDS", 0.0)
    text, store = tmp_path / "a.txt.gz", tmp_path / "store"
    text.write_bytes(gzip.compress("\n".join(pydoc_data.topics.topics.values()).encode()))
    for name in ("one", "two"):
        command = ["vocab", str(text), "-o", str(tmp_path / name), "--size", "250", "--cased"]
        command += ["--sentences-sampled", "500"]
        assert cli.main(command) == 0
        assert f"{name}: 250 pieces" in capsys.readouterr().out
    assert (tmp_path / "one" / "spiece.model").read_bytes() == (tmp_path / "two" / "spiece.model").read_bytes()
    tokenizer = AlbertTokenizer.from_pretrained(tmp_path / "one")
    assert not tokenizer.do_lower_case
    assert cli.main(["corpus", str(text), "--vocab", str(tmp_path / "one" / "spiece.model"), "-o", str(store)]) == 0
    captured = capsys.readouterr()
    opened = TokenStore.open(store)
    assert f"{len(opened.tokens)} tokens" in captured.out
    assert "make it anew with --documents file" in captured.out
    assert "100%" in captured.err


@pytest.mark.slow
def test_novels(shared_data, tmp_path):
    """Real text: sentences of a natural length, and the same store of each number of workers."""
    texts = sorted((shared_data / "novels").glob("*.txt.gz"))
    tokenizer = AlbertTokenizer.from_pretrained(shared_data / "albert_vocab")
    options = Options(documents="file")
    start = time.perf_counter()
    store = build(texts, tokenizer, tmp_path / "one", options, workers=1)
    seconds = time.perf_counter() - start
    print(f"{len(store.tokens) / seconds:.0f} tokens/s with one worker")
    assert len(store) == len(texts)
    assert len(store.tokens) > 12e6
    sentences = len(store.sentence_offsets) - 1
    assert 15 < len(store.tokens) / sentences < 40
    build(texts, tokenizer, tmp_path / "two", options, workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
