"""What an Arm CPU executes for a token: ours beside llama.cpp and ONNX Runtime, one table.

    tests/tools.sh                             # llama.cpp's libraries, the emulator, the compilers
    mobilellm lower build/140m-int4 --target gguf -o build/140m/gguf max_context=4096   # and others
    python tests/benchmarks/arm_counts.py build/140m/executorch build/140m/gguf build/140m/onnx \\
        -o build/arm-counts.json

Each artifact runs in its own engine, on one thread of an emulated CPU, under the plugin of
`devices.instructions`: a .pte in the native runner, a .gguf in llama.cpp's arm64 build from npm, an
.onnx in ONNX Runtime's arm64 wheel, which pip downloads. These are counts, not times.

- All count the same: 8 steps after 4 others, from the token to the choice of the next one; and what
  a prompt takes more than one of half its length. The drivers of the peers (`arm/`) choose the
  token with a loop of vectors, which is below 1 %.
- llama.cpp has its defaults: a cache of float16, flash attention where it chooses it. Its cache of
  a depth is made by its x86 build and read from a file. Those of the others are zeros: what
  attention executes does not depend on the values.
- `max` has SVE and SME. The bytes that these load and store are unknown, and are not in the table.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from devices.engines import Model
from devices.files import sha256
from devices.instructions import counter, tools
from devices.instructions.emulation import Blocks, execute, machine, read_places
from devices.instructions.symbols import Symbols, read_symbols
from devices.runner import COMPILERS
from exporter.backends import front
from exporter.bundle.artifact import FinishedArtifact, open_artifact

ROOT = Path(__file__).parents[2]
DRIVERS = Path(__file__).parent / "arm"
#: Steps that a driver counts at a depth.
STEPS = 8
#: Seconds of one run.
LONGEST = 6 * 3600.0
#: Phase → what `devices.instructions.counter.figure` gives.
Figures = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Lengths:
    depths: Sequence[int]
    prompts: Sequence[int]
    context: int

    @property
    def phases(self) -> list[str]:
        """As `drive.h` reads them: of each prompt, half of it before."""
        prompts = [f"p{n}" for prompt in self.prompts for n in (prompt // 2, prompt)]
        return [*prompts, *(f"d{depth}" for depth in self.depths)]


@dataclass(frozen=True)
class Engine:
    """The library of a peer for Arm, the driver for it, and what the driver reads."""

    name: str
    folder: Path
    library: str
    source: str
    model: Path
    variables: Mapping[str, str]
    caches: Path | None = None


# ---- Ours. ----


def count_ours(finished: FinishedArtifact, cpu: str, lengths: Lengths) -> Figures:
    """A .pte in the native runner."""
    artifact = finished.artifact
    module, target = front(artifact.target.target), artifact.target
    model = Model(
        format="executorch", folder=artifact.path, main=module.main_file(artifact.files),
        files=tuple(artifact.files), context=target.max_context, portable=module.portable(target),
        integers=True, tokens=tuple((place * 7919 + 13) % 90 + 5 for place in range(256)),
    )  # fmt: skip
    prompts = [(length // 2, length) for length in lengths.prompts]
    settings = counter.Settings([cpu], lengths.depths, prompts, LONGEST)
    (made,) = counter.count(model, settings, say)["counts"]
    found = {_prefill(entry["from"], entry["to"]): entry for entry in made["prefill"]}
    return found | {_decode(entry["depth"]): entry for entry in made["decode"]}


def say(what: str, number: int, total: int, detail: str) -> None:
    print(f"{what} {number + 1} of {total} {detail}", file=sys.stderr, flush=True)


def _prefill(shorter: int, longer: int) -> str:
    return f"prefill {shorter} → {longer}"


def _decode(depth: int) -> str:
    return f"decode at {depth}"


# ---- The peers. ----


def llama_cpp(finished: FinishedArtifact, work: Path) -> Engine:
    folders = Path(os.environ.get("MOBILELLM_NODE", ROOT / "build" / "node"))
    arm, own = (
        folders / "node_modules" / "@node-llama-cpp" / name / "bins" / name
        for name in (
            "linux-arm64",
            "linux-x64" if platform.machine() == "x86_64" else "linux-arm64",
        )
    )
    if not arm.is_dir():
        raise SystemExit(f"{arm}: is missing. Run: tests/tools.sh")
    model = finished.artifact.path / "model.gguf"
    library = next(path.name for path in arm.glob("libllama.v*.so"))
    version = library.removeprefix("libllama.").removesuffix(".so")
    caches = work / f"caches-{version}-{sha256(model)[:16]}"
    caches.mkdir(parents=True, exist_ok=True)
    return Engine(
        f"llama.cpp {version}", arm, library, "llama.c", model,
        {"ENGINE": "library", "CACHES": "caches", "OWN": str(own)}, caches,
    )  # fmt: skip


def onnxruntime(finished: FinishedArtifact, work: Path) -> Engine:
    import onnx

    version = metadata.version("onnxruntime")
    folder = work / f"onnxruntime-{version}"
    if not folder.is_dir():
        scratch = work / "wheel"
        options = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_aarch64"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            *options,
            f"--dest={scratch}",
        ]
        subprocess.run([*command, f"onnxruntime=={version}"], check=True)
        (wheel,) = scratch.glob("*.whl")
        folder.mkdir()
        name = f"onnxruntime/capi/libonnxruntime.so.{version}"
        with zipfile.ZipFile(wheel) as content:
            (folder / "libonnxruntime.so.1").write_bytes(content.read(name))
    artifact = finished.artifact
    model = artifact.path / front("onnx").main_file(artifact.files)
    graph = onnx.load(model, load_external_data=False).graph
    keys = [
        value for value in graph.input if re.fullmatch(r"past_key_values\.\d+\.key", value.name)
    ]
    floats = onnx.TensorProto.FLOAT
    if "attention_mask" not in {value.name for value in graph.input} or any(
        key.type.tensor_type.elem_type != floats for key in keys
    ):
        raise SystemExit(f"{model}: only the default form, with a cache of float32, is driven")
    _, heads, _, width = (d.dim_value for d in keys[0].type.tensor_type.shape.dim)
    vocabulary = graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    shape = f"{len(keys)} {heads} {width} {vocabulary}"
    return Engine(
        f"ONNX Runtime {version}", folder, "libonnxruntime.so.1", "onnxruntime.c", model,
        {"SHAPE": shape},
    )  # fmt: skip


def compile_driver(engine: Engine, compiler: str, library: Path, out: Path) -> Path:
    options = ["-O3", "-ffast-math", "-Wall", "-Werror", "-Wl,--allow-shlib-undefined"]
    beside = [str(path) for path in library.parent.glob("libggml.v*.so")]
    sources = [str(DRIVERS / engine.source), str(library), *beside]
    subprocess.run([compiler, *options, *sources, "-o", str(out)], check=True)
    return out


def make_caches(engine: Engine, lengths: Lengths, work: Path) -> None:
    """Have llama.cpp's build for this machine write its caches of every depth."""
    missing = [d for d in lengths.depths if engine.caches and not (engine.caches / str(d)).exists()]
    if not missing or engine.caches is None:
        return
    own = Path(engine.variables["OWN"])
    driver = compile_driver(engine, "gcc", own / engine.library, work / "driver-own")
    say("caches", 0, 1, ", ".join(map(str, missing)))
    environment = {"ENGINE": str(own), "CACHES": str(engine.caches), "LD_LIBRARY_PATH": str(own)}
    phases = [f"s{depth}" for depth in missing]
    command = [str(driver), str(engine.model), str(lengths.context), *phases]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)


