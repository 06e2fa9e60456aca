"""The command line: its results as text and as JSON, its help, its exit codes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT

import pytest
from commands import contents, run
from conftest import LLAMA, NANO, MakeCheckpoint

from exporter.bundle.bundle import Bundle

RECIPE = "mobilellm-r1-nano-int4"
PROBLEM = "Ada has 12 eggs. Ada sells 5. Then 20 eggs are added. How many eggs does Ada have now?"
COMMANDS = (
    "inspect quantize lower export verify evaluate generate profile devices recipes doctor".split()
)
CHECK_KEYS = {"check", "target", "subject", "passed", "value", "limit", "note"}
RESULT_KEYS = {"path", "bytes", "float_weights", "seconds", "peak_rss_bytes"}

Capture = pytest.CaptureFixture[str]


def subprocess_of(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "exporter", *arguments],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip


def test_python_m_exporter_shows_the_help_and_every_command() -> None:
    outcome = subprocess_of("--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert [name for name in COMMANDS if f"\n    {name} " not in outcome.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_an_example_and_the_exit_codes(
    command: str, capsys: Capture
) -> None:
    outcome = run(capsys, command, "--help")
    assert outcome.code == 0
    assert f"\n  mobilellm {command}" in outcome.out
    assert "Exit codes: 0 success, 1 a check failed, 2 wrong usage" in outcome.out


def test_inspect_as_json_has_the_configuration_and_a_prediction_for_each_recipe(
    nano: Path, capsys: Capture
) -> None:
    found = run(capsys, "inspect", nano, "--json").json
    assert found["parameters"] == 2_460_096
    assert found["config"]["hidden_size"] == 192
    assert (found["bos_token_id"], found["eos_token_ids"]) == (0, [1, 2, 3])
    names = {forecast["recipe"] for forecast in found["recipes"]}
    assert {"mobilellm-r1-nano-int4", "mobilellm-r1-nano-int8"} <= names
    assert all(name.startswith("mobilellm-r1-nano-") for name in names)
    assert set(found["recipes"][0]["prediction"]) == {"file", "kv_cache", "memory"}


def test_inspect_shows_parameters_and_predicted_sizes(nano: Path, capsys: Capture) -> None:
    outcome = run(capsys, "inspect", nano)
    assert outcome.code == 0
    assert "2,460,096 (bfloat16)" in outcome.out
    assert re.search(r"mobilellm-r1-nano-int4 +executorch +1\.5 MB", outcome.out)


def test_inspect_says_why_a_recipe_does_not_fit(
    make_checkpoint: MakeCheckpoint, capsys: Capture
) -> None:
    outcome = run(capsys, "inspect", make_checkpoint(LLAMA))
    assert outcome.code == 0
    assert "does not fit: max_context 2048 is more than the model's 256" in outcome.out


def test_quantize_as_json_names_every_float_weight_with_its_reason(
    nano: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "quantized"
    found = run(capsys, "quantize", RECIPE, "--checkpoint", nano, "-o", out, "--json").json
    assert set(found) == RESULT_KEYS
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert len(found["float_weights"]) == 13
    assert set(found["float_weights"].values()) == {"a normalization weight, one vector"}


def test_quantize_shows_size_and_what_is_left_in_float(
    nano: Path, tmp_path: Path, capsys: Capture
) -> None:
    outcome = run(capsys, "quantize", RECIPE, "--checkpoint", nano, "-o", tmp_path / "quantized")
    assert outcome.code == 0
    assert "1.4 MB in" in outcome.out
    assert "model.layers.N.input_layernorm.weight (6×)" in outcome.out


def test_lower_as_json_has_the_manifest_with_the_hash_of_every_file(
    finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    quantized, out = finished_bundle.path / "quantized", tmp_path / "out"
    found = run(capsys, "lower", quantized, "--target", "executorch", "-o", out, "--json").json
    assert {"path", "bytes", "target", "files", "versions", "seconds"} <= set(found)
    hashes = {name: digest for name, digest in contents(out).items() if name != "artifact.json"}
    assert found["files"] == hashes


@pytest.mark.parametrize("overrides_last", [False, True])
def test_overrides_may_stand_before_and_after_the_options(
    overrides_last: bool, finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    """The example of `lower --help` puts them last."""
    options = ["--target", "executorch", "-o", str(tmp_path / "out"), "--json"]
    overrides = ["max_context=64"]
    rest = [*options, *overrides] if overrides_last else [*overrides, *options]
    outcome = run(capsys, "lower", finished_bundle.path / "quantized", *rest)
    assert outcome.code == 0, outcome.err
    assert outcome.json["target"]["max_context"] == 64


def test_export_verify_and_generate_work_one_after_the_other(
    nano: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "bundle"
    exported = run(capsys, "export", RECIPE, "--checkpoint", nano, "-o", out, "--json").json
    assert set(exported) == RESULT_KEYS | {"passed", "checks", "stages", "damaged_stages"}
    assert exported["passed"] is True
    verified = run(capsys, "verify", out, "--json").json
    assert set(verified) == {"passed", "checks"}
    assert {frozenset(check) for check in verified["checks"]} == {frozenset(CHECK_KEYS)}
    assert verified["passed"] is all(check["passed"] for check in verified["checks"]) is True
    said = run(capsys, "generate", out, "--prompt", PROBLEM, "--json").json
    assert said["finish_reason"] == "stop"
    assert "The answer is \\boxed{" in said["text"]


def test_verify_shows_one_line_for_each_kind_of_check(
    finished_bundle: Bundle, capsys: Capture
) -> None:
    outcome = run(capsys, "verify", finished_bundle.path)
    assert outcome.code == 0
    count = sum(path.is_file() for path in finished_bundle.path.rglob("*")) - 1  # SHA256SUMS
    assert re.search(rf"✓ +files +{count} of {count}", outcome.out)
    assert re.search(r"✓ +integers +executorch +57 of 57", outcome.out)
    assert re.search(r"all \d+ checks passed\n", outcome.out)


def test_verify_takes_a_quantized_checkpoint_alone(
    finished_bundle: Bundle, capsys: Capture
) -> None:
    outcome = run(capsys, "verify", finished_bundle.path / "quantized", "--json")
    assert outcome.code == 0
    checks = {check["check"] for check in outcome.json["checks"]}
    assert checks == {"files", "manifest", "quantized"}


Source = Callable[[Bundle], Path]
SOURCES: dict[str, Source] = {
    "checkpoint": lambda bundle: NANO,
    "quantized": lambda bundle: bundle.path / "quantized",
    "artifact": lambda bundle: bundle.path / "executorch",
    "file": lambda bundle: bundle.path / "executorch" / "model.pte",
    "bundle": lambda bundle: bundle.path,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_generate_as_json_has_the_documented_keys_for_every_kind_of_model(
    source: Source, finished_bundle: Bundle, capsys: Capture
) -> None:
    said = run(capsys, "generate", source(finished_bundle), "--prompt", PROBLEM, "--json").json
    assert list(said) == "prompt_text prompt_tokens tokens text finish_reason seconds".split()
    assert set(said["seconds"]) == {"load", "prefill", "decode"}
    assert said["finish_reason"] == "stop"
    assert said["prompt_text"].startswith("<|begin_of_text|><|start_header_id|>user")
    assert 10 < len(said["tokens"]) < 512


def test_generate_gives_the_same_tokens_from_bundle_artifact_and_file(
    finished_bundle: Bundle, capsys: Capture
) -> None:
    said = [
        run(capsys, "generate", SOURCES[kind](finished_bundle), "--prompt", PROBLEM, "--json").json
        for kind in ("bundle", "artifact", "file")
    ]
    assert said[0]["tokens"] == said[1]["tokens"] == said[2]["tokens"]


def test_generate_prints_the_text_alone_on_stdout(finished_bundle: Bundle, capsys: Capture) -> None:
    text = run(capsys, "generate", finished_bundle.path, "--prompt", PROBLEM, "--json").json["text"]
    outcome = run(capsys, "generate", finished_bundle.path, "--prompt", PROBLEM)
    assert outcome.out == text + "\n"
    assert "executorch: " in outcome.err
    assert "(stop)" in outcome.err


def test_generate_stops_after_max_new_tokens(finished_bundle: Bundle, capsys: Capture) -> None:
    said = run(
        capsys, "generate", finished_bundle.path, "--prompt", PROBLEM, "--max-new-tokens", 5,
        "--json",
    ).json  # fmt: skip
    assert (len(said["tokens"]), said["finish_reason"]) == (5, "length")


def test_sampling_repeats_with_its_seed_and_differs_with_another(
    finished_bundle: Bundle, capsys: Capture
) -> None:
    def tokens(seed: int) -> list[int]:
        options = ["--raw", "--temperature", 1.5, "--seed", seed, "--json"]
        said = run(capsys, "generate", finished_bundle.path, "--prompt", "Ada has", *options).json
        return list(said["tokens"])

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_generate_reads_the_prompt_from_stdin(
    finished_bundle: Bundle, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text(PROBLEM)
    with (tmp_path / "prompt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        said = run(capsys, "generate", finished_bundle.path, "--prompt", "-", "--json").json
    assert PROBLEM in said["prompt_text"]


def test_recipes_as_json_are_those_of_the_recipe_folder(capsys: Capture) -> None:
    found = run(capsys, "recipes", "--json").json["recipes"]
    files = {path.stem for path in (NANO.parent.parent / "recipes").glob("*.yaml")}
    assert {recipe["name"] for recipe in found} == files
    assert set(found[0]) == {
        "name", "model", "license", "quantization", "calibration", "targets", "profile",
    }  # fmt: skip


def test_recipes_shows_a_line_for_each(capsys: Capture) -> None:
    outcome = run(capsys, "recipes")
    assert outcome.code == 0
    pattern = r"mobilellm-r1-nano-int8 +int8 +int8 +mse +executorch \(1,024 tokens\)"
    assert re.search(pattern, outcome.out)


def test_doctor_finds_executorch_at_the_pinned_version(capsys: Capture) -> None:
    found = run(capsys, "doctor", "--json").json
    assert set(found) == {"fine", "findings"}
    (finding,) = (f for f in found["findings"] if f["subject"] == "executorch [executorch]")
    assert set(finding) == {"subject", "found", "wanted", "fine", "required", "remedy"}
    assert finding["fine"] is (finding["wanted"] == f"=={finding['found']}")


def test_doctor_exits_with_0_exactly_when_nothing_required_is_missing(capsys: Capture) -> None:
    outcome = run(capsys, "doctor", "--json")
    required = [finding["fine"] for finding in outcome.json["findings"] if finding["required"]]
    assert outcome.code == (0 if all(required) else 1)


def test_progress_goes_to_stderr_and_the_result_to_stdout(
    nano: Path, tmp_path: Path, capsys: Capture
) -> None:
    outcome = run(capsys, "export", RECIPE, "--checkpoint", nano, "-o", tmp_path / "out")
    stages = ["quantize …", "lower executorch …", "verify executorch: logits …"]
    assert [stage for stage in stages if stage not in outcome.err] == []
    assert [stage for stage in stages if stage in outcome.out] == []
    assert "checks passed" in outcome.out
    assert "checks passed" not in outcome.err


def test_an_interrupted_export_exits_with_130_and_says_how_to_go_on(
    nano: Path, tmp_path: Path
) -> None:
    # A test run in the background ignores interrupts, and so would its children.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from exporter.cli import main; main()"
    )
    command = ["export", RECIPE, "--checkpoint", str(nano), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("lower executorch"):
            process.send_signal(SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "interrupted; run the same command again" in err
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    outcome = subprocess.run(
        [sys.executable, "-m", "exporter", "recipes", "--json"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (outcome.returncode, outcome.stderr) == (0, "")
