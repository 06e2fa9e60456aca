"""The programs that counting needs: QEMU, binutils for Arm, and our plugin, which is built here."""

import hashlib
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devices import runner
from devices.errors import BadDeviceError
from devices.files import cache_folder
from devices.transports.client import run_client

ARCHITECTURE = "aarch64"
EMULATOR = "qemu-aarch64"
#: The plugin of the emulator, the library whose clock stands still, and the program that reads the
#: identity of the emulated CPU.
PLUGIN, CLOCK, PROCESSOR = "blocks.so", "clock.so", "processor"
#: Seconds for a program that only tells something.
SHORT = 120.0
SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Tools:
    """A folder with the plugin for this machine, and the clock and the program `processor` for Arm.

    `program` is the path of QEMU, `emulator` its version, such as ``qemu-aarch64 7.2.22``.
    """

    folder: Path
    program: str
    emulator: str


def build() -> Tools:
    """Build the tools, unless the cache has them. Raises BadDeviceError for a missing program."""
    program = _emulator()
    emulator = _version(program)
    digest = hashlib.sha256()
    for name in ("access.h", "blocks.c", "clock.c", "processor.c", "tools.py"):
        digest.update((SOURCES / name).read_bytes())
    made = f"{platform.machine()}-{digest.hexdigest()[:16]}"
    folder = cache_folder() / "instructions" / made
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            built = Path(scratch) / "made"
            built.mkdir()
            _compile(platform.machine(), "blocks.c", built / PLUGIN, "-shared", "-fPIC")
            _compile(ARCHITECTURE, "clock.c", built / CLOCK, "-shared", "-fPIC")
            _compile(ARCHITECTURE, "processor.c", built / PROCESSOR, "-static")
            if not folder.is_dir():  # another process may have built it meanwhile
                built.rename(folder)
    return Tools(folder, program, emulator)


def cpus() -> list[str]:
    """The CPUs that QEMU emulates. Raises BadDeviceError where it is not installed."""
    _, said, _ = run_client(EMULATOR, [_emulator(), "-cpu", "help"], SHORT)
    return [line.strip() for line in said.splitlines() if line.startswith(" ")]


def binutil(name: str) -> str:
    """The path of binutils' ``nm`` or ``readelf`` for Arm. Raises BadDeviceError."""
    own = platform.machine() == ARCHITECTURE
    program = name if own else runner.COMPILERS[ARCHITECTURE] + name
    return _installed(program, "binutils" if own else "binutils-aarch64-linux-gnu")


def programs() -> dict[str, str]:
    """What counting needs besides the executorch wheel: program → its package in Debian."""
    cross = "" if platform.machine() == ARCHITECTURE else runner.COMPILERS[ARCHITECTURE]
    compiler = f"{cross}g++"
    return {
        EMULATOR: "qemu-user",
        "gcc": "gcc",
        compiler: "g++-aarch64-linux-gnu" if cross else "g++",
    }


def _compile(architecture: str, source: str, out: Path, *options: str) -> None:
    runner.compile_for(architecture, "gcc", "-O2", *options, str(SOURCES / source), "-o", str(out))


def _emulator() -> str:
    return _installed(EMULATOR, "qemu-user")


def _installed(program: str, package: str) -> str:
    """The path of a program. Raises BadDeviceError."""
    path = shutil.which(program)
    if path is None:
        raise BadDeviceError(program, "is not installed", f"Run: apt install {package}")
    return path


def _version(program: str) -> str:
    _, said, _ = run_client(EMULATOR, [program, "--version"], SHORT)
    version = re.match(rf"{EMULATOR} version (\S+)", said)
    if version is None:
        raise BadDeviceError(EMULATOR, f"tells no version ({said[:60]})")
    return f"{EMULATOR} {version[1]}"
