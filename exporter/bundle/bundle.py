"""A bundle: one quantized checkpoint, its artifacts, and the hashes of every file.

    BUNDLE/quantized/      the quantized checkpoint
    BUNDLE/TARGET/         one folder for each target: what is deployed to the phone
    BUNDLE/bundle.json     the recipe, the hashes of the checkpoint, and package versions
    BUNDLE/SHA256SUMS      the hashes of all other files (for `sha256sum -c`); written last

No measurement is stored here, so two exports of the same recipe are byte-identical.
"""

import stat
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
from exporter.foreign import is_plain_name, read_bytes
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.settings import FileHashes, Section, parse_section

MANIFEST, CHECKSUMS, QUANTIZED = "bundle.json", "SHA256SUMS", "quantized"
FORMAT_VERSION = 1
#: The largest ``SHA256SUMS``, in bytes: ten thousand lines.
_CHECKSUMS_BYTES = 1 << 20


class BundleManifest(Section):
    """The fields of ``bundle.json``; `bundle_identity` describes them."""

    format_version: int
    recipe: dict[str, Any]
    source: FileHashes
    targets: list[str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A finished bundle; `artifacts` maps target → artifact."""

    path: Path
    manifest: BundleManifest
    quantized: QuantizedCheckpoint
    artifacts: Mapping[str, FinishedArtifact]


def bundle_output() -> Output:
    """The names of the files and folders that an export writes."""
    return Output(QUANTIZED, CHECKSUMS, (MANIFEST, *backend_names()))


def bundle_identity(
    recipe: Mapping[str, Any], quantized: Mapping[str, Any], artifacts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``bundle.json``.

    `quantized` is the identity of the quantized checkpoint; `artifacts` maps target → package
    versions.
    """
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "source": quantized["source"],
        "targets": list(artifacts),
        "versions": quantized["versions"]
        | {k: v for a in artifacts.values() for k, v in a.items()},
    }


def write_checksums(
    folder: Path,
    manifest: Mapping[str, Any],
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
) -> None:
    """Write ``bundle.json``, then ``SHA256SUMS``, which makes the folder a finished bundle."""
    write_json(folder / MANIFEST, manifest)
    names = [MANIFEST, f"{QUANTIZED}/{QUANTIZED_MANIFEST}"]
    names += [f"{QUANTIZED}/{name}" for name in quantized.manifest["files"]]
    for target, finished in artifacts.items():
        names += [f"{target}/{ARTIFACT_MANIFEST}"]
        names += [f"{target}/{name}" for name in finished.manifest["files"]]
    lines = [f"{sha256(folder / name)}  {name}\n" for name in sorted(names)]
    with replacing(folder / CHECKSUMS) as file:
        file.write("".join(lines).encode())


def is_bundle(folder: Path) -> bool:
    """Whether the folder is a finished bundle; its files are not checked."""
    checksums = folder / CHECKSUMS
    return checksums.is_file() and not checksums.is_symlink()


def is_bundle_of(
    folder: Path, manifest: Mapping[str, Any], quantized_identity: Mapping[str, Any]
) -> bool:
    """Whether ``bundle.json`` in the folder equals `manifest`; if it is missing or damaged, whether
    the quantized checkpoint has this identity."""
    try:
        content = read_json(folder / MANIFEST)
    except InputError:
        return made_from(folder / QUANTIZED / QUANTIZED_MANIFEST, quantized_identity)
    return content == manifest


def file_problems(folder: Path) -> dict[str, str]:
    """Files that are missing, changed or not listed, links, and empty folders: name → what is
    wrong. Raises InputError if ``SHA256SUMS`` is damaged."""
    hashes = read_checksums(folder)
    files, foreign = tree(folder)
    listed = {name: digest for name, digest in hashes.items() if name not in foreign}
    problems = differing_files(folder, listed) | foreign
    for name in (*sorted(files), MANIFEST, f"{QUANTIZED}/{QUANTIZED_MANIFEST}"):
        if name not in hashes:
            problems[name] = f"is not listed in {CHECKSUMS}"
    return problems


def open_bundle(folder: Path) -> Bundle:
    """Open a finished bundle; its files are not hashed here. Raises InputError."""
    if not is_bundle(folder):
        unfinished = (folder / QUANTIZED).is_dir()
        raise InputError(
            folder,
            "is a bundle whose export did not finish" if unfinished else "is not a bundle",
            "Run the same mobilellm export again" if unfinished else "mobilellm export makes one",
        )
    _, foreign = tree(folder)
    if foreign:
        name, problem = next(iter(foreign.items()))
        raise InputError(folder / name, problem, "Export the bundle again")
    manifest = parse_section(
        BundleManifest,
        read_json(folder / MANIFEST),
        str(folder / MANIFEST),
        remedy="Export the bundle again",
    )
    if manifest.format_version != FORMAT_VERSION:
        raise InputError(
            f"{folder / MANIFEST}: format_version",
            f"{manifest.format_version} is not known",
            f"This version reads {FORMAT_VERSION}; export the bundle again",
        )
    targets = manifest.targets
    if not targets or not set(targets) <= set(backend_names()) or len(set(targets)) < len(targets):
        raise InputError(
            f"{folder / MANIFEST}: targets", f"{targets!r} is not a list of known targets"
        )
    return Bundle(
        path=folder,
        manifest=manifest,
        quantized=open_quantized(folder / QUANTIZED),
        artifacts={name: open_artifact(folder / name) for name in targets},
    )


def tree(folder: Path) -> tuple[set[str], dict[str, str]]:
    """The regular files below a folder except ``SHA256SUMS``, and what may not be in a bundle:
    name → what is wrong.

    Names are relative paths with forward slashes. No link is followed.
    """
    files, foreign = set[str](), dict[str, str]()
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISLNK(mode):
            foreign[name] = "is a link"
        elif stat.S_ISREG(mode):
            files.add(name)
        elif not stat.S_ISDIR(mode):
            foreign[name] = "is not a regular file"
        elif not any(path.iterdir()):
            foreign[name] = "is an empty folder"
    return files - {CHECKSUMS}, foreign


def read_checksums(folder: Path) -> dict[str, str]:
    """The hashes of ``SHA256SUMS``: name → SHA-256.

    Raises InputError for a malformed line, and unless each name follows the one before it, so that
    the same files have one list only.
    """
    path = folder / CHECKSUMS
    hashes = dict[str, str]()
    try:
        text = read_bytes(path, _CHECKSUMS_BYTES).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read ({error})", "Export the bundle again") from error
    for line in text.split("\n")[:-1]:
        digest, separator, name = line[:64], line[64:66], line[66:]
        if separator != "  " or not is_plain_name(name) or set(digest) - set("0123456789abcdef"):
            raise InputError(path, f"has the malformed line {line!r}", "Export the bundle again")
        if hashes and name <= next(reversed(hashes)):
            raise InputError(
                path, f"lists {name!r} twice or out of order", "Export the bundle again"
            )
        hashes[name] = digest
    if not hashes or not text.endswith("\n"):
        raise InputError(path, "is not complete", "Export the bundle again")
    return hashes
