"""Count what a model takes for a token, instructions and bytes: the result that `schema.json`
describes.

Each figure is the difference of two runs, divided by the tokens that one of them has more.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from devices import runner
from devices.engines import Model, Plan
from devices.errors import BadDeviceError
from devices.files import sha256
from devices.instructions import tools
from devices.instructions.emulation import (
    CLASSES,
    INSTRUCTIONS,
    LOADED,
    STORED,
    UNSIZED,
    Blocks,
    Run,
    emulated,
)
from devices.instructions.symbols import Symbols, read_symbols
from devices.progress import Progress

SCHEMA_VERSION = 2
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
    second length takes more than one of the first. `timeout` is the limit of one run in seconds.
    """

    cpus: Sequence[str] = ("cortex-a76",)
    depths: Sequence[int] = (16,)
    prompts: Sequence[tuple[int, int]] = ((64, 128),)
    timeout: float = 3600.0


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


def check_cpus(cpus: Sequence[str]) -> tools.Tools:
    """The tools, once all that counting needs is there and QEMU knows these CPUs. Raises
    BadDeviceError."""
    made = tools.build()
    tools.binutil("nm")
    known = tools.cpus()
    for cpu in cpus:
        if cpu not in known:
            raise BadDeviceError(f"CPU {cpu}", "is not known to QEMU", f"Known: {', '.join(known)}")
    return made


def count(model: Model, settings: Settings, progress: Progress) -> dict[str, Any]:
    """Count for one model on every CPU. Raises DeviceError."""
    check_countable(model)
    _check_lengths(model, settings)
    made = check_cpus(settings.cpus)
    built = runner.build(tools.ARCHITECTURE)
    symbols = {path.resolve(): read_symbols(path) for path in (built.runner, *built.libraries)}
    runs = 2 * len(settings.cpus) * (len(settings.prompts) + len(settings.depths))
    numbers, counts = itertools.count(), list[dict[str, Any]]()
    for cpu in settings.cpus:
        with emulated(made, built, model, cpu, settings.timeout) as run:

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


def deepest(context: int) -> int:
    """The greatest depth at which decoding can be counted in a cache of `context` tokens."""
    return context - _STEPS[1]


def _check_lengths(model: Model, settings: Settings) -> None:
    """Raise BadDeviceError for depths and prompts that do not fit into the context."""
    most = deepest(model.context)
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
    return figure(more, tokens, symbols)


def figure(executed: Blocks, tokens: int, symbols: Mapping[Path, Symbols]) -> dict[str, Any]:
    """What was executed as `schema.json` has it, for each of so many tokens. `symbols` has those
    of the files whose functions are told apart."""

    @cache  # a block has a number for each column
    def function(file: str, offset: int) -> tuple[str, str, bool]:
        path = Path(file)
        name, near = symbols[path].function(offset) if path in symbols else _ELSEWHERE
        return path.name, name, near

    columns, functions = Counter[str](), dict[tuple[str, str, bool], Counter[str]]()
    for (file, offset, column), number in executed.items():
        columns[column] += number
        if number:
            functions.setdefault(function(file, offset), Counter())[column] += number
    listed = sorted(functions.items(), key=lambda row: (-row[1][INSTRUCTIONS], row[0]))
    return {
        "per_token": columns[INSTRUCTIONS] / tokens,
        "classes": {kind: columns[kind] / tokens for kind in CLASSES},
        "bytes": {kind: columns[kind] / tokens for kind in (LOADED, STORED, UNSIZED)},
        "functions": [
            {
                "function": name, "library": library, "near": near,
                "per_token": of[INSTRUCTIONS] / tokens,
                LOADED: of[LOADED] / tokens, STORED: of[STORED] / tokens,
            }
            for (library, name, near), of in listed
            if of[INSTRUCTIONS]
        ],
    }  # fmt: skip