def count_peer(engine: Engine, cpu: str, lengths: Lengths, work: Path) -> Figures:
    make_caches(engine, lengths, work)
    compiler = f"{COMPILERS[tools.ARCHITECTURE]}gcc"
    system = subprocess.run(
        [compiler, "-print-file-name=libc.so.6"], check=True, capture_output=True, text=True
    )
    system_folder = Path(system.stdout.strip()).resolve().parent
    links = {
        "library": engine.folder, "system": system_folder, "model": engine.model.parent,
        "driver": work, **({"caches": engine.caches} if engine.caches else {}),
    }  # fmt: skip
    driver = compile_driver(engine, compiler, engine.folder / engine.library, work / "driver-arm")
    files = [driver, *engine.folder.glob("*.so*"), *system_folder.glob("lib*.so.[0-9]*")]
    variables = {key: value for key, value in engine.variables.items() if key != "OWN"}
    with machine(counter.check_cpus([cpu]), cpu, links) as made:
        say("count", 0, 1, f"{engine.name}, {cpu}")
        done = execute(
            made,
            [
                "system/ld-linux-aarch64.so.1", "--preload", f"./tools/{tools.CLOCK}",
                "--library-path", "library:system", f"driver/{driver.name}",
                f"model/{engine.model.name}", str(lengths.context), *lengths.phases,
            ],
            LONGEST, variables,
        )  # fmt: skip
        if done.code:
            raise SystemExit(
                f"{engine.name}: exit code {done.code}\n{done.stderr.decode()[-2000:]}"
            )
        places = read_places(made)
    executed = {file for file, _, _ in places[-1]}
    real = {path.resolve() for path in files}
    symbols = {path: read_symbols(path) for path in real if str(path) in executed}
    return figures(places, lengths, symbols)


