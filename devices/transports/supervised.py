"""Run one command on a device such that no process stays behind and its end is known for certain.

A shell script on the device starts the command in a session of its own and prints its pid. It kills
the whole session when the connection is lost (its standard input ends) or the time limit is over.
Its last line has a random marker of this run: without that line the command did not end, whatever
the exit code of the client.
"""

import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from devices.errors import CommandFailedError, DeviceLostError, DeviceTimeoutError, UnreachableError

#: $1 is the marker, $2 the limit in seconds, then follows the command. Signals that a lost
#: connection sends must not end the script before it has killed the session.
_SUPERVISOR = r"""
marker=$1 limit=$2
shift 2
exec 3<&0
printf '\n%s begin 0\n' "$marker" >&2
"$@" </dev/null 3<&- &
pid=$!
trap '' HUP PIPE
printf '\n%s pid %s\n' "$marker" "$pid" >&2
( read -r _ <&3; kill -KILL "-$pid" "$pid" ) >/dev/null 2>&1 &
reader=$!
( trap 'kill $sleeper; exit' TERM; sleep "$limit" & sleeper=$!; wait $sleeper
  kill -KILL "-$pid" "$pid" ) 3<&- >/dev/null 2>&1 &
watch=$!
wait "$pid"
code=$?
kill "$reader" "$watch" 2>/dev/null
printf '\n%s end %s\n' "$marker" "$code" >&2
exit 0
"""
#: Kill a session by the pid of its first process; fails if that process still exists.
_KILL = 'kill -KILL "-$1" "$1"; sleep 1; ! kill -0 "$1"'
#: Seconds that stopping a command may take, and by which the script's own limit is longer.
_GRACE = 10.0

#: Makes, of a command for the device, the command of this machine that runs it there.
Spawn = Callable[[Sequence[str]], list[str]]
#: Called with each line of standard output, without its end.
OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Completed:
    """A command that ended. `code` is its exit code, or 128 plus the signal that ended it."""

    argv: tuple[str, ...]
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode("utf-8", "replace")

    def check(self, subject: object) -> "Completed":
        """The command itself. Raises CommandFailedError, with the last line of stderr, for other
        codes than 0."""
        if self.code:
            lines = self.stderr.decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else "no message"
            raise CommandFailedError(
                subject, f"{self.argv[0]} ended with {describe_code(self.code)} ({reason})"
            )
        return self


def describe_code(code: int) -> str:
    """An exit code in words, with the meaning of common signals."""
    meanings = {
        132: "SIGILL: the CPU lacks an instruction that the program uses",
        134: "SIGABRT: the program gave up",
        137: "SIGKILL: killed, as the system does when memory runs out",
        139: "SIGSEGV: the program crashed",
    }
    return f"code {code}" + (f", {meanings[code]}" if code in meanings else "")


def supervise(
    subject: object,
    spawn: Spawn,
    argv: Sequence[str],
    timeout: float,
    on_line: OnLine | None = None,
    session: Sequence[str] = ("setsid",),
) -> Completed:
    """Run `argv` on a device for at most `timeout` seconds.

    `session` is a command on the device that starts another one in a new session. Raises
    DeviceTimeoutError, DeviceLostError or UnreachableError; a command that fails is an ordinary
    result.
    """
    marker = f"mobilellm-{secrets.token_hex(8)}"
    limit = str(int(timeout + _GRACE) + 1)
    script = ["sh", "-c", _SUPERVISOR, "mobilellm", marker, limit, *session, *argv]
    started = time.monotonic()
    client = _start(spawn(script))
    output = _Output(client, marker, on_line)
    ended = output.wait(timeout)
    seconds = time.monotonic() - started
    if not ended:
        where = _stop(client, output, spawn)
        problem = f"{argv[0]} did not end within {timeout:g} s{where}"
        raise DeviceTimeoutError(subject, problem, "Raise --timeout, or measure less")
    client.wait()
    if client.stdin:
        client.stdin.close()
    if output.code is None:
        said = output.stderr.decode("utf-8", "replace").strip().splitlines()
        reason = said[-1] if said else f"the client ended with code {client.returncode}"
        if not output.began:
            raise UnreachableError(
                subject, f"cannot be reached ({reason})", "Connect it, or switch it on"
            )
        problem = f"the connection ended while {argv[0]} was running ({reason})"
        raise DeviceLostError(subject, problem, "Connect it again; nothing of this run is kept")
    return Completed(tuple(argv), output.code, output.stdout, output.stderr, seconds)


def _start(argv: list[str]) -> "subprocess.Popen[bytes]":
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except FileNotFoundError as error:
        remedy = f"Install it (Debian: {_PACKAGES.get(argv[0], argv[0])})"
        raise UnreachableError(argv[0], "is not installed on this machine", remedy) from error


_PACKAGES = {"ssh": "openssh-client"}


class _Output:
    """Reads both streams of a client in threads, and removes the marker's lines from stderr."""

    def __init__(
        self, client: "subprocess.Popen[bytes]", marker: str, on_line: OnLine | None
    ) -> None:
        self.code: int | None = None
        self.pid: str | None = None
        self.began = False
        self.stdout, self.stderr = b"", b""
        self._on_line = on_line
        self._marker = re.compile(rb"\n?%s (begin|pid|end) (\d+)\r?\n" % marker.encode())
        assert client.stdout is not None and client.stderr is not None
        self._threads = [
            threading.Thread(target=self._read_stdout, args=(client.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(client.stderr,), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float) -> bool:
        """Whether both streams ended within `timeout` seconds."""
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _read_stdout(self, stream: IO[bytes]) -> None:
        parts = []
        for line in stream:
            parts.append(line)
            if self._on_line:
                self._on_line(line.decode("utf-8", "replace").rstrip("\r\n"))
        self.stdout = b"".join(parts)

    def _read_stderr(self, stream: IO[bytes]) -> None:
        collected = b""
        while block := stream.read1(1 << 16):  # type: ignore[attr-defined]  # of BufferedReader
            collected += block
            for match in self._marker.finditer(collected):
                self.began = True
                if match[1] == b"pid":
                    self.pid = match[2].decode()
                elif match[1] == b"end":
                    self.code = int(match[2])
            collected = self._marker.sub(b"", collected)
            self.stderr = collected


def _stop(client: "subprocess.Popen[bytes]", output: _Output, spawn: Spawn) -> str:
    """Kill the command on the device. Gives the end of the error message: whether it was killed."""
    if client.stdin:
        client.stdin.close()  # the script on the device sees it and kills the session
    output.wait(_GRACE)
    client.kill()
    client.wait()
    output.wait(1)
    if output.code is not None:
        return " and was killed"
    if output.pid is None:
        return "; it is not known whether it began"
    try:
        again = subprocess.run(
            spawn(["sh", "-c", _KILL, "mobilellm", output.pid]),
            stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_GRACE,
        )  # fmt: skip
        if again.returncode == 0:
            return " and was killed"
    except subprocess.TimeoutExpired:
        return f"; nothing answers, so process {output.pid} ends {_GRACE:g} s later by itself"
    return f"; process {output.pid} may still run on the device"
