"""The file that `evaluate -o` writes: bound to what was measured, and read by bundles."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, run
from conftest import NANO, TEXT

from exporter.bundle.bundle import Bundle
from exporter.bundle.evaluation_schema import Evaluation
from exporter.bundle.results import EVALUATION, Result, check_belongs, read_result
from exporter.errors import InputError
from exporter.files import read_json, sha256, write_json
from exporter.model.checkpoint import open_checkpoint
from exporter.quantization.quantized_checkpoint import source_hashes

Capture = pytest.CaptureFixture[str]
Evaluate = Callable[..., Outcome]
SIZED = ("--sequence-length", "32", "--max-tokens", "64", "--max-new-tokens", "40")
PROBLEMS = {
    "Ada has 12 eggs. Ada sells 5. Then 20 eggs are added. How many eggs does Ada have now?": "27",
    "Ben has 30 pens. How many kites?": "no number",
}


@pytest.fixture
def inputs(tmp_path: Path) -> list[object]:
    """Options with a text, problems and a reference."""
    data, task = tmp_path / "data.txt", tmp_path / "task.jsonl"
    data.write_text(TEXT)
    task.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in PROBLEMS.items()))
    return ["--data", data, "--task", task, "--reference", NANO, "--generations", "1", *SIZED]


@pytest.fixture
def evaluate(inputs: list[object], capsys: Capture) -> Evaluate:
    """Evaluate a path, and write the result."""

    def run_it(path: Path, out: Path, *options: object) -> Outcome:
        return run(capsys, "evaluate", path, *inputs, *options, "-o", out)

    return run_it


def content_of(outcome: Outcome, out: Path) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    return read_json(out)


def test_a_result_names_what_was_measured_by_its_hashes(
    finished_bundle: Bundle, evaluate: Evaluate, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "onnx.json"
    found = content_of(evaluate(finished_bundle.path, out, "--target", "onnx"), out)
    folder = finished_bundle.path / "onnx"
    assert found["files"] == {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "artifact.json"
    }
    assert (found["result"], found["target"]) == (EVALUATION, "onnx")
    for key, name in (("data", "data.txt"), ("task", "task.jsonl")):
        assert found[key] == {"file": name, "sha256": sha256(tmp_path / name)}
    assert found["reference"] == source_hashes(open_checkpoint(NANO))
    assert found["reference"] == finished_bundle.manifest.source
    assert found["settings"] == {
        "field": None, "max_tokens": 64, "sequence_length": 32, "prefill": 1, "limit": None,
        "max_new_tokens": 40, "generations": 1, "simulate": False,
    }  # fmt: skip
    assert found["versions"].keys() >= {"mobilellm-exporter", "torch", "onnxruntime"}
    assert list(found) == list(Evaluation.model_fields)


def test_the_figures_are_those_of_the_command_and_each_problem_is_there(
    finished_bundle: Bundle, inputs: list[object], evaluate: Evaluate, tmp_path: Path,
    capsys: Capture,
) -> None:  # fmt: skip
    out, path = tmp_path / "result.json", finished_bundle.path / "quantized"
    outcome = evaluate(path, out)
    assert "written to" in outcome.out and str(out) in outcome.out
    figures = content_of(outcome, out)["figures"]
    shown = run(capsys, "evaluate", path, *inputs, "--json").json
    assert figures == {name: shown[name] for name in figures}
    assert shown.keys() - figures.keys() == {"path", "attempts", "seconds", "peak_rss_bytes"}
    assert figures["correct"] == [int(attempt["solved"]) for attempt in shown["attempts"]]
    assert figures["correct"][1] == 0 and figures["problems"] == 2
    assert figures["kl"] > figures["kl_error"] > 0
    assert figures["kl_by_layer"] is None


def test_the_same_inputs_give_the_same_bytes_without_a_path(
    finished_bundle: Bundle, inputs: list[object], tmp_path: Path, capsys: Capture
) -> None:
    moved = Path(shutil.copytree(finished_bundle.path, tmp_path / "elsewhere" / "other"))
    outs = [tmp_path / "one.json", tmp_path / "other.json"]
    for path, out in zip((finished_bundle.path, moved), outs, strict=True):
        outcome = run(capsys, "evaluate", path, *inputs, "--target", "executorch", "-o", out)
        assert outcome.code == 0, outcome.err
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert str(tmp_path) not in outs[0].read_text()


@pytest.mark.parametrize("suffix", [".tar.zst", ".zip"])
def test_an_archive_of_a_bundle_is_measured_and_answers_like_its_folder(
    suffix: str, finished_bundle: Bundle, inputs: list[object], tmp_path: Path, capsys: Capture
) -> None:
    archive = tmp_path / f"nano{suffix}"
    assert run(capsys, "package", finished_bundle.path, "-o", archive).code == 0
    outs = [tmp_path / "archive.json", tmp_path / "folder.json"]
    for path, out in zip((archive, finished_bundle.path), outs, strict=True):
        asked = [*inputs[:2], *SIZED, "--target", "onnx", "-o", out]
        outcome = run(capsys, "evaluate", path, *asked)
        assert outcome.code == 0, outcome.err
    assert outs[0].read_bytes() == outs[1].read_bytes()
    texts = [
        run(
            capsys, "generate", path, "--target", "onnx", "--prompt", "What is 2 + 3?",
            "--max-new-tokens", "8", "--json",
        ).json["text"]
        for path in (archive, finished_bundle.path)
    ]  # fmt: skip
    assert texts[0] == texts[1] != ""


def test_an_archive_that_is_missing_or_damaged_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "damaged.zip").write_bytes(b"PK" + bytes(100))
    for name in ("missing.tar.zst", "damaged.zip"):
        for command in (["evaluate", "--data", "x"], ["generate", "--prompt", "x"]):
            outcome = run(capsys, command[0], tmp_path / name, *command[1:])
            assert outcome.code == 2 and name in outcome.err


@pytest.mark.parametrize("target", [None, "onnx", "coreml"])
def test_a_result_belongs_to_its_bundle_and_to_no_other(
    target: str | None, finished_bundle: Bundle, evaluate: Evaluate, tmp_path: Path
) -> None:
    out, path = tmp_path / "result.json", finished_bundle.path
    options = ["--target", target] if target else []
    assert evaluate(path if target else path / "quantized", out, *options).code == 0
    result = read_result(out)
    assert (result.kind, result.content) == (EVALUATION, read_json(out))
    check_belongs(result, finished_bundle.manifest, out)
    kinds = {None: "quantized checkpoint in torch", "coreml": "coreml, interpreted"}
    assert result.content["figures"]["kind"] == kinds.get(target, target)
    name = f"{target or 'quantized'}/{next(iter(result.content['files']))}"
    entry = finished_bundle.manifest.files[name]
    other = {**finished_bundle.manifest.files}
    for files in (
        {**other, name: entry.model_copy(update={"sha256": "0" * 64})},
        {key: value for key, value in other.items() if key != name},
    ):
        manifest = finished_bundle.manifest.model_copy(update={"files": files})
        with pytest.raises(InputError, match=f"measured another {name}"):
            check_belongs(result, manifest, out)
    for left_out in result.content["files"]:
        files = {k: v for k, v in result.content["files"].items() if k != left_out}
        partial = Result(EVALUATION, {**result.content, "files": files})
        with pytest.raises(InputError, match=f"does not name .*/{left_out}"):
            check_belongs(partial, finished_bundle.manifest, out)


def test_a_result_of_a_float_checkpoint_belongs_to_no_bundle(
    finished_bundle: Bundle, evaluate: Evaluate, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "float.json"
    found = content_of(evaluate(NANO, out), out)
    assert found["files"] == found["reference"] == finished_bundle.manifest.source
    packaged = tmp_path / "packaged"
    outcome = run(capsys, "package", finished_bundle.path, "--result", out, "-o", packaged)
    assert outcome.code == 2 and "measured another quantized/" in outcome.err
    assert not packaged.exists()


def test_settings_of_what_was_not_measured_are_left_out(
    tmp_path: Path, inputs: list[object], capsys: Capture
) -> None:
    out = tmp_path / "out.json"
    options = [*inputs[:2], "--sequence-length", "32", "--max-tokens", "64", "-o", out]
    found = content_of(run(capsys, "evaluate", NANO, *options), out)
    assert (found["task"], found["reference"]) == (None, None)
    assert found["settings"]["sequence_length"] == 32
    assert found["settings"]["max_new_tokens"] is None and found["figures"]["correct"] is None
    assert read_result(out).kind == EVALUATION


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("files"), "files: is missing"),
        (lambda c: c["files"].update({"../x": "0" * 64}), "is not the plain name"),
        (lambda c: c["data"].update(sha256="abc"), "data.sha256: 'abc' is not a SHA-256"),
        (lambda c: c.update(schema_version=2), "schema_version: 2 is not one of 1"),
        (lambda c: c.update(seconds=3), "unknown key 'seconds'"),
        (lambda c: c["figures"].update(kl=float("nan")), "figures.kl: nan"),
        (lambda c: c["figures"].update(kl="0.1"), "figures.kl: '0.1' is not of type float"),
        (lambda c: c["figures"].update(accuracy=1.5), "figures.accuracy: 1.5"),
        (lambda c: c["figures"].update(correct=[1]), "figures.correct: does not add up"),
        (lambda c: c["figures"].update(correct=[1, 1]), "figures.correct: does not add up"),
        (lambda c: c["figures"].update(correct=[0, 2]), "figures.correct.1: 2 is not one of 0, 1"),
        (
            lambda c: c["figures"].update(kl_by_layer=[{"layer": "a\x1b", "kl": 0.1}]),
            "figures.kl_by_layer.0.layer",
        ),
    ],
)
def test_a_damaged_result_is_refused_with_its_key(
    change: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path
) -> None:
    hashes = {"model.onnx": "1" * 64}
    figures = {"kind": "onnx", "problems": 2, "accuracy": 0.5, "correct": [1, 0]}
    content: dict[str, Any] = {
        "result": "evaluation", "schema_version": 1, "target": "onnx", "files": hashes,
        "data": {"file": "a", "sha256": "2" * 64}, "task": None, "reference": None,
        "settings": {}, "versions": {}, "figures": figures,
    }  # fmt: skip
    write_json(tmp_path / "r.json", content)
    assert read_result(tmp_path / "r.json").kind == EVALUATION
    change(content)
    write_json(tmp_path / "r.json", content)
    with pytest.raises(InputError) as raised:
        read_result(tmp_path / "r.json")
    assert reason in str(raised.value)


# Where it may be written.


def test_an_earlier_result_is_replaced_and_any_other_file_is_kept(
    inputs: list[object], tmp_path: Path, capsys: Capture
) -> None:
    def evaluated(out: Path) -> Outcome:
        return run(capsys, "evaluate", NANO, *inputs[:2], *SIZED, "-o", out)

    out = tmp_path / "out.json"
    assert (evaluated(out).code, evaluated(out).code) == (0, 0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "notes.txt")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text("mine")
    write_json(tmp_path / "profile.json", {"sessions": []})
    for name, reason in (
        ("notes.txt", "exists and is no evaluation result"),
        ("profile.json", "exists and is no evaluation result"),
        ("link", "exists and is no evaluation result"),
        ("folder", "cannot be written (Is a folder"),
        ("pipe", "cannot be written (Is a device, a pipe or a socket"),
        ("notes.txt/out.json", "notes.txt: is a file"),
    ):
        outcome = evaluated(tmp_path / name)
        assert (outcome.code, reason in outcome.err) == (2, True), (name, outcome.err)
        assert "text …" not in outcome.err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert read_json(tmp_path / "profile.json") == {"sessions": []}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(
    inputs: list[object], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    outcome = run(
        capsys, "evaluate", NANO, *inputs[:2], *SIZED, "-o", tmp_path / "locked" / "out.json"
    )
    assert outcome.code == 2 and "is read-only" in outcome.err


def test_a_bundle_gets_no_foreign_file(
    bundle_copy: Path, inputs: list[object], capsys: Capture
) -> None:
    for out in (bundle_copy / "out.json", bundle_copy / "onnx" / ".." / "results" / "out.json"):
        outcome = run(capsys, "evaluate", bundle_copy, *inputs, "-o", out)
        assert outcome.code == 2 and "lies inside the model that is measured" in outcome.err
        assert not out.exists()


def test_a_simulation_gives_no_result(
    finished_bundle: Bundle, inputs: list[object], tmp_path: Path, capsys: Capture
) -> None:
    options = [*inputs[:2], *SIZED, "--simulate", "-o", tmp_path / "out.json"]
    outcome = run(capsys, "evaluate", finished_bundle.path, *options)
    assert outcome.code == 2 and "measures no artifact" in outcome.err


def test_a_data_file_whose_name_no_manifest_can_hold_is_refused(
    tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "a\nb.txt"
    data.write_text(TEXT)
    outcome = run(capsys, "evaluate", NANO, "--data", data, *SIZED, "-o", tmp_path / "out.json")
    assert outcome.code == 2 and "has a name that a result cannot hold" in outcome.err
