"""What the command line shows: tables and JSON on stdout, progress and errors on stderr."""

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

#: Where stderr is no terminal, long work says how far it is this often.
_SECONDS_BETWEEN_LINES = 30

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
#: For tables: names are never cut off, the terminal wraps what is too long for it.
wide = Console(highlight=False, width=400)


def table(*columns: str, title: str | None = None) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


class Clock:
    """Wall time of a block, and the peak memory of this process."""

    def __enter__(self) -> "Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._started

    def figures(self) -> dict[str, float]:
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"seconds": round(self._seconds, 3), "peak_rss_bytes": peak}

    def facts(self) -> dict[str, str]:
        figures = self.figures()
        memory = megabytes(int(figures["peak_rss_bytes"]))
        return {"took": f"{figures['seconds']:.1f} s, peak memory {memory}"}


@contextmanager
def progress() -> Iterator[Callable[..., None]]:
    """A bar on stderr for each stage, with its note; now and then a line where stderr is no
    terminal."""
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
    """As RFC 8259 has it, which knows neither infinity nor NaN: null, for jq and for JavaScript."""
    plain = json.loads(json.dumps(content, default=str), parse_constant=lambda _name: None)
    print(json.dumps(plain, ensure_ascii=False, allow_nan=False))
    return 0


def print_facts(title: str, facts: dict[str, str]) -> None:
    out.print(f"[bold]{escape(title)}[/]")
    width = max(map(len, facts))
    for key, value in facts.items():
        out.print(f"  {key:<{width}}  {escape(value)}")


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def print_findings(findings: Sequence[Any], fine: bool, as_json: bool) -> None:
    """What `mobilellm doctor` found."""
    if as_json:
        print_json({"fine": fine, "findings": [asdict(finding) for finding in findings]})
        return
    rows = table("", "what", "found", "wanted", "to get it")
    for finding in findings:
        mark = "[green]✓[/]" if finding.fine else "[red]✗[/]" if finding.required else "–"
        cells = finding.subject, finding.found, finding.wanted, finding.remedy
        rows.add_row(mark, *map(escape, cells))
    wide.print(rows)
