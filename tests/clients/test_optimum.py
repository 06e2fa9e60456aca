"""optimum-onnx's ORTModelForCausalLM runs the ONNX artifact's folder as it is, in both forms.

It needs transformers before 4.58, and so an environment of its own: that in build/optimum, or the
one whose interpreter the variable MOBILELLM_OPTIMUM names.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import QWEN3
from lowering import lowered_in

from clients.greedy import (
    CONTEXT,
    STEPS,
    TEXTS,
    in_torch,
    lowered_demo,
    lowered_families,
    quantized_demo,
    said_by,
    until,
)
from clients.rows import PROMPTS, ROOT, Shown
from exporter.backends import onnx as backend
from exporter.backends.onnx import FLOAT_PRODUCTS
from exporter.text.tokenizer import load_tokenizer

PYTHON = os.environ.get("MOBILELLM_OPTIMUM", str(ROOT / "build" / "optimum" / "bin" / "python"))
pytestmark = pytest.mark.skipif(
    shutil.which(PYTHON) is None,
    reason="optimum-onnx needs an environment of its own, which `make tools` makes in "
    "build/optimum (tests/clients/optimum.sh)",
)

#: The name of a row → the options of the target, and those that the user gives the session.
FORMS: dict[str, tuple[dict[str, Any], Mapping[str, str]]] = {
    "onnx": ({}, {}),
    "onnx products=float": ({"products": "float"}, {}),
    "onnx form=portable": ({"form": "portable", "products": "float"}, dict([FLOAT_PRODUCTS])),
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)


@dataclass(frozen=True)
class Asked:
    """What optimum is to do with a folder: see in_optimum.py."""

    folder: Path
    prompts: Sequence[list[int]]
    options: Mapping[str, str]
    conversations: Sequence[str] = ()


def in_optimum(asked: Sequence[Asked]) -> tuple[str, list[Any]]:
    """The version of optimum, and what it answered for each folder."""
    script = Path(__file__).with_name("in_optimum.py")
    given = {
        str(one.folder): {
            "prompts": one.prompts, "options": dict(one.options), "steps": STEPS,
            "conversations": list(one.conversations),
        }
        for one in asked
    }  # fmt: skip
    done = subprocess.run(
        [PYTHON, script],
        check=False,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    versions = answer["versions"]
    version = f"{versions['optimum-onnx']} with transformers {versions['transformers']}"
    return version, [answer["found"][str(one.folder)] for one in asked]


def needs(options: Mapping[str, str]) -> str:
    """The option of the session that a row of docs/clients.md names."""
    named = ", ".join(f"`{name}={value}`" for name, value in options.items())
    return f"session option {named}" if named else ""


@EACH_FORM
def test_it_writes_our_tokens_from_the_demo_and_reads_its_chat_template(
    form: str, tmp_path: Path, shown: Shown
) -> None:
    target, options = FORMS[form]
    quantized = quantized_demo(tmp_path / "int4")
    lowered = lowered_demo(quantized, tmp_path / "onnx", target="onnx", **target)
    folder = lowered.artifact.path
    tokenizer, ends = load_tokenizer(folder), lowered.eos_token_ids
    ids = [tokenizer.encode(tokenizer.chat_text(prompt)) for prompt in PROMPTS]
    version, (found,) = in_optimum([Asked(folder, ids, options, PROMPTS)])
    assert found["rendered"] == ids
    for prompt, written in zip(ids, found["written"], strict=True):
        ours = in_torch(quantized, prompt)
        if "products" not in target:
            ours = said_by(backend.load(lowered.artifact), prompt, ends)
        assert until(written, ends) == ours
        assert len(ours) > 10
    shown(
        client="optimum-onnx", version=version, model="MobileLLM-R1 demo", target=form,
        ran=f"chat template, tokens and greedy text of {len(PROMPTS)} prompts, equal to ours",
        needs=needs(options),
    )  # fmt: skip


@EACH_FORM
def test_it_writes_our_tokens_from_every_family(form: str, tmp_path: Path, shown: Shown) -> None:
    target, options = FORMS[form]
    families = lowered_families(tmp_path, target="onnx", **target)
    asked = [Asked(one.artifact.path, TEXTS, options) for _, one in families.values()]
    version, found = in_optimum(asked)
    for (quantized, lowered), answer in zip(families.values(), found, strict=True):
        for prompt, written in zip(TEXTS, answer["written"], strict=True):
            ours = in_torch(quantized, prompt)
            if "products" not in target:
                ours = said_by(backend.load(lowered.artifact), prompt, lowered.eos_token_ids)
            assert until(written, lowered.eos_token_ids) == ours
    shown(
        client="optimum-onnx", version=version, target=form,
        model=f"{', '.join(families)}: small random models",
        ran=f"{STEPS} greedy tokens after {len(TEXTS)} prompts, equal to ours",
        needs=needs(options),
    )  # fmt: skip


def test_it_ignores_head_dim_as_the_documents_say(tmp_path: Path) -> None:
    """So it cannot run a model whose heads have another width than hidden size / heads."""
    assert QWEN3["head_dim"] != QWEN3["hidden_size"] // QWEN3["num_attention_heads"]
    facts = {"target": "onnx", "max_context": CONTEXT}
    _, lowered = lowered_in(tmp_path, QWEN3, facts, {"linear": "int4", "embedding": "int4"})
    with pytest.raises(AssertionError, match=r"past_key|dimension"):
        in_optimum([Asked(lowered.artifact.path, TEXTS, {})])
