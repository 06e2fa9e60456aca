"""Coordinate descent: no step increases the error of the products, and the result is consistent."""

import pytest
import torch
from roundings import (
    EVERY_SCHEME,
    FEATURES,
    correlated_hessian,
    error,
    plainly_rounded,
    random_weight,
)
from torch import Tensor

from exporter.quantization import coordinate_descent as descent
from exporter.quantization.coordinate_descent import coordinate_descent
from exporter.quantization.gptq import gptq
from exporter.quantization.rounding import quantize, to_scale_grid
from exporter.quantization.schemes import CODE_RANGE, QuantizedTensor, Scheme


def started(weight: Tensor, hessian: Tensor, scheme: Scheme) -> QuantizedTensor:
    return gptq(weight, hessian, scheme).rounded


@EVERY_SCHEME
def test_it_loses_less_of_the_products_than_gptq(scheme: Scheme) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    start = started(weight, hessian, scheme)
    found = coordinate_descent(weight, hessian, start).rounded
    assert error(weight, found, hessian) < 0.95 * error(weight, start, hessian)


@EVERY_SCHEME
@pytest.mark.parametrize("method", ["gptq", "mse", "absmax"])
def test_no_round_makes_it_worse(
    method: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    gptqs = started(weight, hessian, scheme)
    start = gptqs if method == "gptq" else quantize(weight, scheme, method)
    errors = [error(weight, start, hessian)]
    for rounds in range(1, 5):
        monkeypatch.setattr(descent, "_ROUNDS", rounds)
        # Damping is a part of what is minimized.
        errors.append(
            error(weight, coordinate_descent(weight, hessian, start, 0.0).rounded, hessian)
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@EVERY_SCHEME
def test_in_the_end_no_single_code_would_be_better_otherwise(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_ROUNDS", 30)
    weight, hessian = random_weight(6), correlated_hessian()
    found = coordinate_descent(weight, hessian, started(weight, hessian, scheme), 0.0).rounded
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    least = error(weight, found, hessian)
    for row in range(6):
        for column in range(0, FEATURES, 7):
            for change in (-1, 1):
                codes = found.codes.clone()
                codes[row, column] = (codes[row, column] + change).clamp(lowest, highest)
                other = QuantizedTensor(codes, found.scales, scheme)
                assert error(weight, other, hessian) >= least * (1 - 1e-5)


@EVERY_SCHEME
def test_scales_that_fit_exactly_are_found(scheme: Scheme) -> None:
    exact = quantize(random_weight(), scheme, "absmax")
    weight, hessian = exact.dequantize(), correlated_hessian()
    off = QuantizedTensor(exact.codes, to_scale_grid(exact.scales * 1.02), scheme)
    assert not torch.equal(off.scales, exact.scales)
    found = coordinate_descent(weight, hessian, off).rounded
    assert torch.equal(found.scales, exact.scales)
    assert torch.equal(found.codes, exact.codes)


@EVERY_SCHEME
def test_inputs_that_do_not_correlate_give_plain_rounding(scheme: Scheme) -> None:
    weight = random_weight()
    found = coordinate_descent(weight, torch.eye(FEATURES), quantize(weight, scheme, "absmax"))
    assert torch.equal(found.rounded.codes, plainly_rounded(weight, found.rounded))


@EVERY_SCHEME
def test_codes_are_in_range_and_scales_on_the_portable_grid(scheme: Scheme) -> None:
    weight, hessian = 50 * random_weight(), correlated_hessian()
    found = coordinate_descent(weight, hessian, started(weight, hessian, scheme)).rounded
    assert scheme.bits is not None
    lowest, highest = CODE_RANGE[scheme.bits]
    assert lowest <= found.codes.min() and found.codes.max() <= highest
    assert found.codes.dtype == torch.int8
    assert torch.equal(to_scale_grid(found.scales), found.scales)


@EVERY_SCHEME
def test_the_weight_that_comes_back_rounds_to_the_codes(scheme: Scheme) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    found = coordinate_descent(weight, hessian, started(weight, hessian, scheme))
    assert torch.equal(plainly_rounded(found.weight, found.rounded), found.rounded.codes)
    assert not torch.equal(found.weight, weight)


@EVERY_SCHEME
def test_each_value_that_comes_back_is_the_best_for_all_other_codes(scheme: Scheme) -> None:
    weight, hessian = random_weight(4), correlated_hessian()
    found = coordinate_descent(weight, hessian, started(weight, hessian, scheme), 0.0)
    rounded, best = found.rounded.dequantize().double(), found.weight.double()
    slope = (rounded - weight.double()) @ hessian.double()
    expected = rounded - slope / hessian.diagonal().double()
    scale = found.rounded.scales.double().repeat_interleave(
        FEATURES // found.rounded.scales.shape[1], 1
    )
    inside = (expected - rounded).abs() < 0.49 * scale
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(best[inside], expected[inside], rtol=1e-3, atol=1e-4)


@EVERY_SCHEME
def test_a_weight_of_zeros_and_inputs_that_never_occur_change_nothing(scheme: Scheme) -> None:
    zeros = quantize(torch.zeros(8, FEATURES), scheme, "mse")
    found = coordinate_descent(torch.zeros(8, FEATURES), correlated_hessian(), zeros).rounded
    assert not found.codes.any()
    assert torch.equal(found.scales, zeros.scales)
    weight, nothing = random_weight(), torch.zeros(FEATURES, FEATURES)
    plain = quantize(weight, scheme, "mse")
    found = coordinate_descent(weight, nothing, plain).rounded
    assert error(weight, found, torch.eye(FEATURES)) <= error(weight, plain, torch.eye(FEATURES))
