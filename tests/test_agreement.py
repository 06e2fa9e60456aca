"""The agreement of two models' logits, on cases computed by hand."""

import math

import pytest
import torch

from exporter.evaluation.agreement import compare_logits


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits of these probabilities, shifted as a softmax allows."""
    return torch.tensor(rows).log() + 3.0


def test_equal_logits_agree_in_everything() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    found = compare_logits(logits, logits.clone())
    assert (found.positions, found.kl, found.top1, found.max_difference) == (5, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("reference", "other", "kl"),
    [
        ([0.5, 0.5], [0.25, 0.75], 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ([0.25, 0.75], [0.5, 0.5], 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([0.9, 0.1], [0.1, 0.9], 0.8 * math.log(9)),
    ],
)
def test_kl_is_that_of_the_reference_from_the_other(
    reference: list[float], other: list[float], kl: float
) -> None:
    assert compare_logits(logits_of(reference), logits_of(other)).kl == pytest.approx(kl, abs=1e-7)


def test_kl_is_the_mean_over_positions_and_worst_the_largest() -> None:
    reference = logits_of([0.5, 0.5], [0.5, 0.5], [0.5, 0.5])
    other = logits_of([0.5, 0.5], [0.1, 0.9], [0.4, 0.6])
    parts = [0.5 * math.log(0.25 / (a * (1 - a))) for a in (0.5, 0.1, 0.4)]
    found = compare_logits(reference, other)
    assert found.kl == pytest.approx(sum(parts) / 3, abs=1e-7)
    assert found.worst == 1


def test_a_constant_added_to_all_logits_changes_the_difference_alone() -> None:
    reference = torch.tensor([[1.0, 2.0, 3.0]])
    found = compare_logits(reference, reference + 4)
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert (found.top1, found.max_difference) == (1.0, 4.0)


def test_top1_is_the_share_of_positions_with_the_same_likeliest_token() -> None:
    reference = torch.eye(4)
    other = torch.eye(4)[[0, 1, 2, 0]]
    assert compare_logits(reference, other).top1 == 0.75


def test_the_largest_difference_is_found_wherever_it_is() -> None:
    reference, other = torch.zeros(3, 4), torch.zeros(3, 4)
    other[0, 1], other[2, 3] = 1.5, -2.5
    assert compare_logits(reference, other).max_difference == 2.5


def test_a_difference_too_small_for_float32_still_counts() -> None:
    """In float32, log_softmax of logits this close rounds to the same numbers."""
    reference, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[1e-5, 0.0]])
    assert compare_logits(reference, other).kl == pytest.approx(1.25e-11, rel=1e-3)


@pytest.mark.parametrize("position", [0, 2])
def test_nan_anywhere_gives_nan_and_names_its_position(position: int) -> None:
    reference = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    other = reference + 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    other[position, 3] = torch.nan
    found = compare_logits(reference, other)
    assert math.isnan(found.kl)
    assert math.isnan(found.max_difference)
    assert found.worst == position


def test_nan_passes_no_limit() -> None:
    found = compare_logits(torch.zeros(1, 2), torch.tensor([[torch.nan, 0.0]]))
    assert not found.kl <= 1e30
    assert not found.max_difference <= 1e30


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_logit_passes_no_limit(value: float) -> None:
    reference, other = torch.zeros(3, 2), torch.zeros(3, 2)
    other[1, 0] = value
    found = compare_logits(reference, other)
    assert not found.kl <= 1e30
    assert not found.max_difference <= 1e30
    assert found.worst == 1
