"""Profiles of .gguf files and MLX folders: the Python runner in real llama.cpp and real MLX, and
llama.cpp's own llama-bench where there is one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from conftest import NANO

from devices import execution, plots, report
from devices.engines import Model, Plan, llama_bench, official, python
from devices.errors import BadDeviceError, CommandFailedError, DeviceError
from devices.session_state import Job, SessionState, Settings
from devices.transports import host, parse_device
from devices.transports.supervised import Completed
from exporter.backends import backend
from exporter.bundle.bundle import Bundle
from exporter.inference.reference import score
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import export, no_progress
from exporter.recipe import load_recipe

Capture = pytest.CaptureFixture[str]
TOKENS = [7, 11, 300, 2, 45, 99, 101, 12]
CONTEXT = 200
#: The runtime of each format, and the file that it opens.
RUNTIMES = {"gguf": ("llama_cpp", "model.gguf"), "mlx": ("mlx", "model.safetensors")}
#: What llama-bench of llama.cpp 0c1e570 printed of the demo, without fields that nothing reads.
PROMPT = {"build_commit": "0c1e570", "backends": "CPU", "n_threads": 1, "load_mode": "auto",
          "n_prompt": 8, "n_gen": 0, "n_depth": 0, "avg_ns": 631179, "stddev_ns": 0,
          "avg_ts": 12674.692916, "samples_ns": [631179], "samples_ts": [12674.7]}  # fmt: skip
STEPS = {**PROMPT, "n_prompt": 0, "n_gen": 4, "n_depth": 64, "samples_ns": [1120816, 1120820]}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo as .gguf and as MLX folder, and a short profile. MLX computes in float32: in float16
    it takes a second for ten tokens on an x86 CPU. Read it only."""
    targets = "[{target: gguf}, {target: mlx, activations: float32}]"
    recipe = load_recipe("mobilellm-r1-nano-int4", [
        f"targets={targets}", f"max_context={CONTEXT}", "profile.sustained_seconds=1",
        "profile.prompt_lengths=[8,32]", "profile.depths=[0,64]", "profile.decode_steps=4",
        "profile.max_repeats=2",
    ])  # fmt: skip
    out = tmp_path_factory.mktemp("clients") / "nano"
    result = export(recipe, open_checkpoint(NANO), out, no_progress)
    assert result.bundle is not None, [check for check in result.checks if not check.passed]
    return result.bundle


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.txt"
    path.write_text(" ".join(map(str, TOKENS)))
    return path


def model_of(bundle: Bundle, target: str) -> Path:
    return bundle.artifacts[target].artifact.path / RUNTIMES[target][1]


def runner(
    target: str, model: Path, tokens: Path, *more: object
) -> "subprocess.CompletedProcess[str]":
    script = Path(python.__file__).with_name("python_runner.py")
    command = [sys.executable, script, "--engine", RUNTIMES[target][0], "--model", model,
               "--tokens", tokens, *more]  # fmt: skip
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )


def records(done: "subprocess.CompletedProcess[str]") -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", RUNTIMES)
def test_after_every_phase_it_generates_what_the_backend_generates(
    target: str, clients: Bundle, tokens: Path, tmp_path: Path
) -> None:
    """Each phase goes back in the cache: what it leaves behind must not be seen by the next."""
    logits = tmp_path / "logits"
    phases = ["--warmup", 2, "--prompts", "30,3", "--depths", "40,0", "--steps", 3]
    made = ["--generate", 6, "--logits", logits]
    found = records(runner(target, model_of(clients, target), tokens, *phases, *made))
    own = backend(target).load(clients.artifacts[target].artifact)
    rows = [own.prefill(TOKENS)]
    for _ in range(5):
        rows.append(own.decode(int(rows[-1].argmax())))
    expected = torch.stack(rows)
    (generated,) = [line for line in found if line["phase"] == "generate"]
    assert generated["tokens"] == expected.argmax(1).tolist()
    got = np.fromfile(logits, np.float32).reshape(6, -1)
    # llama.cpp may add in another order here, where it repacks the weights.
    assert np.abs(got - expected.numpy()).max() < 0.02 * expected.std()


