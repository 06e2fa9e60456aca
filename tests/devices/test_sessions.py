"""Whole sessions on this machine, real adbd and real sshd: every figure of the schema, devices that
fail beside devices that do not, and sessions that go on where they were stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, contents, run
from conftest import ROOT
from device_bed import Daemon, Keys, free_port

from devices import report
from devices.comparison import compare
from devices.errors import BadDeviceError
from devices.resume_log import ResumeLog
from exporter import profiling
from exporter.bundle.bundle import Bundle
from exporter.progress import no_progress

Capture = pytest.CaptureFixture[str]
SHORT = ["max_repeats=1", "sustained_seconds=0", "decode_steps=2", "depths=[0]",
         "prompt_lengths=[4]"]  # fmt: skip


@pytest.fixture(scope="module")
def measured(portable_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One session on this machine, of both artifacts."""
    output = tmp_path_factory.mktemp("report") / "report.json"
    request = profiling.Request(["host"], threads=1, output=output)
    made = profiling.profile(portable_bundle.path, request, no_progress)
    assert made.passed
    assert [path.name for path in output.parent.iterdir()] == ["report.json"]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_figure_of_the_schema_is_measured_on_this_machine(measured: dict[str, Any]) -> None:
    report.validate(measured)
    assert [s["artifact"]["format"] for s in measured["sessions"]] == ["executorch", "onnx"]
    for session in measured["sessions"]:
        assert (session["status"], session["problem"]) == ("complete", None)
        assert session["kind"] in ("real", "virtual") and session["comparable"]
        assert [entry["tokens"] for entry in session["prefill"]] == [8, 32]
        assert [entry["depth"] for entry in session["decode"]] == [0, 64]
        assert session["load"]["repeats"] >= 6 and session["first_load_ms"] > 0
        assert all(
            e["tokens_per_second"]["p50"] > 0 for e in session["prefill"] + session["decode"]
        )
        assert {"start", "load", "prefill", "decode"} <= set(session["memory"]["phases"])
        assert session["memory"]["peak_rss"] > session["memory"]["file_bytes"]
        *steps, _last = session["samples"]["sustained"][0]["ms"]  # the last one began in time
        assert 700 < sum(steps) < 1000
        assert 0 < session["sustained"]["last_to_best"] <= 1
        assert session["operators"] and session["undelegated"] == []
        assert session["predicted"]["memory"] > 0 and session["bandwidth"] > 0
        assert [speed["depth"] for speed in session["predicted"]["speeds"]] == [0, 64]
        assert "energy" in session["not_measured"] or session["energy"]["joules"] > 0


def test_every_raw_sample_is_kept(measured: dict[str, Any]) -> None:
    for session in measured["sessions"]:
        rounds = session["samples"]["rounds"]
        assert len(rounds) == session["load"]["repeats"]
        steps = [r["ms"] for one in rounds for r in one if r["phase"] == "decode"]
        assert {len(ms) for ms in steps} == {4}
        assert len(session["samples"]["sustained"][0]["ms"]) == session["sustained"]["tokens"]


def test_a_report_that_is_not_of_the_schema_is_refused(measured: dict[str, Any]) -> None:
    for change in (
        lambda r: r["sessions"][0].pop("memory"),
        lambda r: r["sessions"][0]["decode"][0]["ms"].update(p50="fast"),
        lambda r: r["sessions"][0].update(status="failed"),
        lambda r: r.update(schema_version=2),
    ):
        broken = json.loads(json.dumps(measured))
        change(broken)
        with pytest.raises(BadDeviceError, match="does not follow the schema"):
            report.validate(broken)


