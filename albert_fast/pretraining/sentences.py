"""Text -> sentences: a splitter by rules, and lines that were wrapped at a width joined again.

A stop (. ! ? … and their like) ends a sentence where a blank follows, and something that can begin one: no small
letter, no further stop. After a single "." the word before it decides, too: titles, initials and abbreviations go on. A
text without capitals is split at each stop. Chinese and Japanese stops end a sentence wherever they stand.

The rules are English's; they miss little in languages with the same stops, except for those languages' abbreviations.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

# Characters. Text without stops is cut at a blank: lists of words and tables would otherwise make endless sentences.
LONGEST = 4000

# The first line makes it twice as fast: elsewhere one look is enough.
_STOP = re.compile(
    r"""
    (?=[.!?…؟।۔。！？｡])
    (?: [。！？｡]+ [」』）】》〉”’"')\]]* \s*                                # needs no blank
    | (?P<stop>[.!?…؟।۔]+) (?P<close>["'”’»)\]}]*(?:\[\d+\])*) \s+ (?=\S)  # with quotes, brackets, footnotes
    )
    """,
    re.VERBOSE,
)
_OPENERS = re.compile(r"""["'“‘«„(\[{¡¿—–\-*_#]*\s?""")
_LAST_WORD = re.compile(r"""[^\s"'“”‘’«»„()\[\]{}—–\-*_]*$""")
_NEXT_WORD = re.compile(r"[^\W_]+")
_ROMAN = re.compile(r"[IVXLC]+\b")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # e.g, U.S, M.R.C.S
_LONGEST_ABBREVIATION = 24


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What comes before a name or goes on in any case.
_NEVER_LAST = _words("""
    mr mrs ms messrs mme mlle mgr dr prof rev revd hon st ste capt col gen lt lieut maj sgt cpl gov sen rep pres supt
    adm cmdr insp mt dept e.g i.e eg cf viz vs v approx ca
""")
# What can end a sentence, and does if a word follows that often begins one.
_SOMETIMES_LAST = _words("etc jr sr esq inc ltd co corp bros al ave blvd rd ft lb lbs oz")
_BEGINNERS = _words("""
    a an the this that these those there here it he she i we you they his her its my our your their in on at as by for
    from with to of and but or so yet if when while where then what why how who after before since although however not
    no yes one all some many most both each
""")
# What stands before a number.
_BEFORE_NUMBERS = _words("""
    no nos vol vols p pp fig figs ch chap sec art eq nr op jan feb mar apr jun jul aug sep sept oct nov dec
""")


def split(text: str) -> list[str]:
    """The sentences of a paragraph, stripped, none empty, none longer than LONGEST characters."""
    sentences: list[str] = []
    start = 0
    capitals = text != text.lower()
    for match in _STOP.finditer(text):
        if match["stop"] is None or _ends(text, start, match, capitals):
            sentences += bounded(text[start : match.end()])
            start = match.end()
    return sentences + bounded(text[start:])


def bounded(sentence: str) -> list[str]:
    """A sentence, stripped, in as few pieces as LONGEST asks for; nothing of a blank one."""
    sentence = sentence.strip()
    pieces, start = [], 0
    while len(sentence) - start > LONGEST:
        cut = sentence.rfind(" ", start + 1, start + LONGEST + 1)
        cut = start + LONGEST if cut < 0 else cut
        pieces.append(sentence[start:cut].strip())
        start = cut
    return [piece for piece in (*pieces, sentence[start:].strip()) if piece]


def _ends(text: str, start: int, match: re.Match[str], capitals: bool) -> bool:
    """Whether the stop ends the sentence that begins at `start`."""
    opened = _OPENERS.match(text, match.end())
    following = opened.end() if opened else match.end()
    first = text[following : following + 1]  # "" where nothing but quotes follows, which "in" finds everywhere
    if first in ".!?…" or (capitals and first.islower()):
        return False
    if match["stop"] != "." or match["close"]:
        return True
    here = match.start()
    found = _LAST_WORD.search(text, max(start, here - _LONGEST_ABBREVIATION), here)
    word = found[0] if found else ""
    # Not the whole of it: a list of initials is one long sentence.
    before = text[max(start, here - 2 * _LONGEST_ABBREVIATION) : here - len(word)]
    return not _goes_on(word, before, text, following)


def _goes_on(word: str, before: str, text: str, following: int) -> bool:
    """Whether the "." after `word` belongs to the word; the text goes on at `following`."""
    small = word.lower()
    if small in _NEVER_LAST:
        return True
    if small in _BEFORE_NUMBERS:
        is_roman = small != "no" and _ROMAN.match(text, following)  # "No. I did not"
        return bool(is_roman) or text[following].isdigit()
    if small in _SOMETIMES_LAST or _DOTTED.fullmatch(word):
        found = _NEXT_WORD.match(text, following)
        return found is None or found[0].lower() not in _BEGINNERS
    if len(word) == 1 and word.isupper():
        # An initial; but "It was I. He …" ends.
        return word != "I" or not before.split()[-1:] or not before.split()[-1][-1].islower()
    # "1. The first item"
    return word.isdigit() and len(word) <= 3 and not before.strip()


# ------------------------------------------------------------------------------------------------------- wrapped lines

# A text is wrapped if nearly all of its lines stay within a width that people wrap at.
_FEWEST_LINES = 10
_WIDTHS = range(50, 121)
FULL_LINE = 0.8  # of the width: a shorter line ends where its author meant it to
_PARAGRAPH_ENDS = frozenset(".!?…:\"'”’»)]。！？")


def wrap_width(lines: Sequence[str]) -> int | None:
    """The width at which these lines were wrapped, or None if they are paragraphs or sentences of their own.

    It is the length that nine lines of ten stay below: rules and tables may stand out of the text.
    """
    lengths = sorted(len(line) for line in lines if line)
    if len(lengths) < _FEWEST_LINES:
        return None
    width, nearly_longest = lengths[len(lengths) * 9 // 10], lengths[len(lengths) * 99 // 100]
    return width if width in _WIDTHS and nearly_longest <= width + 8 else None


def unwrapped(lines: Iterable[str], width: int | None) -> Iterator[str]:
    """Paragraphs: lines joined where one was broken, stripped; a blank line always ends one.

    A line was broken where the next one's first word would not have fitted, with some room to spare, for people do not
    all break lines as late as they can; or, whatever the width, where the next one goes on with a small letter. What is
    thus joined too much, such as two paragraphs, `split` takes apart; headings and lines of verse stay mostly alone.
    """
    full = width * FULL_LINE if width else None
    paragraph: list[str] = []
    for line in map(str.strip, lines):
        if paragraph:
            last = paragraph[-1]
            broken = line[:1].islower() and last[-1] not in _PARAGRAPH_ENDS
            if full and not broken:
                broken = bool(line) and len(last) + 1 + len(line.split(None, 1)[0]) > full
            if not broken:
                yield " ".join(paragraph)
                paragraph = []
        if line:
            paragraph.append(line)
    if paragraph:
        yield " ".join(paragraph)
