"""Greedy tokens of our own runners, with which those of a client are compared."""

from itertools import takewhile
from pathlib import Path
from typing import Any

from conftest import FAMILIES, LLAMA4, NANO
from lowering import Lowered, lowered_in, tokens

from exporter import pipeline
from exporter.backends import Runner, parse_target
from exporter.bundle.artifact import FinishedArtifact
from exporter.inference.generation import Generation, Sampling
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import load_recipe

STEPS, CONTEXT = 64, 192
#: What the small models of other families than the demo's read.
TEXTS = [tokens(12, seed) for seed in range(3)]


def quantized_demo(folder: Path) -> QuantizedCheckpoint:
    """The demo checkpoint in int4."""
    recipe = load_recipe("mobilellm-r1-nano-int4", [])
    quantized = pipeline.quantize(recipe, open_checkpoint(NANO), folder, no_progress)
    assert quantized is not None
    return quantized


def lowered_demo(quantized: QuantizedCheckpoint, folder: Path, **target: Any) -> FinishedArtifact:
    """The demo checkpoint as an artifact."""
    parsed = parse_target({"max_context": 512, **target}, "test")
    return pipeline.lower(quantized, parsed, folder, no_progress)


def lowered_families(folder: Path, **target: Any) -> dict[str, Lowered]:
    """A small random model of each family but the demo's, with heads as wide as the hidden size
    gives them."""
    scheme = {"linear": "int4-g32", "embedding": "int4-g32"}
    facts = {"max_context": CONTEXT, **target}
    return {
        name: lowered_in(folder / name, {**config, "head_dim": 16}, facts, scheme)
        for name, config in FAMILIES.items()
        if name != LLAMA4["model_type"]
    }


def in_torch(quantized: QuantizedCheckpoint, prompt: list[int]) -> list[int]:
    """What the quantized checkpoint says, without the end of the text."""
    runner = ReferenceRunner(quantized, CONTEXT + STEPS, None)
    return said_by(runner, prompt, quantized.eos_token_ids)


def said_by(runner: Runner, prompt: list[int], ends: tuple[int, ...]) -> list[int]:
    """What a runner says, without the end of the text."""
    return until(list(Generation(runner, prompt, (), Sampling(STEPS))), ends)


def until(said: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens before the first of `ends`."""
    return list(takewhile(lambda token: token not in ends, map(int, said)))
