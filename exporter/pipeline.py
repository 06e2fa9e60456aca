"""The pipeline: checkpoint → quantized checkpoint → artifacts → verification → bundle."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter.backends import Target, backend, parse_target
from exporter.backends import names as backend_names
from exporter.bundle.archive import opened
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import (
    FinishedArtifact,
    artifact_identity,
    artifact_output,
    artifact_versions,
    open_artifact,
    write_artifact,
)
from exporter.bundle.bundle import (
    CHECKSUMS,
    Bundle,
    bundle_output,
    file_problems,
    is_bundle,
    is_bundle_of,
    open_bundle,
    write_bundle,
)
from exporter.bundle.bundle import QUANTIZED as BUNDLE_QUANTIZED
from exporter.bundle.manifest import MANIFEST as BUNDLE_MANIFEST
from exporter.bundle.manifest import bundle_identity
from exporter.bundle.signature import Signer
from exporter.calibration.quantize import (
    QuantizationInputs,
    join_distillation,
    quantization_inputs,
    quantization_plan,
    quantize_checkpoint,
)
from exporter.calibration.torchrun import joined_processes
from exporter.derivation.artifacts import check_derived
from exporter.derivation.manifests import bundle_recipe, check_manifests, check_quantized_manifest
from exporter.derivation.source import check_source
from exporter.errors import InputError
from exporter.files import check_apart, check_folder, claim_folder, made_from, may_be_made_from
from exporter.model.checkpoint import Checkpoint
from exporter.progress import Progress, TensorCounter, no_progress
from exporter.quantization.dequantized import OUTPUT as DEQUANTIZED_OUTPUT
from exporter.quantization.dequantized import check_family, write_dequantized
from exporter.quantization.plan import QuantizationPlan
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import (
    QUANTIZED_OUTPUT,
    QuantizedCheckpoint,
    open_quantized,
    quantized_identity,
    require_whole,
    source_hashes,
)
from exporter.recipe import Recipe
from exporter.stages import Stages
from exporter.verification.checks import (
    Check,
    check_bundle_files,
    check_quantized,
    check_quantized_files,
    check_signature,
)
from exporter.verification.kept import check_or_find, verifications
from exporter.verification.models import check_artifacts
from exporter.verification.runs import (
    Text,
    run_artifact,
    running,
    runs_everywhere,
    verification_text,
)


@dataclass(frozen=True)
class DequantizedFolder:
    """Where to write a Hugging Face folder of the dequantized weights, their type, and the family
    of the equivalent model to write, by default the model's own."""

    path: Path
    dtype: torch.dtype
    family: str | None = None


def quantize(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path,
    progress: Progress,
    overwrite: bool = False,
    dequantized: DequantizedFolder | None = None,
) -> QuantizedCheckpoint | None:
    """Checkpoint → quantized checkpoint, and optionally a Hugging Face folder of its weights.

    With ``torchrun`` all processes take part in the distillation, the first one writes, and the
    others return None. Raises InputError.
    """
    for written in (out, *([dequantized.path] if dequantized else [])):
        check_apart(written, checkpoint.path)
    if dequantized:
        check_family(checkpoint.config, dequantized.family)
    plan = quantization_plan(recipe.quantization, checkpoint)
    source = source_hashes(checkpoint)
    identity = quantized_identity(checkpoint, plan, source)
    known = {key: identity[key] for key in ("source", "method", "versions")}
    same = may_be_made_from(out / QUANTIZED_MANIFEST, known)
    check_folder(out, QUANTIZED_OUTPUT, same, overwrite)
    checkpoint.check_weights()
    with joined_processes() as first:
        inputs = quantization_inputs(
            recipe.quantization,
            recipe.calibration,
            checkpoint,
            plan,
            source,
            progress if first else no_progress,
        )
        if not first:
            join_distillation(checkpoint, inputs, out)
            return None
        return _write_quantized(checkpoint, inputs, out, progress, overwrite, dequantized)


def _write_quantized(
    checkpoint: Checkpoint,
    inputs: QuantizationInputs,
    out: Path,
    progress: Progress,
    overwrite: bool,
    dequantized: DequantizedFolder | None,
) -> QuantizedCheckpoint:
    same = made_from(out / QUANTIZED_MANIFEST, inputs.identity)
    if dequantized:
        check_folder(dequantized.path, DEQUANTIZED_OUTPUT, False, overwrite)
    with claim_folder(out, QUANTIZED_OUTPUT, same, overwrite):
        quantized = quantize_checkpoint(checkpoint, inputs, out, progress)
    if dequantized:
        with claim_folder(dequantized.path, DEQUANTIZED_OUTPUT, False, overwrite):
            counter = TensorCounter(progress, "dequantize", len(quantized.schemes))
            write_dequantized(
                quantized, dequantized.dtype, dequantized.path, counter, dequantized.family
            )
    return quantized


