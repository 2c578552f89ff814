"""The README says what committed results say: its marks, and that no measured figure stands outside of them."""

import json
import random
import re
import subprocess
from pathlib import Path

import pytest

from albert_fast.bench import readme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = json.loads((ROOT / readme.RESULTS / "2026-11-25-cpu-default.json").read_text())

# Every number of the README that no mark writes is in one of these phrases, by the reason why no result has it.
NOT_MEASURED = {
    "a version, or a name": (
        "Python 3.10",
        "transformers 4.57 or 5 (tried with 4.57.6 and 5.23)",
        "transformers 5 gives",
        "transformers 4 divides",
        "In transformers 4 the heads",
        "issue 47688",
        "TensorFlow 1 files",
        "torch 2.10 up",
        "Triton 3.9 and 3.6",
        "compute capability 8.0",
        "x86-64",
    ),
    "a goal": (
        "(goal 1.15)",
        "(goal 1.2)",
        "(goal 1.45)",
        "The goals (1.4 times as fast, 1.3 times the floor)",
        "What was asked for was .824 in SST-2 and .882 in part of speech",
        "| 370 / - |",
    ),
    "a limit that holds on two free cores, of which a test asserts the second": (
        "on real English; under 3 minutes",
        "compiled on first use (under 30 s of two free cores",
    ),
    "a tolerance that a test asserts": (
        "equal to timm's to 1e-12",
        "two processes equal one to 1e-10 in float64",
    ),
    "a size: of a model, a batch, a text": (
        "15 % labels",
        "12 heads of 64",
        "32 rows of 512",
        "8 rows of 2048",
        "batches of 4096 rows of 512",
        "[10 tokens, hidden]",
        "the floor at 16 tokens",
        "the speed at 512",
        "4 passes of a layer of 256, 4.9 million weights",
        "4 passes of base's layer",
        "72 English novels of 1840 to 1930",
        "on 8 other novels",
        "rows of which 40 % is real",
        "a step of 80 rows, 40 % real",
        "16384 tokens unless it says otherwise",
        "2458 labelled of 16384",
        "the same, 16384 labelled",
        "encoder of 16 tokens in one kernel, 12 passes",
        "of 128 tokens |",
        "one text of 16 tokens as a graph",
        "one text of 128 tokens",
        "with ALBERT-base of up to 16 tokens",
        "); of 8 tokens",
        "of 128 tokens, by Triton",
        "as the encoder of 16 tokens",
        "the encoder of 16 tokens takes",
        "up to 128 tokens (in up to 16,",
        "products of their own for up to 256 tokens",
        "3 seeds",
        "11 titles, tested on 4 others",
        "choice of 4",
        "2 to 5 digits",
    ),
    "a setting": (
        "keeps to cuBLAS's, 1 takes them",
        "more than 12 % above",
        "the preset's are 3000",
        "at a confidence of 0.8",
        "at a confidence of 0.6",
    ),
    "the peak that the GPU's maker states": ("of 989 TFLOP/s",),
}

_FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`(?:[^`\n]|\n(?!\n))*`")
_IN_CODE = re.compile(r"(?:^|\s)#.*|[\d.,]+ ?(?:[mµun]?s|minutes|[kMGT]i?B|[GT]FLOP/s|%|times|x)(?!\w)", re.MULTILINE)
# No numbers: dates, shapes such as 8 x 128, Zen 3, and what is in a word's midst (int8, SST-2, sm_80).
_NUMBER = re.compile(
    r"\d{4}-\d\d-\d\d|(?<![\w.])\d+ ?x ?\d+\b|Zen \d\b|(?<![\w.])(?<![A-Za-z]-)(\.?\d+(?:[.,]\d+)*(?:e-?\d+)?)"
)


def words_by_hand(text: str) -> str:
    """What a person wrote, as Markdown shows it; of code the comments, and numbers with units."""
    text = readme.written_by_hand(text)
    for code in (_FENCED, _CODE):
        text = code.sub(lambda match: "\n".join(_IN_CODE.findall(match.group())), text)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # links' targets
    text = re.sub(r"^[ #]*\d+\. ", "", text, flags=re.MULTILINE)  # lists' numbers
    return " ".join(text.split())


def numbers_by_hand(text: str, allowed: list[str]) -> list[tuple[str, str]]:
    """The numbers that are neither written by a mark nor in an allowed phrase, with a few words around them."""
    words = words_by_hand(text)
    spans = [match.span() for phrase in allowed for match in re.finditer(re.escape(phrase), words)]
    return [
        (match[1], words[max(0, match.start() - 30) : match.end() + 30])
        for match in _NUMBER.finditer(words)
        if match[1] and not any(start <= match.start() and match.end() <= end for start, end in spans)
    ]


# ---------------------------------------------------------------------------------------------------------- this README


def test_the_readme_is_what_the_results_give(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out + "`make readme` writes it anew"


def test_no_measured_figure_is_written_by_hand():
    phrases = [phrase for group in NOT_MEASURED.values() for phrase in group]
    found = numbers_by_hand(README, phrases)
    assert not found, (
        "figures that were measured belong into a mark that names their result (albert_fast/bench/readme.py), other "
        f"numbers into NOT_MEASURED with their reason: {found}"
    )
    words = words_by_hand(README)
    assert [phrase for phrase in phrases if phrase not in words] == [], "phrases that the README no longer has"


def test_the_results_are_committed():
    marks = "".join(re.findall(r"<!-- (?:results|works):.*?-->", README, re.DOTALL))
    named = set(re.findall(r"[\w./-]+\.jsonl?(?=[#\s])", marks))
    assert len(named) > 10
    try:
        command = ["git", "ls-files", readme.RESULTS]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    assert {f"{readme.RESULTS}/{name}" for name in named} <= set(listed.stdout.split())


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It takes 54 ms, 1.23 times what 2,345 tokens take.", ["54", "1.23", "2,345"]),
        ("accuracy .809, F1 .151, 39.5 BLEU, 23.4 %", [".809", ".151", "39.5", "23.4"]),
        ("1.7x as fast; 250-320 GFLOP/s; error 1e-3", ["1.7", "250", "320", "1e-3"]),
        ("<!-- = {a.b:.2f} -->3.14<!-- end --> of 7", ["7"]),
        ("<!-- =\n| wanted 5 | {a.b} |\n-->\n\n| wanted 5 | 3 |\n\n<!-- end -->", ["5"]),
        ("<!-- works: Two, 8 ms\n4 passes: x.json\n| 6 ms | {a.b / 1e9:.2f} |\n-->\n9\n<!-- end -->", ["8", "4", "6"]),
        ("int8 on SST-2, sm_80 and H200, 8 x 128 and 8x128, 2026-11-26, `-n 7`, [see](a/5.json)", []),
        ("1. first\n2. second\n\n```\nrun --size 3  # in 4 s\n# 1. and 5\n0.8 GB, 9x\n```\n", ["4", "5", "0.8", "9"]),
        ("an odd ` does not hide the 5\n\nof the next ` paragraph, nor code the `7.5 ms`", ["5", "7.5"]),
        ("a mark that does not end: <!-- = {a} -->12 ms", ["12"]),
    ],
)
def test_what_counts_as_a_number(text, numbers):
    assert [number for number, _ in numbers_by_hand(text, [])] == numbers


def test_a_phrase_allows_its_own_numbers_alone():
    text = "a goal of 8 ms, reached in 8 ms"
    assert numbers_by_hand(text, ["a goal of 8 ms"]) == [("8", text)]
    assert numbers_by_hand(text, [text]) == []


# ---------------------------------------------------------------------------------------------------------------- marks


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path


def write(results: Path, name: str, value: object) -> None:
    (results / name).write_text(json.dumps(value))


def test_figures(results):
    a, b = random.uniform(1, 9), random.uniform(1, 9)
    cases = [{"name": "small", "rows": [{"peer": "ours, 8x", "ms": a}, {"peer": "theirs", "ms": b}]}]
    write(results, "a.json", {"cases": cases, "gpu": "H200", "mean": {"mfu": a / 10}})
    (results / "log.jsonl").write_text(f'{{"step": 1, "loss": {a}}}\n{{"step": 20, "loss": {b}}}\n')
    text = (
        "<!-- results:\nall: a.json\nrows: a.json#cases[small].rows\nlog: log.jsonl\n-->\n"
        "It is <!-- = {rows[ours, 8x].ms:.2f} -->7<!-- end --> ms\n"
        "of <!-- = {rows[ours, 8x].ms / rows[theirs].ms:.1f}, {log[step=20].loss:.3f} --><!-- end -->.\n"
        "- a list:\n\n  <!-- =\n  | {all.gpu} | {all.mean.mfu:.1%} | "
        "{rows[theirs].ms / 1e3 + rows[theirs].ms / 1e3:.4f} |\n  -->\n  <!-- end -->\n"
    )
    written = readme.rewritten(text, results)
    assert f"-->{a:.2f}<!-- end --> ms\n" in written
    assert f"-->{a / b:.1f}, {b:.3f}<!-- end -->." in written
    assert f"-->\n\n  | H200 | {a / 10:.1%} | {b / 500:.4f} |\n\n  <!-- end -->\n" in written  # still the list's item
    assert readme.rewritten(written, results) == written


