"""A matplotlib figure as an SVG element inside the page: colours and fonts are those of the page.

The colours of `COLOURS` stand for CSS variables, so that one plot serves light and dark pages. Text
stays text. The same figure gives the same bytes.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from exporter.errors import printable

#: Colours to draw with → the CSS variable that replaces each in the page.
INK, MUTED, GRID, PAPER = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04"
SERIES = tuple(f"#0a0b0{number}" for number in range(1, 7))
COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)
}
#: The width in CSS pixels at which the text of a plot has the size that it was drawn with.
WIDTH = 340

_SETTINGS = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 13,
    "grid.color": GRID,
    "hatch.linewidth": 1.0,
    "legend.frameon": False,
    "path.simplify": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "mobilellm",
    "text.color": INK,
    "text.parse_math": False,  # a `$` in the name of a device is a dollar
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_COLOUR = re.compile("|".join(COLOURS))
_FONT = re.compile(r"font-family: [^;]+(; |$)")
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")
_UNTURNED = re.compile(r"rotate\(-?0 ")


def render(
    draw: Callable[[Any], None], height: float, name: str, title: str, description: str
) -> Markup:
    """Draw on a new matplotlib figure of `WIDTH` by `height` CSS pixels, and return it as an
    element with the role ``img``. `name` makes its ids unique in the page."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The user's own settings have no effect. With 72 dots per inch a point is a pixel.
    with style.context(["default", _SETTINGS]), warnings.catch_warnings():
        # The browser's fonts have the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(file, metadata=_NO_METADATA)  # `savefig` would draw everything twice
    return Markup(_inline(file.getvalue(), name, title, description))


def _inline(svg: bytes, name: str, title: str, description: str) -> str:
    """The SVG file as an element of an HTML page."""
    root = ElementTree.fromstring(svg)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {value.removeprefix("#") for value in values if value.startswith("#")}
    used |= {reference for value in values for reference in _REFERENCE.findall(value)}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = dict(element.attrib)
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                if value in used:
                    element.set("id", f"{name}-{value}")
            elif key == _LINK:
                element.set("href", f"#{name}-{value.removeprefix('#')}")
            elif key != "transform" or not _UNTURNED.match(value):
                element.set(key, _value(key, value, name))
    box, labels = root.attrib["viewBox"], (f"{name}-title", f"{name}-about")
    root.attrib.clear()
    root.attrib.update(
        {"viewBox": box, "class": "plot", "role": "img", "aria-labelledby": " ".join(labels)}
    )
    for label, tag, text in reversed(
        [(labels[0], "title", title), (labels[1], "desc", description)]
    ):
        element = ElementTree.Element(tag, {"id": label})
        element.text = printable(text)
        root.insert(0, element)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _value(key: str, value: str, name: str) -> str:
    """An attribute with the page's colours and font, ids of this plot, and short numbers."""
    if key in ("style", "fill", "stroke"):
        value = _COLOUR.sub(lambda found: f"var(--{COLOURS[found[0]]})", value)
        value = _FONT.sub("", value)
    if key in ("d", "x", "y", "style"):
        value = _LONG_NUMBER.sub(r"\1", value)
    value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
    return " ".join(value.split()) if key == "d" else value
