"""Files and folders that appear whole or not at all, their hashes, and safetensors."""

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

#: Four of them are imported: `devices` needs them too, and may import nothing from `exporter`.
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
    """As `replacing`, for a folder: `path` is replaced as a whole."""
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or InputError."""
    if not path.is_file():
        raise InputError(path, "no such file", "Give the whole folder that it belongs to")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(path, f"is not valid JSON ({error})", "Get the file again") from error
    if not isinstance(content, dict):
        raise InputError(path, f"holds a {type(content).__name__}, not an object")
    return content


def copy_file(source: Path, target: Path) -> None:
    with replacing(target) as out, source.open("rb") as file:
        shutil.copyfileobj(file, out)


def differing_files(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """Files of `folder` that are not what their sha256 says: name → what is wrong."""
    problems = dict[str, str]()
    for name, expected in hashes.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems[name] = "is missing"
        elif (found := sha256(path)) != expected:
            problems[name] = f"has sha256 {found[:12]}…, not {expected[:12]}…"
    return problems


def made_from(manifest: Path, identity: Mapping[str, Any]) -> bool:
    """Whether the manifest is there, complete, and of this identity."""
    try:
        content = read_json(manifest)
    except InputError:  # missing or damaged
        return False
    files = content.pop("files", None)
    return isinstance(files, dict) and content == identity


def may_be_made_from(manifest: Path, known: Mapping[str, Any]) -> bool:
    """Whether a finished result may be of the same inputs, where only some of them are `known` yet.
    What is missing or damaged may be."""
    try:
        found = read_json(manifest)
    except InputError:
        return True
    return all(found.get(key) == value for key, value in known.items())


def package_versions(*packages: str) -> dict[str, str]:
    """Versions of installed distributions; what is not installed is left out."""
    versions = dict[str, str]()
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@dataclass(frozen=True)
class Output:
    """What a run leaves in its folder: `first` is begun first, `finished` is written last.

    These are names in the folder itself, of files or of folders.
    """

    first: str
    finished: str
    others: tuple[str, ...] = ()

    def names(self) -> set[str]:
        return {self.first, self.finished, *self.others} | self.temporary_names()

    def temporary_names(self) -> set[str]:
        return {f".{name}.tmp" for name in (self.first, self.finished, *self.others)}


@contextmanager
def claim_folder(out: Path, output: Output, same_inputs: bool, overwrite: bool) -> Iterator[None]:
    """Hold the folder `out` for one run.

    A folder with anything foreign in it is refused, and so is a finished run of other inputs,
    unless `overwrite` clears it. What a killed run left is continued. Raises InputError.
    """
    check_folder(out, output, same_inputs, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        _lock(descriptor, out)
        check_folder(out, output, same_inputs, overwrite)  # another run may just have ended
        if (out / output.finished).exists() and not same_inputs:
            _clear(out, output)
        yield
    finally:
        os.close(descriptor)


def check_folder(out: Path, output: Output, same_inputs: bool, overwrite: bool) -> None:
    """Raise the InputError that `claim_folder` would raise, without touching anything."""
    whole = (out, *out.absolute().parents)
    nearest = next(path for path in whole if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link to nowhere"
        problem = f"is {kind}" if nearest == out else f"lies below {nearest}, which is {kind}"
        raise InputError(out, problem, "Give a folder for the output")
    if not os.access(nearest, os.W_OK):
        raise InputError(
            out, f"cannot be written ({nearest} is read-only)", "Choose another folder"
        )
    held = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    foreign = sorted(held - output.names())
    begun = held & ({output.first} | output.temporary_names())
    if foreign or (held and not begun):
        raise InputError(
            out,
            f"holds files of something else ({(foreign or sorted(held))[0]})",
            "Give a new or an empty folder; nothing in this one was changed",
        )
    if output.finished in held and not same_inputs and not overwrite:
        raise InputError(
            out,
            "holds the finished result of other inputs",
            "Give another folder, or replace it with --overwrite",
        )


def _clear(out: Path, output: Output) -> None:
    """Remove a finished run. What makes it finished goes first and what marks it as ours last,
    so that a kill leaves an unfinished run."""
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
    """Write a safetensors file one tensor at a time, so that memory holds one tensor at most.

    `layout` gives dtype and shape of every tensor in file order, `tensor` makes each in turn.
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
    """Write tensors that are in memory already as a safetensors file."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entries.items()}
    write_safetensors(path, layout, entries.__getitem__, {"format": "pt", **(metadata or {})})
