"""The predicted size of an artifact against its actual size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, LLAMA4, MakeCheckpoint, random_weights

from exporter import pipeline
from exporter.backends import Prediction, Target, coreml, front
from exporter.model.checkpoint import Checkpoint, open_checkpoint
from exporter.model.config import ModelConfig, parse_config
from exporter.pipeline import no_progress
from exporter.quantization.schemes import Scheme
from exporter.recipe import Recipe, parse_recipe

#: 15.7 million parameters in MobileLLM-R1's form.
MID: dict[str, Any] = {
    **LLAMA4,
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "no_rope_layers": [1] * 8,
    "max_position_embeddings": 2048,
    "attention_chunk_size": 2048,
}
#: 12.0 million parameters without the output layer.
MID_LLAMA: dict[str, Any] = {
    **LLAMA,
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def predict(config: ModelConfig, schemes: Mapping[str, Scheme], target: Target) -> Prediction:
    predicted: Prediction = front(target.target).predict(config, schemes, target)
    return predicted


def recipe_of(linear: str, embedding: str, context: int, attention: str) -> Recipe:
    quantization = {"linear": linear, "embedding": embedding, "method": "absmax"}
    target = {"target": "executorch", "max_context": context, "attention": attention}
    return parse_recipe({"name": "t", "quantization": quantization, "targets": [target]}, "t")


def error_of_prediction(recipe: Recipe, checkpoint: Checkpoint, folder: Path) -> float:
    """(predicted - real) / real."""
    quantized = pipeline.quantize(recipe, checkpoint, folder / "quantized", no_progress)
    pipeline.lower(quantized, recipe.targets[0], folder / "artifact", no_progress)
    made = (folder / "artifact").rglob("model.*")
    model = [path for top in made for path in (top, *top.rglob("*")) if path.is_file()]
    real = sum(path.stat().st_size for path in set(model))
    return predict(checkpoint.config, quantized.schemes, recipe.targets[0]).file / real - 1


SCHEMES = pytest.mark.parametrize(
    ("linear", "embedding"),
    [
        ("int4-g32", "int4-g32"),
        ("int4-g64", "int4-g64"),
        ("int4", "int8"),
        ("int8", "int8"),
        ("int4-g32", "float"),
        ("float", "int4-g32"),
    ],
)
ATTENTION = pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])


@SCHEMES
@ATTENTION
def test_the_demo_file_is_predicted_within_two_per_cent(
    linear: str, embedding: str, attention: str, nano: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(linear, embedding, 1024, attention)
    assert abs(error_of_prediction(recipe, open_checkpoint(nano), tmp_path)) < 0.02


@SCHEMES
@pytest.mark.parametrize("context", [256, 2048])
def test_a_mid_file_is_predicted_within_one_per_cent(
    linear: str, embedding: str, context: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(MID))
    recipe = recipe_of(linear, embedding, context, "custom_sdpa")
    assert abs(error_of_prediction(recipe, checkpoint, tmp_path)) < 0.01


@SCHEMES
def test_a_mid_file_with_an_output_layer_apart_is_predicted_within_one_per_cent(
    linear: str, embedding: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(MID_LLAMA))
    recipe = recipe_of(linear, embedding, 512, "portable")
    assert abs(error_of_prediction(recipe, checkpoint, tmp_path)) < 0.01


@pytest.mark.parametrize(
    ("target", "linear", "embedding"),
    [
        ({"target": "coreml"}, "int4-g32", "int4-g32"),
        ({"target": "coreml"}, "int4-g32", "float"),
        ({"target": "coreml", "activations": "float32"}, "int8", "int8"),
        ({"target": "coreml", "compute": "neural_engine", "prefill": 32}, "int4", "int8"),
        ({"target": "coreml", "interface": "language_model"}, "int4-g32", "int4-g32"),
        ({"target": "executorch", "delegate": "coreml", "activations": "float16"}, "int4", "int8"),
    ],
    ids=[
        "mlpackage", "mlpackage with a float embedding", "mlpackage in float32",
        "mlpackage for the Neural Engine", "mlpackage for swift-transformers", "delegate",
    ],
)  # fmt: skip
def test_a_core_ml_program_is_predicted_within_two_per_cent(
    target: dict[str, Any], linear: str, embedding: str, make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:  # fmt: skip
    quantization = {"linear": linear, "embedding": embedding, "method": "absmax"}
    raw = {"name": "t", "quantization": quantization, "targets": [{**target, "max_context": 512}]}
    recipe = parse_recipe(raw, "t")
    checkpoint = open_checkpoint(make_checkpoint(MID))
    assert abs(error_of_prediction(recipe, checkpoint, tmp_path)) < 0.02


def test_the_core_ml_cache_is_two_float16_tensors_a_layer() -> None:
    config = parse_config(MID, Path("config.json"))
    recipe = recipe_of("int8", "int8", 2048, "custom_sdpa")
    schemes = dict.fromkeys(config.parameter_shapes(), recipe.quantization.schemes()[0])
    assert predict(config, schemes, coreml.Target()).kv_cache == 8 * 2 * (2048 * 2 * 64) * 2


def test_the_kv_cache_is_two_float32_tensors_a_layer() -> None:
    config = parse_config(MID, Path("config.json"))
    recipe = recipe_of("int8", "int8", 2048, "custom_sdpa")
    schemes = dict.fromkeys(config.parameter_shapes(), recipe.quantization.schemes()[0])
    prediction = predict(config, schemes, recipe.targets[0])
    assert prediction.kv_cache == 8 * 2 * (2048 * 2 * 64) * 4


def test_the_memory_prediction_holds_more_than_weights_and_cache() -> None:
    config = parse_config(MID, Path("config.json"))
    recipe = recipe_of("int8", "int8", 2048, "custom_sdpa")
    schemes = dict.fromkeys(config.parameter_shapes(), recipe.quantization.schemes()[0])
    prediction = predict(config, schemes, recipe.targets[0])
    assert prediction.memory > sum(t.numel() for t in random_weights(MID, torch.int8).values())
    assert prediction.memory > prediction.kv_cache + prediction.file * 0.9
