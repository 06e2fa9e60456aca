"""The Core ML package that swift-transformers' `LanguageModel` runs.

The calls of swift-transformers and of its ``generate.py`` are written here as its source makes them
(version 1.3.3, commit eec09bdf; lines are those of ``Sources/Models/LanguageModel.swift``).
Packages run in the reference interpreter.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import contents, flip
from conftest import FAMILIES, LLAMA, OLMO2, QWEN3
from lowering import MODELS, SCHEMES, SHAPES, Change, Lower, Lowered, Weights, check_logits, tokens
from torch import Tensor

from exporter.backends import coreml as backend
from exporter.backends.coreml import language_model
from exporter.backends.coreml.inspection import inspect_package
from exporter.backends.coreml.interpreter import Interpreter, State
from exporter.backends.coreml.language_model import LanguageModelDecoder
from exporter.backends.coreml.package import (
    MODEL,
    WEIGHTS,
    Package,
    Value,
    open_package,
    open_shape_of,
    place_of,
)
from exporter.backends.coreml.toolkit import coremltools, mb
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.files import sha256
from exporter.inference.generation import Generation, Sampling
from exporter.inference.reference import score
from exporter.model.config import EMBEDDING
from exporter.pipeline import lower as lower_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.activations import LARGEST_HALF
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.integers import check_integers
from exporter.verification.runs import run_teacher_forced, verification_text

CONTEXT, CHUNK = 64, 7
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
INTERFACE = {"interface": "language_model"}
#: The largest relative error of logits in float16. The package with two functions has up to 6.3e-3
#: at a position of these texts.
HALF_ERROR = 8e-3


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    def run(
        base: dict[str, Any] = MODELS["llama4_text"],
        linear: str = "int4-g32",
        embedding: str = "int4-g32",
        target: dict[str, Any] | None = None,
        change: Change | None = None,
        fresh: bool = False,
        **changes: Any,
    ) -> Lowered:
        facts = {"target": "coreml", "max_context": CONTEXT, "prefill": CHUNK, **INTERFACE}
        schemes = {"linear": linear, "embedding": embedding}
        return lower_once({**base, **changes}, {**facts, **(target or {})}, schemes, change, fresh)

    return run


def package_of(lowered: FinishedArtifact) -> Package:
    return open_package(lowered.artifact.path / backend.FILE_NAME)


# The callers.


class Model:
    """A package in the interpreter, called with ids [1, n] and a mask: logits [n, vocab_size]."""

    def __init__(self, lowered: FinishedArtifact) -> None:
        self.interpreter = Interpreter(package_of(lowered))
        self.state = self.interpreter.new_state()

    def __call__(self, ids: Sequence[int], mask: Tensor) -> Tensor:
        inputs = {
            "inputIds": Value(torch.tensor([list(ids)], dtype=torch.int32), "int32"),
            "causalMask": Value(mask.half().float(), "fp16"),
        }
        logits = self.interpreter.run("main", inputs, self.state)["logits"].data
        assert logits.shape[:2] == (1, len(ids))
        return logits[0]


Scores = Callable[[Sequence[int]], Tensor]


def swift_transformers(lowered: FinishedArtifact) -> Scores:
    """`predictNextTokenScores` (lines 511 to 562) of a new text: all tokens so far, to the logits
    of the tokens that it gives to the model. First these are all tokens, and then the last one."""
    model, extending = Model(lowered), False

    def scores(so_far: Sequence[int]) -> Tensor:
        nonlocal extending
        given = so_far[-1:] if extending else so_far
        extending = True
        return model(given, torch.zeros(1, 1, 1, len(so_far) + 1))

    return scores


def generate_py(lowered: FinishedArtifact) -> Scores:
    """The same as Examples/Mistral7B/generate.py does it (lines 48 to 64)."""
    model, past = Model(lowered), 0

    def scores(so_far: Sequence[int]) -> Tensor:
        nonlocal past
        given = so_far[past:]
        fill = -torch.inf if past == 0 else 0.0
        mask = torch.full((1, 1, len(given), past + len(given)), fill).triu(1)
        past += len(given)
        return model(given, mask)

    return scores


CALLERS = {"swift-transformers": swift_transformers, "generate.py": generate_py}


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of a row of logits."""
    rows: Tensor = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return rows.max().item()


