"""Display the verdict of a gate."""

from rich.markup import escape

from exporter.cli import display
from exporter.gate.gate import Verdict
from exporter.gate.outputs import as_json as verdict_as_json


def print_verdict(verdict: Verdict, as_json: bool) -> None:
    """Print every finding with its limit, and the sum."""
    if as_json:
        display.print_json(verdict_as_json(verdict))
        return
    table = display.table("", "target", "device", "figure", "value", "limit", "against", "note")
    for column in table.columns[4:6]:
        column.justify = "right"
    for finding in verdict.findings:
        cells = (
            finding.target or "", finding.device or "", finding.name, finding.shown_value(),
            finding.shown_limit(), finding.against, finding.note,
        )  # fmt: skip
        mark = "[green]✓[/]" if finding.passed else "[red]✗[/]"
        table.add_row(mark, *map(escape, cells))
    display.wide.print(table)
    for note in verdict.notes:
        display.out.print(f"[dim]{escape(note)}[/]")
    broken = sum(not finding.passed for finding in verdict.findings)
    total = len(verdict.findings)
    if broken:
        display.out.print(f"[bold red]{broken} of {total} limits broken[/]")
    else:
        display.out.print(f"[bold green]all {total} limits hold[/]")
