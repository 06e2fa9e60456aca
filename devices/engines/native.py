"""ExecuTorch through our own C++ runner: for programs of core operators and delegates."""

from devices import runner
from devices.engines import Engine, Model, Plan, options, read_records
from devices.errors import BadDeviceError
from devices.identity import Identity


def engine(model: Model, identity: Identity, workspace: str, place: str) -> Engine:
    """`place` is the model's folder on the device. Raises BadDeviceError."""
    if not model.portable:
        raise BadDeviceError(
            f"{model.folder}: custom_sdpa", "needs ExecuTorch's official runner on this device",
            "Export with targets.0.attention=portable, or give --runner llama_main",
        )  # fmt: skip
    built = runner.build(identity.machine)
    home = f"{workspace}/{built.folder.name}"
    libraries = {f"{home}/lib/{path.name}": path for path in built.libraries}
    loader = [f"{home}/lib/{built.loader}", "--library-path", f"{home}/lib"]

    def commands(plan: Plan) -> list[list[str]]:
        files = ["--model", f"{place}/{model.main}", "--tokens", f"{place}/tokens.txt"]
        return [[*loader, f"{home}/{runner.RUNNER}", *files, *options(plan)]]

    return Engine(
        name="executorch-native",
        versions={"executorch": built.executorch},
        files={f"{home}/{runner.RUNNER}": built.runner, **libraries},
        commands=commands,
        records=read_records,
        can=frozenset({"sustained", "trace", "generate"}),
    )
