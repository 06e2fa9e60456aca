"""Count the instructions that a model takes for a token: the result that `schema.json` describes.

Each figure is the difference of two runs, divided by the tokens that one of them has more.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices import runner
from devices.engines import Model, Plan
from devices.errors import BadDeviceError
from devices.files import sha256
from devices.instructions import tools
from devices.instructions.emulation import CLASSES, INSTRUCTIONS, Blocks, Run, emulated
from devices.instructions.symbols import Symbols, read_symbols
from devices.progress import Progress

SCHEMA_VERSION = 1
#: The format of the programs that the native runner runs.
_FORMAT = "executorch"
#: Decode steps of the two runs. The first steps of a process prepare what the later ones use.
_STEPS = (4, 12)
#: The function of code that lies in no file of the runner.
_ELSEWHERE = "code outside of the runner's files", False


@dataclass(frozen=True)
class Settings:
    """What is counted on each of `cpus`, as ``qemu-aarch64 -cpu help`` names them.

    `depths`: decode steps, with so many tokens in the cache before. `prompts`: what a prompt of the
    second length takes more than one of the first.
    """

    cpus: Sequence[str] = ("cortex-a76",)
    depths: Sequence[int] = (16,)
    prompts: Sequence[tuple[int, int]] = ((64, 128),)


def check_countable(model: Model) -> None:
    """Raise BadDeviceError for a model that the native runner does not run."""
    if model.format != _FORMAT:
        raise BadDeviceError(
            f"{model.folder}: {model.format}", "has no runner whose instructions can be counted",
            f"Give --target {_FORMAT}",
        )  # fmt: skip
    if not model.native:
        raise BadDeviceError(
            f"{model.folder}: the Core ML delegate",
            "is not in the native runner, the only one that can be counted",
            "Export with targets.0.delegate=xnnpack",
        )  # fmt: skip


def count(model: Model, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Count the instructions of one model on every CPU. Raises DeviceError."""
    check_countable(model)
    _check_lengths(model, settings)
    made = tools.build()
    known = tools.cpus(made)
    for cpu in settings.cpus:
        if cpu not in known:
            raise BadDeviceError(f"CPU {cpu}", "is not known to QEMU", f"Known: {', '.join(known)}")
    built = runner.build(tools.ARCHITECTURE)
    symbols = {path.resolve(): read_symbols(path) for path in (built.runner, *built.libraries)}
    runs = 2 * len(settings.cpus) * (len(settings.prompts) + len(settings.depths))
    numbers, counts = itertools.count(), list[dict[str, Any]]()
    for cpu in settings.cpus:
        with emulated(made, built, model, cpu) as run:

            def reported(plan: Plan, run: Run = run, cpu: str = cpu) -> Blocks:
                progress("count", next(numbers), runs, cpu)
                return run(plan)

            counts.append({"cpu": cpu, **_phases(reported, settings, symbols)})
    return {
        "result": "instructions",
        "schema_version": SCHEMA_VERSION,
        "target": model.format,
        "files": {name: sha256(model.folder / name) for name in model.files},
        "emulator": made.emulator,
        "runner": {"name": "executorch-native", "versions": {"executorch": built.executorch}},
        "context": model.context,
        "counts": counts,
    }


def _check_lengths(model: Model, settings: Settings) -> None:
    """Raise BadDeviceError for depths and prompts that do not fit into the context."""
    most = model.context - _STEPS[1]
    for depth in settings.depths:
        if not 0 <= depth <= most:
            raise BadDeviceError(
                f"depth {depth}", f"is not from 0 to {most}, which the context of {model.context} "
                f"tokens leaves for {_STEPS[1]} steps",
            )  # fmt: skip
    for shorter, longer in settings.prompts:
        if not 1 <= shorter < longer <= model.context:
            raise BadDeviceError(
                f"prompts {shorter}:{longer}", "are not a shorter and a longer length from 1 "
                f"to {model.context}, the context",
            )  # fmt: skip


def _phases(run: Run, settings: Settings, symbols: Mapping[Path, Symbols]) -> dict[str, Any]:
    """The figures of one CPU."""

    def difference(fewer: Plan, more: Plan, tokens: int) -> dict[str, Any]:
        return _per_token(run(fewer), run(more), tokens, symbols)

    few, many = _STEPS
    return {
        "prefill": [
            {
                "from": shorter, "to": longer,
                **difference(Plan(prompts=[shorter]), Plan(prompts=[longer]), longer - shorter),
            }
            for shorter, longer in settings.prompts
        ],
        "decode": [
            {
                "depth": depth,
                **difference(
                    Plan(depths=[depth], steps=few), Plan(depths=[depth], steps=many), many - few
                ),
            }
            for depth in settings.depths
        ],
    }  # fmt: skip


def _per_token(
    fewer: Blocks, more: Blocks, tokens: int, symbols: Mapping[Path, Symbols]
) -> dict[str, Any]:
    """What `more` has over `fewer`, for each of the tokens that it has over it."""
    more = more.copy()
    more.subtract(fewer)
    kinds, functions = Counter[str](), Counter[tuple[str, str, bool]]()
    for (file, offset, kind), number in more.items():
        kinds[kind] += number
        if number and kind == INSTRUCTIONS:
            path = Path(file)
            name, near = symbols[path].function(offset) if path in symbols else _ELSEWHERE
            functions[path.name, name, near] += number
    return {
        "per_token": kinds[INSTRUCTIONS] / tokens,
        "classes": {kind: kinds[kind] / tokens for kind in CLASSES},
        "functions": [
            {"function": name, "library": library, "near": near, "per_token": number / tokens}
            for (library, name, near), number in sorted(
                functions.items(), key=lambda row: (-row[1], row[0])
            )
            if number
        ],
    }