def test_a_report_compared_with_itself_is_neither_faster_nor_slower(
    measured: dict[str, Any],
) -> None:
    rows = compare(measured, measured)
    assert len(rows) == 8
    assert {(row.ratio, row.clear) for row in rows} == {(1.0, False)}
    faster = json.loads(json.dumps(measured))
    for session in faster["sessions"]:
        for entry in session["decode"]:
            entry["ms"].update({key: entry["ms"][key] / 10 for key in ("p50", "low", "high")})
    rows = [row for row in compare(faster, measured) if row.what.startswith("decode")]
    assert [row.ratio for row in rows] == pytest.approx([10.0] * 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "emulated", "comparable": False}, "is emulated: its times mean nothing"),
        ({"kind": "emulated"}, "is emulated: its times mean nothing"),
        ({"kind": "other"}, "Compare devices of one kind"),
        ({"status": "failed"}, "holds no complete session"),
    ],
)
def test_what_must_not_be_compared_is_refused(
    change: dict[str, Any], message: str, measured: dict[str, Any]
) -> None:
    other = json.loads(json.dumps(measured))
    for session in other["sessions"]:
        session.update(change)
    for now, before in ((measured, other), (other, measured)):
        with pytest.raises(BadDeviceError, match=message):
            compare(now, before)


def test_another_device_is_no_baseline(measured: dict[str, Any]) -> None:
    other = json.loads(json.dumps(measured))
    for session in other["sessions"]:
        session["identity"]["name"] = "Acme Phone"
    with pytest.raises(BadDeviceError, match="Give the report of the same device"):
        compare(measured, other)


def profile(capsys: Capture, bundle: Bundle, *arguments: object) -> Outcome:
    return run(capsys, "profile", bundle.path, *SHORT, *arguments)


