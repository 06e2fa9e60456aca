"""The int8 KV cache of a .pte: its codes, its logits, its size, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from conftest import NANO
from lowering import MODELS, SHAPES, Lower, Lowered, check_logits, lower_with, tokens
from torch import Tensor
from torch.nn import functional as F

from exporter import pipeline
from exporter.backends import executorch
from exporter.backends.executorch import Target
from exporter.backends.executorch.contents import open_contents
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import Bundle
from exporter.evaluation.agreement import compare_logits
from exporter.inference.reference import ReferenceRunner, score
from exporter.progress import no_progress
from exporter.quantization.activations import round_heads_to_int8, round_rows_to_int8
from exporter.recipe import load_recipe
from exporter.verification.runs import run_teacher_forced, verification_text

Capture = pytest.CaptureFixture[str]
CONTEXT = 64
INT8 = {"kv_cache": "int8"}


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    defaults = {"target": "executorch", "max_context": CONTEXT, **INT8}
    return lower_with(lower_once, defaults)


@pytest.fixture(scope="module")
def demo(finished_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> FinishedArtifact:
    """The demo with an int8 cache."""
    folder = tmp_path_factory.mktemp("int8") / "artifact"
    target = Target(max_context=256, kv_cache="int8")
    return pipeline.lower(finished_bundle.quantized, target, folder, no_progress)


# What the cache holds.


def heads_of(*shape: int) -> Tensor:
    """Heads with a range far from zero, one that is zero, and one with a single large value."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 3
    x[0, 0] += 5
    x[0, 1] = 0
    x[0, 2, 0, 0] = 100
    return x


def dequantized(codes: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    return (codes.double() - zero_points.double()) * scales.double()


def test_a_head_comes_back_within_half_a_step_of_its_own_scale() -> None:
    from exporter.backends.executorch.attention import _quantize

    x = heads_of(1, 9, 3, 64)
    codes, scales, zero_points = _quantize(x)
    assert (codes.dtype, scales.dtype, zero_points.dtype) == (torch.int8, torch.float32, torch.int8)
    assert scales.shape == zero_points.shape == (1, 9, 3, 1)
    error = (dequantized(codes, scales, zero_points) - x.double()).abs()
    assert (error <= 0.501 * scales).all()
    assert (codes.amax(-1).int() - codes.amin(-1) >= 127)[0, 2:].all()  # the range is used
    assert scales[0, 2, 0] > 5 * scales[0, 2, 1]  # a large value costs its own head only


def test_the_simulation_rounds_to_the_values_of_the_codes() -> None:
    from exporter.backends.executorch.attention import _quantize

    x = heads_of(1, 9, 3, 64)
    expected, step = dequantized(*_quantize(x)), _quantize(x)[1]
    for rounded in round_heads_to_int8(x, x, x):
        difference = (rounded - expected).abs()
        assert (difference <= 1.01 * step).all()  # a tie may go to either neighbour
        assert (difference > 1e-5).double().mean() < 1e-3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "seq", "position"),
    [(9, 3, 1, 40), (9, 3, 17, 40), (4, 4, 5, 0), (24, 6, 1, 1500), (6, 1, 200, 600)],
)
def test_the_runtimes_attention_is_that_of_the_codes(
    heads: int, kv_heads: int, seq: int, position: int
) -> None:
    """ExecuTorch's kernel takes scales of queries and of keys by different strides."""
    from exporter.backends.executorch.attention import _quantize

    generator, end = torch.Generator().manual_seed(1), position + seq
    q = torch.randn(1, seq, heads, 64, generator=generator)
    k, v = (torch.randn(1, 2048, kv_heads, 64, generator=generator) for _ in range(2))
    (qc, qs, qz), (kc, ks, kz), (vc, vs, vz) = _quantize(q), _quantize(k + 0.5), _quantize(v)
    found = torch.ops.llama.custom_quantized_sdpa(
        qc, kc, vc, position, None, 0.0, True, None, qz, qs, kz, ks, vz, vs
    )
    visible = torch.ones(seq, end, dtype=torch.bool).tril(position)
    parts = dequantized(qc, qs, qz), dequantized(kc, ks, kz)[:, :end], dequantized(vc, vs, vz)
    q, k, v = (x.transpose(1, 2) for x in (*parts[:2], parts[2][:, :end]))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    assert (found - expected.transpose(1, 2)).abs().max() < 1e-5


