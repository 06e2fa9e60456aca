"""The schemes that a format can store: others are refused by name, before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, LLAMA4, MakeCheckpoint, random_weights
from lowering import check_logits

from exporter import pipeline
from exporter.backends import backend, parse_target
from exporter.errors import InputError
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import EMBEDDING, parse_config
from exporter.pipeline import no_progress
from exporter.quantization.schemes import CODE_RANGE, Scheme, parse_scheme
from exporter.recipe import Recipe, parse_recipe
from exporter.verification.checks import failures
from exporter.verification.integers import check_integers
from exporter.verification.runs import verification_text

#: Rows of 72 codes in the down projections: no group divides them, and no block above 8.
NARROW = {**LLAMA, "intermediate_size": 72, "tie_word_embeddings": True}
#: The same of the embedding and of most other weights.
NARROW_EMBEDDING = {**LLAMA, "hidden_size": 72, "head_dim": 32, "tie_word_embeddings": True}
DOWN = "model.layers.0.mlp.down_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def recipe_of(linear: str, embedding: str, target: dict[str, Any], **overrides: str) -> Recipe:
    quantization = {"linear": linear, "embedding": embedding, "overrides": overrides}
    target = {"target": "onnx", "max_context": 64, **target}
    return parse_recipe({"name": "t", "quantization": quantization, "targets": [target]}, "t")


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("int4", {}),
        ("int4", {"products": "float"}),
        ("int4", {"products": "float", "activations": "float16"}),
        ("int8", {"products": "float"}),
    ],
)
def test_rows_that_onnx_would_store_in_blocks_of_8_are_refused_before_any_work(
    scheme: str, target: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base=NARROW))
    with pytest.raises(InputError) as raised:
        pipeline.export(
            recipe_of(scheme, scheme, target), checkpoint, tmp_path / "out", no_progress
        )
    assert raised.value.subject == f"{DOWN}: {scheme}"
    assert "rows of 72 codes" in raised.value.problem
    assert "blocks of 8" in raised.value.problem and "16 or more" in raised.value.problem
    fast = target.get("products") != "float"
    assert raised.value.remedy == ("Use int8 or float for it" if fast else "Use float for it")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_narrow_embedding_is_refused_as_it_is_always_stored_in_blocks(
    scheme: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base=NARROW_EMBEDDING))
    recipe = recipe_of("int8", scheme, {})
    with pytest.raises(InputError, match="blocks of 8") as raised:
        pipeline.export(recipe, checkpoint, tmp_path / "out", no_progress)
    assert raised.value.subject == f"{EMBEDDING}: {scheme}"
    assert raised.value.remedy == "Use float for it"


def test_a_lowering_alone_refuses_them_too_and_writes_nothing(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint, recipe = (
        open_checkpoint(make_checkpoint(base=NARROW)),
        recipe_of("int4", "int4", {}),
    )
    quantized = pipeline.quantize(recipe, checkpoint, tmp_path / "quantized", no_progress)
    assert quantized is not None
    with pytest.raises(InputError, match="blocks of 8"):
        pipeline.lower(quantized, recipe.targets[0], tmp_path / "artifact", no_progress)
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize(
    ("scheme", "target", "overrides"),
    [
        ("int8", {}, {}),  # without blocks
        ("int4", {"form": "portable", "products": "float"}, {}),  # standard operators take any
        ("int8", {"form": "portable", "products": "float"}, {}),
        ("int4", {}, {"*.down_proj.weight": "int8"}),  # as the refusal says
        ("int4", {"products": "float"}, {"*.down_proj.weight": "float"}),
    ],
)
def test_the_same_rows_are_stored_where_the_runtime_takes_them(
    scheme: str,
    target: dict[str, Any],
    overrides: dict[str, str],
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    weights = random_weights(NARROW, torch.bfloat16)
    checkpoint = open_checkpoint(make_checkpoint(base=NARROW, weights=weights))
    recipe = recipe_of(scheme, scheme, target, **overrides)
    quantized = pipeline.quantize(recipe, checkpoint, tmp_path / "quantized", no_progress)
    assert quantized is not None
    lowered = pipeline.lower(quantized, recipe.targets[0], tmp_path / "artifact", no_progress)
    text = verification_text(quantized, 64, None)
    checks = check_integers(quantized, lowered, lambda _: None)
    assert list(failures(checks + check_logits(quantized, lowered, text))) == []


#: A target of every format and of every way in which it stores weights.
TARGETS = [
    {"target": "executorch"},
    {"target": "executorch", "delegate": "coreml"},
    {"target": "onnx"},
    {"target": "onnx", "form": "portable", "products": "float"},
    {"target": "coreml", "prefill": 32},
    {"target": "gguf"},
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_scheme_that_no_format_knows_is_refused_by_every_one_and_never_taken_for_int4(
    target: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if someone had added 5 bits to the schemes, and to nothing else."""
    monkeypatch.setitem(CODE_RANGE, 5, (-16, 15))
    config = parse_config(LLAMA4, Path("config.json"))
    schemes = {
        name: parse_scheme("int4-g32" if len(shape) == 2 else "float", "")
        for name, shape in config.parameter_shapes().items()
    }
    module = backend(target["target"])
    parsed = parse_target({"max_context": 64, **target}, "test")
    module.check(config, schemes, parsed)
    for name in (Q_PROJ, EMBEDDING):
        with pytest.raises(InputError) as raised:
            module.check(config, {**schemes, name: Scheme(5, 32)}, parsed)
        assert raised.value.subject == f"{name}: int5-g32"
        assert "4 or 8 bits" in raised.value.problem and "not 5" in raised.value.problem
        remedy = raised.value.remedy
        assert "int4-g32" in remedy and "float" in remedy and "int5" not in remedy
