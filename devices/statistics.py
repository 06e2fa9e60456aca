"""Medians, percentiles and confidence intervals of medians, for any distribution of samples."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

#: The wanted probability that an interval holds the median, and the fewest repeats that reach it.
CONFIDENCE = 0.95
FEWEST = 6


@dataclass(frozen=True)
class Summary:
    """Samples of one quantity, in the unit of the samples.

    `p50` is the median of the repeats' medians, `p95` a percentile of all samples. The interval
    from `low` to `high` holds the median of the repeats with the probability `confidence`.
    """

    p50: float
    p95: float
    low: float
    high: float
    confidence: float
    repeats: int

    def narrow(self, precision: float) -> bool:
        """Whether the confidence is reached and both ends of the interval are at most `precision`
        of `p50` away from it."""
        confident = self.confidence >= CONFIDENCE
        return confident and max(self.high - self.p50, self.p50 - self.low) <= precision * self.p50

    def widened(self, error: float) -> "Summary":
        """The summary for a clock that is wrong by up to `error`: both ends move that far out."""
        return replace(self, low=max(0.0, self.low - error), high=self.high + error)

    def inverse(self, scale: float) -> "Summary":
        """The summary of the rates `scale` / sample. `low` must be above 0.

        As for times, `p95` is on the slow side: 95 % of the rates are at least that high.
        """
        return Summary(
            scale / self.p50, scale / self.p95, scale / self.high, scale / self.low,
            self.confidence, self.repeats,
        )  # fmt: skip


def summarize(repeats: Sequence[Sequence[float]]) -> Summary:
    """Summarize one list of samples for each repeat.

    The samples of one repeat depend on each other, so the interval is that of the repeats' medians.
    """
    medians = sorted(statistics.median(samples) for samples in repeats)
    everything = [sample for samples in repeats for sample in samples]
    index, confidence = _median_rank(len(medians))
    return Summary(
        p50=statistics.median(medians),
        p95=float(np.quantile(everything, 0.95)),
        low=medians[index],
        high=medians[-1 - index],
        confidence=confidence,
        repeats=len(medians),
    )


def _median_rank(count: int) -> tuple[int, float]:
    """The interval of the sign test: a rank i from 0, and the probability that the median lies
    between the i-th smallest and the i-th largest of `count` values.

    i is the largest rank whose probability reaches `CONFIDENCE`, or 0 where none does.
    """

    def probability(index: int) -> float:
        outside = sum(math.comb(count, k) for k in range(index + 1))
        return 1 - 2 * outside / float(2**count)

    index = 0
    while 2 * (index + 1) < count - 1 and probability(index + 1) >= CONFIDENCE:
        index += 1
    return index, probability(index)
