"""Runtimes with a Python package on the device: ONNX Runtime, llama.cpp, MLX, Core ML, and on this
machine ExecuTorch with its custom operators."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devices.answers import contained
from devices.engines import Command, Engine, Format, Model, Plan, options
from devices.engines.records import read_records
from devices.errors import CommandFailedError
from devices.text import printable
from devices.transports import Device
from devices.transports.supervised import Completed


@dataclass(frozen=True)
class _Runtime:
    """The `name` of a runtime for ``python_runner.py``, and the wheels that it needs.

    `capabilities` are those of `Engine` besides "sustained" and "generate", which all have. The
    runtime reads `beside` in the folder of the model. With `threads`, it computes with so many,
    whatever it is asked for.
    """

    name: str
    wheels: tuple[str, ...]
    capabilities: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()
    threads: int | None = None
    note: str = ""


_TRACES = frozenset({"trace"})
_RUNTIMES: Mapping[Format, _Runtime] = {
    "onnx": _Runtime("onnxruntime", ("onnxruntime",), _TRACES),
    "executorch": _Runtime("executorch", ("executorch",), _TRACES),
    "coreml": _Runtime("coreml", ("coremltools",), _TRACES),
    "gguf": _Runtime(
        "llama_cpp", ("llama-cpp-python",), frozenset({"mmap"}),
        note="llama.cpp's defaults, but on a CPU with AMX the weights are not repacked for it",
    ),
    "mlx": _Runtime(
        "mlx", ("mlx", "mlx-lm"), beside=("config.json",), threads=1,
        note="MLX's default device: the GPU of a Mac, elsewhere the CPU with one thread, which is "
        "slow where it computes float16 on a processor of Intel or AMD",
    ),
}  # fmt: skip


def interpreter(device: Device) -> str:
    """The Python interpreter of the device: on this machine the one that runs now."""
    return sys.executable if device.transport in ("host", "mac") else "python3"


def version_command(model: Model, device: Device) -> list[str]:
    """A command that prints the versions of the runtime's wheels on the device, one a line."""
    script = (
        "import sys; from importlib import metadata; "
        "print(*map(metadata.version, sys.argv[1:]), sep='\\n')"
    )
    return [interpreter(device), "-c", script, *_RUNTIMES[model.format].wheels]


@contained("device", "the versions of its runtime")
def read_versions(model: Model, done: Completed) -> dict[str, str]:
    """Wheel → version, from the output of `version_command`.

    Raises CommandFailedError where a wheel is not installed there.
    """
    wheels = _RUNTIMES[model.format].wheels
    try:
        lines = done.check(f"{' and '.join(wheels)} on the device").text.split()
    except CommandFailedError as error:
        remedy = f"Install it there: {done.argv[0]} -m pip install {' '.join(wheels)}"
        raise CommandFailedError(error.subject, error.problem, remedy) from error
    versions = [printable(line, 60) for line in lines]
    return dict(zip(wheels, versions, strict=True))


def engine(
    model: Model, device: Device, workspace: str, folder: str, versions: dict[str, str]
) -> Engine:
    """The engine for a model that lies in `folder` on the device."""
    runtime = _RUNTIMES[model.format]
    here = Path(__file__)
    scripts = [here.with_name(f"python_{name}.py") for name in ("runner", runtime.name)]
    remote = [f"{workspace}/{script.name}" for script in scripts]
    command = [interpreter(device), remote[0], "--engine", runtime.name]
    command += ["--context", str(model.context)]

    def commands(plan: Plan) -> list[Command]:
        files = ["--model", f"{folder}/{model.main}", "--tokens", f"{folder}/tokens.txt"]
        return [Command([*command, *files, *options(plan)], read_records)]

    beside = {f"{folder}/{name}": model.folder / name for name in runtime.beside}
    return Engine(
        name=f"{runtime.name}-python",
        versions=versions,
        files=dict(zip(remote, scripts, strict=True)) | beside,
        commands=commands,
        capabilities=frozenset({"sustained", "generate"}) | runtime.capabilities,
        threads=runtime.threads,
        note=runtime.note,
    )
