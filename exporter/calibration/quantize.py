"""Checkpoint → quantized checkpoint: the plan, the calibration if the recipe has one, the file.

The calibration modules are imported only if the recipe calibrates, because they load slowly.
"""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.calibration.settings import Calibration
from exporter.model.checkpoint import Checkpoint
from exporter.progress import Progress, TensorCounter, no_progress
from exporter.quantization.plan import QuantizationPlan, plan_schemes
from exporter.quantization.quantized_checkpoint import (
    REPORTS,
    QuantizedCheckpoint,
    finished_quantized,
    quantized_identity,
    write_quantized,
)
from exporter.quantization.schemes import Scheme
from exporter.quantization.settings import Quantization

if TYPE_CHECKING:
    from exporter.calibration.calibrate import CalibrationInputs


def quantization_plan(
    quantization: Quantization, checkpoint: Checkpoint | QuantizedCheckpoint
) -> QuantizationPlan:
    """The scheme of each tensor of the checkpoint. Raises InputError."""
    linear, embedding, overrides = quantization.schemes()
    shapes = checkpoint.config.parameter_shapes()
    return plan_schemes(shapes, linear, embedding, overrides, quantization.method)


def with_int8(plan: QuantizationPlan, names: Collection[str]) -> QuantizationPlan:
    """The plan with these weights stored as int8, as a budget chooses them."""
    return replace(plan, schemes={**plan.schemes, **dict.fromkeys(names, Scheme(8))})


@dataclass(frozen=True)
class QuantizationInputs:
    """The quantization plan and the calibration inputs, complete before any weight is rounded.

    `plan` includes the weights that a budget stores as int8. `identity` is the content of the
    manifest, without the hashes of the files.
    """

    plan: QuantizationPlan
    calibration: "CalibrationInputs | None"
    identity: dict[str, Any]


def quantization_inputs(
    quantization: Quantization,
    settings: Calibration,
    checkpoint: Checkpoint,
    plan: QuantizationPlan,
    source: Mapping[str, str],
    progress: Progress,
) -> QuantizationInputs:
    """Complete the plan; if the recipe calibrates, prepare the text and choose the int8 weights.

    `source` has the hashes of the checkpoint's files (`source_hashes`). Raises InputError.
    """
    if not quantization.calibrated:
        return QuantizationInputs(plan, None, quantized_identity(checkpoint, plan, source))
    from exporter.calibration.calibrate import calibration_inputs

    calibration = calibration_inputs(
        checkpoint, quantization, settings, plan.schemes, source, progress
    )
    plan = with_int8(plan, calibration.int8_weights)
    identity = quantized_identity(checkpoint, plan, source, calibration.identity())
    return QuantizationInputs(plan, calibration, identity)


def quantize_checkpoint(
    checkpoint: Checkpoint, inputs: QuantizationInputs, out: Path, progress: Progress
) -> QuantizedCheckpoint:
    """Write the quantized checkpoint into `out`; one that is finished there is opened instead."""
    folder = _training_folder(out)
    quantized = finished_quantized(out, inputs.identity)
    if quantized is None:
        weights, reports = None, list[str]()
        shutil.rmtree(out / REPORTS, ignore_errors=True)  # left by an unfinished run
        if inputs.calibration is not None:
            from exporter.calibration.calibrate import calibrate, write_reports

            folder.mkdir(parents=True, exist_ok=True)  # `check_folder` accepts `out` by this folder
            result = calibrate(
                checkpoint, inputs.calibration, inputs.plan.schemes, folder, progress
            )
            weights = result.weights
            written = write_reports(out / REPORTS, result.reports)
            reports = [path.relative_to(out).as_posix() for path in written]
        counter = TensorCounter(progress, "quantize", len(inputs.plan.schemes))
        quantized = write_quantized(
            checkpoint, inputs.plan, inputs.identity, out, counter, weights, reports
        )
    shutil.rmtree(folder, ignore_errors=True)  # a killed run may have left it too
    return quantized


def join_distillation(checkpoint: Checkpoint, inputs: QuantizationInputs, out: Path) -> None:
    """Take part in a distillation as a process other than the first; writes no result."""
    calibration = inputs.calibration
    if calibration is None or calibration.method != "distill":
        return
    if not finished_quantized(out, inputs.identity):
        from exporter.calibration.calibrate import calibrate

        folder = _training_folder(out)
        calibrate(checkpoint, calibration, inputs.plan.schemes, folder, no_progress)


def _training_folder(out: Path) -> Path:
    """The folder of the training state, which a later run resumes from."""
    return out / f".{REPORTS}.tmp"
