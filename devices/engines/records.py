"""Records: what a runner measured, one for each phase.

A record has its ``phase`` and the raw samples in milliseconds in ``ms``. ``within_ms`` is the error
of a coarse clock. Only what is listed here is kept of a runner's line, and only in its type.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices.answers import contained, is_number, is_whole, parse_json
from devices.errors import DeviceError
from devices.text import printable
from devices.transports.supervised import Completed

Record = dict[str, Any]

PHASES = (
    "start", "load", "warmup", "prefill", "decode", "sustained", "generate", "execute", "end",
)  # fmt: skip
_WHOLE = ("depth", "filled", "steps", "context", "vocab_size")
#: What a load did with the file of packed weights.
_PACKED = ("written", "read")
_TIMES = ("within_ms", "first_token_ms", "first_ms", "p95_ms", "fill_ms")
#: In bytes; -1 where the system does not tell.
_MEMORY = ("peak_rss", "rss", "anonymous", "file", "pss")


@contained("runner", "its output")
def read_records(done: Completed) -> list[Record]:
    """Parse the output of the native or the Python runner: a JSON object for each phase.

    Raises DeviceError, also where the last line is missing: then the run did not end, whatever its
    exit code.
    """
    done.check(done.argv[-1] if len(done.argv) == 1 else Path(done.argv[0]).name)
    records = []
    for line in done.text.splitlines():
        if not line.startswith("{"):
            continue
        if not line.endswith("}"):
            raise DeviceError("runner", f"printed {line[:60]!r}, which is cut off")
        records.append(check_record(parse_json(line, "runner")))
    if not records or records[-1]["phase"] != "end":
        raise DeviceError("runner", "stopped without its last line", "Nothing of this run counts")
    return records[:-1]


@contained("runner", "a record")
def check_record(said: object) -> Record:
    """What is known of a record, without its other keys. Raises DeviceError where it is none, and
    where its samples are not finite times from 0."""
    phase = said.get("phase") if isinstance(said, Mapping) else None
    if not isinstance(said, Mapping) or phase not in PHASES:
        shown = printable(str(said), 60)
        raise DeviceError("runner", f"printed {shown}, which is not the record of a phase")
    times = said.get("ms", [] if phase == "end" else None)
    if not isinstance(times, list) or not all(is_number(ms) for ms in times):
        raise DeviceError("runner", f"gives invalid times for {phase}")
    record: Record = {"phase": phase}
    for key, value in said.items():
        if key == "tokens":
            listed = phase == "generate" and isinstance(value, list)
            fine = all(map(is_whole, value)) if listed else is_whole(value)
        elif key in _WHOLE:
            fine = is_whole(value) or value is None
        elif key in _TIMES:
            fine = is_number(value)
        elif key == "packed":
            fine = value in _PACKED
        elif key == "memory":
            fine = isinstance(value, dict) and all(is_whole(size, -1) for size in value.values())
        else:
            continue
        if not fine:
            raise DeviceError("runner", f"gives the invalid {key} {printable(str(value), 60)}")
        record[key] = {k: value.get(k, -1) for k in _MEMORY} if key == "memory" else value
    return record if phase == "end" else {**record, "ms": times}
