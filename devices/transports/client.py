"""Client programs on this machine, such as adb and ssh: what they print is limited in size and
time, since a device decides what that is."""

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from devices.errors import DeviceError, DeviceTimeoutError, UnreachableError

#: Bytes that a command may print on standard output and on standard error.
MOST_OUTPUT, MOST_ERRORS = 64 << 20, 4 << 20
_PACKAGES = {"ssh": "openssh-client"}
OnBlock = Callable[[bytes], None]


def start(argv: Sequence[str], stdin: int | IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start a client. Raises UnreachableError where it is not installed or cannot be started."""
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(argv, stdin=stdin, stdout=pipe, stderr=pipe, start_new_session=True)
    except FileNotFoundError as error:
        remedy = f"Install it (Debian: {_PACKAGES.get(argv[0], argv[0])})"
        raise UnreachableError(argv[0], "is not installed on this machine", remedy) from error
    except (OSError, ValueError) as error:  # ValueError: an argument with a null character
        raise UnreachableError(argv[0], f"cannot be started ({error})") from error


class Streams:
    """Reads both output streams of a client in threads, each up to its limit.

    What exceeds a limit is read and dropped, so that the client can end; `excess` then says which.
    Each block is also given to `on_output` or `on_error`, as it arrives.
    """

    def __init__(
        self,
        client: "subprocess.Popen[bytes]",
        on_output: OnBlock | None = None,
        on_error: OnBlock | None = None,
    ) -> None:
        self.stdout, self.stderr = bytearray(), bytearray()
        self.excess = ""
        self._attention = threading.Event()
        assert client.stdout is not None and client.stderr is not None
        streams = (
            (client.stdout, self.stdout, MOST_OUTPUT, "standard output", on_output),
            (client.stderr, self.stderr, MOST_ERRORS, "standard error", on_error),
        )
        self._running = len(streams)
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float) -> bool:
        """Whether both streams ended within `timeout` seconds."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def wait_or_excess(self, timeout: float) -> bool:
        """As `wait`, but also ends, with False, as soon as a limit is exceeded."""
        self._attention.wait(timeout)
        return not self.excess and self.wait(0.0 if self._running else 1.0)

    def _read(
        self, stream: IO[bytes], content: bytearray, most: int, name: str, on_block: OnBlock | None
    ) -> None:
        try:
            while block := stream.read1(1 << 16):  # type: ignore[attr-defined]  # BufferedReader
                if not self.excess and len(content) + len(block) > most:
                    self.excess = f"more than {most >> 20} MiB on {name}"
                    self._attention.set()
                if not self.excess:
                    content += block
                if on_block:
                    on_block(block)
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._attention.set()


def run_client(
    subject: object,
    argv: Sequence[str],
    timeout: float,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
) -> tuple[int, str, str]:
    """Run a client to its end: its exit code, standard output and standard error.

    Raises UnreachableError, DeviceTimeoutError, and DeviceError where it prints too much.
    """
    client = start(argv, stdin)
    streams = Streams(client)
    ended = False
    try:
        ended = streams.wait_or_excess(timeout)
    finally:  # an interrupt must not leave the client behind either
        if not ended:
            client.kill()
        client.wait()
    if streams.excess:
        raise DeviceError(subject, f"{argv[0]} printed {streams.excess}")
    if not ended:
        raise DeviceTimeoutError(subject, f"{argv[0]} did not end within {timeout:.0f} s")
    said, errors = (
        bytes(part).decode("utf-8", "replace") for part in (streams.stdout, streams.stderr)
    )
    return client.returncode, said, errors
