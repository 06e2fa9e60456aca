"""Measurements of a bundle: what evaluate and profile write with ``-o``.

    mobilellm package build/nano --result nano.json -o nano.tar.zst

A measurement has the hashes of the files that were measured, so that it cannot be added to another
bundle.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices import instructions
from devices import report as profiles
from devices.errors import DeviceError
from exporter.backends import names as backend_names
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import is_of_model
from exporter.bundle.evaluation_schema import Evaluation
from exporter.bundle.manifest import BundleManifest
from exporter.errors import InputError, short
from exporter.foreign import read_json
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.settings import parse_section

#: The folder of the measurements in a bundle.
RESULTS = "results"
#: The largest file of a measurement, in bytes: raw samples of many devices.
RESULT_BYTES = 32 << 20
EVALUATION, PROFILE, INSTRUCTIONS = "evaluation", "profile", "instructions"


@dataclass(frozen=True)
class Result:
    """One measurement; `kind` is `EVALUATION`, `PROFILE` or `INSTRUCTIONS`. The last is a file of
    counts alone, as earlier versions wrote them."""

    kind: str
    content: Mapping[str, Any]

    def measured(self) -> Iterator[tuple[str | None, Mapping[str, str]]]:
        """What was measured: the target, None for the quantized checkpoint, and the SHA-256 of its
        files."""
        if self.kind == EVALUATION:
            yield self.content["target"], self.content["files"]
            return
        for counts in self.counts():
            yield counts["target"], counts["files"]
        if self.kind != PROFILE:
            return
        for session in self.content["sessions"]:
            artifact = session["artifact"]
            hashes = {name: entry["sha256"] for name, entry in artifact["files"].items()}
            yield artifact["format"], hashes

    def counts(self) -> list[Mapping[str, Any]]:
        """The counts in it, one for each artifact that was counted."""
        if self.kind == INSTRUCTIONS:
            return [self.content]
        return list(self.content.get("counts", [])) if self.kind == PROFILE else []


def read_result(path: Path) -> Result:
    """Read a measurement and check it against the schema of its kind. Raises InputError."""
    content = read_json(path, RESULT_BYTES)
    if "sessions" in content:
        with _schema_of(path):
            profiles.validate(content)
        return Result(PROFILE, content)
    if content.get("result") == EVALUATION:
        parse_section(Evaluation, content, str(path), remedy="Run mobilellm evaluate again")
        return Result(EVALUATION, content)
    if content.get("result") == INSTRUCTIONS:
        with _schema_of(path):
            instructions.validate(content)
        return Result(INSTRUCTIONS, content)
    raise InputError(
        path,
        f"is not a measurement (result: {short(content.get('result'))})",
        "Give a file that mobilellm evaluate or profile wrote with -o",
    )


@contextmanager
def _schema_of(path: Path) -> Iterator[None]:
    """Give the errors of a schema the name of the file."""
    try:
        yield
    except DeviceError as error:
        raise InputError(f"{path}: {error.subject}", error.problem, error.remedy) from error


def check_belongs(result: Result, manifest: BundleManifest, subject: object) -> None:
    """Raise InputError unless every file that was measured is in the bundle as it was.

    A measurement names every file of the model, and an evaluation also the others of its folder but
    the manifest there: a model with the tokenizer of another one would agree in some of them.
    """
    for target, hashes in result.measured():
        if target is not None and target not in {*manifest.targets} & {*backend_names()}:
            raise InputError(subject, f"measured {short(target)}, which the bundle does not have")
        folder = target or "quantized"
        for name, found in hashes.items():
            entry = manifest.files.get(f"{folder}/{name}")
            if entry is None or entry.sha256 != found:
                raise InputError(
                    subject,
                    f"measured another {folder}/{name} than that of the bundle",
                    "Measure this bundle again",
                )
        whole = result.kind == EVALUATION
        held = [
            path.removeprefix(f"{folder}/")
            for path in manifest.files
            if path.startswith(f"{folder}/")
        ]
        for name in held:
            if name in (ARTIFACT_MANIFEST, QUANTIZED_MANIFEST) or name in hashes:
                continue
            if whole or (target is not None and is_of_model(name, held, target)):
                path = f"{folder}/{name}"
                raise InputError(subject, f"does not name {path}", "Measure this bundle again")
