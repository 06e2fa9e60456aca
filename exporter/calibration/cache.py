"""Where results are kept that the next run can use again: texts, answers, sensitivities."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from exporter.calibration.data import OnStep


def cache_folder() -> Path:
    """``MOBILELLM_CACHE``, or a folder of its own where the system keeps caches."""
    named = os.environ.get("MOBILELLM_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mobilellm-exporter"


def _say_nothing(_done: int, _total: int, _note: str) -> None: ...


@contextmanager
def cache_lock(path: Path, on_step: OnStep = _say_nothing) -> Iterator[None]:
    """Hold `path` of the cache, a file or a folder, to make what is not there. Another run that
    wants it waits and says so: it must look again whether it still has to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.lock")
    with _held(place, on_step):
        try:
            yield
        finally:
            place.unlink()


def _held(place: Path, on_step: OnStep) -> TextIO:
    """A lock file, locked. One that its last holder removed meanwhile is a lock no more."""
    while True:
        lock = place.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_step(0, 1, "waits for another run that makes it")
            fcntl.flock(lock, fcntl.LOCK_EX)
            on_step(1, 1, "")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), place.stat()):
                return lock
        lock.close()
