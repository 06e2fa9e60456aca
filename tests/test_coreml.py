"""The Core ML backend: the same integers, the reference's logits, and one cache for two functions.

Packages run in the reference interpreter, which `test_coreml_interpreter` tries by itself.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import contents, flip, run
from conftest import ROOT
from lowering import (
    SCHEMES,
    SHAPES,
    Lower,
    Weights,
    check_logits,
    lower_with,
    tokens,
)
from mil import function, write

from exporter.backends import coreml as backend
from exporter.backends.coreml import package as package_module
from exporter.backends.coreml.constants import Constants, mil_name
from exporter.backends.coreml.graph import KEYS, TOKEN, VALUES, Decoder
from exporter.backends.coreml.inspection import inspect_package
from exporter.backends.coreml.interpreter import Interpreter, State
from exporter.backends.coreml.package import (
    MANIFEST,
    MODEL,
    TYPES,
    WEIGHTS,
    Package,
    Value,
    open_package,
    place_of,
    type_of,
)
from exporter.backends.coreml.palette import make_palettes, read_palettes
from exporter.backends.coreml.program import DECODE, PREFILL
from exporter.backends.coreml.toolkit import coremltools, mb
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.inference.generation import Generation, Sampling
from exporter.inference.reference import ReferenceRunner, score
from exporter.model.config import EMBEDDING
from exporter.quantization.activations import LARGEST_HALF
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.integers import check_integers
from exporter.verification.runs import run_teacher_forced, verification_text

CONTEXT, CHUNK = 64, 7
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    return lower_with(lower_once, {"target": "coreml", "max_context": CONTEXT, "prefill": CHUNK})


#: One token; within a chunk; just one; one more; several; as many as leave no room for a chunk.
PROMPTS = (1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 3, CONTEXT - 4)


def errors(
    quantized: QuantizedCheckpoint, lowered: FinishedArtifact, prompts: tuple[int, ...] = PROMPTS
) -> torch.Tensor:
    """Relative L2 error of the logits after each prompt, and of each step to the cache's end."""
    found = run_teacher_forced(backend.load(lowered.artifact), tokens(CONTEXT), prompts)
    positions = [length - 1 for length in prompts] + list(range(prompts[-1], CONTEXT))
    expected = score(quantized, tokens(CONTEXT), positions)
    assert expected.std() > 0.5
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def package_of(lowered: FinishedArtifact) -> Path:
    return lowered.artifact.path / backend.FILE_NAME


def ints(*values: int) -> Value:
    return Value(torch.tensor(values, dtype=torch.int32), "int32")


def told(tokens: list[int], position: int, length: int | None = None) -> dict[str, Value]:
    """Inputs of a function."""
    rows = Value(torch.tensor([tokens], dtype=torch.int32), "int32")
    inputs = {"input_ids": rows, "position": ints(position)}
    return inputs if length is None else {**inputs, "length": ints(length)}


# The model.


@pytest.mark.parametrize(("activations", "limit"), [("float16", 5e-3), ("float32", 2e-3)])
@pytest.mark.parametrize(("model", "tied", "linear", "embedding"), SCHEMES)
def test_a_package_gives_the_references_logits_from_the_quantized_checkpoints_integers(
    model: str, tied: bool, linear: str, embedding: str, activations: str, limit: float,
    lower: Lower,
) -> None:  # fmt: skip
    target = {"activations": activations}
    quantized, lowered = lower(model, linear, embedding, target, tie_word_embeddings=tied)
    assert errors(quantized, lowered).max() < limit
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 2 * len(quantized.schemes)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_of_every_shape_is_the_references(shape: dict[str, Any], lower: Lower) -> None:
    quantized, lowered = lower(target={"activations": "float32"}, **shape)
    assert errors(quantized, lowered).max() < 2e-3


