"""A child process that serves calls with limits of time and memory, for files that are not ours.

A native library that parses a hostile file may crash, loop or allocate without end. In a child this
ends the child alone, and the parent raises an InputError that says what happened or which limit was
reached. The child also cannot write to the user's terminal. This is no sandbox: code that exploits
a fault of a native library runs with the rights of the user.

A service is a class. The child makes one object of it and calls its methods by name, one at a time.
Both directions carry frames of a JSON header and bytes, so the parent never runs what it receives.
On systems without ``/proc`` (macOS) memory is not limited.
"""

import json
import logging
import os
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from exporter.errors import InputError, printable

#: Seconds to start Python and import a service: code of ours, on a machine that may be busy.
START_SECONDS = 300.0
#: The lengths of the header and of the bytes that follow it.
_LENGTHS = struct.Struct("<IQ")
_HEADER_LIMIT = 1 << 20
#: The last bytes of a child's standard error that are kept, and the length of a shown message.
_ERRORS_KEPT, _SHOWN = 4096, 500
#: A child ends itself this many seconds after the limit: its parent, which ends it at the limit,
#: may have been killed.
_GRACE = 5.0
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from exporter.child_process import serve; serve(sys.argv[1])"
)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The limits of one call.

    `seconds` is wall time, `memory` what the child may allocate in bytes from its start on, and
    `answer` the size of the answer's bytes.
    """

    seconds: float
    memory: int
    answer: int = 0


class ChildProcess:
    """A child that serves the methods of `service`, which is named as ``module:class``.

    `subject` is the file that the child reads, `actor` what reads it, and `remedy` what a user can
    do: they make the message of each failure. After a failure the child is gone, and each further
    call raises the same InputError.
    """

    def __init__(self, service: str, subject: object, actor: str, remedy: str) -> None:
        self._subject, self._actor, self._remedy = subject, actor, remedy
        self._limits = Limits(START_SECONDS, 0)
        self._failure: InputError | None = None
        self._received, self._unsent = bytearray(), memoryview(b"")
        self._errors, self._started = b"", False
        folder = tempfile.mkdtemp(prefix="mobilellm-")
        settings = {
            "service": service,
            "parent": os.getpid(),
            "verbose": _LOG.isEnabledFor(logging.DEBUG),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(settings), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TMPDIR": folder, "RUST_BACKTRACE": "0"},
        )
        self._selector = selectors.DefaultSelector()
        self._input, self._output, self._error = (
            stream.fileno()
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr)
            if stream is not None
        )
        for descriptor in (self._input, self._output, self._error):
            os.set_blocking(descriptor, False)
        for descriptor in (self._output, self._error):
            self._selector.register(descriptor, selectors.EVENT_READ)
        #: Ends the child; called, too, when this object is no longer used and when Python exits.
        self.close = weakref.finalize(self, _end, self._process, self._selector, folder)

    @property
    def failed(self) -> bool:
        """Whether the child is gone."""
        return self._failure is not None

    def stop(self) -> None:
        """Kill the child, from any thread. A call in progress fails."""
        self._process.kill()

    def call(
        self,
        method: str,
        limits: Limits,
        arguments: Mapping[str, object] | None = None,
        data: bytes = b"",
    ) -> tuple[Any, bytearray]:
        """The result of a method of the service: plain data, and bytes.

        Raises InputError: the one that the method raised, or one for a crash or a limit.
        """
        self.begin(method, limits, arguments, data)
        return self.finish()

    def begin(
        self,
        method: str,
        limits: Limits,
        arguments: Mapping[str, object] | None = None,
        data: bytes = b"",
    ) -> None:
        """Begin a call, so that the child works while the parent does something else."""
        if self._failure:
            raise self._failure
        header = {
            "method": method,
            "arguments": dict(arguments or {}),
            "seconds": limits.seconds,
            "memory": limits.memory,
        }
        self._limits = limits
        self._unsent = memoryview(_frame(header, data))
        self._send()

    def finish(self) -> tuple[Any, bytearray]:
        """The result of the call that was begun. Raises InputError as `call` does."""
        if self._failure:
            raise self._failure
        if not self._started:
            self._receive(START_SECONDS, 0)
            self._started = True
        header, data = self._receive(self._limits.seconds, self._limits.answer)
        if "result" in header:
            return header["result"], data
        if "refused" in header:
            raise InputError(*map(str, header["refused"]))
        said = str(header.get("raised"))
        raise self._fail(f"failed ({_line(said)}){self._memory_note(said)}")

    def _receive(self, seconds: float, most: int) -> tuple[dict[str, Any], bytearray]:
        """One frame of the child, with `most` bytes of data at most."""
        deadline = time.monotonic() + seconds
        while True:
            frame = self._take_frame(most)
            if frame:
                return frame
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._fail(f"did not finish within {seconds:.3g} s, its limit")
            for key, _ in self._selector.select(left):
                if key.fd == self._input:
                    self._send()
                elif key.fd == self._error:
                    self._keep_errors()
                elif not self._read():
                    raise self._fail(self._end_of_child())

    def _send(self) -> None:
        """Write what the pipe takes of the request; `_receive` goes on with the rest."""
        try:
            sent = os.write(self._input, self._unsent)
        except BlockingIOError:
            sent = 0
        except BrokenPipeError:  # the child is gone, which `_receive` finds
            sent = len(self._unsent)
        left = self._unsent[sent:]
        self._unsent = left if left else memoryview(b"")  # an empty part would keep the whole
        waiting = self._input in self._selector.get_map()
        if self._unsent and not waiting:
            self._selector.register(self._input, selectors.EVENT_WRITE)
        elif waiting and not self._unsent:
            self._selector.unregister(self._input)

    def _read(self) -> bool:
        """Keep what the child has written; False at its end."""
        part = os.read(self._output, 1 << 16)
        self._received += part
        return bool(part)

    def _keep_errors(self) -> bool:
        """Keep the end of what native code printed; False at its end."""
        part = os.read(self._error, 1 << 16)
        if not part and self._error in self._selector.get_map():
            self._selector.unregister(self._error)
        self._errors = (self._errors + part)[-_ERRORS_KEPT:]
        for line in part.splitlines():
            _LOG.debug("%s: %s", self._actor, printable(_line(os.fsdecode(line))))
        return bool(part)

    def _take_frame(self, most: int) -> tuple[dict[str, Any], bytearray] | None:
        """The next frame, if all of it was received."""
        if len(self._received) < _LENGTHS.size:
            return None
        length, size = _LENGTHS.unpack_from(self._received)
        if length > _HEADER_LIMIT or size > most:
            raise self._fail(f"gave an answer of {length + size:,} bytes; the limit is {most:,}")
        start = _LENGTHS.size + length
        if len(self._received) < start + size:
            return None
        text, data = self._received[_LENGTHS.size : start], self._received[start : start + size]
        del self._received[: start + size]
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise self._fail("gave an answer that cannot be read")
        return header, data

    def _end_of_child(self) -> str:
        """What ended the child, which has closed its output."""
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "closed its output"
        with suppress(BlockingIOError):  # a process that the child started may keep it open
            while self._keep_errors():
                continue
        if code == -signal.SIGALRM:
            return f"did not finish within {self._limits.seconds:.3g} s, its limit"
        words = os.fsdecode(self._errors).strip()
        last = _line(words.rpartition("\n")[2])
        said = f"; its last words: {last}" if last else ""
        return f"{_exit_of(code)}{said}{self._memory_note(words)}"

    def _memory_note(self, said: str) -> str:
        """The limit of memory, where a failure speaks of memory."""
        if self._limits.memory and ("memory" in said.lower() or "alloc" in said.lower()):
            return f"; its memory is limited to {self._limits.memory / 2**20:,.0f} MiB"
        return ""

    def _fail(self, problem: str) -> InputError:
        """The error of a call after which the child is ended."""
        self._failure = InputError(self._subject, f"{self._actor} {problem}", self._remedy)
        self.close()
        return self._failure


def _line(text: str) -> str:
    """`text` on one line, shortened. An InputError escapes control characters."""
    line = " ".join(text[: 4 * _SHOWN].split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def _exit_of(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal
        name = ""
    return f"was killed by signal {-code}{name}"


def _frame(header: Mapping[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return _LENGTHS.pack(len(text), len(data)) + text + data


def _end(process: "subprocess.Popen[bytes]", selector: selectors.BaseSelector, folder: str) -> None:
    """End the child, and remove its temporary files."""
    selector.close()
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    shutil.rmtree(folder, ignore_errors=True)


# The child.


def serve(text: str) -> None:
    """Serve the calls of the parent until it closes the pipe. `text` is the settings as JSON."""
    settings = json.loads(text)
    # Native code prints to descriptors 0 to 2. The frames have others, so that it cannot harm them.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the parent as well
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _end_with(settings["parent"])
    logging.getLogger("exporter").setLevel(logging.DEBUG if settings["verbose"] else logging.ERROR)
    module, _, name = settings["service"].partition(":")
    service = getattr(import_module(module), name)()
    limit_memory = _memory_limiter()
    _write(answers, _frame({"result": None}, b""))
    while lengths := requests.read(_LENGTHS.size):
        length, size = _LENGTHS.unpack(lengths)
        request, data = json.loads(requests.read(length)), requests.read(size)
        limit_memory(request["memory"])
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE)
        answer = _answer(getattr(service, request["method"]), request["arguments"], data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(answers, _frame(*answer))


def _answer(
    method: Callable[..., tuple[object, bytes]], arguments: Mapping[str, object], data: bytes
) -> tuple[dict[str, object], bytes]:
    try:
        result, found = method(data, **arguments)
    except InputError as error:
        return {"refused": [error.subject, error.problem, error.remedy]}, b""
    except BaseException as error:  # a panic of Rust code is no Exception
        return {"raised": _described(error)}, b""
    return {"result": result}, found


def _described(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}"[: 4 * _SHOWN]


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _end_with(parent: int) -> None:
    """Have Linux kill this process when its parent ends, also in the middle of a call."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _memory_limiter() -> Callable[[int], None]:
    """A function that limits what this process may allocate beyond what it has now, in bytes.

    The limit is on data (RLIMIT_DATA): the address space also counts mapped files and reserved
    ranges. It never sinks, since freed memory stays with the process.
    """
    statistics = Path("/proc/self/statm")
    if not statistics.is_file():
        return lambda memory: None
    data_pages = int(statistics.read_text().split()[5])
    base, most = data_pages * resource.getpagesize(), 0

    def limit(memory: int) -> None:
        nonlocal most
        if memory > most:
            most = memory
            resource.setrlimit(resource.RLIMIT_DATA, (base + most, resource.RLIM_INFINITY))

    return limit
