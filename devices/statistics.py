"""Medians, percentiles, and how sure a median is, without a word about the distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

#: How sure an interval is meant to be, and the fewest values that can be so sure.
CONFIDENCE = 0.95
FEWEST = 6


@dataclass(frozen=True)
class Summary:
    """`p50` and `p95` of all samples; `low` to `high` holds the median of the repeats with the
    probability `confidence`."""

    p50: float
    p95: float
    low: float
    high: float
    confidence: float
    repeats: int

    def narrow(self, precision: float) -> bool:
        """Whether the interval is sure enough and, to either side, within `precision` of p50."""
        sure = self.confidence >= CONFIDENCE
        return sure and max(self.high - self.p50, self.p50 - self.low) <= precision * self.p50

    def read_within(self, error: float) -> "Summary":
        """Of samples that were each read within `error`: so much wider is the interval."""
        return replace(self, low=max(0.0, self.low - error), high=self.high + error)

    def inverse(self, scale: float) -> "Summary":
        """Of `scale` divided by each sample: a rate. Its p95 is the slow side, as for times.
        `low` must be above 0."""
        return Summary(
            scale / self.p50, scale / self.p95, scale / self.high, scale / self.low,
            self.confidence, self.repeats,
        )  # fmt: skip


def summarize(repeats: Sequence[Sequence[float]]) -> Summary:
    """One list of samples for each repeat. Samples of one repeat depend on each other, so the
    interval is that of the repeats' medians."""
    medians = sorted(statistics.median(samples) for samples in repeats)
    everything = [sample for samples in repeats for sample in samples]
    index, confidence = _median_rank(len(medians))
    return Summary(
        p50=statistics.median(medians),
        p95=percentile(everything, 0.95),
        low=medians[index],
        high=medians[-1 - index],
        confidence=confidence,
        repeats=len(medians),
    )


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _median_rank(count: int) -> tuple[int, float]:
    """The innermost i for which the i-th smallest and the i-th largest of `count` values hold the
    median with `CONFIDENCE` (or 0, where none does), and how surely: the sign test's interval."""

    def surely(index: int) -> float:
        outside = sum(math.comb(count, k) for k in range(index + 1))
        return 1 - 2 * outside / float(2**count)

    index = 0
    while 2 * (index + 1) < count - 1 and surely(index + 1) >= CONFIDENCE:
        index += 1
    return index, surely(index)
