"""The rows of docs/clients.md, and the prompts that every client is given."""

import json
import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: One line of JSON for each row that a test has shown.
ROWS = ROOT / "build" / "clients.jsonl"

#: shown(client=, version=, model=, target=, ran=, needs=""): see `record`.
Shown = Callable[..., None]

#: Problems of the kind that the demo checkpoint solves.
PROMPTS = (
    "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?",
    "Ben has 30 coins. Ben loses 4. How many coins does Ben have now?",
    "Cleo has 8 apples. Cleo buys 15 more. How many apples does Cleo have now?",
    "Dan has 21 books. Dan finds 9 more. Dan sells 13. How many books does Dan have now?",
    "Eva has 5 pens. Eva buys 6 more. Eva finds 7 more. How many pens does Eva have now?",
)


def record(
    test: Path, *, client: str, version: str, model: str, target: str, ran: str, needs: str = ""
) -> None:
    """Append the row that `test` has shown: a client, and the `model` that it ran as `target`.

    `ran` says what was run and compared, `needs` what the client needs besides the folder.
    """
    row = {
        "client": client, "version": version, "model": model, "target": target, "ran": ran,
        "needs": needs, "test": test.relative_to(ROOT).as_posix(),
    }  # fmt: skip
    ROWS.parent.mkdir(exist_ok=True)
    file = os.open(ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(row) + "\n").encode())  # one write: tests run side by side
    finally:
        os.close(file)
