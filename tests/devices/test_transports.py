"""Every transport against the real protocol: this machine, adb with a real adbd, ssh with a real
sshd. What runs on the device, what comes back, and what is left there when it goes wrong."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from device_bed import (
    Daemon,
    Keys,
    commands_with,
    free_port,
    is_gone,
    started,
    wait_for_command,
)

from devices.errors import (
    BadDeviceError,
    DeviceError,
    DeviceLostError,
    DeviceTimeoutError,
    UnreachableError,
)
from devices.transports import TRANSPORTS, Device, parse_device, posix, transport_of
from devices.transports.supervised import Completed

#: Names and arguments that a shell would take apart.
HOSTILE = ["plain", "2 words", "$(touch /tmp/pwned)", "`id`", "a;b&&c|d>e", "it's \"so\"", "*?[a]",
           "-n", "new\nline", "\\back", "größe", "", "~", "$HOME"]  # fmt: skip

Run = Callable[..., Completed]


@pytest.fixture(params=["host", "adb", "ssh"])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "host":
        return parse_device("host")
    daemon: Daemon = request.getfixturevalue(f"{request.param}_device")
    return daemon.device


@pytest.fixture
def transport(device: Device) -> ModuleType:
    return transport_of(device)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        ("connected", []),
        ("workspace", ["device"]),
        ("identify", ["device"]),
        ("memory", ["device"]),
        ("free_space", ["device", "folder"]),
        ("run", ["device", "argv", "timeout", "on_line"]),
        ("push", ["device", "local", "remote"]),
        ("pull", ["device", "remote", "local"]),
        ("remove", ["device", "remote"]),
    ],
)
@pytest.mark.parametrize("kind", TRANSPORTS)
def test_every_transport_has_the_same_functions(
    kind: str, function: str, parameters: list[str]
) -> None:
    found = inspect.signature(getattr(transport_of(Device(kind)), function))
    assert list(found.parameters) == parameters


@pytest.mark.parametrize(
    "text",
    ["", "phone", "host:1", "adb:", "adb:-s", "adb:a b", "adb:$(id)", "ssh:", "ssh:-oProxy=x",
     "ssh:me@-host", "ssh:host:port", "ssh:a@b@c", "ssh:host;id", "mac:x", "usb:1"],
)  # fmt: skip
def test_what_names_no_device_is_refused(text: str) -> None:
    with pytest.raises(BadDeviceError, match="names no device"):
        parse_device(text)


@pytest.mark.parametrize(
    "text",
    ["host", "mac", "adb:emulator-5554", "adb:192.168.0.7:5555", "adb:R58M12ABCDE", "ssh:pi",
     "ssh:pi@raspberry.local", "ssh:root@127.0.0.1:2222", "ssh:me@[::1]:22"],
)  # fmt: skip
def test_a_device_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_device(text)) == text


def test_a_command_gives_its_code_and_both_streams_apart(
    device: Device, transport: ModuleType
) -> None:
    done = transport.run(device, ["sh", "-c", "echo out; echo err >&2; exit 7"], 60)
    assert (done.code, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_binary_output_is_what_it_was(device: Device, transport: ModuleType) -> None:
    script = "import os, sys; os.write(1, bytes(range(256)) * 2000)"
    done = transport.run(device, ["python3", "-c", script], 60)
    assert done.stdout == bytes(range(256)) * 2000


def test_arguments_reach_the_command_as_they_are(device: Device, transport: ModuleType) -> None:
    done = transport.run(device, ["printf", "%s\\0", *HOSTILE], 60)
    assert done.stdout.decode().split("\0")[:-1] == HOSTILE
    assert not Path("/tmp/pwned").exists()


def test_lines_are_told_as_they_come(device: Device, transport: ModuleType) -> None:
    seen: list[tuple[str, float]] = []
    script = "echo first; sleep 1; echo second"
    transport.run(
        device, ["sh", "-c", script], 60, lambda line: seen.append((line, time.monotonic()))
    )
    assert [line for line, _ in seen] == ["first", "second"]
    assert seen[1][1] - seen[0][1] > 0.7


def test_a_command_that_a_signal_ends_gives_128_and_the_signal(
    device: Device, transport: ModuleType
) -> None:
    assert transport.run(device, ["sh", "-c", "kill -ILL $$"], 60).code == 128 + signal.SIGILL


def test_a_command_that_is_not_there_gives_127(device: Device, transport: ModuleType) -> None:
    assert transport.run(device, ["/no/such/program"], 60).code == 127


def test_a_command_that_takes_too_long_is_gone_afterwards_with_its_children(
    device: Device, transport: ModuleType
) -> None:
    mark = f"300.{os.getpid()}{free_port()}"
    script = f"sleep {mark}1 & sleep {mark}2"
    started = time.monotonic()
    with pytest.raises(DeviceTimeoutError, match="did not end within 1 s and was killed"):
        transport.run(device, ["sh", "-c", script], 1)
    assert time.monotonic() - started < 15
    assert is_gone(f"sleep {mark}"), commands_with(mark)


@pytest.mark.parametrize("kind", ["adb", "ssh"])
def test_a_command_dies_with_its_client(kind: str, request: pytest.FixtureRequest) -> None:
    """The cable is pulled: nothing may go on on the device."""
    device = request.getfixturevalue(f"{kind}_device").device
    mark = f"300.{os.getpid()}{free_port()}"
    failure: list[Exception] = []
    heard = threading.Event()  # before that, nobody could know that it ever began

    def run() -> None:
        command = ["sh", "-c", f"echo begun; sleep {mark}"]
        try:
            transport_of(device).run(device, command, 60, lambda _line: heard.set())
        except DeviceError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert heard.wait(20)
    for folder in Path("/proc").glob("[0-9]*"):
        if _is_client(folder, mark):
            os.kill(int(folder.name), signal.SIGKILL)
    thread.join(20)
    assert [type(error) for error in failure] == [DeviceLostError]
    assert is_gone(f"sleep {mark}"), commands_with(mark)


def test_a_command_dies_with_this_program(device: Device) -> None:
    mark = f"300.{os.getpid()}{free_port()}"
    program = (
        "import sys; from devices.transports import parse_device, transport_of; "
        "d = parse_device(sys.argv[1]); transport_of(d).run(d, ['sleep', sys.argv[2]], 60)"
    )
    with started([sys.executable, "-c", program, str(device), mark], PYTHONPATH=str(ROOT)) as own:
        wait_for_command(f"sleep {mark}")
        own.kill()
    assert is_gone(f"sleep {mark}"), commands_with(mark)


def _is_client(folder: Path, mark: str) -> bool:
    """Whether it is a direct child of this process that carries the command."""
    try:
        line = (folder / "cmdline").read_bytes().decode(errors="replace")
        parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return False
    return mark in line and int(parent) == os.getpid()


@pytest.mark.parametrize("kind", ["adb", "ssh"])
def test_a_device_that_dies_in_the_middle_is_lost_and_never_a_success(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """`adb shell` itself ends with 0 then."""
    daemon: Daemon = request.getfixturevalue(f"{kind}_device")
    mark = f"300.{os.getpid()}{free_port()}"
    heard = threading.Event()

    def die() -> None:
        heard.wait(20)
        daemon.die()

    thread = threading.Thread(target=die)
    thread.start()
    command = ["sh", "-c", f"echo half; sleep {mark}; echo whole"]
    with pytest.raises(DeviceLostError, match="the connection ended while sh was running"):
        transport_of(daemon.device).run(daemon.device, command, 60, lambda _line: heard.set())
    thread.join()
    assert is_gone(f"sleep {mark}"), commands_with(mark)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name])
def test_a_file_is_copied_once_and_comes_back_the_same(
    name: str, device: Device, transport: ModuleType, tmp_path: Path
) -> None:
    local, back = tmp_path / "local" / name, tmp_path / "back"
    local.parent.mkdir(parents=True)
    local.write_bytes(os.urandom(70_000))
    remote = f"{tmp_path}/remote {name[:4]}/{name}"
    assert transport.push(device, local, remote)
    assert not transport.push(device, local, remote)
    transport.pull(device, remote, back)
    assert back.read_bytes() == local.read_bytes()


def test_a_file_that_differs_is_copied_again_and_stays_executable(
    device: Device, transport: ModuleType, tmp_path: Path
) -> None:
    local, remote = tmp_path / "program", f"{tmp_path}/on the device/program"
    local.write_text("#!/bin/sh\necho one\n")
    local.chmod(0o755)
    assert transport.push(device, local, remote)
    Path(remote).write_text("#!/bin/sh\necho wrong\n")
    assert transport.push(device, local, remote)
    assert transport.run(device, [remote], 60).text == "one\n"


def test_a_full_disk_is_told_before_anything_is_copied(
    device: Device, transport: ModuleType, small_disk: Path, tmp_path: Path
) -> None:
    local = tmp_path / "large"
    local.write_bytes(b"x" * 2_000_000)
    with pytest.raises(DeviceError, match=r"has 1\.0 MB free and large has 2\.0"):
        transport.push(device, local, f"{small_disk}/large")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half(
    device: Device,
    transport: ModuleType,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local = tmp_path / "large"
    local.write_bytes(b"x" * 2_000_000)
    monkeypatch.setattr(posix, "_free_bytes", lambda *_: 10**9)  # another program was faster
    with pytest.raises(DeviceError, match=r"No space left|cannot be written|failed"):
        transport.push(device, local, f"{small_disk}/large")
    assert list(small_disk.iterdir()) == []


def test_only_what_lies_below_the_workspace_can_be_removed(
    device: Device, transport: ModuleType, tmp_path: Path
) -> None:
    inside = transport.workspace(device)
    for outside in (str(tmp_path), "/", f"{inside}/../x", f"{inside}x"):
        with pytest.raises(DeviceError, match="is not below"):
            transport.remove(device, outside)
    assert tmp_path.exists()


def test_a_device_tells_what_it_is(device: Device, transport: ModuleType) -> None:
    identity = transport.identify(device)
    assert identity.machine == os.uname().machine
    assert identity.core_count == os.cpu_count()
    assert (
        identity.memory_bytes
        == transport.memory(device).total
        > transport.memory(device).available
        > 0
    )
    assert transport.free_space(device, "/tmp/not/yet/there") > 0


@pytest.mark.parametrize("kind", ["adb", "ssh"])
def test_a_refused_connection_is_unreachable(
    kind: str, adb_server: None, ssh_keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("MOBILELLM_SSH_CONFIG", str(ssh_keys.client_config(port)))
    device = parse_device(f"{kind}:127.0.0.1:{port}")
    with pytest.raises(UnreachableError, match=r"not found|refused"):
        transport_of(device).run(device, ["true"], 60)


def test_a_device_that_never_answers_takes_no_longer_than_allowed(
    ssh_keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setenv("MOBILELLM_SSH_CONFIG", str(ssh_keys.client_config(port)))
        monkeypatch.setattr("devices.transports.supervised._GRACE", 1.0)
        device = parse_device(f"ssh:root@127.0.0.1:{port}")
        with pytest.raises(DeviceTimeoutError, match="it is not known whether it began"):
            transport_of(device).run(device, ["true"], 1)


def test_an_unknown_host_key_is_refused(
    ssh_device: Daemon, ssh_keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ssh_keys.client_config(ssh_device.port, known=False)
    monkeypatch.setenv("MOBILELLM_SSH_CONFIG", str(config))
    with pytest.raises(UnreachableError, match="Host key verification failed"):
        transport_of(ssh_device.device).run(ssh_device.device, ["true"], 60)
    assert (ssh_keys.folder / f"known_hosts-{ssh_device.port}").read_text() == ""


def test_a_connected_adb_device_is_listed(adb_device: Daemon) -> None:
    assert str(adb_device.device) in transport_of(adb_device.device).connected()


def test_a_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    device = parse_device("adb:serial")
    with pytest.raises(UnreachableError, match="adb: is not installed on this machine"):
        transport_of(device).run(device, ["true"], 5)
