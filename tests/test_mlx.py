"""The MLX backend: the same integers, the reference's logits in MLX itself, and hostile folders."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from commands import contents, flip, run
from conftest import OLMO2, QWEN3, ROOT, MakeCheckpoint
from lowering import MODELS, SCHEMES, Lower, Weights, lower_with, tokens

from exporter import pipeline
from exporter.backends import check_runtime, parse_target
from exporter.backends import mlx as backend
from exporter.backends.mlx import running
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import Bundle
from exporter.errors import InputError, MissingExtraError
from exporter.evaluation.agreement import compare_logits
from exporter.inference.artifact_runner import ArtifactRunner
from exporter.inference.generation import Generation, Sampling
from exporter.inference.reference import ReferenceRunner, score
from exporter.model.checkpoint import open_checkpoint
from exporter.model.config import EMBEDDING
from exporter.pipeline import no_progress
from exporter.quantization.equivalent_checkpoint import as_equivalent
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor
from exporter.recipe import parse_recipe
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.checks import failures
from exporter.verification.integers import check_integers
from exporter.verification.runs import run_teacher_forced

CONTEXT = 64
#: Every family; widths that groups of 64 divide.
ALL = {**MODELS, "qwen3": QWEN3, "olmo2": OLMO2}
TYPES = ["float16", "bfloat16", "float32"]
#: Rows of two groups of 128.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    return lower_with(lower_once, {"target": "mlx", "max_context": CONTEXT}, ALL)


def lower_nano(bundle: Bundle, out: Path, **target: Any) -> FinishedArtifact:
    parsed = parse_target({"target": "mlx", "max_context": 512, **target}, "test")
    return pipeline.lower(bundle.quantized, parsed, out, no_progress)


@pytest.fixture
def nano_folder(finished_bundle: Bundle, tmp_path: Path) -> FinishedArtifact:
    """The demo lowered, to be changed."""
    return lower_nano(finished_bundle, tmp_path / "mlx")


def failed_integers(quantized: QuantizedCheckpoint, lowered: FinishedArtifact) -> list[Any]:
    return list(failures(check_integers(quantized, lowered, lambda _: None)))


def logits(lowered: FinishedArtifact) -> torch.Tensor:
    """After prefills of 1 and 5 tokens and 20 decode steps."""
    return run_teacher_forced(backend.load(lowered.artifact), tokens(25), (1, 5))


def reference(quantized: QuantizedCheckpoint) -> torch.Tensor:
    return score(quantized, tokens(25), [0, 4, *range(5, 25)])


def file_of(lowered: FinishedArtifact) -> Path:
    return lowered.artifact.path / "model.safetensors"


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and its header."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return 8 + size, json.loads(data[8 : 8 + size])


def flip_in(path: Path, tensor: str, byte: int, bit: int = 0) -> None:
    start, entries = header(path)
    flip(path, start + entries[tensor]["data_offsets"][0] + byte, bit)


def edit_config(lowered: FinishedArtifact, **changes: Any) -> None:
    path = lowered.artifact.path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Integers and logits.


@pytest.mark.parametrize(
    ("model", "tied", "linear", "embedding"),
    [
        *SCHEMES,
        *((family, tied, "int4-g32", "int8") for family in ("qwen3", "olmo2") for tied in (0, 1)),
    ],
)
def test_mlx_gives_the_references_logits_from_the_quantized_checkpoints_integers(
    model: str, tied: bool, linear: str, embedding: str, lower: Lower
) -> None:
    target = {"activations": "float32"}
    quantized, lowered = lower(model, linear, embedding, target, tie_word_embeddings=bool(tied))
    expected = reference(quantized)
    assert expected.std() > 1
    assert (logits(lowered) - expected).abs().max() < 2e-3
    assert failed_integers(quantized, lowered) == []


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("activations", TYPES)
def test_every_type_holds_the_same_integers_and_runs_as_float32(
    activations: str, model: str, lower: Lower
) -> None:
    quantized, lowered = lower(model, target={"activations": activations})
    assert (logits(lowered) - reference(quantized)).abs().max() < 2e-3
    assert failed_integers(quantized, lowered) == []
    kinds = {
        entry["dtype"] for name, entry in header(file_of(lowered))[1].items() if name[0] != "_"
    }
    assert kinds == {"U32", {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[activations]}


@pytest.mark.parametrize("changes", [{"use_qk_norm": False}, {"num_key_value_heads": 1}], ids=str)
def test_other_shapes_of_r1_are_the_same_models(changes: dict[str, Any], lower: Lower) -> None:
    quantized, lowered = lower(**changes)
    assert (logits(lowered) - reference(quantized)).abs().max() < 2e-3
    assert failed_integers(quantized, lowered) == []


def test_schemes_may_differ_from_layer_to_layer(lower: Lower) -> None:
    overrides = {"*.0.self_attn.*": "int8", "*.1.*.v_*": "int4", "*.down_proj.weight": "float"}
    quantized, lowered = lower(target={"activations": "bfloat16"}, overrides=overrides)
    assert (logits(lowered) - reference(quantized)).abs().max() < 2e-3
    assert failed_integers(quantized, lowered) == []
    config = json.loads((lowered.artifact.path / "config.json").read_text())
    stored = config["quantization"]
    assert (stored["group_size"], stored["bits"]) == (32, 4)
    assert stored["model.layers.0.self_attn.q_proj"] == {"group_size": 64, "bits": 8}
    assert stored["model.layers.1.self_attn.v_proj"] == {"group_size": 64, "bits": 4}
    assert stored["model.layers.0.mlp.down_proj"] is False
    assert "model.layers.1.self_attn.k_proj" not in stored
    assert config["quantization_config"] == stored


@pytest.mark.parametrize(("scheme", "group"), [("int4-g256", 128), ("int4", 128), ("int8", 128)])
def test_wide_groups_and_whole_rows_repeat_their_scale(
    scheme: str, group: int, lower: Lower
) -> None:
    quantized, lowered = lower("qwen3", scheme, scheme, **WIDE)
    config = json.loads((lowered.artifact.path / "config.json").read_text())
    assert config["quantization"]["group_size"] == group
    assert header(file_of(lowered))[1]["model.embed_tokens.scales"]["shape"] == [96, 2]
    assert (logits(lowered) - reference(quantized)).abs().max() < 2e-3
    assert failed_integers(quantized, lowered) == []


def test_mlx_s_own_dequantization_gives_code_times_scale_exactly(
    finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "mlx", activations="float32")
    model, arrays = as_equivalent(finished_bundle.quantized), mx.load(str(file_of(lowered)))
    compared = 0
    for name in model.schemes:
        weight = model.read(name)
        if not isinstance(weight, QuantizedTensor):
            continue
        parts = (
            arrays[name.removesuffix("weight") + part] for part in ("weight", "scales", "biases")
        )
        found = mx.dequantize(*parts, group_size=32, bits=4)
        assert torch.equal(torch.tensor(found.tolist()), weight.dequantize())
        compared += 1
    assert compared == 6 * 7 + 1


def test_a_word_has_eight_codes_from_the_lowest_bits(
    finished_bundle: Bundle, nano_folder: FinishedArtifact
) -> None:
    """Read as the format is specified, of a weight whose rows keep their order."""
    name = "model.layers.2.self_attn.o_proj.weight"
    start, entries = header(file_of(nano_folder))
    entry = entries[name]
    data = file_of(nano_folder).read_bytes()[start:][slice(*entry["data_offsets"])]
    words = struct.unpack(f"<{len(data) // 4}I", data)
    codes = [(word >> shift & 15) - 8 for word in words for shift in range(0, 32, 4)]
    weight = finished_bundle.quantized.read(name)
    assert isinstance(weight, QuantizedTensor)
    assert entry["dtype"] == "U32" and codes == weight.codes.flatten().tolist()


def test_a_tied_embedding_is_in_the_file_once(nano_folder: FinishedArtifact) -> None:
    names = header(file_of(nano_folder))[1]
    assert [name for name in names if "embed" in name or "head" in name] == [
        "model.embed_tokens.weight", "model.embed_tokens.scales", "model.embed_tokens.biases",
    ]  # fmt: skip


def test_greedy_tokens_are_those_of_torch(finished_bundle: Bundle, tmp_path: Path) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "mlx", activations="float32")
    runner = backend.load(lowered.artifact)
    torch_runner = ReferenceRunner(finished_bundle.quantized, 512)
    tokenizer = load_tokenizer(lowered.artifact.path)
    prompts = [
        tokenizer.prompt_text(f"Ada has {n} eggs. Ada finds 7 more. How many?", raw=False)
        for n in (3, 14, 159, 265)
    ]
    for text in [*prompts, "Every evening the boats came home."]:
        ids = tokenizer.encode(text)
        found = list(Generation(runner, ids, (), Sampling(64)))
        assert found == list(Generation(torch_runner, ids, (), Sampling(64)))
        assert len(found) == 64 and len(set(found)) > 5


def test_two_lowerings_are_equal_to_the_last_byte(finished_bundle: Bundle, tmp_path: Path) -> None:
    for name in ("a", "b"):
        lower_nano(finished_bundle, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_config_json_says_which_checkpoint_it_is_and_which_tokens_end_a_text(
    finished_bundle: Bundle, nano_folder: FinishedArtifact
) -> None:
    config = json.loads((nano_folder.artifact.path / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["eos_token_id"] == [1, 2, 3]
    assert config["mobilellm_exporter"] == {
        "quantized_sha256": nano_folder.manifest["quantized"],
        "license": "bsd-3-clause",
    }


# Commands.


def test_a_bundle_is_verified_and_speaks_and_is_evaluated(
    nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {
        "name": "nano",
        "quantization": {"linear": "int4-g32", "embedding": "int8", "method": "absmax"},
        "targets": [{"target": "mlx", "max_context": 512}],
    }
    bundle = tmp_path / "bundle"
    result = pipeline.export(parse_recipe(raw, "t"), open_checkpoint(nano), bundle, no_progress)
    assert result.bundle is not None, list(failures(result.checks))
    checks = pipeline.verify(bundle, no_progress)
    assert list(failures(checks)) == []
    assert {"integers", "derived", "range", "logits.kl", "logits.top1"} <= {c.check for c in checks}
    [kl] = [check.value for check in checks if check.check == "logits.kl"]
    assert 0 < kl < 1e-8
    question = "Ada has 12 eggs. Ada finds 7 more. Ada sells 5. How many eggs does Ada have now?"
    outcome = run(capsys, "generate", bundle, "--prompt", question)
    assert outcome.code == 0 and "boxed{14}" in outcome.out
    figures = [
        run(
            capsys, "evaluate", bundle / part, "--data", ROOT / "README.md", "--max-tokens", 256,
            "--sequence-length", 128, "--reference", nano, "--json",
        ).json
        for part in ("mlx", "quantized")
    ]  # fmt: skip
    for name in ("tokens", "perplexity", "kl", "top1_agreement"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3), name
    assert figures[0]["tokens"] == 254


@pytest.mark.parametrize("activations", TYPES)
@pytest.mark.parametrize(("linear", "embedding"), [("int4-g32", "int4-g32"), ("int4", "int8")])
def test_the_file_is_predicted_within_a_thousandth(
    linear: str, embedding: str, activations: str, lower: Lower
) -> None:
    quantized, lowered = lower("llama", linear, embedding, {"activations": activations})
    predicted = backend.predict(quantized.config, quantized.schemes, lowered.artifact.target)
    real = file_of(lowered).stat().st_size
    assert abs(predicted.file - real) < max(0.001 * real, 300)
    cache = 2 * 2 * CONTEXT * 2 * 16 * (4 if activations == "float32" else 2)
    assert predicted.kv_cache == cache


# The runner.


def test_a_prompt_in_chunks_gives_the_same_logits(
    finished_bundle: Bundle, nano_folder: FinishedArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, text = backend.load(nano_folder.artifact), tokens(40)
    expected = runner.prefill(text)
    monkeypatch.setattr(running, "_CHUNK", 7)
    assert torch.allclose(runner.prefill(text), expected, atol=1e-4)
    assert compare_logits(expected[None], runner.prefill(text)[None]).kl < 1e-9


def test_a_second_prefill_starts_a_new_text(lower: Lower) -> None:
    runner = backend.load(lower()[1].artifact)
    first = runner.prefill([0, 40, 50])
    runner.decode(60)
    assert torch.equal(runner.prefill([0, 40, 50]), first)


def test_the_context_is_filled_to_the_last_position_and_no_further(lower: Lower) -> None:
    runner = backend.load(lower()[1].artifact)
    runner.prefill(tokens(CONTEXT - 1))
    runner.decode(1)
    with pytest.raises(InputError, match="65 tokens do not fit into 64"):
        runner.decode(1)
    with pytest.raises(InputError, match="65 tokens do not fit into 64"):
        runner.prefill(tokens(CONTEXT + 1))


@pytest.mark.parametrize("token", [-1, 96])
def test_a_token_outside_the_vocabulary_is_refused(token: int, lower: Lower) -> None:
    """MLX itself would read memory beyond the embedding."""
    runner = backend.load(lower()[1].artifact)
    with pytest.raises(InputError, match="outside the vocabulary of 96"):
        runner.prefill([1, token])


# Refusals.


def test_rows_that_no_group_divides_are_refused_before_any_work(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(base=QWEN3, intermediate_size=72))
    raw = {
        "name": "t",
        "quantization": {"linear": "int4", "embedding": "int4"},
        "targets": [{"target": "mlx", "max_context": 64}],
    }
    with pytest.raises(InputError, match="rows of 72 codes") as raised:
        pipeline.export(parse_recipe(raw, "t"), checkpoint, tmp_path / "out", no_progress)
    assert raised.value.subject == "model.layers.0.mlp.down_proj.weight: int4"
    assert raised.value.remedy == "Use float for it"
    assert not (tmp_path / "out").exists()


def test_a_bias_that_float16_does_not_hold_is_refused_with_its_weight(lower: Lower) -> None:
    def change(weights: Weights) -> None:
        weights[Q_PROJ] *= 1e6

    with pytest.raises(InputError, match="-128 times a scale, which float16 does not") as raised:
        lower(linear="int8", change=change)
    assert raised.value.subject == Q_PROJ
    assert "bfloat16 or float32" in raised.value.remedy
    quantized, lowered = lower(linear="int8", change=change, target={"activations": "bfloat16"})
    assert failed_integers(quantized, lowered) == []


def test_a_norm_that_float16_does_not_hold_is_refused_with_its_name(lower: Lower) -> None:
    """MLX would compute everything after a float32 norm in float32."""

    def change(weights: Weights) -> None:
        weights["model.norm.weight"][5] = 2.0**-22 + 2.0**-28

    with pytest.raises(InputError, match="float16 does not hold 1 of its 64 values") as raised:
        lower(change=change)
    assert raised.value.subject == "model.norm.weight"
    assert raised.value.remedy == "Set the target's activations to bfloat16 or float32"


def test_a_lowering_needs_no_mlx_and_running_names_the_extra(
    finished_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys; sys.modules['mlx'] = sys.modules['mlx_lm'] = None; "
        "from exporter.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "lower", str(finished_bundle.quantized.path)]
    made = subprocess.run(
        [*command, "--target", "mlx", "-o", str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MissingExtraError, match=r"mlx_lm.*exporter\[mlx\]"):
        check_runtime("mlx")


# Damaged and hostile folders.


@pytest.mark.parametrize(
    ("tensor", "subject", "note"),
    [
        ("weight", f"{Q_PROJ} ({Q_PROJ})", "1 codes differ"),
        ("scales", f"{Q_PROJ} ({Q_PROJ})", "1 scales differ"),
        ("biases", Q_PROJ, "1 biases differ; at [0, 2] the file has"),
    ],
)
@pytest.mark.parametrize("activations", TYPES)
def test_a_flipped_bit_is_reported_with_its_tensor(
    tensor: str, subject: str, note: str, activations: str, finished_bundle: Bundle, tmp_path: Path
) -> None:
    lowered = lower_nano(finished_bundle, tmp_path / "mlx", activations=activations)
    width = 4 if activations == "float32" or tensor == "weight" else 2
    last = {"float16": 1, "bfloat16": 1, "float32": 3}[activations] if tensor != "weight" else 0
    place = Q_PROJ.removesuffix("weight") + tensor
    flip_in(file_of(lowered), place, 2 * width + last, bit=1)
    found = failed_integers(finished_bundle.quantized, lowered)
    assert [(check.subject, note in check.note) for check in found][:1] == [(subject, True)]
    assert {check.subject for check in found} <= {subject, Q_PROJ}
    expected = lower_nano(finished_bundle, tmp_path / "expected", activations=activations)
    [(where, what)] = backend.differences(lowered.artifact, expected.artifact)
    assert where == f"model.safetensors: {place}" and "1 of" in what


def test_a_repeated_scale_that_differs_is_reported(lower: Lower) -> None:
    quantized, lowered = lower("qwen3", "int8", "int8", fresh=True, **WIDE)
    flip_in(file_of(lowered), "model.layers.0.mlp.up_proj.scales", 2 + 1)  # of the second group
    found = failed_integers(quantized, lowered)
    assert {check.subject for check in found} == {"model.layers.0.mlp.up_proj.weight"}
    assert "1 groups have several scales, and int8 has one" in found[0].note


def test_a_norm_of_r1_that_is_not_ones_is_reported(
    finished_bundle: Bundle, nano_folder: FinishedArtifact
) -> None:
    name = "model.layers.4.self_attn.k_norm.weight"
    flip_in(file_of(nano_folder), name, 11)
    [found] = failed_integers(finished_bundle.quantized, nano_folder)
    assert found.subject == name and "not all ones" in found.note


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"rope_theta": 8000001.0}, "rope_theta"),
        ({"rms_norm_eps": 1.1e-5}, "rms_norm_eps"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization.group_size"),
        ({"quantize_activations": True}, "quantize_activations"),
        ({"mobilellm_exporter": {}}, "mobilellm_exporter.quantized_sha256"),
    ],
    ids=str,
)
def test_a_changed_value_of_config_json_is_named(
    changes: dict[str, Any], place: str, finished_bundle: Bundle, nano_folder: FinishedArtifact,
    tmp_path: Path,
) -> None:  # fmt: skip
    expected = lower_nano(finished_bundle, tmp_path / "expected")
    assert list(backend.differences(nano_folder.artifact, expected.artifact)) == []
    edit_config(nano_folder, **changes)
    found = dict(backend.differences(nano_folder.artifact, expected.artifact))
    assert f"config.json.{place}" in found


def test_another_template_and_other_metadata_are_named(
    finished_bundle: Bundle, nano_folder: FinishedArtifact, tmp_path: Path
) -> None:
    expected = lower_nano(finished_bundle, tmp_path / "expected")
    path = nano_folder.artifact.path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "!"}))
    data = file_of(nano_folder).read_bytes()
    file_of(nano_folder).write_bytes(data.replace(b'"format":"mlx"', b'"format":"mlX"'))
    found = [place for place, _ in backend.differences(nano_folder.artifact, expected.artifact)]
    assert found == ["tokenizer_config.json.chat_template", "model.safetensors.metadata.format"]


def test_a_folder_cannot_run_its_own_python(nano_folder: FinishedArtifact, tmp_path: Path) -> None:
    """mlx-lm imports the file that ``model_file`` names, if it may."""
    ran = tmp_path / "ran"
    (nano_folder.artifact.path / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    edit_config(nano_folder, model_file="evil.py")
    with pytest.raises(InputError, match=r"model_file.*is not in the derived model"):
        backend.load(nano_folder.artifact)
    with pytest.raises(InputError, match="model_file"):
        ArtifactRunner(nano_folder.artifact).prefill([0])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "deepseek_v3"}, "model_type.*not supported"),
        ({"model_type": "llama4_text"}, "no_rope_layers|model_type"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"dtype": "float64"}, "dtype.*not one of"),
        ({"dtype": None}, "dtype.*not one of"),
        ({"num_hidden_layers": 5}, "does not belong to this model"),
        ({"num_hidden_layers": 7}, r"model\.layers\.6.*is missing"),
        ({"vocab_size": 513}, r"embed_tokens\.weight.*is U32\[512, 24\].*needs U32\[513, 24\]"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"quantization": None}, "quantization"),
        ({"quantization": []}, "quantization.*not an object"),
        ({"quantization": {"group_size": 32.0, "bits": 4}}, "quantization.group_size"),
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "quantization.mode"),
        ({"quantization": {"group_size": 16, "bits": 4}}, "not a way to store"),
        ({"quantization": {"group_size": 32, "bits": {}}}, "not a way to store"),
        ({"quantization": {"group_size": 128, "bits": 4}}, "do not divide rows of 192"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantization_config"),
        ({"eos_token_id": ["<end>"]}, "eos_token_id.*is not an id"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight.*is missing"),
    ],
    ids=str,
)
def test_what_we_do_not_write_is_refused_before_mlx_reads_it(
    changes: dict[str, Any], problem: str, nano_folder: FinishedArtifact
) -> None:
    edit_config(nano_folder, **changes)
    with pytest.raises(InputError, match=problem):
        backend.load(nano_folder.artifact)


@pytest.mark.parametrize("name", ["model-2.safetensors", "hf_quant_config.json"])
def test_files_that_mlx_would_read_besides_are_refused(
    name: str, nano_folder: FinishedArtifact
) -> None:
    path = nano_folder.artifact.path / name
    path.write_bytes(file_of(nano_folder).read_bytes())
    with pytest.raises(InputError, match="does not belong to this folder") as raised:
        backend.load(nano_folder.artifact)
    assert raised.value.subject == str(path)


def test_the_weights_of_another_model_are_refused(
    finished_bundle: Bundle, nano_folder: FinishedArtifact
) -> None:
    other = replace(
        finished_bundle.quantized, config=replace(finished_bundle.quantized.config, rope_theta=1e4)
    )
    with pytest.raises(InputError, match=r"rope_theta.*is 8000000\.0, and the model's is 10000\.0"):
        list(backend.weights(nano_folder.artifact, other))


def places(path: Path) -> Iterator[tuple[int, int]]:
    """Bits all over a file: of its header one of every 97, and some of its data."""
    start, _ = header(path)
    yield from ((offset, offset % 8) for offset in range(0, start, 97))
    yield from ((offset, offset % 8) for offset in range(start, path.stat().st_size, 300_007))


def test_every_flipped_bit_of_the_file_is_named_or_refused_or_has_no_effect(
    finished_bundle: Bundle, nano_folder: FinishedArtifact, tmp_path: Path
) -> None:
    expected = lower_nano(finished_bundle, tmp_path / "expected")
    path, unnamed = file_of(nano_folder), []
    whole = path.read_bytes()
    tried = list(places(path))
    for offset, bit in tried:
        flip(path, offset, bit)
        try:
            if not list(backend.differences(nano_folder.artifact, expected.artifact)):
                unnamed.append((offset, bit))
        except InputError:
            pass
        path.write_bytes(whole)
    assert len(tried) > 150
    runner = backend.load(expected.artifact)
    wanted = runner.prefill([0, 50, 60])
    for offset, bit in unnamed:  # such as a space of the padding
        flip(path, offset, bit)
        assert torch.equal(backend.load(nano_folder.artifact).prefill([0, 50, 60]), wanted)
        path.write_bytes(whole)


def test_an_embedding_stored_with_other_bits_is_not_the_checkpoints(
    finished_bundle: Bundle, nano: Path, tmp_path: Path
) -> None:
    raw = {
        "name": "t",
        "quantization": {"linear": "int4-g32", "embedding": "int8", "method": "absmax"},
        "targets": [{"target": "mlx", "max_context": 512}],
    }
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(recipe, open_checkpoint(nano), tmp_path / "q", no_progress)
    assert quantized is not None
    lowered = pipeline.lower(quantized, recipe.targets[0], tmp_path / "a", no_progress)
    found = failed_integers(finished_bundle.quantized, lowered)
    assert found[0].subject == EMBEDDING and "8 bits in groups of 64" in found[0].note
