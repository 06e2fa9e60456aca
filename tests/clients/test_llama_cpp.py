"""llama-cpp-python runs a GGUF of ours as it is.

    pip install 'mobilellm-exporter[llama-cpp]' && python -m pytest tests/clients/test_llama_cpp.py

It has the tokenizer, the chat template and the tokens that end a text from the file.
"""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILIES, NANO, ROOT, write_checkpoint
from lowering import wide_weights
from simulation import Simulation

from clients.rows import PROMPTS, Shown
from exporter import pipeline
from exporter.backends import front
from exporter.bundle.artifact import FinishedArtifact
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import parse_recipe
from exporter.text.tokenizer import TextTokenizer, load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install 'mobilellm-exporter[llama-cpp]'")

STEPS, CONTEXT = 64, 256


@dataclass(frozen=True)
class Lowered:
    """A checkpoint and its artifact."""

    quantized: QuantizedCheckpoint
    finished: FinishedArtifact

    @property
    def file(self) -> str:
        return str(self.finished.artifact.path / "model.gguf")

    @property
    def tokenizer(self) -> TextTokenizer:
        return load_tokenizer(self.quantized.path)

    def simulation(self) -> Simulation:
        target: Any = self.finished.artifact.target
        rounding = front("gguf").rounding(self.quantized.schemes, target, 0)
        return Simulation(self.quantized, rounding, CONTEXT)


def lower(checkpoint: Path, scheme: str, out: Path) -> Lowered:
    raw = {
        "name": "t",
        "quantization": {"linear": scheme, "embedding": scheme},
        "targets": [{"target": "gguf", "max_context": CONTEXT}],
    }
    recipe = parse_recipe(raw, "a test")
    quantized = pipeline.quantize(recipe, open_checkpoint(checkpoint), out / "q", no_progress)
    assert quantized is not None
    return Lowered(quantized, pipeline.lower(quantized, recipe.targets[0], out / "a", no_progress))


def family_with_tokenizer(folder: Path, family: str) -> Path:
    """A random model of a family with the demo's tokenizer."""
    config = {**FAMILIES[family], "vocab_size": 512}
    write_checkpoint(folder, config, wide_weights(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(NANO / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lower(NANO, "int4-g32", tmp_path_factory.mktemp("demo"))


def crashes_on_this_cpu() -> bool:
    """Whether the CPU has AMX, with which a llama.cpp that GCC before 12.4 compiled crashes when it
    reads several tokens at once: the table of ``ldtilecfg`` stays empty (GCC bug 114098)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "amx_int8" in cpuinfo.read_text()


def open_client(model: Lowered) -> Any:
    options = {"n_batch": 1} if crashes_on_this_cpu() else {}
    return llama_cpp.Llama(model.file, n_ctx=CONTEXT, n_threads=1, verbose=False, **options)


NEEDS = "`n_batch=1` on CPUs with AMX, if GCC before 12.4 compiled llama.cpp"


def client_tokens(client: Any, ids: list[int]) -> list[int]:
    client.reset()
    return list(islice(client.generate(ids, temp=0.0), STEPS))


def text_of(model: Lowered, tokens: list[int]) -> str:
    """The text of the tokens before the first that ends one."""
    ends = model.quantized.eos_token_ids
    return model.tokenizer.decode(list(takewhile(lambda token: token not in ends, tokens)))


def test_llama_cpp_python_completes_and_chats_with_the_demo(demo: Lowered, shown: Shown) -> None:
    client, simulation = open_client(demo), demo.simulation()
    for prompt in PROMPTS:
        text = demo.tokenizer.prompt_text(prompt, raw=False)
        ids = demo.tokenizer.encode(text)
        assert client.tokenize(text.encode(), special=True) == ids
        tokens = client_tokens(client, ids)
        assert simulation.unexplained(ids, tokens) == []
        made = client.create_completion(text, max_tokens=STEPS, temperature=0)
        assert made["choices"][0]["text"] == text_of(demo, tokens)
        chat = client.create_chat_completion(
            [{"role": "user", "content": prompt}], max_tokens=STEPS, temperature=0
        )
        assert chat["choices"][0]["message"]["content"] == text_of(demo, tokens)
        assert chat["choices"][0]["finish_reason"] == "stop"
    assert simulation.same > 0.95 * simulation.total == 0.95 * len(PROMPTS) * STEPS
    shown(
        client="llama-cpp-python", version=llama_cpp.__version__, model="MobileLLM-R1 demo",
        target="gguf", needs=NEEDS,
        ran=f"completion and chat of {len(PROMPTS)} prompts: the tokens of the quantized "
        "checkpoint but for near ties, and its text, with the file's own tokenizer and template",
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_llama_cpp_python_runs_every_family(family: str, tmp_path: Path, shown: Shown) -> None:
    checkpoint = family_with_tokenizer(tmp_path / "model", family)
    for scheme, share in (("float", 0.99), ("int4-g32", 0.9)):
        model = lower(checkpoint, scheme, tmp_path / scheme)
        client, simulation = open_client(model), model.simulation()
        for prompt in PROMPTS:
            ids = model.tokenizer.encode(prompt)
            assert client.tokenize(prompt.encode(), special=True) == ids
            tokens = client_tokens(client, ids)
            assert simulation.unexplained(ids, tokens) == []
            assert len(set(tokens)) > 2
        assert simulation.same > share * simulation.total
    shown(
        client="llama-cpp-python", version=llama_cpp.__version__,
        model=f"a small random {family}", target="gguf", needs=NEEDS,
        ran=f"{STEPS} greedy tokens of {len(PROMPTS)} prompts in float and in int4: those of torch "
        "but for near ties",
    )  # fmt: skip


def test_the_version_of_the_client_is_the_one_that_setup_cfg_names() -> None:
    assert version("llama-cpp-python") == llama_cpp.__version__
    assert f"llama-cpp-python=={llama_cpp.__version__}" in (ROOT / "setup.cfg").read_text()
