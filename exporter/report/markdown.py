"""The tables of a report as Markdown, for a model card or the summary of a CI job."""

import re
from collections.abc import Sequence
from pathlib import Path

from exporter.errors import printable
from exporter.report.blocks import Table
from exporter.report.page import sections
from exporter.report.subjects import Subject, read_subjects
from exporter.report.summary import card, comparison

#: What Markdown or HTML would read as markup, and what a forge would read as a mention.
_MARKUP = re.compile(r"[\\`*_\[\]<>|$~#]")
_SECTIONS = ("size", "quality", "speed", "memory", "delegation", "instructions", "float")


def markdown(bundle: Path, results: Sequence[Path] = ()) -> str:
    """The tables on one bundle, a folder or an archive. Raises InputError."""
    return tables(read_subjects([bundle], results))


def tables(subjects: Sequence[Subject]) -> str:
    """The tables on these bundles: the summary, then those of each topic with data."""
    parts = list[str]()
    if len(subjects) > 1:
        parts += ["## Comparison", _table(comparison(subjects))]
    for subject in subjects:
        summary = card(subject)
        parts += [f"## {_escaped(summary.title)}", _table(Table("", ("", ""), summary.facts, 2))]
        rows = [
            (group, line.name, line.value, line.how)
            for group, lines in summary.headlines.items()
            for line in lines
        ]
        parts.append(_table(Table("", ("model", "figure", "value", "how"), rows, 4)))
        checks = [
            ("checked" if checked else "not checked", what) for checked, what in summary.checks
        ]
        parts.append(_table(Table("", ("for this report", "what"), checks, 2)))
    for section in sections(subjects):
        if section.name in _SECTIONS:
            found = [figure.table for figure in section.figures if section.name == "size"]
            found += [table for table in section.tables if not table.folded]
            if found:
                parts.append(f"### {_escaped(section.title)}")
                parts += [_table(table) for table in found]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    """A table in GitHub's form. What a cell holds is shown as it is."""
    rule = ["---:" if place >= table.numbers else "---" for place in range(len(table.columns))]
    lines = [list(map(_escaped, table.columns)), rule]
    lines += [list(map(_escaped, row)) for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    title = f"**{_escaped(table.caption)}**\n\n" if table.caption else ""
    return f"{title}{body}" + (f"\n\n{_escaped(table.note)}" if table.note else "")


def _escaped(text: str) -> str:
    """The text as Markdown that shows it as it is, on one line."""
    shown = _MARKUP.sub(r"\\\g<0>", printable(text).replace("&", "&amp;"))
    return shown.replace("@", "&#64;")
