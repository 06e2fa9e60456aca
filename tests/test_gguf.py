"""GGUF: exact codes and scales, metadata, every family in llama.cpp, and what is refused."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from clients.rows import PROMPTS
from commands import run
from conftest import FAMILIES, LLAMA, LLAMA4, MakeCheckpoint, random_weights
from lowering import MODELS, SCHEMES, Lower, check_logits, lowered_in, tokens
from simulation import Simulation, greedy
from torch import Tensor

from exporter import pipeline
from exporter.backends import gguf as backend
from exporter.backends.gguf import blocks
from exporter.backends.gguf.contents import open_contents
from exporter.bundle.artifact import FinishedArtifact, open_artifact
from exporter.errors import InputError, MissingExtraError
from exporter.inference.loaded_model import open_model
from exporter.inference.reference import ReferenceRunner
from exporter.model.checkpoint import open_checkpoint
from exporter.pipeline import no_progress
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme, parse_scheme
from exporter.recipe import parse_recipe
from exporter.text.tokenizer import load_tokenizer
from exporter.verification.checks import failures
from exporter.verification.integers import check_integers
from exporter.verification.runs import Text

CONTEXT = 64
INT4 = {"linear": "int4-g32", "embedding": "int4-g32"}
#: Every family, with and without what distinguishes its members.
MEMBERS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "llama4_text without q/k norm": {**LLAMA4, "use_qk_norm": False},
    "llama, tied": {**LLAMA, "tie_word_embeddings": True},
    "olmo2, tied": {**FAMILIES["olmo2"], "tie_word_embeddings": True},
    "qwen3, untied": {**FAMILIES["qwen3"], "tie_word_embeddings": False},
}
EACH_MEMBER = pytest.mark.parametrize("member", MEMBERS)


def target(**options: Any) -> dict[str, Any]:
    return {"target": "gguf", "max_context": CONTEXT, **options}


def read_with_the_gguf_package(finished: FinishedArtifact) -> dict[str, np.ndarray]:
    """Every tensor dequantized by the package that llama.cpp itself is converted with."""
    reader = gguf.GGUFReader(finished.artifact.path / "model.gguf")
    return {
        one.name: gguf.dequantize(one.data, one.tensor_type).reshape(list(reversed(one.shape)))
        for one in reader.tensors
    }


def halves_first(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head: even ones, then odd ones, as Qwen3 has those of Llama 4."""
    heads = weight.unflatten(0, (-1, head_dim))
    return torch.cat((heads[:, 0::2], heads[:, 1::2]), 1).flatten(0, 1)


# The weights.


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("int4-g32", "Q4_0"), ("int4-g64", "Q4_0"), ("int4", "Q4_0"), ("int8", "Q8_0"),
        ("int8-g32", "Q8_0"), ("int8-g64", "Q8_0"), ("float", "F32"),
    ],
)  # fmt: skip
def test_the_gguf_package_dequantizes_exactly_our_weights(
    scheme: str, kind: str, lower_once: Lower
) -> None:
    config = MODELS["llama4_text"]
    quantized, finished = lower_once(config, target(), {"linear": scheme, "embedding": scheme})
    found = read_with_the_gguf_package(finished)
    head_dim = config["head_dim"]
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
        "model.layers.1.feed_forward.gate_proj.weight": "blk.1.ffn_gate.weight",
        "model.layers.1.feed_forward.up_proj.weight": "blk.1.ffn_up.weight",
        "model.layers.1.feed_forward.down_proj.weight": "blk.1.ffn_down.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for name, tensor in names.items():
        weight = quantized.float_weight(name)
        if "q_proj" in name or "k_proj" in name:
            weight = halves_first(weight, head_dim)
        assert np.array_equal(found[tensor], weight.numpy()), tensor
    for norm in ("attn_q_norm", "attn_k_norm"):
        assert np.array_equal(found[f"blk.1.{norm}.weight"], np.ones(head_dim, np.float32))
    assert "output.weight" not in found
    stored = open_contents(finished.artifact.path / "model.gguf").tensors
    kinds = {tensor.type.name for tensor in stored.values() if len(tensor.shape) == 2}
    assert kinds == {kind}


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 128), Scheme(4), Scheme(8)], ids=str)
def test_blocks_hold_every_code_and_scale(scheme: Scheme) -> None:
    low, high = scheme.code_range
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, (6, 256), generator=generator).to(torch.int8)
    codes[0, : high - low + 1] = torch.arange(low, high + 1)[:256]
    scales = torch.rand(scheme.scale_shape((6, 256)), generator=generator).half().float()
    found, unequal = blocks.unpack(blocks.pack(QuantizedTensor(codes, scales, scheme)), scheme)
    assert unequal is None
    assert torch.equal(found.codes, codes) and torch.equal(found.scales, scales)