def test_the_demo_answers_as_its_quantized_checkpoint_does_in_torch(
    finished_bundle: Bundle,
) -> None:
    tokenizer = load_tokenizer(finished_bundle.quantized.path)
    prompt = tokenizer.encode(
        tokenizer.prompt_text("Ada has 12 eggs. Ada finds 7 more.", raw=False, system=None)
    )
    quantized = finished_bundle.quantized
    runners = (
        backend.load(finished_bundle.artifacts["coreml"].artifact),
        ReferenceRunner(quantized, 256),
    )
    answers = [
        list(Generation(runner, prompt, quantized.eos_token_ids, Sampling(max_new_tokens=48)))
        for runner in runners
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 10


# The cache.


def filled(interpreter: Interpreter) -> State:
    """A cache that holds noise wherever nothing was written."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: Value(torch.randn(state.data.shape, generator=generator).half().float(), state.kind)
        for name, state in interpreter.new_state().items()
    }


@pytest.mark.parametrize("length", [1, 3, CHUNK])
def test_padding_never_enters_the_cache_and_is_never_looked_at(length: int, lower: Lower) -> None:
    _, lowered = lower()
    interpreter = Interpreter(open_package(package_of(lowered)))
    text, position, outcomes = tokens(length), 10, []
    for padding in (0, 5):
        state = filled(interpreter)
        chunk = text + [padding] * (CHUNK - length)
        (logits,) = interpreter.run(PREFILL, told(chunk, position, length), state).values()
        outcomes.append((logits.data, state[KEYS].data, state[VALUES].data))
        before = filled(interpreter)
        for name in (KEYS, VALUES):
            changed = (state[name].data != before[name].data).any(-1)  # layer, head, position
            written = torch.zeros(CONTEXT, dtype=torch.bool)
            written[position : position + length] = True
            assert torch.equal(changed, written.expand_as(changed))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_reading_tokens_again_writes_the_same_again(lower: Lower) -> None:
    """The last chunk of a prompt that fills the cache begins among what was read before."""
    _, lowered = lower()
    interpreter = Interpreter(open_package(package_of(lowered)))
    state = interpreter.new_state()
    text = tokens(CHUNK + 3)
    interpreter.run(PREFILL, told(text[:CHUNK], 0, CHUNK), state)
    once = state[KEYS].data.clone()
    interpreter.run(PREFILL, told(text[3:], 3, CHUNK), state)
    torch.testing.assert_close(
        state[KEYS].data[:, :, :CHUNK], once[:, :, :CHUNK], rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("length", range(CONTEXT - CHUNK, CONTEXT + 1))
def test_a_prompt_may_end_anywhere_up_to_the_end_of_the_cache(
    length: int, full_context: tuple[FinishedArtifact, torch.Tensor]
) -> None:
    lowered, expected = full_context
    found = backend.load(lowered.artifact).prefill(tokens(length))
    assert (found - expected[length - 1]).norm() < 5e-3 * expected[length - 1].norm()


@pytest.fixture(scope="module")
def full_context(lower: Lower) -> tuple[FinishedArtifact, torch.Tensor]:
    """A package, and the reference's logits at every position of its cache."""
    quantized, lowered = lower()
    return lowered, score(quantized, tokens(CONTEXT), range(CONTEXT))


def test_a_new_text_starts_without_the_old_one(
    full_context: tuple[FinishedArtifact, torch.Tensor],
) -> None:
    runner = backend.load(full_context[0].artifact)
    first = runner.prefill(tokens(20))
    runner.prefill(tokens(CONTEXT)[20:])
    assert torch.equal(runner.prefill(tokens(20)), first)


@pytest.mark.parametrize("count", [0, CONTEXT + 1])
def test_a_text_that_the_cache_does_not_hold_is_refused(
    count: int, full_context: tuple[FinishedArtifact, torch.Tensor]
) -> None:
    runner = backend.load(full_context[0].artifact)
    with pytest.raises(InputError, match=f"context: {count} tokens are not between 1 and 64"):
        runner.prefill(tokens(count))


def test_a_step_beyond_the_cache_is_refused(
    full_context: tuple[FinishedArtifact, torch.Tensor],
) -> None:
    runner = backend.load(full_context[0].artifact)
    runner.prefill(tokens(CONTEXT - 1))
    runner.decode(0)
    with pytest.raises(InputError, match="context: 65 tokens"):
        runner.decode(0)


def test_the_likeliest_token_can_be_found_inside_the_program(lower: Lower) -> None:
    quantized, lowered = lower(target={"output": "token"})
    package = open_package(package_of(lowered))
    interpreter = Interpreter(package)
    state, text = interpreter.new_state(), tokens(CHUNK + 1)
    expected = score(quantized, text, [CHUNK - 1, CHUNK]).argmax(-1)
    assert list(package.block(DECODE).outputs) == [TOKEN]
    for name, inputs, wanted in (
        (PREFILL, told(text[:CHUNK], 0, CHUNK), expected[0]),
        (DECODE, told(text[CHUNK:], CHUNK), expected[1]),
    ):
        found = interpreter.run(name, inputs, state)[TOKEN]
        assert (found.kind, found.data.tolist()) == ("int32", [[wanted.item()]])
    assert errors(quantized, lowered).max() < 5e-3  # the runner looks at the logits all the same


# The form for the Neural Engine.

NEURAL_ENGINE = {"compute": "neural_engine"}


@pytest.mark.parametrize(
    ("model", "tied", "linear", "embedding"),
    [
        ("llama4_text", True, "int4", "int4"),
        ("llama4_text", False, "int4", "int8"),
        ("llama4_text", True, "int8", "float"),
    ],
)
def test_the_form_for_the_neural_engine_gives_the_references_logits_and_the_same_integers(
    model: str, tied: bool, linear: str, embedding: str, lower: Lower
) -> None:
    quantized, lowered = lower(model, linear, embedding, NEURAL_ENGINE, tie_word_embeddings=tied)
    assert errors(quantized, lowered).max() < 5e-3
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 2 * len(quantized.schemes)
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    assert [check for check in checks if not check.passed] == []


def test_the_form_for_the_neural_engine_has_no_operation_that_is_reported_to_fail_there(
    lower: Lower,
) -> None:
    _, lowered = lower("llama4_text", "int4", "int4", NEURAL_ENGINE)
    package = open_package(package_of(lowered))
    kinds = {kind for kind, _, _ in TYPES.values()} - {"fp32"}
    for name in package.functions:
        operations = package.block(name).operations
        constants = {one.outputs[0].name for one in operations if one.type == "const"}
        used = {one.type for one in operations}
        assert used.isdisjoint({"silu", "exp", "scaled_dot_product_attention"})
        assert "constexpr_blockwise_shift_scale" not in used
        for one in operations:
            declared = {type_of(output.type.tensorType)[0] for output in one.outputs}
            assert declared <= kinds, one
            if one.type == "slice_update":
                bounds = {one.inputs[part].arguments[0].name for part in ("begin", "end")}
                assert bounds <= constants
    facts = package.spec.description.metadata.userDefined
    assert (facts["compute"], facts["tested"]) == (
        "neural_engine", "in a reference interpreter, not run on hardware",
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, 3, CHUNK])
def test_masked_writes_touch_only_the_positions_of_the_text(length: int, lower: Lower) -> None:
    _, lowered = lower("llama4_text", "int4", "int4", NEURAL_ENGINE)
    interpreter = Interpreter(open_package(package_of(lowered)))
    state, before = filled(interpreter), filled(interpreter)
    chunk = tokens(length) + [5] * (CHUNK - length)
    interpreter.run(PREFILL, told(chunk, 10, length), state)
    for name in (KEYS, VALUES):
        changed = (state[name].data != before[name].data).any(-1)
        written = torch.zeros(CONTEXT, dtype=torch.bool)
        written[10 : 10 + length] = True
        assert torch.equal(changed, written.expand_as(changed))


