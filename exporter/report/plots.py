"""The kinds of plots of a report. Each takes plain data and returns an SVG element.

Every series has a colour of its own, and a marker, a hatch or dashes that tell it from the others
without colours. Bars begin at zero. Labels stand above their bars, so that they fit on a phone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from exporter.errors import printable
from exporter.report.svg import INK, MUTED, PAPER, SERIES, render

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Of lines only: the circles of others make a plot a hundred times larger.
_HATCHES = ("", "///", "\\\\\\", "xx", "--", "||", "++", "//")
_DASHES = ("-", "--", "-.", ":")
#: The longest label in a plot, in letters.
_LONGEST = 42
#: The longest names in a legend of two columns.
_SHORT = 22
#: The height of a row of bars, of a strip, and of an axis with its label, in CSS pixels.
_ROW, _STRIP, _AXIS = 40, 48, 52
#: Up to which share of the samples an axis reaches, and how much room is left beyond it.
_SHOWN, _ROOM = 0.9, 1.15

Show = Callable[[float], str]


@dataclass(frozen=True)
class Style:
    """The look of a series, which it has in every plot of the report."""

    number: int

    @property
    def colour(self) -> str:
        """One of six colours."""
        return SERIES[self.number % len(SERIES)]

    @property
    def marker(self) -> str:
        """One of seven markers: with the colour, 42 series differ."""
        return _MARKERS[self.number % len(_MARKERS)]

    @property
    def hatch(self) -> str:
        """One of eight hatches."""
        return _HATCHES[self.number % len(_HATCHES)]

    @property
    def dashes(self) -> str:
        """One of four kinds of lines."""
        return _DASHES[self.number % len(_DASHES)]


@dataclass(frozen=True)
class Text:
    """What a plot is called: an id, a title, what it shows, and what its axis measures."""

    name: str
    title: str
    about: str
    axis: str


def label(text: str) -> str:
    """A text of any origin as a label: printable, on one line, and of limited length."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


@dataclass(frozen=True)
class Bar:
    """A bar of one or several parts: (value, style) each."""

    label: str
    parts: Sequence[tuple[float, Style]]
    shown: str


def listed(rows: Sequence[Bar]) -> str:
    """What the bars show, for the description of their plot."""
    return "; ".join(f"{row.label} {row.shown}" for row in rows)


