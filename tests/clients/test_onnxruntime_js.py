"""onnxruntime-node and onnxruntime-web open the graph of an ONNX artifact as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clients.javascript import (
    FORMS,
    IN_A_BROWSER,
    IN_NODE_NEEDS,
    SESSION,
    STEPS,
    Artifacts,
    in_browser,
    in_node,
    needs,
    version,
    workspace,
)
from clients.rows import Shown
from exporter.backends import onnx as backend
from exporter.verification.runs import run_teacher_forced

NODE, WEB = "onnxruntime-node", "onnxruntime-web"


def request_for(artifacts: Artifacts, form: str, root: str) -> dict[str, Any]:
    """The request that main.mjs and page.html answer; `root` is where the models are."""
    artifact = artifacts.artifact(form).artifact
    graph = f"{root}/{form}/{backend.main_file(artifact.files)}"
    prompts = [answer.prompt for answer in artifacts.answers(form)]
    return {
        "graph": graph, "data": f"{graph}_data" if root == "/models" else None,
        "prompts": prompts, "steps": STEPS, "session": {"intraOpNumThreads": 1},
    }  # fmt: skip


def expected(artifacts: Artifacts, form: str) -> list[list[int]]:
    return [answer.tokens for answer in artifacts.answers(form)]


@needs(NODE)
@pytest.mark.parametrize("form", FORMS)
def test_onnxruntime_node_gives_our_tokens(
    form: str, artifacts: Artifacts, tmp_path: Path, shown: Shown
) -> None:
    request = request_for(artifacts, form, str(artifacts.models)) | {"session": SESSION[form]}
    answer = in_node("onnxruntime", workspace(tmp_path / "place"), request)
    assert answer["tokens"] == expected(artifacts, form)
    shown(
        client=NODE, version=version(NODE), model=artifacts.model.name, target=f"onnx ({form})",
        ran=f"5 prompts x {STEPS} greedy tokens; {answer['milliseconds_per_token']:.1f} ms a token",
        needs=IN_NODE_NEEDS[form],
    )  # fmt: skip


@needs(NODE)
def test_the_portable_form_rounds_activations_unless_a_session_is_told_not_to(
    of_demo: Artifacts, tmp_path: Path
) -> None:
    request = request_for(of_demo, "portable", str(of_demo.models))
    answer = in_node("onnxruntime", workspace(tmp_path / "place"), request)
    assert answer["tokens"] == expected(of_demo, "contrib") != expected(of_demo, "portable")


@needs(WEB, browser=True)
@pytest.mark.parametrize("form", ["contrib", "portable"])
def test_onnxruntime_web_gives_our_tokens(
    form: str, artifacts: Artifacts, tmp_path: Path, shown: Shown
) -> None:
    request = request_for(artifacts, form, "/models")
    with in_browser("onnxruntime", workspace(tmp_path / "place", artifacts.models)) as ask:
        answer = ask(request)
    assert answer["tokens"] == expected(artifacts, IN_A_BROWSER[form])
    shown(
        client=WEB, version=version(WEB), model=artifacts.model.name, target=f"onnx ({form})",
        ran=f"5 prompts x {STEPS} greedy tokens in Chromium {answer['browser']} (WASM, one thread);"
        f" {answer['milliseconds_per_token']:.0f} ms a token",
        needs="the data file as externalData; WebAssembly multiplies floats",
    )  # fmt: skip


@needs(NODE)
@needs(WEB, browser=True)
def test_webassembly_multiplies_floats_where_the_graph_allows_int8(
    of_demo: Artifacts, tmp_path: Path
) -> None:
    """Its logits are those of the graph with float products; those of Node.js are the native ones
    with activations rounded to int8."""
    first, steps = of_demo.answers("contrib")[0], 12
    forced = {"forced": [first.tokens[:steps]], "steps": steps, "prompts": [first.prompt]}
    place = workspace(tmp_path / "place", of_demo.models)
    native = {
        form: native_logits(of_demo, form, first.prompt, first.tokens[:steps]) for form in FORMS
    }
    request = request_for(of_demo, "contrib", str(of_demo.models)) | forced
    in_node_js = torch.tensor(in_node("onnxruntime", place, request)["logits"][0])
    with in_browser("onnxruntime", place) as ask:
        answer = ask(request_for(of_demo, "contrib", "/models") | forced)
    in_webassembly = torch.tensor(answer["logits"][0])
    rounding = farthest(native["contrib"], native["float"])
    assert rounding > 0.05
    assert farthest(in_node_js, native["contrib"]) < 1e-3
    assert farthest(in_webassembly, native["float"]) < 1e-3
    assert farthest(in_webassembly, native["contrib"]) > 0.9 * rounding


def native_logits(artifacts: Artifacts, form: str, prompt: list[int], tokens: list[int]) -> Tensor:
    """The logits [len(tokens), vocab_size] after the prompt and after all but the last token."""
    runner = backend.load(artifacts.artifact(form).artifact)
    return run_teacher_forced(runner, [*prompt, *tokens[:-1]], [len(prompt)])


def farthest(x: Tensor, y: Tensor) -> float:
    """The largest difference of two logits."""
    return float((x - y).abs().max())