@pytest.mark.parametrize(
    ("schemes", "target", "changes", "said"),
    {
        "groups": (
            ("int4-g32", "int4"), {}, {},
            "q_proj.weight: int4-g32: the Neural Engine computes codes in groups wrongly.*Use int4",
        ),
        "an embedding in groups": (
            ("int4", "int8-g32"), {}, {}, "embed_tokens.weight: int8-g32: .*Use int8 or",
        ),
        "float32": (
            ("int4", "int4"), {"activations": "float32"}, {},
            "activations: the Neural Engine computes in float16 only",
        ),
        "a long prefill": (
            ("int4", "int4"), {"prefill": 33}, {}, "prefill: 33 tokens are more than the 32",
        ),
        "odd heads": (
            ("int4", "int4"), {}, {"head_dim": 16, "hidden_size": 64},
            "head_dim: 16 is not a multiple of 32",
        ),
    }.values(),
    ids=["groups", "an embedding in groups", "float32", "a long prefill", "odd heads"],
)  # fmt: skip
def test_what_the_neural_engine_cannot_have_is_refused(
    schemes: tuple[str, str], target: dict[str, Any], changes: dict[str, Any], said: str,
    lower: Lower,
) -> None:  # fmt: skip
    with pytest.raises(InputError, match=said):
        lower("llama4_text", *schemes, {**NEURAL_ENGINE, **target}, **changes)


def palettes_of(scales: list[float]) -> QuantizedTensor:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(len(scales), 2)
    return QuantizedTensor(codes, torch.tensor(scales).unsqueeze(1), Scheme(4))


@pytest.mark.parametrize("scale", [0.0, 2.0**-24, 2.0**-14, 0.0123291015625, 1.0, 255 * 2.0**5])
def test_codes_and_scales_come_back_from_palettes_bit_for_bit(scale: float) -> None:
    stored = palettes_of([scale, 1.0])
    indices, palettes = make_palettes(stored, "w")
    assert palettes.shape == (2, 1, 16, 1)
    found = read_palettes(
        torch.from_numpy(indices), torch.from_numpy(palettes).float(), stored.scheme, "w"
    )
    assert torch.equal(found.codes, stored.codes)
    assert torch.equal(found.scales, stored.scales)


def test_a_scale_that_float16_cannot_multiply_is_refused() -> None:
    with pytest.raises(InputError, match="w: has a scale of which float16 does not hold every"):
        make_palettes(palettes_of([60000.0]), "w")


@pytest.mark.parametrize("place", [0, 7, 8, 9, 15])
def test_a_palette_that_is_no_scale_times_codes_is_an_error(place: int) -> None:
    indices, palettes = make_palettes(palettes_of([1.0, 0.5]), "w")
    changed = torch.from_numpy(palettes).float()
    changed[1, 0, place, 0] += 0.25
    with pytest.raises(InputError, match=r"no multiple of a scale \(row 1\)"):
        read_palettes(torch.from_numpy(indices), changed, Scheme(4), "w")


