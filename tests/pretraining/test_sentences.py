"""The sentence splitter: a table of cases, and what holds for every text."""

import random

import pytest

from albert_fast.pretraining.sentences import LONGEST, bounded, split, unwrapped, wrap_width

# The sentences of each text are what stands between the bars.
CASES = [
    "He came.| She left.",
    "Is it?| It is!| Good.",
    "Wait ... for it.| Now.",
    "He stopped ... | Then he went on.",
    "He stopped…| Then he went on.",
    "One . . . two.| Three",
    "Mr. Holmes met Dr. Watson.| They left.",
    "Prof. Moriarty, Mrs. Hudson and St. John.| Who else?",
    "Fruit, e.g. Apples, i.e. Those.| And pears.",
    "J. R. R. Tolkien wrote it.| He did.",
    "It was I.| He knew.",
    "The U.S. Senate met.| It rose.",
    "He lived in the U.S.| He liked it.",
    "We left at 5 p.m.| The train was late.",
    "Apples, pears, etc.| They were ripe.",
    "Smith & Co. Limited sold it.",
    "It cost 3.14 pounds.| That is 3,000.50 pence.",
    "Version 2.0.1 is out.| Update to 2.0.2 now.",
    "See no. 5 and vol. IV of it.| No.| Why?",
    "See p. 12 and fig. 3.| On Jan. 5 it rained.",
    "In 1914.| 20 years later.",
    "1. The first.| 2. The second.",
    '"Go!" he said.| "I will not."| He went.',
    "“Go!” he said.| “I will not.”| He went.",
    "(He came.)| (She left.)",
    "He came [she left].| So it is.",
    "It is known.[12]| Others doubt it.",
    "Write to a.b@c.de or see www.example.org.| Thanks.",
    "He said: stop. and went.",
    "Yes, no.— Perhaps.",
    "no capitals here.| none at all?| none.",
    "我来了。|你走了！|“是吗？”|他说。",
    "これは本です。|「そうですか。」|はい",
    "Homarus gammarus , a lobster .| It is 60 cm long .",
    "Это дом.| Он старый.",
    "क्या है।| अच्छा।",
    "No stop at all",
    'Ends with a quote. "',
    "",
    "   ",
    "!!!",
]


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    expected = [sentence.strip() for sentence in case.split("|") if sentence.strip()]
    assert split(case.replace("|", "")) == expected


def random_text() -> str:
    words = ["Mr.", "a", "B.", "etc.", "end.", "End.", '"Yes."', "...", "5.", "。", "’", ")", "\t", "é", "no.", "U.S."]
    return " ".join(random.choices(words, k=random.randint(0, 60)))


def test_nothing_is_lost():
    for _ in range(300):
        text = random_text()
        sentences = split(text)
        assert "".join("".join(sentences).split()) == "".join(text.split())
        assert all(sentence and sentence == sentence.strip() for sentence in sentences)


def test_text_without_stops_is_cut_at_a_blank():
    text = " ".join("".join(random.choices("abc", k=random.randint(1, 12))) for _ in range(3000))
    sentences = split(text)
    assert " ".join(sentences) == text
    assert max(map(len, sentences)) <= LONGEST
    assert len(sentences) <= len(text) // (LONGEST - 13) + 1
    assert bounded("x" * (2 * LONGEST + 1)) == ["x" * LONGEST, "x" * LONGEST, "x"]
    assert bounded(" \t ") == []


def wrapped(paragraph: str, width: int) -> list[str]:
    lines = [""]
    for word in paragraph.split():
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def test_wrapped_lines_are_joined():
    words = ["Arthur", "Mary", "went", "to", "London", "yesterday", "I", "believe"]
    # Headings stay alone: they are shorter than a line that was broken.
    paragraphs = [
        "Chapter" if n % 5 == 0 else " ".join(random.choices(words, k=random.randint(40, 90))) for n in range(20)
    ]
    lines = [line for paragraph in paragraphs for line in (*wrapped(paragraph, random.randint(69, 72)), "")]
    width = wrap_width(lines)
    assert width is not None
    assert 65 <= width <= 72
    assert list(unwrapped(lines, width)) == paragraphs


def test_a_blank_line_ends_a_paragraph_and_a_small_letter_goes_on():
    assert list(unwrapped(["One", "two", "", "three.", "four", " Five"], None)) == ["One two", "three.", "four", "Five"]
    assert list(unwrapped([], 70)) == []
    assert list(unwrapped(["", ""], 70)) == []


def test_paragraphs_and_short_lists_are_not_taken_for_wrapped():
    lengths = [random.randint(20, 2000) for _ in range(100)]
    assert wrap_width(["x" * length for length in lengths]) is None
    assert wrap_width(["x" * random.randint(1, 30) for _ in range(100)]) is None
    assert wrap_width(["x" * 70] * 5) is None
