"""The page's pictures: matplotlib draws them, and they become SVG that takes its colours and its font from the page.

Text stays text. Colours are drawn as placeholders, which become the page's CSS variables, so that one picture is right
in light and in dark. Every picture is `WIDTH` units wide, about what a phone shows: the page sets as many side by side
as there is room for, and text is as large as the rest of the page everywhere.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from albert_fast.bench.comparison import DOWN, OURS, UP, Change, Comparison
from albert_fast.bench.results import Result, Row, Work

WIDTH = 340  # of a picture, in units
TEXT, SMALL = 12.0, 11.0  # font sizes
CHARACTER = 6.8  # at most as wide, in the small size
HEADING, BAR, GAP, FOOT = 21.0, 17.0, 9.0, 22.0  # heights: of a group's name, each of its lines, what follows, an axis

# What is drawn in such a colour has that variable of the page.
_INK, _MUTED, _LINE, _GOOD, _BAD = (f"#0000f{number}" for number in range(5))
_PEERS = {f"#0000e{number}": f"--peer-{number}" for number in range(9)}
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _GOOD: "--good", _BAD: "--bad", **_PEERS}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "◀", "▶")  # the same, in the page's text

WORKS_A_PANEL = 6
LONGEST_BAR = 20.0  # times the floor, or half as many medians: what is longer is cut
FEWEST_POINTS = 3  # of a curve
LONGEST_NAME, LONGEST_HEADING = 26, 40

_STYLE: dict[Any, Any] = {
    "font.size": SMALL,
    "svg.fonttype": "none",
    "svg.hashsalt": "albert_fast",
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72,
}


_styled = matplotlib.rc_context(_STYLE)  # around what draws

_DASHED: dict[str, Any] = {"color": _INK, "linewidth": 1.1, "linestyle": (0, (3, 2))}


@dataclass(frozen=True)
class Picture:
    """An SVG element, which has in words what it shows, and its title."""

    svg: str
    title: str


@dataclass(frozen=True)
class Look:
    """How a peer is drawn: the number of its colour, and its marker."""

    number: int

    @property
    def color(self) -> str:
        return list(_PEERS)[self.number % len(_PEERS)]

    @property
    def variable(self) -> str:
        return _PEERS[self.color]

    @property
    def marker(self) -> str:
        return _MARKERS[self.number % len(_MARKERS)]

    @property
    def glyph(self) -> str:
        return _GLYPHS[self.number % len(_GLYPHS)]


def looks(results: Sequence[Result]) -> dict[str, Look]:
    """Of each peer, the same on the whole page; albert_fast comes first."""
    peers = [row.peer for result in results for work in result.works for row in work.rows]
    return {peer: Look(number) for number, peer in enumerate(dict.fromkeys([OURS, *peers]))}


# ---------------------------------------------------------------------------------------------------- times the floor


def bars(result: Result, peers: Mapping[str, Look]) -> Iterator[Picture]:
    """Times the floor: a group of bars for each piece of work, some groups to a picture."""
    for title, works in _groups(result.works).items():
        measured = [work for work in works if any(row.times_floor is not None for row in work.rows)]
        for start in range(0, len(measured), WORKS_A_PANEL):
            yield _bars(title, measured[start : start + WORKS_A_PANEL], peers)


@_styled
def _bars(title: str, works: Sequence[Work], peers: Mapping[str, Look]) -> Picture:
    shown = [row.times_floor for work in works for row in work.rows if row.times_floor is not None]
    top = min(max(shown), LONGEST_BAR * max(1.0, statistics.median(shown) / 2))
    names = [[row.peer for row in work.rows] for work in works]
    figure, axes = _listing(names, right=CHARACTER * (3 + max(len(_number(value)) for value in shown)))
    axes.set_xlim(0, max(top, 1.2))
    y, words = 0.0, []
    for work in works:
        _heading(axes, y, _name(work))
        y += HEADING
        _line_at_one(axes, y, len(work.rows), zorder=3)
        said = []
        for row in work.rows:
            middle = y + BAR / 2
            if row.times_floor is None:
                label, color, end = _state(row), _MUTED, 0.0
            else:
                cut = row.times_floor > top
                label, color, end = f"{'→ ' * cut}{_number(row.times_floor)}", _INK, min(row.times_floor, top)
                axes.barh(middle, end, height=BAR - 5, color=peers[row.peer].color)
            axes.annotate(label, (max(end, 1), middle), (4, 0), textcoords="offset points", va="center", color=color)
            said.append(f"{row.peer} {label}")
            y += BAR
        words.append(f"{_name(work)}: {', '.join(said)}")
        y += GAP
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return Picture(_svg(figure, f"Times the floor. {'; '.join(words)}"), title)


def _listing(names: Sequence[Sequence[str]], right: float) -> tuple[Figure, Axes]:
    """A picture of groups of lines, with the name of each line before it. A unit of the y axis is one of the picture.

    Args:
        names: of each group's lines.
        right: what is to be left free there, for labels.
    """
    height = sum(HEADING + BAR * len(group) + GAP for group in names)
    left = 12 + CHARACTER * max(len(_short(name)) for group in names for name in group)
    whole = height + FOOT
    figure = Figure(figsize=(WIDTH / 72, whole / 72))
    axes = figure.add_axes((left / WIDTH, FOOT / whole, (WIDTH - left - right) / WIDTH, height / whole))
    axes.set(ylim=(height, 0), yticks=[], axisbelow=True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=_LINE, linewidth=0.6)
    y = 0.0
    for group in names:
        y += HEADING
        for name in group:
            axes.annotate(
                _short(name),
                (0, y + BAR / 2),
                (-6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
            )
            y += BAR
        y += GAP
    return figure, axes


def _heading(axes: Axes, y: float, text: str) -> None:
    """The name of a group, from the picture's left edge on."""
    axes.annotate(
        _short(text, LONGEST_HEADING),
        (0, y + HEADING - 6),
        xycoords=("figure points", "data"),
        fontsize=TEXT,
        fontweight="bold",
    )


