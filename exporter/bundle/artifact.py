"""An artifact's folder: the lowered model, its tokenizer files, and its manifest.

    mobilellm lower build/nano-int4 --target NAME -o build/nano-lowered

The folder is what is deployed to the phone. ``artifact.json`` is written last.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.backends import Artifact, Target, backend, front, parse_target
from exporter.errors import InputError
from exporter.files import (
    Output,
    copy_file,
    is_finished,
    package_versions,
    read_json,
    sha256,
    write_json,
)
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import FLOAT
from exporter.settings import FileHashes, Section, parse_section
from exporter.text.tokenizer import TOKENIZER_FILES

MANIFEST = "artifact.json"
FORMAT_VERSION = 1
#: Files that are copied next to the model: the tokenizer, and the end-of-text ids.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")


class ArtifactManifest(Section):
    """The fields of ``artifact.json``; `artifact_identity` describes them. `files` has the SHA-256
    of each file of the folder."""

    format_version: int
    target: dict[str, Any]
    quantized: str
    bos_token_id: int | None
    eos_token_ids: list[int]
    float_weights: dict[str, str]
    versions: dict[str, str]
    files: FileHashes


@dataclass(frozen=True)
class FinishedArtifact:
    """An artifact and its manifest."""

    artifact: Artifact
    manifest: Mapping[str, Any]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that end a text."""
        return tuple(self.manifest["eos_token_ids"])


def artifact_output(target: Target) -> Output:
    """The names of the files and folders that lowering to this target writes."""
    files = front(target.target).FILES
    names = [Path(file).parts[0] for file in files]  # the first part may be a folder (.mlpackage)
    return Output(names[0], MANIFEST, (*names, *COMPANIONS))


def is_of_model(name: str, files: Collection[str], target: str) -> bool:
    """Whether one of an artifact's `files` is part of the model: the file that a runtime opens, a
    file in the folder of that name, or its external data. Tokenizer files are not."""
    main = front(target).main_file(files)
    return name == main or name.startswith((f"{main}/", f"{main}.", f"{main}_"))


def artifact_identity(quantized: QuantizedCheckpoint, target: Target) -> dict[str, Any]:
    """Everything that decides the bytes of an artifact, for its manifest."""
    return {
        "format_version": FORMAT_VERSION,
        "target": target.model_dump(mode="json"),
        "quantized": sha256(quantized.path / QUANTIZED_MANIFEST),
        "bos_token_id": quantized.bos_token_id,
        "eos_token_ids": list(quantized.eos_token_ids),
        "float_weights": {
            name: quantized.manifest["tensors"][name]["reason"]
            for name, scheme in quantized.schemes.items()
            if scheme == FLOAT
        },
        "versions": artifact_versions(target),
    }


def artifact_versions(target: Target) -> dict[str, str]:
    """The versions of the packages that write this artifact."""
    return package_versions("mobilellm-exporter", *front(target.target).packages(target))


def write_artifact(
    quantized: QuantizedCheckpoint, target: Target, identity: Mapping[str, Any], out: Path
) -> FinishedArtifact:
    """Lower into `out`; a complete artifact of the same identity is opened instead."""
    if is_finished(out / MANIFEST, identity):
        return open_artifact(out)
    (out / MANIFEST).unlink(missing_ok=True)
    module = backend(target.target)
    written = list(module.lower(quantized, target, out).files)
    for name in COMPANIONS:
        if name not in written and (quantized.path / name).is_file():
            copy_file(quantized.path / name, out / name)
            written.append(name)
    for name in {*module.FILES, *COMPANIONS}.difference(written):
        (out / name).unlink(missing_ok=True)
    hashes = {name: sha256(out / name) for name in written}
    write_json(out / MANIFEST, {**identity, "files": hashes})
    return open_artifact(out)


def open_artifact(path: Path) -> FinishedArtifact:
    """Open an artifact by its folder or by a file in it. Raises InputError."""
    above = (path.parent, path.parent.parent)  # a format may have a folder of its own for the model
    default = path.parent if path.is_file() else path
    folder = next((one for one in above if (one / MANIFEST).is_file()), default)
    manifest = read_json(folder / MANIFEST)
    subject = folder / MANIFEST
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{subject}: format_version",
            f"{manifest.get('format_version')!r} is not known",
            f"This version reads {FORMAT_VERSION}; lower the model again",
        )
    checked = parse_section(
        ArtifactManifest, manifest, str(subject), remedy="Lower the model again"
    )
    target = parse_target(checked.target, str(subject))
    return FinishedArtifact(Artifact(folder, target, tuple(checked.files)), manifest)
