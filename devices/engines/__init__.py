"""What runs a model on a device: which files it needs there, and what is typed.

`native` is our C++ runner, `python` its twin for runtimes with a Python package, `official` the
programs that ExecuTorch and ONNX Runtime ship. All give the same records: one for each phase,
with its raw samples in milliseconds, and `within_ms` where a coarse clock read them.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from devices.errors import DeviceError
from devices.transports.supervised import Completed

Record = dict[str, Any]


#: The formats that there is an engine for.
Format = Literal["executorch", "onnx", "coreml"]
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Model:
    """An artifact as a device sees it.

    `files` lie in `folder`; `main` is what the runtime opens, one of them or a folder of them.
    `portable` says that core operators suffice, `integers` that products of weights are meant to
    work on integers. `tokens` is text for prompts; `texts` has it as text, by length.
    """

    format: Format
    folder: Path
    main: str
    files: tuple[str, ...]
    context: int
    portable: bool
    integers: bool
    tokens: tuple[int, ...]
    tokenizer: Path | None = None
    texts: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What one run does. `prompts` and `depths` are tokens, `sustained` seconds."""

    prompts: Sequence[int] = ()
    depths: Sequence[int] = ()
    steps: int = 32
    warmup: int = 0
    threads: int = 1
    sustained: int = 0
    generate: int = 0
    prompt_length: int = 0
    trace: str = ""
    logits: str = ""


@dataclass(frozen=True)
class Engine:
    """`files`: place on the device → file here. `commands` of a plan are run one after the other;
    `records` reads what one printed. `can` names what it can do beside prefill and decode."""

    name: str
    versions: Mapping[str, str]
    files: Mapping[str, Path]
    commands: Callable[[Plan], list[list[str]]]
    records: Callable[[Completed], list[Record]]
    can: frozenset[str] = frozenset()


def options(plan: Plan) -> list[str]:
    """A plan as our runners take it."""
    words: list[str] = []
    for name, value in (
        ("threads", plan.threads),
        ("warmup", plan.warmup),
        ("prompts", ",".join(map(str, plan.prompts))),
        ("depths", ",".join(map(str, plan.depths))),
        ("steps", plan.steps),
        ("sustained", plan.sustained),
        ("generate", plan.generate),
        ("prompt-length", plan.prompt_length),
        ("trace", plan.trace),
        ("logits", plan.logits),
    ):
        if value:
            words += [f"--{name}", str(value)]
    return words


def read_records(done: Completed) -> list[Record]:
    """The lines of our runners. Without the last one the run did not end, whatever its code.
    Raises DeviceError."""
    done.check(done.argv[-1] if len(done.argv) == 1 else Path(done.argv[0]).name)
    records = []
    for line in done.text.splitlines():
        if not line.startswith("{"):
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DeviceError("runner", f"printed {line[:60]!r}, which is cut off") from error
        if not isinstance(record, dict) or not isinstance(record.get("phase"), str):
            raise DeviceError("runner", f"printed {line[:60]!r}, which is no phase")
        records.append(check_record(record))
    if not records or records[-1]["phase"] != "end":
        raise DeviceError("runner", "stopped without its last line", "Nothing of this run counts")
    return records[:-1]


def check_record(record: Record) -> Record:
    """Raises DeviceError where samples are no times."""
    times = record.get("ms", [])
    fine = isinstance(times, list) and all(
        isinstance(ms, (int, float)) and math.isfinite(ms) and ms >= 0 for ms in times
    )
    if not fine:
        raise DeviceError("runner", f"gives no times for {record.get('phase')}")
    return record
