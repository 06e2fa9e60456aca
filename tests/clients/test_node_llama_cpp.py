"""node-llama-cpp, with its own llama.cpp, opens a GGUF of ours as it is."""

from pathlib import Path
from typing import Any

import pytest

from clients.greedy import until
from clients.javascript import (
    MODELS,
    STEPS,
    Answer,
    in_node,
    lowered,
    needs,
    ours,
    quantized,
    version,
    workspace,
)
from clients.rows import Shown
from exporter import backends

CLIENT = "node-llama-cpp"

pytestmark = [
    needs(CLIENT),
    pytest.mark.skipif("gguf" not in backends.names(), reason="this version has no target gguf"),
]


@pytest.mark.parametrize("name", MODELS)
def test_node_llama_cpp_gives_our_tokens(name: str, tmp_path: Path, shown: Shown) -> None:
    """Ours are those of llama-cpp-python: another version of llama.cpp, another compiler. After the
    end of a text, where the model says little, they may differ."""
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python: pip install 'mobilellm-exporter[dev]'"
    )
    model = MODELS[name]
    finished = lowered(quantized(model, tmp_path / "quantized"), tmp_path / "gguf", target="gguf")
    path = finished.artifact.path
    expected, ends = ours(path, model.questions), finished.eos_token_ids
    answer = in_node("llama", workspace(tmp_path / "place"), request_for(path, expected))
    texts = [until(one.tokens, ends) for one in expected]
    assert [until(tokens, ends) for tokens in answer["tokens"]] == texts
    assert answer["encoded"] == [one.prompt for one in expected]
    shown(
        client=CLIENT, version=version(CLIENT), model=name, target="gguf",
        ran=f"5 prompts, up to {STEPS} greedy tokens of text, their tokenization; llama.cpp "
        f"{answer['release']} on the CPU; {answer['milliseconds_per_token']:.1f} ms a token",
    )  # fmt: skip


def request_for(folder: Path, expected: list[Answer]) -> dict[str, Any]:
    """The request that llama.mjs answers."""
    return {
        "path": str(next(folder.glob("*.gguf"))), "steps": STEPS,
        "prompts": [one.prompt for one in expected], "text": [one.text for one in expected],
    }  # fmt: skip
