"""Finished stages in a folder, each under the hash of everything that it was made from.

    mobilellm export mobilellm-r1-nano-int4 --checkpoint examples/mobilellm-r1-nano \\
        -o build/nano --stages build/stages

    FOLDER/STAGE/KEY/stage.json    the identity of the stage, and the hashes of its files
    FOLDER/STAGE/KEY/files/        its files

KEY is the SHA-256 of the stage's name, of its identity, and of this package's source code: a change
of code that has no new version must not find what the old code made. An entry appears whole or not
at all, and is never changed, so that several processes can share the folder. Files are copied, not
linked: a file that is changed in an output folder must not change in the store.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from exporter.errors import InputError
from exporter.files import (
    check_writable,
    differing_files,
    is_finished,
    read_json,
    replacing_folder,
    sha256,
    sync,
    write_json,
)
from exporter.foreign import FILE_BYTES, inside, open_regular
from exporter.progress import Progress, no_progress
from exporter.settings import FileHashes, Section, parse_section

#: What happened to a stage: its work was done; it was copied from the store; it was already
#: finished in the output folder.
MADE, FOUND, UNCHANGED = "made", "found", "unchanged"

_ENTRY, _FILES, _RECORD = "stage.json", "files", "record.json"
_KEY = re.compile(r"[0-9a-f]{64}")
#: The names of entries that are being written or removed; the prune ignores them for a day.
_TEMPORARY, _DAY = re.compile(r"\.[0-9a-f]{32}\.tmp"), 86_400.0

Result = TypeVar("Result")


class _Entry(Section):
    """The content of ``stage.json``."""

    stage: str
    identity: dict[str, Any]
    code: str
    files: FileHashes


class Stages:
    """The stages of one run, and the store where finished ones are found and kept.

    Without a `folder`, nothing is found or kept. `results` maps stage → `MADE`, `FOUND` or
    `UNCHANGED`, and `damaged` maps stage → what was wrong with its entry, which was removed.
    """

    def __init__(self, folder: Path | None = None, progress: Progress = no_progress) -> None:
        self.folder = folder
        self.results, self.damaged = dict[str, str](), dict[str, str]()
        # A second earlier: the times of files are less exact than the clock.
        self._progress, self._started = progress, time.time() - 1

    def check(self, out: Path) -> None:
        """Raise InputError if the store cannot be written, or if it and the output folder `out` are
        one inside the other."""
        if self.folder is None:
            return
        check_writable(self.folder)
        store, output = self.folder.resolve(), out.resolve()
        if store.is_relative_to(output) or output.is_relative_to(store):
            raise InputError(
                self.folder,
                f"and the output folder {out} lie one inside the other",
                "Give another folder for the stages",
            )

    def run(
        self,
        stage: str,
        identity: Mapping[str, Any],
        manifest: Path,
        make: Callable[[], Result],
        open_finished: Callable[[Path], Result],
    ) -> Result:
        """The result of a stage: finished in its folder, found in the store, or made and kept.

        `manifest` lies in the stage's folder and is written last; it holds the identity, and the
        hashes of the folder's files. `make` may open what is finished. Raises InputError.
        """
        finished = is_finished(manifest, identity)
        if finished:
            self.unchanged({stage: identity})
        elif self.restore(stage, identity, manifest.parent):
            return open_finished(manifest.parent)
        result = make()
        if not finished:
            self.results[stage] = MADE
        if self.folder is not None:
            hashes = {**read_json(manifest)["files"], manifest.name: sha256(manifest)}
            self.keep(stage, identity, manifest.parent, hashes)
        return result

    def unchanged(self, stages: Mapping[str, Mapping[str, Any]]) -> None:
        """Say that these stages are finished in the output folder; stage → identity."""
        for stage, identity in stages.items():
            self.results[stage] = UNCHANGED
            self._say(stage, UNCHANGED)
            _mark_used(self._place(stage, identity))

    def restore(self, stage: str, identity: Mapping[str, Any], into: Path) -> bool:
        """Copy a finished stage to the folder `into`, which it replaces; False if there is none.

        An entry of which the copy has other hashes is removed, and `damaged` says why.
        """
        entry = self._place(stage, identity)
        if entry is None or not os.path.lexists(entry):
            return False
        try:
            hashes = _read_entry(entry, stage, identity)
            with replacing_folder(into) as copy:
                _copy_files(entry / _FILES, copy, hashes, entry)
        except InputError as error:
            self.damaged[stage] = f"{error.subject}: {error.problem}"
            self._say(stage, f"damaged in the store, and made again: {self.damaged[stage]}")
            _remove(entry)
            return False
        _mark_used(entry)
        self.results[stage] = FOUND
        self._say(stage, f"found in {self.folder}")
        return True

    def keep(
        self, stage: str, identity: Mapping[str, Any], folder: Path, hashes: Mapping[str, str]
    ) -> None:
        """Copy the files of a finished stage to the store, unless they are there.

        `hashes` maps each name in `folder` to its SHA-256. Of several processes that keep the same
        stage at once, the first wins. Raises InputError if a file has another hash.
        """
        entry = self._place(stage, identity)
        if entry is None or entry.is_dir():
            _mark_used(entry)
            return
        temporary = _temporary_name(entry)
        temporary.mkdir(parents=True)
        try:
            _copy_files(folder, temporary / _FILES, hashes, folder)
            content = {"stage": stage, "identity": identity, "code": _code(), "files": hashes}
            write_json(temporary / _ENTRY, content)
            for written in (temporary, *temporary.rglob("*")):
                sync(written)
            try:
                temporary.rename(entry)
            except OSError:
                if not entry.is_dir():
                    raise
            sync(entry.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def recall(self, stage: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record that `note` kept for a stage without files of its own; None if there is none.
        Raises InputError for one that is not JSON."""
        with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
            folder = Path(scratch) / _FILES
            if self.restore(stage, identity, folder):
                return read_json(folder / _RECORD)
        return None

    def note(self, stage: str, identity: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Keep a record as the result of a stage without files of its own."""
        with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
            path = Path(scratch) / _RECORD
            write_json(path, record)
            self.keep(stage, identity, path.parent, {_RECORD: sha256(path)})

    def prune(self, days: float) -> int:
        """Remove the stages that no run used for a number of days, and return how many they were.

        What this run used is kept, so 0 days removes everything else. What killed runs left is
        removed when it is a day old.
        """
        count, now = 0, time.time()
        unused = min(now - days * _DAY, self._started)
        for path in sorted(self.folder.glob("*/*")) if self.folder else ():
            if _TEMPORARY.fullmatch(path.name) and _used(path) < min(unused, now - _DAY):
                shutil.rmtree(path, ignore_errors=True)
            elif _KEY.fullmatch(path.name) and _used(path) < unused:
                _remove(path)
                count += 1
        return count

    def _place(self, stage: str, identity: Mapping[str, Any]) -> Path | None:
        """The folder of a stage's entry; None without a store."""
        if self.folder is None:
            return None
        named = {"stage": stage, "identity": identity, "code": _code()}
        key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        return self.folder / stage.replace(" ", "-") / key

    def _say(self, stage: str, note: str) -> None:
        self._progress(stage, 0, 1, note)
        self._progress(stage, 1, 1, note)


@cache
def _code() -> str:
    """The hash of this package's source files: their names and their content."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _read_entry(entry: Path, stage: str, identity: Mapping[str, Any]) -> Mapping[str, str]:
    """The hashes of an entry's files. Raises InputError if the entry is of something else."""
    path = entry / _ENTRY
    found = parse_section(_Entry, read_json(path), str(path))
    if (found.stage, found.identity, found.code) != (stage, identity, _code()):
        raise InputError(path, "is not that of this stage")
    return found.files


def _copy_files(source: Path, target: Path, hashes: Mapping[str, str], subject: Path) -> None:
    """Copy files, and check the hashes of the copies. Raises InputError; no link is followed."""
    for name in hashes:
        path = inside(source, name, links=False)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(path, FILE_BYTES) as file, copy.open("xb") as out:
            shutil.copyfileobj(file, out)
    for name, problem in differing_files(target, hashes).items():
        raise InputError(subject / name, problem, "Give folders that nobody else writes")


def _mark_used(entry: Path | None) -> None:
    """Set the time that `prune` looks at, if there is such an entry."""
    with suppress(FileNotFoundError):
        if entry is not None:
            os.utime(entry / _ENTRY)


def _used(path: Path) -> float:
    """When an entry was last used, in seconds since 1970."""
    try:
        return (path / _ENTRY).stat().st_mtime
    except OSError:  # it is not complete, or another process removes it
        return path.lstat().st_mtime if os.path.lexists(path) else 0.0


def _remove(entry: Path) -> None:
    """Remove an entry at once under its name, whatever is there."""
    temporary = _temporary_name(entry)
    try:
        entry.rename(temporary)
    except FileNotFoundError:  # another process removed it
        return
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink()


def _temporary_name(entry: Path) -> Path:
    return entry.with_name(f".{uuid.uuid4().hex}.tmp")
