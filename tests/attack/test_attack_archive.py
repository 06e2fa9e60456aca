"""Archives that are not ours: names that lead out, links, hidden data, bombs, and damage.

Every row of a table is one archive. It must be refused with the entry, the reason and the remedy,
and nothing may be written outside of the temporary folder, in which nothing may be left.
"""

import io
import os
import random
import stat
import struct
import tarfile
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import zstandard
from commands import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.bundle import archive
from exporter.bundle.archive import opened, pack
from exporter.bundle.archive_stream import REMEDY
from exporter.errors import InputError

SECRET = b"the secret of somebody else"
NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
#: No attack may need longer, in seconds.
SECONDS = 20


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for archives, beside a file of somebody else and the temporary folder; in memory,
    since thousands of archives are unpacked."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as made:
        world = Path(made)
        for name in ("root", "temporary", "home"):
            (world / name).mkdir()
        (world / "home" / ".bashrc").write_bytes(SECRET)
        monkeypatch.setattr(tempfile, "tempdir", str(world / "temporary"))
        monkeypatch.chdir(world / "root")
        yield world / "root"
        monkeypatch.undo()
        assert list((world / "temporary").iterdir()) == []
        assert (world / "home" / ".bashrc").read_bytes() == SECRET


def refused(path: Path) -> str:
    """The message for an archive that must be refused; no other file may change."""
    before, started = contents(path.parent.parent), time.monotonic()
    with pytest.raises(InputError) as raised, opened(path):
        pytest.fail("the archive was opened")
    assert time.monotonic() - started < SECONDS
    assert contents(path.parent.parent) == before
    assert str(path) in raised.value.subject
    assert raised.value.remedy == REMEDY
    return f"{raised.value.subject}: {raised.value.problem}"


def test_what_is_written_here_is_opened_if_no_attack_is_made(root: Path) -> None:
    """The helpers below write what `pack` writes: an attack differs by the attack alone."""
    for path in (root / "a.tar.zst", root / "a.zip"):
        write_tar(path, member("a"), member("b")) if path.suffix == ".zst" else write_zip(path)
        with opened(path) as found:
            assert contents(found).keys() == {"a", "b"}


# Tar.

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"content", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=form) as file:
        for info, content in members:
            file.addfile(info, io.BytesIO(content))
    return made.getvalue()


def frame(content: bytes, level: int = 3, **options: object) -> bytes:
    compressor = zstandard.ZstdCompressor(level, write_checksum=True, **options)  # type: ignore[arg-type]
    return compressor.compress(content)


def write_tar(path: Path, *members: Member, form: int = tarfile.PAX_FORMAT) -> None:
    path.write_bytes(frame(tar(*members, form=form)))


def sparse(name: str) -> Member:
    """A file with a hole of 1 TB, in the PAX form that GNU tar writes."""
    records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    records["GNU.sparse.realsize"] = str(1 << 40)
    return member(f"GNUSparseFile.0/{name}", b"0\n".ljust(512, b"\0"), pax_headers=records)


