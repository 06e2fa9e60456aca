"""Every weight that is left in float, and why."""

import math
from collections.abc import Sequence

from exporter.bundle.manifest import WeightEntry
from exporter.report.blocks import Section, Table
from exporter.report.subjects import Subject
from exporter.report.values import count

_COLUMNS = ("weight", "shape", "parameters", "bytes", "reason")


def float_weights(subjects: Sequence[Subject]) -> Section:
    """The section: the reasons, then every weight by name."""
    tables, notes = list[Table](), list[str]()
    for subject in subjects:
        found = {name: entry for name, entry in subject.manifest.weights.items() if entry.reason}
        parameters = sum(_parameters(entry) for entry in found.values())
        part = parameters / max(1, subject.manifest.model.parameters)
        notes.append(
            f"{subject.title}: {len(found)} of {len(subject.manifest.weights)} weights, "
            f"{part:.2%} of the parameters. Every other weight is stored as integers."
        )
        if not found:
            continue
        tables.append(_reasons(subject, found))
        rows = [
            (name, " × ".join(map(str, entry.shape)), count(_parameters(entry)),
             count(entry.bytes), entry.reason)
            for name, entry in found.items()
        ]  # fmt: skip
        caption = f"Every weight left in float, {subject.title}"
        tables.append(Table(caption, _COLUMNS, rows, 5, folded=True))
    return Section("float", "Weights left in float", notes, tables=tables)


def _reasons(subject: Subject, found: dict[str, WeightEntry]) -> Table:
    """The weights by reason; N stands for the number of a layer."""
    groups = dict[tuple[str, str], list[WeightEntry]]()
    for name, entry in found.items():
        pattern = ".".join("N" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((pattern, entry.reason), []).append(entry)
    rows = [
        (pattern, reason, count(len(entries)),
         count(sum(map(_parameters, entries))), count(sum(entry.bytes for entry in entries)))
        for (pattern, reason), entries in groups.items()
    ]  # fmt: skip
    return Table(
        f"Weights left in float by reason, {subject.title}",
        ("weights", "reason", "number", "parameters", "bytes"),
        rows,
        2,
    )


def _parameters(entry: WeightEntry) -> int:
    return math.prod(entry.shape)
