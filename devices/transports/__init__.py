"""One module for each way to reach a device, all with the same few functions.

- ``connected() -> list[str]``: the devices that can be seen now, as ``--device`` takes them.
- ``workspace(device)``: the folder on the device in which everything of ours lies.
- ``identify(device)``: what the device is, as far as it tells.
- ``memory(device)``: bytes of memory, in all and available now.
- ``free_space(device, folder)``: bytes.
- ``run(device, argv, timeout, on_line)``: a command, to its end marker; or an error.
- ``push(device, local, remote)``: a file, checked by its sha256; False where it was there already.
- ``pull(device, remote, local)``: a file, checked likewise.
- ``remove(device, remote)``: a file or folder below the workspace.

``on_line`` is told each line of standard output as it comes.
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
#: An address never begins with a dash, which a client would take for an option.
_ADDRESSES = {
    "host": r"",
    "mac": r"",
    "adb": r"[A-Za-z0-9_][\w.:\[\]-]*",
    "ssh": r"(?:[A-Za-z0-9_][\w.-]*@)?(?:[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?",
}


@dataclass(frozen=True)
class Device:
    """How to reach a device: ``adb`` and its serial, ``ssh`` and ``user@host:port``, ``host``."""

    transport: str
    address: str = ""

    def __str__(self) -> str:
        return f"{self.transport}:{self.address}" if self.address else self.transport


def parse_device(text: str) -> Device:
    """``host``, ``mac``, ``adb:SERIAL`` or ``ssh:[USER@]HOST[:PORT]``. Raises BadDeviceError."""
    kind, _, address = text.partition(":")
    if kind not in _ADDRESSES or not re.fullmatch(_ADDRESSES[kind], address):
        raise BadDeviceError(
            f"--device {text}", "names no device",
            "Give host, mac, adb:SERIAL or ssh:USER@HOST[:PORT]; mobilellm devices lists some",
        )  # fmt: skip
    return Device(kind, address)


def transport_of(device: Device) -> ModuleType:
    """The module that reaches the device."""
    return importlib.import_module(TRANSPORTS[device.transport])