def test_a_nibble_is_where_llama_cpp_reads_it() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, 3], codes[0, 19] = -8, 7
    block = blocks.pack(QuantizedTensor(codes, torch.tensor([[0.5]]), Scheme(4, 32)))[0, 0]
    assert block[:2].view(torch.float16).item() == 0.5
    assert block[2 + 3].item() == 0xF0  # -8 + 8 in the low nibble, 7 + 8 in the high one
    assert set(block[2:5].tolist()) == {0x88}


@pytest.mark.parametrize(("model", "tied", "linear", "embedding"), SCHEMES)
def test_codes_scales_and_logits_are_verified_for_every_scheme(
    model: str, tied: bool, linear: str, embedding: str, lower_once: Lower
) -> None:
    config = {**MODELS[model], "tie_word_embeddings": tied}
    schemes = {"linear": linear, "embedding": embedding}
    quantized, finished = lower_once(config, target(), schemes)
    text = Text(tuple(tokens(CONTEXT)), "random tokens", False)
    checks = check_integers(quantized, finished, lambda _: None)
    assert len(checks) == len(quantized.schemes)
    assert list(failures(checks + check_logits(quantized, finished, text))) == []


def test_a_flipped_bit_is_named_with_its_weight(lower_once: Lower) -> None:
    schemes = {"linear": "int4-g64", "embedding": "int8"}
    quantized, finished = lower_once(MODELS["llama4_text"], target(), schemes, fresh=True)
    path = finished.artifact.path / "model.gguf"
    contents, whole = open_contents(path), path.read_bytes()
    flips = {
        # Code 2 of row 0 is in the low nibble of byte 2; row 1 of a head is row 2 of ours.
        ("blk.0.attn_q.weight", 2 + 2): "model.layers.0.self_attn.q_proj.weight",
        ("blk.1.ffn_down.weight", 0): "model.layers.1.feed_forward.down_proj.weight",
        ("blk.1.attn_norm.weight", 1): "model.layers.1.input_layernorm.weight",
        ("token_embd.weight", 5): "model.embed_tokens.weight",
    }
    for (tensor, offset), name in flips.items():
        data = bytearray(whole)
        data[contents.tensors[tensor].offset + offset] ^= 1
        path.write_bytes(data)
        [check] = failures(check_integers(quantized, finished, lambda _: None))
        assert check.subject.startswith(f"{name} ({tensor}"), check
        if tensor == "blk.1.ffn_down.weight":  # one of the two scales that a group of 64 has
            assert "whose blocks in group [0, 0] have unequal scales" in check.subject
        else:
            assert check.note.startswith("1 ")


def test_a_norm_that_is_not_ones_is_named(lower_once: Lower) -> None:
    quantized, finished = lower_once(MODELS["llama4_text"], target(), INT4, fresh=True)
    path = finished.artifact.path / "model.gguf"
    place = open_contents(path).tensors["blk.1.attn_k_norm.weight"].offset
    data = bytearray(path.read_bytes())
    data[place + 1] ^= 1
    path.write_bytes(data)
    [check] = failures(check_integers(quantized, finished, lambda _: None))
    assert "blk.1.attn_k_norm.weight" in check.subject and "is not ones" in check.note


def test_two_lowerings_give_the_same_bytes(tmp_path: Path) -> None:
    written = [
        lowered_in(tmp_path / name, LLAMA4, target(), INT4)[1].artifact.path / "model.gguf"
        for name in ("one", "two")
    ]
    assert written[0].read_bytes() == written[1].read_bytes()


# The metadata.


