"""Families of models as transformers writes them, through every format: the same greedy tokens in
float, verified integers, and official clients that run them."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NANO
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from exporter.backends import backend
from exporter.bundle.artifact import FinishedArtifact
from exporter.inference.generation import Generation, Sampling
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import export, no_progress
from exporter.recipe import parse_recipe
from exporter.text.tokenizer import load_tokenizer

STEPS, CONTEXT = 64, 96
#: The vocabulary is the demo's, so that its tokenizer belongs to these models too.
VOCABULARY = 512
END_IDS = (1,)
#: Of the likeliest token's logit over the next one's, in a model whose logits spread by about 1.
LEAST_MARGIN = 0.03


@dataclass(frozen=True)
class Model:
    """A configuration of transformers, and what distinguishes it from the others here."""

    name: str
    config: PreTrainedConfig

    def __str__(self) -> str:
        return self.name


def _shape(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": END_IDS[0],
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        **changes,
    }


MODELS = [
    Model("qwen3-tied-wide-heads", Qwen3Config(**_shape(head_dim=32))),
    Model("qwen3-untied", Qwen3Config(**_shape(head_dim=16, tie_word_embeddings=False))),
    Model(
        "qwen3-three-layers-one-kv-head",
        Qwen3Config(
            **_shape(
                head_dim=64,
                num_hidden_layers=3,
                num_key_value_heads=1,
                hidden_size=128,
                rope_theta=1e6,
            )
        ),
    ),
    Model("olmo2-untied", Olmo2Config(**_shape(tie_word_embeddings=False))),
    Model("olmo2-tied-no-groups", Olmo2Config(**_shape(num_key_value_heads=4))),
    Model(
        "olmo2-three-layers",
        Olmo2Config(**_shape(num_hidden_layers=3, hidden_size=128, rope_theta=5e5)),
    ),
]
EACH = pytest.mark.parametrize("model", MODELS, ids=str)

#: Each target with float products, and how it is given.
FLOAT_TARGETS: dict[str, dict[str, Any]] = {
    "executorch": {"target": "executorch"},
    "executorch portable": {"target": "executorch", "attention": "portable"},
    "executorch coreml": {"target": "executorch", "delegate": "coreml"},
    "onnx contrib": {"target": "onnx", "products": "float"},
    "onnx portable": {"target": "onnx", "form": "portable", "products": "float"},
    "coreml": {"target": "coreml", "activations": "float32", "prefill": 16},
    "gguf": {"target": "gguf", "cache": "float32"},
    "mlx": {"target": "mlx", "activations": "float32"},
}
#: The targets of the int4 bundles.
INT4_TARGETS = [
    {"target": "executorch"}, {"target": "onnx"}, FLOAT_TARGETS["coreml"],
    FLOAT_TARGETS["gguf"], FLOAT_TARGETS["mlx"],
]  # fmt: skip


@cache
def in_transformers(name: str) -> PreTrainedModel:
    """The model with random weights, lively enough that greedy tokens vary."""
    config = next(model.config for model in MODELS if model.name == name)
    torch.manual_seed(len(name))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight_name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            else:
                assert "norm" in weight_name
                parameter.normal_(mean=1.0, std=0.3)
        # ExecuTorch's runner hands over each token as text: only tokens of plain letters are said.
        model.get_output_embeddings().weight[not_plain_text()] = 0
    return model.eval()


def not_plain_text() -> list[int]:
    """The tokens of the demo's tokenizer that are not whole letters of ASCII by themselves."""
    vocabulary = Tokenizer.from_file(str(NANO / "tokenizer.json")).get_vocab()
    return [i for token, i in vocabulary.items() if not token.replace("\u0120", "").isascii()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Every model as transformers saves it, with the demo's tokenizer."""
    found = {}
    for model in MODELS:
        found[model.name] = tmp_path_factory.mktemp(model.name) / "model"
        in_transformers(model.name).save_pretrained(found[model.name])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(NANO / name, found[model.name] / name)
    yield found
    in_transformers.cache_clear()


@cache
@torch.inference_mode()
def greedy_in_transformers(name: str) -> tuple[list[int], list[int]]:
    """A prompt, and the greedy tokens after it. Of random prompts it is the first whose choices
    are never so near a tie that rounding (Core ML's cache is float16) may decide them."""
    model = in_transformers(name)
    for seed in range(2000):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, VOCABULARY, (9,), generator=generator).tolist()
        tokens, margin = torch.tensor([prompt]), float("inf")
        while margin > LEAST_MARGIN and tokens.shape[1] < len(prompt) + STEPS:
            logits = model(tokens, use_cache=False).logits[0, -1]
            first, second = logits.topk(2).values.tolist()
            margin = first - second
            tokens = torch.cat((tokens, logits.argmax().view(1, 1)), 1)
        found: list[int] = tokens[0, len(prompt) :].tolist()
        if margin > LEAST_MARGIN and len(set(found)) > 8:
            return prompt, found
    raise AssertionError(f"{name}: every prompt has a near tie")


