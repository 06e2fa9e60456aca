"""swift-transformers' own `LanguageModel` and `Generation` run the Core ML package on Linux.

Swift runs their source. Core ML's part is ``core_ml_stand_in.swift``, which passes each call of the
model to this process, where the reference interpreter computes it. So what is tried is how the
client calls the package. Core ML itself is not.

    git clone --branch 1.3.3 https://github.com/huggingface/swift-transformers
    make swift && SWIFT_TRANSFORMERS=$PWD/swift-transformers pytest tests/clients
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from conftest import ROOT

from exporter.backends import coreml as backend
from exporter.backends.coreml.interpreter import Interpreter
from exporter.backends.coreml.package import Package, Value, open_package
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import Bundle
from exporter.pipeline import lower, no_progress
from exporter.text.tokenizer import load_tokenizer

SWIFT = ROOT / "build" / "swift" / "swiftc"
STAND_IN = Path(__file__).with_name("core_ml_stand_in.swift")
#: What runs of swift-transformers, below ``Sources``. The rest needs other Swift packages.
FILES = (
    "Models/LanguageModel", "Models/LanguageModelTypes", "Generation/Generation",
    "Generation/GenerationConfig", "Generation/Decoders",
    "Generation/LogitsWarper/LogitsProcessor",
)  # fmt: skip
PROMPTS = ("Ada has 12 eggs. Ada finds 7 more.", "Ben has 3 cats and buys 9 more.", "Hello")
STEPS, SECONDS = 32, 300


@pytest.fixture(scope="module")
def checkout() -> Path:
    """A checkout of swift-transformers."""
    if not SWIFT.is_file():
        pytest.skip("there is no Swift that runs source: run `make swift` on Debian")
    if not (folder := os.environ.get("SWIFT_TRANSFORMERS")):
        pytest.skip("SWIFT_TRANSFORMERS does not name a checkout (see the docstring)")
    return Path(folder)


@pytest.fixture(scope="module")
def client(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client as one Swift file: the stand-in, and the source without imports of modules."""
    parts = [STAND_IN.read_text()]
    for name in FILES:
        source = (checkout / "Sources" / f"{name}.swift").read_text()
        source = source.replace("#if canImport(CoreML)", "#if true")
        parts.append(re.sub(r"(?m)^import (CoreML|Generation|Hub|Tokenizers)$", "", source))
    path: Path = tmp_path_factory.mktemp("client") / "main.swift"
    path.write_text("\n".join(parts))
    return path