# The package.


def stored_at(package: Package, function: str) -> dict[str, int]:
    """Where each named constant of a function lies in the weight file."""
    found = dict[str, int]()
    for operation in package.block(function).operations:
        values = {**operation.attributes, **{
            name: given.arguments[0].value for name, given in operation.inputs.items()
        }}  # fmt: skip
        for part, value in values.items():
            if place := place_of(value):
                found[f"{operation.outputs[0].name}.{part}"] = place[1]
    return found


def test_two_functions_share_one_weight_file_and_the_tied_embedding_lies_there_once(
    lower: Lower,
) -> None:
    quantized, lowered = lower()
    package = open_package(package_of(lowered))
    assert package.functions == (DECODE, PREFILL)
    decode, prefill = (stored_at(package, name) for name in (DECODE, PREFILL))
    shared = {name: place for name, place in decode.items() if "weight" in name}
    assert shared.items() <= prefill.items()
    codes = [name for name in shared if name.endswith(".data")]
    assert len(codes) == sum(scheme == Scheme(4, 32) for scheme in quantized.schemes.values())
    assert len(set(shared.values())) == len(shared)
    quantized = quantized.read(EMBEDDING)
    assert not isinstance(quantized, torch.Tensor)
    packed = quantized.codes.numpy().astype(np.uint8) & 15
    as_stored = (packed[:, ::2] | packed[:, 1::2] << 4).tobytes()
    assert (package_of(lowered) / WEIGHTS).read_bytes().count(as_stored) == 1


def test_the_package_says_what_it_is(finished_bundle: Bundle) -> None:
    folder = finished_bundle.path / "coreml"
    package = open_package(folder / "model.mlpackage")
    assert package.spec.specificationVersion == 9  # iOS 18
    described = package.spec.description
    assert described.defaultFunctionName == DECODE
    assert described.metadata.author == "mobilellm-exporter"
    assert described.metadata.license == "BSD-3-Clause"
    assert described.metadata.versionString
    facts = dict(described.metadata.userDefined)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    manifest = (finished_bundle.quantized.path / "quantization.json").read_bytes()
    assert facts.pop("tokenizer_sha256") == hashlib.sha256(tokenizer).hexdigest()
    assert facts.pop("quantized_sha256") == hashlib.sha256(manifest).hexdigest()
    assert facts == {
        "max_context": "1024",
        "prefill": "128",
        "output": "logits",
        "compute": "cpu_and_gpu",
        "tested": "in a reference interpreter, not run on hardware",
        "vocab_size": "512",
        "bos_token_id": "0",
        "eos_token_ids": "[1, 2, 3]",
    }


def test_the_swift_sample_looks_up_what_a_package_says(finished_bundle: Bundle) -> None:
    facts = open_package(
        finished_bundle.path / "coreml" / "model.mlpackage"
    ).spec.description.metadata
    keys = re.findall(r'facts\["(\w+)"\]', (ROOT / "examples/ios/Decoder.swift").read_text())
    assert len(keys) == 5
    assert set(keys) <= set(facts.userDefined)


