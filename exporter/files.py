"""Atomic writes of files and folders, output folders, hashes, JSON and safetensors."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from devices.files import replacing, sha256, sync, write_json
from exporter.errors import InputError
from exporter.foreign import differing_files, read_json

#: Four come from `devices`, which needs them too and imports nothing from `exporter`; two come from
#: `exporter.foreign`.
__all__ = (
    "SAFETENSORS_NAMES",
    "Output",
    "check_folder",
    "claim_folder",
    "copy_file",
    "differing_files",
    "made_from",
    "may_be_made_from",
    "package_versions",
    "read_json",
    "replacing",
    "replacing_folder",
    "sha256",
    "sync",
    "write_json",
    "write_safetensors",
    "write_tensors",
)  # fmt: skip

SAFETENSORS_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            sync(written)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of `source`; `target` is replaced atomically."""
    with replacing(target) as out, source.open("rb") as file:
        shutil.copyfileobj(file, out)


def made_from(manifest: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the manifest exists, is complete, and has this identity."""
    try:
        content = read_json(manifest)
    except InputError:  # missing or damaged
        return False
    files = content.pop("files", None)
    return isinstance(files, dict) and content == identity


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

    A folder with other files in it is refused. A finished result of other inputs is refused too,
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
    present = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    foreign = sorted(present - output.names())
    started = present & ({output.first} | output.temporary_names())
    if foreign or (present and not started):
        raise InputError(
            out,
            f"holds other files ({(foreign or sorted(present))[0]})",
            "Give a new or an empty folder; nothing in this one was changed",
        )
    if output.finished in present and not same_inputs and not overwrite:
        raise InputError(
            out,
            "holds the finished result of other inputs",
            "Give another folder, or replace it with --overwrite",
        )


def _clear(out: Path, output: Output) -> None:
    """Delete a finished result: `finished` first and `first` last, so that a kill leaves an
    unfinished run, which the next run accepts."""
    (out / output.finished).unlink()
    names = sorted(path.name for path in out.iterdir() if path.name != output.first)
    for name in (*names, output.first):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            out, "another run is writing this folder", "Wait for it, or choose another folder"
        ) from error


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file one tensor at a time, so at most one tensor is in memory.

    `layout` gives the type and shape of every tensor in file order; `tensor` returns the tensor of
    a name and is called in that order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in layout.items():
            value = tensor(name)
            assert value.dtype == dtype and tuple(value.shape) == shape, name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(
    path: Path, entries: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are all in memory as a safetensors file."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entries.items()}
    write_safetensors(path, layout, entries.__getitem__, {"format": "pt", **(metadata or {})})