LINK, HARD = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}
TARS: dict[str, tuple[list[Member], str]] = {
    "an absolute name": ([member("/tmp/x")], "'/tmp/x': is not the plain name"),
    "a name that leads out": ([member("../home/.bashrc")], "'../home/.bashrc': is not the plain"),
    "a name that leads out further on": ([member("a/../../x")], "is not the plain name"),
    "a name with a dot": ([member("./a")], "is not the plain name"),
    "an empty part": ([member("a//b")], "is not the plain name"),
    "a backslash": ([member("..\\x")], "is not the plain name"),
    "a control character": ([member("a\x1b[2Jb")], "a\\x1b[2Jb': is not the plain name"),
    "a change of direction": ([member("a\u202eb")], "is not the plain name"),
    "a long part": ([member("x" * 256)], "is not the plain name"),
    "a long name": ([member("/".join(["x" * 200] * 6))], "is not the plain name"),
    "a deep name": ([member("/".join("x" * 17))], "nested deeper than the limit of 16 folders"),
    "a very long name": ([member("x" * 5000)], "has PAX records over 2,048 bytes"),
    "a name twice": ([member("a"), member("a")], "'a': is the same as a"),
    "a name in two cases": ([member("A"), member("a")], "'a': is the same as A on some"),
    "a folder in two cases": ([member("A/x"), member("a/y")], "'a/y': is the same as A/ on some"),
    "an accent in two forms": ([member(NFD), member(NFC)], "is the same as"),
    "a sharp s": ([member("strasse"), member("straße")], "is the same as strasse"),
    "a file as a folder": ([member("a"), member("a/b")], "'a/b': is the same as a on some"),
    "out of order": ([member("b"), member("a")], "'a': comes after b, out of order"),
    "a link": ([member("a", b"", linkname="/etc/passwd", **LINK)], "a: is a link"),
    "a link and a file below it": (
        [member("a", b"", linkname="../home", **LINK), member("a/.bashrc")],
        "a: is a link",
    ),
    "a hard link": ([member("a", b"", linkname="../home/.bashrc", **HARD)], "a: is a hard link"),
    "a device": ([member("a", b"", type=tarfile.CHRTYPE, devmajor=1)], "a: is a device"),
    "a disk": ([member("a", b"", type=tarfile.BLKTYPE, devmajor=8)], "a: is a device"),
    "a pipe": ([member("a", b"", type=tarfile.FIFOTYPE)], "a: is a pipe"),
    "a folder": ([member("a", b"", type=tarfile.DIRTYPE)], "is a folder"),
    "a sparse file of GNU": ([member("a", type=tarfile.GNUTYPE_SPARSE)], "a: is a sparse file"),
    "a sparse file": ([sparse("a")], "has a header that mobilellm package does not write"),
    "an old kind of file": ([member("a", type=tarfile.AREGTYPE)], "of the unknown kind b'\\x00'"),
    "an unknown kind": ([member("a", type=b"Z")], "has an entry of the unknown kind b'Z'"),
    "a comment": ([member("a", pax_headers={"comment": "x"})], "a: has a header that"),
    "a size in a record": ([member("a", pax_headers={"size": "7"})], "a: has a header that"),
    "a name that is not needed": ([member("a", pax_headers={"path": "a"})], "a: has a header"),
    "a mode": ([member("a", mode=0o4755)], "a: has a header that"),
    "an owner": ([member("a", uid=1000)], "a: has a header that"),
    "the name of an owner": ([member("a", uname="root")], "a: has a header that"),
    "a time": ([member("a", mtime=1)], "a: has a header that"),
    "a part of a second": ([member("a", mtime=0.5)], "a: has a header that"),
    "no file": ([], "holds no file"),
}  # fmt: skip


@pytest.mark.parametrize(("members", "said"), TARS.values(), ids=TARS)
def test_a_tar_that_is_not_ours_is_refused(members: list[Member], said: str, root: Path) -> None:
    write_tar(root / "a.tar.zst", *members)
    assert said in refused(root / "a.tar.zst")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_of_another_format_is_refused(form: int, root: Path) -> None:
    name = "x" * 60 + "/" + "y" * 60
    write_tar(root / "a.tar.zst", member(name), form=form)
    assert refused(root / "a.tar.zst")
    write_tar(root / "b.tar.zst", member("a", size=7, uid=1 << 40), form=tarfile.GNU_FORMAT)
    assert "a: has a header" in refused(root / "b.tar.zst")


def global_header() -> bytes:
    return tarfile.TarInfo.create_pax_global_header({"comment": "x"})


def replaced(content: bytes, place: int, by: bytes) -> bytes:
    return content[:place] + by + content[place + len(by) :]


