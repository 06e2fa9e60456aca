"""Derive the files of a bundle again and compare: what a checksum cannot prove.

    mobilellm verify BUNDLE --source CHECKPOINT

Whoever changes a file can write its checksum anew. But every file is derived from others: an
artifact from the quantized checkpoint, a manifest from the files and the recipe, and the quantized
checkpoint from its source. The same inputs give the same bytes, so each file is made again in a
scratch folder and compared.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.backends import backend
from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import FinishedArtifact, artifact_identity, write_artifact
from exporter.bundle.bundle import MANIFEST as BUNDLE_MANIFEST
from exporter.bundle.bundle import QUANTIZED, Bundle, bundle_identity, read_checksums
from exporter.calibration.quantize import (
    quantization_inputs,
    quantization_plan,
    quantize_checkpoint,
    with_int8,
)
from exporter.calibration.settings import RESULTS
from exporter.errors import InputError, short
from exporter.files import differing_files, json_bytes, read_json
from exporter.model.checkpoint import COMPANION_FILES, Checkpoint
from exporter.progress import Progress, TensorCounter
from exporter.quantization.plan import QuantizationPlan
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import (
    QuantizedCheckpoint,
    quantized_identity,
    source_hashes,
    write_quantized,
)
from exporter.quantization.rounding import ROUNDINGS
from exporter.quantization.schemes import FLOAT
from exporter.recipe import Recipe, parse_recipe
from exporter.verification.checks import Check
from exporter.verification.integers import differences

#: Differences of one artifact that are listed; the rest is not read.
_MOST_LISTED = 20


def bundle_recipe(bundle: Bundle) -> Recipe:
    """The recipe in ``bundle.json``. Raises InputError."""
    return parse_recipe(bundle.manifest.recipe, f"{bundle.path / BUNDLE_MANIFEST}: recipe")


def check_manifests(bundle: Bundle) -> list[Check]:
    """Compare each field of each manifest with what the files and the recipe give.

    Some fields cannot be derived. The versions of packages and the hashes of the source's weight
    files must agree between the manifests, and `check_source` compares the hashes with the source.
    The name, the model and the profile section of the recipe decide no file.
    """
    try:
        recipe = bundle_recipe(bundle)
    except InputError as error:
        return [Check("manifest", None, BUNDLE_MANIFEST, False, 1, 0, str(error))]
    hashes, quantized = read_checksums(bundle.path), bundle.quantized
    targets = {target.target: target for target in recipe.targets}
    written = {name: one.manifest["versions"] for name, one in bundle.artifacts.items()}
    content = bundle_identity(recipe.to_dict(), quantized.manifest, written)
    checks = _field_checks(bundle.path, BUNDLE_MANIFEST, content | {"targets": list(targets)})
    files = _hashes_below(QUANTIZED, hashes, QUANTIZED_MANIFEST)
    name = f"{QUANTIZED}/{QUANTIZED_MANIFEST}"
    try:
        plan = _recipe_plan(quantized, recipe)
        content = _quantized_content(quantized, plan, _recipe_calibration(quantized, recipe), files)
        content["versions"] = _versions_of(bundle, content)
        checks += _field_checks(bundle.path, name, content)
    except InputError as error:
        checks.append(Check("manifest", None, name, False, 1, 0, str(error)))
    folders = (QUANTIZED, *bundle.artifacts)
    foreign = [n for n in hashes if n != BUNDLE_MANIFEST and n.split("/")[0] not in folders]
    note = "belongs to no target of the bundle"
    checks += [Check("manifest", None, name, False, 1, 0, note) for name in foreign]
    for target, finished in bundle.artifacts.items():
        # A target that the recipe lacks is reported as a field of the bundle's manifest.
        content = artifact_identity(quantized, targets.get(target, finished.artifact.target))
        content["versions"] = _versions_of(bundle, content)
        content["files"] = _hashes_below(target, hashes, ARTIFACT_MANIFEST)
        checks += _field_checks(bundle.path, f"{target}/{ARTIFACT_MANIFEST}", content)
    return checks


def _versions_of(bundle: Bundle, identity: Mapping[str, Any]) -> dict[str, str | None]:
    """The versions that the bundle's manifest has for the packages of this identity."""
    return {name: bundle.manifest.versions.get(name) for name in identity["versions"]}


def check_quantized_manifest(quantized: QuantizedCheckpoint) -> list[Check]:
    """`check_manifests` for a quantized checkpoint alone, which has no recipe to compare with."""
    manifest = quantized.manifest
    content = _quantized_content(
        quantized, _manifest_plan(quantized), manifest.get("calibration"), manifest["files"]
    )
    return _field_checks(quantized.path, QUANTIZED_MANIFEST, content)


