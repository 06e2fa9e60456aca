"""A format is one module: added to the others, it works in every command."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run
from conftest import LLAMA, MakeCheckpoint

from exporter import backends
from exporter.bundle.artifact import open_artifact

Capture = pytest.CaptureFixture[str]
RECIPE = """
model: {model}
quantization: {{linear: int4-g32, embedding: int8}}
max_context: 200
targets: [{{target: npz, threads: 2}}]
"""


@pytest.fixture
def npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module of tests/formats in a folder of the package, and nothing else."""
    folder = tmp_path / "backends"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "formats" / "npz.py", folder)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("exporter.backends.npz", None)
    if hasattr(backends, "npz"):
        del backends.npz


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe for the new format among those that come with the tool."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny-npz.yaml").write_text(RECIPE.format(model="someone/model"))
    monkeypatch.setattr("exporter.recipe.recipe_folder", lambda: folder)
    return "tiny-npz"


@pytest.mark.usefixtures("npz")
def test_a_format_of_one_module_is_known_to_every_command(
    recipe: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint, bundle = make_checkpoint(LLAMA), tmp_path / "bundle"
    listed = run(capsys, "recipes")
    assert "npz (200 tokens)" in listed.out
    forecasts = run(capsys, "inspect", checkpoint, "--json").json["recipes"]
    assert [(one["recipe"], one["target"]) for one in forecasts] == [(recipe, "npz")]

    made = run(capsys, "export", recipe, "--checkpoint", checkpoint, "-o", bundle)
    assert made.code == 0, made.err + made.out
    file = bundle / "npz" / "model.npz"
    predicted = forecasts[0]["prediction"]["file"]
    assert predicted == pytest.approx(file.stat().st_size, rel=0.15)

    checks = run(capsys, "verify", bundle, "--json").json["checks"]
    kinds = {check["check"] for check in checks if check["target"] == "npz"}
    assert {"integers", "logits.kl", "logits.max_difference"} <= kinds
    assert all(check["passed"] for check in checks)

    found = run(capsys, "inspect", file, "--json").json
    assert found["arrays"]["model.norm.weight"] == [64]
    assert "arrays" in run(capsys, "inspect", file).out


@pytest.mark.usefixtures("npz")
def test_lower_takes_the_options_of_a_new_format_and_refuses_others(
    recipe: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    quantized = tmp_path / "quantized"
    run(capsys, "quantize", recipe, "--checkpoint", make_checkpoint(LLAMA), "-o", quantized)
    command = ["lower", quantized, "--target", "npz", "-o", tmp_path / "out"]
    refused = run(capsys, *command, "bits=4")
    assert refused.code == 2
    assert "unknown key 'bits'. Keys: target, max_context, threads" in refused.err
    refused = run(capsys, *command, "threads=0", "max_context=64")
    assert "threads: 0 is too few" in refused.err
    made = run(capsys, *command, "threads=3", "max_context=64", "--json")
    assert made.json["target"] == {"target": "npz", "max_context": 64, "threads": 3}
    assert "coreml, executorch, gguf, mlx, npz, onnx" in run(capsys, "lower", "--help").out


@pytest.mark.usefixtures("npz")
def test_a_file_that_a_new_format_cannot_hold_is_refused_before_any_work(
    recipe: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint, quantized = make_checkpoint(LLAMA), tmp_path / "quantized"
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    run(capsys, "quantize", recipe, "--checkpoint", checkpoint, "-o", quantized)
    for command in (
        ["lower", quantized, "--target", "npz", "-o", tmp_path / "out", "max_context=200"],
        ["export", recipe, "--checkpoint", checkpoint, "-o", tmp_path / "out"],
    ):
        refused = run(capsys, *command)
        assert refused.code == 2
        assert "chat_template.jinja: has no place in an .npz. Remove it." in refused.err
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("npz")
def test_verify_reads_the_codes_of_a_new_format(
    recipe: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    run(capsys, "export", recipe, "--checkpoint", make_checkpoint(LLAMA), "-o", bundle)
    path = bundle / "npz" / "model.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["lm_head.weight:codes"][3, 5] ^= 1
    np.savez(path, **arrays)
    checked = run(capsys, "verify", bundle)
    assert checked.code == 1
    assert "lm_head.weight (array): 1 codes differ; at [3, 5]" in checked.out


@pytest.mark.usefixtures("npz")
def test_the_differences_of_a_new_format_are_named(
    recipe: str, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    bundle = tmp_path / "bundle"
    run(capsys, "export", recipe, "--checkpoint", make_checkpoint(LLAMA), "-o", bundle)
    expected = open_artifact(bundle / "npz").artifact
    changed = replace(expected, path=tmp_path)
    with np.load(bundle / "npz" / "model.npz") as file:
        arrays = {name: file[name] for name in reversed(file.files)}
    np.savez(tmp_path / "model.npz", **arrays)
    module = backends.front("npz")
    assert list(module.differences(changed, expected)) == []
    arrays["model.norm.weight"][3] += 1
    del arrays["lm_head.weight:scales"]
    np.savez(tmp_path / "model.npz", **arrays)
    found = dict(module.differences(changed, expected))
    assert found["lm_head.weight:scales"] == "is missing"
    assert found["model.norm.weight"].startswith("1 of 64 values differ, first at [3]: ")
    assert len(found) == 2


def test_a_format_that_is_not_there_is_unknown(tmp_path: Path, capsys: Capture) -> None:
    refused = run(capsys, "lower", tmp_path, "--target", "npz", "-o", tmp_path / "out")
    assert refused.code == 2
    assert "'npz' is not a target. Known: coreml, executorch, gguf, mlx, onnx" in refused.err
