"""llama.cpp's ``llama-bench``: it measures prompts and decoding on random tokens.

It is asked for each prompt once, and for the steps at each depth once; before each it does the same
untimed. It reports nanoseconds, of all steps together. Loading is not timed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices.answers import contained, is_whole, parse_json
from devices.engines import Command, Plan
from devices.engines.placed import Placed
from devices.engines.records import Record, check_record
from devices.errors import DeviceError

#: Reads the model instead of mapping it, in the words of this version: $1 is the program.
_READING = r"""
program=$1
shift
if "$program" --help 2>&1 | grep -q -e --load-mode
then set -- --load-mode none "$@"
else set -- --mmap 0 "$@"
fi
exec "$program" "$@"
"""
BENCH_NOTE = (
    "random tokens, read and decoded once untimed before; of the steps at a depth their mean; "
    "llama-bench times no loading"
)


def bench_files(placed: Placed, plan: Plan) -> dict[str, Path]:
    """It reads the model only."""
    return {}


def bench_commands(placed: Placed, plan: Plan) -> list[Command]:
    """A process for the prompts and one for the depths: in one it would measure all pairs."""
    program = [placed.program]
    if not plan.mmap:
        program = ["sh", "-c", _READING, "mobilellm", placed.program]
    common = [*program, "-m", placed.path, "-o", "json", "-r", "1", "-t", str(plan.threads)]
    commands = []
    if plan.prompts:
        prompts = ["-p", ",".join(map(str, plan.prompts)), "-n", "0"]
        commands.append(Command([*common, *prompts], lambda done: read_bench(done.text)))
    if plan.depths:
        depths = ["-p", "0", "-n", str(plan.steps), "-d", ",".join(map(str, plan.depths))]
        commands.append(Command([*common, *depths], lambda done: read_bench(done.text)))
    return commands


@contained("llama-bench", "its output")
def read_bench(text: str) -> list[Record]:
    """Parse what ``-o json`` prints: a list of tests, each with its samples in nanoseconds.

    Raises DeviceError.
    """
    start = text.find("[\n")
    if start < 0:
        raise DeviceError("llama-bench", "printed no list of tests", "Its build may be too old")
    tests = parse_json(text[start:], "llama-bench")
    if not isinstance(tests, list) or not tests:
        raise DeviceError("llama-bench", "measured nothing")
    return [check_record(_record(test)) for test in tests]


def _record(test: Any) -> Record:
    keys = ("n_prompt", "n_gen", "n_depth")
    if not isinstance(test, Mapping) or not all(is_whole(test.get(key)) for key in keys):
        raise DeviceError("llama-bench", "printed a test without its numbers of tokens")
    prompt, steps, depth = (test[key] for key in keys)
    samples = test.get("samples_ns")
    if not isinstance(samples, list) or not samples or not all(map(is_whole, samples)):
        raise DeviceError("llama-bench", "printed a test without its times")
    if prompt and not steps and not depth:
        return {"phase": "prefill", "tokens": prompt, "ms": [ns / 1e6 for ns in samples]}
    if steps and not prompt:
        ms = [ns / 1e6 / steps for ns in samples]
        return {"phase": "decode", "depth": depth, "ms": ms, "steps": steps}
    raise DeviceError("llama-bench", f"measured {prompt} and {steps} tokens together")