def test_the_portable_form_of_onnx_is_measured_without_rounded_activations(
    tokens: Path, tmp_path: Path
) -> None:
    """ONNX Runtime would round them by default, and be faster."""
    form = ["targets=[{target: onnx, form: portable, products: float, max_context: 200}]"]
    recipe = load_recipe("mobilellm-r1-nano-int4", form)
    result = export(recipe, open_checkpoint(NANO), tmp_path / "nano", no_progress)
    artifact = result.artifacts["onnx"].artifact
    model = artifact.path / backend("onnx").main_file(artifact.files)
    program = Path(python.__file__).with_name("python_runner.py")
    logits = tmp_path / "logits"
    command = [sys.executable, program, "--engine", "onnxruntime", "--model", model,
               "--tokens", tokens, "--generate", "1", "--logits", logits]  # fmt: skip
    records(subprocess.run(command, capture_output=True, text=True, check=False))
    expected = score(result.quantized, TOKENS, [len(TOKENS) - 1], None)[0].numpy()
    assert np.abs(np.fromfile(logits, np.float32) - expected).max() < 1e-3


@pytest.mark.parametrize("target", RUNTIMES)
def test_every_phase_gives_its_raw_samples_and_memory(
    target: str, clients: Bundle, tokens: Path
) -> None:
    work = ["--warmup", 2, "--prompts", "3,20", "--depths", "40,0", "--steps", 5, "--context", 100]
    lines = records(runner(target, model_of(clients, target), tokens, *work))
    names = [line["phase"] for line in lines]
    assert names == ["start", "load", "warmup", "prefill", "prefill", "decode", "decode", "end"]
    assert [line["depth"] for line in lines if line["phase"] == "decode"] == [0, 40]
    assert [len(line["ms"]) for line in lines[1:-1]] == [1, 2, 1, 1, 5, 5]
    for memory in (line["memory"] for line in lines[:-1]):
        # The system reads the two at different moments, and MLX has a thread of its own.
        assert memory["peak_rss"] > 0.95 * memory["rss"] > 0
    assert (lines[1]["context"], lines[1]["vocab_size"]) == (100, 512)


@pytest.mark.parametrize("target", RUNTIMES)
@pytest.mark.parametrize(
    ("work", "code", "reason"),
    [
        (["--prompts", "900", "--context", CONTEXT], 4, "the context is full"),
        (["--load", "magic"], 2, "invalid choice: 'magic'"),
    ],
)
def test_what_it_cannot_do_it_says_and_ends_with_a_code(
    work: list[object], code: int, reason: str, target: str, clients: Bundle, tokens: Path
) -> None:
    done = runner(target, model_of(clients, target), tokens, *work)
    assert (done.returncode, '"end"' in done.stdout) == (code, False)
    assert reason in done.stderr


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_cut_off_file_cannot_be_loaded(
    target: str, clients: Bundle, tokens: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(model_of(clients, target).parent, folder)
    model = folder / RUNTIMES[target][1]
    model.write_bytes(model.read_bytes()[:20_000])
    done = runner(target, model, tokens, "--prompts", 3)
    assert done.returncode == 3
    assert f"{RUNTIMES[target][0]} cannot load it" in done.stderr


def test_llama_cpp_reads_a_file_that_it_may_not_map(clients: Bundle, tokens: Path) -> None:
    model = model_of(clients, "gguf")
    trace = Path(tokens.parent, "maps.py")
    trace.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from devices.engines.python_llama_cpp import Runtime\n"
        "from types import SimpleNamespace as Options\n"
        "options = Options(threads=1, context=64, load=sys.argv[3])\n"
        "model = Runtime(sys.argv[2], options)\n"
        "print(sys.argv[2] in open('/proc/self/maps').read())\n"
    )
    found = {}
    for how in ("mmap", "file"):
        command = [sys.executable, trace, Path(python.__file__).parents[2], model, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[how] = done.stdout.strip()
    assert found == {"mmap": "True", "file": "False"}


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_no_code_of_an_mlx_folder_is_imported(
    key: str, clients: Bundle, tokens: Path, tmp_path: Path
) -> None:
    folder, marker = tmp_path / "hostile", tmp_path / "was imported"
    shutil.copytree(model_of(clients, "mlx").parent, folder)
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "code.py"}))
    done = runner("mlx", folder / "model.safetensors", tokens, "--prompts", 3)
    assert (done.returncode, marker.exists()) == (3, False)
    assert f"config.json asks for code of the folder: {key}" in done.stderr


