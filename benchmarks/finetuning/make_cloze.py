"""Questions without a person: `python make_cloze.py TEXT… -o OUT.json [--paragraphs 5000] [--seed 1]`.

Some words of a sentence are the answer. The question is what is left of the others when most of them are dropped,
behind an interrogative for answers of its kind, with words from anywhere in the paragraph between: as in questions by
people, not every word that stands there tells the place (span selection: Glass et al. 2020, arXiv 1909.04120; questions
by cloze: Lewis et al. 2019, arXiv 1906.04980). From these a model that has read little learns to look for a question's
words in a paragraph, before it sees the few questions that people wrote.

TEXT is SQuAD's JSON, whose paragraphs alone are read, or text, a paragraph a line. OUT is SQuAD's JSON, of which
make_choices.py makes choices, too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from albert_fast.finetuning.reading import read_lines
from albert_fast.pretraining.sentences import split

WORDS = (60, 250)  # of a paragraph
SENTENCES, MOST_QUESTIONS = 3, 5
KEPT = (0.1, 0.35)  # share of the other words
MOST_STRAY = 8  # words of anywhere in the paragraph
_NUMBER = re.compile(r"\d[\d,.]*\d|\d")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'-]+(?: (?:of |the |de )?[A-Z][\w'-]+)*")
_PHRASE = re.compile(r"\b[a-z]{5,}(?: [a-z]+){0,2} [a-z]{4,}\b|\b[a-z]{7,}\b")
_YEAR = re.compile(r"1\d\d\d|20\d\d")


def paragraphs(path: Path) -> Iterator[str]:
    if path.suffix == ".json":
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            yield from (paragraph["context"] for paragraph in article["paragraphs"])
        return
    for _, line in read_lines(path):
        # Text that was taken apart at its punctuation, such as wikitext's, is joined again.
        text = re.sub(r" @(.)@ ", r"\1", line.strip())
        text = re.sub(r"\( ", "(", re.sub(r" ([.,;:!?)]|'s)", r"\1", text))
        yield text


def cloze(sentence: str, context: str, draw: random.Random) -> tuple[str, int, str] | None:
    """The answer, where it begins in the sentence, and the question."""
    kinds = [list(kind.finditer(sentence)) for kind in (_NUMBER, _NAME, _PHRASE)]
    weights = [weight * bool(kind) for weight, kind in zip((3, 4, 3), kinds, strict=True)]
    if not any(weights):
        return None
    number = draw.choices(range(3), weights)[0]
    answer = draw.choice(kinds[number])
    asked = [
        ["when", "what year"] if _YEAR.fullmatch(answer[0]) else ["how many", "how much"],
        ["who", "what", "where", "which"],
        ["what", "what", "how"],
    ][number]
    words_of = lambda text: [word for word in re.findall(r"[\w'-]+", text) if word != "unk"]  # noqa: E731
    share = draw.uniform(*KEPT)
    words = words_of(sentence[: answer.start()] + " " + sentence[answer.end() :])
    kept = [word for word in words if draw.random() < share]
    for word in draw.choices(words_of(context), k=draw.randint(0, MOST_STRAY)):
        kept.insert(draw.randint(0, len(kept)), word)
    return (answer[0], answer.start(), f"{draw.choice(asked)} {' '.join(kept)}?") if len(kept) >= 3 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--paragraphs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    found: list[dict[str, Any]] = []
    for context in (context for path in args.texts for context in paragraphs(path)):
        sentences = split(context)
        if not WORDS[0] <= len(context.split()) <= WORDS[1] or len(sentences) < SENTENCES:
            continue
        questions: list[dict[str, Any]] = []
        for sentence in draw.sample(sentences, min(MOST_QUESTIONS, len(sentences))):
            place, made = context.find(sentence), cloze(sentence, context, draw)
            if made is not None and place >= 0:
                answer = {"text": made[0], "answer_start": place + made[1]}
                questions.append({"id": f"{len(found)}-{len(questions)}", "question": made[2], "answers": [answer]})
        if questions:
            found.append({"context": context, "qas": questions})
    found = draw.sample(found, min(len(found), args.paragraphs))
    args.output.write_text(json.dumps({"data": [{"title": "cloze", "paragraphs": found}]}) + "\n", encoding="utf-8")
    print(f"{len(found)} paragraphs, {sum(len(each['qas']) for each in found)} questions")


if __name__ == "__main__":
    main()
