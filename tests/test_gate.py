"""The gate: limits of a budget, each shown to hold and to break; outputs; bad input."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from commands import flip, run
from conftest import ROOT
from gating import DATA, counts, evaluation, profile, written
from junitparser import JUnitXml

from exporter.bundle.bundle import Bundle
from exporter.bundle.manifest import BundleManifest
from exporter.errors import InputError
from exporter.gate.budget import Budget, Tolerances, read_budget
from exporter.gate.finding import Finding
from exporter.gate.gate import Verdict, gate
from exporter.gate.outputs import junit, markdown
from exporter.packaging import Request, package
from exporter.progress import no_progress
from exporter.settings import Section

TIMES = {("load", 0): [10.0] * 7, ("prefill", 64): [5.0] * 7, ("decode", 512): [2.0] * 7}
Judge = Callable[..., Verdict]


@pytest.fixture
def manifest(finished_bundle: Bundle) -> BundleManifest:
    return finished_bundle.manifest


@pytest.fixture
def judge(finished_bundle: Bundle, tmp_path: Path) -> Judge:
    """judge(budget, *measurements, **options of gate) → the verdict on the demo bundle."""

    def of(budget: Mapping[str, Any] | str, *measurements: Any, **options: Any) -> Verdict:
        path = tmp_path / "budget.yaml"
        path.write_text(budget if isinstance(budget, str) else yaml.safe_dump(dict(budget)))
        files = [
            written(tmp_path / f"{number}.json", content)
            for number, content in enumerate(measurements)
        ]
        return gate(finished_bundle.path, path, extra=files, **options)

    return of


def only(verdict: Verdict) -> Finding:
    (finding,) = verdict.findings
    return finding


def on_target(key: str, value: object, target: str = "onnx") -> dict[str, Any]:
    return {"targets": {target: {key: value}}}


def on_device(key: str, value: object, device: str = "Pixel 8") -> dict[str, Any]:
    return on_target("devices", {device: {key: value}})


def on_cpu(key: str, value: object) -> dict[str, Any]:
    return on_target("instructions", {"cortex-a76": {key: value}}, "executorch")


def on_data(key: str, value: object, data: str = "text.txt") -> dict[str, Any]:
    return on_target("quality", {data: {key: value}})


# Every kind of limit.


@pytest.mark.parametrize(
    ("kept", "broken", "name"),
    [
        ({"bundle": {"size": "9 MB"}}, {"bundle": {"size": "5 MB"}}, "bundle"),
        (
            {"quantized": {"size": "1.5 MB"}},
            {"quantized": {"size": 1_000_000}},
            "quantized checkpoint",
        ),
        (on_target("file", "1.8 MB"), on_target("file", "1.7 MB"), "file"),
        (on_target("folder", "1.8 MB"), on_target("folder", "1700 kB"), "folder"),
        (on_data("perplexity", 1.54), on_data("perplexity", 1.5), "perplexity on text.txt"),
        (on_data("kl", 0.009), on_data("kl", 0.008), "kl on text.txt"),
        (
            on_data("top1_agreement", "89 %"),
            on_data("top1_agreement", 0.9),
            "top1_agreement on text.txt",
        ),
        (on_data("tokens", 8000), on_data("tokens", 9000), "tokens on text.txt"),
        (
            on_data("accuracy", "90 %", "problems.jsonl"),
            on_data("accuracy", "91 %", "problems.jsonl"),
            "accuracy on problems.jsonl",
        ),
        (
            on_data("problems", 500, "problems.jsonl"),
            on_data("problems", 501, "problems.jsonl"),
            "problems on problems.jsonl",
        ),
        (on_device("load", "10 ms"), on_device("load", "9.9 ms"), "load"),
        (on_device("prefill", {64: "0.005 s"}), on_device("prefill", {64: "4 ms"}), "prefill 64"),
        (
            on_device("prefill", {64: "12800 tokens/s"}),
            on_device("prefill", {64: "12801 tokens/s"}),
            "prefill 64",
        ),
        (
            on_device("decode", {512: "500 tokens/s"}),
            on_device("decode", {512: "501 tokens/s"}),
            "decode after 512",
        ),
        (
            on_device("decode", {512: "2 ms"}),
            on_device("decode", {512: "1999 us"}),
            "decode after 512",
        ),
        (on_device("memory", "71 MB"), on_device("memory", "69 MB"), "memory"),
        (
            on_device("memory", "68 MiB", "adb:123"),
            on_device("memory", "66 MiB", "adb:123"),
            "memory",
        ),
        (
            on_cpu("prefill", {128: "30 M"}),
            on_cpu("prefill", {128: "29 M"}),
            "instructions, prefill 128",
        ),
        (
            on_cpu("decode", {16: 60_000_000}),
            on_cpu("decode", {16: "59 M"}),
            "instructions, decode after 16",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_limit_holds_and_breaks(
    kept: Mapping[str, Any],
    broken: Mapping[str, Any],
    name: str,
    judge: Judge,
    manifest: BundleManifest,
) -> None:
    measured = (
        evaluation(manifest),
        profile(manifest, TIMES),
        counts(manifest, {"matmul": 20e6, "attention": 10e6}),
    )
    fine, bad = only(judge(kept, *measured)), only(judge(broken, *measured))
    assert (fine.name, fine.passed, fine.value is None) == (name, True, False)
    assert (bad.name, bad.passed, bad.value) == (name, False, fine.value)


def test_products_without_a_delegate_break_their_limit_and_are_named(
    judge: Judge, manifest: BundleManifest
) -> None:
    budget = on_device("undelegated", 0)
    assert only(judge(budget, profile(manifest, TIMES))).passed
    bad = only(judge(budget, profile(manifest, TIMES, undelegated=["MatMul (1 call)"])))
    assert (bad.passed, bad.value, bad.note) == (False, 1, "MatMul (1 call)")


def test_quality_of_the_quantized_checkpoint_is_not_that_of_an_artifact(
    judge: Judge, manifest: BundleManifest
) -> None:
    budget = {"quantized": {"quality": {"text.txt": {"perplexity": 2}}}}
    assert only(judge(budget, evaluation(manifest, None))).passed
    assert only(judge(budget, evaluation(manifest, "onnx"))).value is None


def test_the_archive_has_a_limit(finished_bundle: Bundle, tmp_path: Path) -> None:
    archive, budget = tmp_path / "nano.tar.zst", tmp_path / "budget.yaml"
    package(finished_bundle.path, archive, Request(), no_progress)
    for text, passed in (("bundle: {archive: 9 MB}", True), ("bundle: {archive: 1 MB}", False)):
        budget.write_text(text)
        found = only(gate(archive, budget))
        assert (found.passed, found.value) == (passed, archive.stat().st_size)
    budget.write_text("bundle: {archive: 9 MB}")
    unpacked = only(gate(finished_bundle.path, budget))
    assert not unpacked.passed
    assert "mobilellm package" in unpacked.note


def test_every_measurement_of_a_figure_must_hold_the_limit(
    judge: Judge, manifest: BundleManifest
) -> None:
    slow = profile(manifest, {("load", 0): [30.0] * 7}, engine_threads=1)
    verdict = judge(on_device("load", "20 ms"), profile(manifest, TIMES), slow, slow)
    assert [finding.passed for finding in verdict.findings] == [True, False]


def test_a_limit_near_the_median_says_that_another_profile_may_decide_otherwise(
    judge: Judge, manifest: BundleManifest
) -> None:
    times = {("load", 0): [9.0, 9.5, 10.0, 10.5, 11.0, 11.5, 12.0]}
    near, far = (
        only(judge(on_device("load", limit), profile(manifest, times)))
        for limit in ("11 ms", "20 ms")
    )
    assert "95 % interval" in near.note
    assert "95 % interval" not in far.note


# What is not measured fails.


@pytest.mark.parametrize(
    ("budget", "command"),
    [
        (on_data("perplexity", 2), "mobilellm evaluate BUNDLE --target onnx --data text.txt"),
        (on_data("kl", 2), "--reference CHECKPOINT"),
        (on_data("accuracy", 0.5, "p.jsonl"), "mobilellm evaluate BUNDLE --target onnx --task p"),
        (
            on_device("prefill", {64: "1 s"}),
            "mobilellm profile BUNDLE --target onnx --device Pixel 8 prompt_lengths=[64]",
        ),
        (on_device("undelegated", 0), "mobilellm profile BUNDLE --target onnx --device Pixel 8"),
        (
            on_cpu("decode", {16: "1 M"}),
            "mobilellm profile BUNDLE --target executorch --device count:cortex-a76 "
            "prompt_lengths=[] depths=[16]",
        ),
        (
            {"quantized": {"quality": {"a.txt": {"perplexity": 1}}}},
            "mobilellm evaluate BUNDLE/quantized --data a.txt",
        ),
    ],
)
def test_a_limit_without_a_measurement_fails_with_the_command_that_measures_it(
    budget: Mapping[str, Any], command: str, judge: Judge
) -> None:
    found = only(judge(budget))
    assert (found.passed, found.value) == (False, None)
    assert found.note.startswith("not measured")
    assert command in found.note


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (on_device("load", "1 s", "Pixel 9"), "load"),
        (on_device("decode", {0: "1 s"}), "decode after 0"),
        (on_target("devices", {"Pixel 8": {"load": "1 s"}}, "executorch"), "load"),
    ],
    ids=["device", "depth", "target"],
)
def test_a_measurement_of_something_else_does_not_count(
    budget: Mapping[str, Any], name: str, judge: Judge, manifest: BundleManifest
) -> None:
    found = only(judge(budget, profile(manifest, TIMES)))
    assert (found.name, found.passed, found.value) == (name, False, None)


def test_a_failed_session_gives_its_reason(judge: Judge, manifest: BundleManifest) -> None:
    failed = profile(manifest, TIMES, status="failed", problem="adb:123: the cable came off.")
    found = only(judge(on_device("load", "1 s"), failed))
    assert not found.passed
    assert "the cable came off" in found.note
    missing = profile(manifest, TIMES, not_measured={"decode after 2048": "the context is 1024"})
    assert "the context is 1024" in only(judge(on_device("decode", {2048: "1 s"}), missing)).note


@pytest.mark.parametrize("limit", ["1 us", "1000 s"])
@pytest.mark.parametrize("key", ["load", "prefill", "decode"])
def test_an_emulated_time_neither_keeps_nor_breaks_a_limit(
    key: str, limit: str, judge: Judge, manifest: BundleManifest
) -> None:
    places = {"load": limit, "prefill": {64: limit}, "decode": {512: limit}}
    found = only(judge(on_device(key, places[key]), profile(manifest, TIMES, kind="emulated")))
    assert (found.passed, found.value) == (False, None)
    assert "emulated: its times mean nothing" in found.note


def test_an_emulated_device_has_no_memory_of_its_own_but_its_delegation_counts(
    judge: Judge, manifest: BundleManifest
) -> None:
    emulated = profile(manifest, TIMES, kind="emulated")
    assert only(judge(on_device("memory", "9 GB"), emulated)).value is None
    assert only(judge(on_device("undelegated", 0), emulated)).passed


def test_kl_from_another_checkpoint_does_not_count(judge: Judge, manifest: BundleManifest) -> None:
    other = evaluation(manifest, of_reference={"model.safetensors": "0" * 64})
    found = only(judge(on_data("kl", 1), other))
    assert (found.passed, found.value) == (False, None)
    assert "another checkpoint" in found.note
    assert only(judge(on_data("perplexity", 2), other)).passed


def test_the_data_file_can_be_named_by_its_hash(judge: Judge, manifest: BundleManifest) -> None:
    for digest, passed in ((DATA, True), ("e" * 64, False)):
        budget = on_target("quality", {"text.txt": {"perplexity": 2, "sha256": digest}})
        assert only(judge(budget, evaluation(manifest))).passed is passed


def test_a_perplexity_that_is_not_finite_passes_nothing(
    judge: Judge, manifest: BundleManifest
) -> None:
    """An evaluation writes null for it."""
    found = only(judge(on_data("perplexity", 1e300), evaluation(manifest, perplexity=None)))
    assert (found.passed, found.value) == (False, None)


def test_a_simulated_runtime_is_not_the_artifact(judge: Judge, manifest: BundleManifest) -> None:
    found = only(judge(on_data("kl", 1), evaluation(manifest, of_settings={"simulate": True})))
    assert not found.passed
    assert "simulated in torch" in found.note


# Bad input.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "bundel: {size: 1 MB}",
            "unknown key 'bundel'. Keys: bundle, quantized, targets, baseline",
        ),
        ("bundle: {weight: 1 MB}", "bundle: unknown key 'weight'. Keys: size, archive"),
        (
            "targets: {onnx: {devices: {host: {ttft: 1 s}}}}",
            "devices.host: unknown key 'ttft'. Keys: load, prefill, decode, memory, undelegated",
        ),
        ("targets: {tflite: {file: 1 MB}}", "'tflite' is not a target. Known: coreml, "),
        ("bundle: {size: 1 mb}", "bundle.size: '1 mb' is not a number in one of B, kB, MB"),
        ("bundle: {size: big}", "'big' is not a number"),
        ("bundle: {size: -1 MB}", "'-1 MB' is not a number"),
        ("bundle: {size: true}", "True is not a number"),
        ("targets: {onnx: {devices: {host: {load: 3}}}}", "3 is not a number in one of us, µs, ms"),
        ("targets: {onnx: {devices: {host: {load: 9 tokens/s}}}}", "'9 tokens/s' is not a number"),
        ("targets: {onnx: {devices: {host: {decode: {0: 3 MB}}}}}", "'3 MB' is not a number"),
        (
            "targets: {onnx: {devices: {host: {decode: {-1: 3 ms}}}}}",
            "-1 is not a number of tokens",
        ),
        ("targets: {onnx: {devices: {host: {decode: {a: 3 ms}}}}}", "devices.host.decode.a"),
        ("targets: {onnx: {quality: {a: {accuracy: 95}}}}", "95 is not a share from 0 to 1"),
        ("targets: {onnx: {quality: {a: {sha256: abc}}}}", "'abc' is not a SHA-256"),
        ("baseline: {latency: 200 %}", "'200 %' is not a share from 0 to 1"),
        ("baseline: {latency: never}", "'never' is not a number"),
        ("targets: [onnx]", "is not a mapping"),
        ("- 1", "does not hold a mapping of keys"),
        ("", "does not hold a mapping of keys"),
        ("{}", "sets no limit"),
        ("baseline: {size: 1 %}", "sets no limit"),
        ("a: &b 1\nc: *b", "aliases are not supported"),
    ],
)
def test_a_bad_budget_is_refused_with_its_key(text: str, said: str, judge: Judge) -> None:
    with pytest.raises(InputError) as raised:
        judge(text)
    assert said in str(raised.value)


def test_a_damaged_bundle_is_not_judged(bundle_copy: Path, tmp_path: Path) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text("bundle: {size: 1 GB}")
    assert gate(bundle_copy, budget).passed
    flip(bundle_copy / "onnx" / "onnx" / "model_q4.onnx_data", 1000)
    with pytest.raises(InputError, match=r"model_q4\.onnx_data: has sha256"):
        gate(bundle_copy, budget)


def test_a_measurement_of_other_files_is_refused(judge: Judge, manifest: BundleManifest) -> None:
    other = evaluation(manifest, of_files={"onnx/model_q4.onnx": "0" * 64})
    with pytest.raises(InputError, match=r"measured another onnx/onnx/model_q4\.onnx"):
        judge(on_data("perplexity", 2), other)


def test_records_of_a_wrong_type_are_refused(judge: Judge, manifest: BundleManifest) -> None:
    bad = profile(manifest, TIMES)
    bad["sessions"][0]["samples"]["rounds"][0][0]["depth"] = "many"
    with pytest.raises(InputError, match="invalid depth"):
        judge(on_device("load", "1 s"), bad)


# The pages and the example.


def keys_of(section: type[Section]) -> set[str]:
    """All keys of a section and of the sections below it."""
    found = set(section.model_fields)
    for field in section.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= keys_of(kind)
    return found


def test_the_budget_of_the_page_has_every_key_and_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "gate.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "budget.yaml").write_text(text)
    (tmp_path / "empty.yaml").write_text("{}")
    budget = read_budget(tmp_path / "budget.yaml")
    assert budget.baseline == read_budget(tmp_path / "empty.yaml").baseline
    assert budget.baseline.model_fields_set == Tolerances.model_fields.keys()
    assert {key for key in keys_of(Budget) if not re.search(rf"\b{key}:", text)} == set()


def test_the_example_budget_is_one_of_the_demo_bundle(
    finished_bundle: Bundle, manifest: BundleManifest
) -> None:
    verdict = gate(finished_bundle.path, ROOT / "examples" / "ci" / "budget.yaml")
    measured = [finding for finding in verdict.findings if finding.value is not None]
    assert all(finding.passed for finding in measured)
    assert {finding.target for finding in measured} == {None, *manifest.targets}


# Outputs.

HOSTILE = "</testcase>\x00\x1b[2J\ufffe]]>|`<script>![x](javascript:1)\n# *bold* http://evil"


def hostile(manifest: BundleManifest) -> Any:
    return profile(manifest, TIMES, device=HOSTILE, undelegated=[HOSTILE])


def test_junit_is_read_by_another_parser(judge: Judge, manifest: BundleManifest) -> None:
    budget = {
        "bundle": {"size": "1 GB", "archive": "1 GB"},
        **on_target("devices", {"Pixel 8": {"load": "20 ms", "memory": "1 MB"}}),
    }
    slow = profile(manifest, {("load", 0): [30.0] * 7}, engine_threads=1)
    content = junit(judge(budget, profile(manifest, TIMES), slow))
    suites = JUnitXml.fromstring(content)
    assert (suites.tests, suites.failures, suites.errors) == (6, 4, 0)
    found = {
        (suite.name, case.name): [result.type for result in case.result if case.is_failure]
        for suite in suites
        for case in suite
    }
    assert found == {
        ("bundle", "bundle"): [],
        ("bundle", "archive"): ["not measured"],
        ("onnx on Pixel 8", "load"): [],
        ("onnx on Pixel 8", "load (2)"): ["limit"],
        ("onnx on Pixel 8", "memory"): ["limit"],
        ("onnx on Pixel 8", "memory (2)"): ["limit"],
    }


#: What the schema of Jenkins' xUnit plugin (junit-10.xsd) allows of what is written here: the
#: attributes of each element, and the elements in it.
JUNIT: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, {"testsuite"}),
    "testsuite": ({"name", "tests", "failures", "errors", "skipped", "time"}, {"testcase"}),
    "testcase": ({"name", "classname", "time"}, {"failure", "system-out"}),
    "failure": ({"type", "message"}, set()),
    "system-out": (set(), set()),
}


def test_junit_follows_the_schema_of_jenkins(judge: Judge) -> None:
    root = ET.fromstring(junit(judge({"bundle": {"size": "1 GB", "archive": "1 GB"}})))
    assert root.tag == "testsuites"
    for element in root.iter():
        attributes, inside = JUNIT[element.tag]
        assert element.attrib.keys() <= attributes
        assert {child.tag for child in element} <= inside
    (suite,) = root
    assert {"name", "tests", "failures", "errors"} <= suite.attrib.keys()


def test_hostile_names_are_escaped_in_junit(judge: Judge, manifest: BundleManifest) -> None:
    budget = on_device("undelegated", 0, HOSTILE.replace("\x00", "").replace("\x1b", ""))
    budget["targets"]["onnx"]["devices"]["Pixel 8"] = {"undelegated": 0}
    content = junit(judge(budget, hostile(manifest)))
    suites = list(JUnitXml.fromstring(content))
    assert [len(list(suite)) for suite in suites] == [1, 1]
    assert {element.tag for element in ET.fromstring(content).iter()} == {
        "testsuites", "testsuite", "testcase", "failure",
    }  # fmt: skip


def test_hostile_names_are_escaped_in_markdown(judge: Judge, manifest: BundleManifest) -> None:
    text = markdown(judge(on_device("undelegated", 0), hostile(manifest)), HOSTILE)
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert [line for line in lines if line.startswith("#")] == [lines[0]]
    assert "❌ FAILED" in rows[2]
    for line in rows:
        assert line.replace("\\|", "").count("|") == 9
    for active in ("<script", "![x]", "`", "http://"):
        assert active not in text.replace("\\`", "").replace("\\<", "").replace("\\!", "")


def test_markdown_says_pass_and_fail_in_words_with_failures_first(
    judge: Judge, manifest: BundleManifest
) -> None:
    verdict = judge({"bundle": {"size": "1 GB", "archive": "1 GB"}})
    rows = [row for row in markdown(verdict, "nano").splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| ❌ FAILED", "| ✅ passed"]
    assert markdown(judge({"bundle": {"size": "1 GB"}}), "nano").startswith("### ✅ passed")


# The command.


def test_the_command_judges_a_package_and_writes_every_output(
    finished_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = finished_bundle.manifest
    archive, budget = tmp_path / "nano.zip", tmp_path / "budget.yaml"
    measured = written(tmp_path / "pixel.json", profile(manifest, TIMES))
    package(finished_bundle.path, archive, Request([measured]), no_progress)
    budget.write_text(yaml.safe_dump(on_device("load", "10 ms")))
    outputs = "--junit", tmp_path / "gate.xml", "--markdown", tmp_path / "gate.md"
    fine = run(capsys, "gate", archive, "--budget", budget, *outputs, "--json")
    assert fine.code == 0
    assert fine.json["findings"] == [
        {
            "against": "budget", "name": "load", "target": "onnx", "device": "Pixel 8",
            "value": 10.0, "limit": 10.0, "unit": "ms", "at_most": True, "passed": True,
            "note": "onnxruntime-python, 4 threads, cores 4-7; the limit lies in the 95 % interval "
            "of the median",
        }
    ]  # fmt: skip
    assert JUnitXml.fromfile(str(tmp_path / "gate.xml")).tests == 1
    assert "✅ passed" in (tmp_path / "gate.md").read_text()
    budget.write_text(yaml.safe_dump(on_device("load", "9 ms")))
    broken = run(capsys, "gate", archive, "--budget", budget)
    assert (broken.code, "1 of 1 limits broken" in broken.out) == (1, True)
    budget.write_text("bundel: {}")
    assert run(capsys, "gate", archive, "--budget", budget).code == 2
    assert run(capsys, "gate", tmp_path / "none", "--budget", budget).code == 2


def test_an_output_that_cannot_be_written_is_refused(
    finished_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "budget.yaml").write_text("bundle: {size: 1 GB}")
    arguments = "gate", finished_bundle.path, "--budget", tmp_path / "budget.yaml", "--junit"
    assert run(capsys, *arguments, tmp_path).code == 2
