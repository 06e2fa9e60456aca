"""What a report consists of: sections with notes, tables, figures and commands, as plain data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

#: The most columns of a table that stands beside a figure.
_NARROW = 6


@dataclass(frozen=True)
class Table:
    """A table with a caption. The first cell of each row names the row.

    The columns from `numbers` on align right. A `folded` table is closed until the reader opens it;
    `note` says what is left out.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1
    folded: bool = False
    note: str = ""

    @property
    def wide(self) -> bool:
        """Whether the table needs the whole width of a desktop's page."""
        return len(self.columns) > _NARROW


@dataclass(frozen=True)
class Figure:
    """A plot, and the same data as a table. `draw` returns an ``svg`` element with this title."""

    title: str
    draw: Callable[[], Markup]
    table: Table


@dataclass(frozen=True)
class Missing:
    """What is not measured, and the commands that measure it."""

    what: str
    commands: Sequence[str]


@dataclass(frozen=True)
class Section:
    """One topic; `name` is its anchor."""

    name: str
    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = ()
    missing: Sequence[Missing] = ()
