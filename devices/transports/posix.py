"""What a device with a POSIX shell and /proc can be asked, given only a way to run a command."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from devices.errors import DeviceError
from devices.files import sha256
from devices.identity import IDENTIFY, Identity, Memory, parse_identity, parse_meminfo
from devices.transports.supervised import Completed

Run = Callable[[Sequence[str], float], Completed]
Copy = Callable[[Path, str], None]

_SHORT = 60.0
#: Bytes a second of the slowest link that is worth waiting for.
_SLOWEST_LINK = 1e6


def transfer_timeout(size: int) -> float:
    """Seconds that copying `size` bytes may take."""
    return _SHORT + size / _SLOWEST_LINK


def identify(run: Run, subject: object) -> Identity:
    return parse_identity(run(["sh", "-c", IDENTIFY], _SHORT).check(subject).text)


def memory(run: Run, subject: object) -> Memory:
    return parse_meminfo(run(["cat", "/proc/meminfo"], _SHORT).check(subject).text)


def free_space(run: Run, subject: object, folder: str) -> int:
    """Bytes that can be written below `folder`, or where it will be made."""
    script = 'd=$1; while [ ! -d "$d" ]; do d=$(dirname "$d"); done; df -k -P "$d"'
    told = run(["sh", "-c", script, "mobilellm", folder], _SHORT).check(subject).text
    return _free_bytes(told, subject, folder)


def _free_bytes(told: str, subject: object, folder: str) -> int:
    numbers = re.findall(r"\s(\d+)\s+(\d+)\s+(\d+)\s+\d+%", told)
    if not numbers:
        raise DeviceError(subject, f"df says nothing of {folder} that can be read")
    return int(numbers[-1][2]) * 1024


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


def push(run: Run, copy: Copy, subject: object, local: Path, remote: str) -> bool:
    """Copy a file with `copy` unless the same is there. Executable files stay executable."""
    size, wanted = local.stat().st_size, sha256(local)
    folder, part = str(PurePosixPath(remote).parent), f"{remote}.part"
    before = ["sh", "-c", _BEFORE, "mobilellm", folder, remote]
    told = run(before, transfer_timeout(size)).check(f"{subject}: {folder}").text
    if _HASH.match(told) and wanted in told.splitlines()[0]:
        return False
    free = _free_bytes(told, subject, folder)
    if free < size:
        problem = f"{folder} has {free / 1e6:,.1f} MB free and {local.name} has {size / 1e6:,.1f}"
        raise DeviceError(subject, problem, "Make room on the device")
    mode = "755" if local.stat().st_mode & 0o100 else "644"
    try:
        copy(local, part)
        after = ["sh", "-c", _AFTER, "mobilellm", part, remote, mode, wanted]
        run(after, transfer_timeout(size)).check(f"{subject}: {local.name}")
    except DeviceError:
        with suppress(DeviceError):  # the first error is the one to tell
            run(["rm", "-f", part], _SHORT)
        raise
    return True


def pull(run: Run, subject: object, remote: str, local: Path) -> None:
    """Copy a file from the device; its sha256 there and here must agree."""
    script = 'wc -c < "$1" && sha256sum "$1"'
    told = run(["sh", "-c", script, "mobilellm", remote], _SHORT).check(subject).text
    size, _, line = told.partition("\n")
    found = _HASH.match(line)
    content = run(["cat", remote], transfer_timeout(int(size))).check(subject).stdout
    local.parent.mkdir(parents=True, exist_ok=True)
    local.write_bytes(content)
    if found is None or sha256(local) != found[1]:
        local.unlink()
        raise DeviceError(subject, f"{remote} changed on its way", "Check the connection")


def remove(run: Run, subject: object, workspace: str, remote: str) -> None:
    """Remove what lies below the workspace, and nothing else."""
    inside = PurePosixPath(remote)
    if ".." in inside.parts or PurePosixPath(workspace) not in (inside, *inside.parents):
        raise DeviceError(subject, f"{remote} is not below {workspace}")
    run(["rm", "-rf", remote], _SHORT).check(subject)
