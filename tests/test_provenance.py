"""The provenance of a bundle, against the formats of in-toto and SLSA."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from packageurl import PackageURL
from tampering import edited, reseal

from exporter.bundle.bundle import Bundle, open_bundle
from exporter.bundle.manifest import BundleManifest, FileEntry
from exporter.bundle.origin import hub_model, python_package
from exporter.bundle.provenance import provenance
from exporter.derivation.manifests import check_manifests
from exporter.errors import InputError
from exporter.verification.checks import failures

A, B, C, D = (letter * 64 for letter in "abcd")
TEXTS = [
    {"source": "problems.jsonl", "sha256": A, "weight": 0.75},
    {"source": "self-generated", "sha256": B, "weight": 0.25},
]
CALIBRATED = {
    "seed": 7, "steps": 400, "precision": "float32", "processes": 1, "text": TEXTS,
    "teacher": {"model.safetensors": C, "config.json": D}, "wider": ["model.embed_tokens.weight"],
}  # fmt: skip


def statement(manifest: BundleManifest) -> dict[str, Any]:
    content = json.loads(provenance(manifest))
    assert isinstance(content, dict)
    return content


def with_recipe(manifest: BundleManifest, **fields: object) -> BundleManifest:
    return manifest.model_copy(update={"recipe": manifest.recipe | fields})


def dependencies(manifest: BundleManifest) -> dict[str, dict[str, Any]]:
    found = statement(manifest)["predicate"]["buildDefinition"]["resolvedDependencies"]
    named = {one["name"]: one for one in found}
    assert len(named) == len(found)
    return named


@pytest.fixture
def manifest(finished_bundle: Bundle) -> BundleManifest:
    return finished_bundle.manifest


@pytest.fixture
def calibrated(manifest: BundleManifest) -> BundleManifest:
    update = {"calibration": CALIBRATED, "seeds": {"calibration": 7}}
    return with_recipe(manifest.model_copy(update=update), model="facebook/MobileLLM-R1-140M")


@pytest.mark.parametrize("kind", ["manifest", "calibrated"])
def test_it_is_a_statement_of_in_toto_with_a_provenance_of_slsa(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """The messages of both refuse a field that their specification does not have."""
    content = statement(request.getfixturevalue(kind))
    message = ParseDict(content, StatementMessage())
    Statement.copy_from_pb(message).validate()
    assert content["_type"] == "https://in-toto.io/Statement/v1"
    assert content["predicateType"] == "https://slsa.dev/provenance/v1"
    predicate = ParseDict(content["predicate"], Provenance())
    for descriptor in predicate.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(descriptor).validate()
        assert descriptor.uri or descriptor.digest
    assert predicate.build_definition.build_type
    assert predicate.build_definition.external_parameters.fields
    assert predicate.run_details.builder.id
    assert not predicate.run_details.HasField("metadata")


def test_the_subjects_are_the_models_and_the_quantized_checkpoint(manifest: BundleManifest) -> None:
    more = dict.fromkeys(("LICENSE", "results/nano.json"), FileEntry(sha256=A, bytes=1))
    manifest = manifest.model_copy(update={"files": manifest.files | more})
    subjects = {one["name"]: one["digest"] for one in statement(manifest)["subject"]}
    assert subjects == {
        name: {"sha256": entry.sha256}
        for name, entry in manifest.files.items()
        if name.startswith(("quantized/", "executorch/", "onnx/", "coreml/"))
    }
    assert "onnx/onnx/model_q4.onnx" in subjects


def test_it_names_every_file_that_was_read_and_every_package(calibrated: BundleManifest) -> None:
    found = dependencies(calibrated)
    assert {name: one["digest"]["sha256"] for name, one in found.items() if "digest" in one} == {
        **{f"checkpoint/{name}": digest for name, digest in calibrated.source.items()},
        **{"teacher/model.safetensors": C, "teacher/config.json": D},
        **{"calibration/problems.jsonl": A, "calibration/self-generated": B},
    }
    assert found["checkpoint/config.json"]["uri"] == (
        "pkg:huggingface/facebook/MobileLLM-R1-140M#config.json"
    )
    version = calibrated.versions["torch"]
    assert found["torch"] == {"name": "torch", "uri": python_package("torch", version)}
    packages = {name for name, one in found.items() if "digest" not in one}
    assert packages == calibrated.versions.keys() - {"mobilellm-exporter"}


def test_parameters_are_the_recipe_and_what_a_calibration_found(
    calibrated: BundleManifest,
) -> None:
    definition = statement(calibrated)["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"recipe": calibrated.recipe}
    parameters = definition["internalParameters"]
    assert parameters["seeds"] == {"calibration": 7}
    assert parameters["calibration"] == {
        "precision": "float32", "processes": 1, "wider": ["model.embed_tokens.weight"],
    }  # fmt: skip
    assert sum(parameters["schemes"].values()) == len(calibrated.weights)
    assert not set(parameters) & set(definition["externalParameters"])


@pytest.mark.parametrize("model", ["facebook/MobileLLM-R1-*", "./build/smollm2", "", "a/b/c", None])
def test_a_checkpoint_that_is_no_model_of_the_hub_has_no_address(
    model: object, manifest: BundleManifest
) -> None:
    named = with_recipe(manifest, model=model)
    assert hub_model(named) == ""
    assert "uri" not in dependencies(named)["checkpoint/config.json"]


def test_package_urls_are_those_of_the_library(manifest: BundleManifest) -> None:
    for name, version in {**manifest.versions, "Jinja_Two": "1.0+cpu~a b"}.items():
        url = PackageURL(type="pypi", name=name, version=version)
        assert PackageURL.from_string(python_package(name, version)) == url
        assert python_package(name, version) == url.to_string()
    hub = with_recipe(manifest, model="facebook/MobileLLM-R1-140M")
    url = PackageURL.from_string(hub_model(hub, "a folder/config.json"))
    assert (url.type, url.namespace, url.name) == ("huggingface", "facebook", "MobileLLM-R1-140M")
    assert url.subpath == "a folder/config.json"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text", 7),
        ("text", [7]),
        ("text", [{"source": "a"}]),
        ("text", [{"source": "a", "sha256": "short", "weight": 1.0}]),
        ("teacher", [A]),
        ("teacher", {"../config.json": A}),
        ("processes", "many"),
        ("wider", {"a": 1}),
    ],
)
def test_a_malformed_calibration_is_refused(
    field: str, value: object, manifest: BundleManifest
) -> None:
    changed = manifest.model_copy(update={"calibration": CALIBRATED | {field: value}})
    with pytest.raises(InputError, match=f"calibration: {field}"):
        provenance(changed)


@pytest.mark.parametrize("name", ["provenance.json", "mlbom.cdx.json"])
def test_a_changed_document_is_found_although_all_hashes_were_written_anew(
    name: str, bundle_copy: Path
) -> None:
    path = bundle_copy / name
    path.write_bytes(path.read_bytes().replace(b"0.1.0", b"0.1.1", 1))
    reseal(bundle_copy, path)
    failed = {check.subject for check in failures(check_manifests(open_bundle(bundle_copy)))}
    assert name in failed


def test_a_malformed_calibration_of_a_bundle_is_a_failed_check(bundle_copy: Path) -> None:
    with edited(bundle_copy / "quantized" / "quantization.json") as manifest:
        manifest["calibration"] = {"seed": 7, "text": [7]}
    reseal(bundle_copy)
    found = list(failures(check_manifests(open_bundle(bundle_copy))))
    assert any("calibration: text" in check.subject for check in found), found
