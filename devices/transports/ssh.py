"""Linux devices, with the ssh client: ``ssh:USER@HOST[:PORT]``, or an alias of your ssh config.

Your own ssh configuration applies (keys, jump hosts); ``MOBILELLM_SSH_CONFIG`` names another file.
There are no prompts: the host key must be known, and a key or an agent must authenticate you. One
connection carries all commands, and is closed a minute after the last one.
"""

import hashlib
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from devices.errors import DeviceError, UnreachableError
from devices.transports import Device, posix
from devices.transports.client import run_client
from devices.transports.supervised import Completed, OnLine, supervise

_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "20",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "6",
    "ControlMaster": "auto",
    "ControlPersist": "60",
}


def connected() -> list[str]:
    """Empty: hosts with an ssh server cannot be listed."""
    return []


def workspace(device: Device) -> str:
    # Relative to the home folder, where every ssh session starts.
    return ".cache/mobilellm/device"


def run(
    device: Device, argv: Sequence[str], timeout: float, on_line: OnLine | None = None
) -> Completed:
    return supervise(device, lambda command: _client(device, command), argv, timeout, on_line)


def push(device: Device, local: Path, remote: str) -> bool:
    def copy(source: Path, part: str) -> None:
        command = _client(device, ["sh", "-c", 'cat > "$1"', "mobilellm", part])
        limit = posix.transfer_timeout(source.stat().st_size)
        with source.open("rb") as file:
            code, _, errors = run_client(device, command, limit, file)
        if code:
            reason = "".join(errors.strip().splitlines()[-1:])
            raise DeviceError(device, f"{part} cannot be written ({reason})")

    return posix.push(run, copy, device, local, remote)


# The rest needs only a way to run commands.
identify = partial(posix.identify, run)
memory = partial(posix.memory, run)
free_space = partial(posix.free_space, run)
pull = partial(posix.pull, run)


def remove(device: Device, remote: str) -> None:
    posix.remove(run, device, workspace(device), remote)


def _client(device: Device, command: Sequence[str]) -> list[str]:
    """The ssh command that runs `command` on the device."""
    parts = re.fullmatch(r"(?:(.+)@)?\[?(.+?)\]?(?::(\d+))?", device.address)
    assert parts is not None, device
    user, host, port = parts.groups()
    options = [f"-o{key}={value}" for key, value in _OPTIONS.items()]
    config = os.environ.get("MOBILELLM_SSH_CONFIG")
    options += ["-F", config] if config else []
    options += [f"-oControlPath={_socket_folder(config)}/%C"]
    options += ["-l", user] if user else []
    options += ["-p", port] if port else []
    return ["ssh", "-T", *options, "--", host, shlex.join(command)]


def _socket_folder(config: str | None) -> Path:
    """The folder of the connection's socket, one for each user and configuration. Its path is
    short, as a socket needs."""
    name = hashlib.sha256((config or "").encode()).hexdigest()[:8]
    folder = Path(tempfile.gettempdir()) / f"mobilellm-ssh-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise UnreachableError(folder, "belongs to another user", "Set TMPDIR to a folder of yours")
    return folder
