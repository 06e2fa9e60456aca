"""A service for tests of child processes: each method does one thing that native code may do."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from exporter.errors import InputError


class Misbehaving:
    def echo(self, data: bytes, value: object = None) -> tuple[object, bytes]:
        return value, data

    def refuse(self, _: bytes, problem: str) -> tuple[None, bytes]:
        raise InputError("file", problem, "Get another")

    def raise_it(self, _: bytes, name: str, text: str) -> tuple[None, bytes]:
        raise {"ValueError": ValueError, "BaseException": BaseException}[name](text)

    def read_address_zero(self, _: bytes) -> tuple[None, bytes]:
        ctypes.string_at(0)
        return None, b""

    def exit(self, _: bytes, code: int) -> tuple[None, bytes]:
        print("the last words", file=sys.stderr, flush=True)
        os._exit(code)

    def sleep(self, _: bytes, seconds: float) -> tuple[None, bytes]:
        time.sleep(seconds)
        return None, b""

    def hold_the_interpreter(self, _: bytes) -> tuple[None, bytes]:
        """Native code that loops and never lets Python run."""
        ctypes.PyDLL(None).sleep(600)
        return None, b""

    def allocate(self, _: bytes, size: int) -> tuple[int, bytes]:
        return len(bytearray(size)), b""

    def print_much(self, _: bytes) -> tuple[None, bytes]:
        for descriptor in (1, 2):
            os.write(descriptor, b"noise \x1b[31m\n" * 100_000)
        print("printed")
        return None, os.read(0, 1)

    def answer_much(self, _: bytes, size: int) -> tuple[None, bytes]:
        return None, bytes(size)

    def answer_much_as_json(self, _: bytes, size: int) -> tuple[str, bytes]:
        return "x" * size, b""

    def write_a_file(self, _: bytes) -> tuple[str, bytes]:
        path = Path(os.environ["TMPDIR"]) / "left"
        path.write_text("left")
        return str(path), b""

    def start_another(self, _: bytes) -> tuple[None, bytes]:
        """A process that keeps this one's standard error open."""
        subprocess.Popen(["sleep", "5"])
        os.kill(os.getpid(), signal.SIGKILL)
        return None, b""

    def process(self, _: bytes) -> tuple[list[int], bytes]:
        """Its id, and the largest core dump that it may write."""
        return [os.getpid(), resource.getrlimit(resource.RLIMIT_CORE)[1]], b""


class Broken:
    def __init__(self) -> None:
        raise ValueError("cannot be made")
