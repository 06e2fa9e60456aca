"""The sensitivity of weights to few bits, and the choice of bits for a size budget."""

import json
import random
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import Replaced, divergence_of, quantize_here, recipe_of, small_checkpoint
from commands import contents
from conftest import FAMILIES, MakeCheckpoint
from safetensors.torch import load_file

from exporter.calibration.sensitivity import (
    Sensitivity,
    choose_int8_weights,
    model_bits,
    parse_budget,
    sensitivities,
)
from exporter.errors import InputError
from exporter.model.checkpoint import Checkpoint
from exporter.pipeline import quantize
from exporter.progress import no_step
from exporter.quantization.rounding import quantize as quantize_weight
from exporter.quantization.schemes import FLOAT, QuantizedTensor, Scheme

V_PROJ, EMBEDDING = "model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"
SUBJECT = "quantization.budget"


def rounded_weights(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme]
) -> dict[str, QuantizedTensor]:
    """Not by least squares, so that a test sees whose rounding is measured."""
    return {
        name: quantize_weight(checkpoint.float_weight(name), scheme, "absmax")
        for name, scheme in schemes.items()
        if scheme != FLOAT
    }


# What each weight costs.


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("base", FAMILIES.values(), ids=FAMILIES)
def test_each_cost_is_that_of_a_whole_model_with_this_weight_alone_rounded(
    base: dict[str, Any], tied: bool, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint, base, tie_word_embeddings=tied)
    shapes = checkpoint.config.parameter_shapes()
    schemes = {name: Scheme(4, 32) if len(shape) == 2 else FLOAT for name, shape in shapes.items()}
    schemes[V_PROJ] = FLOAT
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(3))
    rounded = rounded_weights(checkpoint, schemes)
    found = sensitivities(checkpoint, rounded, tokens, torch.float32, no_step)
    wanted = [name for name, scheme in schemes.items() if scheme != FLOAT]
    assert [one.name for one in found] == wanted
    assert ("lm_head.weight" in wanted) is not tied
    for one in found:
        weight = checkpoint.float_weight(one.name)
        for kl, stored in (
            (one.kl, rounded[one.name]),
            (one.wider_kl, quantize_weight(weight, Scheme(8), "mse")),
        ):
            changed = Replaced(checkpoint, {one.name: stored.dequantize()})
            expected = divergence_of(checkpoint, changed, tokens)
            assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6), one.name
        assert one.kl > 1e-5
        assert one.kl_reduction == one.kl - one.wider_kl > 0
        assert one.scheme == "int4-g32"
        assert one.bits == weight.numel() * 4 + weight.numel() // 32 * 16
        assert one.wider_bits == weight.numel() * 8 + len(weight) * 16


