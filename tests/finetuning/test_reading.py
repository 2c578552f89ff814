"""Files of examples: what they hold, and what is said of those that are damaged."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from albert_fast.finetuning.reading import DataError, read_columns, read_lines, read_table


def table(path: Path, columns=("text", "label")) -> list[dict]:
    return [record.fields for record in read_table(path, columns)]


def test_tables(tmp_path):
    header = tmp_path / "a.tsv"
    header.write_text('text\tlabel\nsay "so"\t1\n\nand\t0\n')
    assert table(header) == [{"text": 'say "so"', "label": "1"}, {"text": "and", "label": "0"}]
    numbered = tmp_path / "b.tsv.gz"
    numbered.write_bytes(gzip.compress(b"1\ta b\n0\tc\r\n"))
    assert table(numbered, ["1", "0"]) == [{"0": "1", "1": "a b"}, {"0": "0", "1": "c"}]
    quoted = tmp_path / "c.csv"
    quoted.write_text('label,text\nx,"two\nlines, ""and"" more"\ny,z\n', encoding="utf-8-sig")
    assert [r.place.line for r in read_table(quoted, ["text", "label"])] == [2, 4]
    assert table(quoted)[0] == {"label": "x", "text": 'two\nlines, "and" more'}
    lines = tmp_path / "d.jsonl"
    lines.write_text(json.dumps({"text": "é", "label": ["a"]}) + "\n\n")
    assert table(lines) == [{"text": "é", "label": ["a"]}]


def test_long_fields(tmp_path):
    """As long as a file, and other readers' limit as it was; a quote that is not closed is still told."""
    path, before, long = tmp_path / "a.csv", csv.field_size_limit(), "word " * 40_000
    path.write_text(f'text,label\n"{long}",1\n')
    assert table(path) == [{"text": long, "label": "1"}]
    path.write_text(f'text,label\na,1\n"{long},1\n')
    with pytest.raises(DataError, match=r"line 3: unexpected end of data: a quote is not closed"):
        table(path)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_ends_of_lines(tmp_path, suffix):
    """A carriage return alone is none."""
    path = tmp_path / f"a.txt{suffix}"
    content = b"one\rand more\r\ntwo\n\r\nthree"
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert [line for _, line in read_lines(path)] == ["one\rand more", "two", "", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"text\tlabel\na\t1\t2\n", "line 2: it has 3 fields; 2 were expected"),
        ("a.tsv", b"sentence\tlabel\na\t1\n", "line 1: the header has 'sentence', 'label' and no 'text'"),
        ("a.tsv", b"text\tlabel\nfine\t1\n\xff\xfe\t0\n", "not UTF-8"),
        ("a.csv", b'text,label\n"open,1\n', "line 2: "),
        ("a.jsonl", b'{"text": 1}\n{"text"\n', "line 2: this is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1: it holds list"),
        ("a.tsv.gz", b"not gzip", "cannot be read"),
        ("a.xlsx", b"", "tsv, .csv or .jsonl was expected"),
    ],
    ids=["fields", "header", "encoding", "quote", "json", "object", "gzip", "kind"],
)
def test_damaged_tables(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        table(path)
    assert str(path) in str(error.value)


def test_a_field_that_is_missing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    (record,) = read_table(path, ["text", "label"])
    with pytest.raises(DataError, match=r"line 1: there is no 'label'; it has 'text'"):
        record.get("label")


def test_columns(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- O\n\n# a comment\n#\tO\nAda\tB-person\n \t\nb\tO\n")
    found = list(read_columns(path, 0, -1))
    assert [(s.words, s.labels, s.place.line) for s in found] == [
        (["#", "Ada"], ["O", "B-person"], 4),
        (["b"], ["O"], 7),
    ]
    assert [s.lines for s in found] == [(4, 5), (7,)]
    assert found[0].place_of(1).line == 5
    assert [s.labels for s in read_columns(path, 0, None)] == [None, None]


@pytest.mark.parametrize("blank", [" ", "\t"], ids=["blank", "tab"])
def test_a_word_that_is_no_comment(tmp_path, blank):
    """It has as many columns as another line, and its label; what has not, is one."""
    path = tmp_path / "a.conll"
    path.write_text(f"# of more columns\n\n#{blank}O\nb{blank}B-x\nc{blank}O\n\n# id=3\n#{blank}B-x\n# {blank}O\n")
    assert [(s.words, s.labels) for s in read_columns(path, 0, -1)] == [
        (["#", "b", "c"], ["O", "B-x", "O"]),
        (["#", "#"], ["B-x", "O"]),
    ]


def test_blanks_behind_a_label(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("Ada\tB-x \nb \t O\n")
    assert [(s.words, s.labels) for s in read_columns(path, 0, -1)] == [(["Ada", "b"], ["B-x", "O"])]


def test_universal_columns(tmp_path):
    """Comments, multiword tokens and empty nodes are left out."""
    path = tmp_path / "a.conllu.gz"
    row = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_\n"
    rows = [("1-2", "don't", "_"), ("1", "do", "AUX"), ("2", "n't", "PART"), ("2.1", "go", "VERB")]
    path.write_bytes(gzip.compress(("# sent_id = 1\n" + "".join(row.format(*r) for r in rows) + "\n").encode()))
    (only,) = read_columns(path, 1, 3)
    assert (only.words, only.labels) == (["do", "n't"], ["AUX", "PART"])


def test_damaged_columns(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("a\tO\nb\n")
    with pytest.raises(DataError, match=r"line 2: it has 1 columns; 2 were expected"):
        list(read_columns(path, 0, -1))
    path.write_text("a\tO\n\nb\n")
    with pytest.raises(DataError, match=r"line 3: it has 1 columns; 2 were expected"):
        list(read_columns(path, 0, -1))
    path.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"line 1: it has 1 columns, so that a word and its label are one"):
        list(read_columns(path, 0, -1))
    assert [s.words for s in read_columns(path, 0, None)] == [["a", "b"]]
    path.write_text("a\tO\nb\tO\n")
    with pytest.raises(DataError, match=r"line 1: it has 2 columns, and the label's is number 5"):
        list(read_columns(path, 0, 5))
