"""Devices for tests: real adbd and sshd on the loopback, of this machine and of an arm64 Debian
that qemu runs. `tests/devices/testbed.sh` makes what they need; without it they are skipped."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import NANO, ROOT

from devices.transports import Device, parse_device
from exporter.bundle.bundle import Bundle
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import export, no_progress, with_targets
from exporter.recipe import load_recipe

BED = Path(os.environ.get("MOBILELLM_TESTBED", ROOT / "build" / "testbed"))
HERE = ROOT / "tests" / "devices"
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
#: Everything an arm64 process sees is mounted for it alone: $1 the root, $2 its /proc/cpuinfo.
_ENTER = r"""
root=$1 cpuinfo=$2
shift 2
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --bind "$cpuinfo" "$root/proc/cpuinfo"
mount -t tmpfs -o size=1m tmpfs "$root/data/small"
exec chroot "$root" "$@"
"""


def free_port() -> int:
    """Not between 5555 and 5585, which the adb server searches by itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@dataclass
class Daemon:
    """A device's daemon, and what reaches it."""

    device: Device
    process: "subprocess.Popen[bytes]"
    port: int

    def die(self) -> None:
        """As a device whose battery is torn out: nothing is said any more. (sshd has a process
        for each connection, which leads a session of its own.)"""
        for pid in [*_descendants(self.process.pid, b"sshd"), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _descendants(pid: int, program: bytes) -> list[int]:
    """Children and their children, as far as they run this program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            runs = (folder / "cmdline").read_bytes().startswith(program)
        except OSError:  # it ended meanwhile
            continue
        if parent == pid and runs:
            found += [int(folder.name), *_descendants(int(folder.name), program)]
    return found


def commands_with(text: str) -> list[str]:
    """The command lines of this machine's processes, also of those below qemu, that hold `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if text in line:
            found.append(line)
    return found


def wait_for_command(text: str, seconds: float = 30.0) -> None:
    """Until a process runs whose command line begins so, the program's folder aside."""
    end = time.monotonic() + seconds
    while not any(f"{line} ".startswith(f"{text} ") for line in commands_with(text)):
        assert time.monotonic() < end, f"{text} never ran"
        time.sleep(0.05)


def is_gone(text: str, seconds: float = 10.0) -> bool:
    """Whether no process with `text` in its command line is left, soon."""
    end = time.monotonic() + seconds
    while commands_with(text):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@contextmanager
def started(command: Sequence[str], **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, env=os.environ | environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def testbed() -> Path:
    if os.geteuid() != 0:
        pytest.skip("the test-bed of devices wants root")
    if not (BED / "done").is_file():
        pytest.skip(f"no test-bed in {BED}: tests/devices/testbed.sh makes it")
    return BED


@pytest.fixture(scope="session")
def adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An adb server of our own, with keys of its own."""
    if shutil.which("adb") is None:
        pytest.skip("there is no adb client")
    home = tmp_path_factory.mktemp("adb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
        patch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or str(home / "cache"))
        patch.setenv("HOME", str(home))
        subprocess.run(["adb", "start-server"], check=True, capture_output=True)
        yield
        subprocess.run(["adb", "kill-server"], check=False, capture_output=True)


@contextmanager
def connected_adb(process: "subprocess.Popen[bytes]", port: int) -> Iterator[Daemon]:
    wait_for_port(port)
    serial = f"127.0.0.1:{port}"
    said = subprocess.run(["adb", "connect", serial], capture_output=True, text=True, check=True)
    assert "connected to" in said.stdout, said.stdout
    try:
        yield Daemon(parse_device(f"adb:{serial}"), process, port)
    finally:
        subprocess.run(["adb", "disconnect", serial], capture_output=True, check=False)


@contextmanager
def native_adbd(bed: Path) -> Iterator[Daemon]:
    root, port = bed / "native", free_port()
    loader = next((root / "usr").glob("lib*/ld-linux*"))
    libraries = list((root / "usr" / "lib").glob("*-linux-gnu"))
    search = ":".join(map(str, (*libraries, *(path / "android" for path in libraries))))
    program = root / "usr" / "lib" / "android-sdk" / "platform-tools" / "adbd"
    command = [loader, "--library-path", search, "--preload", root / "loopback.so", program]
    with (
        started(list(map(str, command)), ADBD_PORT=str(port)) as process,
        connected_adb(process, port) as daemon,
    ):
        yield daemon


@pytest.fixture
def adb_device(testbed: Path, adb_server: None) -> Iterator[Daemon]:
    with native_adbd(testbed) as daemon:
        yield daemon


@dataclass(frozen=True)
class Keys:
    """A client's key and a host's, made for this run."""

    folder: Path

    @classmethod
    def made_in(cls, folder: Path) -> "Keys":
        for name in ("client", "host"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        shutil.copy(folder / "client.pub", folder / "authorized_keys")
        return cls(folder)

    def client_config(self, port: int, known: bool = True) -> Path:
        hosts, config = self.folder / f"known_hosts-{port}", self.folder / f"config-{port}"
        key = (self.folder / "host.pub").read_text()
        hosts.write_text(f"[127.0.0.1]:{port} {key}" if known else "")
        config.write_text(
            f"IdentityFile {self.folder / 'client'}\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {hosts}\nGlobalKnownHostsFile /dev/null\n"
        )
        return config

    def server_config(self, port: int, seen_as: str) -> str:
        return (
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {seen_as}/host\nUsePAM no\n"
            f"StrictModes no\nAuthorizedKeysFile {seen_as}/authorized_keys\nPidFile none\n"
            "PermitRootLogin yes\nPasswordAuthentication no\n"
        )


@pytest.fixture(scope="session")
def ssh_keys(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys.made_in(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def ssh_device(ssh_keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    sshd, port = shutil.which("sshd") or "/usr/sbin/sshd", free_port()
    config = ssh_keys.folder / f"sshd-{port}"
    config.write_text(ssh_keys.server_config(port, str(ssh_keys.folder)))
    Path("/run/sshd").mkdir(exist_ok=True)
    monkeypatch.setenv("MOBILELLM_SSH_CONFIG", str(ssh_keys.client_config(port)))
    with started([sshd, "-D", "-f", str(config)]) as process:
        wait_for_port(port)
        daemon = Daemon(parse_device(f"ssh:root@127.0.0.1:{port}"), process, port)
        yield daemon
        daemon.die()


# ---- An arm64 machine ----


@pytest.fixture(scope="session")
def arm64(testbed: Path) -> Path:
    """Its root file system, with the kernel told to run its programs with qemu."""
    if not (_BINFMT / "status").is_file():
        mounted = subprocess.run(
            ["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if mounted.returncode:
            pytest.skip(f"binfmt_misc cannot be mounted ({mounted.stderr.strip()})")
    if not (_BINFMT / "qemu-aarch64").is_file():
        rule = Path("/usr/lib/binfmt.d/qemu-aarch64.conf").read_text().strip()
        (_BINFMT / "register").write_text(rule)
    return testbed / "arm64"


def inside(
    root: Path, cpu: str, cpuinfo: str, command: Sequence[str], **environment: str
) -> list[str]:
    """A command in the arm64 machine with this processor, which tells `cpuinfo` of itself. The
    processor `max` is never used: qemu 7.2 then gives wrong results for int8."""
    variables = {"QEMU_CPU": cpu, "LD_PRELOAD": "/loopback.so", "HOME": "/root", **environment}
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, "enter"]
    assigned = [f"{name}={value}" for name, value in variables.items()]
    path = "PATH=/usr/local/bin:/usr/bin:/usr/sbin"
    return [*enter, str(root), str(HERE / cpuinfo), "/usr/bin/env", "-i", path, *assigned, *command]


@contextmanager
def arm64_adbd(
    root: Path, cpu: str = "cortex-a76", cpuinfo: str = "cpuinfo_a76"
) -> Iterator[Daemon]:
    port = free_port()
    command = inside(
        root, cpu, cpuinfo, ["/usr/lib/android-sdk/platform-tools/adbd"], ADBD_PORT=str(port)
    )
    with started(command) as process, connected_adb(process, port) as daemon:
        yield daemon


@contextmanager
def arm64_sshd(root: Path, keys: Keys) -> Iterator[Daemon]:
    """The session's environment must be told anew: sshd passes nothing on."""
    port = free_port()
    for name in ("host", "authorized_keys"):
        shutil.copy(keys.folder / name, root / "etc" / "ssh" / name)
    config = keys.server_config(port, "/etc/ssh") + "SetEnv QEMU_CPU=cortex-a76\n"
    (root / "etc" / "ssh" / "sshd_test").write_text(config)
    os.chown(root / "root", 0, 0)
    with started(
        inside(
            root, "cortex-a76", "cpuinfo_a76", ["/usr/sbin/sshd", "-D", "-f", "/etc/ssh/sshd_test"]
        )
    ) as process:
        wait_for_port(port)
        daemon = Daemon(parse_device(f"ssh:root@127.0.0.1:{port}"), process, port)
        yield daemon
        daemon.die()


# ---- What is measured ----


def demo_bundle(out: Path, *overrides: str) -> Bundle:
    """The demo bundle with a .pte and an .onnx, and a short profile."""
    recipe = load_recipe("mobilellm-r1-nano-int4", [
        "targets.0.max_context=256", "targets.1.max_context=256",
        "profile.sustained_seconds=1", "profile.prompt_lengths=[8,32]", "profile.depths=[0,64]",
        "profile.decode_steps=4", "profile.max_repeats=7", *overrides,
    ])  # fmt: skip
    recipe = with_targets(recipe, ["executorch", "onnx"])
    result = export(recipe, open_checkpoint(NANO), out, no_progress)
    assert result.bundle is not None, [check for check in result.checks if not check.passed]
    return result.bundle


@pytest.fixture(scope="session")
def portable_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its .pte has core operators only. Read it only."""
    out = tmp_path_factory.mktemp("portable") / "nano"
    return demo_bundle(out, "targets.0.attention=portable")


@pytest.fixture(scope="session")
def exact_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Without the rounding of activations, which turns the last bit of a float into a step."""
    return demo_bundle(
        tmp_path_factory.mktemp("exact") / "nano",
        "quantization.linear=float", "quantization.embedding=float",
    )  # fmt: skip
