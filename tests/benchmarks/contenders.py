"""The programs that run an artifact on this machine, one process each, on one core.

What the benchmarks `against_llama_cpp.py` and `depth.py` share. The processes are those of
``mobilellm profile``: the native runner, ``python_runner.py`` and ``llama-bench``.
"""

import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata, util
from pathlib import Path

from devices import runner
from devices.engines import Command, Engine, Model, Plan, native, python
from devices.engines.llama_bench import bench_commands
from devices.engines.placed import Placed
from devices.engines.python_llama_cpp import has_amx
from devices.engines.records import Record
from devices.errors import BadDeviceError, DeviceError
from devices.identity import Identity
from devices.transports import Device
from devices.transports.supervised import Completed
from exporter.backends import front
from exporter.bundle.artifact import FinishedArtifact, is_of_model, open_artifact
from exporter.bundle.bundle import CHECKSUMS, open_bundle

#: What runs here; Core ML needs a Mac.
FORMATS = ("executorch", "onnx", "gguf", "mlx")
#: Features of the CPU that llama.cpp's library says it was compiled for: ``ggml_cpu_has_NAME``.
_FEATURES = (
    "avx", "avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_int8",
    "fma", "f16c", "neon", "dotprod", "matmul_int8", "sve",
)  # fmt: skip

#: The line with which a runner says that it finished; see devices/runner/README.md.
_END = b'\n{"phase":"end"}\n'


@dataclass(frozen=True)
class Contender:
    """An artifact in a program. `commands` are the command lines for a plan; `about` has the
    program's version and what it was compiled for. `reference` marks llama.cpp."""

    name: str
    path: Path
    size: int
    about: str
    commands: Callable[[Plan], list[Command]]
    reference: bool = False


def model_and_artifacts(argument: str) -> tuple[str, list[FinishedArtifact]]:
    """Split ``NAME=PATH,PATH…``, in which NAME may be missing: bundles and folders of artifacts.

    Raises InputError for what is neither.
    """
    name, _, paths = argument.rpartition("=")
    found = list[FinishedArtifact]()
    for path in map(Path, paths.split(",")):
        bundle = (path / CHECKSUMS).is_file()
        found += open_bundle(path).artifacts.values() if bundle else [open_artifact(path)]
    return name or Path(paths.split(",")[0]).name, found


def contenders(finished: FinishedArtifact, llama_bench: Sequence[Path]) -> Iterator[Contender]:
    """What runs this artifact here. Why a program does not run it is printed."""
    target = finished.artifact.target
    if target.target not in FORMATS:
        print(f"left out: {finished.artifact.path}: {target.target} does not run on this machine")
        return
    model = _model(finished)
    kind = f".pte {target.attention}" if target.target == "executorch" else f".{target.target}"
    for option in ("form", "kv_cache", "prefill"):
        value = getattr(target, option, None)
        kind += f" {option}={value}" if value is not None else ""
    makers: dict[str, Callable[[], tuple[str, Callable[[Plan], list[Command]]]]] = {}
    if target.target == "executorch":
        makers["native runner"] = partial(_native, model)
    # In ExecuTorch's own wheel too, whose kernels of attention are others.
    if target.target != "executorch" or target.attention == "custom_sdpa":
        wheel = {"executorch": "official wheel", "gguf": "llama-cpp-python"}
        makers[wheel.get(target.target, "Python")] = partial(_python, model)
    if target.target == "gguf":
        for number, program in enumerate(llama_bench):
            name = f"llama-bench {number + 1}" if len(llama_bench) > 1 else "llama-bench"
            makers[name] = partial(_bench, model, program)
    size = sum((model.folder / name).stat().st_size for name in model.files)
    for program, make in makers.items():
        try:
            about, commands = make()
        except DeviceError as error:
            print(f"left out: {finished.artifact.path} in {program}: {error}")
            continue
        yield Contender(
            f"{kind}, {program}", finished.artifact.path, size, about, commands,
            reference=target.target == "gguf",
        )  # fmt: skip


