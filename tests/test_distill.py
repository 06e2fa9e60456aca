"""Distillation: never worse than its start, the same bytes however often it was killed, and the
same in several processes as in one."""

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calibrating import (
    CHARACTERS,
    divergence_of,
    journal_of,
    quantize_here,
    recipe_of,
    small_checkpoint,
    write_tokenizer,
)
from commands import contents, run
from conftest import LLAMA, LLAMA4, MakeCheckpoint
from safetensors.torch import load_file

from exporter.calibration.data import read_text
from exporter.errors import InputError
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.pipeline import quantize
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, damaged_tensors
from exporter.recipe import Recipe

ABSURD = {"learning_rate": 1.0, "scale_learning_rate": 0.0, "warm_up": 0}
SANE = {"learning_rate": 5e-4, "scale_learning_rate": 2e-3, "steps": 40, "evaluate_every": 10}
WORKING = ".calibration.tmp"


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    return small_checkpoint(make_checkpoint)


def integers(quantized: QuantizedCheckpoint) -> dict[str, torch.Tensor]:
    return load_file(quantized.path / "quantized.safetensors")


def written_to(path: Path, recipe: Recipe) -> Path:
    """The recipe as a file, for a command."""
    path.write_text(yaml.safe_dump({**recipe.to_dict(), "name": recipe.name}))
    return path


def kls(quantized: QuantizedCheckpoint) -> list[float]:
    return [evaluation["kl"] for evaluation in journal_of(quantized)["evaluations"]]


# What comes out.


@pytest.mark.parametrize("start", ["mse", "gptq"])
def test_a_run_that_only_makes_it_worse_leaves_the_start(
    start: str, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    recipe = recipe_of("distill", text, start=start, **ABSURD)
    worse = quantize_here(recipe, checkpoint, tmp_path / "worse")
    assert min(kls(worse)[1:]) > kls(worse)[0]
    assert journal_of(worse)["best"]["step"] == 0
    plain = quantize_here(recipe_of(start, text), checkpoint, tmp_path / "plain")
    for name, tensor in integers(plain).items():
        assert torch.equal(tensor, integers(worse)[name]), name


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (LLAMA4, {}),
        (LLAMA, {}),
        (LLAMA4, {"activations": "int8"}),
        (LLAMA4, {"top_k": 8, "temperature": 2.0}),
        (LLAMA4, {"hidden_weight": 0.1}),
        (LLAMA4, {"precision": "bfloat16"}),
    ],
    ids=["llama4", "llama", "int8 activations", "top k", "hidden states", "bfloat16"],
)
def test_a_distillation_says_on_text_never_seen_more_of_what_the_teacher_says(
    base: dict[str, Any],
    changes: dict[str, Any],
    make_checkpoint: MakeCheckpoint,
    text: Path,
    tmp_path: Path,
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, base)
    quantized = quantize_here(
        recipe_of("distill", text, **{**SANE, **changes}), checkpoint, tmp_path / "a"
    )
    history = journal_of(quantized)
    assert history["best"]["kl"] == min(kls(quantized)) < 0.85 * kls(quantized)[0]
    assert len(history["losses"]) == 40
    assert [evaluation["step"] for evaluation in history["evaluations"]] == [0, 10, 20, 30, 40]
    assert damaged_tensors(quantized) == {}
    assert not (tmp_path / "a" / WORKING).exists()


