"""A bundle: one quantized checkpoint, its artifacts, documents, and the hashes of every file.

    BUNDLE/quantized/      the quantized checkpoint
    BUNDLE/TARGET/         one folder for each target: what is deployed to the phone
    BUNDLE/results/        measurements, added by `mobilellm package`
    BUNDLE/manifest.json   what is in the bundle and what it was made from; more documents beside it
    BUNDLE/SHA256SUMS      the hashes of all files above (for `sha256sum -c`); written last
    BUNDLE/model.sig       a signature over all files above; optional

Two exports of the same recipe are byte-identical. Measurements are inputs of `mobilellm package`.
"""

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.backends import names as backend_names
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.documents import DOCUMENTS, documents
from exporter.bundle.manifest import (
    MANIFEST,
    BundleManifest,
    bundle_manifest,
    entry_of,
    file_entry,
    read_manifest,
)
from exporter.bundle.results import RESULTS, check_belongs, read_result
from exporter.errors import InputError
from exporter.files import (
    Output,
    differing_files,
    json_bytes,
    made_from,
    read_json,
    replacing,
    sha256,
)
from exporter.foreign import COMPANION_BYTES, is_plain_name, read_bytes
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized

CHECKSUMS, QUANTIZED = "SHA256SUMS", "quantized"
#: Files that ``SHA256SUMS`` does not list: they are made over all others.
SIGNATURES = ("model.sig", "provenance.dsse.json")
#: The largest ``SHA256SUMS``, in bytes: ten thousand lines.
_CHECKSUMS_BYTES = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A finished bundle; `artifacts` maps target → artifact."""

    path: Path
    manifest: BundleManifest
    quantized: QuantizedCheckpoint
    artifacts: Mapping[str, FinishedArtifact]


def bundle_output() -> Output:
    """The names of the files and folders that an export writes."""
    others = (MANIFEST, *DOCUMENTS, RESULTS, *SIGNATURES, *backend_names())
    return Output(QUANTIZED, CHECKSUMS, others)


def write_bundle(
    folder: Path,
    identity: Mapping[str, Any],
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
) -> None:
    """Make a finished bundle of a folder with the quantized checkpoint, the artifacts and the
    measurements: write what is derived from them, then ``SHA256SUMS``.

    `identity` is that of `bundle_identity`. Raises InputError for a measurement of other files.
    """
    for name in SIGNATURES:
        (folder / name).unlink(missing_ok=True)
    names = [f"{QUANTIZED}/{QUANTIZED_MANIFEST}"]
    names += [f"{QUANTIZED}/{name}" for name in quantized.manifest["files"]]
    for target, finished in artifacts.items():
        names += [f"{target}/{ARTIFACT_MANIFEST}"]
        names += [f"{target}/{name}" for name in finished.manifest["files"]]
    names += [f"{RESULTS}/{path.name}" for path in (folder / RESULTS).glob("*")]
    files = {name: file_entry(folder / name) for name in sorted(names)}
    derived = derived_files(folder, bundle_manifest(identity, quantized, files))
    for name, content in derived.items():
        with replacing(folder / name) as file:
            file.write(content)
    hashes = {name: entry.sha256 for name, entry in files.items()}
    hashes |= {name: sha256(folder / name) for name in derived}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.items())]
    with replacing(folder / CHECKSUMS) as file:
        file.write("".join(lines).encode())


def derived_files(folder: Path, manifest: BundleManifest) -> dict[str, bytes]:
    """The files that are derived from all others: name → content, ``manifest.json`` last.

    `manifest` is that of the other files; the measurements are read from the folder.
    """
    measured = [name for name in manifest.files if name.startswith(f"{RESULTS}/")]
    results = {name: read_result(folder / name) for name in measured}
    for name, result in results.items():
        check_belongs(result, manifest, folder / name)
    licence = manifest.licence.files if manifest.licence else []
    derived = {name: read_bytes(folder / QUANTIZED / name, COMPANION_BYTES) for name in licence}
    manifest = _with_files(manifest, derived)
    derived |= documents(manifest, results)
    whole = _with_files(manifest, derived)
    return {**derived, MANIFEST: json_bytes(whole.model_dump(mode="json"))}


def _with_files(manifest: BundleManifest, contents: Mapping[str, bytes]) -> BundleManifest:
    """The manifest that lists these files too."""
    entries = {name: entry_of(content) for name, content in contents.items()}
    files = dict(sorted({**manifest.files, **entries}.items()))
    return manifest.model_copy(update={"files": files})


def is_bundle(folder: Path) -> bool:
    """Whether the folder is a finished bundle; its files are not checked."""
    checksums = folder / CHECKSUMS
    return checksums.is_file() and not checksums.is_symlink()


def is_bundle_of(folder: Path, identity: Mapping[str, Any], quantized: Mapping[str, Any]) -> bool:
    """Whether ``manifest.json`` in the folder has this identity; if it is missing or damaged,
    whether the quantized checkpoint has the identity `quantized`."""
    try:
        content = read_json(folder / MANIFEST)
    except InputError:
        return made_from(folder / QUANTIZED / QUANTIZED_MANIFEST, quantized)
    return {key: content.get(key) for key in identity} == identity


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
    manifest = read_manifest(folder)
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
    """The regular files below a folder except ``SHA256SUMS`` and signatures, and what may not be in
    a bundle: name → what is wrong.

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
    return files - {CHECKSUMS, *SIGNATURES}, foreign


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