def test_a_device_that_cannot_be_reached_does_not_spoil_the_others(
    portable_bundle: Bundle, ssh_keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    port = free_port()
    monkeypatch.setenv("MOBILELLM_SSH_CONFIG", str(ssh_keys.client_config(port)))
    gone = f"ssh:root@127.0.0.1:{port}"
    options = ["--target", "executorch", "--device", gone, "--device", "host", "--json"]
    outcome = profile(capsys, portable_bundle, *options)
    assert outcome.code == 1
    first, second = outcome.json["sessions"]
    assert (first["device"], first["status"], first["identity"]) == (gone, "failed", None)
    assert "refused" in first["problem"]
    assert (second["device"], second["status"]) == ("host", "complete")


def test_a_device_that_dies_in_the_middle_has_failed_and_the_other_goes_on(
    adb_device: Daemon, portable_bundle: Bundle
) -> None:
    def watch(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == f"{adb_device.device}: executorch" and done == 2:
            adb_device.die()

    request = profiling.Request(
        [str(adb_device.device), "host"], ["executorch"], ["sustained_seconds=0"], threads=1
    )
    made = profiling.profile(portable_bundle.path, request, watch)
    first, second = made.report["sessions"]
    assert not made.passed
    assert (first["status"], second["status"]) == ("failed", "complete")
    assert "cannot be reached" in first["problem"] or "connection ended" in first["problem"]
    assert len(first["samples"]["rounds"]) == 1


def test_sessions_over_adb_and_ssh_at_the_same_time(
    adb_device: Daemon, ssh_device: Daemon, portable_bundle: Bundle, capsys: Capture
) -> None:
    devices = [str(adb_device.device), str(ssh_device.device)]
    options = [word for device in devices for word in ("--device", device)]
    outcome = profile(capsys, portable_bundle, "--target", "executorch", *options, "--json")
    assert outcome.code == 0, outcome.err
    assert [s["device"] for s in outcome.json["sessions"]] == devices
    assert {s["engine"]["name"] for s in outcome.json["sessions"]} == {"executorch-native"}


def test_a_session_that_was_killed_goes_on_where_it_was(
    portable_bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    resume_log = tmp_path / "report.json.rounds"
    command = [
        sys.executable, "-m", "exporter", "profile", str(portable_bundle.path), "--device", "host",
        "--target", "executorch", "--threads", "1", "precision=0.000001", "max_repeats=12",
        "sustained_seconds=0", "-o", str(output),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not resume_log.is_file() or resume_log.read_text().count("\n") < 3:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = [json.loads(line)["content"] for line in resume_log.read_text().splitlines()[:3]]
    assert not output.exists()
    resume_log.write_text(resume_log.read_text() + '{"key": "cut o')
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (session,) = json.loads(output.read_text())["sessions"]
    assert session["samples"]["first"] == done[0]["records"]
    assert session["samples"]["rounds"][:2] == [step["records"] for step in done[1:]]
    assert len(session["samples"]["rounds"]) == 12
    assert not resume_log.exists()


def test_a_journal_knows_only_what_belongs_to_the_same(tmp_path: Path) -> None:
    path, content = tmp_path / "resume log", {"records": [{"phase": "load", "ms": [1.5]}]}
    ResumeLog(path).add("device and model", "round 1", content)
    assert ResumeLog(path).find("device and model", "round 1") == content
    assert ResumeLog(path).find("device and model", "round 2") is None
    assert ResumeLog(path).find("another model", "round 1") is None


def test_a_program_for_the_official_runner_is_measured_with_the_native_one(
    finished_bundle: Bundle, capsys: Capture
) -> None:
    options = ["--target", "executorch", "--device", "host", "--json"]
    outcome = profile(capsys, finished_bundle, *options)
    assert outcome.code == 0, outcome.err
    (session,) = outcome.json["sessions"]
    assert session["engine"]["name"] == "executorch-native"
    assert session["operators"] and session["undelegated"] == []


def test_where_nothing_can_run_the_reason_and_the_remedy_are_told(
    finished_bundle: Bundle, ssh_device: Daemon, capsys: Capture
) -> None:
    options = ["--target", "coreml", "--device", ssh_device.device]
    outcome = profile(capsys, finished_bundle, *options)
    assert outcome.code == 2
    assert "runs on a Mac only. Give --device mac there" in " ".join(outcome.err.split())


#: llama_main is not in the wheel, but the class behind it is, with the statistics that it prints.
LLAMA_MAIN = """#!{python}
import sys
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
import executorch.kernels.quantized
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner(options["model_path"], options["tokenizer_path"])
config = GenerationConfig(
    echo=False, temperature=0.0, max_new_tokens=int(options["max_new_tokens"])
)
runner.generate(options["prompt"], config, lambda token: None,
                lambda stats: print("PyTorchObserver", stats.to_json_string()))
"""


def test_the_official_runners_own_statistics_become_a_session(
    finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    """Long enough for its clock of whole milliseconds on any machine."""
    program = tmp_path / "llama_main"
    program.write_text(LLAMA_MAIN.format(python=sys.executable))
    program.chmod(0o755)
    options = ["--target", "executorch", "--device", "host", "--runner", program, "--json"]
    long = ["max_repeats=1", "decode_steps=256", "depths=[0]", "prompt_lengths=[512]"]
    outcome = run(capsys, "profile", finished_bundle.path, *long, *options)
    assert outcome.code == 0, outcome.err or outcome.out
    (session,) = outcome.json["sessions"]
    assert session["engine"]["name"] == "llama_main"
    (prefill,), (decode,) = session["prefill"], session["decode"]
    assert 256 <= prefill["tokens"] <= 768
    assert prefill["ms"]["high"] - prefill["ms"]["low"] == pytest.approx(2)
    assert decode["depth"] == prefill["tokens"]
    assert decode["tokens_per_second"]["p50"] > 0
    assert session["not_measured"]["operators"] == "not by this engine"


def test_times_that_a_coarse_clock_cannot_tell_are_no_speeds(
    finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    """A model of this size on a fast machine: the prompt is read within the same millisecond."""
    moments = dict.fromkeys(
        ("model_load_start", "model_load_end", "inference_start", "prompt_eval_end", "first_token"),
        1000,
    ) | {"inference_end": 1001}
    stats = {f"{name}_ms": value for name, value in moments.items()}
    stats |= {"prompt_tokens": 4, "generated_tokens": 2}
    program = tmp_path / "llama_main"
    program.write_text(f"#!/bin/sh\necho 'PyTorchObserver {json.dumps(stats)}'\n")
    program.chmod(0o755)
    options = ["--target", "executorch", "--device", "host", "--runner", program, "--json"]
    outcome = run(capsys, "profile", finished_bundle.path, *SHORT, *options)
    assert outcome.code == 0, outcome.err or outcome.out
    (session,) = outcome.json["sessions"]
    assert (session["prefill"], session["decode"]) == ([], [])
    for name in ("prefill 4", "decode after 4"):
        assert "clock is coarse" in session["not_measured"][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "phone"], "--device phone: names no device"),
        (["--device", "host", "depths=5"], "depths: 5 is not a list of whole numbers"),
        (["--device", "host", "depths=[-1]"], "depths.0: -1 is out of range"),
        (["--device", "host", "speed=9"], "unknown key 'speed'"),
        (["--device", "host", "--target", "coreml"], "--target coreml: is not in"),
        (["--device", "host", "--plot", "x.doc"], "is none of .png, .svg, .pdf"),
        (["--device", "host", "--baseline", "/nowhere"], "/nowhere: no such file"),
        (["--device", "host", "--timeout", "0"], "--timeout 0: is not above 0"),
        (["--device", "host", "--timeout", "-1"], "--timeout -1: is not above 0"),
        (["--device", "host", "--timeout", "nan"], "--timeout nan: is not above 0"),
        (["--device", "host", "--timeout", "inf"], "--timeout inf: is not above 0"),
        (["--device", "host", "--timeout", "1e300"], "at most 864000 seconds"),
        (["--device", "host", "--threads", "-1"], "--threads -1: is not from 0 to 1024"),
        (["--device", "host", "--cores", "4-"], "--cores: '4-' is not a list of cores"),
        (["--device", "host", "--cores", "9999"], "--cores: '9999' is not a list of cores"),
        (["--device", "host", "precision=.nan"], "precision: nan is out of range"),
        (["--device", "host", "precision=.inf"], "precision: inf is out of range"),
        (["--device", "host", "sustained_seconds=1000000"], "is out of range"),
        (["--device", "host", "--runner", "/nowhere/llama_main"], "no such file"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    arguments: list[str], message: str, portable_bundle: Bundle, capsys: Capture
) -> None:
    outcome = run(capsys, "profile", portable_bundle.path, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in " ".join(outcome.err.split())


def test_a_damaged_artifact_is_not_measured(bundle_copy: Path, capsys: Capture) -> None:
    (bundle_copy / "executorch" / "model.pte").write_bytes(b"x")
    outcome = run(capsys, "profile", bundle_copy, "--device", "host")
    assert outcome.code == 2
    assert "The file is damaged: export again" in outcome.err


def test_the_report_as_text_and_picture_says_what_the_machine_is(
    measured: dict[str, Any], portable_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    baseline, plot = tmp_path / "before.json", tmp_path / "plot.svg"
    baseline.write_text(json.dumps(measured))
    options = ["--target", "onnx", "--device", "host", "--baseline", baseline, "--plot", plot]
    before = contents(portable_bundle.path)
    outcome = run(capsys, "profile", portable_bundle.path, "depths=[0]", "max_repeats=1", *options)
    assert outcome.code == 0, outcome.err
    kind = measured["sessions"][0]["kind"]
    assert kind == "real" or f"phase, {kind}" in outcome.out
    for text in ("first token after 8", "decode after 0", "wide interval", "MatMulNBits",
                 "Baseline", "peak memory", "predicted"):  # fmt: skip
        assert text in outcome.out, text
    assert plot.read_text().lstrip().startswith("<?xml")
    assert contents(portable_bundle.path) == before


def test_devices_lists_what_is_connected_and_what_is_known(
    adb_device: Daemon, capsys: Capture
) -> None:
    found = run(capsys, "devices", "--json").json
    assert {"host", str(adb_device.device)} <= set(found["connected"])
    assert "pixel-8" in {device["key"] for device in found["known"]}
    text = run(capsys, "devices")
    assert text.code == 0
    assert str(adb_device.device) in text.out and "Google Pixel 8" in text.out


def test_inspect_predicts_the_speed_on_a_known_device(nano: Path, capsys: Capture) -> None:
    found = run(capsys, "inspect", nano, "--device", "pixel-8", "--json").json
    for forecast in found["recipes"]:
        empty, full = forecast["speeds"]
        assert 0 < full["decode"] < empty["decode"]
    assert "tokens/s on Google Pixel 8" in run(capsys, "inspect", nano, "--device", "pixel-8").out
    outcome = run(capsys, "inspect", nano, "--device", "pixel-99")
    assert outcome.code == 2
    assert "--device pixel-99: is not in the catalogue" in outcome.err