def _line_at_one(axes: Axes, y: float, lines: int, zorder: int) -> None:
    """Beside the lines of a group, and not through its name."""
    axes.plot([1, 1], [y, y + BAR * lines], **_DASHED, zorder=zorder)


# ------------------------------------------------------------------------------------------- against length and batch


@dataclass(frozen=True)
class Series:
    """Works that differ in one thing, `name`, by its value; what they share is in `title`."""

    name: str
    title: str
    points: dict[float, Work]


_AXES = {"length": "tokens of a row", "fill": "share of real tokens", "labelled": "share of labelled tokens"}


def series(works: Sequence[Work]) -> Iterator[Series]:
    """What a suite has varied; else shapes that differ in length or in rows alone, `FEWEST_POINTS` or more."""
    for title, group in _groups(works).items():
        varied: dict[tuple[str, str], dict[float, Work]] = {}
        shapes: dict[str, dict[tuple[int, int], Work]] = {}
        for work in group:
            if len(work.varied) == 1:
                ((name, value),) = work.varied.items()
                varied.setdefault((work.suite, name), {}).setdefault(value, work)
            elif match := re.fullmatch(r"(\d+)x(\d+)((?::\w+)?)", work.shape):
                shapes.setdefault(match[3], {}).setdefault((int(match[1]), int(match[2])), work)
        for (_, name), points in varied.items():
            if len(points) > 1:
                yield Series(name, title, dict(sorted(points.items())))
        for suffix, own in shapes.items():
            what = title + suffix.replace(":", ", ")
            for rows in sorted({rows for rows, _ in own}):
                points = {at[1]: own[at] for at in sorted(own) if at[0] == rows}
                if len(points) >= FEWEST_POINTS:
                    yield Series("length", f"{what}, {rows} row{'s' * (rows > 1)}", points)
            for length in sorted({length for _, length in own}):
                points = {at[0]: own[at] for at in sorted(own) if at[1] == length}
                if len(points) >= FEWEST_POINTS:
                    yield Series("rows", f"{what}, length {length}", points)


def curves(result: Result, peers: Mapping[str, Look]) -> Iterator[Picture]:
    """Time and memory of each series, a picture each."""
    for one in series(result.works):
        floors = {at: work.floor_milliseconds for at, work in one.points.items() if work.floor_milliseconds}
        times = _of_peers(one, lambda row: row.milliseconds)
        if times:
            yield _curve(one, "Milliseconds", times, floors, peers, log=True)
        memory = _of_peers(one, lambda row: row.peak_bytes)
        if memory:
            most = max(size for own in memory.values() for size in own.values())
            unit, size = ("GB", 1e9) if most >= 1e8 else ("MB", 1e6)
            scaled = {peer: {at: value / size for at, value in own.items()} for peer, own in memory.items()}
            yield _curve(one, f"Peak memory, {unit}", scaled, {}, peers, log=False)


def _of_peers(one: Series, figure: Callable[[Row], float | None]) -> dict[str, dict[float, float]]:
    """By peer, where on the axis it has the figure."""
    found: dict[str, dict[float, float]] = {}
    for at, work in one.points.items():
        for row in work.rows:
            value = figure(row)
            if value is not None:
                found.setdefault(row.peer, {})[at] = value
    return found


