"""A bundle: one quantized checkpoint, its artifacts, and the hashes of every file.

    BUNDLE/quantized/      the quantized checkpoint
    BUNDLE/TARGET/         one folder for each target: what goes to the phone
    BUNDLE/bundle.json     the recipe and what was made from it
    BUNDLE/SHA256SUMS      of every other file (`sha256sum -c` reads it); written last

Nothing measured is stored here, so two exports of one recipe are equal to the last byte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.backends import names as backend_names
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.errors import InputError
from exporter.files import (
    Output,
    differing_files,
    made_from,
    read_json,
    replacing,
    sha256,
    write_json,
)
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized

MANIFEST, SEAL, QUANTIZED = "bundle.json", "SHA256SUMS", "quantized"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Bundle:
    """A finished bundle; `artifacts` maps target → artifact."""

    path: Path
    quantized: QuantizedCheckpoint
    artifacts: Mapping[str, FinishedArtifact]


def bundle_output() -> Output:
    """The names that an export writes."""
    return Output(QUANTIZED, SEAL, (MANIFEST, *backend_names()))


def bundle_identity(
    recipe: Mapping[str, Any], quantized: Mapping[str, Any], artifacts: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``bundle.json`` holds; `quantized` and `artifacts` are the parts' own versions."""
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "source": quantized["source"],
        "targets": list(artifacts),
        "versions": quantized["versions"]
        | {k: v for a in artifacts.values() for k, v in a.items()},
    }


def write_seal(
    folder: Path,
    manifest: Mapping[str, Any],
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
) -> None:
    """Write ``bundle.json`` and the hashes that make the folder a finished bundle."""
    write_json(folder / MANIFEST, manifest)
    names = [MANIFEST, f"{QUANTIZED}/{QUANTIZED_MANIFEST}"]
    names += [f"{QUANTIZED}/{name}" for name in quantized.manifest["files"]]
    for target, finished in artifacts.items():
        names += [f"{target}/{ARTIFACT_MANIFEST}"]
        names += [f"{target}/{name}" for name in finished.manifest["files"]]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(names)]
    with replacing(folder / SEAL) as file:
        file.write("".join(lines).encode())


def is_bundle(folder: Path) -> bool:
    return (folder / SEAL).is_file()


def is_bundle_of(
    folder: Path, manifest: Mapping[str, Any], quantized_identity: Mapping[str, Any]
) -> bool:
    """Whether the folder was made from the same, as ``bundle.json`` says; where that is damaged,
    as the quantized checkpoint says."""
    try:
        content = read_json(folder / MANIFEST)
    except InputError:
        return made_from(folder / QUANTIZED / QUANTIZED_MANIFEST, quantized_identity)
    return content == manifest


def file_problems(folder: Path) -> dict[str, str]:
    """Files that are missing, changed or foreign, by name: name → what is wrong."""
    hashes = _read_seal(folder)
    problems = differing_files(folder, hashes)
    for name in sorted(_files(folder) - set(hashes)):
        problems[name] = f"is not listed in {SEAL}"
    for name in (MANIFEST, f"{QUANTIZED}/{QUANTIZED_MANIFEST}"):
        if name not in hashes:
            problems[name] = f"is not listed in {SEAL}"
    return problems


def sealed_files(folder: Path) -> tuple[str, ...]:
    """The names of every file that the seal covers."""
    return tuple(_read_seal(folder))


def open_bundle(folder: Path) -> Bundle:
    """Open a finished bundle; its files are not hashed here. Raises InputError."""
    if not is_bundle(folder):
        began = (folder / QUANTIZED).is_dir()
        raise InputError(
            folder,
            "is a bundle whose export did not finish" if began else "is not a bundle",
            "Run the same mobilellm export again" if began else "mobilellm export makes one",
        )
    manifest = read_json(folder / MANIFEST)
    targets = manifest.get("targets")
    if not isinstance(targets, list) or not targets or not set(targets) <= set(backend_names()):
        raise InputError(f"{folder / MANIFEST}: targets", f"{targets!r} names no known target")
    return Bundle(
        path=folder,
        quantized=open_quantized(folder / QUANTIZED),
        artifacts={name: open_artifact(folder / name) for name in targets},
    )


def _files(folder: Path) -> set[str]:
    """Every file of the bundle but the seal, relative, with forward slashes."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    } - {SEAL}


def _read_seal(folder: Path) -> dict[str, str]:
    """name → sha256. Every line is checked, so that a damaged seal is no seal."""
    path = folder / SEAL
    hashes = dict[str, str]()
    try:
        text = path.read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", "Export the bundle again") from error
    for line in text.split("\n")[:-1]:
        digest, separator, name = line[:64], line[64:66], line[66:]
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if separator != "  " or not inside or set(digest) - set("0123456789abcdef"):
            raise InputError(path, f"holds the line {line!r}", "Export the bundle again")
        hashes[name] = digest
    if not hashes or not text.endswith("\n"):
        raise InputError(path, "is not complete", "Export the bundle again")
    return hashes
