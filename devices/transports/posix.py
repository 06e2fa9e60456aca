"""What the transports for devices with a POSIX shell and /proc share: it all runs commands."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from devices.errors import DeviceError
from devices.files import sha256
from devices.identity import IDENTIFY, Identity, Memory, parse_identity, parse_meminfo
from devices.thermal import ZONES
from devices.transports import Device
from devices.transports.client import MOST_OUTPUT
from devices.transports.supervised import Completed

#: Runs a command on a device, for at most so many seconds.
Run = Callable[[Device, Sequence[str], float], Completed]
#: Copies a file of this machine to a path on the device.
Copy = Callable[[Path, str], None]

#: Seconds for a command that only asks or removes.
_SHORT = 60.0
#: Bytes a second of the slowest link that is worth waiting for.
_SLOWEST_LINK = 1e6


def transfer_timeout(size: int) -> float:
    """Seconds that copying `size` bytes may take."""
    return _SHORT + size / _SLOWEST_LINK


def identify(run: Run, device: Device) -> Identity:
    """What the device is. Raises DeviceError where its shell does not tell."""
    command = ["sh", "-c", IDENTIFY, "mobilellm", ZONES]
    return parse_identity(run(device, command, _SHORT).check(device).text)


def memory(run: Run, device: Device) -> Memory:
    """The device's memory. Raises DeviceError where /proc/meminfo does not tell."""
    return parse_meminfo(run(device, ["cat", "/proc/meminfo"], _SHORT).check(device).text)


def free_space(run: Run, device: Device, folder: str) -> int:
    """Bytes that can be written below `folder`, which need not exist. Raises DeviceError."""
    script = 'd=$1; while [ ! -d "$d" ]; do d=$(dirname "$d"); done; df -k -P "$d"'
    command = ["sh", "-c", script, "mobilellm", folder]
    return _free_bytes(run(device, command, _SHORT).check(device).text, device, folder)


def _free_bytes(output: str, device: Device, folder: str) -> int:
    """The available space in the last row that `df -k -P` printed."""
    numbers = re.findall(r"\s\d{1,18} +\d{1,18} +(\d{1,18}) +\d{1,3}%", output)
    if not numbers:
        raise DeviceError(device, f"the output of df for {folder} cannot be parsed")
    return int(numbers[-1]) * 1024


#: A line of sha256sum: before a name with unusual characters it has a backslash.
_HASH = re.compile(r"\\?([0-9a-f]{64})\s")


#: Before a copy: the hash of what is there ($2), and the room in its folder ($1), which is made.
_BEFORE = 'sha256sum "$2" 2>/dev/null; mkdir -p "$1" && df -k -P "$1"'
#: After it: $1 the copy, $2 its place, $3 its mode, $4 what its hash must be.
_AFTER = r"""
found=$(sha256sum "$1") || exit 1
found=${found#\\}
[ "${found%% *}" = "$4" ] || { echo "it arrived with sha256 $found" >&2; exit 1; }
chmod "$3" "$1" && mv -f "$1" "$2"
"""


def push(run: Run, copy: Copy, device: Device, local: Path, remote: str) -> bool:
    """Copy a file to the device with `copy`; False where a file with its sha256 is there already.

    Executable files stay executable. Raises DeviceError where there is no room for the file, or
    where it arrives changed; then nothing of it is left.
    """
    size, wanted = local.stat().st_size, sha256(local)
    folder, part = str(PurePosixPath(remote).parent), f"{remote}.part"
    before = ["sh", "-c", _BEFORE, "mobilellm", folder, remote]
    output = run(device, before, transfer_timeout(size)).check(f"{device}: {folder}").text
    found = _HASH.match(output)
    if found and found[1] == wanted:
        return False
    free = _free_bytes(output, device, folder)
    if free < size:
        problem = f"{folder} has {free / 1e6:,.1f} MB free and {local.name} has {size / 1e6:,.1f}"
        raise DeviceError(device, problem, "Make room on the device")
    mode = "755" if local.stat().st_mode & 0o100 else "644"
    try:
        copy(local, part)
        after = ["sh", "-c", _AFTER, "mobilellm", part, remote, mode, wanted]
        run(device, after, transfer_timeout(size)).check(f"{device}: {local.name}")
    except DeviceError:
        with suppress(DeviceError):  # the first error is the one to report
            run(device, ["rm", "-f", part], _SHORT)
        raise
    return True


def pull(run: Run, device: Device, remote: str, local: Path) -> None:
    """Copy a file from the device. Raises DeviceError where its sha256 there and here differ."""
    script = 'wc -c < "$1" && sha256sum "$1"'
    output = run(device, ["sh", "-c", script, "mobilellm", remote], _SHORT).check(device).text
    said = re.match(rf"\s*(\d{{1,18}})\n{_HASH.pattern}", output)
    if said is None:
        raise DeviceError(device, f"the size and sha256 of {remote} cannot be parsed")
    size, wanted = int(said[1]), said[2]
    if size > MOST_OUTPUT:
        problem = f"{remote} has {size / 1e6:,.0f} MB, more than {MOST_OUTPUT >> 20} MiB"
        raise DeviceError(device, problem, "Measure less")
    content = run(device, ["cat", remote], transfer_timeout(size)).check(device).stdout
    local.parent.mkdir(parents=True, exist_ok=True)
    local.write_bytes(content)
    if sha256(local) != wanted:
        local.unlink()
        raise DeviceError(device, f"{remote} changed on its way", "Check the connection")


def remove(run: Run, device: Device, workspace: str, remote: str) -> None:
    """Remove a file or folder. Raises DeviceError where it does not lie below `workspace`."""
    inside = PurePosixPath(remote)
    if ".." in inside.parts or PurePosixPath(workspace) not in (inside, *inside.parents):
        raise DeviceError(device, f"{remote} is not below {workspace}")
    run(device, ["rm", "-rf", remote], _SHORT).check(device)
