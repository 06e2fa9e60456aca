"""Where results are kept that the next run can use again: texts, answers, sensitivities."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """``MOBILELLM_CACHE``, or a folder of its own where the system keeps caches."""
    named = os.environ.get("MOBILELLM_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mobilellm-exporter"


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold `path` of the cache, a file or a folder. Another run that wants it waits, to find what
    this one made of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
