"""transformers.js, in Node.js and in a browser, opens the folder of an ONNX artifact as it is."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from clients.javascript import (
    FORMS,
    IN_A_BROWSER,
    IN_NODE_NEEDS,
    SESSION,
    STEPS,
    Answer,
    Artifacts,
    Model,
    continued,
    in_browser,
    in_node,
    needs,
    version,
    workspace,
)
from clients.rows import Shown
from exporter.text.documents import Message
from exporter.text.tokenizer import load_tokenizer

CLIENT = "@huggingface/transformers"


def request_for(model: Model, form: str, place: Path) -> dict[str, Any]:
    """The request that main.mjs and page.html answer. The folder says what else is to be known."""
    return {
        "models": str(place / "models"), "model": form, "questions": list(model.questions),
        "steps": STEPS, "follow_up": model.follow_up, "options": {},
    }  # fmt: skip


def check(answer: dict[str, Any], artifacts: Artifacts, form: str) -> None:
    """The same texts, tokens of prompts, and greedy tokens as ours from the artifact `form`, whose
    arithmetic the client has."""
    finished, expected = artifacts.artifact(form), artifacts.answers(form)
    folder = finished.artifact.path
    assert [Answer(**one) for one in answer["answers"]] == expected
    tokenizer, second = load_tokenizer(folder), answer["second_turn"]
    ends = finished.eos_token_ids
    said = list(takewhile(lambda token: token not in ends, expected[0].tokens))
    assert answer["reply"] == tokenizer.decode(said)
    messages = [Message(**one) for one in second["messages"]]
    assert second["text"] == tokenizer.conversation_text(messages, to_be_answered=True)
    assert second["prompt"] == tokenizer.encode(second["text"])
    # The second turn reads its new tokens only, behind the cache of the first.
    assert second["fits"] and len(expected[0].prompt) < second["cached"] < len(second["prompt"])
    assert second["tokens"] == continued(folder, second["prompt"])


@needs(CLIENT)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_js_in_node_gives_our_tokens(
    form: str, artifacts: Artifacts, tmp_path: Path, shown: Shown
) -> None:
    artifacts.artifact(form)
    place = workspace(tmp_path / "place", artifacts.models)
    options = {"session_options": SESSION[form]} if SESSION[form] else {}
    request = request_for(artifacts.model, form, place) | {"options": options}
    answer = in_node("transformers", place, request)
    check(answer, artifacts, form)
    shown(
        client="transformers.js in Node.js", version=version(CLIENT), model=artifacts.model.name,
        target=f"onnx ({form})",
        ran=f"5 prompts x {STEPS} greedy tokens, a second turn, the chat template; "
        f"onnxruntime-node {answer['runtime']['node']}; "
        f"{answer['milliseconds_per_token']:.1f} ms a token",
        needs=IN_NODE_NEEDS[form],
    )  # fmt: skip


@needs(CLIENT, browser=True)
@pytest.mark.parametrize("form", ["contrib", "portable"])
def test_transformers_js_in_a_browser_gives_our_tokens(
    form: str, artifacts: Artifacts, tmp_path: Path, shown: Shown
) -> None:
    artifacts.artifact(form)
    place = workspace(tmp_path / "place", artifacts.models)
    with in_browser("transformers", place) as ask:
        answer = ask(request_for(artifacts.model, form, place))
    check(answer, artifacts, IN_A_BROWSER[form])
    shown(
        client="transformers.js in Chromium", version=version(CLIENT), model=artifacts.model.name,
        target=f"onnx ({form})", needs="WebAssembly multiplies floats",
        ran=f"5 prompts x {STEPS} greedy tokens, a second turn, the chat template; Chromium "
        f"{answer['browser']}, onnxruntime-web {answer['runtime']['web']} (WASM, one thread); "
        f"{answer['milliseconds_per_token']:.0f} ms a token",
    )  # fmt: skip


@needs(CLIENT)
def test_another_template_and_other_weights_are_noticed(of_demo: Artifacts, tmp_path: Path) -> None:
    original = of_demo.artifact("contrib").artifact.path
    path = Path(shutil.copytree(original, tmp_path / "models" / "contrib"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("assistant", "model")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    place = workspace(tmp_path / "place", tmp_path / "models")
    request = {
        **request_for(of_demo.model, "contrib", place),
        "questions": of_demo.model.questions[:1],
    }
    expected = of_demo.answers("contrib")[0]
    found = Answer(**in_node("transformers", place, request)["answers"][0])
    assert found.text == expected.text.replace("assistant", "model") != expected.text
    assert found.prompt != expected.prompt

    shutil.copy(original / "tokenizer_config.json", path)
    data = next(path.glob("onnx/*_data"))
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    found = Answer(**in_node("transformers", place, request)["answers"][0])
    assert found.prompt == expected.prompt and found.tokens != expected.tokens


@needs(CLIENT)
def test_a_program_in_node_reaches_no_network(tmp_path: Path) -> None:
    asked = list[str]()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = workspace(tmp_path / "place")
        graph = f"http://127.0.0.1:{server.server_port}/model.onnx"
        program = f"await fetch('{graph}'); export const tokens = () => ({{}});"
        (place / "node" / "llama.mjs").write_text(program)
        with pytest.raises(RuntimeError, match="a connection was tried"):
            in_node("llama", place, {})
        server.shutdown()
    assert asked == []
