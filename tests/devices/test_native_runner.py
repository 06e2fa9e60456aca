"""The native runner against the runtime that the exporter uses, and what it refuses."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from devices import runner
from devices.engines.records import read_records
from devices.errors import BadDeviceError, CommandFailedError, DeviceError
from devices.transports.supervised import Completed
from exporter.backends import backend
from exporter.bundle.bundle import Bundle

TOKENS = [7, 11, 300, 2, 45, 99, 101, 12]


@pytest.fixture(scope="module")
def built() -> runner.Build:
    return runner.build(platform.machine())


@pytest.fixture
def program(portable_bundle: Bundle, tmp_path: Path) -> dict[str, Path]:
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(" ".join(map(str, TOKENS)))
    return {"--model": portable_bundle.artifacts["executorch"].artifact.path / "model.pte",
            "--tokens": tokens}  # fmt: skip


def run(
    built: runner.Build, options: dict[str, Any], *more: object
) -> subprocess.CompletedProcess[str]:
    words = [str(word) for pair in options.items() for word in pair]
    command = [str(built.runner), *words, *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def phases(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {line["phase"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_it_generates_what_the_exporters_runtime_generates(
    built: runner.Build, program: dict[str, Path], portable_bundle: Bundle, tmp_path: Path
) -> None:
    logits = tmp_path / "logits"
    found = phases(run(built, program, "--generate", 6, "--logits", logits))
    own = backend("executorch").load(portable_bundle.artifacts["executorch"].artifact)
    rows = [own.prefill(TOKENS)]
    for _ in range(5):
        rows.append(own.decode(int(rows[-1].argmax())))
    expected = torch.stack(rows)
    assert found["generate"]["tokens"] == expected.argmax(1).tolist()
    got = np.fromfile(logits, np.float32).reshape(6, -1)
    assert np.abs(got - expected.numpy()).max() < 1e-3


def test_every_phase_gives_its_raw_samples_and_its_own_peak(
    built: runner.Build, program: dict[str, Path]
) -> None:
    done = run(built, program, "--warmup", 2, "--prompts", "3,20", "--depths", "40,0", "--steps", 5)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = [line["phase"] for line in lines]
    assert names == ["start", "load", "warmup", "prefill", "prefill", "decode", "decode", "end"]
    assert [line["depth"] for line in lines if line["phase"] == "decode"] == [0, 40]
    assert [len(line["ms"]) for line in lines[1:-1]] == [1, 2, 1, 1, 5, 5]
    memory = {line["phase"]: line["memory"] for line in lines[:-1]}
    assert all(seen["peak_rss"] >= seen["rss"] > 0 for seen in memory.values())
    assert memory["load"]["anonymous"] - memory["start"]["anonymous"] > 1_000_000
    assert lines[1]["context"] == 256


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        ({"--depths": "0,x"}, 2, "x is not a whole number"),
        ({"--threads": "0"}, 2, "give 1 or more"),
        ({"--speed": "9"}, 2, "unknown option --speed"),
        ({"--tokens": "/nowhere"}, 2, "cannot be opened"),
        ({"--model": "/nowhere"}, 3, "ExecuTorch cannot load it"),
        ({"--prompts": "300"}, 4, "the context is full"),
        ({"--load": "magic"}, 2, "give mmap or file"),
    ],
)
def test_what_it_cannot_do_it_says_and_ends_with_a_code(
    options: dict[str, str], code: int, reason: str, built: runner.Build, program: dict[str, Path]
) -> None:
    done = run(built, {**program, **options})
    assert (done.returncode, '"end"' in done.stdout) == (code, False)
    assert reason in done.stderr


@pytest.mark.parametrize("text", ["", "5 six", "1 512"])
def test_what_is_no_token_of_the_model_is_refused(
    text: str, built: runner.Build, program: dict[str, Path]
) -> None:
    program["--tokens"].write_text(text)
    assert run(built, program, "--prompts", 2).returncode == 2


def test_a_program_with_an_unknown_operator_is_refused_with_its_name(
    built: runner.Build, program: dict[str, Path], finished_bundle: Bundle, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.pte"
    known = (finished_bundle.artifacts["executorch"].artifact.path / "model.pte").read_bytes()
    changed.write_bytes(known.replace(b"llama::custom_sdpa", b"llama::unknown_one"))
    done = run(built, {**program, "--model": changed})
    assert done.returncode == 3
    reason = done.stderr.splitlines()[-1]
    assert reason.endswith("needs operators that this runner does not have: llama::unknown_one.out")


def test_a_cut_off_program_is_refused(
    built: runner.Build, program: dict[str, Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.pte"
    short.write_bytes(program["--model"].read_bytes()[:5000])
    assert run(built, {**program, "--model": short}).returncode == 3


@pytest.mark.parametrize(
    ("stdout", "code", "message"),
    [
        (b'{"phase":"load","ms":[1]}\n', 0, "stopped without its last line"),
        (b'{"phase":"load","ms":[1]}\n{"phase":"en', 0, "which is cut off"),
        (b'{"phase":"load","ms":["fast"]}\n{"phase":"end"}\n', 0, "gives invalid times for load"),
        (b'{"phase":"load","ms":[-1]}\n{"phase":"end"}\n', 0, "gives invalid times for load"),
        (b'{"phase":"load","ms":[NaN]}\n{"phase":"end"}\n', 0, "gives NaN, which is no number"),
        (b'{"ms":[1]}\n', 0, "which is not the record of a phase"),
        (b"", 132, "SIGILL: the CPU lacks an instruction"),
        (b"", 137, "as the system does when memory runs out"),
    ],
)
def test_half_an_output_is_no_measurement(stdout: bytes, code: int, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as raised:
        read_records(Completed(("runner",), code, stdout, b"", 1.0))
    assert isinstance(raised.value, CommandFailedError) == (code != 0)


def test_the_probe_sees_the_peak_of_its_command_and_passes_its_code_on() -> None:
    probe = runner.build_probe(platform.machine())
    script = "import time; x = b'x' * 200_000_000; time.sleep(0.3); raise SystemExit(7)"
    done = subprocess.run(
        [str(probe), "run", "python3", "-c", script], capture_output=True, text=True, check=False
    )
    seen = json.loads(done.stderr.splitlines()[-1])["probe"]
    assert (done.returncode, seen["code"]) == (7, 7)
    assert 200e6 < seen["peak_rss"] < 260e6
    assert 200e6 < seen["peak_pss"] <= seen["peak_rss"]


def test_the_probe_measures_how_fast_memory_is_read() -> None:
    probe = runner.build_probe(platform.machine())
    done = subprocess.run(
        [str(probe), "bandwidth", "1"], capture_output=True, text=True, check=True
    )
    assert 1e8 < json.loads(done.stdout)["bandwidth"] < 1e12


def test_an_architecture_without_compiler_or_runner_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(BadDeviceError, match="architecture riscv64: has no runner"):
        runner.build("riscv64")
    monkeypatch.setenv("MOBILELLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadDeviceError, match="Run: apt install g"):
        runner.build(platform.machine())
    assert list(tmp_path.rglob("mobilellm_*")) == []


def test_pages_of_two_megabytes_change_no_logit(
    built: runner.Build, program: dict[str, Path], tmp_path: Path
) -> None:
    for choice in (0, 1):
        words = ["--generate", 4, "--logits", tmp_path / str(choice), "--huge-pages", choice]
        phases(run(built, program, *words))
    without, with_them = ((tmp_path / str(choice)).read_bytes() for choice in (0, 1))
    assert without == with_them and len(without) > 0


def test_the_reading_of_the_text_before_a_depth_is_timed(
    built: runner.Build, program: dict[str, Path]
) -> None:
    done = run(built, program, "--depths", "0,8,24", "--steps", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    filled = [(line["depth"], line["filled"]) for line in lines if line["phase"] == "decode"]
    assert filled == [(0, 0), (8, 8), (24, 16)]
    took = [line["fill_ms"] for line in lines if line["phase"] == "decode"]
    assert took[0] < 0.1 < min(took[1:])