def error_of(
    caller: Callable[[FinishedArtifact], Scores], quantized: QuantizedCheckpoint,
    lowered: FinishedArtifact, prompt: int = 20,
) -> float:  # fmt: skip
    """The error of a caller: every position of a prompt, then step by step to the last token for
    which there is room."""
    text = tokens(CONTEXT - 1)
    scores = caller(lowered)
    found = torch.cat([scores(text[:end]) for end in range(prompt, len(text) + 1)])
    expected = score(quantized, text, range(len(text)))
    assert expected.std() > 0.5
    return error(found, expected)


# The interface.


def test_the_description_has_what_swift_transformers_looks_for(lower: Lower) -> None:
    """Each line with its place in LanguageModel.swift."""
    quantized, lowered = lower(target={"hub_id": "facebook/MobileLLM-R1-140M"})
    package, config = package_of(lowered), quantized.config
    described = package.spec.description
    inputs = {one.name: one.type.multiArrayType for one in described.input}
    states = {one.name: one.type.stateType.arrayType for one in described.state}
    outputs = {one.name: one.type.multiArrayType for one in described.output}
    # 141, 142: inputs; 257: an attentionMask would be asked for as well
    assert list(inputs) == ["inputIds", "causalMask"]
    # 111: `.range`; 113: the length of the last axis; 501: it is a range
    ranges = {
        name: [(one.lowerBound, one.upperBound) for one in given.shapeRange.sizeRanges]
        for name, given in inputs.items()
    }
    some = (1, CONTEXT)
    assert ranges == {"inputIds": [(1, 1), some], "causalMask": [(1, 1), (1, 1), some, some]}
    assert {name: list(given.shape) for name, given in inputs.items()} == {
        "inputIds": [1, 1], "causalMask": [1, 1, 1, 1],
    }  # fmt: skip
    # 515: tokens are Int32 (Generation.swift, 68); 546: the mask is Float16
    kind = type(inputs["inputIds"]).ArrayDataType
    assert {name: given.dataType for name, given in inputs.items()} == {
        "inputIds": kind.Value("INT32"), "causalMask": kind.Value("FLOAT16"),
    }  # fmt: skip
    # 271, 272: both states; 507: made by Core ML, filled with zeros
    shape = [config.num_hidden_layers, 1, config.num_key_value_heads, CONTEXT, config.head_dim]
    assert {name: list(state.shape) for name, state in states.items()} == {
        "keyCache": shape, "valueCache": shape,
    }  # fmt: skip
    assert {state.dataType for state in states.values()} == {kind.Value("FLOAT16")}
    # 145, 556: logits of rank 3, of which the row of the last token is taken
    assert {name: given.dataType for name, given in outputs.items()} == {
        "logits": kind.Value("FLOAT16")
    }
    [declared] = [
        output.type.tensorType
        for operation in package.block("main").operations
        for output in operation.outputs
        if output.name == "logits"
    ]
    assert open_shape_of(declared) == [1, None, config.vocab_size]
    # 169: loaded without a function's name
    assert (package.functions, list(described.functions)) == (("main",), [])
    assert (described.defaultFunctionName, package.spec.specificationVersion) == ("", 9)
    # 229: where the tokenizer is, if the app brings none
    assert described.metadata.userDefined["co.huggingface.exporters.name"] == (
        "facebook/MobileLLM-R1-140M"
    )


def test_the_package_says_what_it_is(lower: Lower) -> None:
    quantized, lowered = lower()
    facts = dict(package_of(lowered).spec.description.metadata.userDefined)
    assert facts == {
        "interface": "language_model",
        "max_context": "64",
        "output": "logits",
        "compute": "cpu_and_gpu",
        "tested": "in a reference interpreter, not run on hardware",
        "vocab_size": "96",
        "bos_token_id": "0",
        "eos_token_ids": "[1, 2]",
        "quantized_sha256": sha256(quantized.path / "quantization.json"),
    }


