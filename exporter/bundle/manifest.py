"""``manifest.json``: what a bundle holds, what it was made from, and how each weight is stored."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from exporter.bundle.licence import Licence, effective
from exporter.errors import InputError
from exporter.files import read_json, sha256
from exporter.foreign import is_plain_name
from exporter.model.licence import LICENCE_FILES, LicenceTerms
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, weight_bytes
from exporter.settings import FileHashes, Section, Sha256, parse_section, refusal

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
#: The fields that decide all others.
IDENTITY = ("format_version", "recipe", "source", "targets", "versions")
_REMEDY = "Export the bundle again"


class FileEntry(Section):
    """The SHA-256 and the size in bytes of one file."""

    sha256: Sha256
    bytes: int


def file_entry(path: Path) -> FileEntry:
    """The entry of a file on disk."""
    return FileEntry(sha256=sha256(path), bytes=path.stat().st_size)


def entry_of(content: bytes) -> FileEntry:
    """The entry of a file with this content."""
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


class WeightEntry(Section):
    """How one weight is stored: its scheme, shape and bytes in the quantized checkpoint; `reason`
    says why it is left in float."""

    scheme: str
    shape: list[int]
    bytes: int
    reason: str = ""


class ModelSummary(Section):
    """The size of the model; `context` is the longest text that the checkpoint is made for."""

    model_type: str
    parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    context: int
    tied: bool


def _check_names(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    for name in files:
        if not is_plain_name(name):
            raise refusal(f"{name!r} is not the plain name of a file inside this folder")
    return files


class BundleManifest(Section):
    """The content of ``manifest.json``.

    `recipe` is the validated recipe, `source` has the hashes of the checkpoint's files, and
    `calibration` is that of the quantized checkpoint. `versions` are those of packages. `files`
    has every file of the bundle but the manifest itself, ``SHA256SUMS`` and the signatures.
    """

    format_version: int
    recipe: dict[str, Any]
    source: FileHashes
    model: ModelSummary
    licence: Licence | None
    calibration: dict[str, Any] | None
    seeds: dict[str, int]
    targets: list[str]
    versions: dict[str, str]
    weights: dict[str, WeightEntry]
    files: Annotated[dict[str, FileEntry], AfterValidator(_check_names)]

    def bits_per_weight(self) -> float:
        """The mean bits of a weight in the quantized checkpoint, scales included."""
        stored = sum(weight.bytes for weight in self.weights.values())
        return 8 * stored / self.model.parameters


def bundle_identity(
    recipe: Mapping[str, Any], quantized: Mapping[str, Any], artifacts: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of the manifest that is known before anything is written: it decides all the rest.

    `quantized` is the identity of the quantized checkpoint; `artifacts` maps target → package
    versions.
    """
    return {
        "format_version": FORMAT_VERSION,
        "recipe": dict(recipe),
        "source": quantized["source"],
        "targets": list(artifacts),
        "versions": quantized["versions"]
        | {k: v for a in artifacts.values() for k, v in a.items()},
    }


def bundle_manifest(
    identity: Mapping[str, Any], quantized: QuantizedCheckpoint, files: Mapping[str, FileEntry]
) -> BundleManifest:
    """The manifest of a bundle with this identity (`bundle_identity`) and these files. Raises
    InputError for a quantized checkpoint whose own manifest has wrong types."""
    config, calibration = quantized.config, quantized.manifest.get("calibration")
    weights = _weights(quantized)
    content = {
        **identity,
        "model": ModelSummary(
            model_type=config.model_type,
            parameters=sum(math.prod(weight.shape) for weight in weights.values()),
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            context=config.max_position_embeddings,
            tied=config.tie_word_embeddings,
        ),
        "licence": _licence(identity["recipe"], quantized),
        "calibration": calibration,
        "seeds": {} if calibration is None else {"calibration": calibration.get("seed")},
        "weights": weights,
        "files": dict(files),
    }
    return parse_section(BundleManifest, content, MANIFEST)


def _licence(recipe: Mapping[str, Any], quantized: QuantizedCheckpoint) -> Licence | None:
    """The licence of the checkpoint, or else that of the recipe."""
    given = recipe.get("license")
    terms = parse_section(LicenceTerms, given, "recipe", "license") if given else None
    held = [name for name in LICENCE_FILES if name in quantized.manifest["files"]]
    return effective(quantized.licence, terms, held)


def _weights(quantized: QuantizedCheckpoint) -> dict[str, WeightEntry]:
    """The stored form of every weight."""
    sizes, entries = weight_bytes(quantized), quantized.manifest["tensors"]
    return {
        name: WeightEntry(
            scheme=str(quantized.schemes[name]),
            shape=list(shape),
            bytes=sizes[name],
            reason=entries[name].get("reason", ""),
        )
        for name, shape in quantized.config.parameter_shapes().items()
    }


def read_manifest(folder: Path) -> BundleManifest:
    """The manifest of a bundle. Raises InputError."""
    path = folder / MANIFEST
    content = read_json(path)
    if content.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version",
            f"{content.get('format_version')!r} is not known",
            f"This version reads {FORMAT_VERSION}; export the bundle again",
        )
    return parse_section(BundleManifest, content, str(path), remedy=_REMEDY)
