"""Archives named ``.tar.zst``: a PAX tar in one frame of zstd.

PAX because USTAR has neither names over 100 characters that have no slash at the right place, nor
files of 8 GiB. The header of a member is a function of its name and size, so that a reader derives
it and compares: whatever a header can say besides (links, devices, sparse files, owners, times, a
second name) is refused without a parser for it. The frame has its content's size and checksum.
Another version of zstd may compress the same tar to other bytes; both are read.
"""

import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import zstandard

from exporter.bundle.archive_stream import Member, Stream, refusal

#: Four-bit weights gain 19 % over level 3. The window, and so the memory, is 4 MiB; a reader
#: accepts the 8 MiB that every decoder must support.
_LEVEL, _WINDOW_BYTES = 9, 8 << 20
#: The longest header of a frame, in bytes: RFC 8878, section 3.1.1.
_FRAME_HEADER_BYTES = 18
_UNUSED_BITS, _RLE_BLOCK = 0b00011000, 1
#: The longest PAX records, in bytes: a name of 1,024 bytes and a size.
_RECORDS_BYTES = 2048
_RECORDS = re.compile(rb"(?:\d+ path=([^\n\0]+)\n)?(?:\d+ size=(\d{1,19})\n)?\0*")
_SIZE = re.compile(rb"[0-7]{11}\0")
_KINDS = {
    tarfile.LNKTYPE: "is a hard link",
    tarfile.SYMTYPE: "is a link",
    tarfile.CHRTYPE: "is a device",
    tarfile.BLKTYPE: "is a device",
    tarfile.DIRTYPE: "is a folder",
    tarfile.FIFOTYPE: "is a pipe",
    tarfile.GNUTYPE_SPARSE: "is a sparse file",
}
_FOREIGN = "has a header that mobilellm package does not write, or is damaged"


def write(
    out: BinaryIO, sizes: Mapping[str, int], content: Callable[[str], Iterator[bytes]]
) -> None:
    """Write the files to `out`. `sizes` has the name and the size in bytes of each, in order;
    `content` gives exactly so many bytes for a name."""
    headers = {name: _header(name, size) for name, size in sizes.items()}
    end = sum(len(headers[name]) + size + _padding(size) for name, size in sizes.items())
    whole = end + _end(end)
    settings = zstandard.ZstdCompressor(
        level=_LEVEL, write_checksum=True, write_content_size=True, threads=0
    )
    compressor = settings.compressobj(size=whole)
    for name, size in sizes.items():
        out.write(compressor.compress(headers[name]))
        for piece in content(name):
            out.write(compressor.compress(piece))
        out.write(compressor.compress(bytes(_padding(size))))
    out.write(compressor.compress(bytes(_end(end))))
    out.write(compressor.flush())


def stream(file: BinaryIO, path: Path) -> Stream:
    """The decompressed tar; its size is known before it is read. Raises InputError."""
    head = file.read(_FRAME_HEADER_BYTES)
    try:
        frame = zstandard.get_frame_parameters(head)
        length = zstandard.frame_header_size(head)
    except zstandard.ZstdError as error:
        raise refusal(path, f"is no archive of zstd, or is damaged ({error})") from error
    if not head.startswith(zstandard.FRAME_HEADER):
        raise refusal(path, "is no archive of zstd, or starts with other data")
    if not frame.has_checksum or frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        raise refusal(path, "has no checksum, or does not say how large its content is")
    if frame.dict_id or head[4] & _UNUSED_BITS or frame.window_size > _WINDOW_BYTES:
        raise refusal(path, f"needs a dictionary or a window over {_WINDOW_BYTES:,} bytes")
    file.seek(length)
    return Stream(path, _decompressed(file, head[:length], path), frame.content_size)


def members(stream: Stream) -> Iterator[Member]:
    """The files of the tar, in order. Raises InputError if it is not what `write` writes."""
    while any(header := stream.read(tarfile.BLOCKSIZE)):
        name, size = _parse(stream, header)
        yield Member(name, size, stream.content(size))
        stream.expect(bytes(_padding(size)), "is followed by hidden data", name)
    rest = _end(stream.position - tarfile.BLOCKSIZE) - tarfile.BLOCKSIZE
    stream.expect(bytes(rest), "has more data after its end")
    stream.finish()


def _parse(stream: Stream, header: bytes) -> tuple[str, int]:
    """The name and the size of a member, from its first block and from the blocks after it."""
    records = b""
    plain = header
    if _kind(header) == tarfile.XHDTYPE:
        length = _size(stream, header)
        if length > _RECORDS_BYTES:
            raise refusal(stream.path, f"has PAX records over {_RECORDS_BYTES:,} bytes")
        records = stream.read(length + _padding(length))
        plain = stream.read(tarfile.BLOCKSIZE)
        header += records + plain
    shown = plain[:100].rstrip(b"\0").decode("utf-8", "replace")
    if _kind(plain) != tarfile.REGTYPE:
        problem = _KINDS.get(_kind(plain), f"has an entry of the unknown kind {_kind(plain)!r}")
        raise refusal(stream.path, problem, shown)
    found = _RECORDS.fullmatch(records)
    if not found:
        raise refusal(stream.path, _FOREIGN, shown)
    try:
        name = (found[1] or plain[:100].rstrip(b"\0")).decode()
        size = int(found[2] or _size(stream, plain))
        derived = _header(name, size)
    except ValueError as error:
        raise refusal(stream.path, _FOREIGN, shown) from error
    if header != derived:
        raise refusal(stream.path, _FOREIGN, name)
    return name, size


def _header(name: str, size: int) -> bytes:
    """The blocks before the content: one, or three or more where PAX records are needed."""
    info = tarfile.TarInfo(name)  # mode 0644, of nobody, at the start of 1970
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _kind(header: bytes) -> bytes:
    return header[156:157]


def _size(stream: Stream, header: bytes) -> int:
    field = header[124:136]
    if not _SIZE.fullmatch(field):
        raise refusal(stream.path, f"has the malformed size {field!r} in a header")
    return int(field[:-1], 8)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _end(position: int) -> int:
    """The number of zero bytes at the end: two blocks, and as many as fill a record."""
    end = 2 * tarfile.BLOCKSIZE
    return end + -(position + end) % tarfile.RECORDSIZE


def _decompressed(file: BinaryIO, header: bytes, path: Path) -> Iterator[bytes]:
    """Decompress one frame block by block, so that no input makes more than 128 KiB at once.

    Raises InputError if the frame is damaged or if anything follows it.
    """
    # The length of a frame follows from the headers of its blocks: RFC 8878, section 3.1.1.2.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
    try:
        decompressor.decompress(header)
        last = False
        while not last:
            head = file.read(3)
            bits = int.from_bytes(head, "little")
            last, kind, size = bool(bits & 1), bits >> 1 & 3, bits >> 3
            body = file.read(1 if kind == _RLE_BLOCK else size)
            yield decompressor.decompress(head + body)
            if len(head) < 3:
                raise refusal(path, "is truncated")
        yield decompressor.decompress(file.read(4))  # the checksum
    except zstandard.ZstdError as error:
        raise refusal(path, f"is damaged ({error})") from error
    if not decompressor.eof:
        raise refusal(path, "is truncated")
    if file.read(1):
        raise refusal(path, "has more data after its end")
