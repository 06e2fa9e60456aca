"""Finished stages are kept under the hash of their inputs, and found by it again."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from calibrating import recipe_of, small_checkpoint
from commands import contents, flip, run
from conftest import LLAMA, NANO, MakeCheckpoint

from exporter import pipeline, stages
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.files import sha256
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.pipeline import Export, no_progress
from exporter.recipe import Recipe, parse_recipe
from exporter.stages import Stages
from exporter.verification import kept
from exporter.verification.checks import Check

EXECUTORCH, ONNX = "executorch", "onnx"
IDENTITY = {"source": "abc", "versions": {"torch": "2"}}


# The store alone.


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with the files of a finished stage."""
    folder = tmp_path / "finished"
    (folder / "below").mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(range(256)) * 40)
    (folder / "below" / "report.json").write_text("{}")
    return folder


def hashes_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def stored(folder: Path, finished: Path) -> Stages:
    store = Stages(folder)
    store.keep("lower", IDENTITY, finished, hashes_of(finished))
    return store


def entry_of(folder: Path) -> Path:
    """The only entry of a store."""
    (entry,) = folder.glob("*/*")
    return entry


def test_a_kept_stage_is_found_by_its_inputs_and_by_no_others(
    finished: Path, tmp_path: Path
) -> None:
    stored(tmp_path / "store", finished)
    store, out = Stages(tmp_path / "store"), tmp_path / "out"
    assert not store.restore("lower", {**IDENTITY, "source": "abd"}, out)
    assert not store.restore("another", IDENTITY, out)
    assert not out.exists()
    assert store.restore("lower", IDENTITY, out)
    assert contents(out) == contents(finished)
    assert (store.results, store.damaged) == ({"lower": "found"}, {})


def test_without_a_folder_nothing_is_kept_or_found(finished: Path, tmp_path: Path) -> None:
    store = Stages(None)
    store.keep("lower", IDENTITY, finished, hashes_of(finished))
    store.note("verify", IDENTITY, {"checks": []})
    assert not store.restore("lower", IDENTITY, tmp_path / "out")
    assert store.recall("verify", IDENTITY) is None
    assert store.prune(0) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished"]


