"""Instructions that an Arm CPU executes for each token of a bundle's artifact.

mobilellm count BUNDLE --cpu cortex-a76 -o a76.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices.engines import Model
from devices.errors import DeviceError
from devices.files import check_replaceable, write_json
from devices.instructions import validate
from devices.instructions.counter import Settings, check_countable
from devices.instructions.counter import count as count_model
from exporter import profiling
from exporter.bundle.archive import opened
from exporter.bundle.bundle import Bundle, open_bundle
from exporter.errors import InputError
from exporter.progress import Progress


@dataclass(frozen=True)
class Request:
    """The options of the command line.

    `target` is None for the first artifact that can be counted; `prompts` are pairs of lengths such
    as ``64:128``. What is empty has the default of `Settings`.
    """

    target: str | None = None
    cpus: Sequence[str] = ()
    depths: Sequence[int] = ()
    prompts: Sequence[str] = ()
    output: Path | None = None


def count(path: Path, request: Request, progress: Progress) -> dict[str, Any]:
    """Count for one artifact of a bundle. Returns the content of a measurement, which
    `devices/instructions/schema.json` describes. Raises InputError."""
    default = Settings()
    settings = Settings(
        tuple(dict.fromkeys(request.cpus or default.cpus)),
        tuple(dict.fromkeys(request.depths or default.depths)),
        tuple(dict.fromkeys(map(_lengths, request.prompts))) or default.prompts,
    )
    if request.output is not None:
        check_replaceable(request.output)
    with opened(path) as folder:
        try:
            made = count_model(_model(open_bundle(folder), request.target), settings, progress)
            validate(made)
        except DeviceError as error:
            raise InputError(error.subject, error.problem, error.remedy) from error
    if request.output is not None:
        write_json(request.output, made)
    return made


def _model(bundle: Bundle, target: str | None) -> Model:
    """The first artifact that can be counted, or that of the target. Raises InputError, and
    DeviceError where there is none."""
    refused: DeviceError | None = None
    for finished in profiling.chosen(bundle, [] if target is None else [target]):
        model = profiling.job(bundle, finished, profiling.Request(devices=())).model
        try:
            check_countable(model)
        except DeviceError as error:
            refused = refused or error
        else:
            return model
    assert refused is not None  # a bundle has an artifact
    raise refused


def _lengths(text: str) -> tuple[int, int]:
    """The two lengths of ``64:128``; `Settings` says which there may be. Raises InputError."""
    shorter, _, longer = text.partition(":")
    if not (_is_length(shorter) and _is_length(longer)):
        raise InputError(f"--prompt {text}", "is not two lengths in tokens", "Give such as 64:128")
    return int(shorter), int(longer)


def _is_length(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