def bars(text: Text, rows: Sequence[Bar], legend: Sequence[tuple[str, Style]] = ()) -> Markup:
    """Horizontal bars that begin at zero. `legend` names the styles of the parts."""

    def draw(figure: Any) -> None:
        from matplotlib.patches import Patch

        axes = figure.subplots()
        for place, row in enumerate(rows):
            start = 0.0
            for value, style in row.parts:
                axes.barh(
                    place, value, 0.42, start, color=style.colour, hatch=style.hatch,
                    edgecolor=PAPER, linewidth=0.5,
                )  # fmt: skip
                start += value
            _row_label(axes, place, row.label)
            axes.annotate(
                row.shown, (start, place), (5, 0), textcoords="offset points", va="center"
            )
        widest = max((sum(value for value, _ in row.parts) for row in rows), default=0.0)
        _row_axes(axes, len(rows), widest * 1.3 or 1.0, text.axis)
        if legend:
            patches = [
                Patch(facecolor=style.colour, hatch=style.hatch, edgecolor=PAPER, label=label(name))
                for name, style in legend
            ]
            columns = _legend_columns(legend)
            figure.legend(handles=patches, loc="outside upper left", ncols=columns, columnspacing=1)

    height = _AXIS + _ROW * len(rows) + 22 * -(-len(legend) // _legend_columns(legend))
    return render(draw, height, text.name, text.title, text.about)


def _legend_columns(legend: Sequence[tuple[str, Style]]) -> int:
    return 2 if all(len(name) <= _SHORT for name, _ in legend) else 1


def _row_label(axes: Any, place: int, text: str) -> None:
    axes.annotate(
        label(text), (0, place), (0, 9), xycoords=("axes fraction", "data"),
        textcoords="offset points", va="bottom", ha="left",
    )  # fmt: skip


def _row_axes(axes: Any, rows: int, right: float, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yticks([])
    axes.spines.left.set_visible(False)
    axes.set_ylim(rows - 0.6, -0.85)
    axes.set_xlim(0, right)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(axis)
    axes.grid(visible=False, axis="y")


@dataclass(frozen=True)
class Strip:
    """Samples of one quantity, and their median with its interval."""

    label: str
    style: Style
    samples: Sequence[float]
    median: float
    low: float
    high: float


def strips(text: Text, panels: Sequence[tuple[str, Sequence[Strip]]]) -> Markup:
    """Raw samples as dots, and below them the median with its interval; a panel for each length or
    depth, with an axis of its own from zero.

    Where single samples are far from the others, the axis ends before them and their number is
    written at its end.
    """

    def draw(figure: Any) -> None:
        rows = [len(strip_rows) for _, strip_rows in panels]
        ratios = [count * _STRIP + _AXIS for count in rows]
        every = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": ratios})
        for axes, (title, strip_rows) in zip(every[:, 0], panels, strict=True):
            right = _end_of_axis(strip_rows)
            for place, row in enumerate(strip_rows):
                _strip(axes, place, row, right)
            _row_axes(axes, len(strip_rows), right, text.axis)
            axes.set_title(title, loc="left", fontsize=13, fontweight="bold")

    height = sum(_AXIS + 26 + _STRIP * len(rows) for _, rows in panels)
    return render(draw, height, text.name, text.title, text.about)


def _end_of_axis(rows: Sequence[Strip]) -> float:
    ends = [row.high for row in rows]
    for row in rows:
        if row.samples:
            ordered = sorted(row.samples)
            ends.append(ordered[int(_SHOWN * (len(ordered) - 1))])
    return max(ends) * _ROOM or 1.0


def _strip(axes: Any, place: int, row: Strip, right: float) -> None:
    inside = [value for value in row.samples if value <= right]
    xs, ys = list[float](), list[float]()
    for number, value in enumerate(inside):
        # A dot is a line of no length with round ends: all dots are one path of the page. The
        # golden ratio spreads them without a random number.
        y = place + 0.02 + 0.18 * ((number * 0.618034) % 1)
        xs += [value, value, float("nan")]
        ys += [y, y, float("nan")]
    axes.plot(xs, ys, color=row.style.colour, lw=3.2, solid_capstyle="round", alpha=0.55)
    axes.plot([row.low, row.high], [place + 0.3] * 2, color=INK, lw=2.5, solid_capstyle="butt")
    axes.plot(
        [row.median], [place + 0.3], row.style.marker, color=row.style.colour, ms=8, mec=INK,
        mew=1.2, clip_on=False,
    )  # fmt: skip
    _row_label(axes, place, row.label)
    beyond = len(row.samples) - len(inside)
    if beyond:
        axes.annotate(
            f"{beyond} more ▸", (1, place), (0, 9), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="bottom", ha="right", color=MUTED,
        )  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Points (x, y) of one series."""

    label: str
    style: Style
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axes:
    """The axes of a plot of lines: the label of y, and what to write at which x. From zero with
    `zero`, else around the points."""

    y: str
    ticks: Sequence[tuple[float, str]] = ()
    zero: bool = True
    most: float | None = None


def lines(text: Text, series: Sequence[Line], axes_of: Axes) -> Markup:
    """Points joined by lines."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for line in series:
            xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
            axes.plot(
                xs, ys, line.style.dashes, marker=line.style.marker, color=line.style.colour,
                ms=6, lw=1.6, label=_legend_label(line.label),
            )  # fmt: skip
        axes.set_xlabel(text.axis)
        _name_of_y(axes, axes_of.y)
        if axes_of.ticks:
            axes.set_xticks(
                [x for x, _ in axes_of.ticks], [label(tick) for _, tick in axes_of.ticks]
            )
        if axes_of.zero:
            axes.set_ylim(bottom=0)
        if axes_of.most is not None:
            axes.set_ylim(top=axes_of.most)
        axes.margins(x=0.04)
        _legend(figure)

    height = 260 + 22 * len(series)
    return render(draw, height, text.name, text.title, text.about)


@dataclass(frozen=True)
class Point:
    """One model in a plot of quality against size."""

    label: str
    style: Style
    x: float
    y: float


@dataclass(frozen=True)
class Measure:
    """What y is in a plot of quality against size: its label, whether less is better, whether the
    axis begins at zero, the value of the reference, and where the axis ends at most."""

    y: str
    less_is_better: bool
    zero: bool
    reference: float | None
    most: float | None = None


def trade_off(text: Text, points: Sequence[Point], measure: Measure) -> Markup:
    """Quality against size: points, the front of those that no other beats, and the quality of the
    reference as a line."""
    reference = measure.reference

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_xlabel(text.axis)
        _name_of_y(axes, measure.y)
        front = pareto(points, measure.less_is_better)
        if len({point.x for point in points}) > 1:
            axes.step(
                [p.x for p in front], [p.y for p in front], where="post", color=MUTED, lw=1.2,
                ls=":", label="front",
            )  # fmt: skip
        if reference is not None:
            axes.axhline(reference, color=INK, lw=1.2, ls="--", label="reference, not quantized")
        for point in points:
            axes.plot(
                [point.x], [point.y], point.style.marker, color=point.style.colour, ms=10, mec=INK,
                mew=1, label=_legend_label(point.label), ls="none",
            )  # fmt: skip
        xs, ys = [p.x for p in points], [p.y for p in points]
        ys += [] if reference is None else [reference]
        axes.set_xlim(*_around(xs))
        axes.set_ylim(*(0, max(ys) * _ROOM or 1) if measure.zero else _around(ys))
        if measure.most is not None:
            axes.set_ylim(top=min(axes.get_ylim()[1], measure.most))
        _legend(figure)

    height = 275 + 22 * (len(points) + 1)
    return render(draw, height, text.name, text.title, text.about)


def _name_of_y(axes: Any, name: str) -> None:
    """The name of the y axis, above it: turned text is hard to read and takes width."""
    axes.set_title(name, loc="left", fontsize=13, color=MUTED)


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that shows the differences of these values."""
    low, high = min(values), max(values)
    room = 0.2 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def pareto(points: Sequence[Point], less_is_better: bool) -> list[Point]:
    """The points that no other beats in both size and quality, the smallest first."""
    front = list[Point]()
    for point in sorted(points, key=lambda p: (p.x, p.y if less_is_better else -p.y)):
        if not front or (point.y < front[-1].y if less_is_better else point.y > front[-1].y):
            front.append(point)
    return front


def _legend_label(text: str) -> str:
    """matplotlib leaves out labels that begin with an underscore."""
    shown = label(text)
    return f"\u200b{shown}" if shown.startswith("_") else shown


def _legend(figure: Any) -> None:
    figure.legend(loc="outside upper left", ncols=1, handlelength=2.5)
