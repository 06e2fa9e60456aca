"""This machine itself, with the same supervisor as other devices. Linux only; a Mac is `mac`."""

import os
import platform
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from devices.errors import DeviceError
from devices.files import cache_folder
from devices.transports import Device, posix
from devices.transports.supervised import Completed, OnLine, supervise


def connected() -> list[str]:
    return ["host"] if platform.system() == "Linux" else []


def workspace(device: Device) -> str:
    return str(cache_folder() / "device")


def run(
    device: Device, argv: Sequence[str], timeout: float, on_line: OnLine | None = None
) -> Completed:
    return supervise(device, list, argv, timeout, on_line)


def push(device: Device, local: Path, remote: str) -> bool:
    return posix.push(run, _copy, device, local, remote)


# The rest needs only a way to run commands.
identify = partial(posix.identify, run)
memory = partial(posix.memory, run)
free_space = partial(posix.free_space, run)
pull = partial(posix.pull, run)


def remove(device: Device, remote: str) -> None:
    posix.remove(run, device, workspace(device), remote)


def _copy(local: Path, remote: str) -> None:
    try:
        shutil.copyfile(local, os.fspath(remote))
    except OSError as error:
        raise DeviceError("host", f"{remote} cannot be written ({error.strerror})") from error
