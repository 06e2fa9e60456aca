"""node-llama-cpp, with the llama.cpp that it brings, opens a GGUF of ours as it is."""

from pathlib import Path
from typing import Any

import pytest
from simulation import Simulation

from clients.javascript import (
    MODELS,
    STEPS,
    in_node,
    lowered,
    needs,
    quantized,
    version,
    workspace,
)
from clients.rows import Shown
from exporter.backends import front
from exporter.text.tokenizer import load_tokenizer

CLIENT = "node-llama-cpp"

pytestmark = needs(CLIENT)


@pytest.mark.parametrize("name", MODELS)
def test_node_llama_cpp_gives_the_tokens_of_the_quantized_checkpoint(
    name: str, tmp_path: Path, shown: Shown
) -> None:
    """In torch, with activations rounded as llama.cpp rounds them, but for near ties."""
    model, source = MODELS[name], quantized(MODELS[name], tmp_path / "quantized")
    finished = lowered(source, tmp_path / "gguf", target="gguf")
    tokenizer, target = load_tokenizer(source.path), finished.artifact.target
    texts = [tokenizer.prompt_text(question, raw=False) for question in model.questions]
    prompts = [tokenizer.encode(text) for text in texts]
    file = finished.artifact.path / front("gguf").main_file(finished.artifact.files)
    request: dict[str, Any] = {
        "path": str(file),
        "steps": STEPS, "prompts": prompts, "text": texts,
    }  # fmt: skip
    answer = in_node("llama", workspace(tmp_path / "place"), request)
    assert answer["encoded"] == prompts
    rounding = front("gguf").rounding(source.schemes, target, 0)
    simulation = Simulation(source, rounding, max(map(len, prompts)) + STEPS)
    for prompt, tokens in zip(prompts, answer["tokens"], strict=True):
        assert len(tokens) == STEPS
        assert simulation.unexplained(prompt, tokens) == []
    assert simulation.same > 0.9 * simulation.total > 0
    shown(
        client=CLIENT, version=version(CLIENT), model=name, target="gguf",
        ran=f"5 prompts x {STEPS} greedy tokens, those of the quantized checkpoint but for near "
        f"ties, and their tokenization; llama.cpp {answer['release']} on the CPU; "
        f"{answer['milliseconds_per_token']:.1f} ms a token",
    )  # fmt: skip
