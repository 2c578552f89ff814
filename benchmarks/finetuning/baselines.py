"""What simple rules get on the fine-tuning data: `python baselines.py DATA`, with DATA as described in NOTES.md.

- sst2: naive Bayes on words and pairs of words.
- ud_ewt: each word's most frequent tag; a word that was not seen is looked up in lower case, then it is a noun.
- wnut17: the entities of the training file whatever their case, the longest first.
- squad: a window of words, the same in each paragraph: the best on the training questions, and the best of all on those
  that are judged; and for the rules of SQuAD v2, "no answer" to all questions.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from albert_fast.finetuning.answering import scores_of
from albert_fast.finetuning.reading import read_columns, read_lines

MOST_START, MOST_WORDS = 150, 60  # of the windows that are tried


def sentiment(folder: Path) -> float:
    train, test = ([line.split("\t") for _, line in read_lines(folder / f"{part}.tsv")] for part in ("train", "test"))
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    model = MultinomialNB().fit(counts.fit_transform([text for _, text in train]), [label for label, _ in train])
    return float(model.score(counts.transform([text for _, text in test]), [label for label, _ in test]))


def parts_of_speech(folder: Path) -> float:
    train, test = (list(read_columns(folder / f"en_ewt-ud-{part}.conllu.gz", 1, 3)) for part in ("train", "test"))
    tags: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.labels or (), strict=True):
            tags[word][tag] += 1
            tags[word.lower()][tag] += 1
    noun = Counter({"NOUN": 1})
    right = [
        tag == (tags.get(word) or tags.get(word.lower()) or noun).most_common(1)[0][0]
        for sentence in test
        for word, tag in zip(sentence.words, sentence.labels or (), strict=True)
    ]
    return sum(right) / len(right)


def entities(folder: Path) -> float:
    train = list(read_columns(folder / "wnut17train.conll", 0, -1))
    test = list(read_columns(folder / "emerging.test.annotated", 0, -1))
    known: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sentence in train:
        labels, start = [*(sentence.labels or ()), "O"], None
        for place, label in enumerate(labels):
            if start is not None and not label.startswith("I-"):
                known[tuple(map(str.lower, sentence.words[start:place]))][labels[start][2:]] += 1
                start = None
            if label.startswith("B-"):
                start = place
    longest = max(map(len, known))
    said = []
    for sentence in test:
        words, labels, place = [word.lower() for word in sentence.words], [], 0
        while place < len(words):
            sizes = range(min(longest, len(words) - place), 0, -1)
            size = next((n for n in sizes if tuple(words[place : place + n]) in known), 0)
            if size:
                kind = known[tuple(words[place : place + size])].most_common(1)[0][0]
                labels += [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
            else:
                labels.append("O")
            place += max(size, 1)
        said.append(labels)
    return float(f1_score([s.labels for s in test], said, mode="strict", scheme=IOB2))


def answers(folder: Path) -> dict[str, float]:
    train, dev = (
        [
            (paragraph["context"].split(), [answer["text"] for answer in qa["answers"]])
            for article in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
        for name in ("train-12-titles", "dev-4-titles")
    )

    def f1(questions: list[tuple[list[str], list[str]]], start: int, size: int) -> float:
        found = [scores_of(" ".join(words[start : start + size]), right)[1] for words, right in questions if right]
        return sum(found) / len(found)

    def best(questions: list[tuple[list[str], list[str]]]) -> tuple[int, int]:
        """First in steps, then around the best."""
        coarse = [(a, n) for a in range(0, MOST_START, 6) for n in range(2, MOST_WORDS, 6)]
        start, size = max(coarse, key=lambda window: f1(questions, *window))
        fine = [(a, n) for a in range(max(0, start - 4), start + 5, 2) for n in range(max(1, size - 4), size + 5, 2)]
        return max(fine, key=lambda window: f1(questions, *window))

    # The bar is the best window of all, chosen on the questions that are judged.
    of_train, of_all = best(train), best(dev)
    none = sum(not right for _, right in dev) / len(dev)
    return {"window_of_train": f1(dev, *of_train), "best_window": f1(dev, *of_all), "always_no_answer": none}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    folder = parser.parse_args().data
    found = {
        "sst2": sentiment(folder / "sst2"),
        "ud_ewt": parts_of_speech(folder / "ud_ewt"),
        "wnut17": entities(folder / "wnut17"),
        "squad": answers(folder / "squad"),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
