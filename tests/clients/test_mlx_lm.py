"""mlx-lm runs the folder of the target `mlx` as it is: in Python, as a command and as a server.

    pip install 'mobilellm-exporter[mlx]' && python -m pytest tests/clients/test_mlx_lm.py

It runs on a CPU here. MLX on a GPU, and MLX Swift, need a Mac.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, LLAMA4, NANO, write_checkpoint
from lowering import wide_weights

from clients.rows import PROMPTS, Shown
from exporter import pipeline
from exporter.bundle.artifact import FinishedArtifact
from exporter.inference.generation import Generation, Sampling
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import parse_recipe
from exporter.text.tokenizer import load_tokenizer

mx = pytest.importorskip("mlx.core", reason="pip install 'mobilellm-exporter[mlx]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="pip install 'mobilellm-exporter[mlx]'")

CLIENT = {"client": "mlx-lm", "version": f"{version('mlx-lm')}, MLX {version('mlx')} (CPU)"}
#: How the demo answers the first prompt.
ANSWER = "12 + 7 = 19.\n19 - 5 = 14.\nThe answer is \\boxed{14}."
SECONDS = 120


@pytest.fixture(autouse=True)
def on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


def lowered(
    checkpoint: Path, folder: Path, **target: Any
) -> tuple[QuantizedCheckpoint, FinishedArtifact]:
    raw = {
        "name": "t",
        "quantization": {"linear": "int4-g32", "embedding": "int4-g32"},
        "targets": [{"target": "mlx", "max_context": 128, **target}],
    }
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(
        recipe, open_checkpoint(checkpoint), folder / "quantized", no_progress
    )
    assert quantized is not None
    return quantized, pipeline.lower(quantized, recipe.targets[0], folder / "mlx", no_progress)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as the target's defaults make it: in float16."""
    return lowered(NANO, tmp_path_factory.mktemp("demo"))[1].artifact.path


def until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens up to the first that ends a text, which mlx-lm gives too."""
    return tokens[: next((i + 1 for i, t in enumerate(tokens) if t in ends), len(tokens))]


def test_mlx_lm_writes_the_tokens_of_the_quantized_checkpoint(tmp_path: Path, shown: Shown) -> None:
    quantized, artifact = lowered(NANO, tmp_path, activations="float32")
    model, tokenizer = mlx_lm.load(str(artifact.artifact.path))
    ours, runner = load_tokenizer(NANO), ReferenceRunner(quantized, 128)
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == ours.encode(ours.prompt_text(prompt, raw=False))
        found = [one.token for one in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=64)]
        expected = list(Generation(runner, ids, (), Sampling(64)))
        assert found == until_end(expected, quantized.eos_token_ids) and len(found) > 20
    shown(
        **CLIENT, model="MobileLLM-R1 demo, int4-g32", target="mlx, activations: float32",
        ran=f"greedy tokens of {len(PROMPTS)} prompts, 64 steps, equal to the quantized "
        "checkpoint's in torch; chat template equal",
    )  # fmt: skip


def test_the_command_answers_the_question_of_the_quickstart(demo: Path, shown: Shown) -> None:
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(demo)]
    ran = subprocess.run(
        [*command, "--prompt", PROMPTS[0], "--max-tokens", "64"],
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ANSWER in ran.stdout
    shown(
        **CLIENT, model="MobileLLM-R1 demo, int4-g32", target="mlx",
        ran="python -m mlx_lm generate with the chat template, in float16: the right answer",
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_writes_the_tokens_of_every_family(
    family: str, tmp_path: Path, shown: Shown
) -> None:
    config = {**FAMILIES[family], "vocab_size": 512, "num_attention_heads": 4, "eos_token_id": 1}
    model_folder = write_checkpoint(tmp_path / "model", config, wide_weights(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, model_folder / name)
    quantized, artifact = lowered(model_folder, tmp_path, activations="float32")
    model, tokenizer = mlx_lm.load(str(artifact.artifact.path))
    tokenizer.eos_token_ids.clear()  # random weights end a text anywhere
    runner, seen = ReferenceRunner(quantized, 128), set[int]()
    for first in (7, 90, 301, 444):
        ids = [first, 5, 60]
        found = [o.token for o in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=32)]
        assert found == list(Generation(runner, ids, (), Sampling(32)))
        seen |= set(found)
    assert len(seen) > 5
    name = "qwen3" if config["model_type"] == LLAMA4["model_type"] else family
    assert model.model_type == name
    shown(
        **CLIENT, model=f"{family}, small random weights, int4-g32",
        target="mlx, activations: float32",
        ran="32 greedy tokens of 4 prompts, equal to those in torch",
    )  # fmt: skip


def test_each_end_of_text_token_ends_a_text(demo: Path) -> None:
    model, tokenizer = mlx_lm.load(str(demo))
    assert tokenizer.eos_token_ids == {1, 2, 3}
    for end in (1, 2, 3):

        def force(tokens: Any, logits: Any, end: int = end) -> Any:
            return mx.where(mx.arange(logits.shape[-1]) == end, 1e4, logits)

        [last] = mlx_lm.stream_generate(
            model, tokenizer, [0, 50], max_tokens=4, logits_processors=[force]
        )
        assert (last.token, last.finish_reason) == (end, "stop")


def test_the_server_answers_over_http(demo: Path, tmp_path: Path, shown: Shown) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(demo), "--port", str(port)]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            answer = ask(port, server)
        finally:
            server.terminate()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert ANSWER in answer["choices"][0]["message"]["content"]
    shown(
        **CLIENT, model="MobileLLM-R1 demo, int4-g32", target="mlx",
        ran="mlx_lm.server: a chat completion over HTTP, the right answer",
    )  # fmt: skip


def ask(port: int, server: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """The answer to the first prompt, when the server is up."""
    body = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 64}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps({**body, "temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    until = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None, "the server has ended"
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except urllib.error.URLError:
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.5)
