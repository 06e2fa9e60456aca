"""The model card of a bundle: what the hub reads in it, what a person reads, and hostile text."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gating import counts, evaluation, profile
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from markdown_it.token import Token

from exporter import packaging
from exporter.backends import front, names
from exporter.bundle.bundle import Bundle
from exporter.bundle.card import card
from exporter.bundle.licence import Licence
from exporter.bundle.manifest import BundleManifest, WeightEntry, read_manifest
from exporter.bundle.origin import is_hub_id
from exporter.bundle.results import EVALUATION, INSTRUCTIONS, PROFILE, Result
from exporter.pipeline import no_progress
from exporter.recipe import load_recipe

HOSTILE = (
    "`x` **b** [l](javascript:y) <img src=z onerror=w> | a\n# h\n---\nhttps://a.b \x1b[31m\u202e"
)
RATE = {"p50": 2.5, "p95": 3.0, "low": 2.4, "high": 2.6, "confidence": 0.95, "repeats": 20}


@pytest.fixture(scope="module")
def manifest(finished_bundle: Bundle) -> BundleManifest:
    return read_manifest(finished_bundle.path)


def changed(manifest: BundleManifest, **changes: Any) -> BundleManifest:
    return manifest.model_copy(update=changes)


def measured(manifest: BundleManifest, **session: Any) -> dict[str, Result]:
    decode = [{"depth": 0, "ms": RATE, "tokens_per_second": RATE}]
    times = {("decode", 0): [2.4, 2.5, 2.6]}
    return {
        "results/a.json": Result(EVALUATION, evaluation(manifest)),
        "results/b.json": Result(
            PROFILE, profile(manifest, times, **{"decode": decode, **session})
        ),
        "results/c.json": Result(INSTRUCTIONS, counts(manifest, {"gemm": 1_000_000.0})),
    }


def front_matter(content: bytes, folder: Path) -> dict[str, Any]:
    """The front matter as the hub's client reads it."""
    (folder / "README.md").write_bytes(content)
    found = metadata_load(folder / "README.md")
    assert found is not None
    ModelCard.load(folder / "README.md")
    return found


def tokens(content: bytes) -> Iterator[Token]:
    """Every token of the body as a parser of GitHub's Markdown finds it, with HTML and links."""
    body = content.decode().split("\n---\n", 1)[1]
    for token in MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(body):
        yield token
        yield from token.children or ()


# What the hub reads.


def test_the_front_matter_is_read_by_the_hubs_own_client(
    manifest: BundleManifest, tmp_path: Path
) -> None:
    assert front_matter(card(manifest, {}), tmp_path) == {
        "license": "bsd-3-clause",
        "license_link": "LICENSE",
        "library_name": "mobilellm-exporter",
        "pipeline_tag": "text-generation",
        "tags": [
            "mobilellm-exporter", *manifest.targets, "int4", "quantized", "llama4_text",
        ],
    }  # fmt: skip


def test_the_licence_and_the_base_model_of_a_published_checkpoint_are_in_the_card(
    manifest: BundleManifest, tmp_path: Path
) -> None:
    recipe = {**manifest.recipe, "model": "facebook/MobileLLM-R1-140M"}
    link = "https://huggingface.co/facebook/MobileLLM-R1-140M"
    licence = Licence(id="other", name="fair-noncommercial-research", link=link)
    content = card(changed(manifest, recipe=recipe, licence=licence), {})
    found = front_matter(content, tmp_path)
    assert found["license"] == "other"
    assert found["license_name"] == "fair-noncommercial-research"
    assert found["license_link"] == link
    assert found["base_model"] == "facebook/MobileLLM-R1-140M"
    assert found["base_model_relation"] == "quantized"
    assert f"`fair-noncommercial-research`, {link}." in content.decode()


def test_a_folder_and_a_pattern_are_no_models_of_the_hub() -> None:
    assert is_hub_id("facebook/MobileLLM-R1-140M")
    for other in (
        "./examples/nano",
        "/a/b",
        "facebook/MobileLLM-R1-[0-9]*",
        "a",
        "a/b/c",
        "",
        None,
    ):
        assert not is_hub_id(other)


def test_a_licence_that_is_not_known_is_said_to_be_unknown(
    manifest: BundleManifest, tmp_path: Path
) -> None:
    content = card(changed(manifest, licence=None), {})
    assert "license" not in front_matter(content, tmp_path)
    assert "**Not known.**" in content.decode()


