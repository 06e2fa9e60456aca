"""Locks in the cache folder, where texts, a teacher's answers and sensitivities are kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from exporter.progress import OnStep, no_step


@contextmanager
def cache_lock(path: Path, on_step: OnStep = no_step) -> Iterator[None]:
    """Hold the lock of `path`, a file or a folder of the cache, to make what is missing there.

    Another run that wants the same waits, and reports that it waits. Since the holder may have
    made it meanwhile, look again whether it is there. An empty lock file stays behind: to remove
    it is not safe on every file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_step(0, 1, "waits for another run that makes it")
        lock.acquire()
        on_step(1, 1, "")
    try:
        yield
    finally:
        lock.release()