def test_a_weight_that_int8_would_not_make_larger_is_no_candidate(
    make_checkpoint: MakeCheckpoint,
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    shapes = checkpoint.config.parameter_shapes()
    schemes = {name: Scheme(8) if len(shape) == 2 else FLOAT for name, shape in shapes.items()}
    schemes |= {V_PROJ: Scheme(4, 32), EMBEDDING: Scheme(8, 32)}
    tokens = torch.arange(24)[None]
    rounded = rounded_weights(checkpoint, schemes)
    found = sensitivities(checkpoint, rounded, tokens, torch.float32, no_step)
    assert [one.name for one in found] == [V_PROJ]


# The search.


def weight_of(name: str, kl: float, bits: int = 100, more: int = 100) -> Sensitivity:
    return Sensitivity(name, "int4-g32", kl + 0.001, 0.001, bits, bits + more)


@pytest.mark.parametrize("budget", range(1300, 2400, 50))
def test_a_budget_is_never_exceeded_and_nothing_that_still_fits_is_left(budget: int) -> None:
    sizes = {"a": 100, "b": 250, "c": 60, "d": 400}
    found = [weight_of(name, 0.1, 100, more) for name, more in sizes.items()]
    wider = choose_int8_weights(found, 1300, budget, SUBJECT)
    used = 1300 + sum(sizes[name] for name in wider)
    assert used <= budget
    assert [name for name in sizes.keys() - set(wider) if used + sizes[name] <= budget] == []


def test_all_that_fits_becomes_wider_and_nothing_where_nothing_fits() -> None:
    found = [weight_of("large", 0.5, more=1000), weight_of("deaf", -0.1, more=100)]
    assert choose_int8_weights(found, 2000, 2000, SUBJECT) == ()
    assert choose_int8_weights(found, 2000, 2099, SUBJECT) == ()
    assert choose_int8_weights(found, 2000, 3100, SUBJECT) == ("large", "deaf")
    assert choose_int8_weights(found, 2000, 9000, SUBJECT) == ("large", "deaf")


@pytest.mark.parametrize("budget", range(600, 3200, 150))
def test_no_choice_within_a_budget_saves_more(budget: int) -> None:
    """Taking what saves most for each bit first would leave the large embedding out."""
    rng = random.Random(budget)
    found = [weight_of("embedding", 0.9, more=1000)]
    found += [weight_of(f"{n}", rng.random() / 5, more=rng.randrange(50, 300)) for n in range(9)]
    best = max(
        sum(one.kl_reduction for one in some)
        for count in range(len(found) + 1)
        for some in combinations(found, count)
        if 500 + sum(one.wider_bits - one.bits for one in some) <= budget
    )
    wider = choose_int8_weights(found, 500, budget, SUBJECT)
    assert sum(one.kl_reduction for one in found if one.name in wider) == pytest.approx(best)
    assert 500 + sum(o.wider_bits - o.bits for o in found if o.name in wider) <= budget


def test_large_sizes_are_rounded_so_that_a_budget_is_never_exceeded() -> None:
    rng = random.Random(1)
    found = [weight_of(f"{n}", rng.random(), more=rng.randrange(10**5, 10**7)) for n in range(200)]
    room = sum(one.wider_bits - one.bits for one in found) // 3
    wider = choose_int8_weights(found, 0, room, SUBJECT)
    used = sum(one.wider_bits - one.bits for one in found if one.name in wider)
    assert 0.995 * room < used <= room


def test_a_budget_that_is_too_small_is_refused_with_both_sizes() -> None:
    with pytest.raises(InputError) as raised:
        choose_int8_weights([weight_of("a", 0.1)], 24_000_000, 16_000_000, SUBJECT)
    for part in (SUBJECT, "holds 2.0 MB", "needs at least 3.0 MB", "Raise the budget"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("written", "bits_a_weight", "bits"),
    [
        ("5.3 bits", 5.3, 0),
        ("6bits", 6, 0),
        ("1 bit", 1, 0),
        (" 4.5 bpw ", 4.5, 0),
        ("90 MB", 0, 720_000_000),
        ("0.25MB", 0, 2_000_000),
    ],
)
def test_a_budget_is_bits_a_weight_or_megabytes(
    written: str, bits_a_weight: float, bits: int, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    expected = round(bits_a_weight * checkpoint.parameter_count) + bits
    assert parse_budget(written, SUBJECT, checkpoint.config) == expected


@pytest.mark.parametrize(
    "written",
    ["5.3", "bits", "-5 bits", "5,3 bits", "5 GB", "90 MiB", "1e3 bits", "5 bits 6 bits"],
)
def test_what_is_no_budget_is_refused(written: str, make_checkpoint: MakeCheckpoint) -> None:
    config = small_checkpoint(make_checkpoint).config
    with pytest.raises(InputError, match=r"is not a budget.*Write '5\.3 bits' or '90 MB'"):
        parse_budget(written, SUBJECT, config)


# A whole recipe.


@pytest.mark.parametrize("method", ["absmax", "mse", "gptq"])
def test_a_recipe_with_a_budget_gives_a_quantized_checkpoint_within_it(
    method: str, make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    quantized = quantize_here(
        recipe_of(method, text, budget="6 bits"), checkpoint, tmp_path / "out"
    )
    stored = load_file(quantized.path / "quantized.safetensors").values()
    size = 8 * sum(tensor.numel() * tensor.dtype.itemsize for tensor in stored)
    budget = 6 * checkpoint.parameter_count
    assert 0.95 * budget < size <= budget
    assert size == model_bits(quantized.schemes, quantized.config)
    report = json.loads((quantized.path / "calibration" / "sensitivity.json").read_text())
    rows = {row["name"]: row for row in report["sensitivities"]}
    wider = [name for name, row in rows.items() if row["wider"]]
    assert wider == [name for name, scheme in quantized.schemes.items() if scheme == Scheme(8)]
    assert sorted(quantized.manifest["calibration"]["wider"]) == sorted(wider)
    assert 0 < len(wider) < len(rows)


def test_sensitivities_are_measured_once(
    make_checkpoint: MakeCheckpoint, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    checkpoint, stages = small_checkpoint(make_checkpoint), list[str]()

    def seen(stage: str, done: int, total: int, note: str = "") -> None:
        stages.append(stage)

    recipe = recipe_of("mse", text, budget="6 bits")
    quantize(recipe, checkpoint, tmp_path / "one", seen)
    assert "measure sensitivity" in stages
    kept = contents(own_cache)
    stages.clear()
    quantize(recipe, checkpoint, tmp_path / "other", seen)
    assert "measure sensitivity" not in stages and "quantize" in stages
    assert contents(own_cache) == kept
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_tokens_are_weighed_once_for_the_search_and_for_its_result(
    make_checkpoint: MakeCheckpoint, text: Path, tmp_path: Path
) -> None:
    finished = list[str]()

    def seen(stage: str, done: int, total: int, note: str = "") -> None:
        finished.extend([stage] if done == total else [])

    checkpoint, recipe = small_checkpoint(make_checkpoint), recipe_of("gptq", text, budget="6 bits")
    quantize(recipe, checkpoint, tmp_path / "out", seen)
    assert finished[:4] == ["weigh tokens", "gptq", "measure sensitivity", "gptq"]


def test_another_budget_needs_no_new_measurement_and_other_text_does(
    make_checkpoint: MakeCheckpoint, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    for index, (changes, kept) in enumerate(
        [({"budget": "6 bits"}, 1), ({"budget": "5.5 bits"}, 1), ({"seed": 1}, 2)]
    ):
        recipe = recipe_of("mse", text, **{"budget": "6 bits", **changes})
        quantize_here(recipe, checkpoint, tmp_path / str(index))
        assert len(list(own_cache.glob("*.json"))) == kept


def test_a_damaged_measurement_is_made_again(
    make_checkpoint: MakeCheckpoint, text: Path, own_cache: Path, tmp_path: Path
) -> None:
    checkpoint, recipe = small_checkpoint(make_checkpoint), recipe_of("mse", text, budget="6 bits")
    quantize_here(recipe, checkpoint, tmp_path / "one")
    kept = contents(own_cache)
    [path] = own_cache.glob("*.json")
    path.write_text('{"sensitivities": [{"name": "x"}]}')
    quantize_here(recipe, checkpoint, tmp_path / "other")
    assert contents(own_cache) == kept
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_budget_that_is_too_small_is_refused_before_anything_is_measured(
    make_checkpoint: MakeCheckpoint, own_cache: Path, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint(make_checkpoint)
    recipe = recipe_of("mse", [{"tokens": 400}], budget="4 bits")
    with pytest.raises(InputError, match=r"quantization\.budget: holds .* needs at least .* MB"):
        quantize_here(recipe, checkpoint, tmp_path / "out")
    assert not own_cache.exists() and not (tmp_path / "out").exists()
