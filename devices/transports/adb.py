"""Android devices, with the adb client: ``adb:SERIAL``, as `adb devices` lists them."""

import os
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from devices.errors import DeviceError
from devices.transports import Device, parse_device, posix
from devices.transports.client import run_client
from devices.transports.supervised import Completed, OnLine, supervise

#: The only folder in which adb's shell user may both write and execute.
_WORKSPACE = "/data/local/tmp/mobilellm"
#: Seconds that `adb devices` may take, which starts adb's server.
_LISTING = 20.0


def connected() -> list[str]:
    """The devices that are ready; unauthorized and offline ones are left out, and those whose
    serial cannot be given as ``--device``."""
    try:
        _, said, _ = run_client("adb devices", ["adb", "devices"], _LISTING)
    except DeviceError:
        return []
    rows = [line.split("\t") for line in said.splitlines() if "\t" in line]
    return [f"adb:{serial}" for serial, state, *_ in rows if state == "device" and _known(serial)]


def _known(serial: str) -> bool:
    """Whether it has the form of a serial: escape sequences and spaces, for example, have not."""
    try:
        return parse_device(f"adb:{serial}").address == serial
    except DeviceError:
        return False


def workspace(device: Device) -> str:
    return _WORKSPACE


def run(
    device: Device, argv: Sequence[str], timeout: float, on_line: OnLine | None = None
) -> Completed:
    def spawn(command: Sequence[str]) -> list[str]:
        # -T: without a terminal, which would change binary output.
        return ["adb", "-s", device.address, "shell", "-T", shlex.join(command)]

    return supervise(device, spawn, argv, timeout, on_line)


def push(device: Device, local: Path, remote: str) -> bool:
    def copy(source: Path, part: str) -> None:
        # A path that begins with a dash would be an option.
        command = ["adb", "-s", device.address, "push", os.fspath(source.absolute()), part]
        limit = posix.transfer_timeout(source.stat().st_size)
        code, said, errors = run_client(device, command, limit)
        if code:
            reason = (errors or said).strip().splitlines()[-1:]
            raise DeviceError(device, f"adb push failed ({''.join(reason)})")

    return posix.push(run, copy, device, local, remote)


# The rest needs only a way to run commands.
identify = partial(posix.identify, run)
memory = partial(posix.memory, run)
free_space = partial(posix.free_space, run)
pull = partial(posix.pull, run)


def remove(device: Device, remote: str) -> None:
    posix.remove(run, device, workspace(device), remote)
