"""A draft makes the native runner write the same tokens in fewer calls of the model."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering import Lower, lower_with, tokens

from devices import runner
from exporter.backends import backend
from exporter.backends.executorch.runtime import ExecuTorchRunner, quietly
from exporter.errors import InputError

CONTEXT, ROWS, WRITTEN = 64, 5, 24
EACH_ATTENTION = pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    return lower_with(lower_once, {"target": "executorch", "max_context": CONTEXT})


@pytest.fixture(scope="module")
def built() -> runner.Build:
    return runner.build(platform.machine())


def program(lower: Lower, logits: int = 1, attention: str = "custom_sdpa", **changes: Any) -> Path:
    """A .pte whose calls give the logits of so many positions."""
    context = changes.pop("max_context", CONTEXT)
    target = {"logits": logits, "attention": attention, "max_context": context}
    path: Path = lower(target=target, **changes)[1].artifact.path / "model.pte"
    return path


def run(
    built: runner.Build, model: Path, prompt: list[int], folder: Path, *options: object
) -> subprocess.CompletedProcess[str]:
    (folder / "tokens.txt").write_text(" ".join(map(str, prompt)))
    files = ["--model", str(model), "--tokens", str(folder / "tokens.txt")]
    command = [str(built.runner), *files, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def generated(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    (phase,) = (r for r in map(json.loads, done.stdout.splitlines()) if r["phase"] == "generate")
    return dict(phase)


@EACH_ATTENTION
def test_a_draft_changes_no_token(
    attention: str, lower: Lower, built: runner.Build, tmp_path: Path
) -> None:
    model = program(lower, ROWS, attention)
    useless = program(lower, 1, attention, num_hidden_layers=1, no_rope_layers=[1])
    rejected = 0
    for seed in (1, 2, 3):
        prompt = tokens(3 + 5 * seed, seed)
        alone = generated(run(built, model, prompt, tmp_path, "--generate", WRITTEN))
        assert len(alone["tokens"]) == WRITTEN
        for most in (1, 2, ROWS - 1):
            for draft in (model, useless, "lookup"):
                options = ("--generate", WRITTEN, "--draft", draft, "--draft-tokens", most)
                found = generated(run(built, model, prompt, tmp_path, *options))
                assert found["tokens"] == alone["tokens"]
                # Each call writes what it accepts and one token more.
                assert found["calls"] == WRITTEN - found["accepted"]
                assert len(found["ms"]) == len(found["draft_ms"]) == found["calls"]
                if draft == model:
                    assert found["accepted"] == found["drafted"] > 0
                rejected += found["drafted"] - found["accepted"]
    assert rejected > 100


def test_a_repeated_text_is_looked_up(lower: Lower, built: runner.Build, tmp_path: Path) -> None:
    """The model's own text as the prompt, so that what follows stands there already."""
    model = program(lower, ROWS)
    first = generated(run(built, model, tokens(4), tmp_path, "--generate", CONTEXT - 4))["tokens"]
    prompt = tokens(4) + first[:36]
    options = ("--generate", 20, "--draft", "lookup", "--draft-tokens", 4)
    found = generated(run(built, model, prompt, tmp_path, *options))
    assert found["tokens"] == first[36:56]
    assert found["accepted"] > 0


@pytest.mark.parametrize("shorter", [0, 24])
def test_a_draft_reaches_the_end_of_the_context(
    shorter: int, lower: Lower, built: runner.Build, tmp_path: Path
) -> None:
    """Also one whose own context ends before the model's."""
    model = program(lower, ROWS)
    draft = program(lower, 1, max_context=CONTEXT - shorter)
    prompt = tokens(20)
    # The last token is written, not read.
    count = CONTEXT - len(prompt) + 1
    alone = generated(run(built, model, prompt, tmp_path, "--generate", count))
    with_draft = ("--draft", draft, "--draft-tokens", ROWS - 1)
    found = generated(run(built, model, prompt, tmp_path, "--generate", count, *with_draft))
    assert found["tokens"] == alone["tokens"]
    assert found["accepted"] > 0
    for options in ((), with_draft):
        done = run(built, model, prompt, tmp_path, "--generate", count + 1, *options)
        assert (done.returncode, "the context is full" in done.stderr) == (4, True)


def test_what_cannot_be_a_pair_is_refused(
    lower: Lower, built: runner.Build, tmp_path: Path
) -> None:
    model, other = program(lower, ROWS), program(lower, 1, vocab_size=128)

    def refused(path: Path, draft: object, most: int, *options: object) -> str:
        given = ("--generate", 4, "--draft", draft, "--draft-tokens", most, *options)
        done = run(built, path, tokens(4), tmp_path, *given)
        assert done.returncode == 2
        assert '"generate"' not in done.stdout
        return done.stderr

    assert "has 128 tokens, the model 96" in refused(model, other, 2)
    assert "gives the logits of 5 positions; lower it with logits=6" in refused(model, model, 5)
    assert "lower it with logits=2" in refused(program(lower), "lookup", 1)
    assert "give 1 or more" in refused(model, "lookup", 0)
    assert "not with --draft" in refused(model, "lookup", 2, "--logits", tmp_path / "logits")


@EACH_ATTENTION
@pytest.mark.parametrize("embedding", ["int4-g32", "int8"])
def test_each_row_of_logits_is_that_of_a_single_step(
    attention: str, embedding: str, lower: Lower
) -> None:
    one = ExecuTorchRunner(program(lower, 1, attention, embedding=embedding))
    text = tokens(30)
    expected = torch.stack([one.run(text[: i + 1], 0) for i in range(len(text))])
    path = program(lower, ROWS, attention, embedding=embedding)
    several = ExecuTorchRunner(path)
    with quietly():
        for start, count in ((0, 1), (0, 3), (0, 20), (20, 2), (22, ROWS), (27, 1)):
            inputs = torch.tensor([text[start : start + count]]), torch.tensor([start])
            found = several._module.run_method("forward", inputs)[0]
            rows = min(count, ROWS)
            assert found.shape == (1, rows, 96)
            wanted = expected[start + count - rows : start + count]
            torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=2e-3)
    assert torch.equal(several.run(text, 0).argmax(), expected[-1].argmax())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"logits": 0}, "0 is not within 1..64"),
        ({"logits": 65}, "65 is not within 1..64"),
        ({"logits": 2, "delegate": "coreml"}, "more than one needs the delegate xnnpack"),
    ],
)
def test_a_number_of_logits_that_cannot_be_had_is_refused(
    options: dict[str, Any], problem: str, lower: Lower
) -> None:
    executorch = backend("executorch")
    quantized, _ = lower()
    target = executorch.Target(max_context=CONTEXT, **options)
    with pytest.raises(InputError, match=problem):
        executorch.check(quantized.config, quantized.schemes, target)
