"""Instructions that an Arm CPU executes for each token, and the bytes that they load and store:
counts under emulation, never times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from exporter.report.blocks import Figure, Missing, Section, Table
from exporter.report.plots import Bar, Style, Text, bars, listed
from exporter.report.reproduce import count_command
from exporter.report.subjects import Subject
from exporter.report.values import count, number, share

#: Counted phases of a page: more cannot be read.
_MOST = 40
#: Phases whose functions are shown.
_PLOTS = 12
#: Functions in a plot and in a table; the rest is one row.
_DRAWN, _LISTED = 8, 30
_AXIS = "million instructions a token (no time)"
_BYTES = "MB a token (no time)"


@dataclass(frozen=True)
class Counted:
    """One counted phase of one target on one CPU."""

    subject: Subject
    target: str
    cpu: str
    phase: str
    content: Mapping[str, Any]

    @property
    def label(self) -> str:
        """What was counted."""
        return f"{self.subject.case(self.target)}, {self.cpu}, {self.phase}"


def counted(subjects: Sequence[Subject]) -> list[Counted]:
    """The counted phases: prefills, then decode steps, of each CPU."""
    found = list[Counted]()
    for subject in subjects:
        for content in subject.counts():
            for cpu in content["counts"]:
                for entry in cpu["prefill"]:
                    phase = f"prefill {entry['from']} → {entry['to']}"
                    found.append(Counted(subject, content["target"], cpu["cpu"], phase, entry))
                for entry in cpu["decode"]:
                    phase = f"decode at {entry['depth']}"
                    found.append(Counted(subject, content["target"], cpu["cpu"], phase, entry))
    return found[:_MOST]


def instructions(subjects: Sequence[Subject]) -> Section:
    """The section: totals, then the functions of each phase."""
    found = counted(subjects)
    figures = [_totals(found)] if found else []
    if sized := [one for one in found if "bytes" in one.content]:
        figures.append(_traffic(sized))
    figures += [_functions(one, place) for place, one in enumerate(found[:_PLOTS])]
    notes = [
        "Counted under emulation: the same in every run, whatever else the machine does. A count "
        "is not a time: instructions differ in cost, and memory is not modelled. “prefill 64 → "
        "128” is a prompt of 128 tokens less one of 64; “decode at 16” starts with 16 tokens in "
        "the cache.",
        *(
            [f"The functions of {len(found) - _PLOTS} more are left out."]
            if len(found) > _PLOTS
            else []
        ),
    ]
    missing = [
        Missing(f"{subject.title}: no instructions are counted.", [count_command()])
        for subject in subjects
        if not subject.counts()
    ]
    return Section(
        "instructions", "Instructions of an Arm CPU", notes if found else (), figures,
        [_emulators(subjects)] if found else [], missing=missing,
    )  # fmt: skip


def _totals(found: Sequence[Counted]) -> Figure:
    rows = [
        Bar(
            one.label,
            [(one.content["per_token"] / 1e6, one.subject.style(one.target))],
            f"{one.content['per_token'] / 1e6:,.2f} M",
        )
        for one in found
    ]
    text = Text(
        "instructions-totals",
        "Instructions per token (counts)",
        f"Bars of millions of instructions: {listed(rows)}.",
        _AXIS,
    )  # fmt: skip
    cells = []
    for one in found:
        total, classes = one.content["per_token"], one.content["classes"]
        parts = (share(classes[key] / total if total else None)
                 for key in ("simd", "dot_product", "i8mm"))  # fmt: skip
        cells.append((one.label, count(total), *parts))
    columns = ("model, CPU and phase", "instructions per token", "vector arithmetic",
               "of it dot products", "int8 matrix products")  # fmt: skip
    table = Table(text.title, columns, cells)
    return Figure(text.title, partial(bars, text, rows), table)


def _traffic(found: Sequence[Counted]) -> Figure:
    """The bytes of loads and stores, which files of earlier versions do not have."""
    ways = [one.content["bytes"] for one in found]
    rows = [
        Bar(
            one.label,
            [((of["loaded"] + of["stored"]) / 1e6, one.subject.style(one.target))],
            f"{_least(of)}{of['loaded'] / 1e6:,.1f} + {of['stored'] / 1e6:,.1f} MB",
        )
        for one, of in zip(found, ways, strict=True)
    ]
    text = Text(
        "instructions-bytes",
        "Bytes loaded and stored per token (counts)",
        f"Bars of megabytes, loaded and stored: {listed(rows)}.",
        _BYTES,
    )  # fmt: skip
    cells = [
        (one.label, *(f"{_least(of)}{count(of[way])}" for way in ("loaded", "stored")),
         count(of["unsized"]))
        for one, of in zip(found, ways, strict=True)
    ]  # fmt: skip
    columns = ("model, CPU and phase", "bytes loaded per token", "bytes stored per token",
               "accesses of unknown size")  # fmt: skip
    note = "What load and store instructions ask for, from caches or from memory."
    return Figure(
        text.title, partial(bars, text, rows), Table(text.title, columns, cells, note=note)
    )


def _least(of: Mapping[str, float]) -> str:
    return "at least " if of["unsized"] else ""


def _functions(one: Counted, place: int) -> Figure:
    total = one.content["per_token"]
    rows = [row for row in one.content["functions"] if number(row, "per_token")]
    drawn = [
        Bar(_name(row), [(row["per_token"] / 1e6, Style(0))], share(_part(row, total)))
        for row in rows[:_DRAWN]
        if row["per_token"] > 0
    ]
    rest = sum(row["per_token"] for row in rows[_DRAWN:])
    if rest > 0:
        others = f"{len(rows) - _DRAWN} others"
        drawn.append(Bar(others, [(rest / 1e6, Style(1))], share(rest / total if total else None)))
    text = Text(
        f"instructions-{place}",
        f"Functions of {one.label} (counts)",
        "Bars of the instructions of each function. A name after “near” is that of the nearest "
        "symbol before the code.",
        _AXIS,
    )
    listed = [
        (
            _name(row),
            row["library"],
            count(row["per_token"]),
            share(_part(row, total)),
            *(count(row[way]) if way in row else "–" for way in ("loaded", "stored")),
        )
        for row in rows[:_LISTED]
    ]
    note = f"{len(rows) - _LISTED} more functions are left out." if len(rows) > _LISTED else ""
    columns = ("function", "library", "instructions per token", "share", "bytes loaded",
               "bytes stored")  # fmt: skip
    table = Table(text.title, columns, listed, 2, note=note)
    return Figure(text.title, partial(bars, text, drawn), table)


def _name(row: Mapping[str, Any]) -> str:
    return f"near {row['function']}" if row["near"] else row["function"]


def _part(row: Mapping[str, Any], total: float) -> float | None:
    return row["per_token"] / total if total else None


def _emulators(subjects: Sequence[Subject]) -> Table:
    rows = []
    for subject in subjects:
        for content in subject.counts():
            runner = content["runner"]
            versions = ", ".join(f"{k} {v}" for k, v in runner["versions"].items())
            rows.append(
                (subject.case(content["target"]), content["emulator"],
                 f"{runner['name']} ({versions})", count(content["context"]))
            )  # fmt: skip
    columns = ("model", "emulator", "runner", "context (tokens)")
    return Table("Emulators and runners", columns, list(dict.fromkeys(rows)), 3)
