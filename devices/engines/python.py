"""Runtimes with a Python package on the device: ONNX Runtime, Core ML, and on this machine
ExecuTorch with its custom operators."""

import sys
from pathlib import Path

from devices.answers import contained
from devices.engines import Command, Engine, Model, Plan, options
from devices.engines.records import read_records
from devices.text import printable
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


@contained("device", "the version of its runtime")
def read_version(model: Model, done: Completed) -> dict[str, str]:
    """Wheel → version, from the output of `version_command`.

    Raises CommandFailedError where the wheel is not installed there.
    """
    wheel = _WHEELS[model.format]
    return {wheel: printable(done.check(f"{wheel} on the device").text.strip(), 60)}


def engine(
    model: Model, device: Device, workspace: str, folder: str, versions: dict[str, str]
) -> Engine:
    """The engine for a model that lies in `folder` on the device."""
    script = Path(__file__).with_name("python_runner.py")
    remote = f"{workspace}/{script.name}"
    command = [interpreter(device), remote, "--engine", _RUNTIMES[model.format]]

    def commands(plan: Plan) -> list[Command]:
        files = ["--model", f"{folder}/{model.main}", "--tokens", f"{folder}/tokens.txt"]
        return [Command([*command, *files, *options(plan)], read_records)]

    return Engine(
        name=f"{_RUNTIMES[model.format]}-python",
        versions=versions,
        files={remote: script},
        commands=commands,
        capabilities=frozenset({"sustained", "trace", "generate"}),
    )
