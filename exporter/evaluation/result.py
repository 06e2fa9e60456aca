"""The evaluation result: what `mobilellm evaluate -o FILE` writes, for bundles, gates and reports.

    mobilellm evaluate build/nano --data FILE --reference CHECKPOINT -o build/nano-quality.json

It names what was measured by hashes. It has no path, no time and no duration, so the same
measurement gives the same bytes on one machine.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.files import check_replaceable
from exporter.backends import front
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.results import EVALUATION
from exporter.errors import InputError
from exporter.files import check_writable, package_versions, read_json, sha256
from exporter.foreign import is_plain_name
from exporter.inference.loaded_model import LoadedModel, file_hashes

#: The version of `exporter.bundle.evaluation_schema`.
SCHEMA_VERSION = 1
_OTHER_FILE = "Give another file; nothing was changed"


@dataclass(frozen=True)
class Inputs:
    """What is measured, and on what; `settings` are the options that change figures."""

    model: LoadedModel
    reference: LoadedModel | None
    data: Path | None
    task: Path | None
    settings: Mapping[str, Any]


def result_identity(inputs: Inputs) -> dict[str, Any]:
    """The content of the file but for `figures`. It reads every file of a float checkpoint."""
    source = inputs.model.source
    target = source.artifact.target if isinstance(source, FinishedArtifact) else None
    packages = front(target.target).packages(target) if target else ()
    return {
        "result": EVALUATION,
        "schema_version": SCHEMA_VERSION,
        "target": target.target if target else None,
        "files": file_hashes(inputs.model),
        "data": _named(inputs.data),
        "task": _named(inputs.task),
        "reference": file_hashes(inputs.reference) if inputs.reference else None,
        "settings": dict(inputs.settings),
        "versions": package_versions("mobilellm-exporter", "torch", "tokenizers", *packages),
    }


def evaluation_result(identity: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file. An infinite figure, which JSON does not have, is None, and the
    answers of a task are left out: `correct` has what a comparison needs."""
    kept = {name: value for name, value in figures.items() if name != "attempts"}
    return {**identity, "figures": _finite(kept)}


def check_output(out: Path, source: str) -> None:
    """Raise InputError unless the file can be written: it is new or an earlier evaluation result,
    its folder can be written, and it is not inside the folder that is measured."""
    folder = Path(os.path.realpath(out.parent))
    if Path(source).is_dir() and folder.is_relative_to(os.path.realpath(source)):
        raise InputError(out, f"lies inside the model that is measured ({source})", _OTHER_FILE)
    check_writable(out.parent)
    try:
        check_replaceable(out)
    except OSError as error:
        raise InputError(out, f"cannot be written ({error.strerror})", _OTHER_FILE) from error
    if os.path.lexists(out):
        try:
            kind = read_json(out).get("result")
        except InputError:
            kind = None
        if kind != EVALUATION:
            raise InputError(out, "exists and is no evaluation result", _OTHER_FILE)


def _named(path: Path | None) -> dict[str, str] | None:
    """The name and hash of a data file. Raises InputError for a name that no manifest can have."""
    if path is None:
        return None
    if not is_plain_name(path.name):
        raise InputError(path, "has a name that a result cannot hold", "Rename it")
    return {"file": path.name, "sha256": sha256(path)}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
