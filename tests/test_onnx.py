"""The ONNX backend: the same integers, the reference's logits, and what clients read."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import run
from lowering import SCHEMES, Lower, lower_with, tokens

from exporter import pipeline
from exporter.backends import executorch, parse_target
from exporter.backends import onnx as backend
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError
from exporter.evaluation.agreement import compare_logits
from exporter.inference.loaded_model import open_model
from exporter.inference.reference import score
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import EMBEDDING
from exporter.pipeline import no_progress
from exporter.quantization.activations import round_blocks_to_int8
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor
from exporter.verification.integers import check_integers
from exporter.verification.runs import run_teacher_forced

CONTEXT = 64
GRAPH, DATA, ORT = "onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "onnx/model_q4.ort"
FLOAT_FORMS = [
    {"products": "float"},
    {"form": "portable", "products": "float"},
]


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    return lower_with(lower_once, {"target": "onnx", "max_context": CONTEXT})


def lower_nano(bundle: Bundle, out: Path, **target: Any) -> FinishedArtifact:
    parsed = parse_target({"target": "onnx", "max_context": 512, **target}, "test")
    return pipeline.lower(bundle.quantized, parsed, out, no_progress)


def logits(lowered: FinishedArtifact) -> torch.Tensor:
    """After prefills of 1 and 5 tokens and 20 decode steps."""
    return run_teacher_forced(backend.load(lowered.artifact), tokens(25), (1, 5))


def reference(quantized: QuantizedCheckpoint, **rounding: Any) -> torch.Tensor:
    return score(quantized, tokens(25), [0, 4, *range(5, 25)], rounding.get("rounding"))


@pytest.mark.parametrize("target", FLOAT_FORMS, ids=["contrib", "portable"])
@pytest.mark.parametrize(("model", "tied", "linear", "embedding"), SCHEMES)
def test_float_products_give_the_references_logits_from_the_quantized_checkpoints_integers(
    model: str, tied: bool, linear: str, embedding: str, target: dict[str, Any], lower: Lower
) -> None:
    quantized, lowered = lower(model, linear, embedding, target, tie_word_embeddings=tied)
    expected = reference(quantized)
    assert expected.std() > 1
    assert (logits(lowered) - expected).abs().max() < 2e-3
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize(("model", "tied", "linear", "embedding"), SCHEMES)
def test_int8_products_stay_near_the_reference_and_keep_the_integers(
    model: str, tied: bool, linear: str, embedding: str, lower: Lower
) -> None:
    quantized, lowered = lower(model, linear, embedding, tie_word_embeddings=tied)
    assert compare_logits(reference(quantized), logits(lowered)).kl < 2e-2
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []


def test_the_simulated_block_rounding_is_what_the_runtime_does(lower: Lower) -> None:
    """On one token: on longer texts, values on a rounding boundary may round differently."""
    quantized, lowered = lower()
    found = backend.load(lowered.artifact).prefill([7])
    simulated = score(quantized, [7], [0], partial(round_blocks_to_int8, block=32))[0]
    exact = score(quantized, [7], [0], None)[0]
    assert (found - simulated).norm() < 1e-4 * exact.norm() < (found - exact).norm()


@pytest.mark.parametrize("form", ["contrib", "portable"])
def test_half_precision_activations_keep_the_integers(form: str, lower: Lower) -> None:
    target = {"activations": "float16", "products": "float", "form": form}
    quantized, lowered = lower(target=target)
    assert compare_logits(reference(quantized), logits(lowered)).kl < 1e-4
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []


def test_schemes_may_differ_from_layer_to_layer(lower: Lower) -> None:
    overrides = {"*.0.self_attn.*": "int8", "*.1.*.v_*": "int4", "*.down_proj.weight": "float"}
    quantized, lowered = lower(target={"products": "float"}, overrides=overrides)
    assert (logits(lowered) - reference(quantized)).abs().max() < 2e-3
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []


def test_the_integers_of_the_onnx_and_of_the_pte_of_one_quantized_checkpoint_are_equal(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    quantized = finished_bundle.quantized
    ours = {
        name: weight
        for name, place, weight in backend.weights(
            lower_nano(finished_bundle, tmp_path / "onnx").artifact, quantized
        )
        if place == "filter"
    }
    compared = 0
    pte = finished_bundle.artifacts["executorch"].artifact
    for name, place, weight in executorch.weights(pte, quantized):
        if place == "filter" and isinstance(weight, QuantizedTensor):
            other = ours[name]
            assert isinstance(other, QuantizedTensor)
            assert torch.equal(weight.codes, other.codes)
            assert torch.equal(weight.scales, other.scales)
            compared += 1
    assert compared == len(ours) == 6 * 7 + 1


@pytest.mark.parametrize("form", ["contrib", "portable"])
def test_the_tied_embedding_is_in_the_files_once(
    form: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx", form=form, products="float")
    stored = finished_bundle.quantized.read(EMBEDDING)
    assert isinstance(stored, QuantizedTensor)
    model = onnx.load(str(lowered.artifact.path / GRAPH), load_external_data=False)
    places = Counter(
        {entry.key: entry.value for entry in tensor.external_data}["offset"]
        for tensor in model.graph.initializer
        if tensor.name.startswith(EMBEDDING) and "scales" not in tensor.name
    )
    assert list(places.values()) == [2]  # two tensors, one place


@pytest.mark.parametrize("form", ["contrib", "portable"])
def test_scales_are_stored_in_half_precision_and_widened_when_the_model_is_loaded(
    form: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    import onnxruntime

    lowered = lower_nano(finished_bundle, tmp_path / "onnx", form=form, products="float")
    path = lowered.artifact.path / GRAPH
    model = onnx.load(str(path), load_external_data=False)
    kinds = {
        tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith(".scales")
    }
    assert kinds == {onnx.TensorProto.FLOAT16}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    constants = {tensor.name for tensor in optimized.initializer}
    assert any(".scales" in name for name in constants)
    casts = [node for node in optimized.node if node.op_type == "Cast"]
    assert not constants & {name for node in casts for name in node.input}


@pytest.mark.parametrize(
    ("target", "linear"),
    [(one, "int4-g32") for one in FLOAT_FORMS],
    ids=["contrib", "portable"],
)
def test_a_prompt_read_in_chunks_gives_the_logits_of_one_read_at_once(
    target: dict[str, Any], linear: str, lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.backends.onnx import lowering

    _, lowered = lower(linear=linear, **target)
    whole = backend.load(lowered.artifact).prefill(tokens(41))
    monkeypatch.setattr(lowering, "CHUNK", 7)
    runner, calls = backend.load(lowered.artifact), list[int]()
    step = runner._step  # type: ignore[attr-defined]

    def counted(some: list[int]) -> torch.Tensor:
        calls.append(len(some))
        logits: torch.Tensor = step(some)
        return logits

    monkeypatch.setattr(runner, "_step", counted)
    torch.testing.assert_close(runner.prefill(tokens(41)), whole, rtol=1e-4, atol=1e-4)
    assert calls == [7, 7, 7, 7, 7, 6]


def test_mapped_tensors_begin_at_pages(finished_bundle: Bundle, tmp_path: Path) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx")
    model = onnx.load(str(lowered.artifact.path / GRAPH), load_external_data=False)
    offsets = [
        int({entry.key: entry.value for entry in tensor.external_data}["offset"])
        for tensor in model.graph.initializer
        if tensor.external_data
    ]
    assert len(offsets) > 20
    assert all(offset % 4096 == 0 for offset in offsets)


def test_the_portable_form_has_standard_operators_only_and_passes_the_checker(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx", form="portable", products="float")
    path = lowered.artifact.path / GRAPH
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert [domain.version for domain in model.opset_import] == [23]


def test_onnx_runtime_multiplies_by_the_weights_of_the_portable_form_as_they_are(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    """It dequantizes none of them: each becomes one MatMulNBits, the tied embedding included."""
    import onnxruntime

    for activations in ("float32", "float16"):
        folder, facts = tmp_path / activations, {"form": "portable", "products": "float"}
        lowered = lower_nano(finished_bundle, folder, activations=activations, **facts)
        graph = lowered.artifact.path / backend.main_file(lowered.artifact.files)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        kinds = Counter(node.op_type for node in optimized.graph.node)
        assert kinds["MatMulNBits"] == 6 * 7 + 1
        assert kinds["DequantizeLinear"] == kinds["MatMul"] == 0


def test_onnx_s_own_reference_evaluator_computes_the_portable_form(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx", form="portable", products="float")
    from onnx.reference import ReferenceEvaluator

    path = lowered.artifact.path / GRAPH
    evaluator = ReferenceEvaluator(onnx.load(str(path)))
    config = finished_bundle.quantized.config
    empty = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    feeds = {value: empty for value in evaluator.input_names if value.startswith("past")}
    text = [0, 50, 60, 70]
    found = evaluator.run(["logits"], {"input_ids": np.array([text]), **feeds})[0][0, -1]
    expected = score(finished_bundle.quantized, text, [len(text) - 1], None)[0]
    assert np.abs(found - expected.numpy()).max() < 1e-3


def test_the_contrib_form_merges_products_of_one_input(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx")
    model = onnx.load(str(lowered.artifact.path / GRAPH), load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["GroupQueryAttention"] == 6
    assert kinds["MatMulNBits"] == 6 * 4 + 1


def test_a_second_prefill_starts_a_new_text(finished_bundle: Bundle, tmp_path: Path) -> None:
    for form in ("contrib", "portable"):
        lowered = lower_nano(finished_bundle, tmp_path / form, form=form, products="float")
        runner = backend.load(lowered.artifact)
        first = runner.prefill([0, 40, 50])
        runner.decode(60)
        assert torch.equal(runner.prefill([0, 40, 50]), first)


def test_the_context_is_filled_to_the_last_position_and_no_further(lower: Lower) -> None:
    _, lowered = lower()
    runner = backend.load(lowered.artifact)
    runner.prefill(tokens(CONTEXT - 1))
    runner.decode(1)
    with pytest.raises(InputError, match="65 tokens do not fit into 64"):
        runner.decode(1)


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_flipped_bit_in_the_data_file_is_reported_with_its_tensor(
    part: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx")
    folder, name = lowered.artifact.path, "model.layers.3.feed_forward.down_proj.weight"
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    wanted = name if part == "codes" else f"{name}.scales"
    tensor = next(t for t in model.graph.initializer if t.name == wanted)
    if tensor.external_data:
        offset = int({e.key: e.value for e in tensor.external_data}["offset"])
        data = bytearray((folder / DATA).read_bytes())
        data[offset + 5] ^= 4
        (folder / DATA).write_bytes(data)
    else:
        raw = bytearray(tensor.raw_data)
        raw[5] ^= 4
        tensor.raw_data = bytes(raw)
        (folder / GRAPH).write_bytes(model.SerializeToString())
    checks = check_integers(finished_bundle.quantized, lowered, lambda name: None)
    failed = [check for check in checks if not check.passed]
    assert [(check.subject, check.value) for check in failed] == [(f"{name} (filter)", 1)]
    assert f"1 {part} differ" in failed[0].note


def test_a_truncated_data_file_is_found_before_the_runtime_opens_it(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx")
    data = lowered.artifact.path / DATA
    data.write_bytes(data.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"model_q4\.onnx_data.*sha256"):
        open_model(str(lowered.artifact.path), None)
    checks = check_integers(finished_bundle.quantized, lowered, lambda name: None)
    assert any("ends beyond the end" in check.note for check in checks)


@pytest.mark.parametrize(
    ("linear", "embedding", "activations", "name", "dtype"),
    [
        ("int4-g32", "int8", "float32", "model_q4", "q4"),
        ("float", "int4-g32", "float16", "model_q4f16", "q4f16"),
        ("int8", "float", "float32", "model_int8", "int8"),
        ("float", "float", "float32", "model", "fp32"),
        ("float", "float", "float16", "model_fp16", "fp16"),
    ],
)
def test_the_graph_has_the_name_that_transformers_js_asks_for(
    linear: str, embedding: str, activations: str, name: str, dtype: str, lower: Lower
) -> None:
    target = {"activations": activations, "products": "float"}
    _, lowered = lower(linear=linear, embedding=embedding, target=target)
    folder, files = lowered.artifact.path, lowered.artifact.files
    assert backend.main_file(files) == f"onnx/{name}.onnx"
    assert {one for one in files if one.startswith("onnx/")} == {
        f"onnx/{name}.onnx",
        f"onnx/{name}.onnx_data",
    }
    model = onnx.load(str(folder / "onnx" / f"{name}.onnx"), load_external_data=False)
    places = [one.value for t in model.graph.initializer for one in t.external_data[:1]]
    assert set(places) <= {f"{name}.onnx_data"}
    config = json.loads((folder / "config.json").read_text())
    expected = {"dtype": dtype, "use_external_data_format": True}
    assert config["transformers.js_config"] == expected
    assert logits(lowered).isfinite().all()


def test_config_json_has_the_shapes_of_the_cache_and_of_a_family_that_clients_know(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "onnx")
    config = json.loads((lowered.artifact.path / "config.json").read_text())
    own = finished_bundle.quantized.config
    model = onnx.load(str(lowered.artifact.path / GRAPH), load_external_data=False)
    cache = next(one for one in model.graph.input if one.name == "past_key_values.0.key")
    shape = [dim.dim_value for dim in cache.type.tensor_type.shape.dim]
    assert shape[1::2] == [config["num_key_value_heads"], config["head_dim"]]
    assert (config["model_type"], own.model_type) == ("qwen3", "llama4_text")
    assert config["max_position_embeddings"] == 512


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "genai_config.json"])
def test_a_changed_file_for_clients_is_a_difference(
    name: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    expected = lower_nano(finished_bundle, tmp_path / "onnx").artifact
    found = replace(expected, path=Path(shutil.copytree(expected.path, tmp_path / "changed")))
    assert list(backend.differences(found, expected)) == []
    content = json.loads((found.path / name).read_text())
    (found.path / name).write_text(json.dumps({**content, "auto_map": {"a": "evil.py"}}))
    assert [place for place, _ in backend.differences(found, expected)] == [f"{name}.auto_map"]


def test_the_portable_form_refuses_an_odd_number_of_int4_rows(lower: Lower) -> None:
    target = {"form": "portable", "products": "float"}
    with pytest.raises(InputError, match="95 rows, an odd number"):
        lower(target=target, vocab_size=95)
    quantized, lowered = lower(target=target, vocab_size=95, embedding="int8")
    text = [token % 95 for token in tokens(20)]
    found = run_teacher_forced(backend.load(lowered.artifact), text, (20,))
    assert (found - score(quantized, text, [19], None)).abs().max() < 2e-3


def test_the_portable_form_refuses_int8_products() -> None:
    target = backend.Target(form="portable", products="int8")
    config = open_checkpoint(Path(__file__).parent.parent / "examples/mobilellm-r1-nano").config
    with pytest.raises(InputError, match=r"products.*portable form leaves out"):
        backend.check(config, {}, target)


def test_the_ort_pair_runs_and_lists_its_operators(finished_bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime

    lowered = lower_nano(finished_bundle, tmp_path / "onnx", ort=True)
    folder = open_artifact(lowered.artifact.path).artifact.path
    operators = (folder / "onnx" / "model_q4.required_operators.config").read_text()
    assert "GroupQueryAttention" in operators
    assert "MatMulNBits" in operators
    session = onnxruntime.InferenceSession(folder / ORT)
    assert [value.name for value in session.get_inputs()][:1] == ["input_ids"]


def test_the_command_line_verifies_and_speaks_through_the_onnx_of_a_bundle(
    finished_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = pipeline.verify(finished_bundle.path, no_progress)
    targets = Counter(check.target for check in checks if check.check == "integers")
    assert all(check.passed for check in checks)
    assert targets["onnx"] == targets["executorch"] == 6 * 9 + 3
    question = "Ada has 12 eggs. Ada sells 5. How many eggs does Ada have now?"
    outcome = run(
        capsys, "generate", finished_bundle.path, "--target", "onnx", "--prompt", question
    )
    assert outcome.code == 0
    assert "12 - 5 = 7" in outcome.out


def test_two_lowerings_are_equal_to_the_last_byte(finished_bundle: Bundle, tmp_path: Path) -> None:
    first = lower_nano(finished_bundle, tmp_path / "a", ort=True)
    second = lower_nano(finished_bundle, tmp_path / "b", ort=True)
    assert first.manifest == second.manifest
