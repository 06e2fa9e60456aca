"""The codes and scales of an artifact are those of the quantized checkpoint, bit for bit."""

from collections.abc import Callable

import torch
from torch import Tensor

from exporter.backends import backend
from exporter.bundle.artifact import FinishedArtifact
from exporter.errors import InputError
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor
from exporter.verification.checks import Check


def check_integers(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, on_tensor: Callable[[str], None]
) -> list[Check]:
    """Compare the artifact's codes and scales with the quantized checkpoint's, bit for bit."""
    artifact = finished.artifact
    target = artifact.target.target
    checks, seen = list[Check](), set[str]()
    stored: tuple[str, QuantizedTensor | Tensor] | None = None
    try:
        for name, place, weight in backend(target).weights(artifact, quantized):
            seen.add(name)
            if stored is None or stored[0] != name:  # all copies of a weight are consecutive
                stored = name, quantized.read(name)
            count, note = differences(
                stored[1], weight, ("the quantized checkpoint", "the artifact")
            )
            subject = f"{name} ({place})"
            checks.append(Check("integers", target, subject, count == 0, count, 0, note))
            on_tensor(name)
    except InputError as error:
        checks.append(Check("integers", target, error.subject, False, 1, 0, error.problem))
    except Exception as error:  # a toolkit's parser may raise anything for a damaged file
        note = f"cannot be read ({type(error).__name__}: {error})"
        checks.append(Check("integers", target, str(artifact.path), False, 1, 0, note))
    for name in quantized.schemes:
        if name not in seen:
            checks.append(Check("integers", target, name, False, 1, 0, "is not in the artifact"))
    return checks


def differences(
    expected: QuantizedTensor | Tensor, actual: QuantizedTensor | Tensor, names: tuple[str, str]
) -> tuple[int, str]:
    """The number of values that differ, and a note with the place of the first.

    `names` are those of the two models in the note, the expected one first.
    """
    if isinstance(expected, QuantizedTensor) and isinstance(actual, QuantizedTensor):
        parts = {"code": (expected.codes, actual.codes), "scale": (expected.scales, actual.scales)}
    elif isinstance(expected, Tensor) and isinstance(actual, Tensor):
        parts = {"value": (expected.to(torch.float32), actual.to(torch.float32))}
    else:
        return 1, "one is quantized, the other is not"
    total, notes = 0, list[str]()
    for kind, (wanted, got) in parts.items():
        if wanted.shape != got.shape:
            return 1, f"{kind}s have shape {list(got.shape)}, not {list(wanted.shape)}"
        # As bits, NaN equals itself and 0.0 differs from -0.0.
        different = _bits(wanted) != _bits(got)
        count = int(different.sum())
        if count:
            first = tuple(different.nonzero()[0].tolist())
            notes.append(
                f"{count} {kind}s differ; at {list(first)} {names[1]} has "
                f"{got[first].item():g}, {names[0]} {wanted[first].item():g}"
            )
        total += count
    return total, "; ".join(notes)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32) if x.dtype == torch.float32 else x
