"""This machine itself, through the same supervisor as any device. Linux; a Mac is `mac`."""

import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from devices.errors import DeviceError
from devices.files import cache_folder
from devices.identity import Identity, Memory
from devices.transports import Device, posix
from devices.transports.supervised import Completed, OnLine, supervise


def connected() -> list[str]:
    return ["host"] if platform.system() == "Linux" else []


def workspace(device: Device) -> str:
    return str(cache_folder() / "device")


def identify(device: Device) -> Identity:
    return posix.identify(_runner(device), device)


def memory(device: Device) -> Memory:
    return posix.memory(_runner(device), device)


def free_space(device: Device, folder: str) -> int:
    return posix.free_space(_runner(device), device, folder)


def run(
    device: Device, argv: Sequence[str], timeout: float, on_line: OnLine | None = None
) -> Completed:
    return supervise(device, list, argv, timeout, on_line)


def push(device: Device, local: Path, remote: str) -> bool:
    return posix.push(_runner(device), _copy, device, local, remote)


def pull(device: Device, remote: str, local: Path) -> None:
    posix.pull(_runner(device), device, remote, local)


def remove(device: Device, remote: str) -> None:
    posix.remove(_runner(device), device, workspace(device), remote)


def _copy(local: Path, remote: str) -> None:
    try:
        shutil.copyfile(local, os.fspath(remote))
    except OSError as error:
        raise DeviceError("host", f"{remote} cannot be written ({error.strerror})") from error


def _runner(device: Device) -> posix.Run:
    return lambda argv, timeout: run(device, argv, timeout)