def test_the_metadata_describe_model_licence_and_source(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(LLAMA4)
    (checkpoint / "README.md").write_text(
        "---\nlicense: other\nlicense_name: fair-noncommercial-research\n"
        "license_link: https://example.org/licence\n---\n"
    )
    options = target(name="A model", base_model="facebook/MobileLLM-R1-140M")
    raw = {"name": "t", "quantization": INT4, "targets": [options]}
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(recipe, open_checkpoint(checkpoint), tmp_path / "q", no_progress)
    assert quantized is not None
    finished = pipeline.lower(quantized, recipe.targets[0], tmp_path / "a", no_progress)
    metadata = open_contents(finished.artifact.path / "model.gguf").metadata
    found = {key: value.value for key, value in metadata.items()}
    epsilon = found.pop("qwen3.attention.layer_norm_rms_epsilon")
    assert epsilon == np.float32(1e-5)
    assert found == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "A model",
        "general.license": "other",
        "general.license.name": "fair-noncommercial-research",
        "general.license.link": "https://example.org/licence",
        "general.base_model.count": 1,
        "general.base_model.0.name": "MobileLLM-R1-140M",
        "general.base_model.0.organization": "facebook",
        "general.base_model.0.repo_url": "https://huggingface.co/facebook/MobileLLM-R1-140M",
        "general.quantization_version": 2,
        "general.file_type": 2,  # MOSTLY_Q4_0
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 3,
        "qwen3.attention.head_count_kv": 1,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 8000000.0,
        "qwen3.vocab_size": 96,
        "mobilellm.max_context": CONTEXT,
        "mobilellm.quantized_sha256": finished.manifest["quantized"],
        "tokenizer.ggml.model": "none",
    }


# Every family in llama.cpp.


@EACH_MEMBER
def test_float_activations_give_the_greedy_tokens_of_torch(member: str, lower_once: Lower) -> None:
    """The equivalent model is the same function: logits agree to the last bits of float32."""
    schemes = {"linear": "float", "embedding": "float"}
    quantized, finished = lower_once(MEMBERS[member], target(cache="float32"), schemes)
    runner, reference = backend.load(finished.artifact), ReferenceRunner(quantized, CONTEXT)
    prompt = tokens(9)
    chosen, logits = greedy(runner, prompt, CONTEXT - len(prompt))
    expected, reference_logits = greedy(reference, prompt, CONTEXT - len(prompt))
    assert chosen == expected and len(set(chosen)) > 4
    assert float((logits - reference_logits).abs().max()) < 5e-5


@EACH_MEMBER
def test_every_family_is_verified_with_integers(member: str, lower_once: Lower) -> None:
    quantized, finished = lower_once(MEMBERS[member], target(), INT4)
    text = Text(tuple(tokens(CONTEXT)), "random tokens", False)
    checks = check_integers(quantized, finished, lambda _: None)
    assert list(failures(checks + check_logits(quantized, finished, text))) == []