def test_evaluations_are_the_hubs_model_index(manifest: BundleManifest, tmp_path: Path) -> None:
    small = evaluation(manifest, kl=1e-07, perplexity=float("nan"), accuracy=None)
    results = {
        **measured(manifest),
        "results/d.json": Result(EVALUATION, {**small, "target": None}),
    }
    (tmp_path / "README.md").write_bytes(card(manifest, results))
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert found is not None
    assert [(one.metric_type, one.metric_value, one.dataset_name) for one in found] == [
        ("perplexity", 1.533, "text.txt"),
        ("kl_divergence", 0.0089, "text.txt"),
        ("top1_agreement", 0.895, "text.txt"),
        ("exact_match", 0.9, "problems.jsonl"),
        ("kl_divergence", 1e-07, "text.txt"),
        ("top1_agreement", 0.895, "text.txt"),
    ]
    assert {one.dataset_revision for one in found} == {"d" * 64}
    assert {one.task_type for one in found} == {"text-generation"}


# What a person reads.


def test_the_card_shows_artifacts_integers_quality_and_speed(manifest: BundleManifest) -> None:
    text = card(manifest, measured(manifest)).decode()
    for name in manifest.targets:
        size = sum(
            entry.bytes for file, entry in manifest.files.items()
            if file.removeprefix(f"{name}/") in front(name).FILES
        )  # fmt: skip
        main = front(name).main_file(front(name).FILES)
        assert f"| `{name}/{main}` | {size / 1e6:.2f} MB | 1,024 tokens |" in text
        assert f"### {name}" in text
    assert "| `int4-g32` | 43 | 2,457,600 | 1.38 MB |" in text
    assert "`a normalization weight, one vector`: `model.layers.*.input_layernorm.weight`" in text
    assert "| `onnx` | `text.txt`, `problems.jsonl` | 8,176 | – | 1.533 | 0.0089 |" in text
    assert "| `adb:123` | `onnx` | decode after 0 tokens | 2.500 (2.400 to 2.600) | 2.5 |" in text
    assert "| `executorch` | `cortex-a76` | decode after 16 tokens | 2,000,000 |" in text
    assert "These are counts, not times" in text


def test_times_of_an_emulated_device_are_left_out(manifest: BundleManifest) -> None:
    text = card(manifest, measured(manifest, kind="emulated")).decode()
    assert "2.500" not in text
    assert "`adb:123`, `onnx`: emulated, so that its times mean nothing" in text


def test_calibration_texts_are_named_by_hash(manifest: BundleManifest) -> None:
    calibration = {"text": [{"source": "gsm8k.jsonl", "sha256": "c" * 64, "weight": 1.0}]}
    text = card(changed(manifest, calibration=calibration), {}).decode()
    assert f"| `gsm8k.jsonl` | `{'c' * 64}` | 1.00 |" in text


def test_the_card_is_a_function_of_its_inputs(manifest: BundleManifest) -> None:
    results = measured(manifest)
    backwards = dict(reversed(results.items()))
    again = BundleManifest.model_validate(json.loads(manifest.model_dump_json()))
    assert card(manifest, results) == card(again, backwards)


def test_a_bundle_has_the_card_and_its_measurements_change_it(
    finished_bundle: Bundle, manifest: BundleManifest, tmp_path: Path
) -> None:
    assert (finished_bundle.path / "README.md").read_bytes() == card(manifest, {})
    (tmp_path / "quality.json").write_text(json.dumps(evaluation(manifest)))
    request = packaging.Request(results=[tmp_path / "quality.json"])
    packaging.package(finished_bundle.path, tmp_path / "out", request, no_progress)
    assert "| `onnx` | `text.txt`" in (tmp_path / "out" / "README.md").read_text()


# Its commands.


def commands(content: bytes, heading: str, language: str) -> str:
    section = content.decode().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(found[0])


def test_the_commands_that_verify_and_reproduce_are_right(
    finished_bundle: Bundle, manifest: BundleManifest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished_bundle.path, tmp_path / "bundle"))
    content = card(manifest, {})
    check, *_ = commands(content, "Verify", "sh").splitlines()
    write, export = commands(content, "Reproduce", "sh").splitlines()
    write = write.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    for line in (check, write):
        subprocess.run(["bash", "-c", line], cwd=folder, check=True, capture_output=True)
    _, _, file, *_ = shlex.split(export)
    assert load_recipe(folder / file).to_dict() == manifest.recipe


