"""ONNX Runtime's ``onnxruntime_perf_test``: it executes a model with inputs from files.

It takes them from ``test_data_set_0/input_N.pb`` beside the model, in the order of the model's
inputs (onnxruntime/test/onnx/TestCase.cc). Its option -I would feed zeros of size 1, which
GroupQueryAttention refuses.
"""

import re
import struct
from pathlib import Path, PurePosixPath

from devices.answers import contained
from devices.engines import Command, Plan
from devices.engines.onnx_tensors import INT64, WIDTHS, Input, read_inputs, tensor
from devices.engines.placed import Placed, input_file, repeated
from devices.engines.records import Record, check_record
from devices.errors import BadDeviceError, DeviceError

#: $1 is the model's folder; the inputs follow up to --, then the command.
_WITH_INPUTS = r"""
set=$1/test_data_set_0 number=0
rm -rf "$set" && mkdir "$set" || exit 1
shift
while [ "$1" != -- ]; do
  cp "$1" "$set/input_$number.pb" || exit 1
  number=$((number + 1))
  shift
done
shift
exec "$@"
"""


def perf_files(placed: Placed, plan: Plan) -> dict[str, Path]:
    """The inputs of every prompt and depth; inputs of the same content are one file."""
    files = [file for case in _cases(plan) for file in _inputs(placed, *case)]
    return {placed.remote(file): file for file in files}


def perf_commands(placed: Placed, plan: Plan) -> list[Command]:
    """A process for each prompt and each depth."""
    return [_command(placed, plan, length, depth) for length, depth in _cases(plan)]


def _cases(plan: Plan) -> list[tuple[int, int]]:
    """(tokens to read, tokens in the cache) of each execution; 0 tokens stand for a decode step."""
    return [*((length, 0) for length in plan.prompts), *((0, depth) for depth in plan.depths)]


def _command(placed: Placed, plan: Plan, length: int, depth: int) -> Command:
    inputs = [placed.remote(file) for file in _inputs(placed, length, depth)]
    runs = 2 if length else max(plan.steps, 2)
    program = [placed.program, "-m", "times", "-r", str(runs), "-x", str(plan.threads), "-e", "cpu"]
    beside = str(PurePosixPath(placed.path).parent)
    command = ["sh", "-c", _WITH_INPUTS, "mobilellm", beside, *inputs, "--", *program]
    place = (
        {"phase": "prefill", "tokens": length} if length else {"phase": "decode", "depth": depth}
    )
    return Command([*command, placed.path], lambda done: read_perf_test(done.all_text, place))


def _inputs(placed: Placed, length: int, depth: int) -> list[Path]:
    """A file for each input of the model."""
    count, model = length or 1, placed.model
    tokens = repeated(model.tokens, count)
    return [
        input_file(_content(one, tokens, depth), ".pb")
        for one in read_inputs(model.folder / model.main)
    ]


def _content(one: Input, tokens: list[int], depth: int) -> bytes:
    """The tensor for an input: the tokens, a mask of ones, or a cache of zeros."""
    if one.name == "input_ids" and one.type == INT64:
        return tensor(INT64, [1, len(tokens)], struct.pack(f"<{len(tokens)}q", *tokens))
    if one.name == "attention_mask" and one.type == INT64:
        count = depth + len(tokens)
        return tensor(INT64, [1, count], struct.pack("<q", 1) * count)
    if one.name.startswith("past_key_values.") and one.type in WIDTHS and len(one.shape) == 4:
        _, heads, _, width = one.shape
        return tensor(
            one.type, [1, heads, depth, width], bytes(heads * depth * width * WIDTHS[one.type])
        )
    raise BadDeviceError(one.name, "is an input of the model that onnxruntime_perf_test lacks")


_UNITS = {"s": 1000.0, "sec": 1000.0, "seconds": 1000.0, "ms": 1.0, "us": 0.001}
_TIME = (
    r" {0,9}[:=]? {0,9}(\d{1,15}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,3})?) {0,9}(s|sec|seconds|ms|us)\b"
)


@contained("onnxruntime_perf_test", "its output")
def read_perf_test(text: str, place: Record) -> list[Record]:
    """Parse load and execution times, in each of the spellings and units that are in use.

    `place` has the phase of the execution. Raises DeviceError.
    """

    def time_of(label: str) -> float | None:
        found = re.search(label + _TIME, text, re.IGNORECASE)
        return float(found[1]) * _UNITS[found[2].lower()] if found else None

    records: list[Record] = []
    load = time_of(r"Session creation time(?: cost)?")
    if load is not None:
        records.append({"phase": "load", "ms": [load]})
    first = time_of(r"First inference time(?: cost)?")
    median, average = (
        time_of(r"P50 Latency(?: is)?"),
        time_of(r"(?:Average inference time(?: cost)?(?: total)?|Avg(?: inference)? latency)"),
    )
    if median is None and average is None:
        raise DeviceError("onnxruntime_perf_test", "printed no time in a known form")
    record: Record = {**place, "ms": [median if median is not None else average]}
    high = time_of(r"P95 Latency(?: is)?")
    record |= {} if high is None else {"p95_ms": high}
    record |= {} if first is None else {"first_ms": first}
    return [check_record(one) for one in (*records, record)]