@pytest.fixture(scope="module")
def demo(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> FinishedArtifact:
    target = backend.Target(max_context=256, interface="language_model", hub_id="a/model")
    out = tmp_path_factory.mktemp("demo")
    return lower(finished_bundle.quantized, target, out, no_progress)


def described(package: Package) -> dict[str, Any]:
    """What Core ML would say of a package (see `Job` in the stand-in)."""
    found = package.spec.description
    return {
        "inputs": {
            one.name: [
                [limits.lowerBound, limits.upperBound]
                for limits in one.type.multiArrayType.shapeRange.sizeRanges
            ]
            for one in found.input
        },
        "outputs": [one.name for one in found.output],
        "states": [one.name for one in found.state],
        "metadata": dict(found.metadata.userDefined),
    }


def answers(package: Package, lines: Iterator[str], answer: Any) -> Iterator[str]:
    """Compute the calls in `lines` and write their logits to `answer`. Yields the other lines."""
    interpreter = Interpreter(package)
    state = interpreter.new_state()
    for line in lines:
        if line == "new state\n":
            state = interpreter.new_state()
        if not line.startswith("{"):
            yield line.rstrip("\n")
            continue
        inputs = {
            name: Value(
                torch.tensor(given["values"]).reshape(given["shape"]).to(
                    torch.int32 if given["kind"] == "int32" else torch.float32
                ),
                given["kind"],
            )
            for name, given in json.loads(line)["inputs"].items()
        }  # fmt: skip
        logits = interpreter.run("main", inputs, state)["logits"].data
        found = {"shape": list(logits.shape), "values": logits.reshape(-1).tolist()}
        answer.write(json.dumps(found) + "\n")
        answer.flush()


def said(client: Path, package: Package, prompts: Sequence[list[int]], end: int) -> list[str]:
    """The lines of the app in the stand-in, with each call of the model answered."""
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    job = client.with_name("job.json")
    job.write_text(json.dumps({**described(package), "prompts": texts, "count": STEPS, "end": end}))
    command = [
        SWIFT, "-interpret", "-swift-version", "5", "-suppress-warnings",
        # Swift 6.0's own checks stop at `model: callAsFunction` in LanguageModelTypes.swift.
        "-sil-verify-none", "-module-cache-path", client.parent, client, "--", job,
    ]  # fmt: skip
    with subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(SECONDS, process.kill)
        timer.start()
        try:
            lines = list(answers(package, iter(process.stdout), process.stdin))
        finally:
            timer.cancel()
            process.kill()
    return lines


def test_swift_transformers_writes_the_tokens_of_the_package_with_two_functions(
    client: Path, checkout: Path, demo: FinishedArtifact, finished_bundle: Bundle, shown: Any
) -> None:
    quantized = finished_bundle.quantized
    tokenizer = load_tokenizer(quantized.path)
    end = quantized.eos_token_ids[-1]
    prompts = [
        tokenizer.encode(tokenizer.prompt_text(text, raw=False, system=None)) for text in PROMPTS
    ]
    runner = backend.load(finished_bundle.artifacts["coreml"].artifact)
    expected = list[str]()
    for prompt in prompts:
        ids, token = list(prompt), int(runner.prefill(prompt).argmax())
        while token != end and len(ids) < len(prompt) + STEPS:
            ids.append(token)
            token = int(runner.decode(token).argmax())
        assert len(ids) > len(prompt) + 5
        expected.append("text " + " ".join(map(str, ids)))
    lines = said(client, open_package(demo.artifact.path / backend.FILE_NAME), prompts, end)
    assert lines[0] == "name a/model"  # and nothing was asked of the hub
    assert lines[1:] == [line for text in expected for line in ("new state", text)]
    shown(
        client="swift-transformers", version=version_of(checkout), model="MobileLLM-R1 demo",
        target="coreml interface=language_model",
        ran=f"its LanguageModel and Generation by Swift on Linux, with the reference interpreter "
        f"in Core ML's place: {len(PROMPTS)} prompts, up to {STEPS} greedy tokens, all equal",
        needs="iOS 18 or macOS 15; not run on either",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("written", "wrong", "said"),
    [("", "", ""), ("maxNewTokens = 100", "maxNewTokens = text", "'text'"),
     ("tokenizer: tokenizer)", "tokenizer: folder)", "'URL'")],
    ids=["as it is", "a wrong option", "a wrong tokenizer"],
)  # fmt: skip
def test_the_usage_has_no_wrong_type(
    written: str, wrong: str, said: str, client: Path, tmp_path: Path
) -> None:
    usage = backend.usage(backend.Target(interface="language_model"))
    (code,) = re.findall(r"```swift\n(.*?)```", usage, re.DOTALL)
    assert written in code
    wrapped = "func usage(folder: URL, prompt: String) async throws {\n%s\n_ = text }\n"
    source = tmp_path / "main.swift"
    source.write_text(client.read_text() + wrapped % code.replace(written, wrong))
    command = [SWIFT, "-typecheck", "-swift-version", "5", "-suppress-warnings"]
    checked = subprocess.run(
        [*map(str, command), "-module-cache-path", str(client.parent), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said in checked.stderr
    assert (checked.returncode == 0) == (said == "")


def version_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--tags", "--always"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
