"""Counts of a bundle's artifacts on emulated Arm CPUs: the devices ``count:CPU`` of a profile.

mobilellm profile BUNDLE --device count:cortex-a76
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from devices.engines import Model
from devices.errors import BadDeviceError, DeviceError
from devices.instructions import counter, parse_cpu
from devices.session_state import PHASE_NAMES
from devices.session_state import Settings as ProfileSettings
from exporter.progress import Progress


@dataclass(frozen=True)
class Counts:
    """What was counted (`devices/instructions/schema.json`), and what was not, as
    `devices/schema.json` has both."""

    counted: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)


def split_devices(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The CPUs of the devices ``count:CPU``, and the names of the others. Raises DeviceError."""
    cpus, others = list[str](), list[str]()
    for name in dict.fromkeys(names):
        cpu = parse_cpu(name)
        others.append(name) if cpu is None else cpus.append(cpu)
    return cpus, others


def check(cpus: Sequence[str], models: Sequence[Model], *, alone: bool) -> None:
    """Raise DeviceError where a program that counting needs is missing, for an unknown CPU, and if
    nothing else is measured (`alone`), where no model can be counted."""
    if not cpus:
        return
    counter.check_cpus(cpus)
    refusals = [refusal for refusal in map(_refusal, models) if refusal is not None]
    if alone and len(refusals) == len(models):
        raise refusals[0]


def count(
    cpus: Sequence[str], models: Sequence[Model], settings: ProfileSettings, progress: Progress
) -> Counts:
    """Count every model that can be on every CPU. A model that fails does not affect the others."""
    found = Counts()
    for model in models if cpus else ():
        status = "skipped"
        try:
            if (refusal := _refusal(model)) is not None:
                raise refusal
            wanted, not_counted = _lengths(model, cpus, settings)
            status = "failed"
            made = counter.count(model, wanted, progress)
        except DeviceError as error:
            found.left_out.append(
                {"target": model.format, "status": status, "problem": str(error)[:2000]}
            )
        else:
            found.counted.append({**made, "not_counted": not_counted})
    return found


def _refusal(model: Model) -> DeviceError | None:
    try:
        counter.check_countable(model)
    except DeviceError as error:
        return error
    return None


def _lengths(
    model: Model, cpus: Sequence[str], settings: ProfileSettings
) -> tuple[counter.Settings, dict[str, str]]:
    """What is counted in the model's context, and why the rest is not. A prompt is counted against
    one of half its length. Raises BadDeviceError where nothing is left."""
    context, not_counted = model.context, dict[str, str]()
    prompts, depths = list[tuple[int, int]](), list[int]()
    for length in dict.fromkeys(settings.prompt_lengths):
        if 1 < length <= context:
            prompts.append((length // 2, length))
        else:
            not_counted[PHASE_NAMES["prefill"].format(length)] = (
                f"the context is {context}" if length > 1 else "no prompt is shorter"
            )
    for depth in dict.fromkeys(settings.depths):
        if depth <= counter.deepest(context):
            depths.append(depth)
        else:
            not_counted[PHASE_NAMES["decode"].format(depth)] = f"the context is {context}"
    if not prompts and not depths:
        raise BadDeviceError(
            f"{model.folder}: context {context}", "has room for none of the prompts and depths",
            "Give shorter ones, such as depths=[16]",
        )  # fmt: skip
    return counter.Settings(cpus, depths, prompts, settings.timeout), not_counted