def resized(content: bytes, field: bytes) -> bytes:
    """Another size in the first header, with the checksum that belongs to it."""
    header = replaced(replaced(content[:512], 124, field), 148, b" " * 8)
    total = sum(header)
    return replaced(header, 148, b"%06o\0 " % total) + content[512:]


AB = tar(member("a"), member("b"))
STREAMS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a global header": (lambda: global_header() + AB, "of the unknown kind b'g'"),
    "data in the padding": (lambda: replaced(AB, 519, b"x"), "a: is followed by hidden data"),
    "data after the end": (lambda: replaced(AB, len(AB) - 1, b"x"), "more data after its end"),
    "a file after the end": (lambda: AB + AB, "has more data after its end"),
    "zeros after the end": (lambda: AB + bytes(512), "has more data after its end"),
    "one zero after the end": (lambda: AB + b"\0", "has more data after its end"),
    "a record after the end": (lambda: AB + bytes(10240), "has more data after its end"),
    "no end": (lambda: AB[:2048], "is truncated"),
    "half an end": (lambda: AB[:2560], "is truncated"),
    "a short end": (lambda: AB[:3072], "is truncated"),
    "nothing": (lambda: b"", "is truncated"),
    "a size of 8 GB": (lambda: resized(AB, b"77777777777\0"), "is truncated"),
    "a size of GNU": (lambda: resized(AB, b"\x80" + bytes(10) + b"\7"), "the malformed size"),
    "a negative size": (lambda: resized(AB, b"-0000000007\0"), "the malformed size"),
    "a size with a blank": (lambda: resized(AB, b"0000000007 \0"), "the malformed size"),
    "a size without zeros": (lambda: resized(AB, b"7\0" + bytes(10)), "the malformed size"),
    "noise": (lambda: random.Random(0).randbytes(10240), "has an entry of the unknown kind"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), STREAMS.values(), ids=STREAMS)
def test_a_damaged_or_extended_tar_is_refused(
    make: Callable[[], bytes], said: str, root: Path
) -> None:
    (root / "a.tar.zst").write_bytes(frame(make()))
    assert said in refused(root / "a.tar.zst")


def skippable(content: bytes) -> bytes:
    return struct.pack("<2I", 0x184D2A50, len(content)) + content


def lying(content: bytes, size: int) -> bytes:
    """A frame that says that its content has `size` bytes: an 8-byte field of size."""
    made = frame(content, write_content_size=False)  # magic, descriptor, window
    return made[:4] + bytes([made[4] | 0b11000000]) + made[5:6] + struct.pack("<Q", size) + made[6:]


def rle_bomb(blocks: int) -> bytes:
    """A frame of `blocks` blocks of 4 bytes that stand for 128 KiB of zeros each."""
    head = struct.pack("<IBBQ", 0xFD2FB528, 0b11000100, 0x38, 10240)  # says that it has 10 KB
    return head + (1 << 1 | 131072 << 3).to_bytes(3, "little").ljust(4, b"\0") * blocks


def replaced_descriptor(bits: int) -> bytes:
    """A frame with a field for the number of a dictionary."""
    made = frame(AB)
    return made[:4] + bytes([made[4] | bits]) + made[5:6] + b"\1\2\3\4" + made[6:]


def large_window() -> bytes:
    settings = zstandard.ZstdCompressionParameters(
        window_log=24, write_checksum=True, write_content_size=True
    )
    compressor = zstandard.ZstdCompressor(compression_params=settings)
    return compressor.compress(bytes(17 << 20))