@pytest.mark.parametrize("floats", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_floats_of_every_type_are_verified(floats: str, cache: str, tmp_path: Path) -> None:
    def representable(weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if weight.ndim == 2:  # multiples of 1/64: exact in float16 and in bfloat16
                weights[name] = ((weight.float() * 64).round() / 64).to(torch.bfloat16)

    options, schemes = target(floats=floats, cache=cache), {"linear": "float", "embedding": "float"}
    quantized, finished = lowered_in(tmp_path, LLAMA4, options, schemes, representable)
    text = Text(tuple(tokens(CONTEXT)), "random tokens", False)
    checks = check_integers(quantized, finished, lambda _: None)
    assert list(failures(checks + check_logits(quantized, finished, text))) == []


def test_a_prompt_longer_than_a_chunk_is_read_whole(lower_once: Lower) -> None:
    config = {**LLAMA4, "max_position_embeddings": 1024, "attention_chunk_size": 1024}
    options = {**target(cache="float32"), "max_context": 600}
    schemes = {"linear": "float", "embedding": "float"}
    quantized, finished = lower_once(config, options, schemes)
    prompt = tokens(599)
    found = backend.load(finished.artifact).prefill(prompt)
    expected = ReferenceRunner(quantized, 600).prefill(prompt)
    assert float((found - expected).abs().max()) < 1e-4


# The rounding of activations, on the demo.

STEPS = 64


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("demo")
    raw = {"name": "demo", "quantization": INT4, "targets": [{"target": "gguf"}]}
    recipe = parse_recipe(raw, "a test")
    quantized = pipeline.quantize(recipe, open_checkpoint(nano), folder / "q", no_progress)
    assert quantized is not None
    finished = pipeline.lower(quantized, recipe.targets[0], folder / "a", no_progress)
    yield quantized, finished


def against_the_simulation(
    quantized: QuantizedCheckpoint, finished: FinishedArtifact
) -> tuple[Simulation, list[str]]:
    """The greedy tokens of an artifact after each prompt, and what rounding does not explain."""
    tokenizer, runner = load_tokenizer(quantized.path), backend.load(finished.artifact)
    rounding = backend.rounding(quantized.schemes, backend.Target(), 0)
    simulation = Simulation(quantized, rounding, finished.artifact.target.max_context)
    unexplained = list[str]()
    for prompt in PROMPTS:
        ids = tokenizer.encode(tokenizer.prompt_text(prompt, raw=False))
        unexplained += simulation.unexplained(ids, *greedy(runner, ids, STEPS))
    return simulation, unexplained


def test_greedy_tokens_are_those_of_the_simulated_rounding(demo: Any) -> None:
    simulation, unexplained = against_the_simulation(*demo)
    assert unexplained == []
    assert simulation.total == len(PROMPTS) * STEPS
    assert simulation.same > 0.95 * simulation.total


def test_an_artifact_with_other_scales_is_not_explained_by_rounding(
    demo: Any, tmp_path: Path
) -> None:
    quantized, finished = demo
    path = tmp_path / "model.gguf"
    data = bytearray((finished.artifact.path / "model.gguf").read_bytes())
    tensor = open_contents(finished.artifact.path / "model.gguf").tensors["blk.2.ffn_up.weight"]
    for place in range(tensor.offset, tensor.offset + tensor.bytes, 18):
        data[place + 1] += 1  # each scale is 1.2 to 1.5 times as large
    path.write_bytes(data)
    changed = replace(finished, artifact=replace(finished.artifact, path=tmp_path))
    _, unexplained = against_the_simulation(quantized, changed)
    assert any("KL" in line for line in unexplained)


def test_the_simulated_rounding_is_that_of_ggml(demo: Any) -> None:
    """A product of one block: its result tells code and scale of each activation."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)) * 3
    x[0, :32] = 0
    rounding = backend.rounding({"w": Scheme(4, 32)}, backend.Target(), 0)
    assert rounding is not None
    blocks_of = x.view(5, 2, 32)
    scale = (blocks_of.abs().amax(-1, keepdim=True) / 127).half().float()
    packed = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    theirs = gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    found = rounding(x)
    # The package rounds halves away from zero, and here are none.
    assert torch.equal(found, torch.from_numpy(theirs))
    assert float((found - x).view(5, 2, 32).abs().amax() / scale.amax()) <= 0.51


# What is refused.


def test_rows_that_are_no_whole_blocks_are_refused_by_name(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    config = {**LLAMA, "intermediate_size": 72}
    checkpoint = open_checkpoint(make_checkpoint(config))
    raw = {
        "name": "t",
        "quantization": {"linear": "int8", "embedding": "int8"},
        "targets": [target()],
    }
    recipe = parse_recipe(raw, "t")
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down_proj.*not whole blocks of 32"):
        pipeline.export(recipe, checkpoint, tmp_path / "out", no_progress)
    assert not (tmp_path / "out").exists()
    quantized = pipeline.quantize(recipe, checkpoint, tmp_path / "quantized", no_progress)
    assert quantized is not None
    with pytest.raises(InputError, match=r"Use float for it"):
        pipeline.lower(quantized, recipe.targets[0], tmp_path / "artifact", no_progress)


@pytest.mark.parametrize("floats", ["float16", "bfloat16"])
def test_a_float_that_the_type_cannot_hold_is_refused_by_name(
    floats: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    weights = random_weights(LLAMA4, torch.float32)
    for name, weight in weights.items():
        if weight.ndim == 2:
            weights[name] = (weight * 64).round() / 64
    weights["model.layers.1.self_attn.v_proj.weight"][3, 5] = 1 + 2.0**-13
    checkpoint = open_checkpoint(make_checkpoint(LLAMA4, weights=weights))
    schemes = {"linear": "float", "embedding": "float"}
    raw = {"name": "t", "quantization": schemes, "targets": [target(floats=floats)]}
    recipe = parse_recipe(raw, "t")
    quantized = pipeline.quantize(recipe, checkpoint, tmp_path / "q", no_progress)
    assert quantized is not None
    with pytest.raises(InputError) as raised:
        pipeline.lower(quantized, recipe.targets[0], tmp_path / "a", no_progress)
    assert raised.value.subject == "model.layers.1.self_attn.v_proj.weight: float"
    assert raised.value.problem == f"1 of its values are no {floats}, such as 1.0001220703125"
    assert not (tmp_path / "a" / "model.gguf").exists()


def test_what_llama_cpp_does_not_have_is_refused() -> None:
    from exporter.model.config import parse_config

    def check(config: dict[str, Any], **options: Any) -> None:
        parsed = parse_config(config, Path("config.json"))
        schemes = dict.fromkeys(parsed.parameter_shapes(), parse_scheme("float", ""))
        backend.check(parsed, schemes, backend.Target(**options))

    check(FAMILIES["olmo2"], max_context=64)
    with pytest.raises(InputError, match="head_dim: 32 is not hidden_size / num_attention_heads"):
        check({**FAMILIES["olmo2"], "head_dim": 32}, max_context=64)
    with pytest.raises(InputError, match="max_context"):
        check(LLAMA4, max_context=257)
    for name in ("My-Phi-3", "phi3", "Modern-BERT"):
        with pytest.raises(InputError, match=f"name: {name}: llama.cpp reads the tokenizer"):
            check(LLAMA4, name=name, max_context=64)
    check(LLAMA4, name="MobileLLM-R1-140M", max_context=64)


def test_llama_cpp_names_what_it_refuses(lower_once: Lower, tmp_path: Path) -> None:
    _, finished = lower_once(LLAMA4, target(), INT4)
    data = (finished.artifact.path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data.replace(b"blk.1.ffn_up", b"blk.1.ffn_oh"))
    with pytest.raises(InputError, match=r"cannot load it .*blk\.1\.ffn_up\.weight"):
        backend.load(replace(finished.artifact, path=tmp_path))


# Without llama.cpp.


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)


def export_tiny(checkpoint: Path, out: Path, store: Path) -> pipeline.Export:
    recipe = parse_recipe({"name": "t", "quantization": INT4, "targets": [target()]}, "t")
    return pipeline.export(recipe, open_checkpoint(checkpoint), out, no_progress, store=store)


def test_an_export_without_llama_cpp_says_what_was_not_run(
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    without_llama_cpp: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = export_tiny(make_checkpoint(), tmp_path / "out", tmp_path / "store")
    assert result.bundle is not None
    checks = [*result.checks, *pipeline.verify(tmp_path / "out", no_progress)]
    notes = [check for check in checks if check.check.startswith("logits")]
    assert len(notes) == 2
    for check in notes:
        assert check.passed and check.value is None and check.limit is None
        assert check.note.startswith("not run: llama_cpp is not installed (Run: pip install")
        assert "mobilellm-exporter[llama-cpp]" in check.note
    assert any(check.check == "integers" for check in checks)
    json.dumps([check.value for check in checks])
    verified = run(capsys, "verify", tmp_path / "out")
    assert verified.code == 0 and verified.out.endswith("checks passed, 1 not run\n")


def test_generating_without_llama_cpp_names_what_to_install(
    lower_once: Lower, without_llama_cpp: None
) -> None:
    _, finished = lower_once(LLAMA4, target(), INT4)
    with pytest.raises(MissingExtraError, match=r"llama_cpp: is not installed.*\[llama-cpp\]"):
        open_model(str(finished.artifact.path), None)


def test_a_flipped_bit_is_found_without_llama_cpp(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, without_llama_cpp: None
) -> None:
    result = export_tiny(make_checkpoint(), tmp_path / "out", tmp_path / "store")
    path = tmp_path / "out" / "gguf" / "model.gguf"
    place = open_contents(path).tensors["blk.0.ffn_up.weight"].offset
    data = bytearray(path.read_bytes())
    data[place + 3] ^= 16
    path.write_bytes(data)
    failed = list(failures(pipeline.verify(tmp_path / "out", no_progress)))
    assert any("feed_forward.up_proj.weight (blk.0.ffn_up" in check.subject for check in failed)
    [logits] = [check for check in failed if check.check == "logits"]
    assert logits.note == "not run: the file is damaged"
    assert result.bundle is not None


def test_what_was_not_run_is_run_as_soon_as_llama_cpp_is_there(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out, store = make_checkpoint(), tmp_path / "out", tmp_path / "store"
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "llama_cpp", None)
        export_tiny(checkpoint, out, store)
    written = (out / "SHA256SUMS").read_bytes()
    for folder in (out, tmp_path / "other"):
        result = export_tiny(checkpoint, folder, store)
        assert result.stages.results["verify quantized"] == "found"
        found = {check.check for check in result.checks}
        assert "logits.kl" in found and "logits" not in found
    assert result.stages.results["verify gguf"] == "found"  # what was run is kept
    assert (out / "SHA256SUMS").read_bytes() == written


# Sizes, and files from elsewhere.


@pytest.mark.parametrize(
    ("linear", "embedding", "options"),
    [
        ("int4-g32", "int4-g32", {}),
        ("int4", "int8", {}),
        ("int8", "int8", {}),
        ("int4-g32", "float", {}),
        ("float", "float", {}),
    ],
)
def test_the_demo_file_is_predicted_within_one_per_cent(
    linear: str, embedding: str, options: dict[str, Any], nano: Path, tmp_path: Path
) -> None:
    schemes = {"linear": linear, "embedding": embedding, "method": "absmax"}
    raw = {"name": "t", "quantization": schemes, "targets": [{"target": "gguf", **options}]}
    recipe = parse_recipe(raw, "t")
    checkpoint = open_checkpoint(nano)
    quantized = pipeline.quantize(recipe, checkpoint, tmp_path / "q", no_progress)
    assert quantized is not None
    pipeline.lower(quantized, recipe.targets[0], tmp_path / "a", no_progress)
    real = (tmp_path / "a" / "model.gguf").stat().st_size
    parsed = recipe.targets[0]
    assert isinstance(parsed, backend.Target)
    predicted = backend.predict(checkpoint.config, quantized.schemes, parsed)
    assert abs(predicted.file / real - 1) < 0.01


def test_the_cache_is_counted_in_whole_blocks_of_positions() -> None:
    from exporter.model.config import parse_config

    config = parse_config(LLAMA4, Path("config.json"))
    schemes = dict.fromkeys(config.parameter_shapes(), Scheme(None))
    one_layer = 2 * 256 * 32
    for cache, width in (("float16", 2), ("float32", 4)):
        parsed = backend.Target(max_context=200, cache=cache)
        assert backend.predict(config, schemes, parsed).kv_cache == 2 * one_layer * width


def test_a_file_of_another_tool_is_inspected(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_name("Another")
    writer.add_block_count(3)
    writer.add_custom_alignment(64)
    writer.add_array("general.languages", ["en", "de"])
    writer.add_bool("gpt2.flag", True)
    writer.add_token_list([b"a", b"\xff"])
    weight = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    for kind in ("Q4_1", "Q5_0", "BF16"):
        packed = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(kind, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = backend.inspect(tmp_path / "other.gguf")
    assert found.facts["architecture"] == "gpt2" and found.facts["layers"] == "3"
    assert found.facts["vocabulary"] == "2 tokens" and found.facts["parameters"] == "3,072"
    assert found.content["types"]["Q4_1"] == {"tensors": 1, "parameters": 1024, "bytes": 640}
    assert found.content["metadata"]["gpt2.flag"] is True
    assert found.content["metadata"]["general.languages"] == {"type": "[STRING]", "entries": 2}
    json.dumps(found.content)


def test_an_artifact_of_ours_is_inspected(lower_once: Lower) -> None:
    _, finished = lower_once(MODELS["llama4_text"], target(), INT4)
    found = backend.inspect(finished.artifact.path / "model.gguf")
    assert found.facts["architecture"] == "qwen3"
    assert found.facts["quantized checkpoint"] == finished.manifest["quantized"]
    names = itertools.chain.from_iterable(table.rows for table in found.tables)
    assert {row[0] for row in names} == {"Q4_0", "F32"}
    assert open_artifact(finished.artifact.path / "model.gguf").artifact == finished.artifact
