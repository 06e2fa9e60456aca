"""Instructions that an Arm CPU executes for a token, and bytes that they load and store, by
function, counted under emulation.

QEMU runs the native runner, and a plugin of ours (`blocks.c`) counts how often each block of code
is executed. Two runs that differ in the number of tokens are subtracted, so that loading and
packing fall out. A count is no time: instructions differ in cost, and nothing models the memory.

A CPU is named like a device, ``count:cortex-a76``, but it has no transport and no session.

`tools` builds the plugin and what the emulated program needs besides, `emulation` makes one run,
`symbols` finds the function of a block, and `counter` makes the counts (`schema.json`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices.errors import BadDeviceError
from devices.json_schema import check_schema

#: How the names of these devices begin.
COUNT = "count"


def parse_cpu(text: str) -> str | None:
    """The CPU of ``count:CPU``, and None for any other device. Raises BadDeviceError."""
    kind, _, cpu = text.partition(":")
    if kind != COUNT:
        return None
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", cpu):
        raise BadDeviceError(
            f"--device {text}", "names no CPU", f"Give {COUNT}:CPU, such as {COUNT}:cortex-a76"
        )
    return cpu


def schema() -> dict[str, Any]:
    """The JSON schema of the counts of a model."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text())
    return content


def validate(counts: Mapping[str, Any]) -> None:
    """Raise BadDeviceError, with the path in them, where counts do not follow the schema."""
    check_schema(counts, schema())
