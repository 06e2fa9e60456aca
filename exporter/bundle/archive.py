"""One file for a bundle: ``.tar.zst``, or ``.zip`` without compression.

    mobilellm package build/nano -o nano.tar.zst

An archive is a function of the names and contents of its files: they are sorted, and no time, mode
or owner is stored. An archive from anyone is accepted only if it is exactly what `pack` writes for
its files; of a ``.tar.zst`` this holds for the tar in it. Files are read and written in pieces, so
memory does not grow with a bundle.
"""

import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.bundle import archive_tar, archive_zip
from exporter.bundle.archive_stream import Stream, refusal
from exporter.errors import InputError, short
from exporter.files import replacing
from exporter.foreign import FILE_BYTES, inside, is_plain_name, open_regular
from exporter.progress import OnStep, no_step

_FORMATS = {".tar.zst": archive_tar, ".zip": archive_zip}
#: The ends of names of archives.
FORMATS = tuple(_FORMATS)
#: The most files, folders in a name, and bytes of an archive when it is unpacked.
ENTRIES, DEPTH, BYTES = 10_000, 16, 64 << 30
#: What unpacking leaves free on the disk, in bytes.
_RESERVE = 256 << 20
_CHUNK = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether `path` has the name of an archive and is no folder; it may be missing."""
    return path.name.endswith(FORMATS) and not path.is_dir()


def pack(folder: Path, out: Path, names: Iterable[str], on_step: OnStep = no_step) -> None:
    """Write the files `names` of `folder` to the archive `out`, which is replaced atomically.

    Progress is in MiB. Raises InputError for a name that `opened` would refuse, for a link and for
    a file that is not regular.
    """
    form = _FORMATS.get(_suffix(out))
    if form is None:
        raise InputError(out, "has no name of an archive", f"It ends in {' or '.join(FORMATS)}")
    names, seen = sorted(names), dict[str, str]()
    for name in names:
        if problem := _name_problem(name, seen):
            raise InputError(f"{folder}: {short(name)}", problem, "Rename the file")
    sizes = dict[str, int]()
    for name in names:
        with open_regular(inside(folder, name, links=False), FILE_BYTES) as file:
            sizes[name] = file.seek(0, 2)
    total, done = sum(sizes.values()), 0
    if problem := _total_problem(len(sizes), total):
        raise InputError(folder, problem, "Pack less")

    def content(name: str) -> Iterator[bytes]:
        nonlocal done
        left = sizes[name]
        with open_regular(folder / name) as file:
            while left and (piece := file.read(min(_CHUNK, left))):
                on_step(done >> 20, total >> 20, name)
                left -= len(piece)
                done += len(piece)
                yield piece
            if left or file.read(1):
                raise InputError(folder / name, "changed while it was packed", "Pack again")

    on_step(0, total >> 20, "")
    with replacing(out) as file:
        form.write(file, sizes, content)
    on_step(total >> 20, total >> 20, "")


@contextmanager
def opened(path: Path, on_step: OnStep = no_step) -> Iterator[Path]:
    """Yield the folder of a bundle: `path` itself, or what the archive `path` holds.

    An archive is unpacked into a temporary folder that only this user can open and that is removed
    when the block ends; an InputError of the block names the archive instead of that folder.
    Progress is in MiB. Raises InputError unless the archive is exactly what `pack` writes.
    """
    if not is_archive(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as private:
        name = path.name.removesuffix(_suffix(path))
        folder = Path(private, name if is_plain_name(name) else "bundle")
        try:
            _unpack(path, folder, on_step)
            yield folder
        except InputError as error:
            texts = error.subject, error.problem, error.remedy
            if not any(str(folder) in text for text in texts):
                raise
            raise InputError(*(text.replace(str(folder), str(path)) for text in texts)) from error


def _unpack(path: Path, folder: Path, on_step: OnStep) -> None:
    """Unpack into `folder`, which does not exist and whose parent nobody else can write."""
    form = _FORMATS[_suffix(path)]
    folder.mkdir()
    with open_regular(path) as file:
        stream = form.stream(file, path)
        _check_space(stream, folder)
        on_step(0, stream.size >> 20, "")
        last, seen, count = "", dict[str, str](), 0
        for member in form.members(stream):
            name, count = member.name, count + 1
            problem = _name_problem(name, seen) or _total_problem(count, member.size)
            if not problem and name <= last:
                problem = f"comes after {last}, out of order"
            if member.size > FILE_BYTES:
                problem = f"is larger than the limit of {FILE_BYTES:,} bytes"
            if problem:
                raise refusal(path, problem, short(name))
            last, written = name, folder / name
            written.parent.mkdir(parents=True, exist_ok=True)
            with written.open("xb") as out:
                for piece in member.content:
                    out.write(piece)
                    on_step(stream.position >> 20, stream.size >> 20, name)
    if problem := _total_problem(count, 0):
        raise refusal(path, problem)


def _name_problem(name: str, seen: dict[str, str]) -> str:
    """Why an archive may not have this name after those in `seen`; empty if it may.

    `seen` maps the folded form of each path to how it was written, a folder with a slash. Upper and
    lower case, and two ways to write an accent, are the same name on a Mac.
    """
    if not is_plain_name(name):
        return "is not the plain name of a file inside this folder"
    parts = name.split("/")
    if len(parts) > DEPTH:
        return f"is nested deeper than the limit of {DEPTH} folders"
    folders = ["/".join(parts[:depth]) for depth in range(1, len(parts))]
    for place in (*(f"{folder}/" for folder in folders), name):
        key = _folded(place.rstrip("/"))
        if key in seen and (seen[key] != place or place == name):
            return f"is the same as {seen[key]} on some file systems"
        seen[key] = place
    return ""


def _folded(name: str) -> str:
    """The same text for names that a file system may not tell apart (Unicode 3.13, D145)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _total_problem(count: int, size: int) -> str:
    """Why an archive may not have so many files and bytes; empty if it may."""
    if count > ENTRIES:
        return f"holds more files than the limit of {ENTRIES:,}"
    if size > BYTES:
        return f"holds more than the limit of {BYTES:,} bytes"
    return "" if count else "holds no file"


def _check_space(stream: Stream, folder: Path) -> None:
    """Raise InputError if the archive is larger than the limit, or than the disk has room for."""
    if problem := _total_problem(1, stream.size):
        raise refusal(stream.path, problem)
    free = shutil.disk_usage(folder).free - _RESERVE
    if stream.size > free:
        raise InputError(
            stream.path,
            f"needs {stream.size:,} bytes to be unpacked; {folder.parent.parent} has room for "
            f"{max(0, free):,}",
            "Free some, or set TMPDIR to a folder on a larger disk",
        )


def _suffix(path: Path) -> str:
    return next((suffix for suffix in FORMATS if path.name.endswith(suffix)), "")
