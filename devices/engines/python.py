"""Runtimes with a Python package on the device: ONNX Runtime, Core ML, and on this machine
ExecuTorch with its custom operators."""

import sys
from pathlib import Path

from devices.engines import Engine, Model, Plan, options, read_records
from devices.transports import Device
from devices.transports.supervised import Completed

_RUNTIMES = {"onnx": "onnxruntime", "executorch": "executorch", "coreml": "coreml"}
_WHEELS = {"onnx": "onnxruntime", "executorch": "executorch", "coreml": "coremltools"}


def interpreter(device: Device) -> str:
    """The Python interpreter of the device: on this machine the one that runs now."""
    return sys.executable if device.transport in ("host", "mac") else "python3"


def version_command(model: Model, device: Device) -> list[str]:
    """A command that prints the version of the runtime's wheel on the device."""
    script = "import sys; from importlib import metadata; print(metadata.version(sys.argv[1]))"
    return [interpreter(device), "-c", script, _WHEELS[model.format]]


def read_version(model: Model, done: Completed) -> dict[str, str]:
    """Wheel → version, from the output of `version_command`.

    Raises CommandFailedError where the wheel is not installed there.
    """
    return {
        _WHEELS[model.format]: done.check(f"{_WHEELS[model.format]} on the device").text.strip()
    }


def engine(
    model: Model, device: Device, workspace: str, folder: str, versions: dict[str, str]
) -> Engine:
    """The engine for a model that lies in `folder` on the device."""
    script = Path(__file__).with_name("python_runner.py")
    remote = f"{workspace}/{script.name}"
    command = [interpreter(device), remote, "--engine", _RUNTIMES[model.format]]

    def commands(plan: Plan) -> list[list[str]]:
        files = ["--model", f"{folder}/{model.main}", "--tokens", f"{folder}/tokens.txt"]
        return [[*command, *files, *options(plan)]]

    return Engine(
        name=f"{_RUNTIMES[model.format]}-python",
        versions=versions,
        files={remote: script},
        commands=commands,
        records=read_records,
        capabilities=frozenset({"sustained", "trace", "generate"}),
    )