def exported(folder: Path, out: Path, scheme: str, *targets: dict[str, Any]) -> Any:
    quantization = {"linear": scheme, "embedding": scheme}
    raw = {
        "name": out.name,
        "quantization": quantization,
        "targets": [{"max_context": CONTEXT, **target} for target in targets],
    }
    return export(parse_recipe(raw, "a test"), open_checkpoint(folder), out, no_progress)


def greedy(artifact: FinishedArtifact, prompt: list[int]) -> list[int]:
    runner = backend(artifact.artifact.target.target).load(artifact.artifact)
    return list(Generation(runner, prompt, (), Sampling(STEPS)))


@EACH
@pytest.mark.parametrize("target", FLOAT_TARGETS.values(), ids=FLOAT_TARGETS)
def test_greedy_tokens_in_float_are_those_of_transformers(
    target: dict[str, Any], model: Model, folders: dict[str, Path], tmp_path: Path
) -> None:
    result = exported(folders[model.name], tmp_path / "bundle", "float", target)
    assert result.bundle is not None, [check for check in result.checks if not check.passed]
    [artifact] = result.artifacts.values()
    prompt, expected = greedy_in_transformers(model.name)
    assert greedy(artifact, prompt) == expected


@pytest.fixture(scope="module")
def bundles(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, FinishedArtifact]]:
    """Every model in int4, for all targets, verified."""
    found = {}
    for model in MODELS:
        out = tmp_path_factory.mktemp("bundles") / model.name
        result = exported(folders[model.name], out, "int4-g32", *INT4_TARGETS)
        failed = [check for check in result.checks if not check.passed]
        assert result.bundle is not None, failed
        found[model.name] = dict(result.artifacts)
    return found


@EACH
def test_int4_bundles_are_verified_for_every_target(
    model: Model, bundles: dict[str, dict[str, FinishedArtifact]]
) -> None:
    assert bundles[model.name].keys() == {"executorch", "onnx", "coreml", "gguf", "mlx"}


@EACH
def test_the_official_text_runner_writes_our_greedy_text(
    model: Model,
    bundles: dict[str, dict[str, FinishedArtifact]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    artifact = bundles[model.name]["executorch"]
    folder = artifact.artifact.path
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    tokenizer, text = load_tokenizer(folder), "Ada has 12 eggs. Ada finds 7 more."
    own: list[int] = []
    loaded = backend("executorch").load(artifact.artifact)
    for token in Generation(loaded, tokenizer.encode(text), (), Sampling(40)):
        own.append(token)
        if token in END_IDS:
            break
    pieces: list[str] = []
    config = GenerationConfig(echo=False, max_new_tokens=40, temperature=0.0)
    runner.generate(text, config, pieces.append)
    assert "".join(pieces) == tokenizer.decode_whole(own)
    assert len(own) > 1


@EACH
def test_onnxruntime_genai_writes_our_greedy_tokens(
    model: Model, bundles: dict[str, dict[str, FinishedArtifact]]
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="the official client is optional")
    artifact = bundles[model.name]["onnx"]
    client = genai.Model(str(artifact.artifact.path))
    parameters = genai.GeneratorParams(client)
    ids, _ = greedy_in_transformers(model.name)
    parameters.set_search_options(max_length=len(ids) + 40, min_length=0, do_sample=False)
    generator = genai.Generator(client, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = list(generator.get_sequence(0))[len(ids) :]
    own = greedy(artifact, ids)[: len(theirs)]
    assert until_end(theirs) == until_end(own)
    assert len(until_end(own)) > 1


def until_end(tokens: list[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in END_IDS), len(tokens))]