def test_inspect_shows_ranges_and_states(lower: Lower) -> None:
    _, lowered = lower()
    found = inspect_package(lowered.artifact.path / backend.FILE_NAME)
    [function] = found.functions
    assert {one.name: one.shape for one in function.inputs} == {
        "inputIds": (1, "1..64"), "causalMask": (1, 1, "1..64", "1..64"),
    }  # fmt: skip
    assert {one.name: one.shape for one in function.states} == dict.fromkeys(
        ("keyCache", "valueCache"), (2, 1, 2, 64, 32)
    )
    assert [(one.name, one.shape) for one in function.outputs] == [("logits", (1, "?", 96))]
    assert function.unknown == ()


def test_coremltools_opens_the_package(lower: Lower) -> None:
    """As far as Linux can: it reads the description, but loads no model."""
    _, lowered = lower()
    path = lowered.artifact.path / backend.FILE_NAME
    opened = coremltools.models.MLModel(str(path), skip_model_load=True)
    description = opened.get_spec().description
    assert [one.name for one in description.state] == ["keyCache", "valueCache"]


def test_the_usage_is_that_of_swift_transformers() -> None:
    target = backend.Target(interface="language_model", max_context=96)
    said = backend.usage(target)
    assert 'appending(path: "model.mlpackage")' in said
    assert "LanguageModel.loadCompiled(url: compiled, tokenizer: tokenizer)" in said
    assert "at most 96 tokens" in said
    assert "not run on a Mac" in said
    assert "LanguageModel" not in backend.usage(backend.Target())


@pytest.mark.parametrize(
    ("target", "said"),
    {
        "the Neural Engine": (
            {"compute": "neural_engine"}, "compute: neural_engine has its own two functions",
        ),
        "a token": ({"output": "token"}, "output: swift-transformers reads logits"),
        "a hub id without it": (
            {"interface": "functions", "hub_id": "a/b"}, "hub_id: is read by swift-transformers",
        ),
        "a prefill of one": ({"prefill": 1}, "prefill: 1 tokens are not between 2"),
        "an odd context": ({"max_context": 100}, "max_context: 100 is not a multiple of 32"),
    }.values(),
    ids=["neural engine", "token", "hub id", "prefill", "context"],
)  # fmt: skip
def test_what_the_interface_cannot_have_is_refused(
    target: dict[str, Any], said: str, lower: Lower
) -> None:
    with pytest.raises(InputError, match=said):
        lower(target=target)


# The model.


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_every_caller_gets_the_references_logits_of_every_position(
    base: dict[str, Any], caller: Callable[[FinishedArtifact], Scores], lower: Lower
) -> None:
    quantized, lowered = lower(base)
    assert error_of(caller, quantized, lowered) < HALF_ERROR


@pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)
@pytest.mark.parametrize("base", [LLAMA, QWEN3, OLMO2], ids=["llama", "qwen3", "olmo2"])
def test_a_prompt_of_one_token_and_float32_are_right_too(
    base: dict[str, Any], caller: Callable[[FinishedArtifact], Scores], lower: Lower
) -> None:
    quantized, lowered = lower(base, target={"activations": "float32"})
    assert error_of(caller, quantized, lowered, prompt=1) < 2e-3


