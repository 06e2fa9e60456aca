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
    text = run(["sh", "-c", script, "mobilellm", folder], _SHORT).check(subject).text
    numbers = re.findall(r"\s(\d+)\s+(\d+)\s+(\d+)\s+\d+%", text)
    if not numbers:
        raise DeviceError(subject, f"df says nothing of {folder} that can be read")
    return int(numbers[-1][2]) * 1024


def remote_sha256(run: Run, path: str, size: int) -> str | None:
    """The hash of a file on the device; None where there is no such file."""
    done = run(["sha256sum", path], transfer_timeout(size))
    # Before a name with unusual characters sha256sum writes a backslash.
    found = re.match(r"\\?([0-9a-f]{64})\s", done.text)
    return found[1] if done.code == 0 and found else None


def push(run: Run, copy: Copy, subject: object, local: Path, remote: str) -> bool:
    """Copy a file with `copy` unless the same is there. Executable files stay executable."""
    size, wanted = local.stat().st_size, sha256(local)
    if remote_sha256(run, remote, size) == wanted:
        return False
    folder = str(PurePosixPath(remote).parent)
    run(["mkdir", "-p", folder], _SHORT).check(subject)
    free = free_space(run, subject, folder)
    if free < size:
        problem = f"{folder} has {free / 1e6:,.1f} MB free and {local.name} has {size / 1e6:,.1f}"
        raise DeviceError(subject, problem, "Make room on the device")
    part = f"{remote}.part"
    try:
        copy(local, part)
        found = remote_sha256(run, part, size)
        if found != wanted:
            problem = f"{local.name} arrived with sha256 {(found or 'none')[:12]}…, not what it is"
            raise DeviceError(subject, problem, "Check the connection and the storage")
        mode = "755" if local.stat().st_mode & 0o100 else "644"
        run(["chmod", mode, part], _SHORT).check(subject)
        run(["mv", "-f", part, remote], _SHORT).check(subject)
    except DeviceError:
        with suppress(DeviceError):  # the first error is the one to tell
            run(["rm", "-f", part], _SHORT)
        raise
    return True


def pull(run: Run, subject: object, remote: str, local: Path) -> None:
    """Copy a file from the device; its sha256 there and here must agree."""
    probe = run(["sh", "-c", 'wc -c < "$1"', "mobilellm", remote], _SHORT).check(subject)
    size = int(probe.text)
    wanted = remote_sha256(run, remote, size)
    content = run(["cat", remote], transfer_timeout(size)).check(subject).stdout
    local.parent.mkdir(parents=True, exist_ok=True)
    local.write_bytes(content)
    if sha256(local) != wanted:
        local.unlink()
        raise DeviceError(subject, f"{remote} changed on its way", "Check the connection")


def remove(run: Run, subject: object, workspace: str, remote: str) -> None:
    """Remove what lies below the workspace, and nothing else."""
    inside = PurePosixPath(remote)
    if ".." in inside.parts or PurePosixPath(workspace) not in (inside, *inside.parents):
        raise DeviceError(subject, f"{remote} is not below {workspace}")
    run(["rm", "-rf", remote], _SHORT).check(subject)