def test_other_code_of_the_same_version_does_not_find_the_stage(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(tmp_path / "store", finished)
    monkeypatch.setattr(stages, "_code", lambda: "0" * 64)
    assert not store.restore("lower", IDENTITY, tmp_path / "out")


def test_the_hash_of_the_code_changes_with_any_source_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(shutil.copytree(Path(stages.__file__).parent, tmp_path / "exporter"))
    monkeypatch.setattr(stages, "__file__", str(package / "stages.py"))
    code = stages._code.__wrapped__
    before = code()
    path = package / "backends" / "onnx" / "__init__.py"
    path.write_text(path.read_text() + "\n")
    assert code() != before


def test_a_change_in_an_output_folder_does_not_reach_the_store(
    finished: Path, tmp_path: Path
) -> None:
    store, out = stored(tmp_path / "store", finished), tmp_path / "out"
    before = contents(tmp_path / "store")
    flip(finished / "weights", 3)
    store.restore("lower", IDENTITY, out)
    flip(out / "weights", 3)
    assert contents(tmp_path / "store") == before


def _flipped(entry: Path) -> None:
    flip(entry / "files" / "weights", 5000)


def _shorter(entry: Path) -> None:
    (entry / "files" / "weights").write_bytes(b"")


def _missing(entry: Path) -> None:
    (entry / "files" / "below" / "report.json").unlink()


def _linked(entry: Path) -> None:
    """To a file with the right content, outside the store."""
    path = entry / "files" / "weights"
    path.rename(entry.parent.parent.parent / "moved")
    path.symlink_to(entry.parent.parent.parent / "moved")


def _of_another_identity(entry: Path) -> None:
    path = entry / "stage.json"
    path.write_text(path.read_text().replace('"abc"', '"abd"'))


def _not_json(entry: Path) -> None:
    (entry / "stage.json").write_bytes(b"\0")


def _leads_outside(entry: Path) -> None:
    path = entry / "stage.json"
    path.write_text(path.read_text().replace('"weights"', '"../weights"'))


def _a_pipe(entry: Path) -> None:
    (entry / "files" / "weights").unlink()
    os.mkfifo(entry / "files" / "weights")


def _a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_bytes(b"")


def _a_link(entry: Path) -> None:
    target = Path(shutil.move(entry, entry.parent.parent.parent / "elsewhere"))
    (target / "files" / "weights").write_bytes(b"")
    entry.symlink_to(target)


@pytest.mark.parametrize(
    "damage",
    [
        _flipped, _shorter, _missing, _linked, _of_another_identity, _not_json, _leads_outside,
        _a_pipe, _a_file, _a_link,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_removed_said_and_kept_again(
    damage: Any, finished: Path, tmp_path: Path
) -> None:
    store, folder, out = stored(tmp_path / "store", finished), tmp_path / "store", tmp_path / "out"
    whole = contents(folder)
    damage(entry_of(folder))
    assert not store.restore("lower", IDENTITY, out)
    assert not out.exists()
    assert list(store.damaged) == ["lower"]
    assert str(folder) in store.damaged["lower"]
    assert list(folder.glob("*/*")) == []
    store.keep("lower", IDENTITY, finished, hashes_of(finished))
    assert contents(folder) == whole
    assert store.restore("lower", IDENTITY, out)


def test_a_file_that_changed_since_it_was_hashed_is_not_kept(
    finished: Path, tmp_path: Path
) -> None:
    hashes = hashes_of(finished)
    flip(finished / "weights", 0)
    with pytest.raises(InputError, match="has sha256"):
        Stages(tmp_path / "store").keep("lower", IDENTITY, finished, hashes)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def _keep_and_restore(folder: Path, finished: Path, out: Path, rounds: int) -> None:
    for number in range(rounds):
        identity = {"round": number}
        store = Stages(folder)
        store.keep("lower", identity, finished, hashes_of(finished))
        assert store.restore("lower", identity, out / str(number))
        assert store.damaged == {}


def test_processes_that_keep_the_same_stages_at_once_do_not_disturb_each_other(
    finished: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    store, rounds = tmp_path / "store", 30
    processes = [
        context.Process(
            target=_keep_and_restore, args=(store, finished, tmp_path / f"out{number}", rounds)
        )
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(store.glob("*/*"))) == rounds
    for number in range(4):
        for folder in (tmp_path / f"out{number}").iterdir():
            assert contents(folder) == contents(finished)


#: Keeps a stage and kills itself before the N-th change of a name in the store.
KILLED = """
import os, signal, sys
from pathlib import Path
from exporter.stages import Stages
from exporter.files import sha256
folder, finished, identity = Path(sys.argv[1]), Path(sys.argv[2]), {"source": "abc"}
hashes = {"weights": sha256(finished / "weights")}
for point in range(1, 16):
    if os.fork() == 0:
        count = 0
        def watch(event, arguments):
            global count
            if event in ("os.rename", "os.mkdir") and str(arguments[0]).startswith(str(folder)):
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        Stages(folder / str(point)).keep("lower", identity, finished, hashes)
        os._exit(0)
    print("killed" if os.WIFSIGNALED(os.wait()[1]) else "finished")
"""


def test_a_kill_at_any_point_leaves_no_half_stage_that_is_found(
    finished: Path, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "stores"), str(finished)]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    assert set(printed) == {"killed", "finished"} and printed[0] == "killed"
    for point, fate in enumerate(printed, start=1):
        store = Stages(tmp_path / "stores" / str(point))
        found = store.restore("lower", {"source": "abc"}, tmp_path / "out")
        assert found is (fate == "finished")
        assert store.damaged == {}


def used_days_ago(path: Path, days: float) -> None:
    moment = time.time() - days * 86_400
    os.utime(path, (moment, moment))


def used_days_ago_all(store: Path, days: float) -> None:
    for path in store.glob("*/*/stage.json"):
        used_days_ago(path, days)


def test_a_prune_removes_what_was_not_used_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    for name in ("old", "new", "used"):
        Stages(folder).keep(name, IDENTITY, finished, hashes_of(finished))
    for name, days in (("old", 20), ("new", 1), ("used", 20)):
        used_days_ago(next(folder.glob(f"{name}/*/stage.json")), days)
    killed = folder / "old" / f".{'0' * 32}.tmp"
    killed.mkdir()
    used_days_ago(killed, 20)
    foreign = folder / "old" / "notes.txt"
    foreign.write_text("mine")
    store = Stages(folder)
    assert store.restore("used", IDENTITY, tmp_path / "out")
    assert store.prune(14) == 1
    assert sorted(path.parts[-3] for path in folder.glob("*/*/stage.json")) == ["new", "used"]
    assert foreign.exists() and not killed.exists()
    assert store.prune(0) == 1
    assert [path.parts[-3] for path in folder.glob("*/*/stage.json")] == ["used"]


# An export.


def recipe(*, context: int = 64, **more: Any) -> Recipe:
    targets = [{"target": EXECUTORCH, "max_context": 64}, {"target": ONNX, "max_context": context}]
    return parse_recipe({"name": "small", "targets": targets, **more}, "small.yaml")


@pytest.fixture
def model(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return open_checkpoint(make_checkpoint(base=LLAMA))


ALL = {
    "quantize", "lower executorch", "lower onnx",
    "verify quantized", "verify executorch", "verify onnx",
}  # fmt: skip


def happened(result: Export) -> dict[str, set[str]]:
    groups = dict[str, set[str]]()
    for stage, what in result.stages.results.items():
        groups.setdefault(what, set()).add(stage)
    return groups


def test_an_export_says_for_each_stage_what_happened_and_redoes_only_what_depends_on_a_change(
    model: Checkpoint, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def export(name: str, wanted: Recipe, **options: Any) -> Export:
        return pipeline.export(wanted, model, tmp_path / name, no_progress, store=store, **options)

    first = export("one", recipe())
    assert happened(first) == {"made": ALL}
    # A fresh folder: nothing is made, and the bundle and the checks are the same.
    second = export("two", recipe())
    assert happened(second) == {"found": ALL}
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert second.checks == first.checks
    # The same folder: every file is hashed, nothing else.
    third = export("two", recipe())
    assert happened(third) == {"unchanged": ALL}
    assert {check.check for check in third.checks} == {"files"}
    # One target.
    with pytest.raises(InputError, match="finished result of other inputs"):
        export("two", recipe(context=96))
    fourth = export("two", recipe(context=96), overwrite=True)
    assert happened(fourth) == {
        "found": ALL - {"lower onnx", "verify onnx"}, "made": {"lower onnx", "verify onnx"},
    }  # fmt: skip
    # A section that decides no stage: the manifest alone differs.
    fifth = export("five", recipe(profile={"max_repeats": 3}))
    assert happened(fifth) == {"found": ALL}
    one, five = contents(tmp_path / "one"), contents(tmp_path / "five")
    below = {name for name in one if "/" in name}
    assert {name for name in one if one[name] != five[name]} & below == set()
    assert one["manifest.json"] != five["manifest.json"]
    # Another scheme: everything.
    sixth = export("six", recipe(quantization={"method": "absmax"}))
    assert happened(sixth) == {"made": ALL}
    # And all of it is still there, also after a prune by a run that found everything in its folder.
    assert happened(export("seven", recipe())) == {"found": ALL}
    used_days_ago_all(store, 20)
    last = export("seven", recipe())
    assert happened(last) == {"unchanged": ALL}
    assert last.stages.prune(14) == len(ALL) + 2  # those of the sixth, and of the fourth
    assert happened(export("eight", recipe())) == {"found": ALL}


def test_a_damaged_stage_is_made_again_and_the_bundle_is_the_same(
    model: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    pipeline.export(recipe(), model, tmp_path / "one", no_progress, store=store)
    (weights,) = store.glob("quantize/*/files/quantized.safetensors")
    flip(weights, weights.stat().st_size - 1)
    source = tmp_path / "small.yaml"
    source.write_text(
        "targets: [{target: executorch, max_context: 64}, {target: onnx, max_context: 64}]\n"
    )
    arguments = ["export", source, "--checkpoint", model.path, "-o", tmp_path / "two"]
    outcome = run(capsys, *arguments, "--stages", store, "--json")
    assert outcome.code == 0
    assert {stage for stage, what in outcome.json["stages"].items() if what == "made"} == {
        "quantize"
    }
    assert list(outcome.json["damaged_stages"]) == ["quantize"]
    assert "quantized.safetensors: has sha256" in outcome.json["damaged_stages"]["quantize"]
    assert "quantize … damaged in the store, and made again" in outcome.err
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_verification_that_failed_is_not_kept(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, check_artifacts = tmp_path / "store", kept.check_artifacts

    def failing(*arguments: Any) -> list[Check]:
        checks = check_artifacts(*arguments)
        wrong = Check("integers", ONNX, "a weight", False, 1, 0, "differs")
        return [*checks, wrong]

    monkeypatch.setattr(kept, "check_artifacts", failing)
    result = pipeline.export(recipe(), model, tmp_path / "out", no_progress, store=store)
    assert result.bundle is None
    monkeypatch.undo()
    result = pipeline.export(recipe(), model, tmp_path / "out", no_progress, store=store)
    assert result.bundle is not None
    verified = {s: what for s, what in result.stages.results.items() if s.startswith("verify")}
    assert verified == {
        "verify quantized": "found", "verify executorch": "found", "verify onnx": "made",
    }  # fmt: skip


def test_a_text_is_verified_on_also_if_the_bundle_is_finished(
    make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path
) -> None:
    model, store = small_checkpoint(make_checkpoint, base=LLAMA), tmp_path / "store"
    only = parse_recipe({"name": "t", "targets": [{"target": ONNX, "max_context": 64}]}, "t")
    pipeline.export(only, model, tmp_path / "out", no_progress, store=store)
    for what in ("made", "found"):
        result = pipeline.export(only, model, tmp_path / "out", no_progress, store=store, text=text)
        assert result.stages.results["lower onnx"] == "unchanged"
        assert result.stages.results["verify onnx"] == what
        assert any(str(text) in check.subject for check in result.checks)


def test_a_finished_bundle_of_another_calibration_text_is_refused(
    make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path
) -> None:
    """The recipe is the same: it has the path of the text."""
    model = small_checkpoint(make_checkpoint)
    calibrated = recipe_of("gptq", text).model_copy(update={"targets": recipe().targets[1:]})
    store = tmp_path / "store"

    def export(out: str) -> Export:
        return pipeline.export(calibrated, model, tmp_path / out, no_progress, store=store)

    assert "made" in happened(export("out"))
    assert happened(export("another")).keys() == {"found"}
    text.write_text(text.read_text() + "Ada has 3 hens and sells 1.\n" * 40)
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match="finished result of other inputs"):
        export("out")
    assert contents(tmp_path / "out") == before
    assert "quantize" in happened(export("third"))["made"]


def test_a_finished_bundle_is_unchanged_without_a_store_and_a_damaged_one_is_made_whole(
    bundle_copy: Path, finished_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "mobilellm-r1-nano-int4", "--checkpoint", NANO, "-o", bundle_copy]
    outcome = run(capsys, *arguments)
    assert outcome.code == 0
    assert "unchanged" in outcome.out and "nothing was done" in outcome.out
    assert "lower onnx … unchanged" in outcome.err
    flip(bundle_copy / "onnx" / "onnx" / "model_q4.onnx", 999)
    outcome = run(capsys, *arguments, "--json")
    lowered = {s: what for s, what in outcome.json["stages"].items() if s.startswith("lower")}
    assert lowered == {
        "lower executorch": "unchanged", "lower onnx": "made", "lower coreml": "unchanged",
    }  # fmt: skip
    assert contents(bundle_copy) == contents(finished_bundle.path)


def _places(root: Path) -> Iterator[tuple[Path, str]]:
    (root / "file").write_text("")
    yield root / "file", "is a file"
    yield root / "file" / "below", "lies below"
    yield root / "out" / "stages", "one inside the other"
    yield root, "one inside the other"


def test_a_store_in_a_wrong_place_is_refused_before_any_work(
    model: Checkpoint, tmp_path: Path
) -> None:
    for store, problem in _places(tmp_path):
        with pytest.raises(InputError, match=problem):
            pipeline.export(recipe(), model, tmp_path / "out", no_progress, store=store)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--prune-stages", "3"], "needs --stages"),
        (["--stages", "x", "--prune-stages", "-1"], "-1 is not a number of days"),
        (["--stages", "x", "--prune-stages", "nan"], "nan is not a number of days"),
    ],
)
def test_a_prune_without_a_store_or_with_no_number_of_days_is_refused(
    options: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "mobilellm-r1-nano-int4", "--checkpoint", NANO, "-o", tmp_path / "out"]
    outcome = run(capsys, *arguments, *options)
    assert outcome.code == 2
    assert problem in outcome.err
    assert not (tmp_path / "out").exists()
