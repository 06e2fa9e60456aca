"""Checkpoint → quantized checkpoint: its plan, its calibration where there is one, its file.

What rounds or calibrates is imported where a recipe asks for it: that takes its time.
"""

import shutil
from collections.abc import Mapping
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
from exporter.quantization.settings import Quantization

if TYPE_CHECKING:
    from exporter.calibration.calibrate import CalibrationInputs


def quantization_plan(quantization: Quantization, checkpoint: Checkpoint) -> QuantizationPlan:
    """How the section stores each tensor of the checkpoint. Raises InputError."""
    linear, embedding, overrides = quantization.schemes()
    shapes = checkpoint.config.parameter_shapes()
    return plan_schemes(shapes, linear, embedding, overrides, quantization.method)


@dataclass(frozen=True)
class QuantizationInputs:
    """Everything that decides a quantized checkpoint, known before any weight is rounded.

    `plan` includes what a budget has widened; `identity` is what the manifest says of it all.
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
    """The plan and, where the recipe calibrates, the text and what a budget allows.

    `source` has the hashes of the checkpoint's files (`source_hashes`). Raises InputError.
    """
    if not quantization.calibrated:
        return QuantizationInputs(plan, None, quantized_identity(checkpoint, plan, source))
    from exporter.calibration.calibrate import calibration_inputs
    from exporter.calibration.sensitivity import WIDER

    calibration = calibration_inputs(
        checkpoint, quantization, settings, plan.schemes, source, progress
    )
    schemes = {**plan.schemes, **dict.fromkeys(calibration.wider, WIDER)}
    plan = replace(plan, schemes=schemes)
    identity = quantized_identity(checkpoint, plan, source, calibration.identity())
    return QuantizationInputs(plan, calibration, identity)


def quantize_checkpoint(
    checkpoint: Checkpoint, inputs: QuantizationInputs, out: Path, progress: Progress
) -> QuantizedCheckpoint:
    """The quantized checkpoint in `out`: the finished one that is there, or a new one."""
    folder = _training_folder(out)
    quantized = finished_quantized(out, inputs.identity)
    if quantized is None:
        weights, reports = None, list[str]()
        shutil.rmtree(out / REPORTS, ignore_errors=True)  # of an unfinished run
        if inputs.calibration is not None:
            from exporter.calibration.calibrate import calibrate, write_reports

            folder.mkdir(parents=True, exist_ok=True)  # marks `out` as ours until weights do
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
    shutil.rmtree(folder, ignore_errors=True)  # also what a run left that was killed just here
    return quantized


def join_distillation(checkpoint: Checkpoint, inputs: QuantizationInputs, out: Path) -> None:
    """What a process of ``torchrun`` does that is not the first: its part of a distillation."""
    calibration = inputs.calibration
    if calibration is None or calibration.method != "distill":
        return
    if not finished_quantized(out, inputs.identity):
        from exporter.calibration.calibrate import calibrate

        folder = _training_folder(out)
        calibrate(checkpoint, calibration, inputs.plan.schemes, folder, no_progress)


def _training_folder(out: Path) -> Path:
    """What a killed distillation has reached lies here, until it is finished."""
    return out / f".{REPORTS}.tmp"