FRAMES: dict[str, tuple[Callable[[], bytes], str]] = {
    "two frames": (lambda: frame(AB[:2048]) + frame(AB[2048:]), "is truncated"),
    "a frame after the end": (lambda: frame(AB) + frame(b"x"), "has more data after its end"),
    "an empty frame after the end": (lambda: frame(AB) + frame(b""), "more data after its end"),
    "a skippable frame after the end": (
        lambda: frame(AB) + skippable(b"x"), "has more data after its end"),
    "a skippable frame at the start": (
        lambda: skippable(b"hidden text") + frame(AB), "or starts with other data"),
    "a byte after the end": (lambda: frame(AB) + b"\0", "has more data after its end"),
    "no checksum": (lambda: zstandard.compress(AB), "has no checksum"),
    "no size": (lambda: frame(AB, write_content_size=False), "does not say how large"),
    "a dictionary": (
        lambda: frame(AB, dict_data=zstandard.ZstdCompressionDict(AB[:512])), "is damaged"),
    "a number of a dictionary": (lambda: replaced_descriptor(0b11), "needs a dictionary"),
    "an unused bit": (lambda: replaced(frame(AB), 4, bytes([frame(AB)[4] | 16])), "needs a"),
    "a reserved bit": (lambda: replaced(frame(AB), 4, bytes([frame(AB)[4] | 8])), "is "),
    "a large window": (large_window, "a window over 8,388,608 bytes"),
    "a larger size than the content": (lambda: lying(AB, len(AB) + 1), "is "),
    "a smaller size than the content": (lambda: lying(AB, 3072), "is damaged"),
    "a size of 16 EB": (lambda: lying(AB, (1 << 64) - 3), "the limit of 68,719,476,736"),
    "a size over the limit": (lambda: lying(AB, (64 << 30) + 1), "the limit of 68,719,476,736"),
    "a bomb": (lambda: rle_bomb(1 << 20), "is damaged"),
    "a block of a reserved kind": (lambda: frame(AB)[:9] + b"\7\0\0", "is "),
    "a tar without compression": (lambda: AB, "is no archive of zstd"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(40), "is no archive of zstd"),
    "nothing": (lambda: b"", "is no archive of zstd"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), FRAMES.values(), ids=FRAMES)
def test_a_frame_that_is_not_ours_is_refused(
    make: Callable[[], bytes], said: str, root: Path
) -> None:
    (root / "a.tar.zst").write_bytes(make())
    assert said in refused(root / "a.tar.zst")


# Zip.


