"""Small models with a wide spread of logits, quantized and lowered, and the tokens for them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, LLAMA4, random_weights, write_checkpoint
from torch import Tensor

from exporter import pipeline
from exporter.backends import front
from exporter.bundle.artifact import FinishedArtifact
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import parse_recipe
from exporter.verification.checks import Check
from exporter.verification.integers import check_integers
from exporter.verification.logits import compare_with_reference, reference_logits
from exporter.verification.runs import Text, run_artifact

#: Widths that groups of 64 divide.
MODELS: dict[str, dict[str, Any]] = {
    "llama4_text": {**LLAMA4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama": {**LLAMA, "intermediate_size": 128},
}
#: Model, tied, linear and embedding scheme.
SCHEMES = [
    ("llama4_text", True, "int4-g32", "int4-g32"),
    ("llama4_text", True, "int4-g64", "int4-g64"),
    ("llama4_text", True, "int4-g32", "int8"),
    ("llama4_text", True, "int8", "int8"),
    ("llama4_text", True, "int8-g32", "int8-g64"),
    ("llama4_text", True, "int4", "int4"),
    ("llama4_text", True, "int4-g32", "float"),
    ("llama4_text", False, "int4-g32", "int4-g64"),
    ("llama", True, "int4-g32", "int4-g32"),
    ("llama", False, "int8", "int8"),
    ("llama", False, "float", "float"),
]
#: Heads that share keys, heads that do not, and no norm of queries and keys.
SHAPES: dict[str, dict[str, Any]] = {
    "one k/v head": {"num_key_value_heads": 1},
    "a k/v head each": {"num_key_value_heads": 4},
    "three heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "one layer": {"num_hidden_layers": 1, "no_rope_layers": [1]},
    "no q/k norm": {"use_qk_norm": False},
}

Weights = dict[str, Tensor]
Change = Callable[[Weights], object]
Lowered = tuple[QuantizedCheckpoint, FinishedArtifact]
Lower = Callable[..., Lowered]


def tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, (count,), generator=generator).tolist()


def wide_weights(config: dict[str, Any]) -> Weights:
    """Random weights that give logits which spread widely."""
    return {
        name: (tensor.float() * 3).to(torch.bfloat16) if tensor.ndim == 2 else tensor
        for name, tensor in random_weights(config, torch.bfloat16).items()
    }


def lowered_in(
    folder: Path,
    config: dict[str, Any],
    target: Mapping[str, Any],
    quantization: Mapping[str, Any],
    change: Change | None = None,
) -> Lowered:
    """A model of this configuration, quantized and lowered; `change` edits its weights."""
    weights = wide_weights(config)
    if change is not None:
        change(weights)
    checkpoint = open_checkpoint(write_checkpoint(folder / "model", config, weights))
    raw = {"name": "t", "quantization": dict(quantization), "targets": [dict(target)]}
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(recipe, checkpoint, folder / "quantized", no_progress)
    assert quantized is not None
    return quantized, pipeline.lower(quantized, recipe.targets[0], folder / "artifact", no_progress)


@pytest.fixture(scope="module")
def lower_once(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """`lowered_in` a folder of its own, once in a file for the same arguments. Read it only.

    With `change`, or with `fresh`, it is made anew.
    """
    made: dict[str, Lowered] = {}

    def run(
        config: dict[str, Any],
        target: Mapping[str, Any],
        quantization: Mapping[str, Any],
        change: Change | None = None,
        fresh: bool = False,
    ) -> Lowered:
        key = json.dumps([config, target, quantization], sort_keys=True)
        if not fresh and change is None and key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("lowered")
        found = lowered_in(folder, config, target, quantization, change)
        if change is None:
            made[key] = found
        return found

    return run


def lower_with(
    lower_once: Lower,
    defaults: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]] = MODELS,
) -> Lower:
    """`lower_once` for one of these models by its name, with the default options of a target."""

    def run(
        model: str = "llama4_text",
        linear: str = "int4-g32",
        embedding: str = "int4-g32",
        target: Mapping[str, Any] | None = None,
        overrides: Mapping[str, str] | None = None,
        change: Change | None = None,
        fresh: bool = False,
        **changes: Any,
    ) -> Lowered:
        schemes = {"linear": linear, "embedding": embedding, "overrides": overrides or {}}
        options = {**defaults, **(target or {})}
        return lower_once({**models[model], **changes}, options, schemes, change, fresh)

    return run


def differences(lowered: Lowered, folder: Path) -> list[str]:
    """What differs in a folder from the artifact that was derived, a line each."""
    expected = lowered[1].artifact
    found = replace(expected, path=folder)
    named = front(expected.target.target).differences(found, expected)
    return [f"{place}: {problem}" for place, problem in named]


def failed_integers(lowered: Lowered, folder: Path) -> list[str]:
    """The checks of codes and scales that fail for the files in a folder, a line each."""
    finished = replace(lowered[1], artifact=replace(lowered[1].artifact, path=folder))
    checks = check_integers(lowered[0], finished, lambda name: None)
    return [f"{check.subject}: {check.note}" for check in checks if not check.passed]


def check_logits(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact, text: Text
) -> list[Check]:
    """The checks of an artifact's logits; the artifact runs in this process."""
    target = finished.artifact.target.target
    reference = reference_logits(quantized, {target: finished}, {target: text})[target]
    run = partial(run_artifact, finished.artifact, text)
    return compare_with_reference(finished, text, reference, run)