def lower(
    quantized: QuantizedCheckpoint,
    target: Target,
    out: Path,
    progress: Progress,
    overwrite: bool = False,
) -> FinishedArtifact:
    """Quantized checkpoint → one artifact in `out`. Raises InputError."""
    check_apart(out, quantized.path)
    backend(target.target).check(quantized.config, quantized.schemes, target)
    backend(target.target).check_folder(quantized.path, target)
    require_whole(quantized)
    identity = artifact_identity(quantized, target)
    same = made_from(out / ARTIFACT_MANIFEST, identity)
    with claim_folder(out, artifact_output(target), same, overwrite):
        return _lower(quantized, target, identity, out, progress)


def _lower(
    quantized: QuantizedCheckpoint,
    target: Target,
    identity: dict[str, Any],
    out: Path,
    progress: Progress,
) -> FinishedArtifact:
    progress(f"lower {target.target}", 0, 1)
    finished = write_artifact(quantized, target, identity, out)
    progress(f"lower {target.target}", 1, 1)
    return finished


@dataclass(frozen=True)
class Export:
    """The results of an export; `bundle` is None if a check failed, and then the folder is not a
    finished bundle. `stages` says what happened to each stage."""

    bundle: Bundle | None
    quantized: QuantizedCheckpoint
    artifacts: Mapping[str, FinishedArtifact]
    checks: list[Check]
    stages: Stages


def export(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    text: Path | None = None,
    store: Path | None = None,
) -> Export:
    """Checkpoint → verified bundle. A stage that is already finished is not repeated.

    A finished stage is found in the output folder or in the folder `store`, where this run's are
    kept. A finished bundle was verified before its last file was written: its files are hashed, and
    nothing else is done, unless there is a `text`, or a format whose runtime may have been missing.
    `text` is a file to verify on, by default the built-in sample text. Raises InputError.
    """
    check_apart(out, checkpoint.path)
    stages = Stages(store, progress)
    stages.check(out)
    plan = quantization_plan(recipe.quantization, checkpoint)
    _check_targets(recipe, checkpoint, plan)
    for target in recipe.targets:
        backend(target.target).check_folder(checkpoint.path, target)
    texts: dict[str, Text] = {
        target.target: verification_text(checkpoint, target.max_context, text)
        for target in recipe.targets
    }
    checkpoint.check_weights()
    may_be_same = may_be_made_from(out / BUNDLE_MANIFEST, {"recipe": recipe.to_dict()})
    check_folder(out, bundle_output(), may_be_same, overwrite)
    source = source_hashes(checkpoint)
    inputs = quantization_inputs(
        recipe.quantization, recipe.calibration, checkpoint, plan, source, progress
    )
    _check_targets(recipe, checkpoint, inputs.plan)  # again: a budget changes schemes to int8
    packages: dict[str, dict[str, str]] = {
        target.target: artifact_versions(target) for target in recipe.targets
    }
    identity = bundle_identity(recipe.to_dict(), inputs.identity, packages)
    same = is_bundle_of(out, identity, inputs.identity) and may_be_made_from(
        out / BUNDLE_QUANTIZED / QUANTIZED_MANIFEST, inputs.identity
    )
    with claim_folder(out, bundle_output(), same, overwrite):
        if same and text is None and all(map(runs_everywhere, packages)):
            unchanged = _unchanged(out, recipe, inputs, texts, stages)
            if unchanged:
                return unchanged
        # Folders left by an unfinished run with other targets.
        for other in set(backend_names()) - packages.keys():
            shutil.rmtree(out / other, ignore_errors=True)
        quantized = stages.run(
            "quantize",
            inputs.identity,
            out / BUNDLE_QUANTIZED / QUANTIZED_MANIFEST,
            partial(quantize_checkpoint, checkpoint, inputs, out / BUNDLE_QUANTIZED, progress),
            open_quantized,
        )
        artifacts = dict[str, FinishedArtifact]()
        for target in recipe.targets:
            lowered, folder = artifact_identity(quantized, target), out / target.target
            artifacts[target.target] = stages.run(
                f"lower {target.target}",
                lowered,
                folder / ARTIFACT_MANIFEST,
                partial(_lower, quantized, target, lowered, folder, progress),
                open_artifact,
            )
        # In this process: the artifacts are our own, and their toolkits are loaded.
        runs = {
            target: partial(run_artifact, finished.artifact, texts[target])
            for target, finished in artifacts.items()
        }
        checks = check_or_find(quantized, artifacts, texts, runs, stages, progress)
        if not all(check.passed for check in checks):
            return Export(None, quantized, artifacts, checks, stages)
        if not is_bundle(out) or file_problems(out):
            write_bundle(out, identity, quantized, artifacts)
        return Export(open_bundle(out), quantized, artifacts, checks, stages)


