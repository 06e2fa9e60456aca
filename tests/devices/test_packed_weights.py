"""The native runner's file of packed weights, and the memory that it needs."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run as run_command
from conftest import LLAMA4, random_weights, write_checkpoint

from devices import runner
from exporter import pipeline
from exporter.backends import executorch
from exporter.bundle.bundle import Bundle
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.recipe import parse_recipe

Capture = pytest.CaptureFixture[str]
DEPTH, STEPS = 2048, 4
TOKENS = "7 11 300 2 45 99 101 12"
#: The width, vocabulary and heads of MobileLLM-R1-140M, and ten of its fifteen layers.
SHALLOW: dict[str, Any] = {
    **LLAMA4,
    "vocab_size": 128256,
    "hidden_size": 576,
    "intermediate_size": 2048,
    "intermediate_size_mlp": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "no_rope_layers": [1] * 10,
    "max_position_embeddings": 4096,
    "attention_chunk_size": 4096,
}


@pytest.fixture(scope="module")
def built() -> runner.Build:
    return runner.build(platform.machine())


@pytest.fixture
def model(portable_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the demo's program, in a folder of its own."""
    return Path(
        shutil.copy(
            portable_bundle.artifacts["executorch"].artifact.path / "model.pte", tmp_path / "m.pte"
        )
    )


