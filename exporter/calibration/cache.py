"""Locks for the cache folder, which holds generated texts, teacher logits and sensitivities."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from exporter.progress import OnStep, no_step


@contextmanager
def cache_lock(path: Path, on_step: OnStep = no_step) -> Iterator[None]:
    """Hold the lock of `path`, a file or a folder of the cache that is about to be written.

    A second run that needs the same path waits for the lock and reports this to `on_step`. The
    caller checks again whether `path` exists once it holds the lock, because the first run may
    have written it. The empty lock file is left: removing it is not safe on every file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_step(0, 1, "waiting for another run that writes it")
        lock.acquire()
        on_step(1, 1, "")
    try:
        yield
    finally:
        lock.release()
