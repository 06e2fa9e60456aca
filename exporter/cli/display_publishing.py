"""What `mobilellm publish` wrote, or would write."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.markup import escape

from exporter.cli import display

if TYPE_CHECKING:  # it loads torch
    from exporter.publishing.publish import Published


def print_published(published: "Published", as_json: bool) -> None:
    """Print the destination, the files with their sizes, and the licence."""
    total = sum(published.files.values())
    done = bool(published.reference)
    if as_json:
        display.print_json({**asdict(published), "bytes": total, "published": done})
        return
    table = display.table("file", "bytes")
    table.columns[1].justify = "right"
    for name, size in published.files.items():
        table.add_row(escape(name), f"{size:,}")
    display.wide.print(table)
    whole = f"{display.megabytes(total)} in {len(published.files):,} files"
    facts = {"size": whole, "licence": published.licence}
    state = published.reference or "no: this was a dry run; --yes publishes it"
    display.print_facts(published.destination, {**facts, "published": state})
