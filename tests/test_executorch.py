"""The ExecuTorch backend: the content of the .pte, and its logits against the reference."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch import exir
from executorch.exir._serialize import _program as pte
from executorch.extension.pybindings import portable_lib
from lowering import MODELS, SHAPES, Lower, Lowered, tokens
from torch import nn

from exporter import pipeline
from exporter.backends import executorch
from exporter.backends.executorch.graph import filter_bytes, scale_bytes
from exporter.backends.executorch.program import rope_rows
from exporter.backends.executorch.segments import exchange_columns
from exporter.bundle.artifact import FinishedArtifact
from exporter.bundle.bundle import Bundle
from exporter.evaluation.agreement import compare_logits
from exporter.inference.reference import score
from exporter.model.config import EMBEDDING, parse_config
from exporter.model.rope import rope_frequencies, rope_tables
from exporter.pipeline import no_progress
from exporter.quantization.activations import round_rows_to_int8
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor
from exporter.verification.integers import check_integers
from exporter.verification.runs import run_teacher_forced

CONTEXT = 64


@pytest.fixture(scope="module")
def lower(lower_once: Lower) -> Lower:
    def run(
        model: str = "llama4_text",
        linear: str = "int4-g32",
        embedding: str = "int4-g32",
        attention: str = "custom_sdpa",
        overrides: dict[str, str] | None = None,
        options: dict[str, int] | None = None,
        **changes: Any,
    ) -> Lowered:
        target = {
            "target": "executorch",
            "max_context": CONTEXT,
            "attention": attention,
            **(options or {}),
        }
        schemes = {"linear": linear, "embedding": embedding, "overrides": overrides or {}}
        return lower_once({**MODELS[model], **changes}, target, schemes)

    return run


def logits_kl(quantized: QuantizedCheckpoint, lowered: FinishedArtifact) -> float:
    """Mean KL in nats over prefills of 1 and 5 tokens and 20 decode steps."""
    text = tokens(25)
    found = run_teacher_forced(executorch.load(lowered.artifact), text, (1, 5))
    expected = score(quantized, text, [0, 4, *range(5, 25)], round_rows_to_int8)
    assert expected.std() > 1
    return compare_logits(expected, found).kl


def program_of(lowered: FinishedArtifact) -> Any:
    data = (lowered.artifact.path / "model.pte").read_bytes()
    header = pte._get_extended_header(data[:64])
    assert header is not None
    return pte._flatbuffer_to_program(data[: header.program_size])


def operators(lowered: FinishedArtifact) -> set[str]:
    plan = next(p for p in program_of(lowered).execution_plan if p.name == "forward")
    return {operator.name for operator in plan.operators}


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
@pytest.mark.parametrize(
    ("model", "tied", "linear", "embedding"),
    [
        ("llama4_text", True, "int4-g32", "int4-g32"),
        ("llama4_text", True, "int4-g64", "int4-g64"),
        ("llama4_text", True, "int4-g32", "int8"),
        ("llama4_text", True, "int8", "int8"),
        ("llama4_text", True, "int4", "int4"),
        ("llama4_text", True, "int4-g32", "float"),
        ("llama4_text", False, "int4-g32", "int4-g64"),
        ("llama4_text", False, "int8", "int8-g32"),
        ("llama", True, "int4-g32", "int4-g32"),
        ("llama", True, "int4", "int8"),
        ("llama", False, "int4-g64", "int4-g32"),
        ("llama", False, "int8", "int8"),
        ("llama", False, "int4-g32", "float"),
    ],
)
def test_logits_and_integers_are_those_of_the_quantized_checkpoint(
    model: str, tied: bool, linear: str, embedding: str, attention: str, lower: Lower
) -> None:
    quantized, lowered = lower(model, linear, embedding, attention, tie_word_embeddings=tied)
    assert logits_kl(quantized, lowered) < 2e-3
    checks = check_integers(quantized, lowered, lambda name: None)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_the_quantized_checkpoint_for_every_shape(
    changes: dict[str, Any], attention: str, lower: Lower
) -> None:
    quantized, lowered = lower(attention=attention, **changes)
    assert logits_kl(quantized, lowered) < 2e-3


def test_schemes_may_differ_from_layer_to_layer(lower: Lower) -> None:
    overrides = {"*.0.self_attn.*": "int8", "*.down_proj.weight": "float", "*.1.*.v_*": "int4"}
    quantized, lowered = lower(overrides=overrides)
    assert {str(scheme) for scheme in quantized.schemes.values()} == {
        "int4-g32", "int8", "float", "int4",
    }  # fmt: skip
    assert logits_kl(quantized, lowered) < 2e-3


def test_both_attention_forms_give_the_same_logits(
    lower: Lower, tmp_path: Path, finished_bundle: Bundle
) -> None:
    quantized = finished_bundle.quantized
    (target,) = (finished_bundle.artifacts["executorch"].artifact.target,)
    portable = type(target)(max_context=target.max_context, attention="portable")
    other = pipeline.lower(quantized, portable, tmp_path / "portable", no_progress)
    text = tokens(40)
    runs = [
        run_teacher_forced(executorch.load(artifact), text, (1, 17))
        for artifact in (finished_bundle.artifacts["executorch"].artifact, other.artifact)
    ]
    assert compare_logits(*runs).kl < 1e-3


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_a_second_prefill_forgets_the_first_text(attention: str, lower: Lower) -> None:
    _, lowered = lower(attention=attention)
    runner, fresh = executorch.load(lowered.artifact), executorch.load(lowered.artifact)
    runner.prefill(tokens(50, seed=2))
    runner.decode(7)
    again = [runner.prefill(tokens(9)), *(runner.decode(t) for t in tokens(5, seed=3))]
    alone = [fresh.prefill(tokens(9)), *(fresh.decode(t) for t in tokens(5, seed=3))]
    assert torch.equal(torch.stack(again), torch.stack(alone))


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_a_prompt_read_in_chunks_gives_the_logits_of_one_read_at_once(
    attention: str, lower: Lower, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.backends.executorch import runtime

    _, lowered = lower(attention=attention)
    whole = executorch.load(lowered.artifact).prefill(tokens(41))
    monkeypatch.setattr(runtime, "_CHUNK", 7)
    runner, calls = executorch.load(lowered.artifact), list[int]()
    run = runner.run  # type: ignore[attr-defined]

    def counted(some: list[int], start: int) -> torch.Tensor:
        calls.append(len(some))
        logits: torch.Tensor = run(some, start)
        return logits

    monkeypatch.setattr(runner, "run", counted)
    torch.testing.assert_close(runner.prefill(tokens(41)), whole, rtol=1e-4, atol=1e-4)
    assert calls == [7, 7, 7, 7, 7, 6]


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_the_context_can_be_filled_to_the_last_position(attention: str, lower: Lower) -> None:
    quantized, lowered = lower(attention=attention)
    text = tokens(CONTEXT)
    runner = executorch.load(lowered.artifact)
    assert runner.context == CONTEXT
    found = run_teacher_forced(runner, text, (CONTEXT - 1,))
    whole = executorch.load(lowered.artifact).prefill(text)
    expected = score(quantized, text, [CONTEXT - 2, CONTEXT - 1], round_rows_to_int8)
    assert compare_logits(expected, found).kl < 2e-3
    assert compare_logits(expected[1:], whole[None]).kl < 2e-3


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_one_position_too_many_raises_and_the_runner_stays_usable(
    attention: str, lower: Lower
) -> None:
    _, lowered = lower(attention=attention)
    runner = executorch.load(lowered.artifact)
    full = runner.prefill(tokens(CONTEXT))
    with pytest.raises(RuntimeError):
        runner.decode(1)
    with pytest.raises(RuntimeError):
        runner.prefill(tokens(CONTEXT + 1))
    assert torch.equal(runner.prefill(tokens(CONTEXT)), full)


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_the_official_runners_can_ask_the_program_for_its_facts(
    attention: str, lower: Lower
) -> None:
    _, lowered = lower(attention=attention)
    module = portable_lib._load_for_executorch(str(lowered.artifact.path / "model.pte"))
    facts = {
        name: module.run_method(name, ())
        for name in module.method_names()
        if name != "forward"
    }  # fmt: skip
    assert facts == {
        "get_max_seq_len": [CONTEXT],
        "get_max_context_len": [CONTEXT],
        "get_vocab_size": [96],
        "get_bos_id": [0],
        "get_eos_ids": [1, 2],
        "use_kv_cache": [True],
        "use_sdpa_with_kv_cache": [attention == "custom_sdpa"],
        "enable_dynamic_shape": [True],
    }


def test_a_model_without_special_tokens_has_no_methods_for_them(lower: Lower) -> None:
    _, lowered = lower(bos_token_id=None, eos_token_id=None)
    names = {plan.name for plan in program_of(lowered).execution_plan}
    assert {"get_bos_id", "get_eos_ids"} & names == set()


@pytest.mark.parametrize("embedding", ["int4-g32", "int8", "float"])
def test_the_portable_form_needs_core_operators_only(embedding: str, lower: Lower) -> None:
    """`llama::` operators are not in the libraries that run without torch."""
    _, lowered = lower(attention="portable", embedding=embedding)
    known = r"(aten|quantized_decomposed|executorch_prim|dim_order_ops)::"
    assert [name for name in operators(lowered) if not re.match(known, name)] == []


def test_the_custom_form_uses_the_operators_of_the_official_builds(lower: Lower) -> None:
    _, lowered = lower(attention="custom_sdpa")
    llama = {name for name in operators(lowered) if name.startswith("llama::")}
    assert llama == {"llama::update_cache", "llama::custom_sdpa"}


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_between_two_attentions_there_is_one_delegate_call(attention: str, lower: Lower) -> None:
    _, lowered = lower(attention=attention)
    plan = next(p for p in program_of(lowered).execution_plan if p.name == "forward")
    calls = [
        i for i in plan.chains[0].instructions if type(i.instr_args).__name__ == "DelegateCall"
    ]
    assert len(calls) == MODELS["llama4_text"]["num_hidden_layers"] + 1
    assert {delegate.id for delegate in plan.delegates} == {"XnnpackBackend"}


def test_the_output_layer_is_loaded_before_all_others(lower: Lower) -> None:
    """XNNPACK holds a weight twice while it packs it, and the output layer's is the largest."""
    _, lowered = lower()
    plan = next(p for p in program_of(lowered).execution_plan if p.name == "forward")
    calls = [
        i.instr_args.delegate_index
        for i in plan.chains[0].instructions
        if type(i.instr_args).__name__ == "DelegateCall"
    ]
    assert calls == [*range(1, len(calls)), 0]


