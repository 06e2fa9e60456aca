"""Change a bundle and write every checksum anew, as somebody does who has write access to it."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.bundle.bundle import CHECKSUMS, derived_files
from exporter.bundle.documents import DOCUMENTS
from exporter.bundle.manifest import MANIFEST, read_manifest
from exporter.errors import InputError
from exporter.files import json_bytes, sha256
from exporter.model.checkpoint import COMPANION_FILES


def reseal(bundle: Path, kept: Path | None = None) -> None:
    """Write the hashes of every manifest and of ``SHA256SUMS`` anew, and derive the documents anew.

    The manifest or document `kept` is left as it is, and so is a manifest that is no JSON object.
    """
    quantized = bundle / "quantized" / "quantization.json"
    if quantized != kept:
        with edited(quantized) as manifest:
            _renew(manifest.get("files"), bundle / "quantized")
            _renew(manifest.get("source"), bundle / "quantized", COMPANION_FILES)
    for path in sorted(bundle.glob("*/artifact.json")):
        if path != kept:
            with edited(path) as manifest:
                _renew(manifest.get("files"), path.parent)
                if "quantized" in manifest and quantized.is_file():
                    manifest["quantized"] = sha256(quantized)
    if bundle / "manifest.json" != kept:
        with edited(bundle / "manifest.json") as manifest:
            _renew(manifest.get("source"), bundle / "quantized", COMPANION_FILES)
            _renew_entries(manifest.get("files"), bundle)
        _renew_documents(bundle, kept)
    names = sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != CHECKSUMS
    )
    lines = [f"{sha256(bundle / name)}  {name}\n" for name in names]
    (bundle / CHECKSUMS).write_text("".join(lines))


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file, which is written again as this tool writes it. Nothing is written
    if the file holds no object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        yield {}
        return
    before = json.dumps(content)
    yield content
    if json.dumps(content) != before:
        path.write_bytes(json_bytes(content))


def _renew_documents(bundle: Path, kept: Path | None) -> None:
    """Derive every document anew, if they can be derived from what is there."""
    try:
        manifest = read_manifest(bundle)
        files = {n: entry for n, entry in manifest.files.items() if n not in DOCUMENTS}
        derived = derived_files(bundle, manifest.model_copy(update={"files": files}))
    except InputError:
        return
    for name, content in derived.items():
        if bundle / name != kept:
            (bundle / name).write_bytes(content)
    with edited(bundle / MANIFEST) as written:
        _renew_entries(written["files"], bundle)


def _renew_entries(files: object, bundle: Path) -> None:
    """Write the hash and the size of each listed file anew."""
    for name, entry in files.items() if isinstance(files, dict) else ():
        path = bundle / name
        if isinstance(entry, dict) and ".." not in path.parts and path.is_file():
            entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}


def _renew(hashes: object, folder: Path, names: Collection[str] | None = None) -> None:
    """Write the hashes of the listed files anew, or of those in `names` only."""
    if isinstance(hashes, dict):
        for name in hashes:
            path = folder / name
            if (names is None or name in names) and ".." not in path.parts and path.is_file():
                hashes[name] = sha256(path)