@pytest.mark.parametrize(("target", "needs"), [("onnx", "onnxruntime_genai"), ("executorch", "")])
def test_the_code_of_the_card_runs_in_the_folder_of_the_artifact(
    target: str, needs: str, finished_bundle: Bundle
) -> None:
    if needs:
        pytest.importorskip(needs, reason="the official client is optional")
    module = front(target)
    code = re.search(r"```python\n(.*?)```", module.usage(module.Target()), re.DOTALL)
    assert code
    program = code[1].replace('"..."', '"Ada has 3 eggs."').replace("512", "32")
    folder = finished_bundle.path / target
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_every_option_of_a_target_has_its_own_way_to_run() -> None:
    found = {
        front(name).usage(front(name).Target(**options))
        for name, options in (
            ("executorch", {}), ("executorch", {"attention": "portable"}),
            ("executorch", {"delegate": "coreml"}), ("onnx", {}), ("onnx", {"form": "portable"}),
            ("coreml", {}), ("coreml", {"compute": "neural_engine"}),
        )
    }  # fmt: skip
    assert len(found) == 7
    assert {"executorch", "onnx", "coreml"} <= set(names())


# Hostile text.


def hostile(manifest: BundleManifest) -> tuple[BundleManifest, dict[str, Result]]:
    """A manifest and measurements with hostile text wherever a file of someone else may hold it."""
    targets = [
        {**target, **({"author": HOSTILE} if "author" in target else {})}
        for target in manifest.recipe["targets"]
    ]
    recipe = {
        **manifest.recipe, "name": HOSTILE, "model": HOSTILE, "targets": targets,
        "quantization": {"method": HOSTILE},
    }  # fmt: skip
    weight = WeightEntry(scheme="float", shape=[2], bytes=8, reason=HOSTILE)
    spoilt = changed(
        manifest,
        recipe=recipe,
        model=manifest.model.model_copy(update={"model_type": HOSTILE}),
        calibration={"text": [{"source": HOSTILE, "sha256": HOSTILE, "weight": HOSTILE}]},
        versions={HOSTILE: HOSTILE},
        weights={HOSTILE: weight},
    )
    score = evaluation(
        manifest, kind=HOSTILE, perplexity=HOSTILE, tokens=[HOSTILE], kl=True,
        of_settings={HOSTILE: HOSTILE},
    )  # fmt: skip
    results = measured(manifest, device=HOSTILE, engine_name=HOSTILE, name=HOSTILE)
    results["results/a.json"] = Result(EVALUATION, score)
    count = counts(manifest, {"gemm": 1.0})
    count |= {"emulator": HOSTILE, "runner": {"name": HOSTILE, "versions": {}}}
    results["results/c.json"] = Result(INSTRUCTIONS, count)
    return spoilt, results


def test_hostile_text_is_shown_as_code_and_is_never_markup(
    manifest: BundleManifest, tmp_path: Path
) -> None:
    content = card(*hostile(manifest))
    found = list(tokens(content))
    assert not [one for one in found if one.type in ("html_inline", "html_block", "image")]
    links = [one.attrs["href"] for one in found if one.type == "link_open"]
    assert links == ["LICENSE"]
    texts = [one.content for one in found if one.type in ("text", "heading_open")]
    assert not [one for one in texts if "javascript" in one or "onerror" in one or "a.b" in one]
    assert any("onerror" in one.content for one in found if one.type == "code_inline")
    headings = [one for one in found if one.type == "heading_open"]
    expected = [one for one in tokens(card(manifest, {})) if one.type == "heading_open"]
    assert len(headings) == len(expected)
    data = front_matter(content, tmp_path)
    assert set(data) == {
        "license", "license_link", "library_name", "pipeline_tag", "tags", "model-index",
    }  # fmt: skip
    assert "\x1b" not in content.decode()
    assert "\u202e" not in content.decode()


@pytest.mark.parametrize(
    "calibration",
    [{}, {"text": 3}, {"text": [3, {}]}, {"text": {"a": 1}}, {"text": [{"weight": []}]}],
)
def test_a_calibration_of_another_form_does_not_stop_the_card(
    calibration: dict[str, Any], manifest: BundleManifest
) -> None:
    assert b"## Calibration" in card(changed(manifest, calibration=calibration), {})


@pytest.mark.parametrize("targets", [None, 3, [3], [{}], [{"target": "onnx"}]])
def test_a_recipe_that_lacks_targets_does_not_stop_the_card(
    targets: object, manifest: BundleManifest
) -> None:
    recipe = {**manifest.recipe, "targets": targets}
    assert b"## Artifacts" in card(changed(manifest, recipe=recipe), {})