def test_what_is_kept_is_what_was_best_on_the_held_out_text_and_not_what_was_last(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    """Measured again, with whole models and the integers that were written; the run ends where it
    became worse, since its rates are high and stay so."""
    high = {"learning_rate": 1e-3, "steps": 400, "evaluate_every": 3, "patience": 1, "start": "mse"}
    recipe = recipe_of("distill", text, **{**SANE, **high})
    quantized = quantize_here(recipe, checkpoint, tmp_path / "a")
    best = journal_of(quantized)["best"]
    assert 0 < best["step"] < len(journal_of(quantized)["losses"])
    held_out = read_text(checkpoint, recipe.calibration, []).held_out(4)
    found = divergence_of(checkpoint, quantized, held_out)
    assert found == pytest.approx(best["kl"], rel=1e-3)
    assert found < 0.99 * kls(quantized)[-1]


def test_a_run_that_no_longer_improves_stops(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    recipe = recipe_of("distill", text, steps=100, patience=2, **{**ABSURD, "evaluate_every": 3})
    history = journal_of(quantize_here(recipe, checkpoint, tmp_path / "a"))
    # The start does not count: training makes it worse at first while rates are high.
    trained = [evaluation["kl"] for evaluation in history["evaluations"]][1:]
    assert len(trained) - 1 - trained.index(min(trained)) == 2
    assert len(history["losses"]) == 3 * len(trained) < 100


def test_two_batches_of_one_are_one_batch_of_two(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    curves = [
        journal_of(
            quantize_here(
                recipe_of("distill", text, batch_size=size, accumulate=parts),
                checkpoint, tmp_path / str(parts),
            )
        )["losses"]
        for size, parts in ((2, 1), (1, 2))
    ]  # fmt: skip
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert len(set(curves[0])) == 6


def test_kept_answers_of_the_teacher_change_no_byte(
    checkpoint: Checkpoint, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    for name, keep in (("without", False), ("first", True), ("again", True)):
        recipe = recipe_of("distill", text, top_k=8, batch_size=3, cache_teacher=keep)
        quantize_here(recipe, checkpoint, tmp_path / name)
        if name == "without":
            assert contents(own_cache) == {} if own_cache.exists() else True
        elif name == "first":
            kept = contents(own_cache)
            assert sum(path.endswith(".safetensors") for path in kept) == 18
    assert contents(own_cache) == kept
    whole = contents(tmp_path / "without")
    assert contents(tmp_path / "first") == contents(tmp_path / "again") == whole


def test_kept_answers_are_those_of_their_temperature_and_number(
    checkpoint: Checkpoint, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    for index, changes in enumerate(({}, {"temperature": 2.0}, {"top_k": 9})):
        settings = {"top_k": 8, "cache_teacher": True, **changes}
        quantize_here(recipe_of("distill", text, **settings), checkpoint, tmp_path / str(index))
    assert len(list(own_cache.iterdir())) == 3


# The same bytes.


def test_two_runs_in_different_folders_are_equal_to_the_last_byte(
    checkpoint: Checkpoint, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    """With a budget, and text that is written anew for the second one."""
    data = [{"path": str(text)}, {"tokens": 600}]
    recipe = recipe_of("distill", data, budget="6 bits")
    quantize_here(recipe, checkpoint, tmp_path / "one")
    shutil.rmtree(own_cache)
    moved = Path(shutil.copytree(checkpoint.path, tmp_path / "moved"))
    quantize_here(recipe, open_checkpoint(moved), tmp_path / "another" / "folder")
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "another" / "folder") == whole
    reports = {name for name in whole if name.startswith("calibration/")}
    assert reports == {
        f"calibration/{name}.{kind}"
        for name in ("distillation", "sensitivity")
        for kind in ("json", "png")
    }
    manifest = json.loads((tmp_path / "one" / "quantization.json").read_text())
    assert reports < manifest["files"].keys()


#: For each moment, a process that is killed there, then one that goes on in the same folder. A
#: moment is a change of a name or of a folder (`name:3`, the third one), or a step of a stage. The
#: first one that is not reached is the last.
KILLED_AND_GONE_ON = """
import os, signal, sys
from pathlib import Path
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import quantize
from exporter.recipe import load_recipe
from exporter.calibration.distill import Evaluation, TrainingHistory
from exporter.calibration.plots import plot_history
import exporter.calibration.calibrate, torch._dynamo  # what takes long is loaded once
plot_history(TrainingHistory([1.0], [Evaluation(0, 1.0, 1.0)]))
recipe, checkpoint = load_recipe(sys.argv[1]), open_checkpoint(sys.argv[2])
def run(out, moment):
    if process := os.fork():
        status = os.waitpid(process, 0)[1]
        return "killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    kind, _, number = moment.partition(":")
    count = 0
    def here():
        nonlocal count
        count += 1
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
    def watch(event, arguments):
        if event not in ("os.rename", "os.mkdir") or not str(arguments[0]).startswith(str(out)):
            return
        if event == "os.rename" or not os.path.exists(arguments[0]):
            here()
    def progress(stage, done, total, note=""):
        if stage == kind:
            here()
    if kind == "name":
        sys.addaudithook(watch)
    quantize(recipe, checkpoint, out, progress)
    os._exit(0)
for moment in sys.argv[4:]:
    out = Path(sys.argv[3]) / moment.replace(":", "-")
    killed = run(out, moment)
    print(moment, killed, run(out, "never"), sep=",")
    if killed != "killed":
        break
"""


def killed_at(recipe: Path, checkpoint: Checkpoint, out: Path, moments: Sequence[str]) -> list[str]:
    """How each killed run and the one after it ended, as `moment,killed,0`."""
    outcome = subprocess.run(
        [sys.executable, "-c", KILLED_AND_GONE_ON, str(recipe), str(checkpoint.path), str(out),
         *moments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout.splitlines()


def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    """While it rounds, between evaluations, and before each change of a name or of a folder."""
    recipe = recipe_of("distill", text, budget="6 bits")
    quantize_here(recipe, checkpoint, tmp_path / "whole")
    steps = ["gptq:1", "gptq:7", "distil:1", "distil:3", "distil:6", "quantize:4"]
    fates = killed_at(
        written_to(tmp_path / "small.yaml", recipe), checkpoint, tmp_path / "killed",
        [*steps, *(f"name:{number}" for number in range(1, 60))],
    )  # fmt: skip
    # Every name was reached: behind the last one nothing is killed any more.
    *killed, last = fates
    assert [fate for fate in killed if not fate.endswith(",killed,0")] == []
    assert last.endswith(",0,0")
    assert len(steps) + 15 <= len(killed), fates
    whole = contents(tmp_path / "whole")
    for fate in fates:
        moment = fate.split(",")[0].replace(":", "-")
        assert contents(tmp_path / "killed" / moment) == whole, fate


def test_a_calibration_without_distillation_killed_at_any_moment_ends_in_the_same_bytes(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    recipe = recipe_of("gptq", text, budget="6 bits")
    quantize_here(recipe, checkpoint, tmp_path / "whole")
    fates = killed_at(
        written_to(tmp_path / "small.yaml", recipe), checkpoint, tmp_path / "killed",
        [f"name:{number}" for number in range(1, 60)],
    )  # fmt: skip
    *killed, last = fates
    assert [fate for fate in killed if not fate.endswith(",killed,0")] == []
    assert len(killed) > 0 and last.endswith(",0,0"), fates
    for path in (tmp_path / "killed").iterdir():
        assert contents(path) == contents(tmp_path / "whole"), path.name


class StoppedError(Exception):
    pass


def stop_at(step: int) -> Any:
    """Progress that ends the run in this step of the distillation."""

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "distil" and done == step:
            raise StoppedError

    return progress


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 3e-4}, {"seed": 1}, {"steps": 7}, {"start": "mse"}, {"budget": "6 bits"}],
    ids=str,
)
def test_other_settings_do_not_go_on_from_what_a_killed_run_left(
    change: dict[str, Any], checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        quantize(recipe_of("distill", text), checkpoint, tmp_path / "out", stop_at(5))
    assert (tmp_path / "out" / WORKING / "state.safetensors").is_file()
    recipe = recipe_of("distill", text, **change)
    quantize_here(recipe, checkpoint, tmp_path / "out")
    quantize_here(recipe, checkpoint, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_run_that_does_not_calibrate_leaves_nothing_of_one_that_was_killed(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        quantize(recipe_of("distill", text), checkpoint, out, stop_at(5))
    (out / "calibration").mkdir()
    (out / "calibration" / "distillation.json").write_text("{}")
    quantize_here(recipe_of("mse", text), checkpoint, out)
    quantize_here(recipe_of("mse", text), checkpoint, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_run_that_goes_on_does_not_repeat_what_was_done(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        quantize(recipe_of("distill", text), checkpoint, tmp_path / "out", stop_at(5))
    seen = list[tuple[str, int]]()
    quantize(
        recipe_of("distill", text), checkpoint, tmp_path / "out",
        lambda stage, done, total, note="": seen.append((stage, done)),
    )  # fmt: skip
    assert [done for stage, done in seen if stage == "distil"] == [4, 5, 6]
    assert "gptq" not in {stage for stage, _ in seen}


# What is refused.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_weight": 1e300}, ["calibration.learning_rate", "the loss is inf in step 1"]),
        ({"hidden_weight": 1e300, "accumulate": 2}, ["the loss is inf in step 1"]),
    ],
)
def test_a_loss_that_is_not_finite_exits_with_2_and_loses_nothing(
    changes: dict[str, Any],
    said: list[str],
    checkpoint: Checkpoint,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = written_to(tmp_path / "small.yaml", recipe_of("distill", text, **changes))
    out = tmp_path / "out"
    outcome = run(capsys, "quantize", recipe, "--checkpoint", checkpoint.path, "-o", out)
    assert (outcome.code, outcome.out) == (2, "")
    assert [part for part in [*said, "Lower the learning rates"] if part not in outcome.err] == []
    assert not (out / "quantization.json").exists()
    kept = {path.name for path in (out / WORKING).iterdir()}
    assert kept == {"identity.json", "start.safetensors", "state.safetensors", "best.safetensors"}
    again = written_to(tmp_path / "again.yaml", recipe_of("distill", text))
    assert run(capsys, "quantize", again, "--checkpoint", checkpoint.path, "-o", out).code == 0


def test_a_held_out_divergence_that_is_not_finite_is_refused(
    checkpoint: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As weights that overflow float32 give it."""
    monkeypatch.setattr("exporter.calibration.distill.compare", lambda *_: (float("nan"), 0.0))
    with pytest.raises(InputError, match="held-out text: has a KL of nan"):
        quantize_here(recipe_of("distill", text), checkpoint, tmp_path / "out")


# A teacher of one's own.


def teacher_of(make: MakeCheckpoint, **changes: Any) -> Path:
    return small_checkpoint(make, name="teacher", **changes).path


def test_a_larger_teacher_of_the_same_tokens_is_learned_from(
    checkpoint: Checkpoint, make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path
) -> None:
    teacher = teacher_of(
        make_checkpoint, hidden_size=128, num_hidden_layers=3, no_rope_layers=[1, 1, 1]
    )
    recipe = recipe_of("distill", text, teacher=str(teacher), **SANE)
    quantized = quantize_here(recipe, checkpoint, tmp_path / "out")
    assert journal_of(quantized)["best"]["kl"] < 0.9 * kls(quantized)[0]
    assert set(quantized.manifest["calibration"]["teacher"]) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_a_copy_of_the_checkpoint_as_a_teacher_is_the_checkpoint(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint.path, tmp_path / "copy")
    quantize_here(recipe_of("distill", text), checkpoint, tmp_path / "one")
    quantize_here(recipe_of("distill", text, teacher=str(copy)), checkpoint, tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def _other_tokens(make: MakeCheckpoint) -> Path:
    folder = teacher_of(make)
    write_tokenizer(folder, CHARACTERS[::-1])
    return folder


def _not_finite(make: MakeCheckpoint) -> Path:
    folder = teacher_of(make)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x80\x7f")  # infinity in bfloat16
    return folder


TEACHERS = {
    "fewer tokens": (
        lambda make: teacher_of(make, vocab_size=80),
        {},
        ["calibration.teacher", "has 80 tokens, the checkpoint has 96", "same family"],
    ),
    "another tokenizer": (
        _other_tokens,
        {},
        ["calibration.teacher", "tokenizer.json is not the checkpoint's tokenizer", "same family"],
    ),
    "other hidden states": (
        lambda make: teacher_of(make, hidden_size=128),
        {"hidden_weight": 1.0},
        ["has hidden size 128, the checkpoint has 64", "Set calibration.hidden_weight to 0"],
    ),
    "nowhere": (lambda make: Path("./nowhere"), {}, ["nowhere", "is not a folder"]),
    "weights that are not finite": (_not_finite, {}, ["model.safetensors", "NaN or infinite"]),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_that_does_not_match_is_refused_before_anything_is_written(
    case: str,
    checkpoint: Checkpoint,
    make_checkpoint: MakeCheckpoint,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    make, settings, said = TEACHERS[case]
    recipe = recipe_of("distill", text, teacher=str(make(make_checkpoint)), **settings)
    before = contents(tmp_path)
    with pytest.raises(InputError) as raised:
        quantize_here(recipe, checkpoint, tmp_path / "out")
    assert [part for part in said if part not in str(raised.value)] == [], str(raised.value)
    assert contents(tmp_path) == before


# Several processes.


def torchrun(*program: object, fails: bool = False) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", str(port), *map(str, program),
    ]  # fmt: skip
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (outcome.returncode != 0) is fails, outcome.stderr


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns_from_twice_the_batch(
    parallel: str, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"budget": "6 bits", "parallel": parallel}
    one = quantize_here(
        recipe_of("distill", text, batch_size=4, **settings), checkpoint, tmp_path / "one"
    )
    half = recipe_of("distill", text, batch_size=2, **settings)
    recipe, out = written_to(tmp_path / "half.yaml", half), tmp_path / "two"
    torchrun("-m", "exporter", "quantize", recipe, "--checkpoint", checkpoint.path, "-o", out)
    two = json.loads((out / "calibration" / "distillation.json").read_text())
    assert two["losses"] == pytest.approx(journal_of(one)["losses"], rel=1e-3)
    assert [e["kl"] for e in two["evaluations"]] == pytest.approx(kls(one), rel=1e-3)
    manifest = json.loads((out / "quantization.json").read_text())
    assert manifest["calibration"]["processes"] == 2
    same = [
        (tensor == integers(one)[name]).float().mean().item()
        for name, tensor in load_file(out / "quantized.safetensors").items()
    ]
    assert min(same) > 0.99
    assert not (out / WORKING).exists()


#: One process of two is killed in a step of the distillation.
KILLED = """
import os, signal, sys
from pathlib import Path
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import quantize
from exporter.recipe import load_recipe
def progress(stage, done, total, note=""):
    if stage == "distil" and done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
quantize(load_recipe(sys.argv[1]), open_checkpoint(sys.argv[2]), Path(sys.argv[3]), progress)
"""


def test_two_processes_of_which_one_was_killed_go_on_to_the_same_bytes(
    checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    recipe = written_to(tmp_path / "small.yaml", recipe_of("distill", text, parallel="fsdp"))
    command = ["-m", "exporter", "quantize", recipe, "--checkpoint", checkpoint.path, "-o"]
    torchrun(*command, tmp_path / "whole")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    torchrun(script, recipe, checkpoint.path, tmp_path / "out", fails=True)
    assert (tmp_path / "out" / WORKING / "state.safetensors").is_file()
    torchrun(*command, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
