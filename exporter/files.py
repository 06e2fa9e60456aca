"""Atomic writes of files and folders, output folders, hashes and manifests."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from devices.files import json_bytes, replacing, sha256, sync, write_json
from exporter.errors import InputError
from exporter.foreign import differing_files, open_regular, read_json

#: Five come from `devices`, which needs them too and imports nothing from `exporter`; two come from
#: `exporter.foreign`.
__all__ = (
    "Output",
    "check_folder",
    "check_writable",
    "claim_folder",
    "copy_file",
    "differing_files",
    "is_finished",
    "json_bytes",
    "made_from",
    "may_be_made_from",
    "package_versions",
    "read_json",
    "replacing",
    "replacing_folder",
    "sha256",
    "sync",
    "write_json",
)  # fmt: skip


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an exception.

    No link is followed: one at `path` or at the temporary name is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        temporary.mkdir()
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            sync(written)
        _remove(path)
        temporary.replace(path)
        sync(path.parent)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    """Delete a file, a link itself, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file; `target` is replaced atomically."""
    with replacing(target) as out, open_regular(source) as file:
        shutil.copyfileobj(file, out)


def made_from(manifest: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the manifest exists, is complete, and has this identity."""
    try:
        content = read_json(manifest)
    except InputError:  # missing or damaged
        return False
    files = content.pop("files", None)
    return isinstance(files, dict) and content == identity


def is_finished(manifest: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the manifest has this identity, and the files beside it the hashes that it lists."""
    if not made_from(manifest, identity):
        return False
    return not differing_files(manifest.parent, read_json(manifest)["files"])


def may_be_made_from(manifest: Path, known: Mapping[str, Any]) -> bool:
    """Whether the result of this manifest may have the same inputs, as far as they are `known`.
    True for a manifest that is missing or damaged."""
    try:
        found = read_json(manifest)
    except InputError:
        return True
    return all(found.get(key) == value for key, value in known.items())


def package_versions(*packages: str) -> dict[str, str]:
    """The versions of installed distributions; one that is not installed is left out."""
    versions = dict[str, str]()
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@dataclass(frozen=True)
class Output:
    """The names of the files and folders that a run writes into its output folder.

    `first` is created first, and `finished` is written last.
    """

    first: str
    finished: str
    others: tuple[str, ...] = ()

    def names(self) -> set[str]:
        """All names, and the temporary names under which they are written."""
        return {self.first, self.finished, *self.others} | self.temporary_names()

    def temporary_names(self) -> set[str]:
        """The temporary names, which a killed run may leave."""
        return {f".{name}.tmp" for name in (self.first, self.finished, *self.others)}


@contextmanager
def claim_folder(out: Path, output: Output, same_inputs: bool, overwrite: bool) -> Iterator[None]:
    """Create the output folder and lock it for one run.

    A folder with other files in it is refused, and so is one with a link or a special file, at any
    depth; `out` itself may be a link to a folder. A finished result of other inputs is refused too,
    unless `overwrite`, which deletes it. The files of a killed run are kept. Raises InputError.
    """
    check_folder(out, output, same_inputs, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _lock(descriptor, out)
        check_folder(out, output, same_inputs, overwrite)  # again: another run may have ended
        if (out / output.finished).exists() and not same_inputs:
            _clear(out, output)
        yield
    finally:
        os.close(descriptor)


def check_folder(out: Path, output: Output, same_inputs: bool, overwrite: bool) -> None:
    """Raise the InputError that `claim_folder` would raise; changes nothing."""
    check_writable(out)
    present = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    foreign = sorted(present - output.names())
    started = present & ({output.first} | output.temporary_names())
    if foreign or (present and not started):
        raise InputError(
            out,
            f"holds other files ({(foreign or sorted(present))[0]})",
            "Give a new or an empty folder; nothing in this one was changed",
        )
    if out.is_dir():
        _refuse_links(out)
    if output.finished in present and not same_inputs and not overwrite:
        raise InputError(
            out,
            "holds the finished result of other inputs",
            "Give another folder, or replace it with --overwrite",
        )


def check_writable(out: Path) -> None:
    """Raise InputError if a folder cannot be written, or cannot be made; changes nothing."""
    paths = (out, *out.absolute().parents)
    nearest = next(path for path in paths if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a broken link"
        problem = f"is {kind}" if nearest == out else f"lies below {nearest}, which is {kind}"
        raise InputError(out, problem, "Give a folder for the output")
    if not os.access(nearest, os.W_OK):
        raise InputError(
            out, f"cannot be written ({nearest} is read-only)", "Choose another folder"
        )


def _refuse_links(folder: Path) -> None:
    """Raise InputError for a link, a device, a pipe or a socket below `folder`."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            _refuse_links(Path(entry.path))
        elif not entry.is_file(follow_symlinks=False):
            kind = "a link" if entry.is_symlink() else "a device, a pipe or a socket"
            raise InputError(
                entry.path,
                f"is {kind}, in an output folder",
                "Remove it, or give a new folder; nothing was changed",
            )


def check_apart(out: Path, source: Path) -> None:
    """Raise InputError if the output folder is, or holds, the folder that is read."""
    if source.resolve().is_relative_to(out.resolve()):
        raise InputError(out, f"holds the model that is read ({source})", "Give another folder")


def _clear(out: Path, output: Output) -> None:
    """Delete a finished result: `finished` first and `first` last, so that a kill leaves an
    unfinished run, which the next run accepts."""
    (out / output.finished).unlink()
    names = sorted(path.name for path in out.iterdir() if path.name != output.first)
    for name in (*names, output.first):
        _remove(out / name)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            out, "another run is writing this folder", "Wait for it, or choose another folder"
        ) from error
