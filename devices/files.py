"""Files of this machine: hashes, files that appear whole or not at all, and the cache folder."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from platformdirs import user_cache_path


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write to a temporary name beside `path`; on success fsync and rename, else remove.

    The temporary name is fixed, so that the next run removes what a killed one left. No link is
    followed: a link at `path` is replaced, and one at the temporary name is removed. Raises OSError
    as `check_replaceable`.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raise OSError if a file cannot be written to `path`, because it is a folder, a device, a pipe
    or a socket; changes nothing."""
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a folder, not a file", str(path))
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.EINVAL, "Is a device, a pipe or a socket, not a file", str(path))


def sync(path: Path) -> None:
    """Make the content of a file, or a rename inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """`content` as indented JSON, as all files of this tool have it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON, with `replacing`."""
    with replacing(path) as file:
        file.write(json_bytes(content))


def sha256(path: Path) -> str:
    """The hash of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder for results that can be computed again: ``MOBILELLM_CACHE``, or ``mobilellm``
    in the folder where the system keeps caches."""
    named = os.environ.get("MOBILELLM_CACHE")
    return Path(named).absolute() if named else user_cache_path("mobilellm")
