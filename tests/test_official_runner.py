"""ExecuTorch's official text runner reads the bundle's .pte and tokenizer.json as they are."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

from exporter import pipeline
from exporter.backends.executorch import runtime as executorch
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import Bundle
from exporter.files import sha256
from exporter.inference.generation import Generation, Sampling
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import open_quantized
from exporter.text.tokenizer import TextTokenizer, load_tokenizer

PROMPTS = (
    "Ada has 12 eggs. Ada sells 5. Then 20 eggs are added. How many eggs does Ada have now?",
    "Ben has 300 nuts. Ben loses 12 of them. Cora gives Ben 100 more. Ben sells 50. "
    "Then 20 nuts are added. How many nuts does Ben have now?",
    "Olga has 7 pens. Paul multiplies the pens of Olga by 9. Olga sells 3. "
    "How many pens does Olga have now?",
    "The water of the lake was clear and cold.",
    "Ünïcödé, 12 × 3 – and an emoji 🥚?",
)
NEW_TOKENS = 100


@dataclass(frozen=True)
class Official:
    """The runner, made from two files and nothing else."""

    runner: TextLLMRunner
    tokenizer: TextTokenizer
    artifact: FinishedArtifact

    def pieces(self, text: str, new_tokens: int) -> list[str]:
        """The text of each new token, as the runner's callback gets it."""
        found: list[str] = []
        config = GenerationConfig(echo=False, max_new_tokens=new_tokens, temperature=0.0)
        self.runner.reset()
        self.runner.generate(text, config, found.append)
        return found

    def own_tokens(self, text: str, new_tokens: int, end_ids: Sequence[int]) -> list[int]:
        """What our own greedy run of the same file says, the end token included."""
        runner, prompt = executorch.load(self.artifact.artifact), self.tokenizer.encode(text)
        tokens: list[int] = []
        for token in Generation(runner, prompt, (), Sampling(new_tokens)):
            tokens.append(token)
            if token in end_ids:
                break
        return tokens

    def chat(self, prompt: str) -> str:
        return self.tokenizer.prompt_text(prompt, raw=False)

    def text(self, tokens: list[int]) -> str:
        """With special tokens, which the runner prints too."""
        return self.tokenizer.decode_whole(tokens)


def official(artifact: FinishedArtifact, folder: Path) -> Official:
    for name in ("model.pte", "tokenizer.json"):
        shutil.copy(artifact.artifact.path / name, folder)
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    return Official(runner, load_tokenizer(artifact.artifact.path), artifact)


@pytest.fixture(scope="module")
def demo(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Official:
    return official(finished_bundle.artifacts["executorch"], tmp_path_factory.mktemp("two-files"))


@pytest.fixture(scope="module")
def endless(demo: Official, tmp_path_factory: pytest.TempPathFactory) -> Official:
    """The demo with an end token that never comes: the runner has no option to ignore it."""
    said = {t for prompt in PROMPTS for t in demo.own_tokens(demo.chat(prompt), NEW_TOKENS, ())}
    never = next(token for token in range(512) if token not in said)
    folder = tmp_path_factory.mktemp("endless")
    source = demo.artifact.artifact.path.parent / "quantized"
    shutil.copytree(source, folder / "quantized")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / "quantized" / name).read_text())
        (folder / "quantized" / name).write_text(json.dumps({**content, "eos_token_id": never}))
    manifest = json.loads((folder / "quantized" / "quantization.json").read_text())
    manifest["files"] = {name: sha256(folder / "quantized" / name) for name in manifest["files"]}
    (folder / "quantized" / "quantization.json").write_text(json.dumps(manifest))
    quantized, target = open_quantized(folder / "quantized"), demo.artifact.artifact.target
    return official(pipeline.lower(quantized, target, folder / "artifact", no_progress), folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_official_runner_gives_our_greedy_tokens(
    prompt: str, endless: Official, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens = endless.own_tokens(endless.chat(prompt), NEW_TOKENS, ())
    pieces = endless.pieces(endless.chat(prompt), NEW_TOKENS)
    assert len(pieces) == len(tokens) == NEW_TOKENS
    assert "".join(pieces) == endless.text(tokens)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_official_runner_stops_where_we_stop(
    prompt: str, demo: Official, capfd: pytest.CaptureFixture[str]
) -> None:
    end_ids = demo.artifact.eos_token_ids
    tokens = demo.own_tokens(demo.chat(prompt), 300, end_ids)
    assert tokens[-1] in end_ids
    assert "".join(demo.pieces(demo.chat(prompt), 300)) == demo.text(tokens)


def test_the_official_runner_starts_anew_after_a_reset(
    demo: Official, capfd: pytest.CaptureFixture[str]
) -> None:
    first = demo.pieces(demo.chat(PROMPTS[0]), 40)
    demo.pieces(demo.chat(PROMPTS[1]), 40)
    assert demo.pieces(demo.chat(PROMPTS[0]), 40) == first


def test_the_official_runner_gives_our_greedy_tokens_with_an_int8_cache(
    demo: Official, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantized = open_quantized(demo.artifact.artifact.path.parent / "quantized")
    target = demo.artifact.artifact.target.model_copy(update={"kv_cache": "int8"})
    lowered = pipeline.lower(quantized, target, tmp_path / "artifact", no_progress)
    rounded = official(lowered, tmp_path)
    for prompt in PROMPTS[:3]:
        tokens = rounded.own_tokens(rounded.chat(prompt), 300, lowered.eos_token_ids)
        assert "".join(rounded.pieces(rounded.chat(prompt), 300)) == rounded.text(tokens)
