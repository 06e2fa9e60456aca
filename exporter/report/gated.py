"""All figures that `mobilellm gate` can judge, with the names that a budget has for them."""

from collections.abc import Iterator, Sequence

from exporter.errors import InputError
from exporter.gate.figures import collect
from exporter.gate.quantities import show
from exporter.report.blocks import Missing, Section, Table
from exporter.report.subjects import Subject

#: Rows of one table: more cannot be read.
_MOST = 500


def gated(subjects: Sequence[Subject]) -> Section:
    """The section: a table for each bundle."""
    tables, missing = list[Table](), list[Missing]()
    for subject in subjects:
        try:
            rows = list(_rows(subject))
        except InputError as error:
            missing.append(Missing(f"{subject.title}: no figure can be judged. {error}", []))
            continue
        note = f"{len(rows) - _MOST} more figures are left out." if len(rows) > _MOST else ""
        columns = ("figure", "target", "device or CPU", "conditions", "judged", "value")
        caption = f"All figures, {subject.title}"
        tables.append(Table(caption, columns, rows[:_MOST], 5, folded=True, note=note))
    notes = [
        "Every figure that a limit of mobilellm gate can judge, or that can be compared with a "
        "baseline. Conditions are those under which figures can be compared."
    ]
    return Section("figures", "All figures", notes, tables=tables, missing=missing)


def _rows(subject: Subject) -> Iterator[tuple[str, ...]]:
    for one in collect(subject.manifest, subject.results).figures:
        conditions = ", ".join(
            f"{name} {value[:12] if name == 'data' else value}"
            for name, value in one.conditions.items()
        )
        yield (
            one.name, one.target or "–", one.device or "–", conditions or "–",
            f"no: {one.unusable}" if one.unusable else "yes", show(one.value, one.unit),
        )  # fmt: skip