def _quantized_content(
    quantized: QuantizedCheckpoint,
    plan: QuantizationPlan,
    calibration: Mapping[str, Any] | None,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``quantization.json``. `files` has the hash of every file of the folder; the
    source's companion files have the same hashes, since they are copied."""
    companions = {name: files[name] for name in COMPANION_FILES if name in files}
    weights = quantized.manifest["source"].items() - companions.items()
    source = {name: digest for name, digest in weights if name not in COMPANION_FILES}
    identity = quantized_identity(quantized, plan, source | companions, calibration)
    return identity | {"versions": quantized.manifest["versions"], "files": dict(files)}


def _manifest_plan(quantized: QuantizedCheckpoint) -> QuantizationPlan:
    """The plan that the manifest records."""
    tensors = quantized.manifest["tensors"]
    reasons = {name: entry["reason"] for name, entry in tensors.items() if "reason" in entry}
    return QuantizationPlan(quantized.manifest["method"], quantized.schemes, reasons)


def _recipe_plan(quantized: QuantizedCheckpoint, recipe: Recipe) -> QuantizationPlan:
    """The plan of the recipe. The weights that a budget stored as int8 are taken from the manifest;
    they may not exceed the budget. Raises InputError."""
    plan = quantization_plan(recipe.quantization, quantized)
    if not recipe.quantization.budget:
        return plan
    from exporter.calibration.sensitivity import model_bits, parse_budget

    wider = quantized.manifest.get("calibration", {}).get("wider", [])
    if not isinstance(wider, list) or not all(name in plan.schemes for name in wider):
        raise InputError("calibration.wider", f"{short(wider)} is not a list of weights")
    plan = with_int8(plan, wider)
    budget = parse_budget(recipe.quantization.budget, "quantization.budget", quantized.config)
    used = model_bits(plan.schemes, quantized.config)
    if used > budget:
        raise InputError("calibration.wider", f"needs {used} bits, the budget has {budget}")
    return plan


def _recipe_calibration(quantized: QuantizedCheckpoint, recipe: Recipe) -> dict[str, Any] | None:
    """The calibration that the manifest should record: the settings of the recipe, and what was
    found when it ran."""
    if not recipe.quantization.calibrated:
        return None
    recorded = quantized.manifest.get("calibration", {})
    found = {key: recorded[key] for key in RESULTS if key in recorded}
    return {**recipe.calibration.identity(), **found}


def _hashes_below(folder: str, hashes: Mapping[str, str], manifest: str) -> dict[str, str]:
    """The hashes of the files below a folder of the bundle, without its manifest."""
    prefix = f"{folder}/"
    below = {n.removeprefix(prefix): h for n, h in hashes.items() if n.startswith(prefix)}
    below.pop(manifest, None)
    return below


def _field_checks(folder: Path, name: str, expected: Mapping[str, Any]) -> list[Check]:
    """Compare a manifest with the content that was derived: each field, and how it is written."""
    found = read_json(folder / name)
    checks = list[Check]()
    for field in {**expected, **found}:
        note = _field_note(found, expected, field)
        checks.append(Check("manifest", None, f"{name}: {field}", not note, bool(note), 0, note))
    if (folder / name).read_bytes() != json_bytes(found):
        note = "is not written as this tool writes it"
        checks.append(Check("manifest", None, name, False, 1, 0, note))
    return checks


def _field_note(found: object, expected: object, field: str) -> str:
    """Where a field differs and how; empty if it does not."""
    if not isinstance(found, Mapping) or not isinstance(expected, Mapping):
        return "" if found == expected else f"is {short(found)}, not {short(expected)}"
    if field not in found or field not in expected:
        return "is missing" if field in expected else "does not belong there"
    one, other = found[field], expected[field]
    if one == other:
        return ""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        key = next(key for key in {**other, **one} if one.get(key) != other.get(key))
        return f"{key}: {_field_note(one, other, key)}"
    return f"is {short(one)}, not {short(other)}"


def check_derived(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, progress: Progress
) -> list[Check]:
    """Lower the quantized checkpoint again for the artifact's target, and compare every file."""
    target = finished.artifact.target
    stage = f"verify {target.target}: derive again"
    progress(stage, 0, 1)
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        identity = artifact_identity(quantized, target)
        derived = write_artifact(quantized, target, identity, Path(scratch) / target.target)
        checks = compare_artifacts(finished, derived)
    progress(stage, 1, 1)
    return checks


def compare_artifacts(found: FinishedArtifact, derived: FinishedArtifact) -> list[Check]:
    """Compare an artifact with one that was derived just now: one check per file, and one for each
    difference of the models that is named.

    If other versions of the toolkit wrote the artifact, its bytes may differ, and the models must
    have no difference.
    """
    folder, target = found.artifact.path, derived.artifact.target.target
    module, hashes = backend(target), derived.manifest["files"]
    problems = differing_files(folder, hashes)
    extra = [name for name in found.manifest["files"] if name not in hashes]
    problems |= dict.fromkeys(extra, "is not a file of this artifact")
    named = list[tuple[str, str]]()
    if not problems.keys().isdisjoint(module.FILES):
        named = _named_differences(module.differences(found.artifact, derived.artifact))
    checks = list[Check]()
    written, here = found.manifest["versions"], derived.manifest["versions"]
    if written != here:
        versions = [f"{name} {written.get(name)}, here {here.get(name)}" for name in here]
        note = "the structure of the models is compared instead of their bytes"
        checks.append(Check("derived", target, ", ".join(versions), True, 0, None, note))
    may_vary = () if written == here else module.FILES
    for name in (*hashes, *extra):
        problem = problems.get(name, "")
        varies = name in may_vary and name in hashes and (folder / name).is_file()
        same = not problem or (varies and not named)
        note = "" if same else f"is not the file that is derived again: {problem}"
        checks.append(Check("derived", target, f"{target}/{name}", same, not same, 0, note))
    return checks + [Check("derived", target, place, False, 1, 0, what) for place, what in named]


def _named_differences(found: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first differences. A file that cannot be parsed is one of them."""
    named = list[tuple[str, str]]()
    try:
        for place, what in found:
            if len(named) == _MOST_LISTED:
                return [*named, ("model", f"has more than these {_MOST_LISTED} differences")]
            named.append((place, what))
    except InputError as error:
        named.append((error.subject, error.problem))
    except Exception as error:  # a toolkit's parser may raise anything for a damaged file
        named.append(("model", f"cannot be read ({type(error).__name__}: {error})"))
    return named


def check_source(
    quantized: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    progress: Progress,
) -> list[Check]:
    """Compare the quantized checkpoint with its source: the hash of every file, then every weight
    with the one that is quantized again.

    Weights that were rounded by `absmax`, `mse` or `gptq` are quantized again; the latter needs the
    `recipe` and its text. If that is not possible, one check that has no limit says why, and only
    the weights in float are compared.
    """
    source, recorded = source_hashes(checkpoint), quantized.manifest["source"]
    checks = list[Check]()
    for name in {**source, **recorded}:
        same = source.get(name) == recorded.get(name)
        note = "" if same else f"has sha256 {source.get(name)}, the manifest {recorded.get(name)}"
        checks.append(Check("source", None, name, same, not same, 0, note))
    if checkpoint.config != quantized.config:
        note = f"is not the configuration of {checkpoint.path}: the weights are not compared"
        return [*checks, Check("source", None, "config.json", False, 1, 0, note)]
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        try:
            again = _quantize_again(quantized, checkpoint, recipe, Path(scratch), progress)
        except InputError as error:
            note = f"the weights were not quantized again: {error}"
            checks.append(Check("source", None, str(quantized.path), True, 0, None, note))
            again = None
        for name, scheme in quantized.schemes.items():
            if again is None and scheme != FLOAT:
                continue
            expected = (again or checkpoint).read(name)
            count, note = differences(
                expected, quantized.read(name), ("the source", "the quantized checkpoint")
            )
            checks.append(Check("source", None, name, count == 0, count, 0, note))
    return checks


def _quantize_again(
    quantized: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    out: Path,
    progress: Progress,
) -> QuantizedCheckpoint:
    """Quantize the source as the manifest says. Raises InputError if that is not possible."""
    calibration = quantized.manifest.get("calibration")
    if calibration is None:
        plan = _manifest_plan(quantized)
        if plan.method not in ROUNDINGS:
            raise InputError("method", f"{short(plan.method)} is not {' or '.join(ROUNDINGS)}")
        counter = TensorCounter(progress, "quantize again", len(plan.schemes))
        identity = quantized_identity(checkpoint, plan, quantized.manifest["source"])
        return write_quantized(checkpoint, plan, identity, out, counter)
    if recipe is None:
        raise InputError("calibration", "needs the recipe, which only a bundle has")
    if recipe.quantization.method == "distill":
        raise InputError("quantization.method", "a distillation is not run again here")
    plan = quantization_plan(recipe.quantization, checkpoint)
    inputs = quantization_inputs(
        recipe.quantization,
        recipe.calibration,
        checkpoint,
        plan,
        source_hashes(checkpoint),
        progress,
    )
    for key in ("text", "precision", "processes"):
        here = inputs.identity["calibration"][key]
        if here != calibration.get(key):
            raise InputError(
                f"calibration.{key}", f"is {short(here)} here, not {short(calibration.get(key))}"
            )
    return quantize_checkpoint(checkpoint, inputs, out, progress)