def start(
    built: runner.Build, model: Path, *more: object, tokens: str = TOKENS
) -> subprocess.CompletedProcess[str]:
    listed = model.with_name("tokens.txt")
    listed.write_text(tokens)
    command = [built.runner, "--model", model, "--tokens", listed, *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def phases(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return {line["phase"]: line for line in map(json.loads, done.stdout.splitlines())}


def generate(
    built: runner.Build, model: Path, packed: Path | None = None
) -> tuple[dict[str, Any], bytes]:
    """The load's record, and the logits of six tokens."""
    logits = model.with_name("logits")
    words = ["--packed-cache", packed] if packed else []
    found = phases(start(built, model, "--generate", 6, "--logits", logits, *words))
    assert np.isfinite(np.fromfile(logits, np.float32)).all()
    return found["load"], logits.read_bytes()


def test_a_second_load_maps_the_packed_weights_and_computes_the_same(
    built: runner.Build, model: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    load, expected = generate(built, model)
    assert "packed" not in load
    first, logits = generate(built, model, packed)
    assert (first["packed"], logits) == ("written", expected)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("pac*")}
    assert sorted(path.name for path in before) == ["packed", "packed.check"]
    second, logits = generate(built, model, packed)
    assert (second["packed"], logits) == ("read", expected)
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("pac*")
    }
    anonymous = {
        name: one["memory"]["anonymous"] for name, one in (("none", load), ("second", second))
    }
    assert anonymous["none"] - anonymous["second"] > 0.8 * len(packed.read_bytes())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size // 2)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: flip(packed, packed.stat().st_size // 3),
        lambda packed: flip(packed, packed.stat().st_size - 1),
        cut,
        lambda packed: packed.write_bytes(b""),
        lambda packed: packed.chmod(0o666),
        link,
        lambda packed: flip(packed.with_name("packed.check"), -3),
        lambda packed: packed.with_name("packed.check").chmod(0o666),
        lambda packed: packed.with_name("packed.check").write_bytes(b"x" * 10_000_000),
        lambda packed: packed.with_name("packed.check").unlink(),
        lambda packed: packed.unlink(),
    ],
    ids=[
        "a weight", "its end", "half a file", "an empty file", "anyone can write", "a link",
        "the check", "anyone can write the check", "a huge check", "no check", "no file",
    ],
)  # fmt: skip
def test_a_damaged_file_of_packed_weights_is_made_anew(
    damage: Callable[[Path], None], built: runner.Build, model: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    _, expected = generate(built, model, packed)
    damage(packed)
    load, logits = generate(built, model, packed)
    assert (load["packed"], logits) == ("written", expected)
    assert generate(built, model, packed)[0]["packed"] == "read"


def test_the_packed_weights_of_another_program_are_not_used(
    built: runner.Build, model: Path, tmp_path: Path
) -> None:
    """It has the same names, shapes and size, by which XNNPACK would accept them."""
    packed, other = tmp_path / "packed", tmp_path / "other.pte"
    _, first = generate(built, model, packed)
    content = np.frombuffer(model.read_bytes(), np.uint8).copy()
    content[len(content) // 2 :: 64] ^= 0x10
    other.write_bytes(content.tobytes())
    _, expected = generate(built, other)
    assert expected != first
    load, logits = generate(built, other, packed)
    assert (load["packed"], logits) == ("written", expected)
    assert generate(built, model, packed)[1] == first


def test_what_prevents_packed_weights_is_told(
    built: runner.Build, model: Path, tmp_path: Path
) -> None:
    for path, reason in (
        (tmp_path / "nowhere" / "packed", "is not in a folder with room"),
        (tmp_path / ("x" * 240) / "packed", "no path of more than 255 characters"),
    ):
        done = start(built, model, "--packed-cache", path)
        assert (done.returncode, reason in done.stderr) == (3, True), done.stderr
    done = start(built, model, "--packed-cache", tmp_path / "packed", "--load", "file")
    assert (done.returncode, "needs --load mmap" in done.stderr) == (2, True)
    assert list(tmp_path.glob("packed*")) == []


def test_a_profile_reports_loads_from_packed_weights(
    portable_bundle: Bundle, capsys: Capture
) -> None:
    options = [
        "depths=[0]", "prompt_lengths=[8]", "max_repeats=1", "decode_steps=3", "--device", "host",
        "sustained_seconds=0", "--target", "executorch", "--packed-cache",
    ]  # fmt: skip
    outcome = run_command(capsys, "profile", portable_bundle.path, *options, "--json")
    (session,) = outcome.json["sessions"]
    assert outcome.code == 0, session["problem"]
    assert session["engine"]["packed_cache"] is outcome.json["settings"]["packed_cache"] is True
    loads = [
        record["packed"]
        for records in (session["samples"]["first"], *session["samples"]["rounds"])
        for record in records
        if record["phase"] == "load"
    ]
    assert loads[0] in ("written", "read") and set(loads[1:]) == {"read"}
    options[options.index("executorch")] = "onnx"
    outcome = run_command(capsys, "profile", portable_bundle.path, *options, "--json")
    assert "keeps no packed weights" in outcome.err + outcome.out


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A program with the table and output layer of MobileLLM-R1-140M, of random weights, and the
    predicted memory in bytes."""
    folder = tmp_path_factory.mktemp("shallow")
    weights = random_weights(SHALLOW, torch.bfloat16)
    checkpoint = open_checkpoint(write_checkpoint(folder / "model", SHALLOW, weights))
    quantization = {"linear": "int4-g32", "embedding": "int4-g32", "method": "absmax"}
    target = {"target": "executorch", "max_context": DEPTH + STEPS}
    raw = {"name": "t", "quantization": quantization, "targets": [target]}
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(recipe, checkpoint, folder / "quantized", no_progress)
    pipeline.lower(quantized, recipe.targets[0], folder / "artifact", no_progress)
    predicted = executorch.predict(checkpoint.config, quantized.schemes, recipe.targets[0])
    return folder / "artifact" / "model.pte", predicted.memory


@pytest.mark.parametrize("kept", [False, True], ids=["packed in memory", "packed in a file"])
def test_a_process_needs_its_file_its_cache_and_little_more(
    kept: bool, built: runner.Build, shallow: tuple[Path, int], tmp_path: Path
) -> None:
    """Also on tokens from everywhere in the table, the worst case. The prediction holds too."""
    program, predicted = shallow
    tokens = " ".join(str(i * 7919 % 128256) for i in range(DEPTH))
    words = ["--depths", f"0,{DEPTH}", "--steps", STEPS]
    words += ["--packed-cache", tmp_path / "packed"] if kept else []
    position = 2 * 10 * 3 * 64 * 4  # keys and values
    for _ in range(1 + kept):
        done = start(built, program, *words, tokens=tokens)
        assert done.returncode == 0, done.stderr
        start_, load, shallow_, deep = map(json.loads, done.stdout.splitlines()[:-1])
        peaks = [one["memory"]["peak_rss"] for one in (start_, load, shallow_, deep)]
        bound = program.stat().st_size + 40e6
        assert max(peaks[:3]) < bound + STEPS * position
        assert peaks[3] < bound + (DEPTH + STEPS) * position
        assert abs(predicted / peaks[3] - 1) < 0.1
