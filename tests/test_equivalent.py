"""MobileLLM-R1 as a Qwen3: the same function with other names and rows in another order."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import FAMILIES, LLAMA4, NANO, MakeCheckpoint
from transformers import AutoModelForCausalLM

from exporter.inference.reference import score
from exporter.model.checkpoint import open_checkpoint
from exporter.model.equivalent import Source, equivalent
from exporter.quantization.equivalent_checkpoint import as_equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.quantization.schemes import QuantizedTensor

Capture = pytest.CaptureFixture[str]
RECIPE = """
model: someone/model
quantization: {linear: int4-g32, embedding: int8}
max_context: 200
targets: [{target: onnx}]
"""
TOKENS = torch.randint(96, (60,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def written(
    capsys: Capture, recipe: Path, checkpoint: Path, out: Path, *options: str
) -> QuantizedCheckpoint:
    """The quantized checkpoint in `out`; the dequantized folder is `out`/../float."""
    command = ["quantize", recipe, "--checkpoint", checkpoint, "-o", out]
    made = run(capsys, *command, "--dequantize", out.parent / "float", *options)
    assert made.code == 0, made.err
    return open_quantized(out)


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits [tokens, vocab_size] of transformers, which takes the type from config.json."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize(
    ("base", "changes", "family"),
    [
        (LLAMA4, {}, "qwen3"),
        (LLAMA4, {"tie_word_embeddings": False, "head_dim": 64}, "qwen3"),
        (LLAMA4, {"use_qk_norm": False, "num_attention_heads": 4}, "llama"),
    ],
    ids=["tied", "untied", "without norms"],
)
def test_transformers_runs_the_equivalent_model(
    base: dict[str, Any], changes: dict[str, Any], family: str,
    recipe: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture,
) -> None:  # fmt: skip
    checkpoint = make_checkpoint(base, **changes)
    quantized = written(capsys, recipe, checkpoint, tmp_path / "int4", "--as", family)
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert config["model_type"] == family
    expected = score(quantized, TOKENS, range(len(TOKENS)), None)
    found = transformers_logits(tmp_path / "float", TOKENS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    order = equivalent(quantized.config).sources["model.layers.1.self_attn.q_proj.weight"].rows
    assert order is not None and order.tolist() != sorted(order.tolist())


@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("interleaved", [None, True, False])
def test_restoring_undoes_the_order_of_every_weight(
    base: dict[str, Any], interleaved: bool | None,
    recipe: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture,
) -> None:  # fmt: skip
    quantized = written(capsys, recipe, make_checkpoint(base), tmp_path / "int4")
    view = as_equivalent(quantized, rope_interleaved=interleaved)
    moved = seen = 0
    for name, source in view.model.sources.items():
        weight = view.read(name)
        if source.name is None:
            assert isinstance(weight, torch.Tensor) and name.endswith("_norm.weight")
            assert torch.equal(weight, torch.ones(view.config.head_dim))
            continue
        original, restored = quantized.read(source.name), view.restore(name, weight)
        seen += 1
        moved += source.rows is not None
        if isinstance(original, QuantizedTensor):
            assert isinstance(restored, QuantizedTensor) and isinstance(weight, QuantizedTensor)
            assert torch.equal(restored.codes, original.codes)
            assert torch.equal(restored.scales, original.scales)
            assert (source.rows is None) == torch.equal(weight.codes, original.codes)
        else:
            assert isinstance(restored, torch.Tensor) and torch.equal(restored, original)
    assert seen == len(quantized.schemes)
    layout = view.config.rope_interleaved if interleaved is None else interleaved
    changes = layout != quantized.config.rope_interleaved
    assert moved == (4 if changes else 0)  # q and k of two layers


def test_the_rows_of_a_head_change_between_adjacent_pairs_and_halves() -> None:
    config = open_checkpoint(NANO).config
    rows = equivalent(config).sources["model.layers.0.self_attn.q_proj.weight"].rows
    half = config.head_dim // 2
    assert rows is not None
    assert rows[: half + 2].tolist() == [*range(0, config.head_dim, 2), 1, 3]
    assert rows[config.head_dim : config.head_dim + 2].tolist() == [
        config.head_dim,
        config.head_dim + 2,
    ]
    both = Source("x", rows)
    values = torch.arange(len(rows))
    assert torch.equal(both.restore(both.reorder(values)), values)


def test_a_family_that_the_model_is_not_is_refused(
    recipe: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: Capture
) -> None:
    command = ["quantize", recipe, "--checkpoint", make_checkpoint(), "-o", tmp_path / "int4"]
    refused = run(capsys, *command, "--dequantize", tmp_path / "float", "--as", "llama")
    assert refused.code == 2
    assert "a model of type llama4_text is not one of llama. Give qwen3" in refused.err
    assert not (tmp_path / "int4").exists()
    refused = run(capsys, *command, "--as", "qwen3")
    assert refused.code == 2 and "--as qwen3: is for --dequantize" in refused.err
