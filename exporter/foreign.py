"""Files of folders that are not ours: which of them may be read, and how much.

A checkpoint, a bundle, a recipe or a data file may come from anyone. A file is read if it is a
regular file and no link leads out of its folder. What is read has a limit of size, depth and
length of numbers, and the error names the limit.
"""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from devices.files import sha256
from exporter.errors import InputError, printable, short

#: The largest JSON file, in bytes. As Python objects, JSON needs up to 25 times its size.
JSON_BYTES = 8 << 20
#: The largest companion file of a model, in bytes: the tokenizers of 2025 have up to 35 MB.
COMPANION_BYTES = 256 << 20
#: The largest file that a manifest lists, in bytes; a sparse file of any size is free to make.
FILE_BYTES = 8 << 30
#: The deepest nesting of JSON and YAML.
DEPTH = 64
#: The longest number in JSON and YAML, in digits; every such integer can become a float.
DIGITS = 300
#: Limits of Linux and macOS for one part of a path and for a whole path, in bytes.
_PART_BYTES, _NAME_BYTES = 255, 1024


class _LimitError(ValueError):
    """A limit of a reader is exceeded; the text reads after a subject."""


def inside(folder: Path, name: object, *, links: bool = True) -> Path:
    """The path of a file that a foreign text names; the file may be missing.

    Raises InputError unless `name` is a plain relative name: parts joined by ``/``, none of them
    empty, ``.`` or ``..``, without control characters. Raises InputError too if a link leads out of
    the folder, or, without `links`, if any part is a link.
    """
    if not is_plain_name(name):
        raise InputError(
            folder,
            f"{short(name)} is not the plain name of a file inside this folder",
            "Get the folder again from a place you trust",
        )
    path = folder / str(name)
    _check_links(path, folder, links=links)
    return path


def is_plain_name(name: object) -> bool:
    """Whether `name` is a relative path that stays below its folder, as text: see `inside`."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    parts = [part.encode() for part in name.split("/")]
    sized = len(name.encode()) <= _NAME_BYTES and all(len(part) <= _PART_BYTES for part in parts)
    return sized and not {b"", b".", b".."} & set(parts)


def present(path: Path, limit: int | None = None) -> bool:
    """Whether a file of a foreign folder exists.

    Raises InputError if it may not be read: it is not a regular file, it has more than `limit`
    bytes, or a link leads out of its folder. Links into the blobs of a hub cache are allowed.
    """
    if not os.path.lexists(path):
        return False
    _check_links(path, path.parent, links=True)
    if path.is_symlink() and not path.exists():
        raise InputError(path, "is a link to a file that is missing", "Get the folder again")
    _check_kind(path, path.stat(), limit)
    return True


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file of at most `limit` bytes to read it. Raises InputError."""
    # Without O_NONBLOCK, a FIFO blocks until a writer opens it.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(path, f"cannot be opened ({error.strerror})", "Check the path") from error
    try:
        _check_kind(path, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises InputError."""
    with open_regular(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # the file grew, or its size is not known in advance
        raise _too_large(path, limit)
    return content


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of a foreign folder. Raises InputError; see `parse_json`."""
    if not present(path, limit):
        raise InputError(path, "no such file", "Give the whole folder that it belongs to")
    content = parse_json(read_bytes(path, limit), path)
    if not isinstance(content, dict):
        raise InputError(path, f"holds a {type(content).__name__}, not an object")
    return content


def parse_json(content: bytes, subject: object, remedy: str = "Get the file again") -> Any:
    """Parse JSON in UTF-8; NaN and infinity are accepted, which the caller refuses with their key.

    Raises InputError for a duplicate key, nesting deeper than `DEPTH`, a number of more than
    `DIGITS` digits, and for text that is not Unicode, such as half of a surrogate pair.
    """
    try:
        parsed = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
        )
        _check_values(parsed)
    except _LimitError as error:
        raise InputError(subject, str(error), remedy) from error
    except RecursionError as error:
        raise InputError(subject, _too_deep(), remedy) from error
    except UnicodeError as error:
        raise InputError(subject, f"is not valid JSON in UTF-8 ({error})", remedy) from error
    except json.JSONDecodeError as error:
        raise InputError(subject, f"is not valid JSON ({error})", remedy) from error
    return parsed


def differing_files(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """Files of `folder` that are missing or whose SHA-256 differs: name → what is wrong.

    A link, and a name that leads out of the folder, is not followed; a special file and a file of
    more than `FILE_BYTES` is not read.
    """
    problems = dict[str, str]()
    for name, expected in hashes.items():
        try:
            path = inside(folder, name, links=False)
            if not present(path, FILE_BYTES):
                problems[name] = "is missing"
            elif (found := sha256(path)) != expected:
                problems[name] = f"has sha256 {found[:12]}…, not {printable(expected[:12])}…"
        except InputError as error:
            problems[name] = error.problem
    return problems


def _check_links(path: Path, folder: Path, *, links: bool) -> None:
    # Unlike Path.resolve, realpath accepts a link to itself.
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real == root / path.relative_to(folder):
        return
    if not links:
        raise InputError(path, "is a link, or lies below one", "Replace the link by the file")
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise InputError(
            path,
            f"is a link that leads out of its folder, to {real}",
            "Replace the link by the file",
        )


def _blobs(folder: Path) -> Sequence[Path]:
    """The folder of the blobs, if `folder` is in a snapshot of a hub cache:
    ``models--OWNER--NAME/snapshots/REVISION`` has links to ``models--OWNER--NAME/blobs``."""
    for snapshots in folder.parents:
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return (snapshots.parent / "blobs",)
    return ()


def _check_kind(path: Path, status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
        raise InputError(path, f"is {kind}, not a regular file", "Give a regular file")
    if limit is not None and status.st_size > limit:
        raise _too_large(path, limit)


def _too_large(path: Path, limit: int) -> InputError:
    return InputError(path, f"is larger than the limit of {limit:,} bytes", "Give a smaller file")


def _too_deep() -> str:
    return f"is nested deeper than the limit of {DEPTH} levels"


def check_digits(text: str) -> None:
    """Raise a ValueError for a number of more than `DIGITS` characters, before it is converted."""
    if len(text) > DIGITS:
        raise _LimitError(f"has a number of {len(text):,} digits; the limit is {DIGITS}")


def _integer(text: str) -> int:
    check_digits(text)
    return int(text)


def _float(text: str) -> float:
    check_digits(text)
    return float(text)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        last = {key: place for place, (key, _) in enumerate(pairs)}
        twice = next(key for place, (key, _) in enumerate(pairs) if place < last[key])
        raise _LimitError(f"has the key {short(twice)} twice in one object")
    return found


def _check_values(parsed: object) -> None:
    """Check depth and text, level by level: recursion would fail on deep nesting."""
    level, depth = [parsed], 0
    while level:
        below = list[object]()
        for value in level:
            if depth == DEPTH and isinstance(value, (dict, list)):
                raise _LimitError(_too_deep())
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii():
                value.encode()  # raises UnicodeEncodeError, a ValueError
        level, depth = below, depth + 1