@pytest.mark.parametrize("embedding", ["int4-g32", "int4-g64", "int4", "int8"])
def test_the_tied_embedding_is_in_the_file_once(embedding: str, lower: Lower) -> None:
    quantized, lowered = lower(embedding=embedding)
    stored = quantized.read(EMBEDDING)
    assert isinstance(stored, QuantizedTensor)
    codes = stored.codes if embedding == "int8" else exchange_columns(stored.codes)
    wanted = filter_bytes(QuantizedTensor(codes, stored.scales, stored.scheme))
    data = (lowered.artifact.path / "model.pte").read_bytes()
    first_row = wanted[: len(wanted) // 96]
    assert data.count(wanted) == data.count(first_row) == 1
    scales = scale_bytes(stored)
    assert len(scales) == stored.scales.numel() * (4 if embedding in ("int4", "int8") else 2)
    assert data.count(scales) == data.count(scales[: len(scales) // 8]) == 1
    assert data.count(stored.scales.numpy().tobytes()) == (embedding in ("int4", "int8"))


def test_angles_are_those_of_the_table_at_every_position() -> None:
    """Computed by the operators of ExecuTorch, up to the last position of a context of 32k."""
    config = parse_config({**MODELS["llama4_text"], "head_dim": 64}, Path("config.json"))
    frequencies, context = rope_frequencies(config), 32_768

    class Rows(nn.Module):
        def forward(self, positions: torch.Tensor) -> list[torch.Tensor]:
            return rope_rows(positions, frequencies)

    positions = torch.cat((torch.arange(64), torch.arange(context - 512, context)))
    program = exir.to_edge(torch.export.export(Rows(), (positions,))).to_executorch()
    cos, sin = portable_lib._load_for_executorch_from_buffer(program.buffer).forward((positions,))
    for found, table in zip((cos, sin), rope_tables(config, context), strict=True):
        rows = found[0, :, 0, 32:]
        assert rows.shape == (576, 32)
        assert (rows - table[positions]).abs().max() < 1.5e-7
    assert torch.equal(cos[..., :32], cos[..., 32:])
    assert torch.equal(sin[..., :32], -sin[..., 32:])


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_a_call_reads_no_more_tokens_than_the_target_says(attention: str, lower: Lower) -> None:
    _, lowered = lower(attention=attention, options={"prefill": 16})
    path = str(lowered.artifact.path / "model.pte")
    module = portable_lib._load_for_executorch(path)
    assert module.run_method("get_max_seq_len", ()) == [16]
    assert module.run_method("get_max_context_len", ()) == [CONTEXT]
    start = torch.tensor([0])
    module.run_method("forward", (torch.tensor([tokens(16)]), start))
    with pytest.raises(RuntimeError):
        module.run_method("forward", (torch.tensor([tokens(17)]), start))


@pytest.mark.parametrize("attention", ["custom_sdpa", "portable"])
def test_a_prompt_in_several_calls_gives_the_logits_of_one(attention: str, lower: Lower) -> None:
    text = tokens(50)
    runs = [
        executorch.load(lower(attention=attention, options={"prefill": most})[1].artifact)
        for most in (512, 16)
    ]
    whole, parts = (runner.prefill(text) for runner in runs)
    assert compare_logits(whole[None], parts[None]).kl < 1e-3
    assert torch.equal(*(runner.decode(7).argmax() for runner in runs))


def planned(lowered: FinishedArtifact) -> int:
    plan = next(p for p in program_of(lowered).execution_plan if p.name == "forward")
    return sum(plan.non_const_buffer_sizes)


def test_planned_memory_is_that_of_a_call_and_of_the_cache(lower: Lower) -> None:
    sizes = []
    for context in (64, 256):
        quantized, lowered = lower(options={"max_context": context, "prefill": 16})
        sizes.append(planned(lowered) - quantized.config.kv_cache_bytes(context, 4))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_every_linear_weight_lies_in_an_xnnpack_delegate(
    model: str, tied: bool, lower: Lower
) -> None:
    quantized, lowered = lower(model, tie_word_embeddings=tied)
    filters = {
        n for n, place, _ in executorch.weights(lowered.artifact, quantized) if place == "filter"
    }
    linears = {
        name for name, shape in quantized.config.parameter_shapes().items() if len(shape) == 2
    }
    assert filters == linears - (set() if tied else {EMBEDDING})
    payloads = delegate_payloads(lowered)
    assert len(payloads) == 3
    assert [name for name in filters if not any(name.encode() in p for p in payloads)] == []


def delegate_payloads(lowered: FinishedArtifact) -> list[bytes]:
    """The XNNPACK graphs, which name the weights that they use."""
    program = program_of(lowered)
    plan = next(p for p in program.execution_plan if p.name == "forward")
    data = (lowered.artifact.path / "model.pte").read_bytes()
    header = pte._get_extended_header(data[:64])
    assert header is not None
    payloads = []
    for delegate in plan.delegates:
        if delegate.processed.location.name == "INLINE":
            payloads.append(bytes(program.backend_delegate_data[delegate.processed.index].data))
        else:
            place = program.segments[delegate.processed.index]
            start = header.segment_base_offset + place.offset
            payloads.append(data[start : start + place.size])
    return payloads


def test_no_weight_is_left_as_a_float_matrix(lower: Lower) -> None:
    """A dequantized copy anywhere would be larger than the whole file is."""
    quantized, lowered = lower(vocab_size=4096)
    size = (lowered.artifact.path / "model.pte").stat().st_size
    assert size < 4 * 4096 * quantized.config.hidden_size
