"""The report as one HTML page: no script, no network, light and dark, for phone and desktop."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from exporter.errors import printable
from exporter.report.blocks import Section
from exporter.report.counts import instructions
from exporter.report.gated import gated
from exporter.report.operators import delegation, operators
from exporter.report.quality import by_layer, by_position, quality
from exporter.report.reproduce import reproduce
from exporter.report.sizes import sizes
from exporter.report.speed import memory, speed
from exporter.report.subjects import Subject, read_subjects
from exporter.report.summary import card, comparison
from exporter.report.weights import float_weights

#: Every topic after the summary, in the order of the page.
TOPICS = (
    sizes, quality, by_layer, by_position, speed, memory, operators, delegation, instructions,
    float_weights, gated, reproduce,
)  # fmt: skip


def report(bundles: Sequence[Path], results: Sequence[Path] = ()) -> str:
    """The HTML page on one or several bundles, each a folder or an archive, with the measurements
    in them and those in `results`. Raises InputError."""
    return page(read_subjects(bundles, results))


def page(subjects: Sequence[Subject]) -> str:
    """The HTML page on these bundles."""
    # Every text is made printable and escaped here; only our own SVG and style are Markup.
    environment = Environment(
        autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    folder = resources.files("exporter.report")
    return environment.from_string((folder / "page.html").read_text("utf-8")).render(
        style=Markup((folder / "page.css").read_text("utf-8")),
        title=_title(subjects),
        cards=[card(subject) for subject in subjects],
        comparison=comparison(subjects) if len(subjects) > 1 else None,
        sections=sections(subjects),
    )


def _title(subjects: Sequence[Subject]) -> str:
    names = " and ".join(dict.fromkeys(subject.name for subject in subjects))
    return names if len(subjects) == 1 else f"{names} ({len(subjects)} bundles)"


def _shown(value: object) -> object:
    return value if isinstance(value, Markup) else printable(str(value))


def sections(subjects: Sequence[Subject]) -> list[Section]:
    """Every topic after the summary."""
    return [topic(subjects) for topic in TOPICS]
