"""The whole pipeline: checkpoint → quantized checkpoint → artifacts → proof → bundle."""

import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from exporter.backends import Target, backend
from exporter.backends import names as backend_names
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import (
    FinishedArtifact,
    artifact_identity,
    artifact_output,
    artifact_versions,
    write_artifact,
)
from exporter.bundle.bundle import MANIFEST as BUNDLE_MANIFEST
from exporter.bundle.bundle import QUANTIZED as BUNDLE_QUANTIZED
from exporter.bundle.bundle import (
    SEAL,
    Bundle,
    bundle_identity,
    bundle_output,
    file_problems,
    is_bundle,
    is_bundle_of,
    open_bundle,
    sealed_files,
    write_seal,
)
from exporter.errors import InputError
from exporter.files import (
    check_folder,
    claim_folder,
    differing_files,
    made_from,
    read_json,
)
from exporter.model.checkpoint import Checkpoint
from exporter.quantization.quantized_checkpoint import (
    DEQUANTIZED_OUTPUT,
    QUANTIZED_OUTPUT,
    REPORTS,
    Plan,
    QuantizedCheckpoint,
    finished_quantized,
    open_quantized,
    plan_schemes,
    quantized_identity,
    require_whole,
    source_hashes,
    write_dequantized,
    write_quantized,
)
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.recipe import Recipe
from exporter.verification import (
    Check,
    Text,
    check_integers,
    check_logits,
    check_quantized,
    verification_text,
)

if TYPE_CHECKING:  # imported where it is needed: it takes its time
    from exporter.calibration.calibrate import Prepared


class Progress(Protocol):
    """Told of each step: the stage's name, how many of its steps are done, of how many, and what
    else is worth showing."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def no_progress(stage: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


class _Counter:
    """Counts the tensors of a stage for a `Progress`."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0
        progress(stage, 0, total)

    def __call__(self, name: str) -> None:
        self._done = min(self._done + 1, self._total)
        self._progress(self._stage, self._done, self._total)


def plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    """How the recipe stores each tensor of the checkpoint. Raises InputError."""
    linear, embedding, overrides = recipe.quantization.schemes()
    shapes = checkpoint.config.parameter_shapes()
    return plan_schemes(shapes, linear, embedding, overrides, recipe.quantization.method)


@dataclass(frozen=True)
class Decided:
    """Everything that is decided before any weight is written."""

    plan: Plan
    prepared: "Prepared | None"
    identity: dict[str, Any]


def decide(recipe: Recipe, checkpoint: Checkpoint, progress: Progress) -> Decided:
    """The plan and, where the recipe calibrates, the text and what a budget allows.

    Raises InputError.
    """
    decided = plan(recipe, checkpoint)
    if not recipe.quantization.calibrated:
        return Decided(decided, None, quantized_identity(checkpoint, decided))
    from exporter.calibration.calibrate import prepare
    from exporter.calibration.sensitivity import WIDER

    source = source_hashes(checkpoint)
    prepared = prepare(checkpoint, recipe, decided.schemes, source, _stages(progress))
    schemes = {**decided.schemes, **dict.fromkeys(prepared.wider, WIDER)}
    decided = replace(decided, schemes=schemes)
    identity = quantized_identity(checkpoint, decided, prepared.identity())
    return Decided(decided, prepared, identity)


def _stages(progress: Progress) -> Callable[[str], Callable[[int, int, str], None]]:
    return lambda stage: partial(progress, stage)


def _write_quantized(
    checkpoint: Checkpoint, decided: Decided, out: Path, progress: Progress
) -> QuantizedCheckpoint:
    """The quantized checkpoint in `out`: the finished one that is there, or a new one."""
    folder = out / f".{REPORTS}.tmp"
    quantized = finished_quantized(out, decided.identity)
    if quantized is None:
        weights, reports = None, list[str]()
        shutil.rmtree(out / REPORTS, ignore_errors=True)  # of an unfinished run
        if decided.prepared is not None:
            from exporter.calibration.calibrate import calibrate, write_reports

            folder.mkdir(parents=True, exist_ok=True)  # marks `out` as ours until weights do
            schemes = decided.plan.schemes
            result = calibrate(checkpoint, decided.prepared, schemes, folder, _stages(progress))
            weights = result.weights
            written = write_reports(out / REPORTS, result.reports)
            reports = [path.relative_to(out).as_posix() for path in written]
        counter = _Counter(progress, "quantize", len(decided.plan.schemes))
        quantized = write_quantized(
            checkpoint, decided.plan, decided.identity, out, counter, weights, reports
        )
    shutil.rmtree(folder, ignore_errors=True)  # also what a run left that was killed just here
    return quantized


