"""onnxruntime-genai runs the ONNX artifact's folder as it is, in both forms."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from clients.greedy import (
    STEPS,
    TEXTS,
    in_torch,
    lowered_demo,
    lowered_families,
    quantized_demo,
    said_by,
    until,
)
from clients.rows import PROMPTS, Shown
from exporter.backends import onnx as backend
from exporter.bundle.artifact import FinishedArtifact
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.text.tokenizer import load_tokenizer

genai = pytest.importorskip(
    "onnxruntime_genai", reason="not installed: pip install onnxruntime-genai==0.18.0"
)

CLIENT = {"client": "onnxruntime-genai", "version": version("onnxruntime-genai")}
#: The name of a row → the options of the target.
FORMS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "onnx products=float": {"products": "float"},
    "onnx form=portable": {"form": "portable", "products": "float"},
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> QuantizedCheckpoint:
    return quantized_demo(tmp_path_factory.mktemp("demo") / "int4")


def said(folder: Path, prompt: list[int], ends: tuple[int, ...]) -> list[int]:
    """What the client says greedily, without the end of the text."""
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + STEPS, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return until(list(generator.get_sequence(0))[len(prompt) :], ends)


def expected(
    quantized: QuantizedCheckpoint, lowered: FinishedArtifact, prompt: list[int]
) -> list[int]:
    """The tokens of the quantized checkpoint; those of our own runner where products round."""
    if lowered.artifact.target.model_dump()["products"] == "float":
        return in_torch(quantized, prompt)
    return said_by(backend.load(lowered.artifact), prompt, lowered.eos_token_ids)


@EACH_FORM
def test_it_writes_our_tokens_from_the_demo_and_reads_its_chat_template(
    form: str, demo: QuantizedCheckpoint, tmp_path: Path, shown: Shown
) -> None:
    lowered = lowered_demo(demo, tmp_path / "onnx", target="onnx", **FORMS[form])
    folder, ours = lowered.artifact.path, load_tokenizer(lowered.artifact.path)
    theirs = genai.Tokenizer(genai.Model(str(folder)))
    for prompt in PROMPTS:
        messages = json.dumps([{"role": "user", "content": prompt}])
        text = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert text == ours.chat_text(prompt)
        ids = ours.encode(text)
        assert theirs.encode(text).tolist() == ids
        written = said(folder, ids, lowered.eos_token_ids)
        assert written == expected(demo, lowered, ids)
        assert len(written) > 10
    shown(
        **CLIENT, model="MobileLLM-R1 demo", target=form,
        ran=f"chat template, tokens and greedy text of {len(PROMPTS)} prompts, equal to ours",
    )  # fmt: skip


@EACH_FORM
def test_it_writes_our_tokens_from_every_family(form: str, tmp_path: Path, shown: Shown) -> None:
    families = lowered_families(tmp_path, target="onnx", **FORMS[form])
    for quantized, lowered in families.values():
        for prompt in TEXTS:
            written = said(lowered.artifact.path, prompt, lowered.eos_token_ids)
            assert written == expected(quantized, lowered, prompt)
    shown(
        **CLIENT, model=f"{', '.join(families)}: small random models", target=form,
        ran=f"{STEPS} greedy tokens after {len(TEXTS)} prompts, equal to ours",
    )  # fmt: skip


def test_other_codes_give_other_tokens(demo: QuantizedCheckpoint, tmp_path: Path) -> None:
    """So the comparison above can fail."""
    lowered = lowered_demo(demo, tmp_path / "onnx", target="onnx")
    changed = Path(shutil.copytree(lowered.artifact.path, tmp_path / "changed"))
    data = changed / "onnx" / "model_q4.onnx_data"
    content = bytearray(data.read_bytes())
    content[: 1 << 20] = bytes(reversed(content[: 1 << 20]))
    data.write_bytes(content)
    ids = load_tokenizer(changed).encode(PROMPTS[0])
    ends = lowered.eos_token_ids
    assert said(changed, ids, ends) != said(lowered.artifact.path, ids, ends)
