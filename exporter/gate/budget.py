"""The budget of a gate: a YAML file with limits by target and device, and the tolerances against a
baseline. `docs/gate.md` describes every key.

mobilellm gate BUNDLE --budget budget.yaml
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from devices.instructions import COUNT
from exporter.backends import names
from exporter.errors import InputError, short
from exporter.foreign import read_bytes
from exporter.gate.figure import MEMORY, UNDELEGATED, counted, decode, on_data, prefill
from exporter.gate.quantities import (
    Bound,
    Fewest,
    Instructions,
    LeastShare,
    Most,
    Size,
    Speed,
    Time,
    Tolerance,
    Whole,
)
from exporter.settings import Section, Sha256, parse_section, refusal
from exporter.yaml_reader import YAML_BYTES, parse_yaml


def _check_names(found: dict[str, "TargetLimits"]) -> dict[str, "TargetLimits"]:
    for name in found:
        if name not in names():
            raise refusal(f"{short(name)} is not a target", f"Known: {', '.join(names())}", name)
    return found


def _check_places(found: dict[int, Bound]) -> dict[int, Bound]:
    for place in found:
        if place < 0:
            raise refusal(f"{place} is not a number of tokens", "Give 0 or more", str(place))
    return found


_Speeds = Annotated[dict[int, Speed], AfterValidator(_check_places)]
_Counts = Annotated[dict[int, Instructions], AfterValidator(_check_places)]


class BundleLimits(Section):
    """Sizes of the whole bundle: of all its files, and of the archive."""

    size: Size | None = None
    archive: Size | None = None


class DataLimits(Section):
    """Quality on one data file. `sha256` is the file's own; `tokens` and `problems` are the fewest
    that must have been scored."""

    sha256: Sha256 = ""
    tokens: Fewest | None = None
    problems: Fewest | None = None
    perplexity: Most | None = None
    kl: Most | None = None
    top1_agreement: LeastShare | None = None
    accuracy: LeastShare | None = None


class DeviceLimits(Section):
    """Speed, memory and delegation on one device. `prefill` maps the tokens of a prompt, `decode`
    the tokens in the cache, to a time or a rate."""

    load: Time | None = None
    prefill: _Speeds = Field(default_factory=dict)
    decode: _Speeds = Field(default_factory=dict)
    memory: Size | None = None
    undelegated: Whole | None = None


class CpuLimits(Section):
    """Instructions for each token on one CPU: `prefill` by the end of the counted range, `decode`
    by the tokens in the cache."""

    prefill: _Counts = Field(default_factory=dict)
    decode: _Counts = Field(default_factory=dict)


class QuantizedLimits(Section):
    """Limits on the quantized checkpoint. Quality is that in torch, before any lowering."""

    size: Size | None = None
    quality: dict[str, DataLimits] = Field(default_factory=dict)


class TargetLimits(Section):
    """Limits on one artifact. `file` is the model, `folder` everything that is deployed."""

    file: Size | None = None
    folder: Size | None = None
    quality: dict[str, DataLimits] = Field(default_factory=dict)
    devices: dict[str, DeviceLimits] = Field(default_factory=dict)
    instructions: dict[str, CpuLimits] = Field(default_factory=dict)


class Tolerances(Section):
    """How much worse than the baseline a figure may be: relative, but for `top1_agreement` and
    `accuracy`, which are shares and may fall by so much."""

    size: Tolerance = 0.01
    perplexity: Tolerance = 0.01
    kl: Tolerance = 0.1
    top1_agreement: Tolerance = 0.005
    accuracy: Tolerance = 0.01
    latency: Tolerance = 0.05
    memory: Tolerance = 0.05
    instructions: Tolerance = 0.01


class Budget(Section):
    """All limits, and the tolerances of a comparison with a baseline."""

    bundle: BundleLimits = BundleLimits()
    quantized: QuantizedLimits = QuantizedLimits()
    targets: Annotated[dict[str, TargetLimits], AfterValidator(_check_names)] = Field(
        default_factory=dict
    )
    baseline: Tolerances = Tolerances()


@dataclass(frozen=True)
class Limit:
    """One limit: the figure that it is on, by name, target and device, and its bound.

    `device` is a CPU where instructions are counted. `command` measures the figure of BUNDLE.
    `sha256` is that of the data file, '' for any.
    """

    name: str
    target: str | None
    device: str | None
    bound: Bound
    command: str
    sha256: str = ""


def read_budget(path: Path) -> Budget:
    """Read a budget. Raises InputError."""
    raw = parse_yaml(read_bytes(path, YAML_BYTES), path, "Correct the file")
    if not isinstance(raw, dict):
        raise InputError(path, "does not hold a mapping of keys", "docs/gate.md has an example")
    return parse_section(Budget, raw, str(path))


def limits(budget: Budget) -> list[Limit]:
    """All limits of a budget, in its order."""
    found = _named({"bundle": budget.bundle.size}, command="mobilellm export")
    pack = "mobilellm package BUNDLE -o NAME.tar.zst, then gate that file"
    found += _named({"archive": budget.bundle.archive}, command=pack)
    found += _named({"quantized checkpoint": budget.quantized.size}, command="mobilellm export")
    found += _quality(budget.quantized.quality, None)
    for target, wanted in budget.targets.items():
        sizes = {"file": wanted.file, "folder": wanted.folder}
        found += _named(sizes, target, command=f"mobilellm export … --target {target}")
        found += _quality(wanted.quality, target)
        for device, on in wanted.devices.items():
            found += _on_device(on, target, device)
        for cpu, counts in wanted.instructions.items():
            found += _on_cpu(counts, target, cpu)
    return found


def _quality(quality: Mapping[str, DataLimits], target: str | None) -> list[Limit]:
    model = f"BUNDLE --target {target}" if target else "BUNDLE/quantized"
    found = list[Limit]()
    for data, wanted in quality.items():
        for key in DataLimits.model_fields:
            if key != "sha256":
                option = "--task" if key in ("problems", "accuracy") else "--data"
                command = f"mobilellm evaluate {model} {option} {data}"
                command += " --reference CHECKPOINT" if key in ("kl", "top1_agreement") else ""
                bounds = {on_data(key, data): getattr(wanted, key)}
                found += _named(bounds, target, None, f"{command} -o FILE", wanted.sha256)
    return found


def _on_device(wanted: DeviceLimits, target: str, device: str) -> list[Limit]:
    bounds: dict[str, Bound | None] = {"load": wanted.load}
    bounds |= {prefill(tokens): bound for tokens, bound in wanted.prefill.items()}
    bounds |= {decode(depth): bound for depth, bound in wanted.decode.items()}
    bounds |= {MEMORY: wanted.memory, UNDELEGATED: wanted.undelegated}
    lists = {"prompt_lengths": wanted.prefill, "depths": wanted.decode}
    options = [f"{key}={[*places]}".replace(" ", "") for key, places in lists.items() if places]
    command = f"mobilellm profile BUNDLE --target {target} --device {device}"
    return _named(bounds, target, device, " ".join([command, *options, "-o FILE"]))


def _on_cpu(wanted: CpuLimits, target: str, cpu: str) -> list[Limit]:
    bounds = {counted(prefill(tokens)): bound for tokens, bound in wanted.prefill.items()}
    bounds |= {counted(decode(depth)): bound for depth, bound in wanted.decode.items()}
    lists = {"prompt_lengths": wanted.prefill, "depths": wanted.decode}
    options = [f"{key}={[*places]}".replace(" ", "") for key, places in lists.items()]
    command = f"mobilellm profile BUNDLE --target {target} --device {COUNT}:{cpu}"
    return _named(bounds, target, cpu, " ".join([command, *options, "-o FILE"]))


def _named(
    bounds: Mapping[str, Bound | None],
    target: str | None = None,
    device: str | None = None,
    command: str = "",
    sha256: str = "",
) -> list[Limit]:
    """A limit for each bound that is set."""
    return [
        Limit(name, target, device, bound, command, sha256)
        for name, bound in bounds.items()
        if bound is not None
    ]
