"""A killed export leaves nothing that is accepted as a bundle, and the next export resumes it."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import contents
from conftest import NANO, MakeCheckpoint

from exporter import pipeline
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import export, no_progress
from exporter.recipe import load_recipe

RECIPE = "mobilellm-r1-nano-int4"
KILLS = 20


def command(out: Path) -> list[str]:
    return [
        sys.executable, "-m", "exporter", "export", RECIPE, "--checkpoint", str(NANO),
        "-o", str(out),
    ]  # fmt: skip


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def resume(out: Path) -> None:
    result = export(load_recipe(RECIPE), open_checkpoint(NANO), out, no_progress)
    assert result.bundle is not None


def finished_or_unfinished(out: Path) -> str:
    """What `verify` says; a bundle that is half there must not be called finished."""
    try:
        checks = pipeline.verify(out, no_progress)
    except InputError as error:
        assert "did not finish" in error.problem or error.problem == "is not a bundle"
        return "unfinished"
    assert [check for check in checks if not check.passed] == []
    return "finished"


def test_two_exports_in_two_processes_are_equal_to_the_last_byte(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo"}
    out = tmp_path / "elsewhere" / "with another name"
    subprocess.run(command(out), check=True, capture_output=True, env=environment)
    assert contents(out) == contents(finished_bundle.path)


def test_an_export_does_not_depend_on_the_folder_of_the_checkpoint(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(NANO, tmp_path / "moved"))
    export(load_recipe(RECIPE), open_checkpoint(moved), tmp_path / "out", no_progress)
    assert contents(tmp_path / "out") == contents(finished_bundle.path)


def test_a_finished_export_run_again_touches_no_file(bundle_copy: Path) -> None:
    before = times(bundle_copy)
    resume(bundle_copy)
    assert times(bundle_copy) == before


@pytest.mark.parametrize(
    ("recipe", "override"),
    [
        ("mobilellm-r1-nano-int8", []),
        (RECIPE, ["targets.0.max_context=512"]),
        (RECIPE, ["quantization.method=absmax"]),
        (RECIPE, ["name=another"]),
    ],
)
def test_another_recipe_into_a_finished_folder_is_refused_and_changes_nothing(
    recipe: str, override: list[str], bundle_copy: Path
) -> None:
    before, moments = contents(bundle_copy), times(bundle_copy)
    with pytest.raises(InputError, match="finished result of other inputs"):
        export(load_recipe(recipe, override), open_checkpoint(NANO), bundle_copy, no_progress)
    assert (contents(bundle_copy), times(bundle_copy)) == (before, moments)


def test_other_weights_into_a_finished_folder_are_refused(
    bundle_copy: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(NANO, tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="finished result of other inputs"):
        export(load_recipe(RECIPE), open_checkpoint(other), bundle_copy, no_progress)


def test_overwrite_replaces_a_finished_bundle_by_the_other_one(
    bundle_copy: Path, tmp_path: Path
) -> None:
    """Of which nothing is left, though the other one has fewer files."""
    recipe = load_recipe("mobilellm-r1-nano-int8", ["targets=[{target: executorch}]"])
    checkpoint = open_checkpoint(NANO)
    export(recipe, checkpoint, bundle_copy, no_progress, overwrite=True)
    export(recipe, checkpoint, tmp_path / "fresh", no_progress)
    assert contents(bundle_copy) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["quantized/quantized.safetensors", "executorch/model.pte"])
def test_a_damaged_part_of_an_unfinished_bundle_is_made_anew(
    name: str, bundle_copy: Path, finished_bundle: Bundle
) -> None:
    (bundle_copy / "SHA256SUMS").unlink()
    (bundle_copy / name).write_bytes(b"half of it")
    resume(bundle_copy)
    assert contents(bundle_copy) == contents(finished_bundle.path)


def test_two_exports_at_once_into_one_folder_do_not_mix(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runs = [
        subprocess.Popen(command(out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = {run.communicate()[1] and run.returncode: run for run in runs}
    assert errors.keys() <= {0, 2}
    assert 0 in errors
    assert contents(out) == contents(finished_bundle.path)


#: What takes long the first time is done here once: a killed process is a fork of this one. It
#: loads no runtime, whose threads a fork would not have.
READY = """
import os, random, signal, sys, time
from pathlib import Path
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import export, lower, no_progress, quantize
from exporter.recipe import load_recipe
recipe, checkpoint, out = load_recipe(sys.argv[1]), open_checkpoint(sys.argv[2]), Path(sys.argv[3])
quantized = quantize(recipe, checkpoint, out.with_name("ready"), no_progress)
for target in recipe.targets:
    lower(quantized, target, out.with_name(f"ready-{target.target}"), no_progress)
