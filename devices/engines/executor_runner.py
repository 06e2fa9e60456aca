"""ExecuTorch's ``executor_runner``: it executes a program with inputs from files.

It always gives a program inputs of the largest size that the program declares. For our programs
these are a prompt of the most tokens that a call takes, int64 [1, length], and the position of its
first token, int64 [1]. Without ``--inputs`` it fills both with ones, and a prompt of the whole
context does not fit behind position 1.
"""

import re
import struct
from dataclasses import replace
from pathlib import Path

from devices.answers import contained
from devices.engines import Command, Plan
from devices.engines.placed import Placed, input_file, repeated
from devices.engines.records import Record, check_record
from devices.errors import DeviceError
from devices.transports.supervised import Completed

#: The first execution of a process warms up the delegate and does not count.
_EXECUTIONS = 3
_BUILD = (
    "Build executor_runner with -DEXECUTORCH_PAL_DEFAULT=posix -DEXECUTORCH_ENABLE_LOGGING=ON; "
    "by default it logs to Android's log, or nowhere"
)
#: Runs a command, then prints what it wrote to Android's log: $1 the marker, which separates it
#: from older lines there. Nothing of the user's log is deleted.
_LOGGED = r"""
mark=$1
shift
log -t ExecuTorch "$mark"
"$@"
code=$?
printf '\n%s\n' "$mark"
logcat -d -v raw -s ExecuTorch 2>/dev/null
exit $code
"""
_MARK = "mobilellm executor log"


def executor_files(placed: Placed, plan: Plan) -> dict[str, Path]:
    """The tensors of the longest prompt of a call, as raw little-endian bytes."""
    tokens = repeated(placed.model.tokens, _longest(placed))
    tensors = (struct.pack(f"<{len(tokens)}q", *tokens), struct.pack("<q", 0))
    files = [input_file(content, ".bin") for content in tensors]
    return {placed.remote(file): file for file in files}


def executor_commands(placed: Placed, plan: Plan) -> list[Command]:
    """One process that executes the program some times."""
    inputs, longest = ",".join(executor_files(placed, plan)), _longest(placed)
    command = [
        placed.program, f"--model_path={placed.path}", f"--inputs={inputs}",
        f"--num_executions={_EXECUTIONS}", f"--cpu_threads={plan.threads}",
    ]  # fmt: skip
    return [Command(command, lambda done: read_executor(done.all_text, longest))]


def _longest(placed: Placed) -> int:
    context, longest = placed.model.context, placed.model.longest_call
    return context if longest is None else min(longest, context)


@contained("executor_runner", "its output")
def read_executor(text: str, tokens: int) -> list[Record]:
    """Parse ``Model loaded in …`` and ``Iteration i of n: …`` or the sum of n executions, each of a
    prompt of so many tokens. Raises DeviceError."""
    number = r"(\d{1,15}(?:\.\d{1,30})?)"
    records: list[Record] = []
    if load := re.search(rf"[Mm]odel loaded in {number} ?ms", text):
        records.append({"phase": "load", "ms": [float(load[1])]})
    each = [
        float(ms) for ms in re.findall(rf"Iteration \d{{1,9}} of \d{{1,9}}: {number} ?ms", text)
    ]
    total = re.search(
        rf"[Mm]odel executed successfully(?: (\d{{1,9}}) time\(s\))?(?: in {number} ?ms)?", text
    )
    if total is None:
        raise DeviceError("executor_runner", "reported no execution of the model", _BUILD)
    counted = each[1:] or each
    if not counted and total[2]:
        counted = [float(total[2]) / max(1, int(total[1] or 1))]
    if not counted:
        raise DeviceError("executor_runner", "reported no time", "Its build may be too old")
    records.append({"phase": "prefill", "tokens": tokens, "ms": counted})
    return [check_record(one) for one in records]


def with_android_log(command: Command) -> Command:
    """The command on Android: where its own output tells nothing, its lines in the log count."""

    def records(done: Completed) -> list[Record]:
        own, _, log = done.text.partition(f"\n{_MARK}\n")
        _, found, new = log.rpartition(f"{_MARK}\n")
        printed = replace(done, stdout=own.encode())
        try:
            return command.records(printed)
        except DeviceError:
            if not found or not new.strip():
                raise
            return command.records(replace(printed, stderr=done.stderr + b"\n" + new.encode()))

    return Command(["sh", "-c", _LOGGED, "mobilellm", _MARK, *command.argv], records)
