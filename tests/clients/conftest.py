"""What a client test has run becomes a row of docs/clients.md.

python -m pytest tests/clients && python tests/clients/table.py
"""

from functools import partial

import pytest

from clients.rows import Shown, record


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Shown:
    """Call it at the end of a test, with the arguments of `record`."""
    return partial(record, request.path)
