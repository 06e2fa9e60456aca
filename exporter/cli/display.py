"""Output of the command line: tables and JSON on stdout, progress and errors on stderr."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from exporter.errors import printable

#: The interval of progress lines, in seconds, if stderr is not a terminal.
_SECONDS_BETWEEN_LINES = 30


class _Console(Console):
    """A console for text with names of foreign files: what would steer the terminal is escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string to a `Text`; rich calls it for everything that is printed."""
        return super().render_str(printable(text, lines=True), **options)


out = _Console(soft_wrap=True)
err = _Console(stderr=True, soft_wrap=True)
#: For tables. Names are never truncated; the terminal wraps long lines.
wide = _Console(width=400)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the style of all tables."""
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


class Clock:
    """Wall time of a block, and the peak memory of this process."""

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._started

    def figures(self) -> dict[str, float]:
        """Wall time in seconds and peak memory in bytes, for JSON."""
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"seconds": round(self._seconds, 3), "peak_rss_bytes": peak}

    def facts(self) -> dict[str, str]:
        """The same for `print_facts`."""
        figures = self.figures()
        memory = megabytes(int(figures["peak_rss_bytes"]))
        return {"took": f"{figures['seconds']:.1f} s, peak memory {memory}"}


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """Show progress on stderr: one bar per stage, or a line now and then without a terminal.

    Yields ``show(stage, done, total, note="")``.
    """
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        tasks, said = dict[str, Any](), dict[str, float]()

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if not err.is_terminal:
                now = time.monotonic()
                if stage not in said:
                    said[stage] = now
                    err.print(f"{stage} … {'' if done else note}".rstrip())
                elif now - said[stage] >= _SECONDS_BETWEEN_LINES:
                    said[stage] = now
                    err.print(f"{stage}: {done} of {total} {note}")
                return
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield show


def print_json(content: dict[str, Any]) -> int:
    """Print one JSON object (RFC 8259) in ASCII, which every stream takes and no terminal obeys.

    Infinity and NaN, which JSON does not have, become null.
    """
    plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _name: None)
    print(json.dumps(plain, allow_nan=False))
    return 0


def print_facts(title: str, facts: dict[str, str]) -> None:
    """Print a title, and a line per fact below it."""
    out.print(f"[bold]{escape(title)}[/]")
    width = max(map(len, facts))
    for key, value in facts.items():
        out.print(f"  {key:<{width}}  {escape(value)}")


def figure(value: float | None) -> str:
    """A number with 4 significant digits, '' for None."""
    return "" if value is None else f"{value:.4g}"


def megabytes(size: int) -> str:
    """A number of bytes in MB (10^6)."""
    return f"{size / 1e6:,.1f} MB"


def print_findings(findings: Sequence[Any], fine: bool, as_json: bool) -> None:
    """The findings of `mobilellm doctor`."""
    if as_json:
        print_json({"fine": fine, "findings": [asdict(finding) for finding in findings]})
        return
    rows = table("", "package", "found", "required", "install with")
    for finding in findings:
        mark = "[green]✓[/]" if finding.fine else "[red]✗[/]" if finding.required else "–"
        cells = finding.subject, finding.found, finding.wanted, finding.remedy
        rows.add_row(mark, *map(escape, cells))
    wide.print(rows)
