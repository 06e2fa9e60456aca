"""One run of the native runner on an emulated CPU, with the executions of each block of code.

Nothing of this machine but the model reaches the program: no variable of the environment, no clock
(`clock.c`), and of the files in which Linux describes a machine and a process, those that are made
here (``qemu-aarch64 -L``). Otherwise the count would depend on the machine that counts: on a
Cortex-A76 that the runtime does not recognize it is 3 to 5 % higher.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from devices import runner
from devices.engines import Model, Plan, options
from devices.engines.records import read_records
from devices.errors import BadDeviceError
from devices.instructions.tools import CLOCK, EMULATOR, PLUGIN, PROCESSOR, SHORT, Tools
from devices.transports.client import run_client
from devices.transports.supervised import Completed

#: The columns that `blocks.c` writes for a block: all instructions, then those of each class.
INSTRUCTIONS, CLASSES = "instructions", ("simd", "dot_product", "i8mm")
#: (file, offset of a block of code in it, INSTRUCTIONS or a class) → how many were executed.
Blocks = Counter[tuple[str, int, str]]
Run = Callable[[Plan], Blocks]
#: Seconds of one run.
_LONGEST = 3600.0
_OUTPUT, _ROOT = "blocks.txt", "root"


@contextmanager
def emulated(tools: Tools, built: runner.Build, model: Model, cpu: str) -> Iterator[Run]:
    """A machine with this CPU, which runs the plans of a model. Raises DeviceError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for link, goal in (("tools", tools), ("runner", built), ("model", model)):
            (folder / link).symlink_to(goal.folder.absolute())
        (folder / "tokens.txt").write_text(" ".join(map(str, model.tokens)))
        describe_machine(folder / _ROOT, _processor_id(tools, folder, cpu))
        program = [
            f"runner/lib/{built.loader}", "--preload", f"./tools/{CLOCK}",
            "--library-path", "runner/lib", f"runner/{runner.RUNNER}",
            "--model", f"model/{model.main}", "--tokens", "tokens.txt",
        ]  # fmt: skip

        def run(plan: Plan) -> Blocks:
            read_records(_emulate(tools, folder, cpu, [*program, *options(plan)], _LONGEST))
            return _read_blocks(folder / _OUTPUT)

        yield run


def _emulate(
    tools: Tools, folder: Path, cpu: str, program: Sequence[str], timeout: float
) -> Completed:
    """Run a program in the folder. Its paths are relative, since QEMU and the loader split some
    options at commas, colons and spaces."""
    command = [
        tools.program, "-cpu", cpu, "-seed", "0", "-L", _ROOT,
        "-plugin", f"./tools/{PLUGIN},out={_OUTPUT}", *program,
    ]  # fmt: skip
    empty = ["env", "--ignore-environment", f"--chdir={folder}"]
    code, said, errors = run_client(EMULATOR, [*empty, *command], timeout)
    code = code if code >= 0 else 128 - code  # a negative one is a signal
    return Completed(tuple(command), code, said.encode(), errors.encode(), 0.0)


def _processor_id(tools: Tools, folder: Path, cpu: str) -> int:
    """The register MIDR_EL1 of a CPU. Raises BadDeviceError where QEMU cannot load the plugin."""
    done = _emulate(tools, folder, cpu, [f"tools/{PROCESSOR}"], SHORT)
    if done.code or not (folder / _OUTPUT).is_file():
        reason = (done.stderr.decode("utf-8", "replace").strip() or "no message").splitlines()[-1]
        raise BadDeviceError(
            tools.emulator, f"cannot run the plugin that counts ({reason})",
            "Counting needs QEMU 6.0 to 8.2 that is not linked statically, such as Debian 12's "
            "qemu-user",
        )  # fmt: skip
    return int(done.text)


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


def _read_blocks(path: Path) -> Blocks:
    """The instructions of each block: the number of its executions times those that it has."""
    blocks = Blocks()
    for line in path.read_text(errors="surrogateescape").splitlines():
        executions, *numbers, offset, file = line.split(" ", len(CLASSES) + 3)
        for kind, number in zip((INSTRUCTIONS, *CLASSES), numbers, strict=True):
            if number != "0":
                blocks[file, int(offset), kind] += int(executions) * int(number)
    path.unlink()
    return blocks
