"""The gate against a baseline: an equal bundle never alarms, a worse one does, and what cannot be
compared is said."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gating import counts, evaluation, profile, written

from exporter.bundle.bundle import Bundle
from exporter.bundle.manifest import MANIFEST, BundleManifest, file_entry
from exporter.errors import InputError
from exporter.gate.baseline import compare, holm
from exporter.gate.budget import Tolerances
from exporter.gate.figure import SIZE, Figure, Figures
from exporter.gate.finding import BASELINE, Finding
from exporter.gate.gate import Verdict, gate
from exporter.packaging import Request, package
from exporter.progress import no_progress

Compare = Callable[..., Verdict]
LOAD, PREFILL, DECODE = ("load", 0), ("prefill", 64), ("decode", 512)
FUNCTIONS = {"matmul": 20e6, "attention": 10e6}


def noisy(
    seed: int, *, slower: float = 1.0, repeats: int = 12
) -> dict[tuple[str, int], list[float]]:
    """Times of three phases with 2 % of noise, and a burst of load on one repeat in ten."""
    random = np.random.default_rng(seed)
    found = {}
    for key, ms in ((LOAD, 10.0), (PREFILL, 5.0), (DECODE, 2.0)):
        noise = random.normal(1, 0.02, repeats) * np.where(random.random(repeats) < 0.1, 1.5, 1)
        found[key] = [float(value) for value in ms * slower * noise]
    return found


def write_baseline(folder: Path, bundle: Bundle, measurements: Sequence[Any]) -> Path:
    """A folder with a manifest and measurements only."""
    (folder / "results").mkdir(parents=True)
    files = {}
    for number, content in enumerate(measurements):
        file = written(folder / "results" / f"{number}.json", content)
        files[f"results/{number}.json"] = file_entry(file)
    manifest = bundle.manifest.model_copy(update={"files": {**bundle.manifest.files, **files}})
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(mode="json")))
    return folder


@pytest.fixture
def manifest(finished_bundle: Bundle) -> BundleManifest:
    return finished_bundle.manifest


@pytest.fixture
def against(finished_bundle: Bundle, tmp_path: Path) -> Compare:
    """against(before, now, tolerances) → the verdict: two lists of measurements of the demo bundle,
    and the section `baseline` of the budget."""

    def of(before: Sequence[Any], now: Sequence[Any], **tolerances: object) -> Verdict:
        budget = tmp_path / "budget.yaml"
        budget.write_text(yaml.safe_dump({"baseline": tolerances}))
        files = [written(tmp_path / f"{n}.json", content) for n, content in enumerate(now)]
        shutil.rmtree(tmp_path / "before", ignore_errors=True)
        baseline = write_baseline(tmp_path / "before", finished_bundle, before)
        return gate(finished_bundle.path, budget, baseline, files)

    return of


def broken(verdict: Verdict) -> list[str]:
    assert {finding.against for finding in verdict.findings} == {BASELINE}
    return [finding.name for finding in verdict.findings if not finding.passed]


def named(verdict: Verdict, name: str) -> Finding:
    (found,) = [finding for finding in verdict.findings if finding.name == name]
    return found


# Counts and sizes are exact.


@pytest.mark.parametrize(("grown", "alarm"), [(1.0, False), (1.005, False), (1.02, True)])
def test_a_count_may_move_by_the_tolerance_only(
    grown: float, alarm: bool, against: Compare, manifest: BundleManifest
) -> None:
    now = {name: grown * count for name, count in FUNCTIONS.items()}
    verdict = against([counts(manifest, FUNCTIONS)], [counts(manifest, now)])
    names = ["instructions, prefill 128", "instructions, decode after 16"]
    assert broken(verdict) == (names if alarm else [])


def test_a_count_that_grew_names_the_function(against: Compare, manifest: BundleManifest) -> None:
    grown = {"matmul": 20e6, "attention": 11e6, "xnn_f32_gemm": 2e6}
    verdict = against([counts(manifest, FUNCTIONS)], [counts(manifest, grown)])
    note = named(verdict, "instructions, prefill 128").note
    assert "+10.00 %" in note
    assert "most in xnn_f32_gemm in runner: +2 M instructions, which the baseline does not" in note


@pytest.mark.parametrize(("grown", "alarm"), [(1.0, False), (1.02, True)])
def test_counts_of_an_earlier_version_are_compared_with_those_in_a_profile(
    grown: float, alarm: bool, against: Compare, manifest: BundleManifest
) -> None:
    """The earlier ones have no bytes, and a file of their own."""
    before = [profile(manifest, noisy(1)), counts(manifest, FUNCTIONS)]
    found = counts(manifest, {name: grown * count for name, count in FUNCTIONS.items()})
    (cpu,) = found["counts"]
    for entry in (*cpu["prefill"], *cpu["decode"]):
        entry["bytes"] = {"loaded": 1e8, "stored": 1e7, "unsized": 0}
    counted = {"counts": [{**found, "schema_version": 2}], "not_counted": []}
    verdict = against(before, [{**profile(manifest, noisy(2)), **counted}])
    names = ["instructions, prefill 128", "instructions, decode after 16"]
    assert broken(verdict) == (names if alarm else [])
    assert named(verdict, names[0]).device == "cortex-a76"


def test_a_count_on_another_cpu_is_not_a_counterpart(
    against: Compare, manifest: BundleManifest
) -> None:
    other = counts(manifest, FUNCTIONS)
    other["counts"][0]["cpu"] = "cortex-a53"
    verdict = against([counts(manifest, FUNCTIONS)], [other])
    assert broken(verdict) == ["instructions, prefill 128", "instructions, decode after 16"]
    assert "was not measured now" in named(verdict, "instructions, prefill 128").note
    assert "executorch, cortex-a53, instructions, prefill 128: new" in " ".join(verdict.notes)


def test_counts_of_another_emulator_are_not_comparable(
    against: Compare, manifest: BundleManifest
) -> None:
    other = {**counts(manifest, FUNCTIONS), "emulator": "qemu-aarch64 8.2.0"}
    verdict = against([counts(manifest, FUNCTIONS)], [other])
    note = named(verdict, "instructions, decode after 16").note
    assert "emulator qemu-aarch64 8.2.0, baseline qemu-aarch64 7.2.22" in note
    assert not verdict.passed


@pytest.mark.parametrize(("grown", "alarm"), [(1.009, False), (1.011, True)])
def test_a_file_may_grow_by_the_tolerance_only(grown: float, alarm: bool) -> None:
    def files(size: float) -> Figures:
        parts = {"onnx/onnx/model_q4.onnx": 1e6, "onnx/onnx/model_q4.onnx_data": size - 1e6}
        return Figures([Figure("file", SIZE, size, "bytes", "onnx", parts=parts)], [])

    (found,) = compare(files(2e6 * grown), files(2e6), Tolerances()).findings
    assert found.passed is not alarm
    assert ("most in onnx/onnx/model_q4.onnx_data: +22 kB" in found.note) is alarm


# Times have noise.


def test_equal_times_give_no_alarm_and_a_tenth_more_does(
    against: Compare, manifest: BundleManifest
) -> None:
    before = [profile(manifest, noisy(0))]
    assert broken(against(before, [profile(manifest, noisy(1))])) == []
    slow = against(before, [profile(manifest, noisy(2, slower=1.1))])
    assert broken(slow) == ["decode after 512", "load", "prefill 64"]
    assert named(slow, "load").note.startswith("baseline 10")
    fast = against(before, [profile(manifest, noisy(3, slower=0.8))])
    assert broken(fast) == []


def test_one_slow_figure_of_many_is_found(against: Compare, manifest: BundleManifest) -> None:
    times = noisy(1) | {DECODE: noisy(2, slower=1.1)[DECODE]}
    verdict = against([profile(manifest, noisy(0))], [profile(manifest, times)])
    assert broken(verdict) == ["decode after 512"]


def test_a_difference_in_the_noise_passes_and_says_so(
    against: Compare, manifest: BundleManifest
) -> None:
    wild = [8.0, 14.0, 9.0, 13.0, 10.0, 12.0, 11.0]
    before, now = {LOAD: wild}, {LOAD: [1.08 * ms for ms in wild]}
    found = named(against([profile(manifest, before)], [profile(manifest, now)]), "load")
    assert found.passed
    assert "may be noise" in found.note


def test_a_slow_down_within_the_tolerance_passes(
    against: Compare, manifest: BundleManifest
) -> None:
    before, now = profile(manifest, noisy(0)), profile(manifest, noisy(1, slower=1.1))
    assert broken(against([before], [now], latency="15 %")) == []


@pytest.mark.parametrize("spread", [0.0, 1e-9, 0.5])
def test_times_without_any_spread_are_compared_too(
    spread: float, against: Compare, manifest: BundleManifest
) -> None:
    """As of a runner with whole milliseconds."""

    def steady(ms: float) -> list[Any]:
        return [profile(manifest, {LOAD: [ms + spread, *[ms] * 6]})]

    assert broken(against(steady(20.0), steady(20.0))) == []
    assert broken(against(steady(20.0), steady(22.0))) == ["load"]


def test_a_coarse_clock_explains_a_part_of_a_change(
    against: Compare, manifest: BundleManifest
) -> None:
    before, now = (profile(manifest, {LOAD: [ms] * 7}) for ms in (20.0, 22.0))
    for report in (before, now):
        for records in report["sessions"][0]["samples"]["rounds"]:
            records[0]["within_ms"] = 1.0
    assert broken(against([before], [now])) == []


def test_memory_is_compared(against: Compare, manifest: BundleManifest) -> None:
    before, now = profile(manifest, noisy(0)), profile(manifest, noisy(1))
    for records in now["sessions"][0]["samples"]["rounds"]:
        records[0]["memory"]["peak_rss"] = 80_000_000
    assert broken(against([before], [now])) == ["memory"]
    assert broken(against([before], [now], memory="ignore")) == []


def test_one_more_product_without_a_delegate_alarms(
    against: Compare, manifest: BundleManifest
) -> None:
    before = profile(manifest, noisy(0), undelegated=["Gemm"])
    now = profile(manifest, noisy(1), undelegated=["Gemm", "MatMul"])
    assert broken(against([before], [before])) == []
    verdict = against([before], [now])
    assert broken(verdict) == ["undelegated"]
    assert "most in MatMul" in named(verdict, "undelegated").note


# Quality.


def test_an_equal_model_never_alarms_in_quality(against: Compare, manifest: BundleManifest) -> None:
    once, again = evaluation(manifest), evaluation(manifest, perplexity=1.5345, kl=0.0091)
    assert broken(against([once], [once])) == []
    assert broken(against([once], [again])) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"perplexity": 1.7}, "perplexity on text.txt"),
        ({"kl": 0.03}, "kl on text.txt"),
        ({"top1_agreement": 0.86}, "top1_agreement on text.txt"),
        ({"accuracy": 0.85, "correct": [1] * 425 + [0] * 75}, "accuracy on problems.jsonl"),
        ({"accuracy": 0.6, "correct": None}, "accuracy on problems.jsonl"),
    ],
    ids=["perplexity", "kl", "top1", "accuracy by problem", "accuracy"],
)
def test_a_worse_model_alarms_in_quality(
    changes: Mapping[str, Any], name: str, against: Compare, manifest: BundleManifest
) -> None:
    verdict = against([evaluation(manifest)], [evaluation(manifest, **changes)])
    assert broken(verdict) == [name]
    better = against([evaluation(manifest, **changes)], [evaluation(manifest)])
    assert broken(better) == []


def test_problems_lost_and_won_alike_are_no_alarm(
    against: Compare, manifest: BundleManifest
) -> None:
    """15 of 500 lost and 8 won: 1.4 points worse, as chance makes it."""
    now = [0] * 15 + [1] * 435 + [1] * 8 + [0] * 42
    other = evaluation(manifest, accuracy=sum(now) / 500, correct=now)
    found = named(against([evaluation(manifest)], [other]), "accuracy on problems.jsonl")
    assert found.passed
    assert "may be noise" in found.note


def test_a_share_of_one_is_not_exact(against: Compare, manifest: BundleManifest) -> None:
    """20 of 20 and 18 of 20: no evidence of a worse model."""
    few = {"problems": 20, "correct": None}
    before = evaluation(manifest, accuracy=1.0, **few)
    assert broken(against([before], [evaluation(manifest, accuracy=0.9, **few)])) == []


def test_a_perplexity_that_is_not_finite_alarms(against: Compare, manifest: BundleManifest) -> None:
    """An evaluation writes null for it."""
    now = evaluation(manifest, perplexity=None)
    assert broken(against([evaluation(manifest)], [now])) == ["perplexity on text.txt"]


# What cannot be compared.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "virtual"}, "kind of device virtual, baseline real"),
        ({"engine_name": "native"}, "engine native, baseline onnxruntime-python"),
        ({"engine_threads": 2}, "threads 2, baseline 4"),
        ({"engine_cores": None}, "cores all, baseline 4-7"),
        ({"engine_mmap": True}, "mapped True, baseline None"),
        ({"name": "Pixel 9"}, "device Pixel 9 Tensor G3, baseline Pixel 8 Tensor G3"),
        ({"cpu_share": 0.5}, "its process had 0.50 cores on average, the baseline's 0.98"),
        ({"cpu_share": 1.9}, "its process had 1.90 cores on average, the baseline's 0.98"),
    ],
    ids=["kind", "engine", "threads", "cores", "mmap", "model", "busy", "baseline was busy"],
)
def test_times_under_other_conditions_are_not_comparable(
    changes: Mapping[str, Any], said: str, against: Compare, manifest: BundleManifest
) -> None:
    now = profile(manifest, noisy(1), **changes)
    verdict = against([profile(manifest, noisy(0))], [now])
    assert {"load", "prefill 64", "decode after 512"} <= set(broken(verdict))
    assert named(verdict, "load").value is None
    assert f"not comparable: {said}" in named(verdict, "load").note


def test_other_versions_of_an_engine_are_compared(
    against: Compare, manifest: BundleManifest
) -> None:
    now = profile(manifest, noisy(1, slower=1.2), engine_versions={"onnxruntime": "2.0"})
    verdict = against([profile(manifest, noisy(0))], [now])
    assert named(verdict, "load").value is not None


def test_the_counterpart_is_the_one_of_the_same_conditions(
    against: Compare, manifest: BundleManifest
) -> None:
    one = profile(manifest, noisy(1), engine_threads=1)
    both = [one, profile(manifest, noisy(2))]
    assert broken(against([profile(manifest, noisy(0))], both)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"of_data": {"file": "text.txt", "sha256": "e" * 64}},
        {"of_settings": {"max_tokens": 100, "sequence_length": 512, "prefill": 1}},
    ],
    ids=["data", "settings"],
)
def test_quality_on_other_text_is_not_comparable(
    changes: Mapping[str, Any], against: Compare, manifest: BundleManifest
) -> None:
    verdict = against([evaluation(manifest)], [evaluation(manifest, **changes)])
    texts = ["perplexity on text.txt", "kl on text.txt", "top1_agreement on text.txt"]
    assert broken(verdict) == texts


def test_too_few_repeats_are_not_compared(against: Compare, manifest: BundleManifest) -> None:
    few = profile(manifest, noisy(1, repeats=5))
    verdict = against([profile(manifest, noisy(0))], [few])
    assert "5 repeats now, 12 in the baseline" in named(verdict, "load").note
    assert not named(verdict, "load").passed


def test_repeats_of_several_profiles_are_pooled(against: Compare, manifest: BundleManifest) -> None:
    halves = [profile(manifest, noisy(seed, repeats=5)) for seed in (1, 2)]
    assert broken(against([profile(manifest, noisy(0))], halves)) == []


def test_what_only_the_baseline_has_fails_and_what_is_new_is_said(
    against: Compare, manifest: BundleManifest
) -> None:
    profiled, evaluated = profile(manifest, noisy(0)), evaluation(manifest)
    failed = profile(manifest, noisy(0), status="failed", problem="no battery")
    verdict = against([profiled], [evaluated, failed])
    assert set(broken(verdict)) == {
        "load",
        "prefill 64",
        "decode after 512",
        "memory",
        "undelegated",
    }
    assert "no battery" in named(verdict, "load").note
    assert "onnx, perplexity on text.txt: new, the baseline does not have it" in verdict.notes


def test_a_tolerance_that_compares_nothing_fails(
    against: Compare, manifest: BundleManifest
) -> None:
    assert broken(against([], [evaluation(manifest)])) == []
    assert broken(against([], [evaluation(manifest)], latency="5 %", kl=0.1)) == ["kl", "latency"]
    assert broken(against([], [evaluation(manifest)], latency="ignore")) == []


def test_emulated_times_are_not_compared(against: Compare, manifest: BundleManifest) -> None:
    before, now = (
        profile(manifest, noisy(seed, slower=slower), kind="emulated")
        for seed, slower in ((0, 1.0), (1, 2.0))
    )
    verdict = against([before], [now])
    assert broken(verdict) == []
    assert "onnx, adb:123, load: not compared (emulated: its times mean nothing)" in verdict.notes
    assert named(verdict, "undelegated").passed


# Baselines.


def test_an_archive_is_a_baseline(finished_bundle: Bundle, tmp_path: Path) -> None:
    manifest, budget = finished_bundle.manifest, tmp_path / "budget.yaml"
    measured = written(tmp_path / "before.json", profile(manifest, noisy(0)))
    package(finished_bundle.path, tmp_path / "old.tar.zst", Request([measured]), no_progress)
    now = written(tmp_path / "now.json", profile(manifest, noisy(1, slower=1.1)))
    budget.write_text("{}")
    verdict = gate(finished_bundle.path, budget, tmp_path / "old.tar.zst", [now])
    assert broken(verdict) == ["decode after 512", "load", "prefill 64"]


def test_a_damaged_baseline_is_refused(finished_bundle: Bundle, tmp_path: Path) -> None:
    measured = [evaluation(finished_bundle.manifest)]
    baseline = write_baseline(tmp_path / "old", finished_bundle, measured)
    written(baseline / "results" / "0.json", evaluation(finished_bundle.manifest, perplexity=9.0))
    (tmp_path / "budget.yaml").write_text("{}")
    with pytest.raises(InputError, match=r"results/0\.json: has sha256"):
        gate(finished_bundle.path, tmp_path / "budget.yaml", baseline)


def test_a_baseline_with_a_foreign_target_is_refused(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    baseline = write_baseline(tmp_path / "old", finished_bundle, [])
    content = json.loads((baseline / MANIFEST).read_text())
    (baseline / MANIFEST).write_text(json.dumps(content | {"targets": ["_storage"]}))
    (tmp_path / "budget.yaml").write_text("{}")
    with pytest.raises(InputError, match="'_storage' is not a target"):
        gate(finished_bundle.path, tmp_path / "budget.yaml", baseline)


def test_a_judged_bundle_must_be_whole(finished_bundle: Bundle, tmp_path: Path) -> None:
    part = write_baseline(tmp_path / "part", finished_bundle, [])
    (tmp_path / "budget.yaml").write_text("{}")
    with pytest.raises(InputError, match="is not a bundle"):
        gate(part, tmp_path / "budget.yaml", finished_bundle.path)


# The family of tests.


def test_holm_is_as_in_his_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_equal_noise_rarely_alarms_and_a_tenth_more_nearly_always_does() -> None:
    """Ten figures, 100 comparisons; tests/benchmarks/gate_alarms.py has real samples."""

    def figures(seed: int, slower: float) -> Figures:
        random = np.random.default_rng(seed)
        repeats = slower * random.normal(1, 0.04, (10, 12)).clip(0.5)
        return Figures(
            [
                Figure(f"decode after {n}", "latency", 1.0, "ms", repeats=[[ms] for ms in row])
                for n, row in enumerate(repeats.tolist())
            ],
            [],
        )

    alarms = {
        slower: sum(
            not all(
                finding.passed
                for finding in compare(
                    figures(2 * seed, slower), figures(2 * seed + 1, 1.0), Tolerances()
                ).findings
            )
            for seed in range(100)
        )
        for slower in (1.0, 1.1)
    }
    assert alarms[1.0] <= 2
    assert alarms[1.1] >= 95
