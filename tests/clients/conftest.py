"""What a client test ran becomes a row of docs/clients.md.

python -m pytest tests/clients && python tests/clients/table.py
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: One line of JSON for each row that a test has shown.
ROWS = ROOT / "build" / "clients.jsonl"

Shown = Callable[..., None]


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Shown:
    """shown(client=, version=, model=, target=, ran=, needs="") records a row, at the end of a test
    that passed so far: the client, the model, and what was run."""

    def record(
        *, client: str, version: str, model: str, target: str, ran: str, needs: str = ""
    ) -> None:
        row = {
            "client": client, "version": version, "model": model, "target": target, "ran": ran,
            "needs": needs, "test": str(request.path.relative_to(ROOT)),
        }  # fmt: skip
        ROWS.parent.mkdir(exist_ok=True)
        line = os.open(ROWS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(line, (json.dumps(row) + "\n").encode())
        finally:
            os.close(line)

    return record
