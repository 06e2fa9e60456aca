"""Hostile tokenizers and chat templates end `generate` with exit 2 and a reason, within limits."""

import copy
import json
import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, run
from conftest import NANO

#: Seconds of a call that does not end, in these tests; the product allows more.
SECONDS = 1.0
#: Seconds of a whole command, and the bytes of memory that its process may take more than before.
WHOLE_SECONDS, MEMORY = 20, 100 << 20
GIGA = 10**9
TOKENIZER = json.loads((NANO / "tokenizer.json").read_text())

#: Hostile templates → what the error says.
TEMPLATES = {
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "the chat template did not finish within 1 s, its limit",
    ),
    "a number of a hundred million digits": (
        "{{ 10 ** (10 ** 8) }}",
        "did not finish within 1 s",
    ),
    "a string repeated": ("{{ 'x' * 10 ** 9 }}", "memory is limited to 51"),
    "a string doubled": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s }}",
        "memory is limited to 51",
    ),
    "a wide format": (f"{{{{ '%{GIGA}d' % 1 }}}}", "memory is limited to 51"),
    "a wide format method": (f"{{{{ '{{:>{GIGA}}}'.format(1) }}}}", "memory is limited to 51"),
    "a wide column": (f"{{{{ 'x' | center({GIGA}) }}}}", "memory is limited to 51"),
    "a deep indent": (f"{{{{ 'a\\nb' | indent({GIGA}) }}}}", "memory is limited to 51"),
    "a deep indent of JSON": (f"{{{{ [1] | tojson({GIGA}) }}}}", "memory is limited to 51"),
    "a list repeated": ("{{ ([0] * 10 ** 9) | length }}", "memory is limited to 51"),
    "much filler": ("{{ lipsum(n=10 ** 7) }}", "did not finish within 1 s"),
    "a long text": ("{{ 'x' * 3 * 10 ** 7 }}", "the limit is 1,048,"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be rendered"),
    "nested brackets": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "chat template"),
    "a long reason": ("{{ raise_exception('x' * 10 ** 7) }}", "cannot be rendered (xxx"),
    "control characters": ("{{ raise_exception('\x1b[31m\x07') }}", r"(\x1b[31m\x07)"),
    "half of a pair": ("{{ '\\ud800' }}", "cannot be rendered"),
}

GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
#: Changes of tokenizer.json, by their path in it → what the error says.
TOKENIZERS: dict[str, tuple[Mapping[str, Any], str]] = {
    "a normalizer that doubles": (
        {"normalizer": {"type": "Sequence", "normalizers": [GROW] * 40}}, "the tokenizer ",
    ),
    "a decoder that doubles": (
        {"decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}] * 40}},
        "the tokenizer ",
    ),
    "a regex without end": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$"},
                           "behavior": "Isolated", "invert": False}},
        "the tokenizer ",
    ),
    "a regex that is none": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("},
                           "behavior": "Isolated", "invert": False}},
        "is not a tokenizer",
    ),
    "padding without end": (
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0,
                     "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}},
        "its memory is limited to 51",
    ),
    "truncation to nothing": (
        {"truncation": {"max_length": 1, "stride": 9, "strategy": "LongestFirst",
                        "direction": "Right"}},
        "the tokenizer failed",
    ),
    "an id that no model has": ({"model.vocab.!": 2**32 - 1}, "outside the model's vocabulary"),
    "an id beyond 32 bits": ({"model.vocab.!": 2**32}, "is not a tokenizer"),
    "an id below zero": ({"model.vocab.!": -1}, "is not a tokenizer"),
    "merges of tokens that are missing": ({"model.merges": [["zq", "qz"]]}, "is not a tokenizer"),
    "words without an unknown token": (
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}, "the tokenizer failed",
    ),
    "pieces without any": (
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 0, "byte_fallback": False}},
        "is not a tokenizer",
    ),
    "pieces without an unknown one": (
        {"model": {"type": "Unigram", "vocab": [["q", 0.0]], "unk_id": None}},
        "the tokenizer failed",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> Outcome:
    """The outcome of `generate`, which must end in time, with exit 2 and a reason."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = run(capsys, "generate", folder, "--max-new-tokens", 4, *arguments)
    assert time.monotonic() - begun < WHOLE_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert "error: " in outcome.err
    assert len(outcome.err) < 3000
    assert "\x1b" not in outcome.err
    return outcome


def said(outcome: Outcome) -> str:
    """The error on one line, as it was before it was wrapped at the width of the terminal."""
    return " ".join(outcome.err.split())


@pytest.mark.parametrize(("template", "problem"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_hostile_template_is_stopped(
    template: str, problem: str, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if "did not finish" in problem:
        monkeypatch.setattr("exporter.text.tokenizer._SECONDS", SECONDS)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": template}))
    assert problem in said(refused(capsys, folder, "--prompt", "Hi"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"\xff", "is not UTF-8"), (b" " * (1 << 20) + b"x", "1,048,576 bytes")],
)
def test_a_template_file_that_is_no_text_is_refused(
    content: bytes, problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat_template.jinja").write_bytes(content)
    assert problem in said(refused(capsys, folder, "--prompt", "Hi"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_stopped(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, problem = TOKENIZERS[name]
    if problem == "the tokenizer ":  # whichever limit it reaches first
        monkeypatch.setattr("exporter.text.tokenizer._SECONDS", SECONDS)
    content = copy.deepcopy(TOKENIZER)
    for place, value in changes.items():
        *parents, last = place.split(".")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    prompt = "a" * 1500 + "!"
    assert problem in said(refused(capsys, folder, "--raw", "--prompt", prompt))


@pytest.mark.parametrize(
    "config",
    [[], {"chat_template": [[]]}, {"chat_template": {"x": "y" * 10**6}}, {"bos_token": 10**400}],
    ids=["a list", "a list of lists", "an object", "a long number"],
)
def test_a_configuration_of_wrong_types_is_refused(
    config: object, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "tokenizer_config.json" in said(refused(capsys, folder, "--prompt", "Hi"))
