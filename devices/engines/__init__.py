"""Engines: the programs that run a model on a device, their files, commands and output.

`native` is our C++ runner, `python` its counterpart for runtimes with a Python package, `official`
has the programs that ExecuTorch and ONNX Runtime ship. All give the same records: one for each
phase, with its raw samples in milliseconds in `ms`. `within_ms` is the error of a coarse clock.
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
    """An artifact, with what an engine must know of it.

    `files` are relative to `folder`; the runtime opens `main`, one of them or a folder of them.
    `context` is in tokens. `portable` says that core operators and delegates suffice, `integers`
    that products with weights are meant to work on integers. Prompts are the first of `tokens`;
    `texts` has prompts as text, by their number of tokens, for programs that need `tokenizer`.
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
    """What one run measures.

    `prompts` are lengths in tokens; at each of `depths` tokens in the cache, `steps` are decoded.
    `sustained` is in seconds; `generate` is a number of tokens after a prompt of `prompt_length`.
    `trace` and `logits` are paths on the device, '' for none.
    """

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
    """A program for one model on one device.

    `files` maps paths on the device to files here. The `commands` of a plan run one after the
    other; `records` parses the output of one, and raises DeviceError. `capabilities` has those of
    "sustained", "trace" and "generate" that it can do besides prefill and decode.
    """

    name: str
    versions: Mapping[str, str]
    files: Mapping[str, Path]
    commands: Callable[[Plan], list[list[str]]]
    records: Callable[[Completed], list[Record]]
    capabilities: frozenset[str] = frozenset()


def options(plan: Plan) -> list[str]:
    """A plan as options of the native and the Python runner."""
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
    """Parse the output of the native or the Python runner: a JSON object for each phase.

    Raises DeviceError, also where the last line is missing: then the run did not end, whatever its
    exit code.
    """
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
            raise DeviceError(
                "runner", f"printed {line[:60]!r}, which is not the record of a phase"
            )
        records.append(check_record(record))
    if not records or records[-1]["phase"] != "end":
        raise DeviceError("runner", "stopped without its last line", "Nothing of this run counts")
    return records[:-1]


def check_record(record: Record) -> Record:
    """The record itself. Raises DeviceError where its samples are not finite times from 0."""
    times = record.get("ms", [])
    fine = isinstance(times, list) and all(
        isinstance(ms, (int, float)) and math.isfinite(ms) and ms >= 0 for ms in times
    )
    if not fine:
        raise DeviceError("runner", f"gives invalid times for {record.get('phase')}")
    return record
