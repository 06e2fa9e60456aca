"""Verifications as stages: what passed for these very files is found again, not repeated."""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import FinishedArtifact, artifact_versions
from exporter.files import package_versions, sha256
from exporter.progress import Progress
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.settings import Section, parse_section
from exporter.stages import MADE, Stages
from exporter.verification.checks import Check, check_quantized
from exporter.verification.models import check_artifacts
from exporter.verification.runs import Runs, Text


class _Passed(Section):
    """A check that passed; no other is kept."""

    check: str
    target: str | None
    subject: str
    value: float
    limit: float | None
    note: str


class _Record(Section):
    """What is kept of a verification."""

    checks: list[_Passed]


def check_or_find(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    runs: Runs,
    stages: Stages,
    progress: Progress,
) -> list[Check]:
    """The checks of `check_quantized`, then those of `check_artifacts`.

    The quantized checkpoint and each artifact are one stage each, which is kept if all of its
    checks passed. An artifact that could not be run was not verified, so it is not kept.
    """
    identities, targets = verifications(quantized, artifacts, texts), (None, *artifacts)
    checks, missing = dict[str | None, list[Check]](), list[str | None]()
    for target in targets:
        stage = _stage(target)
        record = stages.recall(stage, identities[stage])
        if record is None:
            missing.append(target)
        else:
            kept = parse_section(_Record, record, stage).checks
            checks[target] = [Check(passed=True, **check.model_dump()) for check in kept]
    if None in missing:
        checks[None] = check_quantized(quantized)
    left = {target: finished for target, finished in artifacts.items() if target in missing}
    made = check_artifacts(quantized, left, texts, runs, progress)
    for target in left:
        checks[target] = [check for check in made if check.target == target]
    for target in missing:
        stage = _stage(target)
        stages.results[stage] = MADE
        if all(check.passed and check.value is not None for check in checks[target]):
            record = {"checks": [_passed(check) for check in checks[target]]}
            stages.note(stage, identities[stage], record)
    return [check for target in targets for check in checks[target]]


def verifications(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
) -> dict[str, dict[str, Any]]:
    """The stages that verify a bundle: name → identity."""
    return {_stage(None): _quantized_identity(quantized)} | {
        _stage(target): _artifact_identity(finished, texts[target])
        for target, finished in artifacts.items()
    }


def _stage(target: str | None) -> str:
    """The stage that verifies an artifact; without a target, the quantized checkpoint."""
    return f"verify {target or 'quantized'}"


def _quantized_identity(quantized: QuantizedCheckpoint) -> dict[str, Any]:
    return {
        "quantized": sha256(quantized.path / QUANTIZED_MANIFEST),
        "versions": package_versions("mobilellm-exporter", "torch", "safetensors"),
    }


def _artifact_identity(finished: FinishedArtifact, text: Text) -> dict[str, Any]:
    """What a verification depends on. A runtime has other kernels on another kind of machine."""
    artifact = finished.artifact
    return {
        "artifact": sha256(artifact.path / ARTIFACT_MANIFEST),
        "text": asdict(text) | {"tokens": list(text.tokens)},
        "machine": [platform.system(), platform.machine()],
        "versions": package_versions("torch", "numpy") | artifact_versions(artifact.target),
    }


def _passed(check: Check) -> dict[str, Any]:
    """A check that passed as JSON-compatible data; its value may be an integer or a bool."""
    assert check.value is not None  # else the stage is not kept
    content = asdict(check) | {"value": float(check.value)}
    del content["passed"]
    return content