def test_a_weight_file_that_ios_may_refuse_is_warned_of_and_shown(
    lower: Lower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, lowered = lower(fresh=True)
    assert caplog.messages == []
    assert inspect_package(package_of(lowered)).notes == ()
    monkeypatch.setattr(package_module, "LARGEST_WEIGHTS", 20_000)
    _, lowered = lower(fresh=True)
    said = "weight.bin has 0.0 GB; apps on iOS are reported to fail with more than 0.0 GB"
    assert [message for message in caplog.messages if message.startswith(said)] != []
    assert inspect_package(package_of(lowered)).notes[0].startswith(said)
    assert backend.inspect(package_of(lowered)).notes[0].startswith(said)


def test_a_model_without_a_tokenizer_names_none(lower: Lower) -> None:
    _, lowered = lower()
    described = open_package(package_of(lowered)).spec.description
    assert "tokenizer_sha256" not in described.metadata.userDefined


def test_two_exports_are_equal_to_the_last_byte_whatever_was_made_between(lower: Lower) -> None:
    _, first = lower(fresh=True)
    lower("llama", fresh=True)
    _, second = lower(fresh=True)
    assert contents(package_of(first)) == contents(package_of(second))
    assert len(contents(package_of(first))) == 6  # three files in three folders


def test_a_package_that_coremltools_opens_and_saves_has_the_same_manifest(
    lower: Lower, tmp_path: Path
) -> None:
    """It writes the manifest of a package that it only opens, which must not damage a bundle."""
    _, lowered = lower()
    before = contents(package_of(lowered))
    opened = tmp_path / "opened.mlpackage"
    shutil.copytree(package_of(lowered), opened)
    model = coremltools.models.MLModel(str(opened), skip_model_load=True)
    assert contents(opened) == before
    model.save(str(tmp_path / "saved.mlpackage"))
    for name in (MANIFEST, WEIGHTS):
        assert (tmp_path / "saved.mlpackage" / name).read_bytes() == (opened / name).read_bytes()
    manifest = json.loads((opened / MANIFEST).read_text())
    entries = reversed(manifest["itemInfoEntries"].items())
    (opened / MANIFEST).write_text(json.dumps({**manifest, "itemInfoEntries": dict(entries)}))
    coremltools.models.MLModel(str(opened), skip_model_load=True)
    assert contents(opened) == before  # so it does write it


def test_nothing_but_the_package_is_left_in_the_artifacts_folder(lower: Lower) -> None:
    _, lowered = lower()
    assert {path.name for path in lowered.artifact.path.iterdir()} == {
        "artifact.json", "model.mlpackage"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "said"),
    {
        "prefill of one": ({"prefill": 1}, "prefill: 1 tokens are not between 2 and max_context"),
        "prefill beyond": ({"prefill": 65}, r"prefill: 65 tokens .* max_context \(64\)"),
        "context beyond": ({"max_context": 512}, "max_context: 512 is more than the model's 256"),
        "odd context": (
            {"max_context": 100},
            "max_context: 100 is not a multiple of 32, as Core ML's .* Set it to 96 or 128",
        ),
        "small context": ({"max_context": 10}, "max_context: 10 is not .* Set it to 32"),
    }.values(),
    ids=["prefill of one", "prefill beyond", "context beyond", "odd context", "small context"],
)
def test_what_the_program_cannot_be_is_refused(
    target: dict[str, Any], said: str, lower: Lower
) -> None:
    with pytest.raises(InputError, match=said):
        lower(target=target)


def test_three_targets_of_one_recipe_hold_the_same_integers(finished_bundle: Bundle) -> None:
    quantized, proven = finished_bundle.quantized, dict[str, set[str]]()
    for target, finished in finished_bundle.artifacts.items():
        checks = check_integers(quantized, finished, lambda name: None)
        assert all(check.passed for check in checks)
        assert len(checks) >= len(quantized.schemes)
        proven[target] = {check.subject.split(" ")[0] for check in checks}
    assert proven == {key: set(quantized.schemes) for key in ("executorch", "onnx", "coreml")}