def _model(finished: FinishedArtifact) -> Model:
    """The artifact for an engine. The text is made up: what the tokens are costs no time."""
    artifact = finished.artifact
    name, module = artifact.target.target, front(artifact.target.target)
    assert name in FORMATS
    return Model(
        format=name,  # type: ignore[arg-type]
        folder=artifact.path,
        main=module.main_file(artifact.files),
        files=tuple(f for f in artifact.files if is_of_model(f, artifact.files, name)),
        context=artifact.target.max_context,
        native=module.native(artifact.target),
        integers=True,
        tokens=tuple(100 + i % 400 for i in range(2048)),
    )


def _native(model: Model) -> tuple[str, Callable[[Plan], list[Command]]]:
    built = runner.build(platform.machine())
    here = Identity(
        name="host", machine=platform.machine(), system="Linux", kernel=platform.release(),
        memory_bytes=0, kind="virtual",
    )  # fmt: skip
    made = native.engine(model, here, str(built.folder.parent), str(model.folder))
    return f"executorch {built.executorch}, {built.folder.name}", _with_tokens(made, model)


def _python(model: Model) -> tuple[str, Callable[[Plan], list[Command]]]:
    wheel = {
        "executorch": "executorch", "onnx": "onnxruntime", "gguf": "llama-cpp-python", "mlx": "mlx",
    }[model.format]  # fmt: skip
    try:
        about = f"{wheel} {metadata.version(wheel)}"
    except metadata.PackageNotFoundError as error:
        raise BadDeviceError(wheel, "is not installed") from error
    if model.format == "gguf":
        spec = util.find_spec("llama_cpp")
        assert spec is not None and spec.submodule_search_locations
        features = _llama_features(Path(spec.submodule_search_locations[0]) / "lib")
        weights = ", weights not repacked (this CPU has AMX)" if has_amx() else ""
        about = f"{about} ({features}){weights}"
    scripts = str(Path(python.__file__).parent)
    made = python.engine(model, Device("host"), scripts, str(model.folder), {})
    return about, _with_tokens(made, model)


def _bench(model: Model, program: Path) -> tuple[str, Callable[[Plan], list[Command]]]:
    if not program.is_file():
        raise BadDeviceError(program, "no such file")
    placed = Placed(str(program), model, str(model.folder), "")
    about = f"{program} ({_llama_features(program.resolve().parent)})"
    return about, lambda plan: bench_commands(placed, plan)


def _llama_features(folder: Path) -> str:
    """What ``libggml-cpu.so`` in a folder was compiled for, in its own words."""
    found = sorted(folder.glob("libggml-cpu*.so"))
    if not found:
        return "features unknown"
    script = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); "
        "print(*(n for n in sys.argv[2:] if getattr(lib, 'ggml_cpu_has_' + n, int)()))"
    )
    # In a process of its own: two libraries of this name in one process share their symbols.
    command = [python.interpreter(Device("host")), "-c", script, str(found[0]), *_FEATURES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "features unknown"


def _with_tokens(engine: Engine, model: Model) -> Callable[[Plan], list[Command]]:
    """The commands of an engine with the tokens outside of the artifact, which stays as it is."""
    path = Path(tempfile.gettempdir()) / "mobilellm-benchmark-tokens.txt"
    path.write_text(" ".join(map(str, model.tokens)))

    def commands(plan: Plan) -> list[Command]:
        made = []
        for command in engine.commands(plan):
            words = list(command.argv)
            words[words.index("--tokens") + 1] = str(path)
            made.append(replace(command, argv=words))
        return made

    return commands


def run(
    contender: Contender, plan: Plan, core: int, timeout: float, partial: bool = False
) -> list[Record]:
    """Run the commands of a plan on one core. Raises DeviceError where one fails or takes longer
    than `timeout` seconds; with `partial`, the phases that it finished by then count."""
    records: list[Record] = []
    for command in contender.commands(plan):
        pinned = ["taskset", "-c", str(core), "env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1"]
        argv, code = [*pinned, *command.argv], 0
        try:
            done = subprocess.run(argv, capture_output=True, timeout=timeout, check=False)
            code, output, errors = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as error:
            if not partial:
                raise DeviceError(contender.name, f"took more than {timeout:g} s") from error
            print(f"{contender.name}: stopped after {timeout:g} s")
            whole_lines = (error.stdout or b"").rpartition(b"\n")[0]
            output, errors = whole_lines + _END, b""
        ended = Completed(tuple(command.argv), code, output, errors, 0.0)
        records += command.records(ended.check(contender.name))
    return records
