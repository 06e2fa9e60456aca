"""Write the rows that the client tests have shown into docs/clients.md.

    make clients

With --check, fail if a row of the page was not shown, in whatever version of the client.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients.rows import ROOT, ROWS

PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- rows: written by tests/clients/table.py -->\n", "<!-- end of rows -->\n"
COLUMNS = ("client", "version", "model", "target", "what was run", "what it needs", "command")


def shown() -> list[dict[str, str]]:
    """The rows, each once with what was shown last, in alphabetical order."""
    rows = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        rows[row["client"], row["model"], row["target"]] = row
    return [rows[key] for key in sorted(rows, key=str)]


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells = [
            row["client"], row["version"], row["model"], f"`{row['target']}`", row["ran"],
            row["needs"], f"`pytest {row['test']}`",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def listed(page: str) -> set[tuple[str, ...]]:
    """Client, model and target of each row of the page."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    cells = [re.split(r" ?\| ?", line)[1:-1] for line in inside.splitlines()[2:]]
    return {(row[0], row[2], row[3].strip("`")) for row in cells}


def main() -> int:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description="Write or check the rows of docs/clients.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a row is gone")
    arguments = parser.parse_args()
    page, rows = PAGE.read_text(), shown()
    if arguments.check:
        missing = listed(page) - {(row["client"], row["model"], row["target"]) for row in rows}
        for row in sorted(missing):
            print("not shown:", *row, sep=" | ", file=sys.stderr)
        return int(bool(missing))
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