def test_generate_writes_with_the_package(
    finished_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(
        capsys, "generate", finished_bundle.path / "coreml", "--prompt", "Ada has 12 eggs.",
        "--max-new-tokens", "5", "--json",
    )  # fmt: skip
    assert outcome.code == 0
    assert len(outcome.json["tokens"]) == 5


# Negative controls.


@pytest.fixture
def damaged(finished_bundle: Bundle, tmp_path: Path) -> tuple[QuantizedCheckpoint, Path]:
    """The demo's quantized checkpoint, and a copy of its Core ML artifact to damage."""
    folder = shutil.copytree(finished_bundle.path / "coreml", tmp_path / "coreml")
    return finished_bundle.quantized, Path(folder)


def failed(quantized: QuantizedCheckpoint, folder: Path) -> list[tuple[str, str]]:
    checks = check_integers(quantized, open_artifact(folder), lambda name: None)
    return [(check.subject, check.note) for check in checks if not check.passed]


def offset_of(folder: Path, tensor: str, part: str) -> int:
    """Where the data of a weight's codes or scales begin in the weight file."""
    package = open_package(folder / backend.FILE_NAME)
    record = stored_at(package, DECODE)[f"{mil_name(tensor)}.{part}"]
    data = (folder / backend.FILE_NAME / WEIGHTS).read_bytes()
    return int.from_bytes(data[record + 16 : record + 24], "little")


@pytest.mark.parametrize(
    ("tensor", "read_by"),
    {Q_PROJ: "linear", EMBEDDING: "gather, linear"}.items(),
    ids=["a layer", "the embedding"],
)
@pytest.mark.parametrize(("part", "called"), [("data", "code"), ("scale", "scale")])
def test_one_flipped_bit_is_reported_with_its_tensor(
    part: str, called: str, tensor: str, read_by: str, damaged: tuple[QuantizedCheckpoint, Path]
) -> None:
    quantized, folder = damaged
    assert failed(quantized, folder) == []
    flip(folder / backend.FILE_NAME / WEIGHTS, offset_of(folder, tensor, part) + 8, bit=1)
    found = failed(quantized, folder)
    assert [subject for subject, _ in found] == [
        f"{tensor} ({function}: {read_by})" for function in (DECODE, PREFILL)
    ]
    assert all(note.startswith(f"1 {called}s differ; at [0, ") for _, note in found)


def test_a_flipped_bit_of_a_norm_is_reported_too(
    damaged: tuple[QuantizedCheckpoint, Path],
) -> None:
    quantized, folder = damaged
    name = "model.layers.3.post_attention_layernorm.weight"
    flip(folder / backend.FILE_NAME / WEIGHTS, offset_of(folder, name, "val") + 2, bit=4)
    assert {subject.split(" ")[0] for subject, _ in failed(quantized, folder)} == {name}


def set_bytes(content: bytes, offset: Callable[[Path], int]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / backend.FILE_NAME / WEIGHTS
        data = bytearray(path.read_bytes())
        start = offset(folder)
        data[start : start + len(content)] = content
        path.write_bytes(data)

    return damage


def record_of(folder: Path) -> int:
    package = open_package(folder / backend.FILE_NAME)
    return stored_at(package, DECODE)[f"{mil_name(Q_PROJ)}.data"]


def truncate(name: str, size: int) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / backend.FILE_NAME / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def edit(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change the operation that makes one weight in one function."""

    def damage(folder: Path) -> None:
        package = open_package(folder / backend.FILE_NAME)
        for operation in package.block(PREFILL).operations:
            if operation.outputs and operation.outputs[0].name == mil_name(Q_PROJ):
                change(operation)
        content = package.spec.SerializeToString(deterministic=True)
        (folder / backend.FILE_NAME / MODEL).write_bytes(content)

    return damage


def add_offset(operation: Any) -> None:
    operation.inputs["offset"].CopyFrom(operation.inputs["data"])


def become_unsigned(operation: Any) -> None:
    declared = operation.inputs["data"].arguments[0].value.type.tensorType
    declared.dataType = type(declared).DESCRIPTOR.file.pool.FindEnumTypeByName(
        "CoreML.Specification.MILSpec.DataType"
    ).values_by_name["UINT4"].number  # fmt: skip


def take_another_name(operation: Any) -> None:
    operation.outputs[0].name = "another"


def become_a_palette(operation: Any) -> None:
    operation.type = "constexpr_lut_to_dense"


def read_another(folder: Path) -> None:
    """One product takes another weight of the same shape."""
    package = open_package(folder / backend.FILE_NAME)
    for operation in package.block(PREFILL).operations:
        for given in operation.inputs.values():
            for binding in given.arguments:
                if binding.name == mil_name(Q_PROJ):
                    binding.name = binding.name.replace("layers_1", "layers_0")
    content = package.spec.SerializeToString(deterministic=True)
    (folder / backend.FILE_NAME / MODEL).write_bytes(content)


def halve(operation: Any) -> None:
    shape = operation.inputs["data"].arguments[0].value.type.tensorType.dimensions
    shape[0].constant.size //= 2


def point_outside(operation: Any) -> None:
    value = operation.inputs["data"].arguments[0].value
    value.blobFileValue.fileName = "@model_path/../../../../artifact.json"


def lose(folder: Path) -> None:
    (folder / backend.FILE_NAME / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    {
        "no weight file": (
            lambda folder: (folder / backend.FILE_NAME / WEIGHTS).unlink(), "no such file",
        ),
        "a short weight file": (truncate(WEIGHTS, 5000), "lies beyond its 5000 bytes"),
        "a weight file cut in a weight": (
            lambda folder: truncate(WEIGHTS, record_of(folder) + 100)(folder), "ends beyond the",
        ),
        "an empty weight file": (truncate(WEIGHTS, 0), "lies beyond its 0 bytes"),
        "a record that is none": (set_bytes(b"\0\0\0\0", record_of), "is not the record of a"),
        "a record of another size": (
            set_bytes(b"\7", lambda folder: record_of(folder) + 8), "do not fill the shape",
        ),
        "a short program": (truncate(MODEL, 1000), "is not a Core ML model"),
        "no manifest": (lose, "no such file"),
        "an offset": (
            edit(add_offset), "is made of data and offset and scale, not of data and scale",
        ),
        "codes of another type": (edit(become_unsigned), "has uint4 codes, not int4-g32"),
        "another shape": (edit(halve), "do not fill the shape"),
        "a weight that one function lacks": (edit(take_another_name), "is not in the program"),
        "a weight of another format": (
            edit(become_a_palette), "is made of data and scale, not of indices and lut",
        ),
        "a weight that nothing reads": (read_another, "is read by no operator"),
        "a file outside": (edit(point_outside), "names a weight file outside of itself"),
    }.values(),
    ids=[
        "no weight file", "a short weight file", "a weight file cut in a weight",
        "an empty weight file", "a record that is none",
        "a record of another size", "a short program", "no manifest", "an offset",
        "codes of another type", "another shape", "a weight that one function lacks",
        "a weight of another format", "a weight that nothing reads", "a file outside",
    ],
)  # fmt: skip
def test_a_damaged_package_fails_the_check_and_says_how(
    damage: Callable[[Path], object], said: str, damaged: tuple[QuantizedCheckpoint, Path]
) -> None:
    quantized, folder = damaged
    damage(folder)
    assert any(said in note for _, note in failed(quantized, folder))


# What float16 holds.


def overflow_mlp(weights: Weights) -> None:
    """A feed forward whose output is finite in bfloat16 and float32, and infinite in float16."""
    weights["model.layers.1.feed_forward.down_proj.weight"] *= 30000


def overflow_scores(weights: Weights) -> None:
    """Without a norm of queries and keys nothing bounds their products."""
    for part in "qk":
        weights[f"model.layers.0.self_attn.{part}_proj.weight"] *= 400


OVERFLOWS = {
    "a layer's output": ({}, overflow_mlp, "model.layers.1", "output of feed_forward.down_proj"),
    "attention scores": (
        {"use_qk_norm": False}, overflow_scores, "model.layers.0", "scores of self_attn",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "change", "layer", "place"), OVERFLOWS.values(), ids=OVERFLOWS)
def test_activations_that_float16_cannot_hold_stop_the_export_with_the_layers_name(
    changes: dict[str, Any], change: Callable[[Weights], object], layer: str, place: str,
    lower: Lower,
) -> None:  # fmt: skip
    quantized, lowered = lower(change=change, **changes)
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    bad = [check for check in checks if check.check == "range" and not check.passed]
    assert layer in [check.subject for check in bad]
    (found,) = (check for check in bad if check.subject == layer)
    assert found.value > LARGEST_HALF == found.limit
    assert found.note == f"{place}; overflows in float16: set the target's activations to float32"
    assert not next(check for check in checks if check.check == "logits.kl").passed


def test_the_same_model_is_right_with_float32_activations(lower: Lower) -> None:
    quantized, lowered = lower(target={"activations": "float32"}, change=overflow_mlp)
    assert errors(quantized, lowered).max() < 5e-3
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    assert [check for check in checks if not check.passed] == []


def test_values_that_the_float16_cache_cannot_hold_are_named_in_float32_too(lower: Lower) -> None:
    def change(weights: Weights) -> None:
        weights["model.layers.1.self_attn.v_proj.weight"] *= 3e5

    quantized, lowered = lower(target={"activations": "float32"}, change=change)
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    (found,) = (check for check in checks if check.check == "range" and not check.passed)
    assert found.subject == "model.layers.1"
    assert found.note.startswith("values of self_attn; overflows in the cache, which is float16")


def test_every_layers_largest_activation_is_reported(finished_bundle: Bundle) -> None:
    finished, quantized = finished_bundle.artifacts["coreml"], finished_bundle.quantized
    checks = check_logits(quantized, finished, verification_text(quantized, 64, None))
    ranges = {check.subject: check for check in checks if check.check == "range"}
    assert list(ranges) == [*(f"model.layers.{n}" for n in range(6)), "model.norm", "lm_head"]
    assert all(0 < check.value < LARGEST_HALF for check in ranges.values())


def test_squares_beyond_float16_are_right_in_a_normalization(lower: Lower) -> None:
    """Values above 255, whose squares float16 does not hold, reach every normalization."""
    largest = dict[str, float]()

    def observe(name: str, which: str, values: torch.Tensor) -> None:
        if name.endswith("norm") and which == "input":
            largest[name] = values.abs().max().item()

    quantized, lowered = lower(change=make_large, tie_word_embeddings=False)
    score(quantized, tokens(CONTEXT), [0], observe=observe)
    assert len(largest) == 5
    assert min(largest.values()) > 256
    assert errors(quantized, lowered).max() < 5e-3


def norm_in_float32(self: Decoder, x: Any, name: str | None) -> Any:
    """The norm as it was: right if float32 is, and else its squares overflow."""
    wide = mb.cast(x=x, dtype="fp32")
    mean = mb.reduce_mean(x=mb.square(x=wide), axes=[-1], keep_dims=True)
    normal = mb.mul(x=wide, y=mb.rsqrt(x=mean, epsilon=np.float32(self.config.rms_norm_eps)))
    if name:
        weight = self.constants.quantized.float_weight(name).numpy()
        normal = mb.mul(x=normal, y=self.constants.shared(mil_name(name), weight))
    return mb.cast(x=normal, dtype="fp16")


def make_large(weights: Weights) -> None:
    """Activations above 255, whose squares float16 does not hold."""
    weights[EMBEDDING] *= 3000


def test_without_float32_the_norm_holds(lower: Lower) -> None:
    quantized, lowered = lower(change=make_large, tie_word_embeddings=False)
    runner = backend.load(lowered.artifact, "float32_casts_ignored")
    found = run_teacher_forced(runner, tokens(CONTEXT), (CHUNK + 1,))
    expected = score(quantized, tokens(CONTEXT), range(CHUNK, CONTEXT))
    assert ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 5e-3


def test_without_float32_a_norm_that_needs_it_fails_and_the_square_is_named(
    lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "_norm", norm_in_float32)
    quantized, lowered = lower(change=make_large, tie_word_embeddings=False)
    assert errors(quantized, lowered).max() < 5e-3
    assert backend.cross_checks(lowered.artifact) == ("float32_casts_ignored",)
    runner = backend.load(lowered.artifact, "float32_casts_ignored")
    said = r"prefill: square_0 \(square\): is not finite in float16, though its inputs are"
    with pytest.raises(InputError, match=said):
        runner.prefill(tokens(3))
    checks = check_logits(quantized, lowered, verification_text(quantized, CONTEXT, None))
    failed_checks = [f"{check.subject}: {check.note}" for check in checks if not check.passed]
    assert any("square_0 (square)" in said for said in failed_checks)


def test_with_float32_activations_nothing_runs_without_float32(lower: Lower) -> None:
    _, lowered = lower(target={"activations": "float32"})
    assert backend.cross_checks(lowered.artifact) == ()


#: From the smallest float16 to nearly the largest; what eps adds is seen where these are small.
MAGNITUDES = (6e-8, 1e-5, 1e-4, 1e-3, 1e-2, 0.3, 1.0, 30.0, 300.0, 3e3, 6e4)


@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize("width", [32, 576, 4096])
def test_a_norm_in_float16_is_right_at_every_magnitude(
    width: int, eps: float, lower: Lower, tmp_path: Path
) -> None:
    """Rows of noise, a row of one large value among small ones, and a row of zeros."""
    noise = torch.randn(len(MAGNITUDES), width, generator=torch.Generator().manual_seed(0))
    rows = noise / noise.abs().amax(-1, keepdim=True) * torch.tensor(MAGNITUDES).unsqueeze(1)
    alone = torch.full((1, width), 0.01)
    alone[0, 3] = 6e4
    x = torch.cat((rows, alone, torch.zeros(1, width))).half().float()
    quantized, _ = lower()
    config = replace(quantized.config, rms_norm_eps=eps)
    target = backend.Target(max_context=CONTEXT)
    decoder = Decoder(config, target, Constants(quantized, target), 1)
    norm = function(lambda x: decoder._norm(x, None), x=(x.shape, "fp16"))
    interpreter = Interpreter(write(tmp_path, main=norm), half=True)
    found = interpreter.run("main", {"x": Value(x, "fp16")}, {})
    (values,) = found.values()
    exact = x.double()
    expected = exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()
    error = (values.data - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)
    assert error.max() < 3e-3


# A Mac.


class MacModel:
    """What `MLModel` does on a Mac, done by the interpreter: it takes arrays and gives arrays.

    It stands in for what cannot run here, so that our side of the calls is tried at least.
    """

    def __init__(self, path: str, compute_units: Any, function_name: str) -> None:
        assert compute_units == coremltools.ComputeUnit.CPU_AND_GPU
        self.interpreter, self.function = Interpreter(open_package(Path(path))), function_name

    def make_state(self) -> State:
        return self.interpreter.new_state()

    def predict(self, data: Mapping[str, Any], state: State) -> dict[str, Any]:
        inputs = {name: Value(torch.from_numpy(array), "int32") for name, array in data.items()}
        found = self.interpreter.run(self.function, inputs, state)
        return {name: value.data.numpy().astype(np.float16) for name, value in found.items()}


class WrongMacModel(MacModel):
    """A runtime that computes something else."""

    def predict(self, data: Mapping[str, Any], state: State) -> dict[str, Any]:
        return {name: -array for name, array in super().predict(data, state).items()}


@pytest.fixture(params=[MacModel, WrongMacModel])
def mac(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """This machine as a Mac; whether its Core ML is right."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", request.param)
    return request.param is MacModel


def test_on_a_mac_core_ml_runs_and_is_compared_with_the_interpreter(
    mac: bool, finished_bundle: Bundle
) -> None:
    quantized, finished = finished_bundle.quantized, finished_bundle.artifacts["coreml"]
    checks = check_logits(quantized, finished, verification_text(quantized, 24, None))
    found = {check.check: check.passed for check in checks if check.check != "range"}
    assert found == dict.fromkeys(
        ("logits.kl", "logits.top1", "logits.max_difference", "logits.interpreter"), mac
    )


def test_elsewhere_a_package_without_float32_runs_once(finished_bundle: Bundle) -> None:
    """Its run is the one without float32, and finds overflows."""
    assert backend.cross_checks(finished_bundle.artifacts["coreml"].artifact) == ()


def test_a_package_that_gives_tokens_is_not_compared_with_itself(
    lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    _, lowered = lower(target={"output": "token"})
    assert backend.cross_checks(lowered.artifact) == ()
    assert backend.load(lowered.artifact).prefill(tokens(3)).shape == (96,)
