"""Archives named ``.zip``: files without compression, for systems that have no zstd.

All headers are functions of the names, sizes and CRCs of the files, so that a reader derives them
and compares: whatever a header can say besides (compression, encryption, links, comments, a second
name, data descriptors) is refused without a parser for it. The module `zipfile` writes the same
bytes for files below 2 GiB, but it reads a directory of any size into memory, trusts it against the
headers of the files, and its versions differ in ZIP64. Source: PKWARE's APPNOTE, version 6.3.10.
"""

import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from exporter.bundle.archive_stream import Member, Stream, refusal

_LOCAL = struct.Struct("<4s5H3I2H")
_DIRECTORY = struct.Struct("<4s4B4H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_LOCAL_MARK, _DIRECTORY_MARK = b"PK\3\4", b"PK\1\2"
#: From this size or place on, ZIP64 fields are used.
_LARGE = 0xFFFFFFFF
_VERSION, _VERSION_64, _UNIX = 20, 45, 3
_MODE = stat.S_IFREG | 0o644
#: The first of January 1980, the earliest that the format has.
_DATE = 1 << 5 | 1
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
_NAME_BYTES, _CHUNK = 1024, 1 << 20
_FOREIGN = "has a header that mobilellm package does not write, or is damaged"


@dataclass(frozen=True)
class _Entry:
    """What decides the headers of one file; `offset` is the place of the local header."""

    name: str
    size: int
    crc: int
    offset: int


def write(
    out: BinaryIO, sizes: Mapping[str, int], content: Callable[[str], Iterator[bytes]]
) -> None:
    """Write the files to `out`, which can seek. `sizes` has the name and the size in bytes of each,
    in order; `content` gives exactly so many bytes for a name."""
    entries, offset = list[_Entry](), 0
    for name, size in sizes.items():
        crc = 0
        out.write(_local(_Entry(name, size, crc, offset)))
        for piece in content(name):
            crc = zlib.crc32(piece, crc)
            out.write(piece)
        end = out.tell()
        out.seek(offset)
        entries.append(_Entry(name, size, crc, offset))
        out.write(_local(entries[-1]))
        offset = out.seek(end)
    directory = b"".join(map(_listed, entries))
    out.write(directory + _end(len(entries), len(directory), offset))


def stream(file: BinaryIO, path: Path) -> Stream:
    """The bytes of the archive."""
    chunks = iter(partial(file.read, _CHUNK), b"")
    return Stream(path, chunks, os.fstat(file.fileno()).st_size)


def members(stream: Stream) -> Iterator[Member]:
    """The files of the archive, in order. Raises InputError if it is not what `write` writes."""
    entries = list[_Entry]()
    while (mark := stream.read(len(_LOCAL_MARK))) == _LOCAL_MARK:
        entry = _parse(stream, mark, stream.position - len(mark))
        entries.append(entry)
        yield Member(entry.name, entry.size, _content(stream, entry))
    if mark != _DIRECTORY_MARK or not entries:
        raise refusal(stream.path, "is no zip archive, or is damaged")
    start, read = stream.position - len(mark), mark
    for entry in entries:
        expected = _listed(entry)
        read += stream.read(len(expected) - len(read))
        if read != expected:
            raise refusal(stream.path, _listing_problem(read), entry.name)
        read = b""
    end = _end(len(entries), stream.position - start, start)
    stream.expect(end, "has a directory that mobilellm package does not write")
    stream.finish()


def _parse(stream: Stream, mark: bytes, offset: int) -> _Entry:
    """Read the rest of a local header and check all of it."""
    header = mark + stream.read(_LOCAL.size - len(mark))
    _, _, flags, method, _, _, crc, _, size, name_bytes, extra_bytes = _LOCAL.unpack(header)
    if name_bytes > _NAME_BYTES:
        raise refusal(stream.path, f"has a name over {_NAME_BYTES:,} bytes")
    raw, extra = stream.read(name_bytes), stream.read(extra_bytes)
    shown = raw.decode("utf-8", "replace")
    problems = {
        "is encrypted": flags & _ENCRYPTED,
        "has a data descriptor": flags & _DESCRIPTOR,
        "is compressed": method,
    }
    for problem, found in problems.items():
        if found:
            raise refusal(stream.path, problem, shown)
    if size == _LARGE and len(extra) == 20:
        size = int.from_bytes(extra[4:12], "little")
    try:
        entry = _Entry(raw.decode(), size, crc, offset)
    except UnicodeDecodeError as error:
        raise refusal(stream.path, "has a name that is not UTF-8", shown) from error
    if header + raw + extra != _local(entry):
        raise refusal(stream.path, "has extra fields" if extra else _FOREIGN, entry.name)
    return entry


def _content(stream: Stream, entry: _Entry) -> Iterator[bytes]:
    crc = 0
    for piece in stream.content(entry.size):
        crc = zlib.crc32(piece, crc)
        yield piece
    if crc != entry.crc:
        raise refusal(stream.path, "is damaged: its CRC differs", entry.name)


def _listing_problem(listed: bytes) -> str:
    """What is wrong with the entry of a file in the directory."""
    mode = int.from_bytes(listed[38:42], "little") >> 16
    return "is a link" if stat.S_ISLNK(mode) else "has another entry in the directory"


def _local(entry: _Entry) -> bytes:
    """The header before a file's content."""
    name, size = entry.name.encode(), min(entry.size, _LARGE)
    extra = _extra([entry.size, entry.size] if size == _LARGE else [])
    version = _VERSION_64 if extra else _VERSION
    lengths = len(name), len(extra)
    fields = version, _flags(name), 0, 0, _DATE, entry.crc, size, size, *lengths
    return _LOCAL.pack(_LOCAL_MARK, *fields) + name + extra


def _listed(entry: _Entry) -> bytes:
    """The entry of a file in the directory."""
    name, size, offset = entry.name.encode(), min(entry.size, _LARGE), min(entry.offset, _LARGE)
    large = [entry.size, entry.size] if size == _LARGE else []
    extra = _extra(large + ([entry.offset] if offset == _LARGE else []))
    version = _VERSION_64 if extra else _VERSION
    fields = version, _UNIX, version, 0, _flags(name), 0, 0, _DATE, entry.crc, size, size
    lengths = len(name), len(extra), 0, 0, 0
    head = _DIRECTORY.pack(_DIRECTORY_MARK, *fields, *lengths, _MODE << 16, offset)
    return head + name + extra


def _end(count: int, size: int, offset: int) -> bytes:
    """The end of an archive whose directory has `count` entries of `size` bytes at `offset`."""
    end = b""
    if offset >= _LARGE:
        versions = _VERSION_64, _VERSION_64
        rest = _END_64.size - 12  # without the mark and this field
        end += _END_64.pack(b"PK\6\6", rest, *versions, 0, 0, count, count, size, offset)
        end += _LOCATOR.pack(b"PK\6\7", 0, offset + size, 1)
    return end + _END.pack(b"PK\5\6", 0, 0, count, count, size, min(offset, _LARGE), 0)


def _extra(values: list[int]) -> bytes:
    """The ZIP64 field with the values that do not fit into a header."""
    count = len(values)
    return struct.pack(f"<2H{count}Q", 1, 8 * count, *values) if values else b""


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8