"""
#: Runs one export and kills itself before the N-th change of a name in the output folder.
KILLED_BEFORE_RENAME = (
    READY
    + """
points = int(sys.argv[4])
for point in range(1, points + 1):
    if os.fork() == 0:
        count, folder = 0, str(out / str(point))
        def watch(event, arguments):
            global count
            if event not in ("os.rename", "os.mkdir"):
                return
            made = event == "os.mkdir" and os.path.exists(arguments[0])
            if str(arguments[0]).startswith(folder) and not made:
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        export(recipe, checkpoint, Path(folder), no_progress)
        os._exit(0)
    status = os.wait()[1]
    print(point, "killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status))
"""
)
#: Runs one export undisturbed, then N that are killed, one in each N-th of that time.
KILLED_AT_ANY_MOMENT = (
    READY
    + """
kills, rng = int(sys.argv[4]), random.Random(9)
def begin(folder):
    process = os.fork()
    if process == 0:
        export(recipe, checkpoint, folder, no_progress)
        os._exit(0)
    return process
started = time.monotonic()
assert os.waitpid(begin(out / "undisturbed"), 0)[1] == 0
duration = time.monotonic() - started
for trial in range(kills):
    process = begin(out / str(trial))
    time.sleep(duration * (trial + rng.random()) / kills)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
"""
)


def run_killed(program: str, recipe: Path, checkpoint: Path, out: Path, count: int) -> str:
    """What the program prints; the results are in folders of `out`."""
    out.mkdir()
    arguments = [recipe, checkpoint, out, count]
    outcome = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def small_model(make_checkpoint: MakeCheckpoint) -> Path:
    """With as many files as a model has."""
    model = make_checkpoint(num_attention_heads=4, num_key_value_heads=2)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (model / name).write_text("{}")
    return model


def test_a_kill_before_any_change_of_a_name_is_made_good(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Every point at which a file or a folder of the bundle appears, one after the other."""
    model = small_model(make_checkpoint)
    source = tmp_path / "tiny.yaml"
    source.write_text("targets: [{target: executorch, max_context: 128}]\n")
    recipe, checkpoint = load_recipe(source), open_checkpoint(model)
    export(recipe, checkpoint, tmp_path / "whole", no_progress)
    whole = contents(tmp_path / "whole")
    # Every file and folder below the bundle's own, that one, and a point that is never reached.
    points = len(whole) + 2
    killed = tmp_path / "killed"
    printed = run_killed(KILLED_BEFORE_RENAME, source, model, killed, points)
    fates = [line.split()[1] for line in printed.splitlines()]
    assert fates == ["killed"] * (points - 1) + ["0"]
    for point, fate in enumerate(fates, start=1):
        out = killed / str(point)
        assert (finished_or_unfinished(out) == "finished") is (fate == "0"), point
        export(recipe, checkpoint, out, no_progress)
        assert contents(out) == whole, point


@pytest.mark.slow
def test_an_export_killed_at_any_moment_can_be_resumed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """`kill -9` at 20 random moments, one in each twentieth of an undisturbed run."""
    model, source, killed = small_model(make_checkpoint), tmp_path / "tiny.yaml", tmp_path / "out"
    facts = "max_context: 128"
    source.write_text(
        f"targets: [{{target: executorch, {facts}}}, {{target: onnx, {facts}}},"
        f" {{target: coreml, {facts}}}]\n"
    )
    recipe, checkpoint = load_recipe(source), open_checkpoint(model)
    run_killed(KILLED_AT_ANY_MOMENT, source, model, killed, KILLS)
    whole = contents(killed / "undisturbed")
    assert finished_or_unfinished(killed / "undisturbed") == "finished"

    fates = list[str]()
    for trial in range(KILLS):
        out = killed / str(trial)
        if out.exists():
            fates.append(finished_or_unfinished(out))
        export(recipe, checkpoint, out, no_progress)
        assert contents(out) == whole, trial
    assert fates.count("unfinished") > KILLS / 2


@pytest.mark.slow
def test_a_folder_killed_again_and_again_still_becomes_the_bundle(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    """One folder: each run starts from what the one before it left when it was killed."""
    out, rng = tmp_path / "out", random.Random(10)
    for trial in range(4):
        process = subprocess.Popen(
            command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        process.stderr.readline()  # the first stage has begun
        time.sleep(rng.random() * 1.5)
        process.kill()
        process.communicate()
        copy = Path(shutil.copytree(out, tmp_path / f"copy-{trial}"))
        finished_or_unfinished(copy)
        resume(copy)
        assert contents(copy) == contents(finished_bundle.path)
