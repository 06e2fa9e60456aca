"""This machine where it is a Mac, for Core ML. Written from Apple's documents; not tried."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from devices.answers import contained
from devices.errors import DeviceError
from devices.files import cache_folder, sha256
from devices.identity import Core, Identity, Memory
from devices.transports import Device
from devices.transports.supervised import Completed, OnLine, supervise

#: macOS has no setsid command.
_SESSION = "import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])"


def connected() -> list[str]:
    return ["mac"] if platform.system() == "Darwin" else []


def workspace(device: Device) -> str:
    return str(cache_folder() / "device")


@contained("mac", "its identity")
def identify(device: Device) -> Identity:
    chip = _sysctl("machdep.cpu.brand_string")
    fast = int(_sysctl("hw.perflevel0.physicalcpu") or 0)
    slow = int(_sysctl("hw.perflevel1.physicalcpu") or 0)
    virtual = _sysctl("kern.hv_vmm_present") == "1"
    return Identity(
        name=_sysctl("hw.model") or "Mac",
        soc=chip,
        machine=platform.machine(),
        system=f"macOS {platform.mac_ver()[0]}",
        kernel=platform.release(),
        cores=(Core(f"{chip} performance", fast, None), Core(f"{chip} efficiency", slow, None)),
        memory_bytes=memory(device).total,
        kind="virtual" if virtual else "real",
        kind_reason="kern.hv_vmm_present is 1" if virtual else "",
    )


@contained("mac", "its memory")
def memory(device: Device) -> Memory:
    """Available memory is what is free, inactive or purgeable."""
    text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
    pages = dict(line.split(":") for line in text.splitlines()[1:] if ":" in line)
    page = int(_sysctl("hw.pagesize") or 4096)
    names = ("Pages free", "Pages inactive", "Pages purgeable")
    available = sum(int(pages[name].strip(" .")) for name in names if name in pages) * page
    return Memory(int(_sysctl("hw.memsize") or 0), available)


def free_space(device: Device, folder: str) -> int:
    nearest = next(path for path in (Path(folder), *Path(folder).parents) if path.is_dir())
    return shutil.disk_usage(nearest).free


def run(
    device: Device, argv: Sequence[str], timeout: float, on_line: OnLine | None = None
) -> Completed:
    return supervise(device, list, argv, timeout, on_line, session=(sys.executable, "-c", _SESSION))


def push(device: Device, local: Path, remote: str) -> bool:
    target = Path(remote)
    if target.is_file() and sha256(target) == sha256(local):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    try:
        shutil.copy(local, part)
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DeviceError(device, f"{remote} cannot be written ({error.strerror})") from error
    return True


def pull(device: Device, remote: str, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(remote, local)


def remove(device: Device, remote: str) -> None:
    inside = Path(remote)
    if ".." in inside.parts or Path(workspace(device)) not in (inside, *inside.parents):
        raise DeviceError(device, f"{remote} is not below {workspace(device)}")
    if inside.is_dir():
        shutil.rmtree(inside)
    else:
        inside.unlink(missing_ok=True)


def _sysctl(name: str) -> str:
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()
