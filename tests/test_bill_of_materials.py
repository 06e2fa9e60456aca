"""The bill of materials of a bundle, against the schema and the library of CycloneDX."""

import json
import uuid
from typing import Any

import pytest
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import ComponentType
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.licenses._spdx import LICENSES

from exporter.bundle.bill_of_materials import bill_of_materials
from exporter.bundle.bundle import Bundle
from exporter.bundle.licence import Licence
from exporter.bundle.manifest import BundleManifest
from exporter.bundle.results import EVALUATION, INSTRUCTIONS, PROFILE, Result
from exporter.errors import InputError

A, B = "a" * 64, "b" * 64
TEXTS = [
    {"source": "problems.jsonl", "sha256": A, "weight": 0.75},
    {"source": "self-generated", "sha256": B, "weight": 0.25},
]
QUALITY = Result(
    EVALUATION,
    {
        "target": "onnx",
        "data": {"file": "wikitext2.txt", "sha256": A},
        "task": None,
        "figures": {"perplexity": 12.5, "kl": None, "top1_agreement": 0.97, "tokens": 4096},
    },
)
MEDIAN = {"p50": 20.5, "p95": 22.0, "low": 20.0, "high": 21.0, "confidence": 0.95, "repeats": 9}
SESSION: dict[str, Any] = {
    "device": "pixel-8",
    "kind": "real",
    "status": "complete",
    "artifact": {"format": "executorch"},
    "load": None,
    "prefill": [{"tokens": 64, "ms": MEDIAN}],
    "decode": [{"depth": 512, "ms": MEDIAN | {"p50": 3.25}}],
    "memory": {"peak_rss": 7_000_000},
}
COUNTS = Result(
    INSTRUCTIONS,
    {
        "target": "executorch",
        "counts": [
            {
                "cpu": "cortex-a76",
                "prefill": [{"from": 64, "to": 128, "per_token": 1e6}],
                "decode": [{"depth": 16, "per_token": 2_000_000}],
            }
        ],
    },
)


def profile(**changes: object) -> Result:
    return Result(PROFILE, {"sessions": [SESSION | changes]})


def document(manifest: BundleManifest, results: dict[str, Result] | None = None) -> dict[str, Any]:
    """The document, which the schema of CycloneDX allows and its library reads."""
    text = bill_of_materials(manifest, results or {}).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content = json.loads(text)
    assert isinstance(content, dict)
    read = Bom.from_json(data=content)  # type: ignore[attr-defined]
    assert read.validate()
    return content


def metrics(manifest: BundleManifest, result: Result) -> dict[str, dict[str, Any]]:
    model = document(manifest, {"results/one.json": result})["metadata"]["component"]
    found = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    return {one.pop("type"): one for one in found}


@pytest.fixture
def manifest(finished_bundle: Bundle) -> BundleManifest:
    recipe = finished_bundle.manifest.recipe | {"model": "facebook/MobileLLM-R1-140M"}
    return finished_bundle.manifest.model_copy(update={"recipe": recipe})


@pytest.fixture
def calibrated(manifest: BundleManifest) -> BundleManifest:
    return manifest.model_copy(update={"calibration": {"seed": 7, "text": TEXTS}})


def test_the_root_is_the_model_with_its_card_and_the_checkpoint_as_its_ancestor(
    manifest: BundleManifest,
) -> None:
    model = document(manifest)["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", manifest.recipe["name"])
    weights = manifest.files["quantized/quantized.safetensors"].sha256
    assert model["hashes"] == [{"alg": "SHA-256", "content": weights}]
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == "llama4_text"
    (ancestor,) = model["pedigree"]["ancestors"]
    assert ancestor["purl"] == "pkg:huggingface/facebook/MobileLLM-R1-140M"
    files = {one["name"]: one["hashes"][0]["content"] for one in ancestor["components"]}
    assert files == manifest.source
    facts = {one["name"]: one["value"] for one in model["properties"]}
    assert facts["mobilellm:parameters"] == str(manifest.model.parameters)
    assert facts["mobilellm:tied"] == "true"


def test_every_file_every_text_and_every_package_is_a_component(
    calibrated: BundleManifest,
) -> None:
    content = document(calibrated)
    kinds: dict[str, dict[str, Any]] = {}
    for component in content["components"]:
        kinds.setdefault(component["type"], {})[component["bom-ref"]] = component
    assert {name: one["hashes"][0]["content"] for name, one in kinds["file"].items()} == {
        name: entry.sha256 for name, entry in calibrated.files.items()
    }
    assert [(one["name"], one["hashes"][0]["content"]) for one in kinds["data"].values()] == [
        (text["source"], text["sha256"]) for text in TEXTS
    ]
    packages = {one["name"]: one["version"] for one in kinds["library"].values()}
    tool = content["metadata"]["tools"]["components"][0]
    assert packages | {tool["name"]: tool["version"]} == calibrated.versions
    model = content["metadata"]["component"]["modelCard"]["modelParameters"]
    assert model["datasets"] == [{"ref": "calibration/0"}, {"ref": "calibration/1"}]


