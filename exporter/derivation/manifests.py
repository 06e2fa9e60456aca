"""Compare each field of the manifests with what the files and the recipe give."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.bundle.artifact import MANIFEST as ARTIFACT_MANIFEST
from exporter.bundle.artifact import artifact_identity
from exporter.bundle.bundle import QUANTIZED, Bundle, derived_files, read_checksums
from exporter.bundle.documents import DOCUMENTS
from exporter.bundle.manifest import MANIFEST as BUNDLE_MANIFEST
from exporter.bundle.manifest import FileEntry, bundle_identity, bundle_manifest
from exporter.bundle.results import RESULTS as MEASUREMENTS
from exporter.calibration.quantize import quantization_plan, with_int8
from exporter.calibration.settings import RESULTS
from exporter.errors import InputError, short
from exporter.files import json_bytes, read_json
from exporter.foreign import COMPANION_BYTES, read_bytes
from exporter.model.checkpoint import COMPANION_FILES
from exporter.quantization.plan import QuantizationPlan
from exporter.quantization.quantized_checkpoint import MANIFEST as QUANTIZED_MANIFEST
from exporter.quantization.quantized_checkpoint import (
    WEIGHTS,
    QuantizedCheckpoint,
    quantized_identity,
)
from exporter.recipe import Recipe, parse_recipe
from exporter.verification.checks import Check


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
    identity = bundle_identity(recipe.to_dict(), quantized.manifest, written)
    checks = _document_checks(bundle, identity | {"targets": list(targets)}, hashes)
    files = _hashes_below(QUANTIZED, hashes, QUANTIZED_MANIFEST)
    name = f"{QUANTIZED}/{QUANTIZED_MANIFEST}"
    try:
        plan = _recipe_plan(quantized, recipe)
        content = _quantized_content(quantized, plan, _recipe_calibration(quantized, recipe), files)
        content["versions"] = _versions_of(bundle, content)
        checks += _field_checks(bundle.path, name, content)
    except InputError as error:
        checks.append(Check("manifest", None, name, False, 1, 0, str(error)))
    folders = (QUANTIZED, MEASUREMENTS, *bundle.artifacts)
    known = (BUNDLE_MANIFEST, *DOCUMENTS)
    foreign = [n for n in hashes if n not in known and n.split("/")[0] not in folders]
    note = "belongs to no target of the bundle"
    checks += [Check("manifest", None, name, False, 1, 0, note) for name in foreign]
    for target, finished in bundle.artifacts.items():
        # A target that the recipe lacks is reported as a field of the bundle's manifest.
        content = artifact_identity(quantized, targets.get(target, finished.artifact.target))
        content["versions"] = _versions_of(bundle, content)
        below = _hashes_below(target, hashes, ARTIFACT_MANIFEST)
        in_order = [name for name in finished.manifest["files"] if name in below]
        content["files"] = {name: below[name] for name in (*in_order, *below)}
        checks += _field_checks(bundle.path, f"{target}/{ARTIFACT_MANIFEST}", content)
    return checks


def _document_checks(
    bundle: Bundle, identity: Mapping[str, Any], hashes: Mapping[str, str]
) -> list[Check]:
    """Compare ``manifest.json`` and every document with those that are derived again."""
    folder, derived = bundle.path, (BUNDLE_MANIFEST, *DOCUMENTS)
    files = {
        name: FileEntry(sha256=digest, bytes=(folder / name).stat().st_size)
        for name, digest in hashes.items()
        if name not in derived and (folder / name).is_file()
    }
    try:
        expected = derived_files(folder, bundle_manifest(identity, bundle.quantized, files))
    except InputError as error:
        subject = _name_in(folder, error.subject)
        return [Check("manifest", None, subject, False, 1, 0, error.problem)]
    checks = _field_checks(folder, BUNDLE_MANIFEST, json.loads(expected.pop(BUNDLE_MANIFEST)))
    for name in sorted({*expected, *(name for name in DOCUMENTS if name in hashes)}):
        found = read_bytes(folder / name, COMPANION_BYTES) if (folder / name).is_file() else None
        same = found == expected.get(name)
        note = "" if same else "is not the document that is derived again"
        checks.append(Check("manifest", None, name, same, not same, 0, note))
    return checks


def _name_in(folder: Path, subject: str) -> str:
    """The name of a file in the bundle, of the subject of an error."""
    return subject.removeprefix(f"{folder}/")


def _versions_of(bundle: Bundle, identity: Mapping[str, Any]) -> dict[str, str | None]:
    """The versions that the bundle's manifest has for the packages of this identity."""
    return {name: bundle.manifest.versions.get(name) for name in identity["versions"]}


def check_quantized_manifest(quantized: QuantizedCheckpoint) -> list[Check]:
    """`check_manifests` for a quantized checkpoint alone, which has no recipe to compare with."""
    manifest = quantized.manifest
    content = _quantized_content(
        quantized, recorded_plan(quantized), manifest.get("calibration"), manifest["files"]
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
    companions = [name for name in COMPANION_FILES if name in files]
    recorded = quantized.manifest["source"]
    weights = [name for name in recorded if name not in COMPANION_FILES]
    source = {n: files[n] if n in companions else recorded[n] for n in sorted(weights + companions)}
    reports = sorted(files.keys() - {WEIGHTS, *companions})
    written = [name for name in (WEIGHTS, *reports, *companions) if name in files]
    identity = quantized_identity(quantized, plan, source, calibration)
    return identity | {
        "versions": quantized.manifest["versions"],
        "files": {name: files[name] for name in written},
    }


def recorded_plan(quantized: QuantizedCheckpoint) -> QuantizationPlan:
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
    """Compare a manifest with the content that was derived: each field, then the bytes."""
    found = read_json(folder / name)
    checks = list[Check]()
    for field in {**expected, **found}:
        note = _field_note(found, expected, field)
        checks.append(Check("manifest", None, f"{name}: {field}", not note, bool(note), 0, note))
    if found == expected and (folder / name).read_bytes() != json_bytes(expected):
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
