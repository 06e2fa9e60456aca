"""Package a bundle for delivery: add measurements, sign it, and write it as one archive or folder.

mobilellm package build/nano --result nano.json --sign key.pem -o nano.tar.zst
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.bundle.archive import FORMATS, opened, pack
from exporter.bundle.bundle import (
    CHECKSUMS,
    QUANTIZED,
    SIGNATURES,
    bundle_output,
    file_problems,
    open_bundle,
    read_checksums,
    write_bundle,
)
from exporter.bundle.manifest import IDENTITY, MANIFEST
from exporter.bundle.results import RESULTS, check_belongs, read_result
from exporter.bundle.signature import check_can_sign, sign, sign_keyless
from exporter.errors import InputError
from exporter.files import check_apart, check_folder, claim_folder, copy_file
from exporter.progress import Progress


@dataclass(frozen=True)
class Request:
    """The options of the command line: measurements to add, and how to sign."""

    results: Sequence[Path] = ()
    private_key: Path | None = None
    keyless: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Packaged:
    """What was written: the archive or folder, its size in bytes, its files and signatures."""

    path: Path
    bytes: int
    files: Sequence[str]
    signed: bool


def package(path: Path, out: Path, request: Request, progress: Progress) -> Packaged:
    """Write a bundle, with more measurements, as a folder or an archive. Raises InputError.

    An earlier signature is kept if no file changes. What is at `out` is replaced only with
    `overwrite`, and only by a finished result.
    """
    _check_output(out, path, request.overwrite)
    if request.private_key is not None or request.keyless:
        check_can_sign(request.private_key)
    with opened(path) as source:
        bundle = open_bundle(source)
        for name, problem in file_problems(source).items():
            raise InputError(source / name, problem, "The bundle is damaged: export it again")
        results = _checked_results(request.results, source)
        for file in results.values():
            check_belongs(read_result(file), bundle.manifest, file)
        # The quantized checkpoint first: an unfinished bundle is known by it.
        names = sorted(bundle.manifest.files, key=lambda name: not name.startswith(QUANTIZED))
        kept = [MANIFEST, *(name for name in SIGNATURES if (source / name).is_file()), CHECKSUMS]
        with _folder(out, request.overwrite) as folder:
            progress("package", 0, 3, "copy")
            for name in (*names, *([] if results else kept)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(source / name, folder / name)
            for name, file in results.items():
                (folder / RESULTS).mkdir(exist_ok=True)
                copy_file(file, folder / name)
            if results:
                identity = bundle.manifest.model_dump(mode="json", include=set(IDENTITY))
                write_bundle(folder, identity, bundle.quantized, bundle.artifacts)
            progress("package", 1, 3, "sign")
            _sign(folder, request)
            progress("package", 2, 3, "write")
            written = [*read_checksums(folder), CHECKSUMS]
            signed = [name for name in SIGNATURES if (folder / name).is_file()]
            if _is_archive(out):
                pack(folder, out, [*written, *signed])
            progress("package", 3, 3)
            return Packaged(out, _size(out, folder), (*written, *signed), bool(signed))


def _is_archive(out: Path) -> bool:
    return out.name.endswith(FORMATS)


def _check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output that would lose something, before any work."""
    if not _is_archive(out):
        if out.suffix in (".tar", ".zst", ".gz", ".tgz", ".xz", ".7z"):
            raise InputError(out, "is no kind of archive that is written", "Use .tar.zst or .zip")
        check_apart(out, source)
        check_folder(out, bundle_output(), False, overwrite)
    elif out.is_dir():
        raise InputError(out, "is a folder", "Give a name for the archive")
    elif out.exists() and not overwrite:
        raise InputError(out, "exists already", "Give another name, or replace it with --overwrite")
    elif out.exists() and out.samefile(source):
        raise InputError(out, "is the bundle that is read", "Give another name")


def _checked_results(files: Sequence[Path], source: Path) -> dict[str, Path]:
    """The measurements to add: name in the bundle → file. A name that is taken is refused."""
    found = dict[str, Path]()
    for file in files:
        name = f"{RESULTS}/{file.name}"
        if file.suffix != ".json":
            raise InputError(file, "is not a .json file", "Give a file that was written with -o")
        if name in found or (source / name).exists():
            raise InputError(file, f"would be the second {name}", "Give it another name")
        found[name] = file
    return found


@contextmanager
def _folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """The folder to write: `out` itself, or one beside the archive that is removed at the end."""
    if not _is_archive(out):
        with claim_folder(out, bundle_output(), False, overwrite):
            yield out
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    name = next(out.name.removesuffix(end) for end in FORMATS if out.name.endswith(end))
    try:
        folder = scratch / (name or "bundle")  # a signature has the name of the folder
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(scratch)


def _sign(folder: Path, request: Request) -> None:
    """Sign the folder as the request says, if it does."""
    if request.private_key is not None:
        sign(folder, request.private_key)
    elif request.keyless:
        sign_keyless(folder)


def _size(out: Path, folder: Path) -> int:
    if _is_archive(out):
        return out.stat().st_size
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
