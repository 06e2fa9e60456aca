"""Quantize the source again, and compare it with a quantized checkpoint."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from exporter.calibration.quantize import (
    quantization_inputs,
    quantization_plan,
    quantize_checkpoint,
)
from exporter.derivation.manifests import recorded_plan
from exporter.errors import InputError, short
from exporter.model.checkpoint import Checkpoint
from exporter.model.licence import CARD, LicenceTerms
from exporter.progress import Progress, TensorCounter
from exporter.quantization.quantized_checkpoint import (
    QuantizedCheckpoint,
    quantized_identity,
    source_hashes,
    write_quantized,
)
from exporter.quantization.rounding import ROUNDINGS
from exporter.quantization.schemes import FLOAT
from exporter.recipe import Recipe
from exporter.verification.checks import Check
from exporter.verification.integers import differences


def check_source(
    quantized: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    recipe: Recipe | None,
    progress: Progress,
) -> list[Check]:
    """Compare the quantized checkpoint with its source: the hash of every file, the licence that
    its model card names, then every weight with the one that is quantized again.

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
    same = checkpoint.licence == quantized.licence
    note = "" if same else _licence_note(checkpoint.licence, quantized.licence)
    checks.append(Check("source", None, CARD, same, not same, 0, note))
    if checkpoint.config != quantized.config:
        note = f"is not the configuration of {checkpoint.path}: the weights are not compared"
        return [*checks, Check("source", None, "config.json", False, 1, 0, note)]
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        try:
            again = _quantize_again(quantized, checkpoint, source, recipe, Path(scratch), progress)
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


def _licence_note(source: LicenceTerms | None, recorded: LicenceTerms | None) -> str:
    here, there = (short(one.model_dump() if one else None) for one in (source, recorded))
    return f"names the licence {here}, the manifest {there}"


def _quantize_again(
    quantized: QuantizedCheckpoint,
    checkpoint: Checkpoint,
    source: Mapping[str, str],
    recipe: Recipe | None,
    out: Path,
    progress: Progress,
) -> QuantizedCheckpoint:
    """Quantize the source as the manifest says; `source` has the hashes of its files. Raises
    InputError if that is not possible."""
    calibration = quantized.manifest.get("calibration")
    if calibration is None:
        plan = recorded_plan(quantized)
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
        source,
        progress,
    )
    for key in ("text", "precision", "processes"):
        here = inputs.identity["calibration"][key]
        if here != calibration.get(key):
            raise InputError(
                f"calibration.{key}", f"is {short(here)} here, not {short(calibration.get(key))}"
            )
    return quantize_checkpoint(checkpoint, inputs, out, progress)
