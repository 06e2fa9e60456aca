"""Publish a bundle to a folder, such as one that is mounted or served."""

from pathlib import Path

from exporter.bundle.bundle import is_bundle
from exporter.errors import InputError
from exporter.files import check_apart, copy_file, differing_files, replacing_folder
from exporter.progress import Progress
from exporter.publishing.contents import Contents


def check_destination(folder: Path, source: Path) -> Path:
    """The folder to write. Raises InputError if it is the source or holds it, if it is inside the
    source, and if it holds anything else than a bundle."""
    if not folder.name:
        raise InputError(folder, "has no name", "Give a folder of its own for the bundle")
    check_apart(folder, source)
    if folder.resolve().is_relative_to(source.resolve()):
        raise InputError(folder, f"lies inside the bundle ({source})", "Give another folder")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(folder, "is not a folder", "Give a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_bundle(folder):
        raise InputError(
            folder, "holds other files and no bundle", "Give a new folder; nothing was changed"
        )
    return folder


def write(folder: Path, contents: Contents, overwrite: bool, progress: Progress) -> str:
    """Copy the bundle; the folder appears as a whole or not at all. Returns its path.

    Raises InputError for another bundle at this place, unless `overwrite`.
    """
    if is_bundle(folder) and not overwrite:
        if _same(folder, contents):
            return str(folder)
        raise InputError(
            folder, "holds another bundle", "Give another folder, or replace it with --overwrite"
        )
    try:
        with replacing_folder(folder) as temporary:
            for done, name in enumerate(contents.hashes):
                progress("publish", done, len(contents.hashes), name)
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                copy_file(contents.folder / name, temporary / name)
    except OSError as error:
        raise InputError(
            folder, f"cannot be written ({error.strerror})", "Give another folder"
        ) from error
    progress("publish", len(contents.hashes), len(contents.hashes))
    return str(folder)


def _same(folder: Path, contents: Contents) -> bool:
    """Whether the folder has the files of the bundle and no others, byte for byte."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    found = {path.relative_to(folder).as_posix() for path in paths}
    return found == set(contents.hashes) and not differing_files(folder, contents.hashes)
