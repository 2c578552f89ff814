"""Multiple choice from SQuAD: `python make_choices.py SQUAD.json OUT.jsonl [--seed 1] [--plausible] [--copies 1]`.

For each question with an answer, three other answers of the same paragraph stand beside the right one; questions of
paragraphs that have too few are left out. Prints what chance and word overlap get. For training, --plausible takes the
questions without an answer, too, with what was noted as plausible for them, and --copies draws other answers several
times.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from albert_fast.finetuning.answering import normalize

CHOICES = 4


def questions(articles: list[dict[str, Any]], draw: random.Random, plausible: bool) -> list[dict[str, Any]]:
    found = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            answers_of = [
                (qa, qa["answers"] or (qa.get("plausible_answers", []) if plausible else [])) for qa in paragraph["qas"]
            ]
            texts = {normalize(answers[0]["text"]): answers[0]["text"] for _, answers in answers_of if answers}
            for qa, answers in answers_of:
                right = {normalize(answer["text"]) for answer in answers}
                others = [text for key, text in sorted(texts.items()) if key and key not in right]
                if not answers or len(others) < CHOICES - 1:
                    continue
                choices = [answers[0]["text"], *draw.sample(others, CHOICES - 1)]
                order = draw.sample(range(CHOICES), CHOICES)
                found.append(
                    {
                        "context": paragraph["context"],
                        "question": qa["question"],
                        "choices": [choices[i] for i in order],
                        "label": order.index(0),
                    }
                )
    return found


def overlap_choice(question: dict[str, Any]) -> int:
    """The choice that stands in the sentence that has most words of the question; the first of equals."""
    wanted = set(normalize(question["question"]).split())
    sentences = re.split(r"(?<=[.!?])\s+", question["context"])
    scores = [
        max((len(wanted & set(normalize(s).split())) for s in sentences if choice in s), default=0)
        for choice in question["choices"]
    ]
    return scores.index(max(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("squad", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plausible", action="store_true")
    parser.add_argument("--copies", type=int, default=1)
    args = parser.parse_args()
    articles, draw = json.loads(args.squad.read_text(encoding="utf-8"))["data"], random.Random(args.seed)
    found = [each for _ in range(args.copies) for each in questions(articles, draw, args.plausible)]
    args.output.write_text("".join(json.dumps(question) + "\n" for question in found), encoding="utf-8")
    overlap = sum(overlap_choice(question) == question["label"] for question in found) / len(found)
    print(f"{len(found)} questions of {CHOICES} choices; chance {1 / CHOICES:.3f}, word overlap {overlap:.3f}")


if __name__ == "__main__":
    main()