@_styled
def _curve(
    one: Series,
    what: str,
    values: Mapping[str, Mapping[float, float]],
    floors: Mapping[float, float],
    peers: Mapping[str, Look],
    log: bool,
) -> Picture:
    figure = Figure(figsize=(WIDTH / 72, 232 / 72), layout="constrained")
    axes = figure.add_subplot()
    if floors:
        axes.plot(list(floors), list(floors.values()), **_DASHED)
    for peer, points in values.items():
        _plot(axes, peers[peer], list(points), list(points.values()))
    axes.set_xlabel(_AXES.get(one.name, one.name))
    if min(one.points) >= 1:  # no share
        axes.set_xscale("log")
        _ticks(axes, list(one.points))
    if log:
        _log_y(axes)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    said = [f"{peer} {', '.join(f'{at:,}: {value:.4g}' for at, value in own.items())}" for peer, own in values.items()]
    return Picture(_svg(figure, f"{what} by {one.name}. {'; '.join(said)}"), f"{what}: {one.title}")


def _plot(axes: Axes, look: Look, x: list[float], y: list[float]) -> None:
    axes.plot(x, y, color=look.color, marker=look.marker, markersize=5, linewidth=1.6, zorder=3)


def _ticks(axes: Axes, places: Sequence[float]) -> None:
    """At the places themselves, as far as their labels have room on a log axis."""
    low, high = axes.get_xlim()
    unit = axes.get_position().width * WIDTH / math.log(high / low)
    shown = [places[-1]]
    for place in reversed(places[:-1]):
        room = CHARACTER * (len(_label(place)) + len(_label(shown[-1]))) / 2 + SMALL
        if math.log(shown[-1] / place) * unit >= room:
            shown.append(place)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([_label(place) for place in shown]))
    axes.xaxis.set_minor_locator(NullLocator())


def _label(place: float) -> str:
    return f"{place:,.12g}"


def _round_places(low: float, high: float) -> list[float]:
    """Of a log axis: 1, 10, 100 …; on a short one with 2 and 5 between them, on a shorter one some that are even."""
    digits = (1,) if high / low > 100 else (1, 2, 5)
    round_ones = [digit * 10.0**power for power in range(-9, 10) for digit in digits]
    places = round_ones if high / low > 3 else MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [place for place in places if low <= place <= high]