def zip_info(name: str, **fields: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = 0o100644 << 16, 3
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def zipped(
    *entries: tuple[zipfile.ZipInfo, bytes], comment: bytes = b"", out: io.BytesIO | None = None
) -> bytes:
    made = out or io.BytesIO()
    with zipfile.ZipFile(made, "w") as file, pytest.MonkeyPatch.context() as patch:
        # zipfile warns of a name twice; the warning is an error in no test here.
        patch.setattr(zipfile.ZipFile, "_writecheck", lambda self, info: None)
        for info, content in entries:
            file.writestr(info, content, compress_type=info.compress_type)
        file.comment = comment
    return made.getvalue()


def named(*names: str) -> bytes:
    return zipped(*((zip_info(name), b"content") for name in names))


class Pipe(io.BytesIO):
    """A stream that cannot seek, for which zipfile writes data descriptors."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


AB_ZIP = named("a", "b")


def write_zip(path: Path) -> None:
    path.write_bytes(named("a", "b"))


def renamed(listed: bytes) -> bytes:
    """Another name in the directory than in front of the file."""
    made = named("aaaa", "b")
    return made.replace(b"aaaa", listed).replace(listed, b"aaaa", 1)


def zero_name(made: bytes) -> bytes:
    """zipfile ends a name at a zero; here the zero is in the middle."""
    return made.replace(b"a-b", b"a\0b")


def moved(made: bytes, by: int) -> bytes:
    """The directory starts elsewhere than the end says."""
    start = struct.unpack_from("<I", made, len(made) - 6)[0]
    return replaced(made, len(made) - 6, struct.pack("<I", start + by))


def overlapping() -> bytes:
    """Ten entries in the directory that share the content of one file, as zip bombs do."""
    made = named("a")
    start = struct.unpack_from("<I", made, len(made) - 6)[0]
    listed = made[start:-22]
    entries = b"".join(listed.replace(b"a", b"%c" % (97 + n)) for n in range(10))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 10, 10, len(entries), start, 0)
    return made[:start] + entries + end


def without_the_last() -> bytes:
    """A file between the others and a directory that does not list it."""
    start = struct.unpack_from("<I", AB_ZIP, len(AB_ZIP) - 6)[0]
    listed = AB_ZIP[start : start + 47]
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(listed), start, 0)
    return AB_ZIP[:start] + listed + end


DEFLATED = {"compress_type": zipfile.ZIP_DEFLATED}
ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    "an absolute name": (lambda: named("/tmp/x"), "'/tmp/x': is not the plain name"),
    "a name that leads out": (lambda: named("../home/.bashrc"), "'../home/.bashrc': is not the"),
    "a name of a drive": (lambda: named("..\\x"), "is not the plain name"),
    "a zero in a name": (lambda: zero_name(named("a-b")), "'a\\x00b': is not the plain name"),
    "a control character": (lambda: named("a\x1b[2Jb"), "is not the plain name"),
    "an empty name": (lambda: named(""), "is not the plain name"),
    "a folder": (lambda: zipped((zip_info("a/"), b"")), "'a/': is not the plain name"),
    "a long name": (lambda: named("x/" * 600 + "x"), "has a name over 1,024 bytes"),
    "a deep name": (lambda: named("/".join("x" * 17)), "deeper than the limit of 16 folders"),
    "a name twice": (lambda: named("a", "a"), "'a': is the same as a"),
    "a name in two cases": (lambda: named("A", "a"), "'a': is the same as A on some"),
    "an accent in two forms": (lambda: named(NFD, NFC), "is the same as"),
    "a file as a folder": (lambda: named("a", "a/b"), "'a/b': is the same as a on some"),
    "out of order": (lambda: named("b", "a"), "'a': comes after b, out of order"),
    "a link": (
        lambda: zipped((zip_info("a", external_attr=(stat.S_IFLNK | 0o777) << 16), b"/etc")),
        "a: is a link"),
    "a mode": (lambda: zipped((zip_info("a", external_attr=0o104755 << 16), b"x")), "a: has anoth"),
    "another system": (lambda: zipped((zip_info("a", create_system=0), b"x")), "a: has another"),
    "a time": (
        lambda: zipped((zip_info("a", date_time=(2026, 1, 1, 0, 0, 0)), b"x")), "a: has a header"),
    "compression": (lambda: zipped((zip_info("a", **DEFLATED), bytes(10**6))), "a: is compressed"),
    "a comment": (lambda: zipped((zip_info("a"), b"x"), comment=b"hidden"), "has a directory that"),
    "a comment of a file": (lambda: zipped((zip_info("a", comment=b"hidden"), b"x")), "a: has ano"),
    "an extra field": (lambda: zipped((zip_info("a", extra=b"UT\1\0x"), b"x")), "a: has extra fi"),
    "ZIP64 that is not needed": (
        lambda: zipped((zip_info("a", extra=struct.pack("<2H2Q", 1, 16, 1, 1)), b"x")),
        "a: has extra fields"),
    "a data descriptor": (
        lambda: zipped((zip_info("a"), b"x"), out=Pipe()), "a: has a data descriptor"),
    "an encrypted file": (lambda: replaced(AB_ZIP, 6, b"\1"), "a: is encrypted"),
    "another name in the directory": (lambda: renamed(b"evil"), "aaaa: has another entry"),
    "a flag for UTF-8 that is not needed": (lambda: replaced(AB_ZIP, 7, b"\x08"), "a: has a head"),
    "a name that is not UTF-8": (lambda: named("é").replace(b"\xc3\xa9", b"\xff\xfe"), "not UTF-8"),
    "data at the start": (lambda: b"#!/bin/sh\n" + AB_ZIP, "is no zip archive"),
    "data after the end": (lambda: AB_ZIP + b"\0", "has more data after its end"),
    "data before the directory": (
        lambda: moved(AB_ZIP[:76] + b"x" + AB_ZIP[76:], 1), "is no zip archive, or is damaged"),
    "a directory elsewhere": (lambda: moved(AB_ZIP, 1), "has a directory that mobilellm package"),
    "an archive in an archive": (lambda: AB_ZIP + AB_ZIP, "has more data after its end"),
    "a file that is not in the directory": (without_the_last, "is truncated"),
    "entries that share a content": (overlapping, "has a directory that"),
    "no directory": (lambda: AB_ZIP[:76], "is truncated"),
    "a size over the end": (
        lambda: replaced(AB_ZIP, 18, struct.pack("<2I", 1 << 31, 1 << 31)), "is truncated"),
    "no file": (zipped, "is no zip archive"),
    "nothing": (lambda: b"", "is truncated"),
    "noise": (lambda: random.Random(0).randbytes(4096), "is no zip archive"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "said"), ZIPS.values(), ids=ZIPS)
def test_a_zip_that_is_not_ours_is_refused(
    make: Callable[[], bytes], said: str, root: Path
) -> None:
    (root / "a.zip").write_bytes(make())
    assert said in refused(root / "a.zip")


# Limits, and paths that hold no file.

FORMS: dict[str, Callable[[Mapping[str, bytes]], bytes]] = {
    ".tar.zst": lambda files: frame(tar(*(member(*entry) for entry in files.items()))),
    ".zip": lambda files: zipped(*((zip_info(name), files[name]) for name in files)),
}
both = pytest.mark.parametrize("suffix", FORMS)


@both
def test_too_many_files_are_refused(suffix: str, root: Path) -> None:
    names = sorted(f"{number:05}" for number in range(10_001))
    (root / f"a{suffix}").write_bytes(FORMS[suffix](dict.fromkeys(names, b"")))
    assert "'10000': holds more files than the limit of 10,000" in refused(root / f"a{suffix}")


@both
def test_a_file_over_the_limit_is_refused_before_it_is_written(
    suffix: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / f"a{suffix}").write_bytes(FORMS[suffix]({"a": bytes(1000)}))
    monkeypatch.setattr(archive, "FILE_BYTES", 999)
    assert "'a': is larger than the limit of 999 bytes" in refused(root / f"a{suffix}")


@both
def test_an_archive_for_which_the_disk_has_no_room_is_refused(
    suffix: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / f"a{suffix}"
    path.write_bytes(FORMS[suffix]({"a": bytes(1000)}))
    monkeypatch.setattr(archive, "_RESERVE", 1 << 60)
    with pytest.raises(InputError) as raised, opened(path):
        pytest.fail("the archive was opened")
    assert f"needs {10240 if suffix == '.tar.zst' else 1100:,} bytes" in raised.value.problem
    assert "set TMPDIR" in raised.value.remedy


@both
@pytest.mark.parametrize("kind", ["missing", "a pipe", "a link to nothing", "a device"])
def test_a_path_that_holds_no_file_is_refused_at_once(suffix: str, kind: str, root: Path) -> None:
    path = root / f"a{suffix}"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to("/dev/zero" if kind == "a device" else "nothing")
    with pytest.raises(InputError) as raised, opened(path):
        pytest.fail("the archive was opened")
    assert str(path) in str(raised.value)
    assert raised.value.remedy


# Damage. Whatever is changed, the archive is refused, or its content is what it was.

FILES = {
    "SHA256SUMS": b"0" * 64 + b"  a\n",
    "a/" + "n" * 110: b"a name in PAX records",
    "a/é": random.Random(1).randbytes(700),
    "empty": b"",
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An archive of each form, written by `pack`."""
    folder = tmp_path_factory.mktemp("seeds")
    for name, content in FILES.items():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(content)
    for suffix in FORMS:
        pack(folder / "files", folder / f"a{suffix}", FILES)
    return {suffix: (folder / f"a{suffix}").read_bytes() for suffix in FORMS}


def files_of(path: Path) -> dict[str, bytes] | None:
    """The content of an archive, None if it is refused; anything else than InputError fails."""
    try:
        with opened(path) as found:
            return {
                entry.relative_to(found).as_posix(): entry.read_bytes()
                for entry in found.rglob("*")
                if entry.is_file()
            }
    except InputError as error:
        assert str(path) in str(error)
        assert error.remedy
        return None


@both
def test_every_byte_that_is_flipped_is_found(
    suffix: str, seeds: Mapping[str, bytes], root: Path
) -> None:
    seed, noise, path = seeds[suffix], random.Random(2), root / f"a{suffix}"
    accepted = list[int]()
    for place, byte in enumerate(seed):
        path.write_bytes(replaced(seed, place, bytes([byte ^ noise.randint(1, 255)])))
        found = files_of(path)
        assert found in (None, FILES), place
        if found:
            accepted.append(place)
    # A few bits of a compressed block decide nothing.
    assert len(accepted) <= (0 if suffix == ".zip" else 5)


def test_every_byte_of_a_tar_that_is_no_content_is_checked(
    seeds: Mapping[str, bytes], root: Path
) -> None:
    """The tar in the frame is changed, and the frame is made anew, with its checksum."""
    whole, noise, path = (
        zstandard.decompress(seeds[".tar.zst"]),
        random.Random(3),
        root / "a.tar.zst",
    )
    # A changed name in a PAX record is another name, as other content is.
    parts = [*filter(None, FILES.values()), *(name.encode() for name in FILES if len(name) < 4)]
    parts.append(b"path=" + max(FILES, key=len).encode())
    content = set[int]()
    for part in parts:
        start = whole.index(part)
        content.update(range(start, start + len(part)))
    tried = 0
    for place, byte in enumerate(whole):
        if place in content or (place > 5000 and place % 50):  # the end is zeros alone
            continue
        flipped = replaced(whole, place, bytes([byte ^ noise.randint(1, 255)]))
        path.write_bytes(frame(flipped, 1))
        assert files_of(path) is None, place
        tried += 1
    assert tried > 4000


@both
def test_every_truncation_is_found(suffix: str, seeds: Mapping[str, bytes], root: Path) -> None:
    path = root / f"a{suffix}"
    for length in range(len(seeds[suffix])):
        path.write_bytes(seeds[suffix][:length])
        assert files_of(path) is None, length


@both
@settings(
    max_examples=300 * int(os.environ.get("MOBILELLM_FUZZ", "1")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_whatever_is_changed_the_files_are_the_same_or_refused(
    suffix: str, data: st.DataObject, seeds: Mapping[str, bytes], root: Path
) -> None:
    wrapped = suffix == ".tar.zst" and data.draw(st.booleans())  # the tar, or the frame
    made = zstandard.decompress(seeds[suffix]) if wrapped else seeds[suffix]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(made)))
        length = data.draw(st.sampled_from((0, 0, 1, 2, 4, 20, 512, 1024)))
        other = data.draw(st.integers(0, len(made)))
        piece = data.draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from((b"", bytes(512), b"PK\3\4", b"PK\1\2", b"PK\5\6", b"\xff" * 8)),
                st.just(made[other : other + max(length, 1)]),
            )
        )
        made = made[:place] + piece + made[place + length :]
    path = root / f"a{suffix}"
    path.write_bytes(frame(made, 1) if wrapped else made)
    found = files_of(path)
    if not wrapped:
        assert found in (None, FILES)
    elif found is not None:  # another content, written as ours: packed again, it is the same
        folder = root / "again"
        for name, content in found.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        pack(folder, root / "again.tar.zst", found)
        assert zstandard.decompress((root / "again.tar.zst").read_bytes()) == made
