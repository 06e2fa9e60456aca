"""ExecuTorch with our own C++ runner, for programs with the XNNPACK delegate."""

from devices import runner
from devices.engines import Command, Engine, Model, Plan, options
from devices.engines.records import read_records
from devices.errors import BadDeviceError
from devices.identity import Identity


def engine(model: Model, identity: Identity, workspace: str, folder: str) -> Engine:
    """The engine for a model that lies in `folder` on the device.

    Raises BadDeviceError where the program has another delegate, or the runner cannot be built.
    """
    if not model.native:
        raise BadDeviceError(
            f"{model.folder}: the Core ML delegate", "is not in the native runner",
            "Export with targets.0.delegate=xnnpack",
        )  # fmt: skip
    built = runner.build(identity.machine)
    home = f"{workspace}/{built.folder.name}"
    libraries = {f"{home}/lib/{path.name}": path for path in built.libraries}
    loader = [f"{home}/lib/{built.loader}", "--library-path", f"{home}/lib"]

    def commands(plan: Plan) -> list[Command]:
        files = ["--model", f"{folder}/{model.main}", "--tokens", f"{folder}/tokens.txt"]
        packed = ["--packed-cache", f"{folder}/packed"] if plan.packed_cache else []
        command = [*loader, f"{home}/{runner.RUNNER}", *files, *packed, *options(plan)]
        return [Command(command, read_records)]

    return Engine(
        name="executorch-native",
        versions={"executorch": built.executorch},
        files={f"{home}/{runner.RUNNER}": built.runner, **libraries},
        commands=commands,
        capabilities=frozenset({"sustained", "trace", "generate", "mmap", "packed_cache"}),
    )
