"""Transports: one module for each kind of connection to a device, all with the same functions.

- ``connected() -> list[str]``: the devices that are connected now, as ``--device`` takes them.
- ``workspace(device)``: the folder on the device for all our files.
- ``identify(device)``: the device's `Identity`, read from its system.
- ``memory(device)``: its `Memory`.
- ``free_space(device, folder)``: bytes that can be written there.
- ``run(device, argv, timeout, on_line)``: run a command to its end, for at most `timeout` seconds.
- ``push(device, local, remote)``: copy a file to the device and check its sha256; False where the
  same file is there already.
- ``pull(device, remote, local)``: copy a file from the device and check its sha256.
- ``remove(device, remote)``: remove a file or folder below the workspace.

``on_line`` is called with each line of standard output as it arrives. All but `connected` and
`workspace` raise DeviceError.
"""

import importlib
import re
from dataclasses import dataclass
from types import ModuleType

from devices.errors import BadDeviceError

TRANSPORTS = {
    "host": "devices.transports.host",
    "adb": "devices.transports.adb",
    "ssh": "devices.transports.ssh",
    "mac": "devices.transports.mac",
}
#: The form of each transport's addresses. None begins with a dash, which would be an option.
_ADDRESSES = {
    "host": r"",
    "mac": r"",
    "adb": r"[A-Za-z0-9_][\w.:\[\]-]*",
    "ssh": r"(?:[A-Za-z0-9_][\w.-]*@)?(?:[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?",
}


@dataclass(frozen=True)
class Device:
    """A device: ``adb`` and its serial, ``ssh`` and ``user@host:port``, ``host`` or ``mac``."""

    transport: str
    address: str = ""

    def __str__(self) -> str:
        return f"{self.transport}:{self.address}" if self.address else self.transport


def parse_device(text: str) -> Device:
    """Parse ``host``, ``mac``, ``adb:SERIAL`` or ``ssh:[USER@]HOST[:PORT]``.

    Raises BadDeviceError.
    """
    kind, _, address = text.partition(":")
    if kind not in _ADDRESSES or not re.fullmatch(_ADDRESSES[kind], address):
        raise BadDeviceError(
            f"--device {text}", "names no device",
            "Give host, mac, adb:SERIAL, ssh:USER@HOST[:PORT] or count:CPU; mobilellm devices "
            "lists some",
        )  # fmt: skip
    return Device(kind, address)


def transport_of(device: Device) -> ModuleType:
    """The module for the device's kind of connection."""
    return importlib.import_module(TRANSPORTS[device.transport])


def connected_devices() -> list[str]:
    """The devices that are connected now, as ``--device`` takes them."""
    return [text for kind in TRANSPORTS for text in transport_of(Device(kind)).connected()]
