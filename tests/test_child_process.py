"""A child process contains what native code does, within limits, and leaves nothing behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from exporter.child_process import ChildProcess, Limits
from exporter.errors import InputError

LIMITS = Limits(20, 256 << 20, 1 << 20)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")


def start(service: str = "misbehaving:Misbehaving") -> ChildProcess:
    return ChildProcess(service, "a.file", "the library", "Get another file")


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    child = start()
    yield child
    child.close()


def failure_of(
    child: ChildProcess, method: str, limits: Limits = LIMITS, **arguments: object
) -> InputError:
    """The error of a call; after it the child must be gone."""
    with pytest.raises(InputError) as raised:
        child.call(method, limits, arguments)
    assert child.failed
    with pytest.raises(InputError) as again:
        child.call("echo", LIMITS)
    assert again.value is raised.value
    assert (raised.value.subject, raised.value.remedy) == ("a.file", "Get another file")
    return raised.value


def is_running(process: int) -> bool:
    try:
        statistics = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return not statistics.rpartition(")")[2].startswith(" Z")


# Calls.


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 4096], ids=len)
@pytest.mark.parametrize("value", [None, 7, "Grüße \ud800", [1, {"a": []}]], ids=repr)
def test_values_and_bytes_come_back_as_they_were(
    value: object, data: bytes, child: ChildProcess
) -> None:
    assert child.call("echo", LIMITS, {"value": value}, data) == (value, data)


def test_a_large_request_and_a_large_answer_go_through_small_pipes(child: ChildProcess) -> None:
    data = os.urandom(20 << 20)
    limits = Limits(60, 256 << 20, len(data))
    assert child.call("echo", limits, {}, data) == (None, data)


def test_a_call_that_was_begun_is_answered_later(child: ChildProcess) -> None:
    child.begin("echo", LIMITS, {"value": 1})
    time.sleep(0.5)  # the child has started, and the answer lies in the pipe
    assert child.finish()[0] == 1


def test_a_refusal_comes_as_it_was_raised_and_the_child_goes_on(child: ChildProcess) -> None:
    with pytest.raises(InputError) as raised:
        child.call("refuse", LIMITS, {"problem": "is bad"})
    refused = raised.value
    assert (refused.subject, refused.problem, refused.remedy) == ("file", "is bad", "Get another")
    assert child.call("echo", LIMITS, {"value": 2})[0] == 2


def test_what_native_code_prints_and_reads_does_not_reach_the_terminal_or_the_answers(
    child: ChildProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    assert child.call("print_much", LIMITS) == (None, b"")
    assert child.call("echo", LIMITS, {"value": 3})[0] == 3
    assert capfd.readouterr() == ("", "")


# Failures.


def test_a_crash_is_named_with_its_signal(child: ChildProcess) -> None:
    error = failure_of(child, "read_address_zero")
    assert error.problem == "the library was killed by signal 11 (SIGSEGV)"


def test_an_exit_is_reported_with_its_code_and_last_words(child: ChildProcess) -> None:
    error = failure_of(child, "exit", code=3)
    assert error.problem == "the library ended with exit code 3; its last words: the last words"


@pytest.mark.parametrize("name", ["ValueError", "BaseException"])
def test_any_exception_is_a_failure_on_one_plain_line(name: str, child: ChildProcess) -> None:
    error = failure_of(child, "raise_it", name=name, text="bad\n\x1b[31m" + "x" * 10_000)
    assert error.problem.startswith(rf"the library failed ({name}: bad \x1b[31mxxx")
    assert len(error.problem) < 600


@pytest.mark.parametrize("method", ["sleep", "hold_the_interpreter"])
def test_a_call_beyond_its_time_is_stopped_with_the_limit(method: str, child: ChildProcess) -> None:
    child.call("echo", LIMITS)
    begun = time.monotonic()
    arguments = {"seconds": 600} if method == "sleep" else {}
    error = failure_of(child, method, Limits(0.5, 0), **arguments)
    assert error.problem == "the library did not finish within 0.5 s, its limit"
    assert time.monotonic() - begun < 3


@LINUX
def test_memory_beyond_the_limit_is_refused_with_the_limit(child: ChildProcess) -> None:
    assert child.call("allocate", LIMITS, {"size": 200 << 20})[0] == 200 << 20
    error = failure_of(child, "allocate", size=300 << 20)
    assert error.problem == "the library failed (out of memory); its memory is limited to 256 MiB"


@pytest.mark.parametrize("method", ["answer_much", "answer_much_as_json"])
def test_an_answer_beyond_the_limit_is_refused_unread(method: str, child: ChildProcess) -> None:
    error = failure_of(child, method, Limits(20, 256 << 20, 1 << 20), size=(1 << 20) + 1)
    assert "the library gave an answer of 1,048," in error.problem


def test_a_service_that_cannot_be_made_is_reported() -> None:
    error = failure_of(start("misbehaving:Broken"), "echo")
    assert "ended with exit code 1; its last words: ValueError: cannot be made" in error.problem


def test_a_process_that_the_child_left_does_not_hold_the_parent(child: ChildProcess) -> None:
    begun = time.monotonic()
    assert "was killed by signal 9 (SIGKILL)" in failure_of(child, "start_another").problem
    assert time.monotonic() - begun < 4


# What is left.


@LINUX
def test_an_unused_child_ends_with_its_temporary_files() -> None:
    child = start()
    process, cores = child.call("process", LIMITS)[0]
    path = Path(child.call("write_a_file", LIMITS)[0])
    assert cores == 0
    assert path.is_file()
    del child
    gc.collect()
    assert not is_running(process)
    assert not path.parent.exists()


@LINUX
@pytest.mark.parametrize("method", ["echo", "hold_the_interpreter"])
def test_a_child_ends_when_its_parent_is_killed(method: str) -> None:
    program = (
        "import sys, time; from exporter.child_process import ChildProcess, Limits;"
        "child = ChildProcess('misbehaving:Misbehaving', 'a', 'b', 'c'); limits = Limits(60, 0);"
        "print(child.call('process', limits)[0][0], flush=True);"
        f"child.begin({method!r}, limits); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        cwd=ROOT,
    )  # fmt: skip
    assert parent.stdout is not None
    process = int(parent.stdout.readline())
    time.sleep(0.2)
    assert is_running(process)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(process)
