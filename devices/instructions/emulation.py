"""Runs of a program on an emulated CPU, with the executions of each block of its code.

Nothing of this machine but the model reaches the program: no variable of the environment, no clock
(`clock.c`), and of the files in which Linux describes a machine and a process, those that are made
here (``qemu-aarch64 -L``). Otherwise the count would depend on the machine that counts: on a
Cortex-A76 that the runtime does not recognize it is 3 to 5 % higher.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devices import runner
from devices.engines import Model, Plan, options
from devices.engines.records import read_records
from devices.errors import BadDeviceError
from devices.instructions.tools import CLOCK, EMULATOR, PLUGIN, PROCESSOR, SHORT, Tools
from devices.transports.client import run_client
from devices.transports.supervised import Completed

#: The columns that `blocks.c` writes for a block: the number of its instructions, of those in each
#: class, of the bytes loaded and stored, and of the accesses whose size in bytes is unknown.
INSTRUCTIONS, CLASSES = "instructions", ("simd", "dot_product", "i8mm")
LOADED, STORED, UNSIZED = "loaded", "stored", "unsized"
_COLUMNS = (INSTRUCTIONS, *CLASSES, LOADED, STORED, UNSIZED)
#: The line after what was executed until a program marked a place.
_MARK = "mark"
#: (file, offset of a block of code in it, column) → instructions or bytes of all its executions.
Blocks = Counter[tuple[str, int, str]]
Run = Callable[[Plan], Blocks]
_OUTPUT, _ROOT = "blocks.txt", "root"


@dataclass(frozen=True)
class Machine:
    """An emulated CPU. Programs run in `folder`; DC ZVA sets `zeroed` bytes to zero."""

    tools: Tools
    folder: Path
    cpu: str
    zeroed: int = 0


@contextmanager
def machine(tools: Tools, cpu: str, links: Mapping[str, Path]) -> Iterator[Machine]:
    """A machine with this CPU, with links to folders by their name. Raises DeviceError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for link, goal in {"tools": tools.folder, **links}.items():
            (folder / link).symlink_to(goal.absolute())
        identity, zeroing = _registers(Machine(tools, folder, cpu))
        describe_machine(folder / _ROOT, identity)
        # Bit 4 of DCZID_EL0 prohibits DC ZVA; the others are the logarithm of its words.
        yield Machine(tools, folder, cpu, 0 if zeroing & 16 else 4 << (zeroing & 15))


@contextmanager
def emulated(
    tools: Tools, built: runner.Build, model: Model, cpu: str, timeout: float
) -> Iterator[Run]:
    """A machine with this CPU, which runs the plans of a model, each in `timeout` seconds. Decoding
    begins in an unfilled cache, whatever its depth. Raises DeviceError."""
    with machine(tools, cpu, {"runner": built.folder, "model": model.folder}) as made:
        (made.folder / "tokens.txt").write_text(" ".join(map(str, model.tokens)))
        program = [
            f"runner/lib/{built.loader}", "--preload", f"./tools/{CLOCK}",
            "--library-path", "runner/lib", f"runner/{runner.RUNNER}",
            "--model", f"model/{model.main}", "--tokens", "tokens.txt", "--unfilled", "1",
            "--huge-pages", "0",  # it reads the addresses of this process, which vary
        ]  # fmt: skip

        def run(plan: Plan) -> Blocks:
            read_records(execute(made, [*program, *options(plan)], timeout))
            return read_places(made)[-1]

        yield run


def execute(
    machine: Machine,
    program: Sequence[str],
    timeout: float,
    variables: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program in the machine's folder, with these variables as its whole environment. Paths
    are relative, since QEMU and the loader split some options at commas, colons and spaces. Raises
    DeviceError."""
    tools = machine.tools
    environment = [
        word for key, value in (variables or {}).items() for word in ("-E", f"{key}={value}")
    ]
    command = [
        tools.program, "-cpu", machine.cpu, "-seed", "0", "-L", _ROOT, *environment,
        "-plugin", f"./tools/{PLUGIN},out={_OUTPUT},zeroed={machine.zeroed}", *program,
    ]  # fmt: skip
    empty = ["env", "--ignore-environment", f"--chdir={machine.folder}"]
    code, said, errors = run_client(EMULATOR, [*empty, *command], timeout)
    code = code if code >= 0 else 128 - code  # a negative one is a signal
    return Completed(tuple(command), code, said.encode(), errors.encode(), 0.0)


def _registers(machine: Machine) -> tuple[int, int]:
    """The registers MIDR_EL1 and DCZID_EL0. Raises BadDeviceError where QEMU cannot load the
    plugin."""
    done = execute(machine, [f"tools/{PROCESSOR}"], SHORT)
    if done.code or not (machine.folder / _OUTPUT).is_file():
        reason = (done.stderr.decode("utf-8", "replace").strip() or "no message").splitlines()[-1]
        raise BadDeviceError(
            machine.tools.emulator, f"cannot run the plugin that counts ({reason})",
            "Counting needs QEMU 6.0 to 8.2 that is not linked statically, such as Debian 12's "
            "qemu-user",
        )  # fmt: skip
    identity, zeroing = done.text.split()
    return int(identity), int(zeroing)


def describe_machine(root: Path, identity: int) -> None:
    """Write what Linux says of a machine with one such processor: runtimes look here for kernels
    that were written for it, and for the number of threads."""
    processor = (  # as the kernel writes it, tabs included
        "processor\t: 0\n"
        f"CPU implementer\t: 0x{identity >> 24 & 0xFF:02x}\n"
        "CPU architecture: 8\n"
        f"CPU variant\t: 0x{identity >> 20 & 0xF:x}\n"
        f"CPU part\t: 0x{identity >> 4 & 0xFFF:03x}\n"
        f"CPU revision\t: {identity & 0xF}\n"
    )
    files = {
        "proc/cpuinfo": processor,
        **{f"sys/devices/system/cpu/{name}": "0\n" for name in ("online", "possible", "present")},
        "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": f"0x{identity:016x}\n",
        # The runner prints the memory that it takes, which is QEMU's and never quite the same.
        **{f"proc/self/{name}": "" for name in ("status", "smaps_rollup", "clear_refs")},
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def read_places(machine: Machine) -> list[Blocks]:
    """What the last run had executed at each place that it marked, and at its end: the number of
    executions of each block, times what it has of each column."""
    path, places = machine.folder / _OUTPUT, [Blocks()]
    with path.open(errors="surrogateescape") as lines:
        for line in lines:
            if line == f"{_MARK}\n":
                places.append(Blocks())
                continue
            executions, *numbers, offset, file = line.rstrip("\n").split(" ", len(_COLUMNS) + 2)
            for column, number in zip(_COLUMNS, numbers, strict=True):
                if number != "0":
                    places[-1][file, int(offset), column] += int(executions) * int(number)
    path.unlink()
    return places
