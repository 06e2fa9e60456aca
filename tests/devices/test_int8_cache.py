"""A .pte with an int8 cache in the native runner, whose attention kernels are its own."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NANO

from devices import runner
from exporter import pipeline
from exporter.backends import backend
from exporter.backends.executorch import Target
from exporter.bundle.artifact import FinishedArtifact
from exporter.evaluation.agreement import compare_logits
from exporter.model.checkpoint import open_checkpoint
from exporter.progress import no_progress
from exporter.quantization.quantized_checkpoint import open_quantized
from exporter.recipe import load_recipe

TOKENS = [7, 11, 300, 2, 45, 99, 101, 12]
STEPS = 24


def lowered(folder: Path, kv_cache: Any) -> FinishedArtifact:
    """The demo in float weights: no activation is rounded, so only the cache is."""
    floats = ["quantization.linear=float", "quantization.embedding=float"]
    recipe = load_recipe("mobilellm-r1-nano-int4", floats)
    if not (folder / "quantized").exists():
        pipeline.quantize(recipe, open_checkpoint(NANO), folder / "quantized", no_progress)
    quantized = open_quantized(folder / "quantized")
    target = Target(max_context=256, kv_cache=kv_cache)
    return pipeline.lower(quantized, target, folder / kv_cache, no_progress)


def native(artifact: FinishedArtifact, folder: Path) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and logits [STEPS, vocab_size] of the native runner."""
    (folder / "tokens.txt").write_text(" ".join(map(str, TOKENS)))
    options = {
        "--model": artifact.artifact.path / "model.pte", "--tokens": folder / "tokens.txt",
        "--generate": STEPS, "--logits": folder / "logits",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [str(runner.build(platform.machine()).runner), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    phases = {line["phase"]: line for line in map(json.loads, done.stdout.splitlines())}
    logits = np.fromfile(folder / "logits", np.float32).reshape(STEPS, -1)
    return phases["generate"]["tokens"], torch.from_numpy(logits)


def official(artifact: FinishedArtifact) -> torch.Tensor:
    """Greedy logits [STEPS, vocab_size] of ExecuTorch's runtime."""
    own = backend("executorch").load(artifact.artifact)
    rows = [own.prefill(TOKENS)]
    for _ in range(STEPS - 1):
        rows.append(own.decode(int(rows[-1].argmax())))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8-cache")


def test_the_native_runner_writes_the_tokens_of_executorchs_runtime(folder: Path) -> None:
    rounded, exact = lowered(folder, "int8"), lowered(folder, "float")
    tokens, found = native(rounded, folder)
    expected = official(rounded)
    assert tokens == expected.argmax(1).tolist()
    kl = compare_logits(expected, found).kl
    assert kl < 1e-4
    assert compare_logits(official(exact), expected).kl > kl  # the cache is what differs
