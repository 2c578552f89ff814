"""`albert-fast report`: what is on the page, what is said of two results, and how it looks in a browser."""

import copy
import html.parser
import importlib.util
import json
import random
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from albert_fast import cli
from albert_fast.bench import comparison, page, plots, results
from albert_fast.bench.comparison import DOWN, FEW, NOISE, NOT_JUDGED, UP

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
PEERS = ("albert_fast", "reference", "openvino")
ODD = 'a "peer" of </title> & <script>alert(1)</script> #123456 id="x" $x$ {{ 1 }} \u2603'


def row(peer: str, milliseconds: list[float], **values) -> dict:
    middle = sorted(milliseconds)[len(milliseconds) // 2]
    return {
        "peer": peer,
        "error": 2.5e-7,
        "limit": 1e-4,
        "passed": True,
        "reason": None,
        "milliseconds": middle,
        "all_milliseconds": milliseconds,
        "tokens_per_second": 1024e3 / middle,
        "speedup": 1.5,
        "times_floor": middle / 40,
        "peak_bytes": 480_000_000,
        **values,
    }


def without_figures(peer: str, passed: bool | None, reason: str) -> dict:
    figures = ("milliseconds", "all_milliseconds", "tokens_per_second", "speedup", "times_floor", "peak_bytes")
    return {**row(peer, [1.0], error=None, passed=passed, reason=reason), **dict.fromkeys(figures)}


def work(shape: str, rows: list[dict], **values) -> dict:
    return {
        "mode": "inference",
        "dtype": "float32",
        "shape": shape,
        "tokens": 1024,
        "fill": 1.0,
        "labelled": 154,
        "gflop": 12.0,
        "attention_gflop": 1.0,
        "floor_milliseconds": 40.0,
        "rows": rows,
        **values,
    }


def report(*works: dict) -> dict:
    return {
        "date": "2026-11-25T04:41:16+00:00",
        "commit": "0123456789" * 4,
        "machine": {"processor": "Abacus", "cores": 2, "threads": 2},
        "versions": {"albert_fast": "0.1.0", "torch": "2.13.0"},
        "options": {"shapes": ["8x128"], "repeats": 5, "json": "somewhere.json", "text": []},
        "text": {"source": "a novel", "sha256": "ab"},
        "config": {"num_hidden_layers": 12, "hidden_size": 768, "vocab_size": 30000},
        "matrix_gflops": {"float32": 300.0},
        "backends": {"float32": {"attention": "cpu", "encoder": "cpu"}},
        "works": list(works),
    }


def calls(middle: float, spread: float = 0.02, count: int = 9) -> list[float]:
    return [middle * (1 + spread * (2 * n / (count - 1) - 1)) for n in random.sample(range(count), count)]


@pytest.fixture
def make(tmp_path, capsys):
    """Writes reports, calls the command, and gives the page; where it fails, what it says."""

    def call(*reports: dict, compare: bool = False) -> str:
        files = [tmp_path / f"{chr(ord('a') + n)}.json" for n in range(len(reports))]
        for file, each in zip(files, reports, strict=True):
            file.write_text(json.dumps(each))
        output = tmp_path / "page.html"
        options = ["--compare"] if compare else []
        status = cli.main(["report", *map(str, files), "-o", str(output), *options])
        said = capsys.readouterr()
        if status != 0:
            assert not output.exists()
            return said.err
        assert said.out == f"wrote {output}\n"
        assert not [file for file in tmp_path.iterdir() if file.suffix not in (".json", ".html")], (
            "nothing else is left"
        )
        return output.read_text()

    return call


class Reader(html.parser.HTMLParser):
    """The page as a browser sees it: elements that are open at each text, attributes, and whether all is closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def all(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def table_rows(text: str) -> list[str]:
    """The texts of each <tr>."""
    return [" ".join(re.sub("<[^>]*>", " ", found).split()) for found in re.findall(r"<tr\b.*?</tr>", text, re.DOTALL)]


# ------------------------------------------------------------------------------------------------------------- content


def test_a_page_of_one_result(make):
    wrong = without_figures("reference", False, "wrong: its error is 1.0e-02, and at most 1.0e-04 was expected")
    wrong["error"] = 1e-2
    absent = without_figures("openvino", None, "openvino not installed")
    text = make(report(work("8x128", [row("albert_fast", calls(44.0)), wrong, absent])))
    said = Reader(text).all()
    for fact in (
        "25 November 2026, 04:41 UTC",
        "Abacus, 2 cores, 2 threads",
        "300 GFLOP/s float32",
        "0123456",
        "a novel",
    ):
        assert fact in said
    assert "ALBERT of 12 passes, hidden 768, vocabulary 30000" in said
    assert "albert_fast 0.1.0, torch 2.13.0" in said
    assert "repeats 5" in said
    assert "somewhere.json" not in text
    rows = table_rows(text)
    assert "albert_fast 2.5e-07 44.00 43.1–44.9 23,273 1.10 1.50× 0.48 GB" in rows
    assert "reference 1.0e-02 failed wrong: its error is 1.0e-02, and at most 1.0e-04 was expected" in rows
    assert "openvino – absent openvino not installed" in rows
    assert any(line.startswith("float32 inference 8x128 1,024 tokens, 12.0 GFLOP, floor 40.00 ms") for line in rows)
    assert "<nav" not in text


def test_several_results_have_a_table_of_contents(make):
    text = make(report(work("8x128", [row(peer, calls(44.0)) for peer in PEERS])), report(), report())
    links = {value for tag, name, value in Reader(text).attributes if (tag, name) == ("a", "href")}
    assert links == {"#result-1", "#result-2", "#result-3"}
    assert all(f'id="{link[1:]}"' in text for link in links)


def test_nothing_is_fetched_and_every_identifier_is_there_once(make):
    works = [work(f"1x{length}", [row(peer, calls(length)) for peer in PEERS]) for length in (64, 128, 256)]
    reader = Reader(make(report(*works), report(work("8x128", [row("albert_fast", calls(44.0))]))))
    assert not reader.tags & {"script", "iframe", "img", "object", "embed", "image"}
    names = [value for _, name, value in reader.attributes if name == "id"]
    assert len(names) == len(set(names))
    for tag, name, value in reader.attributes:
        if name in ("href", "src", "xlink:href", "srcset", "action", "data"):
            assert value == "data:," or (value[0] == "#" and value[1:] in names), (tag, name, value)
        for target in re.findall(r"url\((.*?)\)", value or ""):
            assert target[1:] in names
    style = " ".join(text for tag, text in reader.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_pictures_have_the_page_s_colours_and_text(make):
    works = [work(f"1x{length}", [row(peer, calls(length)) for peer in PEERS]) for length in (64, 128, 256)]
    text = make(report(*works))
    pictures = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles == [
        "float32 inference",
        "Milliseconds: float32 inference, 1 row",
        "Peak memory, GB: float32 inference, 1 row",
        "float32",
    ]
    assert len(pictures) == len(titles)
    for picture in pictures:
        assert re.search(r'role="img" aria-label="[^"]*albert_fast', picture)
        assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style", picture)
        drawn = set(re.findall(r"var\((--[\w-]+)\)", picture))
        assert {"--muted", "--peer-0", "--peer-1", "--peer-2"} <= drawn
        assert all(f"{variable}:" in text for variable in drawn)
    assert "reference 3.20" in pictures[0]
    assert "<text" in pictures[0]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_labels_of_a_roofline_have_room(count, monkeypatch):
    """Of works of one size, too, of any size."""
    figures = []
    monkeypatch.setattr(plots, "_svg", lambda figure, _: figures.append(figure) or "")
    for _ in range(20):
        smallest, longest = 10 ** random.uniform(-2, 4), random.choice([1.5, 5, 40, 3000])
        sizes = [smallest * longest ** random.random() for _ in range(count)]
        works = [work(f"{n}x1", [row("albert_fast", calls(50))], gflop=size) for n, size in enumerate(sizes, 1)]
        found = results._build(results.Result, report(*works), "")
        assert list(plots.rooflines(found, plots.looks([found])))
        figure = figures.pop()
        FigureCanvasAgg(figure).draw()
        (axes,) = figure.axes
        low, high = axes.get_xlim()
        labels = [label for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert labels, sizes
        places = sorted((box.x0, box.x1) for box in (label.get_window_extent() for label in labels))
        assert all(left[1] + 4 < right[0] for left, right in pairwise(places)), sizes


def test_names_of_any_kind_stay_text(make):
    short = 'id="x" #123456 $x$ </svg>'
    rows = [row(peer, calls(44.0)) for peer in ("albert_fast", ODD, short)]
    reader = Reader(make(report(work(ODD, rows, mode=ODD))))
    assert ("text", short) in reader.texts, "in a picture, too"
    assert "script" not in reader.tags
    assert ODD in reader.all()
    assert [name for _, name, value in reader.attributes if value == "x" and name == "id"] == []


def test_a_suite_s_works(make):
    def varied(name, value, **values):
        return work(
            "1x64", [row("albert_fast", calls(value))], suite="scaling", group="model", varied={name: value}, **values
        )

    unknown = work("100 lines", [row("albert_fast", calls(0.5), times_floor=None)], dtype="text", gflop=0.0, tokens=0)
    unknown["floor_milliseconds"] = None
    text = make(
        report(*(varied("passes", value) for value in (1, 2, 24)), varied("fill", 0.5), varied("fill", 1.0), unknown)
    )
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles.count("Milliseconds: model float32 inference") == 2
    assert "1x64, passes 24" in text
    assert "100 lines" in text


def test_series_need_works_that_differ_in_one_thing():
    shapes = ("1x64", "1x128", "1x256", "2x64", "4x64", "8x128:ragged")
    parsed = results._build(results.Result, report(*(work(shape, []) for shape in shapes)), "")
    found = {(one.name, one.title): list(one.points) for one in plots.series(parsed.works)}
    assert found == {
        ("length", "float32 inference, 1 row"): [64, 128, 256],
        ("rows", "float32 inference, length 64"): [1, 2, 4],
    }


# Of `albert-fast bench` and `make gpu`; benchmarks/attention.py writes another kind.
REPORTS = [file for file in sorted(RESULTS.glob("*.json")) if json.loads(file.read_text()).keys() & {"works", "stages"}]


def test_there_are_committed_results():
    assert len(REPORTS) > 20


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_committed_results(file, tmp_path):
    page.write([str(file)], str(tmp_path / "page.html"))
    given = json.loads(file.read_text())
    text = Reader((tmp_path / "page.html").read_text()).all()
    cases = given.get("works") or [case for stage in given["stages"].values() for case in stage["cases"]]
    for case in cases:
        assert case.get("name") or f"{case['dtype']} {case['mode']} {case['shape']}" in text
        assert all(row["peer"] in text and (row["reason"] or "") in text for row in case["rows"])


# ---------------------------------------------------------------------------------------------------------- comparison


def test_the_interval_of_a_median():
    """Between order statistics, by the binomial distribution: tables have 2nd to 8th of 9, 6th to 15th of 20."""
    assert comparison.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert comparison.interval([5.0]) == (5.0, 5.0)
    assert comparison.interval(range(1, 6)) == (1, 5)
    assert comparison.interval(range(1, 7)) == (1, 6)
    assert comparison.interval(random.sample(range(1, 10), 9)) == (2, 8)
    assert comparison.interval(random.sample(range(1, 21), 20)) == (6, 15)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (calls(100.0), calls(110.0), UP),
        (calls(100.0), calls(90.0), DOWN),
        (calls(100.0), calls(104.0, 0.001), NOISE),  # apart, and too near
        (calls(100.0, 0.2), calls(110.0, 0.2), NOISE),  # far, and the calls overlap
        (calls(100.0), [*calls(110.0), 300.0], UP),  # one call that was disturbed
        (calls(100.0, count=3), calls(200.0, count=3), FEW),
        (calls(100.0, count=4), calls(200.0, count=4), UP),
    ],
)
def test_verdicts(before, after, verdict):
    found = comparison.change(before, after)
    assert found.verdict == verdict
    assert found.low <= found.ratio <= found.high


def test_the_same_code_seldom_changes():
    """Of 300 comparisons of calls from one distribution."""
    generator = random.Random(0)

    def some():
        return [generator.lognormvariate(0, 0.1) for _ in range(7)]

    assert sum(comparison.change(some(), some()).verdict != NOISE for _ in range(300)) <= 6


def test_a_comparison(make):
    def one(ours, theirs, sdpa):
        return report(work("8x128", [row("albert_fast", ours), row("reference", theirs), sdpa]))

    absent = without_figures("transformers-sdpa", None, "not installed")
    a = one(calls(100.0), calls(200.0), absent)
    b = one(calls(80.0), calls(201.0), row("transformers-sdpa", calls(150.0)))
    b["versions"]["torch"] = "2.14.0"
    b["commit"] = "9" * 40
    a["works"].append(work("1x16", []))
    text = make(a, b, compare=True)
    rows = table_rows(text)
    assert "version torch 2.13.0 2.14.0" in rows
    assert "commit 0123456 9999999" in rows
    changes = rows[rows.index("commit 0123456 9999999") :]
    ours = next(line for line in changes if line.startswith("albert_fast"))
    assert re.fullmatch(r"albert_fast 100\.0 80\.00 0\.800 0\.7\d–0\.8\d ▼ faster – 1\.00", ours)
    reference = next(line for line in changes if line.startswith("reference"))
    assert "200.0 201.0 1.005" in reference
    assert reference.count("within noise") == 1
    assert "▲ higher" in reference
    assert "transformers-sdpa A: absent, not installed" in changes
    assert "float32 inference 1x16 (A)" in text
    assert "Times are not judged" not in text
    again = make(a, a, compare=True)
    assert "Nothing but the time" in again
    assert "faster</b>" not in again


@pytest.mark.parametrize("what", ["machine", "rate"])
def test_other_machines_are_compared_by_ratios_of_one_run(what):
    """The machine is half as fast, and drifts; every peer is as fast as the others as it was."""
    drift = [1.0, 1.3, 0.8, 2.0, 1.1, 0.9, 1.6]
    a = report(
        work("8x128", [row("albert_fast", [100 * d for d in drift]), row("reference", [200 * d for d in drift])])
    )
    b = copy.deepcopy(a)
    b["works"][0]["rows"] = [row("albert_fast", [200 * d for d in drift]), row("reference", [300 * d for d in drift])]
    if what == "machine":
        b["machine"]["processor"] = "Slide rule"
    else:
        b["matrix_gflops"]["float32"] = 150.0
    a, b = (results._build(results.Result, each, "") for each in (a, b))
    found = comparison.compare(a, b)
    assert ("machines differ" if what == "machine" else "300 GFLOP/s in A and 150 in B") in found.obstacle
    ours, reference = found.works[0].lines
    assert (ours.time.verdict, reference.time.verdict) == (NOT_JUDGED, NOT_JUDGED)
    assert ours.speedup is None
    assert reference.speedup.before == pytest.approx(2.0)
    assert reference.speedup.after == pytest.approx(1.5)
    assert reference.speedup.verdict == DOWN


def test_without_albert_fast_another_peer_is_the_yardstick():
    a = report(work("8x128", [row(peer, calls(100.0)) for peer in ("reference", "openvino")]))
    b = report(work("8x128", [row(peer, calls(100.0)) for peer in ("albert_fast", "openvino", "reference")]))
    a, b = (results._build(results.Result, each, "") for each in (a, b))
    (common,) = comparison.compare(a, b).works
    assert common.yardstick == "reference"
    assert [line.peer for line in common.lines if line.speedup] == ["openvino"]
    assert common.lines[-1].note == "A: not asked"


# -------------------------------------------------------------------------------------------------------------- errors


def test_files_that_are_no_reports(tmp_path, make, capsys):
    good, bad, output = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "page.html"
    good.write_text(json.dumps(report(work("8x128", [row("albert_fast", calls(44.0))]))))
    output.write_text("the page that was there")

    def fails(content: bytes) -> str:
        bad.write_bytes(content)
        assert cli.main(["report", str(good), str(bad), "-o", str(output)]) == 2
        assert output.read_text() == "the page that was there"
        assert sorted(tmp_path.iterdir()) == [bad, good, output]
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith(f"albert-fast report: {bad} is no ")
        return said

    assert "no JSON" in fails(b"{")
    assert "no JSON" in fails(b"\xff\xfe")
    assert "all of it is [], not an object" in fails(b"[]")
    assert "it has no date" in fails(b"{}")
    broken = report(work("8x128", [row("albert_fast", calls(44.0))]))
    broken["works"][0]["rows"][0]["milliseconds"] = "fast"
    assert "works[0].rows[0].milliseconds is 'fast', not a number" in fails(json.dumps(broken).encode())
    del broken["works"][0]["rows"][0]["peer"]
    assert "it has no works[0].rows[0].peer" in fails(json.dumps(broken).encode())
    timeless = report(work("8x128", [{**row("albert_fast", [44.0]), "all_milliseconds": [0.0, float("nan")]}]))
    assert "albert_fast's times at float32 inference 8x128 are 44.0, 0.0, nan" in fails(json.dumps(timeless).encode())
    gpu = json.loads((RESULTS / "2026-11-26-h200-loss.json").read_text())
    gpu["stages"]["loss"]["columns"][0]["form"] = "{0.__class__}"
    assert "a form is '{0.__class__}'" in fails(json.dumps(gpu).encode())


def test_other_mistakes(tmp_path, make, capsys, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(report()))
    gpu = str(RESULTS / "2026-11-26-h200-loss.json")
    for arguments, message in (
        ([str(tmp_path / "nowhere.json"), "-o", str(tmp_path / "page.html")], "nowhere.json"),
        ([str(file), "-o", str(tmp_path / "nowhere" / "page.html")], "a file in a directory that exists was expected"),
        ([str(file), "-o", str(tmp_path)], "a file in a directory that exists was expected"),
        ([str(file), "-o", str(file)], "is one of the results"),
        ([str(file), "-o", str(tmp_path / "page.html"), "--compare"], "--compare got 1 results; two were expected"),
        ([str(file), gpu, "-o", str(tmp_path / "page.html"), "--compare"], "a report of `make gpu`"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [file]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert cli.main(["report", str(file), "-o", str(tmp_path / "page.html")]) == 2
    assert "matplotlib not installed: pip install 'albert_fast[report]'" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file, output = tmp_path / "a.json", tmp_path / "page.html"
    file.write_text(json.dumps(report()))
    output.write_text("old")

    def full(self, text, **options):
        with self.open("w") as opened:
            opened.write(text[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["report", str(file), "-o", str(output)]) == 2
    assert output.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [file, output]


# ------------------------------------------------------------------------------------------------------------- browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# The page in frames of three widths, in light and dark; what is too wide, or on top of another text, is in the title.
FRAMES = """<!DOCTYPE html><title>not measured</title><body><script>
const page = PAGE, wrong = [], frames = [];
for (const width of [400, 800, 1400]) for (const scheme of ["light", "dark"]) {
  const frame = document.createElement("iframe");
  Object.assign(frame.style, {width: width + "px", height: "800px", border: "0", colorScheme: scheme});
  frame.srcdoc = page;
  frames.push(new Promise(done => frame.onload = () => {
    const inside = frame.contentDocument, what = `${width} ${scheme}: `;
    const texts = svg => [...svg.querySelectorAll("text")].map(e => [e.textContent, e.getBoundingClientRect()]);
    if (frame.contentWindow.innerWidth !== width) wrong.push(what + "another width");
    if (inside.documentElement.scrollWidth > width) wrong.push(what + "too wide");
    const ink = frame.contentWindow.getComputedStyle(inside.body).color;
    const isDark = frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches;
    if (isDark !== (scheme === "dark")) wrong.push(what + "the scheme is not taken");
    if (ink.match(/\\d+/)[0] > 128 !== isDark) wrong.push(what + "ink is " + ink);
    for (const text of inside.querySelectorAll("svg text")) {
      const fill = frame.contentWindow.getComputedStyle(text).fill;
      if (fill.match(/\\d+/)[0] > 128 !== isDark) wrong.push(what + "text in " + fill);
      if (text.getBoundingClientRect().height < 10) wrong.push(what + "small: " + text.textContent);
    }
    for (const svg of inside.querySelectorAll("svg")) {
      const box = svg.getBoundingClientRect(), all = texts(svg);
      all.forEach(([name, a], i) => {
        if (a.left < box.left - 1 || a.right > box.right + 1 || a.bottom > box.bottom + 1)
          wrong.push(what + "cut: " + name);
        for (const [other, b] of all.slice(i + 1))
          if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
              && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2)
            wrong.push(what + "overlap: " + name + " and " + other);
      });
    }
    if (!inside.querySelectorAll("svg text").length) wrong.push(what + "no text");
    done();
  }));
  document.body.append(frame);
}
Promise.all(frames).then(() => document.title = wrong.length ? [...new Set(wrong)].slice(0, 9).join("; ") : "fine");
</script>"""


def looked_at(text: str, directory: Path) -> str:
    """What a browser finds wrong with a page; "fine" where that is nothing."""
    frames = directory / "frames.html"
    frames.write_text(FRAMES.replace("PAGE", json.dumps(text).replace("</", "<\\/")))
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=10000"
    )
    command = [CHROMIUM, *options.split(), f"--user-data-dir={directory / 'profile'}", "--dump-dom", frames.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return re.search("<title>(.*?)</title>", dom)[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser(make, tmp_path_factory):
    """At 400, 800 and 1400 pixels, in light and dark: nothing is too wide, and no label on top of another or cut."""
    peers = ("albert_fast", "transformers-accelerated", "a peer whose name is longer than a name should be", "openvino")
    failed = without_figures("failed", False, "wrong: " + "its error is large " * 30)
    works = [
        work(f"{rows}x{length}", [*(row(peer, calls(length * rows / 7)) for peer in peers), failed])
        for rows, length in [(1, 64 * 2**n) for n in range(8)] + [(1, 8000), (2, 64), (3, 64), (4, 64), (64, 64)]
    ]
    far = work("8x128:ragged", [row("albert_fast", calls(44.0)), row("slow", calls(400000.0))], mode="training")
    one = report(*works, far)
    one["text"]["source"] = "a_file_with_a_long_name" * 20
    other = copy.deepcopy(one)
    for each in other["works"]:
        each["rows"][0] = row(
            "albert_fast", calls(each["rows"][0]["milliseconds"] * random.choice([0.3, 0.9, 1.0, 4.0]))
        )
    directory = tmp_path_factory.mktemp("browser")
    text = make(one, other, compare=True)
    assert looked_at(text, directory) == "fine"
    bad = make(report(works[0])).replace("</main>", '<div style="width: 90rem">wide</div></main>')
    assert "400 light: too wide" in looked_at(bad, directory)