@pytest.mark.parametrize(("activations", "limit"), [("float16", HALF_ERROR), ("float32", 2e-3)])
@pytest.mark.parametrize(("model", "tied", "linear", "embedding"), SCHEMES)
def test_the_runner_gives_the_references_logits_from_the_quantized_checkpoints_integers(
    model: str, tied: bool, linear: str, embedding: str, activations: str, limit: float,
    lower: Lower,
) -> None:  # fmt: skip
    target = {"activations": activations}
    quantized, lowered = lower(MODELS[model], linear, embedding, target, tie_word_embeddings=tied)
    prompts = (1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
    found = run_teacher_forced(backend.load(lowered.artifact), tokens(CONTEXT), prompts)
    positions = [length - 1 for length in prompts] + list(range(prompts[-1], CONTEXT))
    assert error(found, score(quantized, tokens(CONTEXT), positions)) < limit
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == len(quantized.schemes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_of_every_shape_is_the_references(shape: dict[str, Any], lower: Lower) -> None:
    quantized, lowered = lower(target={"activations": "float32"}, **shape)
    assert error_of(generate_py, quantized, lowered) < 2e-3


@pytest.fixture(scope="module")
def demo(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> FinishedArtifact:
    """The demo's quantized checkpoint, lowered for swift-transformers."""
    target = backend.Target(max_context=256, **INTERFACE)  # type: ignore[arg-type]
    out = tmp_path_factory.mktemp("demo")
    return lower_checkpoint(finished_bundle.quantized, target, out, no_progress)


PROMPTS = ("Ada has 12 eggs. Ada finds 7 more.", "Ben has 3 cats and buys 9 more.", "Hello")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_demo_writes_the_same_tokens_as_the_package_with_two_functions(
    prompt: str, demo: FinishedArtifact, finished_bundle: Bundle
) -> None:
    quantized = finished_bundle.quantized
    tokenizer = load_tokenizer(quantized.path)
    ids = tokenizer.encode(tokenizer.prompt_text(prompt, raw=False, system=None))
    runner, _ = (backend.load(one.artifact) for one in (finished_bundle.artifacts["coreml"], demo))
    sampling = Sampling(max_new_tokens=32)
    expected = list(Generation(runner, ids, quantized.eos_token_ids, sampling))
    assert len(expected) > 5
    for caller in CALLERS.values():
        scores, so_far = caller(demo), list(ids)
        for _ in expected:
            so_far.append(int(scores(so_far)[-1].argmax()))
        assert so_far[len(ids) :] == expected
    ours = list(Generation(backend.load(demo.artifact), ids, quantized.eos_token_ids, sampling))
    assert ours == expected


def test_the_demo_is_verified(demo: FinishedArtifact, finished_bundle: Bundle) -> None:
    quantized = finished_bundle.quantized
    checks = check_logits(quantized, demo, verification_text(quantized, 128, None))
    assert [check for check in checks if not check.passed] == []
    assert {check.check for check in checks} >= {"range", "logits.kl", "logits.top1"}


# The mask and the cache.


def unchanged(weights: Weights) -> None:
    """A change for a model that no other test may get."""


def copied(lowered: FinishedArtifact, folder: Path) -> FinishedArtifact:
    """A copy of an artifact, to damage."""
    return open_artifact(Path(shutil.copytree(lowered.artifact.path, folder / "artifact")))


def without_the_empty_position(self: LanguageModelDecoder) -> Any:
    """The program as it would be if swift-transformers began at position 0."""
    return mb.mul(x=self.position, y=np.int32([0]))


def test_a_program_that_sees_the_empty_position_is_found_wrong(
    lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModelDecoder, "_first_column", without_the_empty_position)
    quantized, lowered = lower(change=unchanged)
    assert error_of(swift_transformers, quantized, lowered) > 0.05
    assert error_of(generate_py, quantized, lowered) < HALF_ERROR


def test_a_program_that_leaves_later_tokens_to_the_mask_is_found_wrong(
    lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of swift-transformers hides nothing."""
    hide = mb.greater

    def nothing(x: Any, y: Any, **options: Any) -> Any:
        return hide(x=x, y=mb.add(x=y, y=np.int32(CONTEXT)), **options)

    monkeypatch.setattr(language_model.mb, "greater", nothing)
    quantized, lowered = lower(change=unchanged)
    assert error_of(swift_transformers, quantized, lowered) > 0.05
    assert error_of(generate_py, quantized, lowered) < HALF_ERROR


def causal(steps: int, total: int) -> Tensor:
    return torch.full((1, 1, steps, total), -torch.inf).triu(total - steps + 1)


@pytest.mark.parametrize("chunks", [(20,), (7, 13), (1, 1, 18), (5, 5, 5, 5), (19, 1)], ids=str)
def test_a_prompt_may_be_read_in_chunks_of_any_size(chunks: tuple[int, ...], lower: Lower) -> None:
    quantized, lowered = lower()
    text, model = tokens(20), Model(lowered)
    ends = [sum(chunks[:count]) for count in range(len(chunks) + 1)]
    found = torch.cat(
        [model(text[first:end], causal(end - first, end)) for first, end in pairwise(ends)]
    )
    assert error(found, score(quantized, text, range(20))) < HALF_ERROR


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float16).min, -1e4])
@pytest.mark.parametrize("chunks", [(24,), (10, 14)], ids=str)
def test_what_a_mask_hides_has_no_influence(
    chunks: tuple[int, ...], hidden: float, lower: Lower
) -> None:
    """A prompt with padding before it, as batches have it: the logits are those without it."""
    quantized, lowered = lower()
    padding, text = 4, tokens(20)
    outcomes = list[Tensor]()
    for token in (0, 5):
        model, padded, rows = Model(lowered), [token] * padding + text, list[Tensor]()
        for first, end in pairwise([0, *np.cumsum(chunks).tolist()]):
            mask = torch.zeros(1, 1, end - first, end)
            mask[..., :padding] = hidden
            rows.append(model(padded[first:end], mask))
        outcomes.append(torch.cat(rows)[padding:])
    assert torch.equal(*outcomes)
    assert error(outcomes[0], score(quantized, text, range(20))) < HALF_ERROR


def test_a_call_writes_its_positions_only(lower: Lower) -> None:
    _, lowered = lower()
    model, generator = Model(lowered), torch.Generator().manual_seed(3)
    before = {
        name: Value(torch.randn(state.data.shape, generator=generator).half().float(), state.kind)
        for name, state in model.state.items()
    }
    model.state = {name: Value(kept.data.clone(), kept.kind) for name, kept in before.items()}
    model(tokens(5), causal(5, 15))
    assert sorted(before) == ["keyCache", "valueCache"]
    for name, kept in before.items():
        changed = (model.state[name].data != kept.data).any(-1)  # layer, 1, head, position
        written = torch.zeros(CONTEXT, dtype=torch.bool)
        written[10:15] = True
        assert torch.equal(changed, written.expand_as(changed))


@pytest.mark.parametrize("steps", [1, CONTEXT // 2, CONTEXT])
def test_the_cache_may_be_filled_in_one_call_or_step_by_step(steps: int, lower: Lower) -> None:
    quantized, lowered = lower()
    text, model = tokens(CONTEXT), Model(lowered)
    rows = [
        model(text[first : first + steps], causal(steps, first + steps))
        for first in range(0, CONTEXT, steps)
    ]
    assert error(torch.cat(rows), score(quantized, text, range(CONTEXT))) < HALF_ERROR


@pytest.mark.parametrize(("steps", "total"), [(CONTEXT + 1, CONTEXT + 1), (1, CONTEXT + 1)])
def test_a_call_beyond_the_ranges_is_refused(steps: int, total: int, lower: Lower) -> None:
    _, lowered = lower()
    with pytest.raises(InputError, match="has a size of 65, outside of 1 to 64"):
        Model(lowered)(tokens(steps), torch.zeros(1, 1, 1, total))


def test_a_mask_that_is_shorter_than_the_tokens_is_refused(lower: Lower) -> None:
    _, lowered = lower()
    with pytest.raises(InputError, match=r"slice_update_0 \(slice_update\): slice"):
        Model(lowered)(tokens(5), torch.zeros(1, 1, 1, 4))


def test_a_new_text_starts_without_the_old_one(lower: Lower) -> None:
    _, lowered = lower()
    runner = backend.load(lowered.artifact)
    first = runner.prefill(tokens(20))
    runner.prefill(tokens(CONTEXT)[20:])
    assert torch.equal(runner.prefill(tokens(20)), first)


@pytest.mark.parametrize("count", [0, CONTEXT + 1])
def test_a_text_that_the_cache_does_not_hold_is_refused(count: int, lower: Lower) -> None:
    _, lowered = lower()
    with pytest.raises(InputError, match=f"context: {count} tokens are not between 1 and 64"):
        backend.load(lowered.artifact).prefill(tokens(count))


def test_a_step_beyond_the_cache_is_refused(lower: Lower) -> None:
    _, lowered = lower()
    runner = backend.load(lowered.artifact)
    runner.prefill(tokens(CONTEXT - 1))
    runner.decode(0)
    with pytest.raises(InputError, match="context: 65 tokens"):
        runner.decode(0)


# The files.


def test_two_exports_are_equal_to_the_last_byte_whatever_was_made_between(lower: Lower) -> None:
    _, first = lower(fresh=True)
    lower(LLAMA, target={"interface": "functions"}, fresh=True)
    _, second = lower(fresh=True)
    assert contents(first.artifact.path) == contents(second.artifact.path)


def test_the_tied_embedding_is_stored_once_and_read_twice(lower: Lower) -> None:
    quantized, lowered = lower()
    places = {name: place for name, place, _ in backend.weights(lowered.artifact, quantized)}
    assert places[EMBEDDING] == "main: gather, linear"
    stored = quantized.read(EMBEDDING)
    assert not isinstance(stored, Tensor)
    packed = stored.codes.numpy().astype(np.uint8) & 15
    as_stored = (packed[:, ::2] | packed[:, 1::2] << 4).tobytes()
    weights = lowered.artifact.path / backend.FILE_NAME / WEIGHTS
    assert weights.read_bytes().count(as_stored) == 1


@pytest.mark.parametrize("part", ["data", "scale"])
@pytest.mark.parametrize(("tensor", "readers"), [(Q_PROJ, "linear"), (EMBEDDING, "gather, linear")])
def test_one_flipped_bit_is_reported_with_its_tensor(
    tensor: str, readers: str, part: str, lower: Lower, tmp_path: Path
) -> None:
    quantized, lowered = lower()
    lowered = copied(lowered, tmp_path)
    package = package_of(lowered)
    [operation] = [
        one for one in package.block("main").operations
        if one.outputs and one.outputs[0].name == tensor.replace(".", "_")
    ]  # fmt: skip
    place = place_of(operation.inputs[part].arguments[0].value)
    assert place is not None
    weights = package.path / WEIGHTS
    start = int.from_bytes(weights.read_bytes()[place[1] + 16 : place[1] + 24], "little")
    flip(weights, start + 8, bit=1)
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check.subject for check in checks if not check.passed] == [
        f"{tensor} (main: {readers})"
    ]


def edited(lowered: FinishedArtifact, change: Callable[[Any], object]) -> None:
    package = package_of(lowered)
    change(package.spec)
    content = package.spec.SerializeToString(deterministic=True)
    (package.path / MODEL).write_bytes(content)


def widen(spec: Any) -> None:
    spec.description.input[1].type.multiArrayType.shapeRange.sizeRanges[3].upperBound = 65


def rename_state(spec: Any) -> None:
    spec.description.state[0].name = "keys"


def rename_output(spec: Any) -> None:
    function = spec.mlProgram.functions["main"]
    function.block_specializations[function.opset].outputs[0] = "logits_0"


def look_ahead(spec: Any) -> None:
    function = spec.mlProgram.functions["main"]
    [compared] = [
        one for one in function.block_specializations[function.opset].operations
        if one.type == "greater"
    ]  # fmt: skip
    compared.type = "less"


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        (widen, "description", "upperBound is 65, not 64"),
        (rename_state, "description", "'keys'"),
        (rename_output, "main", "outputs is 'logits_0', not 'logits'"),
        (look_ahead, "main: op greater_0", "type is 'less', not 'greater'"),
    ],
    ids=["a range", "a state", "an output", "a mask"],
)
def test_what_differs_from_a_fresh_package_is_named(
    change: Callable[[Any], object], place: str, said: str, lower: Lower, tmp_path: Path
) -> None:
    _, expected = lower()
    found = copied(expected, tmp_path)
    assert list(backend.differences(found.artifact, expected.artifact)) == []
    edited(found, change)
    differences = list(backend.differences(found.artifact, expected.artifact))
    assert len(differences) == 1
    assert differences[0][0] == place
    assert said in differences[0][1]


def test_the_tokenizer_is_of_a_class_that_swift_transformers_knows(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    """It refuses the class of transformers 5 (Sources/Tokenizers/Tokenizer.swift, lines 183 to
    194)."""
    source = finished_bundle.quantized
    folder = tmp_path / "quantized"
    folder.mkdir()
    for path in source.path.iterdir():
        if path.is_file() and path.name != "tokenizer_config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    given = json.loads((source.path / "tokenizer_config.json").read_text())
    template = given.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**given, "tokenizer_class": "TokenizersBackend", "backend": "tokenizers"})
    )
    (folder / "chat_template.jinja").write_text(template)
    manifest = json.loads((folder / "quantization.json").read_text())
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        manifest["files"][name] = sha256(folder / name)
    (folder / "quantization.json").write_text(json.dumps(manifest))
    opened = open_quantized(folder)
    for interface, expected in (("language_model", "PreTrainedTokenizerFast"),
                                ("functions", "TokenizersBackend")):  # fmt: skip
        target = backend.Target(max_context=64, prefill=8, interface=interface)  # type: ignore[arg-type]
        finished = lower_checkpoint(opened, target, tmp_path / interface, no_progress)
        path = finished.artifact.path / "tokenizer_config.json"
        written = json.loads(path.read_text())
        assert written["tokenizer_class"] == expected
        assert written.get("chat_template") == (template if expected.endswith("Fast") else None)
        assert finished.manifest["files"]["tokenizer_config.json"] == sha256(path)


# What float16 holds.


def overflow(weights: Weights) -> None:
    """A feed forward whose output is finite in float32, and infinite in float16."""
    weights["model.layers.1.feed_forward.down_proj.weight"] *= 30000


def test_activations_that_float16_cannot_hold_are_reported_with_the_layers_name(
    lower: Lower,
) -> None:
    quantized, lowered = lower(change=overflow)
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    (found,) = (
        check for check in checks
        if check.check == "range" and check.subject == "model.layers.1" and not check.passed
    )  # fmt: skip
    assert found.value > LARGEST_HALF == found.limit
    assert not next(check for check in checks if check.check == "logits.kl").passed
    quantized, lowered = lower(change=overflow, target={"activations": "float32"})
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    assert [check for check in checks if not check.passed] == []


def test_a_norm_holds_what_its_square_would_not(lower: Lower) -> None:
    def change(weights: Weights) -> None:
        weights[EMBEDDING] *= 3000

    quantized, lowered = lower(change=change, tie_word_embeddings=False)
    assert error_of(swift_transformers, quantized, lowered) < HALF_ERROR


def test_a_package_with_float32_weights_runs_without_float32_too(lower: Lower) -> None:
    def change(weights: Weights) -> None:
        weights[EMBEDDING][95] *= 2.0**-20  # float16 does not hold them exactly

    quantized, lowered = lower(embedding="float", change=change)
    assert backend.cross_checks(lowered.artifact) == ("float32_casts_ignored",)
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    found = {check.check: check.passed for check in checks}
    assert found["logits.float32_casts_ignored"]
    assert all(found.values())


# A Mac.


class MacModel:
    """What `MLModel` does on a Mac, done by the interpreter: arrays in, arrays out. It stands in
    for what cannot run here, so that our side of the calls is tried at least."""

    def __init__(self, path: str, compute_units: Any, function_name: str | None) -> None:
        assert function_name is None  # a package with one function has no names of functions
        assert compute_units == coremltools.ComputeUnit.CPU_AND_GPU
        self.interpreter = Interpreter(open_package(Path(path)))

    def make_state(self) -> State:
        return self.interpreter.new_state()

    def predict(self, data: Mapping[str, Any], state: State) -> dict[str, Any]:
        kinds = {"inputIds": (np.int32, "int32"), "causalMask": (np.float16, "fp16")}
        inputs = dict[str, Value]()
        for name, array in data.items():
            assert array.dtype == kinds[name][0]
            tensor = torch.from_numpy(array)
            kind = kinds[name][1]
            inputs[name] = Value(tensor.float() if kind == "fp16" else tensor, kind)
        found = self.interpreter.run("main", inputs, state)
        return {name: value.data.numpy().astype(np.float16) for name, value in found.items()}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", MacModel)
    yield


def test_on_a_mac_core_ml_runs_and_is_compared_with_the_interpreter(
    mac: None, lower: Lower
) -> None:
    quantized, lowered = lower()
    checks = check_logits(quantized, lowered, verification_text(quantized, 24, None))
    assert [check for check in checks if not check.passed] == []
    assert "logits.interpreter" in {check.check for check in checks}