def test_the_graph_says_what_was_made_from_what(calibrated: BundleManifest) -> None:
    graph = {one["ref"]: one["dependsOn"] for one in document(calibrated)["dependencies"]}
    assert graph["onnx/onnx/model_q4.onnx"] == ["quantized/quantized.safetensors"]
    assert graph["onnx/tokenizer.json"] == ["checkpoint"]
    read = ["checkpoint", "calibration/0", "calibration/1"]
    assert graph["quantized/quantized.safetensors"] == read
    reached, waiting = set[str](), ["model"]
    while waiting:
        reached.add(name := waiting.pop())
        waiting += [used for used in graph[name] if used not in reached]
    assert reached == graph.keys()


def test_the_library_reads_the_kinds_of_the_components(manifest: BundleManifest) -> None:
    read = Bom.from_json(data=document(manifest))  # type: ignore[attr-defined]
    kind = ComponentType.MACHINE_LEARNING_MODEL
    assert read.metadata.component.type == kind
    assert len([one for one in read.components if one.type == kind]) == 1


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        (Licence(id="apache-2.0"), {"id": "Apache-2.0"}),
        (Licence(id="apache-2.0+"), "Apache-2.0+"),
        (Licence(id="cc-by-nc-4.0", link="https://example.org/"), {"id": "CC-BY-NC-4.0"}),
        (
            Licence(id="other", name="fair-noncommercial-research", link="LICENSE"),
            {"name": "fair-noncommercial-research", "url": "LICENSE"},
        ),
        (Licence(id="llama3"), {"name": "llama3"}),
        (Licence(id="LicenseRef-mine"), {"name": "LicenseRef-mine"}),
        (None, None),
    ],
    ids=str,
)
def test_a_licence_has_its_spdx_id_or_its_name(
    licence: Licence | None, expected: dict[str, str] | str | None, manifest: BundleManifest
) -> None:
    model = document(manifest.model_copy(update={"licence": licence}))["metadata"]["component"]
    key = "expression" if isinstance(expected, str) else "license"
    assert model.get("licenses") == (expected and [{key: expected}])
    assert model["pedigree"]["ancestors"][0].get("licenses") == model.get("licenses")


def test_cyclonedx_knows_every_spdx_id_that_a_licence_can_become(manifest: BundleManifest) -> None:
    for entry in LICENSES.values():
        text = json.dumps(
            {"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [
                {"type": "file", "name": "a", "licenses": [{"license": {"id": entry["id"]}}]}
            ]}
        )  # fmt: skip
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None, entry["id"]


def test_figures_of_an_evaluation_are_metrics(manifest: BundleManifest) -> None:
    of = "results/one.json: onnx on wikitext2.txt"
    assert metrics(manifest, QUALITY) == {
        "perplexity": {"value": "12.5", "slice": of},
        "top1_agreement": {"value": "0.97", "slice": of},
    }


def test_times_are_metrics_with_intervals(manifest: BundleManifest) -> None:
    of = "results/one.json: executorch on pixel-8"
    interval = {"lowerBound": "20.0", "upperBound": "21.0"}
    assert metrics(manifest, profile()) == {
        "first token after 64 tokens, ms": {
            "value": "20.5", "slice": of, "confidenceInterval": interval,
        },
        "decode after 512 tokens, ms": {
            "value": "3.25", "slice": of, "confidenceInterval": interval,
        },
        "peak resident memory, bytes": {"value": "7000000", "slice": of},
    }  # fmt: skip


def test_instructions_are_metrics_that_are_not_called_times(manifest: BundleManifest) -> None:
    of = "results/one.json: executorch on cortex-a76, counted in emulation"
    assert metrics(manifest, COUNTS) == {
        "instructions a prefilled token, 64 to 128 tokens": {"value": "1000000.0", "slice": of},
        "instructions a decoded token after 16 tokens": {"value": "2000000", "slice": of},
    }


@pytest.mark.parametrize("changes", [{"kind": "emulated"}, {"status": "failed"}], ids=str)
def test_a_session_without_times_that_count_gives_no_metrics(
    changes: dict[str, object], manifest: BundleManifest
) -> None:
    card = document(manifest, {"a": profile(**changes)})["metadata"]["component"]["modelCard"]
    assert "quantitativeAnalysis" not in card


def test_figures_that_are_no_numbers_are_left_out(manifest: BundleManifest) -> None:
    figures = {"perplexity": float("nan"), "kl": "low", "top1_agreement": [1], "accuracy": 0.5}
    result = Result(EVALUATION, {**QUALITY.content, "figures": figures})
    assert metrics(manifest, result).keys() == {"accuracy"}


def test_the_same_inputs_give_the_same_bytes_and_others_another_serial_number(
    manifest: BundleManifest,
) -> None:
    first = bill_of_materials(manifest, {})
    assert bill_of_materials(manifest, {}) == first
    serials = [
        document(manifest)["serialNumber"],
        document(manifest, {"a": QUALITY})["serialNumber"],
    ]
    assert serials[0] != serials[1]
    assert uuid.UUID(serials[0]).version == 5
    assert b"timestamp" not in first


def test_a_bundle_without_weights_is_refused(manifest: BundleManifest) -> None:
    with pytest.raises(InputError, match=r"quantized\.safetensors: is not in the bundle"):
        bill_of_materials(manifest.model_copy(update={"files": {}}), {})