def figures(places: Sequence[Blocks], lengths: Lengths, symbols: Mapping[Path, Symbols]) -> Figures:
    """What was executed between the two places that each phase marks."""
    windows = dict[str, Blocks]()
    for number, phase in enumerate(lengths.phases):
        windows[phase] = places[2 * number + 1].copy()
        windows[phase].subtract(places[2 * number])
    found = Figures()
    for longer in lengths.prompts:
        shorter = longer // 2
        executed = windows[f"p{longer}"].copy()
        executed.subtract(windows[f"p{shorter}"])
        name = _prefill(shorter, longer)
        found[name] = counter.figure(executed, longer - shorter, symbols)
    for depth in lengths.depths:
        found[_decode(depth)] = counter.figure(windows[f"d{depth}"], STEPS, symbols)
    return found


# ---- The table. ----


def show(rows: Mapping[str, Figures], cpu: str) -> None:
    table = Table(
        *("engine", "phase", "M instructions", "of it dot products", "MB loaded", "MB stored", ""),
        title=f"{cpu}: counts for each token, no times",
    )
    peer = next((figures for name, figures in rows.items() if name.startswith("llama.cpp")), {})
    for column in table.columns[2:]:
        column.justify = "right"
    for name, found in rows.items():
        for phase, figure in found.items():
            ways, total = figure["bytes"], figure["per_token"]
            products = figure["classes"]["dot_product"]
            mark = "≥ " if ways["unsized"] else ""
            ratio = (
                total / peer[phase]["per_token"] if phase in peer and found is not peer else None
            )
            table.add_row(
                name, phase, f"{total / 1e6:,.2f}", f"{products / 1e6:,.2f}",
                *(f"{mark}{ways[way] / 1e6:,.1f}" for way in ("loaded", "stored")),
                "" if ratio is None else f"{ratio:.2f} × llama.cpp",
            )  # fmt: skip
        table.add_section()
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts of an Arm CPU, beside other engines.")
    parser.add_argument("artifacts", nargs="+", type=Path, help="folders from mobilellm lower")
    parser.add_argument("--cpu", default="cortex-a76")
    parser.add_argument("--depths", nargs="*", type=int, default=[16, 512, 2048])
    parser.add_argument("--prompts", nargs="*", type=int, default=[128, 512])
    parser.add_argument("--context", type=int, default=4096, help="of the peers' caches")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "arm-counts")
    parser.add_argument(
        "-o", "--output", type=Path, help="all figures with their functions, as JSON"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lengths = Lengths(args.depths, args.prompts, args.context)
    rows = dict[str, Figures]()
    for path in args.artifacts:
        finished = open_artifact(path)
        kind = finished.artifact.target.target
        if kind == "executorch":
            name, found = "native runner, .pte", count_ours(finished, args.cpu, lengths)
        else:
            engine = {"gguf": llama_cpp, "onnx": onnxruntime}[kind](finished, args.work)
            name, found = engine.name, count_peer(engine, args.cpu, lengths, args.work)
        rows[name if name not in rows else f"{name} ({path})"] = found
        if args.output:
            content = {"cpu": args.cpu, "context": args.context, "figures": rows}
            args.output.write_text(json.dumps(content, indent=1))
    show(rows, args.cpu)


if __name__ == "__main__":
    main()