def test_works(results):
    first, second = (json.loads(json.dumps(REPORT)) for _ in range(2))
    for report in (first, second):
        for work in report["works"]:
            for row in work["rows"]:
                row["milliseconds"] = random.uniform(100, 999)
    second["works"] = second["works"][:1]
    second["date"], second["matrix_gflops"]["float32"] = "2031-01-02", 512.4
    write(results, "first.json", first)
    write(results, "second.json", second)

    def table(*lines: str) -> list[str]:
        mark = "\n".join(["<!-- works: Two cores", *lines, "-->", "<!-- end -->"])
        return [line for line in readme.rewritten(mark, results).split("-->")[1].splitlines() if line]

    def shown(work: dict, peer: str) -> float:
        return next(row["milliseconds"] for row in work["rows"] if row["peer"] == peer)

    written = table("second.json", "first.json")
    assert written[0].startswith(f"Two cores: 2031-01-02, {REPORT['date'][:10]}, ")
    assert "328 to 512 GFLOP/s float32" in written[2]
    assert [line.split(" | ")[0] for line in written[5:-2]] == [
        "| float32 inference 2x128",
        "| float32 inference 6x128:ragged, 40% real",
        "| float32 training 2x128, 38 labels",
        "| float32 training 6x128:ragged, 40% real, 46 labels",
    ]
    assert f"| {shown(first['works'][0], 'albert_fast'):,.1f} ms, " in written[5]  # the last one's stands
    assert "[second](benchmarks/results/second.json)" in written[-2]

    ratio = "| gain | {transformers-sdpa.milliseconds / albert_fast.milliseconds:.3f} |"
    absent = "| absent | {onnxruntime.milliseconds:.0f} ms |"
    written = table("B: first.json float32 training 2x", "A: second.json", ratio, absent)
    work = first["works"][2]
    assert written[3] == "| work | floor | gain | absent |"
    gain = shown(work, "transformers-sdpa") / shown(work, "albert_fast")
    assert re.fullmatch(rf"\| B: float32 training 2x128, 38 labels \| .* ms \| {gain:.3f} \| - \|", written[5])
    assert written[6].startswith("| A: float32 inference 2x128 | ")
    assert len(written) == 9

    first["works"][2]["rows"][0].update(passed=False, milliseconds=None)
    write(results, "first.json", first)
    assert " | no figure: wrong | " in table("first.json float32 training 2x", ratio, absent)[5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a <!-- = {x.y} --><!-- end -->", "line 1: 'x.y' has 'x'"),
        ("<!-- results:\nx: none.json\n-->", "no 'none.json' in benchmarks/results"),
        ("<!-- results:\nx: a.json\nx: a.json\n-->", "'x' twice"),
        ("<!-- results:\nx: a.json\n-->\na <!-- = {x.b} --><!-- end -->", "'x.b' has 'b'; one of list, none was"),
        ("<!-- results:\nx: a.json\n-->\na <!-- = {x.list[c]} --><!-- end -->", "[c], which 2 elements are"),
        ("<!-- results:\nx: a.json\n-->\na <!-- = {x.list[d]} --><!-- end -->", "[d], which 0 elements are"),
        ("<!-- results:\nx: a.json\n-->\na <!-- = {x.none:.1f} --><!-- end -->", "line 4: "),
        ("a <!-- = {5:.1f} --><!-- end -->", "'5' has '5'"),
        ("<!-- results:\nx: a.json\n-->\n  - <!-- = {x.list} --><!-- end -->", "line 4 begins its line"),
        ("a <!-- = x -->\nb <!-- = y --><!-- end -->", "line 1 has another mark before its end"),
        ("a <!-- = x -->y", "1 marks begin and 0 end"),
        ("<!-- works: here\na.txt\n--><!-- end -->", "line 1: 'a.txt' is neither a report"),
    ],
)
def test_a_wrong_mark_is_one_line(text, message, tmp_path, capsys):
    results = tmp_path / readme.RESULTS
    results.mkdir(parents=True)
    write(results, "a.json", {"list": [{"name": "c"}, {"run": "c"}], "none": None})
    (tmp_path / "README.md").write_text(text)
    assert readme.main([str(tmp_path / "README.md")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (tmp_path / "README.md").read_text() == text


def test_check_shows_what_differs(tmp_path, capsys):
    results = tmp_path / readme.RESULTS
    results.mkdir(parents=True)
    write(results, "a.json", {"b": 2.718})
    file = tmp_path / "README.md"
    text = "<!-- results:\na: a.json\n-->\nIt is <!-- = {a.b:.1f} -->3.1<!-- end -->.\n"
    file.write_text(text)
    assert readme.main([str(file), "--check"]) == 1
    mark = "It is <!-- = {a.b:.1f} -->"
    assert f"-{mark}3.1<!-- end -->.\n+{mark}2.7<!-- end -->.\n" in capsys.readouterr().out
    assert file.read_text() == text
    assert readme.main([str(file)]) == 0
    assert file.read_text() == text.replace("3.1", "2.7")
    assert readme.main([str(file), "--check"]) == 0
    assert capsys.readouterr().out == ""
