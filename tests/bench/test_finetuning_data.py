"""The scripts that make data of data: what they write can be trained on, and is what they say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from albert_fast.finetuning.answering import normalize

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "finetuning"
CONTEXT = (
    "The old harbour of Aberdale was built by Thomas Ellis in 1843. Fishermen landed 120 barrels of herring on a good "
    "day. The railway reached the village forty years later, and with it visitors from Edinburgh. Nobody remembers "
    "the name of the engineer who planned the viaduct. A lighthouse was on the northern cliff till the storm of 1911. "
    "Its lamp is kept in the museum of Saint Andrews beside 12 letters of the keeper."
)
ANSWERS = ["Thomas Ellis", "120 barrels", "Edinburgh", "northern cliff", "1911"]


def entry(number: int, answer: str, *, plausible: bool = False) -> dict:
    spans = [{"text": answer, "answer_start": CONTEXT.index(answer)}]
    kind = {"answers": [], "plausible_answers": spans} if plausible else {"answers": spans}
    return {"id": str(number), "question": f"which is {number}", "is_impossible": plausible, **kind}


@pytest.fixture
def squad(tmp_path) -> Path:
    """Two titles; in each five questions, and one without an answer."""
    qas = [*(entry(i, answer) for i, answer in enumerate(ANSWERS)), entry(5, "the museum", plausible=True)]
    data = [{"title": title, "paragraphs": [{"context": CONTEXT, "qas": qas}]} for title in ("one", "other")]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": data}))
    return path


@pytest.fixture
def script(monkeypatch):
    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    return run


def questions(path: Path) -> list[tuple[str, dict]]:
    articles = json.loads(path.read_text())["data"]
    return [(p["context"], qa) for article in articles for p in article["paragraphs"] for qa in p["qas"]]


@pytest.mark.parametrize(("option", "left"), [((), [5, 1]), (("--answerable",), [5, 0]), (("--plausible",), [6, 0])])
def test_split(option, left, squad, script, tmp_path):
    rest, only = tmp_path / "rest.json", tmp_path / "only.json"
    script("split_titles.py", squad, "other", "--without", rest, "--only", only, *option)
    found = [bool(qa["answers"]) for _, qa in questions(rest)]
    assert [found.count(True), found.count(False)] == left
    assert len(questions(only)) == 6
    for context, qa in questions(rest):
        assert qa["is_impossible"] == (not qa["answers"])
        for answer in qa["answers"]:
            assert context[answer["answer_start"] :].startswith(answer["text"])


@pytest.mark.parametrize(("option", "count"), [((), 10), (("--plausible",), 12), (("--copies", 3), 30)])
def test_choices(option, count, squad, script, tmp_path, capsys):
    out = tmp_path / "choices.jsonl"
    script("make_choices.py", squad, out, *option)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(found) == count
    assert capsys.readouterr().out.startswith(f"{count} questions of 4 choices")
    for each in found:
        assert len(set(map(normalize, each["choices"]))) == 4
        right = {**dict(enumerate(ANSWERS)), 5: "the museum"}[int(each["question"].split()[-1])]
        assert each["choices"][each["label"]] == right


def test_cloze(squad, script, tmp_path, seed):
    """From SQuAD's paragraphs and from a text: the answer stands where it says, the interrogative fits."""
    text = tmp_path / "text.txt"
    text.write_text(f" = Heading = \n\n{CONTEXT}\nToo short. To be. Read.\n")
    out = tmp_path / "cloze.json"
    script("make_cloze.py", squad, text, "-o", out, "--seed", seed)
    made = questions(out)
    assert {context for context, _ in made} == {CONTEXT}
    assert 3 <= len(made) <= 3 * 5
    for context, qa in made:
        (answer,) = qa["answers"]
        assert context[answer["answer_start"] :].startswith(answer["text"])
        assert qa["question"].endswith("?")
        if answer["text"] in ("1843", "1911"):
            assert qa["question"].startswith(("when ", "what year "))
    assert len({qa["id"] for _, qa in made}) == len(made)
    script("make_cloze.py", squad, text, "-o", out, "--seed", seed, "--paragraphs", 1)
    assert len(json.loads(out.read_text())["data"][0]["paragraphs"]) == 1
