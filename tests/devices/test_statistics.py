"""Medians with their intervals, and percentiles, against known values and a simulation."""

import random
import statistics

import numpy as np
import pytest

from devices.statistics import CONFIDENCE, FEWEST, summarize


def test_the_percentile_is_of_all_samples_and_linear_between_the_two_nearest() -> None:
    assert summarize([[1.0, 2.0], [3.0, 5.0]]).p95 == pytest.approx(3 + 0.85 * 2)
    assert summarize([[4.0]]).p95 == 4.0


def test_fewer_repeats_than_six_are_never_sure() -> None:
    assert summarize([[1.0]] * (FEWEST - 1)).confidence < CONFIDENCE
    assert not summarize([[1.0]] * (FEWEST - 1)).narrow(0.5)
    assert summarize([[1.0]] * FEWEST).confidence == 1 - 2 / 2**FEWEST
    assert summarize([[1.0]] * FEWEST).narrow(0.01)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    chance, hits, rounds = random.Random(0), 0, 2000
    for _ in range(rounds):  # skewed, as times are
        summary = summarize([[chance.expovariate(1.0)] for _ in range(12)])
        hits += summary.low <= 0.6931 <= summary.high
    assert hits / rounds == pytest.approx(summary.confidence, abs=0.015)
    assert summary.confidence >= CONFIDENCE


def test_samples_of_one_repeat_do_not_make_a_median_surer() -> None:
    """A hundred steps of one slow process are one observation of how slow a process can be."""
    calm, slow = [1.0] * 100, [2.0] * 100
    summary = summarize([calm, calm, calm, slow, slow, slow, calm])
    assert (summary.low, summary.p50, summary.high) == (1.0, 1.0, 2.0)
    assert not summary.narrow(0.05)


def test_a_rate_keeps_its_slow_side() -> None:
    summary = summarize([[10.0, 20.0]] * 6)
    rate = summary.inverse(1000.0)
    assert rate.p50 == pytest.approx(1000 / 15)
    assert rate.p95 == pytest.approx(1000 / np.quantile([10.0, 20.0] * 6, 0.95))
    assert rate.p95 < rate.low <= rate.p50 <= rate.high
    assert summary.p50 == statistics.median([10.0, 20.0])


def test_a_coarse_clock_widens_the_interval() -> None:
    summary = summarize([[20.0]] * 6).widened(1.0)
    assert (summary.low, summary.p50, summary.high) == (19.0, 20.0, 21.0)
    assert summary.narrow(0.05) and not summary.narrow(0.04)
    assert summarize([[0.0]] * 6).widened(1.0).low == 0
