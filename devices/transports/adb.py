"""Android devices, with the adb client: ``adb:SERIAL``, as `adb devices` lists them."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from devices.errors import DeviceError, UnreachableError
from devices.transports import Device, posix
from devices.transports.supervised import Completed, OnLine, supervise

#: The only folder in which adb's shell user may both write and execute.
_WORKSPACE = "/data/local/tmp/mobilellm"


def connected() -> list[str]:
    """The devices that are ready; unauthorized and offline ones are left out."""
    try:
        done = subprocess.run(
            ["adb", "devices"], capture_output=True, text=True, check=False, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    rows = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return [f"adb:{row[0]}" for row in rows if row[1] == "device"]


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
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            raise UnreachableError(device, f"pushing took more than {limit:.0f} s") from error
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise DeviceError(device, f"adb push failed ({''.join(reason)})")

    return posix.push(run, copy, device, local, remote)


# The rest needs only a way to run commands.
identify = partial(posix.identify, run)
memory = partial(posix.memory, run)
free_space = partial(posix.free_space, run)
pull = partial(posix.pull, run)


def remove(device: Device, remote: str) -> None:
    posix.remove(run, device, workspace(device), remote)
