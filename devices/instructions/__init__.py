"""Instructions that an Arm CPU executes for a token, by function, counted under emulation.

QEMU runs the native runner, and a plugin of ours (`blocks.c`) counts how often each block of code
is executed. Two runs that differ in the number of tokens are subtracted, so that loading and
packing fall out. A count is no time: instructions differ in cost, and nothing models the memory.

`tools` builds the plugin and what the emulated program needs besides, `emulation` makes one run,
`symbols` finds the function of a block, and `counter` makes the counts (`schema.json`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices.report import check_schema


def schema() -> dict[str, Any]:
    """The JSON schema of the counts of a model."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text())
    return content


def validate(counts: Mapping[str, Any]) -> None:
    """Raise BadDeviceError, with the path in them, where counts do not follow the schema."""
    check_schema(counts, schema())
