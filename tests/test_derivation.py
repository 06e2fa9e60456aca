"""Deriving again: from the source by every method, and after an update of the toolkits."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from calibrating import recipe_of, small_checkpoint
from commands import run
from conftest import TEXT, MakeCheckpoint, write_checkpoint
from tampering import edited, reseal
from torch import Tensor

from exporter import pipeline
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.recipe import parse_recipe
from exporter.verification.checks import Check, failures

MakeBundle = Callable[..., Path]


@pytest.fixture(scope="module")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """make_bundle(method, budget=…): a small model as ONNX, beside its text and source."""
    made: dict[tuple[str, str], Path] = {}

    def make(method: str, budget: str = "") -> Path:
        if (method, budget) not in made:
            folder = tmp_path_factory.mktemp(method)
            (folder / "text.txt").write_text(TEXT)

            def write(config: dict[str, Any], name: str, weights: dict[str, Tensor]) -> Path:
                return write_checkpoint(folder / name, config, weights)

            checkpoint = small_checkpoint(write, name="source")
            raw = recipe_of(method, folder / "text.txt", budget=budget, steps=1).to_dict()
            raw["targets"] = [{"target": "onnx", "max_context": 128}]
            result = pipeline.export(
                parse_recipe(raw, "small"), checkpoint, folder / "bundle", no_progress
            )
            assert result.bundle is not None, list(failures(result.checks))
            made[method, budget] = folder / "bundle"
        return made[method, budget]

    return make


def from_source(bundle: Path, source: Path | None = None) -> list[Check]:
    """The checks of `verify --source` that are about the source."""
    checkpoint = open_checkpoint(source or bundle.parent / "source")
    checks = pipeline.verify(bundle, no_progress, source=checkpoint, quick=True)
    return [check for check in checks if check.check == "source"]


def reports(checks: Sequence[Check]) -> list[str]:
    """The notes of the checks that have no limit."""
    return [check.note for check in checks if check.limit is None]


@pytest.mark.parametrize(
    ("method", "budget"), [("absmax", ""), ("mse", ""), ("gptq", ""), ("gptq", "6 bits")]
)
def test_the_weights_are_quantized_again_from_the_source(
    method: str, budget: str, make_bundle: MakeBundle
) -> None:
    checks = from_source(make_bundle(method, budget))
    assert list(failures(checks)) == []
    assert reports(checks) == []
    assert sum(check.subject.endswith(".weight") for check in checks) == 20


def test_a_distillation_is_not_run_again_and_verify_says_so(make_bundle: MakeBundle) -> None:
    checks = from_source(make_bundle("distill"))
    assert list(failures(checks)) == []
    (note,) = reports(checks)
    assert "a distillation is not run again here" in note
    # The weights in float are compared.
    assert sum(check.subject.endswith("norm.weight") for check in checks) == 5


def test_without_its_text_gptq_is_not_run_again_and_verify_says_so(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    made = make_bundle("gptq")
    text = (made.parent / "text.txt").rename(tmp_path / "aside")
    try:
        (note,) = reports(from_source(made))
        assert "text.txt" in note
        (made.parent / "text.txt").write_text(TEXT.replace("Ada", "Eve"))
        (note,) = reports(from_source(made))
        assert "calibration.text" in note
    finally:
        text.replace(made.parent / "text.txt")


def test_another_source_is_refused_by_its_files(
    make_bundle: MakeBundle, make_checkpoint: MakeCheckpoint
) -> None:
    wrong = {
        check.subject
        for check in failures(from_source(make_bundle("absmax"), make_checkpoint(vocab_size=64)))
    }
    assert {"config.json", "model.safetensors"} <= wrong


def updated(bundle: Path, to: Path) -> Path:
    """The bundle as another version of the toolkit would have written it."""
    shutil.copytree(bundle, to)
    for name in ("manifest.json", "onnx/artifact.json"):
        with edited(to / name) as manifest:
            manifest["versions"]["onnx"] = "1.20.0"
    # Other bytes, the same model: a later version may order the fields of a node otherwise.
    model = onnx.load(str(to / "onnx" / "onnx" / "model_q4.onnx"), load_external_data=False)
    model.producer_version = "1.20.0"
    (to / "onnx" / "onnx" / "model_q4.onnx").write_bytes(
        model.SerializeToString(deterministic=True)
    )
    reseal(to)
    return to


def test_after_an_update_of_the_toolkit_structure_is_compared(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = updated(make_bundle("absmax"), tmp_path / "bundle")
    outcome = run(capsys, "verify", bundle)
    assert outcome.code == 0
    assert "onnx 1.20.0, here " in outcome.out
    assert "the structure of the models is compared instead of their bytes" in outcome.out


def test_after_an_update_of_the_toolkit_a_changed_model_is_still_found(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = updated(make_bundle("absmax"), tmp_path / "bundle")
    model = onnx.load(str(bundle / "onnx" / "onnx" / "model_q4.onnx"), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f *= 2
    (bundle / "onnx" / "onnx" / "model_q4.onnx").write_bytes(
        model.SerializeToString(deterministic=True)
    )
    reseal(bundle)
    outcome = run(capsys, "verify", bundle)
    assert outcome.code == 1
    assert "epsilon" in outcome.out


@pytest.mark.parametrize("name", ["tokenizer.json", "genai_config.json"])
def test_after_an_update_of_the_toolkit_a_changed_companion_is_still_found(
    name: str, make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = updated(make_bundle("absmax"), tmp_path / "bundle")
    path = bundle / "onnx" / name
    path.write_text(path.read_text().replace("1", "2", 1))
    reseal(bundle)
    outcome = run(capsys, "verify", bundle)
    assert outcome.code == 1
    assert f"onnx/{name}" in outcome.out
