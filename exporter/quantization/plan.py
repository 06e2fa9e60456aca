"""The quantization plan: the scheme of each tensor of a checkpoint."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from exporter.errors import InputError
from exporter.model.config import EMBEDDING
from exporter.quantization.schemes import FLOAT, Scheme


@dataclass(frozen=True)
class QuantizationPlan:
    """The rounding method, the scheme of every tensor, and the reason for each tensor in float."""

    method: str
    schemes: Mapping[str, Scheme]
    reasons: Mapping[str, str]


def plan_schemes(
    shapes: Mapping[str, tuple[int, ...]],
    linear: Scheme,
    embedding: Scheme,
    overrides: Mapping[str, Scheme],
    method: str,
) -> QuantizationPlan:
    """Choose the scheme of each tensor; the last override whose pattern matches wins.

    Raises InputError for a pattern that matches no tensor, and for a scheme that cannot store a
    tensor of this shape.
    """
    schemes, reasons = dict[str, Scheme](), dict[str, str]()
    for name, shape in shapes.items():
        if len(shape) != 2:
            schemes[name], reasons[name] = FLOAT, "a normalization weight, one vector"
        else:
            schemes[name] = embedding if name == EMBEDDING else linear
    for pattern, scheme in overrides.items():
        matched = [name for name in shapes if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(
                f"quantization.overrides: {pattern}",
                "matches no tensor of this checkpoint",
                f"Names look like {next(n for n in shapes if n.endswith('q_proj.weight'))}",
            )
        schemes |= dict.fromkeys(matched, scheme)
    for name, shape in shapes.items():
        problem = schemes[name].problem_with(shape)
        if problem:
            raise InputError(
                f"quantization of {name}", problem, "Choose another scheme for it with an override"
            )
        if schemes[name] == FLOAT:
            reasons.setdefault(name, "the recipe keeps it in float")
    return QuantizationPlan(method, schemes, reasons)
