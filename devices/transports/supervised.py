"""Run one command on a device such that no process stays behind and its end is known for certain.

A shell script on the device starts the command in a session of its own and prints its pid. It kills
the whole session when the connection is lost (its standard input ends) or the time limit is over.
Its last line has a random marker of this run: without that line the command did not end, whatever
the exit code of the client.
"""

import re
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from devices.errors import (
    CommandFailedError,
    DeviceError,
    DeviceLostError,
    DeviceTimeoutError,
    UnreachableError,
)
from devices.transports.client import Streams, run_client, start

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

    @property
    def all_text(self) -> str:
        """Standard output and standard error: some programs log on the one, some on the other."""
        return self.text + "\n" + self.stderr.decode("utf-8", "replace")

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
    DeviceTimeoutError, DeviceLostError or UnreachableError, and DeviceError for a command that
    prints more than `client` allows; a command that fails is an ordinary result.
    """
    marker = f"mobilellm-{secrets.token_hex(8)}"
    limit = str(int(timeout + _GRACE) + 1)
    script = ["sh", "-c", _SUPERVISOR, "mobilellm", marker, limit, *session, *argv]
    started = time.monotonic()
    client = start(spawn(script), subprocess.PIPE)
    output = _Output(client, marker, on_line)
    ended = output.streams.wait_or_excess(timeout)
    seconds = time.monotonic() - started
    if not ended:
        where = _stop(client, output, spawn)
        if output.streams.excess:
            problem = f"{argv[0]} printed {output.streams.excess}{where}"
            raise DeviceError(subject, problem, "Nothing of this run counts")
        problem = f"{argv[0]} did not end within {timeout:g} s{where}"
        raise DeviceTimeoutError(subject, problem, "Raise --timeout, or measure less")
    client.wait()
    if client.stdin:
        client.stdin.close()
    if output.code is None:
        said = output.stderr().decode("utf-8", "replace").strip().splitlines()
        reason = said[-1] if said else f"the client ended with code {client.returncode}"
        if not output.began:
            raise UnreachableError(
                subject, f"cannot be reached ({reason})", "Connect it, or switch it on"
            )
        problem = f"the connection ended while {argv[0]} was running ({reason})"
        raise DeviceLostError(subject, problem, "Connect it again; nothing of this run is kept")
    stdout = bytes(output.streams.stdout)
    return Completed(tuple(argv), output.code, stdout, output.stderr(), seconds)


class _Output:
    """What a client prints: its streams, without the marker's lines, and what those lines say."""

    #: Longer than any of the marker's lines, which may arrive in two blocks.
    _OVERLAP = 80

    def __init__(
        self, client: "subprocess.Popen[bytes]", marker: str, on_line: OnLine | None
    ) -> None:
        self.code: int | None = None
        self.pid: str | None = None
        self.began = False
        self._on_line, self._line, self._last = on_line, b"", b""
        self._marker = re.compile(rb"\n?%s (begin|pid|end) (\d{1,10})\r?\n" % marker.encode())
        self.streams = Streams(client, self._find_lines if on_line else None, self._find_marks)

    def stderr(self) -> bytes:
        """Standard error without the marker's lines."""
        return self._marker.sub(b"", bytes(self.streams.stderr))

    def _find_lines(self, block: bytes) -> None:
        assert self._on_line is not None
        *lines, rest = (self._line + block).split(b"\n")
        self._line = rest[: 1 << 16]
        for line in lines:
            self._on_line(line.decode("utf-8", "replace").rstrip("\r"))

    def _find_marks(self, block: bytes) -> None:
        recent = self._last + block
        for match in self._marker.finditer(recent):
            self.began = True
            if match[1] == b"pid":
                self.pid = match[2].decode()
            elif match[1] == b"end":
                self.code = int(match[2])
        self._last = recent[-self._OVERLAP :]


def _stop(client: "subprocess.Popen[bytes]", output: _Output, spawn: Spawn) -> str:
    """Kill the command on the device. Gives the end of the error message: whether it was killed."""
    if client.stdin:
        client.stdin.close()  # the script on the device sees it and kills the session
    output.streams.wait(_GRACE)
    client.kill()
    client.wait()
    output.streams.wait(1)
    if output.code is not None:
        return " and was killed"
    if output.pid is None:
        return "; it is not known whether it began"
    try:
        command = spawn(["sh", "-c", _KILL, "mobilellm", output.pid])
        if run_client("killing", command, _GRACE)[0] == 0:
            return " and was killed"
    except DeviceTimeoutError:
        return f"; nothing answers, so process {output.pid} ends {_GRACE:g} s later by itself"
    except DeviceError:  # the error to report is why it is killed
        pass
    return f"; process {output.pid} may still run on the device"