@pytest.fixture(scope="module")
def measured(clients: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of both artifacts on this machine."""
    output = tmp_path_factory.mktemp("profile") / "report.json"
    command = [sys.executable, "-m", "exporter", "profile", clients.path, "--device", "host",
               "--threads", "2", "--json", "-o", output]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown, written = json.loads(done.stdout), json.loads(output.read_text())
    assert shown["sessions"] == written["sessions"]
    return output


def test_both_are_measured_on_this_machine(measured: Path) -> None:
    found = json.loads(measured.read_text())
    report.validate(found)
    gguf, mlx = found["sessions"]
    assert [gguf["artifact"]["format"], mlx["artifact"]["format"]] == ["gguf", "mlx"]
    for session in (gguf, mlx):
        assert (session["status"], session["problem"]) == ("complete", None)
        assert [entry["tokens"] for entry in session["prefill"]] == [8, 32]
        assert [entry["depth"] for entry in session["decode"]] == [0, 64]
        assert {"start", "load", "prefill", "decode"} <= set(session["memory"]["phases"])
        assert session["sustained"]["tokens"] > 0 and session["load"]["repeats"] == 2
        assert session["not_measured"]["operators"] == "not by this engine"
        assert (session["operators"], session["undelegated"]) == ([], [])
    assert (gguf["engine"]["name"], gguf["engine"]["mmap"]) == ("llama_cpp-python", True)
    assert set(gguf["engine"]["versions"]) == {"llama-cpp-python"}
    assert (mlx["engine"]["name"], mlx["engine"]["mmap"]) == ("mlx-python", None)
    assert set(mlx["engine"]["versions"]) == {"mlx", "mlx-lm"}
    assert mlx["engine"]["threads"] == 1  # whatever it is asked for


def test_gate_and_report_accept_the_profile(
    measured: Path, clients: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    limits = "{load: 100000 ms, prefill: {32: 100000 ms}, decode: {64: 0.001 tokens/s}}"
    budget = tmp_path / "budget.yaml"
    lines = [f"  {target}: {{devices: {{host: {limits}}}}}\n" for target in RUNTIMES]
    budget.write_text("".join(["targets:\n", *lines]))
    gate = ["gate", clients.path, "--result", measured, "--budget", budget]
    passed = run(capsys, *gate)
    assert passed.code == 0, passed.out
    budget.write_text(budget.read_text().replace("100000 ms", "0.00001 ms"))
    assert run(capsys, *gate).code == 1
    page, tables, plot = (tmp_path / name for name in ("page.html", "page.md", "plot.svg"))
    shown = ["--result", measured, "-o", page, "--markdown", tables]
    assert run(capsys, "report", clients.path, *shown).code == 0
    for target in RUNTIMES:
        assert f"| {target}, host | decode, after 64 tokens |" in tables.read_text()
    plots.draw(json.loads(measured.read_text()), plot)
    assert plot.stat().st_size > 10_000


def job(bundle: Bundle, target: str, program: Path | None = None) -> Job:
    folder = bundle.artifacts[target].artifact.path
    main = RUNTIMES[target][1]
    model = Model(target, folder, main, (main,), CONTEXT, False, False, tuple(TOKENS))  # type: ignore[arg-type]
    return Job(model, program=program)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gguf", "Build llama-bench and give it with --runner"),
        ("mlx", "mlx on adb:phone: does not run on Android"),
    ],
)
def test_android_needs_a_program_of_llama_cpp_and_has_no_mlx(
    target: str, message: str, clients: Bundle
) -> None:
    identity = host.identify(parse_device("host"))
    android = type(identity)(**{**vars(identity), "system": "Android 16"})
    session = SessionState(job(clients, target), parse_device("adb:phone"), Settings(), android)
    with pytest.raises(BadDeviceError, match=message):
        execution._choose_engine(session, host, "/w", "/w/m")


@pytest.mark.parametrize(
    ("target", "wheels"), [("gguf", "llama-cpp-python"), ("mlx", "mlx mlx-lm")]
)
def test_a_device_without_the_runtime_says_what_to_install(
    target: str, wheels: str, clients: Bundle
) -> None:
    model = job(clients, target).model
    interpreter, *script = python.version_command(model, parse_device("host"))
    # -S: an interpreter without packages.
    argv = (interpreter, "-S", *script)
    ran = subprocess.run(argv, capture_output=True, check=False)
    done = Completed(argv, ran.returncode, ran.stdout, ran.stderr, 0.1)
    with pytest.raises(CommandFailedError, match=f"Install it there: .* {wheels}") as raised:
        python.read_versions(model, done)
    assert "PackageNotFoundError" in raised.value.problem


# ---- llama-bench. ----


def test_llama_bench_gives_prompts_and_steps() -> None:
    text = f"load_backend: loaded CPU backend\n{json.dumps([PROMPT, STEPS], indent=2)}\n"
    assert llama_bench.read_bench(text) == [
        {"phase": "prefill", "tokens": 8, "ms": [0.631179]},
        {"phase": "decode", "depth": 64, "steps": 4, "ms": [0.280204, 0.280205]},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "printed no list of tests"),
        ("| model | size |\n", "printed no list of tests"),
        ("[\n\n]\n", "measured nothing"),
        ('[\n  {"n_prompt": 8,', "is no JSON"),
        (json.dumps([{**PROMPT, "n_prompt": -8}], indent=1), "without its numbers of tokens"),
        (json.dumps([{**PROMPT, "samples_ns": []}], indent=1), "without its times"),
        (json.dumps([{**PROMPT, "samples_ns": [-5]}], indent=1), "without its times"),
        (json.dumps([{**PROMPT, "n_gen": 4}], indent=1), "measured 8 and 4 tokens together"),
        ("[\n" + "[" * 90 + "]" * 90 + "]", "nested levels"),
        ("[\n1" + "0" * 9000 + "]", "digits"),
    ],
)
def test_what_llama_bench_leaves_out_is_no_measurement(text: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        llama_bench.read_bench(text)


def real_bench() -> Path:
    """The program of llama.cpp on this machine. A build of our own is not in the project."""
    named = os.environ.get("LLAMA_BENCH") or shutil.which("llama-bench")
    if named is None:
        pytest.skip(
            "there is no llama-bench: build llama.cpp and give its path in LLAMA_BENCH, or put it "
            "on PATH"
        )
    return Path(named)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_real_llama_bench_is_run_and_read(mapped: bool, clients: Bundle, capsys: Capture) -> None:
    choice = [] if mapped else ["--no-mmap"]
    done = run(
        capsys, "profile", clients.path, "--target", "gguf", "--device", "host", "--json",
        "--threads", 1, "--runner", real_bench(), *choice,
    )  # fmt: skip
    assert done.code == 0, done.err
    (session,) = done.json["sessions"]
    assert (session["status"], session["engine"]["name"]) == ("complete", "llama-bench")
    assert session["engine"]["mmap"] == mapped
    assert [entry["tokens"] for entry in session["prefill"]] == [8, 32]
    assert [entry["depth"] for entry in session["decode"]] == [0, 64]
    assert session["load"] is None and session["memory"]["peak_rss"] > 1_000_000


def test_a_real_llama_bench_reads_the_file_that_it_may_not_map(clients: Bundle) -> None:
    model = model_of(clients, "gguf")
    plan = Plan(prompts=[8], threads=1, mmap=False)
    engine = official.engine(
        real_bench(), job(clients, "gguf").model, "/w", str(model.parent), plan
    )
    (command,) = engine.commands(plan)
    argv = [word.replace(command.argv[4], str(real_bench())) for word in command.argv]
    ran = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert [test["load_mode"] for test in json.loads(ran.stdout)] == ["none"]


def test_a_llama_bench_that_crashes_is_no_measurement(clients: Bundle, tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\nkill -SEGV $$\n")
    program.chmod(0o755)
    plan = Plan(prompts=[8], depths=[0], steps=4)
    engine = official.engine(program, job(clients, "gguf").model, "/w", "/w/m", plan)
    first, second = engine.commands(plan)
    assert first.argv[-4:] == ["-p", "8", "-n", "0"]
    assert second.argv[-6:] == ["-p", "0", "-n", "4", "-d", "0"]
    ran = subprocess.run([program], capture_output=True, check=False)
    done = Completed((str(program),), 128 - ran.returncode, ran.stdout, ran.stderr, 0.1)
    with pytest.raises(CommandFailedError, match="SIGSEGV: the program crashed"):
        first.records(done)