def check_targets(recipe: Recipe, checkpoint: Checkpoint, decided: Plan) -> None:
    """Refuse what a target cannot hold before anything is made. Raises InputError."""
    for target in recipe.targets:
        backend(target.target).check(checkpoint.config, decided.schemes, target)


def with_targets(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe for these of its targets only; for all of them where no name is given."""
    kinds = [target.target for target in recipe.targets]
    for name in names:
        if name not in kinds:
            raise InputError(
                f"--target {name}", f"is not in the recipe {recipe.name}", f"It has: {kinds}"
            )
    chosen = tuple(target for target in recipe.targets if target.target in names)
    return recipe.model_copy(update={"targets": chosen}) if names else recipe


@dataclass(frozen=True)
class Dequantized:
    """Where to write an ordinary model folder with the quantized values, and how exactly."""

    path: Path
    dtype: torch.dtype


def quantize(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path,
    progress: Progress,
    overwrite: bool = False,
    dequantized: Dequantized | None = None,
) -> QuantizedCheckpoint | None:
    """Checkpoint → quantized checkpoint, and on request → a Hugging Face folder of its values.

    Started by ``torchrun``, all processes distil together and the first one writes.
    """
    base = quantized_identity(checkpoint, plan(recipe, checkpoint))
    known = {key: base[key] for key in ("source", "method", "versions")}
    check_folder(out, QUANTIZED_OUTPUT, _may_be_of(out / QUANTIZED_MANIFEST, known), overwrite)
    checkpoint.check_weights()
    if "RANK" in os.environ:
        from exporter.calibration.parallel import processes, rank

        with processes():
            if rank():
                return _join_as_worker(checkpoint, decide(recipe, checkpoint, no_progress), out)
            decided = decide(recipe, checkpoint, progress)
            return _quantize(checkpoint, decided, out, progress, overwrite, dequantized)
    decided = decide(recipe, checkpoint, progress)
    return _quantize(checkpoint, decided, out, progress, overwrite, dequantized)


def _may_be_of(manifest: Path, known: Mapping[str, Any]) -> bool:
    """Whether a finished result may be of the same inputs, as far as these are known before a
    calibration, which can take long. What is missing or damaged may be."""
    try:
        found = read_json(manifest)
    except InputError:
        return True
    return all(found.get(key) == value for key, value in known.items())


def _join_as_worker(
    checkpoint: Checkpoint, decided: Decided, out: Path
) -> QuantizedCheckpoint | None:
    """What a process does that is not the first: its part of a distillation."""
    from exporter.calibration.calibrate import calibrate

    prepared = decided.prepared
    if prepared and prepared.method == "distill" and not finished_quantized(out, decided.identity):
        folder = out / f".{REPORTS}.tmp"
        calibrate(checkpoint, prepared, decided.plan.schemes, folder, _stages(no_progress))
    return None


def _quantize(
    checkpoint: Checkpoint,
    decided: Decided,
    out: Path,
    progress: Progress,
    overwrite: bool,
    dequantized: Dequantized | None,
) -> QuantizedCheckpoint:
    same = made_from(out / QUANTIZED_MANIFEST, decided.identity)
    if dequantized:
        if dequantized.path.resolve() == checkpoint.path.resolve():
            raise InputError(dequantized.path, "is the checkpoint itself", "Give another folder")
        check_folder(dequantized.path, DEQUANTIZED_OUTPUT, False, overwrite)
    with claim_folder(out, QUANTIZED_OUTPUT, same, overwrite):
        quantized = _write_quantized(checkpoint, decided, out, progress)
    if dequantized:
        with claim_folder(dequantized.path, DEQUANTIZED_OUTPUT, False, overwrite):
            counter = _Counter(progress, "dequantize", len(quantized.schemes))
            write_dequantized(quantized, dequantized.dtype, dequantized.path, counter)
    return quantized


def lower(
    quantized: QuantizedCheckpoint,
    target: Target,
    out: Path,
    progress: Progress,
    overwrite: bool = False,
) -> FinishedArtifact:
    """Quantized checkpoint → one artifact."""
    backend(target.target).check(quantized.config, quantized.schemes, target)
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
    """What an export made; `bundle` is None when a check failed and nothing was sealed."""

    bundle: Bundle | None
    quantized: QuantizedCheckpoint
    artifacts: Mapping[str, FinishedArtifact]
    checks: list[Check]


def export(
    recipe: Recipe,
    checkpoint: Checkpoint,
    out: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    text: Path | None = None,
) -> Export:
    """Checkpoint → a verified bundle. A stage that is finished is not run again."""
    check_targets(recipe, checkpoint, plan(recipe, checkpoint))
    texts: dict[str, Text] = {
        target.target: verification_text(checkpoint, target.max_context, text)
        for target in recipe.targets
    }
    checkpoint.check_weights()
    known = {"recipe": recipe.to_dict()}
    check_folder(out, bundle_output(), _may_be_of(out / BUNDLE_MANIFEST, known), overwrite)
    decided = decide(recipe, checkpoint, progress)
    packages: dict[str, dict[str, str]] = {
        target.target: artifact_versions(target) for target in recipe.targets
    }
    manifest = bundle_identity(recipe, decided.identity, packages)
    same = is_bundle_of(out, manifest, decided.identity)
    with claim_folder(out, bundle_output(), same, overwrite):
        for other in (
            set(backend_names()) - packages.keys()
        ):  # of an unfinished run of another recipe
            shutil.rmtree(out / other, ignore_errors=True)
        quantized = _write_quantized(checkpoint, decided, out / BUNDLE_QUANTIZED, progress)
        artifacts: dict[str, FinishedArtifact] = {
            target.target: _lower(
                quantized,
                target,
                artifact_identity(quantized, target),
                out / target.target,
                progress,
            )
            for target in recipe.targets
        }
        checks = _verify_models(quantized, artifacts, texts, progress)
        if not all(check.passed for check in checks):
            return Export(None, quantized, artifacts, checks)
        if not is_bundle(out) or file_problems(out):
            write_seal(out, manifest, quantized, artifacts)
        return Export(open_bundle(out), quantized, artifacts, checks)


def verify(path: Path, progress: Progress, text: Path | None = None) -> list[Check]:
    """Every check of a finished bundle, or of a quantized checkpoint alone."""
    if (path / QUANTIZED_MANIFEST).is_file() and not is_bundle(path):
        quantized = open_quantized(path)
        problems = differing_files(path, quantized.manifest["files"])
        return _file_checks(tuple(quantized.manifest["files"]), problems) + check_quantized(
            quantized
        )
    files = _verify_files(path)
    try:
        bundle = open_bundle(path)
    except InputError as error:
        if all(check.passed for check in files):
            raise
        return [*files, Check("bundle", None, error.subject, False, 1, 0, error.problem)]
    damaged = {check.subject for check in files if not check.passed}
    texts = dict[str, Text]()
    for target, finished in bundle.artifacts.items():
        context = finished.artifact.target.max_context
        try:
            texts[target] = verification_text(bundle.quantized, context, text)
        except InputError:
            if not damaged:
                raise
    return files + _verify_models(bundle.quantized, bundle.artifacts, texts, progress, damaged)


def _verify_files(path: Path) -> list[Check]:
    if not is_bundle(path):
        open_bundle(path)  # says why not
    try:
        return _file_checks(sealed_files(path), file_problems(path))
    except InputError as error:  # the seal itself is damaged
        return [Check("files", None, SEAL, False, 1, 0, error.problem)]


def _file_checks(names: tuple[str, ...], problems: Mapping[str, str]) -> list[Check]:
    return [
        Check(
            "files", None, name, name not in problems, name in problems, 0, problems.get(name, "")
        )
        for name in dict.fromkeys((*names, *problems))
    ]


def _verify_models(
    quantized: QuantizedCheckpoint,
    artifacts: Mapping[str, FinishedArtifact],
    texts: Mapping[str, Text],
    progress: Progress,
    damaged: Collection[str] = (),
) -> list[Check]:
    """Quantized checkpoint, integers and logits; a `damaged` file never reaches a runtime."""
    checks = check_quantized(quantized)
    for target, finished in artifacts.items():
        counter = _Counter(progress, f"verify {target}: integers", len(quantized.schemes))
        checks += check_integers(quantized, finished, counter)
        stage = f"verify {target}: logits"
        progress(stage, 0, 1)
        needed = [f"{target}/{name}" for name in finished.manifest["files"]]
        broken = [name for name in needed if name in damaged]
        if broken or target not in texts:
            subject = (broken or sorted(damaged))[0]
            note = "not run: the file is damaged"
            checks.append(Check("logits", target, subject, False, 1, 0, note))
            continue
        checks += check_logits(quantized, finished, texts[target])
        progress(stage, 1, 1)
    return checks