def _unchanged(
    out: Path,
    recipe: Recipe,
    inputs: QuantizationInputs,
    texts: Mapping[str, Text],
    stages: Stages,
) -> Export | None:
    """The finished bundle in `out`, if every file is whole and every part has the same inputs."""
    if not is_bundle(out) or not made_from(
        out / BUNDLE_QUANTIZED / QUANTIZED_MANIFEST, inputs.identity
    ):
        return None
    checks = check_bundle_files(out)
    if not all(check.passed for check in checks):
        return None
    bundle, lowered = open_bundle(out), dict[str, dict[str, Any]]()
    for target in recipe.targets:
        identity = artifact_identity(bundle.quantized, target)
        if not made_from(out / target.target / ARTIFACT_MANIFEST, identity):
            return None
        lowered[f"lower {target.target}"] = identity
    verified = verifications(bundle.quantized, bundle.artifacts, texts)
    stages.unchanged({"quantize": inputs.identity, **lowered, **verified})
    return Export(bundle, bundle.quantized, bundle.artifacts, checks, stages)


def _check_targets(recipe: Recipe, checkpoint: Checkpoint, plan: QuantizationPlan) -> None:
    """Check that every target can store the model. Raises InputError."""
    for target in recipe.targets:
        backend(target.target).check(checkpoint.config, plan.schemes, target)


def with_targets(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with the named targets only, or unchanged without names. A target that the recipe
    does not have is added, with its default options and the recipe's context. Raises InputError."""
    held = {target.target: target for target in recipe.targets}
    context = recipe.targets[0].max_context
    for name in names:
        if name not in held:
            held[name] = parse_target({"target": name, "max_context": context}, f"--target {name}")
    chosen = tuple(target for name, target in held.items() if name in names)
    return recipe.model_copy(update={"targets": chosen}) if names else recipe


def verify(
    path: Path,
    progress: Progress,
    text: Path | None = None,
    *,
    source: Checkpoint | None = None,
    quick: bool = False,
    signer: Signer | None = None,
) -> list[Check]:
    """All checks of a finished bundle, as a folder or an archive, or of a quantized checkpoint.

    With `source`, the quantized checkpoint is compared with the checkpoint that it was made from.
    With `quick`, artifacts are not derived again. With `signer`, the bundle must be signed by it.
    Raises InputError for a path that is neither.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(opened(path, partial(progress, "unpack")))
        except InputError as error:
            if not path.is_file():
                raise
            return [Check("archive", None, error.subject, False, 1, 0, error.problem)]
        checks = _verify(folder, progress, text, source, quick, signer)
        return checks if folder == path else [_with_path(check, folder, path) for check in checks]


def _with_path(check: Check, folder: Path, path: Path) -> Check:
    """The same check with the name of the archive instead of the folder that it was unpacked to."""
    subject, note = (text.replace(str(folder), str(path)) for text in (check.subject, check.note))
    return replace(check, subject=subject, note=note)


def _verify(
    path: Path,
    progress: Progress,
    text: Path | None,
    source: Checkpoint | None,
    quick: bool,
    signer: Signer | None,
) -> list[Check]:
    if (path / QUANTIZED_MANIFEST).is_file() and not is_bundle(path):
        if signer is not None:
            raise InputError("--key", f"is for a bundle; {path} is a quantized checkpoint")
        quantized = open_quantized(path)
        checks = check_quantized_files(quantized) + check_quantized_manifest(quantized)
        checks += check_quantized(quantized)
        return checks + (check_source(quantized, source, None, progress) if source else [])
    files = check_bundle_files(path)
    signatures = check_signature(path, signer)
    if not all(check.passed for check in signatures):
        return files + signatures  # no runtime reads what somebody else made
    files += signatures
    try:
        bundle = open_bundle(path)
    except InputError as error:
        if all(check.passed for check in files):
            raise
        return [*files, Check("bundle", None, error.subject, False, 1, 0, error.problem)]
    damaged = {check.subject for check in files if not check.passed}
    checks, texts = files, dict[str, Text]()
    for target, finished in bundle.artifacts.items():
        context = finished.artifact.target.max_context
        try:
            texts[target] = verification_text(bundle.quantized, context, text)
        except InputError as error:
            if text is not None and not damaged:
                raise
            checks.append(Check("text", target, error.subject, False, 1, 0, error.problem))
    with running(bundle.artifacts, texts, damaged) as runs:
        if CHECKSUMS not in damaged:
            checks += check_manifests(bundle)
        if source:
            checks += check_source(bundle.quantized, source, bundle_recipe(bundle), progress)
        if not quick:
            checks += _check_derived(bundle, damaged, progress)
        checks += check_quantized(bundle.quantized)
        return checks + check_artifacts(
            bundle.quantized, bundle.artifacts, texts, runs, progress, damaged
        )


def _check_derived(bundle: Bundle, damaged: Collection[str], progress: Progress) -> list[Check]:
    """Derive every artifact again, unless a file of the quantized checkpoint is damaged."""
    sources = [name for name in damaged if name.startswith(f"{BUNDLE_QUANTIZED}/")]
    if sources:
        note = "not derived again: the file is damaged"
        return [Check("derived", None, name, False, 1, 0, note) for name in sources]
    return [
        check
        for finished in bundle.artifacts.values()
        for check in check_derived(bundle.quantized, finished, progress)
    ]