# Logits.


def kl(lowered: Lowered, simulated_cache: bool = True) -> float:
    """Mean KL to the simulation, over prefills of 1 and 5 tokens and 20 decode steps."""
    text, positions = tokens(25), [0, 4, *range(5, 25)]
    found = run_teacher_forced(executorch.load(lowered[1].artifact), text, (1, 5))
    rounding = round_heads_to_int8 if simulated_cache else None
    expected = score(lowered[0], text, positions, round_rows_to_int8, cache_rounding=rounding)
    assert expected.std() > 1
    return compare_logits(expected, found).kl


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_simulated_cache_for_every_shape(
    changes: dict[str, Any], lower: Lower
) -> None:
    assert kl(lower(**changes)) < 2e-3


@pytest.mark.parametrize("model", MODELS)
def test_the_simulation_without_the_cache_is_further_from_the_logits(
    model: str, lower: Lower
) -> None:
    assert kl(lower(model)) < kl(lower(model), simulated_cache=False)


def test_a_second_prefill_forgets_the_first_text(lower: Lower) -> None:
    _, lowered = lower()
    runner, fresh = executorch.load(lowered.artifact), executorch.load(lowered.artifact)
    runner.prefill(tokens(50, seed=2))
    assert torch.equal(runner.prefill(tokens(9)), fresh.prefill(tokens(9)))
    assert torch.equal(runner.decode(5), fresh.decode(5))


def test_the_cache_can_be_filled_to_the_last_position(lower: Lower) -> None:
    quantized, lowered = lower()
    text = tokens(CONTEXT)
    found = run_teacher_forced(executorch.load(lowered.artifact), text, (CONTEXT - 1,))
    positions = [CONTEXT - 2, CONTEXT - 1]
    expected = score(
        quantized, text, positions, round_rows_to_int8, cache_rounding=round_heads_to_int8
    )
    assert compare_logits(expected, found).kl < 2e-3


def test_a_reference_that_decodes_keeps_the_rounded_cache(finished_bundle: Bundle) -> None:
    text, rounding = tokens(30), round_heads_to_int8
    runner = ReferenceRunner(finished_bundle.quantized, 30, None, rounding)
    found = run_teacher_forced(runner, text, (7,))
    positions = range(6, 30)
    expected = score(finished_bundle.quantized, text, positions, cache_rounding=rounding)
    plain = score(finished_bundle.quantized, text, positions)
    assert torch.allclose(found, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-2)
    whole = torch.cat(list(runner.score(text, 6, 8)))
    assert torch.allclose(whole, expected, rtol=0, atol=1e-3)