def _log_y(axes: Axes) -> None:
    """1, 10, 100 … on a long axis; 2 and 5 between them on a short one."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _label(value)))
    axes.yaxis.set_minor_locator(NullLocator())


# ----------------------------------------------------------------------------------------------------------- roofline


def rooflines(result: Result, peers: Mapping[str, Look]) -> Iterator[Picture]:
    """GFLOP/s that the real tokens' operations were done at, below the rate that the floor is made of.

    The roof is the measured matrix rate; of int8, whose attention counts at bfloat16's, that of the two together.
    """
    panels: dict[str, list[Work]] = {}
    for work in result.works:
        if work.gflop and work.floor_milliseconds and any(row.milliseconds for row in work.rows):
            panels.setdefault(f"{work.group} {work.dtype}".strip(), []).append(work)
    for title, works in panels.items():
        yield _roofline(title, sorted(works, key=lambda work: work.gflop), peers)


@_styled
def _roofline(title: str, works: Sequence[Work], peers: Mapping[str, Look]) -> Picture:
    figure = Figure(figsize=(WIDTH / 72, 252 / 72), layout="constrained")
    axes = figure.add_subplot()
    sizes = [work.gflop for work in works]
    roof = [work.gflop / work.floor_milliseconds * 1e3 for work in works if work.floor_milliseconds]
    if any(work.megabytes for work in works):  # each has a floor of its own
        axes.plot(sizes, roof, color=_INK, linestyle="none", marker="_", markersize=16)
    else:
        axes.plot([sizes[0] / 1.5, *sizes, sizes[-1] * 1.5], [roof[0], *roof, roof[-1]], **_DASHED)
    said = []
    for work in works:
        for row in work.rows:
            if row.milliseconds:
                look, rate = peers[row.peer], work.gflop / row.milliseconds * 1e3
                axes.plot(work.gflop, rate, color=look.color, marker=look.marker, markersize=6, alpha=0.85, zorder=3)
                said.append(f"{row.peer} {rate:.0f} at {work.mode} {_name(work)}")
    axes.set(xscale="log", xlabel="GFLOP of the work", ylabel="GFLOP/s")
    _log_y(axes)
    figure.draw_without_rendering()  # lays it out: before, the axis is wider than y's labels will leave it
    _ticks(axes, _round_places(*axes.get_xlim()))
    axes.grid(color=_LINE, linewidth=0.6)
    text = f"GFLOP/s reached, of {max(roof):.0f} that matrix products reach. {'; '.join(said)}"
    return Picture(_svg(figure, text), title)


# --------------------------------------------------------------------------------------------------------- comparison


def changes(comparison: Comparison, what: str) -> Iterator[Picture]:
    """The ratios B / A of `what`, "time" or "speedup", with their intervals."""
    yardsticks = {common.yardstick for common in comparison.works} - {None}
    whose = f" of {yardsticks.pop()}" if len(yardsticks) == 1 else ""
    title = "Time" if what == "time" else f"Speed-up{whose}"
    colors = {UP: _BAD, DOWN: _GOOD} if what == "time" else {UP: _GOOD, DOWN: _BAD}
    works = [
        (common.work, [(line.peer, found) for line in common.lines if (found := getattr(line, what)) is not None])
        for common in comparison.works
    ]
    works = [(work, found) for work, found in works if found]
    for start in range(0, len(works), WORKS_A_PANEL):
        yield _changes(title, works[start : start + WORKS_A_PANEL], colors)


@_styled
def _changes(title: str, works: Sequence[tuple[Work, list[tuple[str, Change]]]], colors: Mapping[str, str]) -> Picture:
    figure, axes = _listing([[peer for peer, _ in lines] for _, lines in works], right=14)
    ratios = [change.ratio for _, lines in works for _, change in lines]
    # Medians decide what is shown; an interval may be cut off.
    low, high = min(0.9, *ratios) * 0.93, max(1.1, *ratios) * 1.07
    axes.set(xscale="log", xlim=(low, high))
    y, words = 0.0, []
    for work, lines in works:
        _heading(axes, y, f"{work.title.removesuffix(work.shape)}{_name(work)}")
        y += HEADING
        _line_at_one(axes, y, len(lines), zorder=1)
        for peer, change in lines:
            middle = y + BAR / 2
            color = colors.get(change.verdict, _MUTED)
            axes.plot([max(change.low, low), min(change.high, high)], [middle, middle], color=color, linewidth=2)
            axes.plot(change.ratio, middle, "o", color=color, markersize=6)
            words.append(f"{work.title}, {peer}: {change.ratio:.3f}, {change.verdict}")
            y += BAR
        y += GAP
    _ticks(axes, _round_places(low, high))
    return Picture(_svg(figure, f"{title}, B / A. {'; '.join(words)}"), title)


# ---------------------------------------------------------------------------------------------------------------- all


def _groups(works: Sequence[Work]) -> dict[str, list[Work]]:
    """By all of the title but the shape."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        groups.setdefault(work.title.removesuffix(work.shape).strip(), []).append(work)
    return groups


def _name(work: Work) -> str:
    """Within its group: the shape, and what a suite varied that cannot be seen from it."""
    varied = (f"{name} {value:,}" for name, value in work.varied.items() if name not in ("length", "rows", "fill"))
    fill = [f"{work.fill:.0%} real"] if "fill" in work.varied else []
    return ", ".join([work.shape, *fill, *varied])


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _state(row: Row) -> str:
    return "failed" if row.passed is False else "absent" if row.passed is None else "no figure"


def _short(name: str, longest: int = LONGEST_NAME) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _svg(figure: Figure, text: str) -> str:
    """The figure's element, `text` in its stead for who cannot see it: with the page's colours and font."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser's fonts have more of them
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    whole = buffer.getvalue()
    (size,) = re.findall(r'<svg [^>]*(viewBox="[^"]*")', whole)
    inside = whole[whole.index("<g ") : whole.rindex("</svg>")].replace("xlink:href", "href")
    # What is referred to gets a name that no other picture of the page has; other names go.
    own = hashlib.sha256(whole.encode()).hexdigest()[:8]
    referred = set(re.findall(r'url\(#(\w+)\)|href="#(\w+)"', inside))
    names = {name: f"{own}-{number}" for number, name in enumerate(sorted("".join(pair) for pair in referred))}

    def mended(tag: re.Match[str]) -> str:
        """A tag; what is between tags is somebody's text."""
        found = re.sub(r' id="([^"]+)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", tag[0])
        found = re.sub(r'(url\(|href=")#(\w+)', lambda m: f"{m[1]}#{names[m[2]]}", found)
        found = re.sub(r' font-family: [^;"]*;', "", found)
        return re.sub(r": #[0-9a-f]{6}\b", lambda m: f": var({_VARIABLES[m[0][2:]]})", found)

    inside = re.sub(r"<[^>]*>", mended, inside)
    return f'<svg {size} role="img" aria-label="{escape(text)}">\n{inside}</svg>'
