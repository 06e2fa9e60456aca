"""The time of each operator, and which of them ran in a delegate."""

from collections.abc import Iterator, Sequence
from functools import partial

from exporter.report.blocks import Figure, Missing, Section, Table
from exporter.report.plots import Bar, Style, Text, bars
from exporter.report.reproduce import profile_command
from exporter.report.speed import MACHINES, Session, complete, session_label
from exporter.report.subjects import Subject
from exporter.report.values import count, figure, share

#: Plots of a page.
_PLOTS = 12
#: Operators in a plot and in a table; the rest is one row.
_DRAWN, _LISTED = 8, 40
_DELEGATED, _NOT_DELEGATED = "in a delegate or an optimized kernel", "in an ordinary kernel"


def _traced(subjects: Sequence[Subject]) -> list[Session]:
    return [one for one in complete(subjects) if one[1]["operators"]]


def _untraced(subjects: Sequence[Subject]) -> Iterator[Missing]:
    traced = {
        (id(subject), session["artifact"]["format"]) for subject, session in _traced(subjects)
    }
    for subject in subjects:
        left = [name for name in subject.manifest.targets if (id(subject), name) not in traced]
        if left:
            what = f"{subject.title}: the operators of {', '.join(left)} are not traced."
            yield Missing(what, [profile_command()])


def operators(subjects: Sequence[Subject]) -> Section:
    """The section: a plot and a table for each session."""
    traced = _traced(subjects)
    figures = [_figure(one, number) for number, one in enumerate(traced[:_PLOTS])]
    notes = [
        "The share of the time that all operators took in a traced run. Each row counts only the "
        "time that no other row counts. Emulated times are marked.",
        *([f"{len(traced) - _PLOTS} more sessions are left out."] if len(traced) > _PLOTS else []),
    ]
    return Section(
        "operators", "Time of each operator", notes if figures else (), figures,
        missing=list(_untraced(subjects)),
    )  # fmt: skip


def _figure(one: Session, number: int) -> Figure:
    session = one[1]
    rows = session["operators"]
    drawn = [
        Bar(
            row["name"],
            [(100 * row["share"], Style(0 if row["delegate"] else 1))],
            share(row["share"]),
        )
        for row in rows[:_DRAWN]
    ]
    rest = sum(row["share"] for row in rows[_DRAWN:])
    if rest:
        drawn.append(Bar(f"{len(rows) - _DRAWN} others", [(100 * rest, Style(2))], share(rest)))
    mark = "" if session["kind"] == "real" else f" ({session['kind']})"
    text = Text(
        f"operators-{number}",
        f"Operators of {session_label(one)}{mark}",
        f"Bars of the share of each operator. {MACHINES[session['kind']].capitalize()}.",
        "% of the time of all operators",
    )
    legend = [(_DELEGATED, Style(0)), (_NOT_DELEGATED, Style(1))]
    listed = [
        (row["name"], row["delegate"] or "none", count(row["calls"]),
         figure(row["milliseconds"]), share(row["share"]))
        for row in rows[:_LISTED]
    ]  # fmt: skip
    note = f"{len(rows) - _LISTED} more operators are left out." if len(rows) > _LISTED else ""
    columns = ("operator", "delegate or optimized kernel", "calls", "ms", "share")
    table = Table(text.title, columns, listed, 2, note=note)
    return Figure(text.title, partial(bars, text, drawn, legend), table)


def delegation(subjects: Sequence[Subject]) -> Section:
    """The section: whether every matrix product ran where it should."""
    rows, lost = list[tuple[str, ...]](), list[tuple[str, ...]]()
    for one in _traced(subjects):
        session = one[1]
        products = [row for row in session["operators"] if row["product"]]
        inside = [row for row in products if row["delegate"]]
        delegated = sum(row["share"] for row in session["operators"] if row["delegate"])
        outside = session["undelegated"]
        rows.append(
            (session_label(one), "passed" if not outside else f"FAILED: {len(outside)}",
             f"{len(inside)} of {len(products)}",
             f"{sum(row['calls'] for row in inside):,} of "
             f"{sum(row['calls'] for row in products):,}", share(delegated))
        )  # fmt: skip
        lost += [(session_label(one), line) for line in outside]
    tables = list[Table]()
    if rows:
        columns = ("model and device", "audit", "products in a delegate", "their calls",
                   "time in delegates")  # fmt: skip
        tables.append(Table("Delegation of matrix products", columns, rows, 2))
    if lost:
        caption, outside_columns = "Matrix products outside of delegates", ("model", "product")
        tables.append(Table(caption, outside_columns, lost, 2))
    notes = [
        "A matrix product should run in a delegate or in an optimized integer kernel. The audit "
        "fails for each that does not."
    ]
    return Section(
        "delegation", "Delegation audit", notes if tables else (), tables=tables,
        missing=[] if tables else list(_untraced(subjects)),
    )  # fmt: skip