def test_verify_passes_the_demo_and_catches_a_wrong_scale(
    demo: FinishedArtifact,
    finished_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from exporter.backends.executorch import attention

    quantized = finished_bundle.quantized
    text = verification_text(quantized, 256, None)
    assert all(check.passed for check in check_logits(quantized, demo, text))
    quantize = attention._quantize

    def wrong(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales, zero_points = quantize(x)
        return codes, 1.1 * scales, zero_points

    monkeypatch.setattr(attention, "_quantize", wrong)
    artifact = pipeline.lower(quantized, demo.artifact.target, tmp_path / "wrong", no_progress)
    failed = {check.check for check in check_logits(quantized, artifact, text) if not check.passed}
    assert "logits.kl" in failed


def test_a_recipe_gives_a_bundle_that_verify_derives_again(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "nano"
    made = run(
        capsys, "export", "mobilellm-r1-nano-int4", "--checkpoint", NANO, "-o", out,
        "targets=[{target: executorch, max_context: 256, kv_cache: int8}]",
    )  # fmt: skip
    assert made.code == 0, made.err + made.out
    checks = run(capsys, "verify", out, "--json").json["checks"]
    assert {check["check"] for check in checks} >= {"derived", "logits.kl"}
    assert all(check["passed"] for check in checks)
    command = ["evaluate", out, "--data", Path(__file__), "--max-tokens", "128", "--json"]
    sizes = ["--sequence-length", "64"]
    found = run(capsys, *command, *sizes).json["perplexity"]
    simulated = run(capsys, *command, *sizes, "--simulate").json["perplexity"]
    assert found == pytest.approx(simulated, rel=0.05)


def test_an_override_of_a_recipe_sets_the_cache() -> None:
    recipe = load_recipe("mobilellm-r1-nano-int4", ["targets.0.kv_cache=int8"])
    assert recipe.targets[0] == Target(max_context=1024, kv_cache="int8")


# What the program needs.


def test_the_official_builds_and_the_torch_free_libraries_have_every_operator(
    demo: FinishedArtifact,
) -> None:
    plan = open_contents(demo.artifact.path / "model.pte").plan("forward")
    names = {f"{one['name']}.{one['overload']}" for one in plan["operators"]}
    own = {name for name in names if name.startswith("llama::")}
    assert own == {"llama::update_cache.out", "llama::custom_quantized_sdpa.out"}
    known = r"(aten|quantized_decomposed|executorch_prim|dim_order_ops)::"
    assert [name for name in names - own if not re.match(known, name)] == []


def test_the_cache_is_predicted_as_the_program_plans_it(
    demo: FinishedArtifact, finished_bundle: Bundle, tmp_path: Path
) -> None:
    quantized = finished_bundle.quantized
    targets = {cache: Target(max_context=256, kv_cache=cache) for cache in ("float", "int8")}
    other = pipeline.lower(quantized, targets["float"], tmp_path / "float", no_progress)
    predictions, planned = dict[str, Any](), dict[str, int]()
    for cache, artifact in (("float", other), ("int8", demo)):
        file = artifact.artifact.path / "model.pte"
        predictions[cache] = executorch.predict(quantized.config, quantized.schemes, targets[cache])
        assert predictions[cache].file == pytest.approx(file.stat().st_size, rel=0.02)
        planned[cache] = sum(open_contents(file).plan("forward")["non_const_buffer_sizes"])
    assert predictions["float"].kv_cache / predictions["int8"].kv_cache == pytest.approx(256 / 69)
    saved = predictions["float"].kv_cache - predictions["int8"].kv_cache
    assert planned["float"] - planned["int8"] == saved > 0
    assert predictions["float"].memory - predictions["int8"].memory == saved


def test_two_lowerings_give_the_same_bytes(lower: Lower) -> None:
    files = [lower(fresh=fresh)[1].artifact.path / "model.pte" for fresh in (False, True)]
    assert files[0] != files[1]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("other", ["attention=portable", "delegate=coreml"])
def test_what_has_no_custom_operators_has_no_int8_cache(
    other: str, finished_bundle: Bundle, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    quantized = finished_bundle.quantized.path
    command = ["lower", quantized, "--target", "executorch", "-o", out, "max_context=64"]
    refused = run(capsys, *command, "kv_cache=int8", other)
    assert refused.code == 2
    assert "kv_cache: int8 needs ExecuTorch's custom operators" in refused.err
    assert not out.exists()
    recipe = "mobilellm-r1-nano-int4"
    target = f"targets=[{{target: executorch, kv_cache: int8, {other.replace('=', ': ')}}}]"
    refused = run(capsys, "export", recipe, "--checkpoint", NANO, "-o", out, target)
    assert (refused.code, out.exists()) == (2, False)
