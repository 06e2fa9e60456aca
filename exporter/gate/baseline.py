"""Compare the figures of a bundle with those of a baseline: is something worse, beyond noise?

Times and memory are compared by their raw samples. The samples of one repeat depend on each other,
so each repeat counts as one value, its median. Yuen's test compares the trimmed means of their
logarithms: a fifth of the repeats at either end does not count, so that a burst of load on the
machine neither hides a slow-down nor looks like one. Accuracy is compared problem by problem,
perplexity, KL and agreement by their standard errors. Sizes and instructions have no noise.

Holm's method corrects for the number of figures: the probability of any false alarm in a whole
comparison is at most `ALPHA`. An alarm also needs a change above the tolerance.
"""

import math
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from devices.statistics import FEWEST
from exporter.gate.budget import Tolerances
from exporter.gate.figure import LATENCY, NOT_COMPARED, UNDELEGATED, Figure, Figures
from exporter.gate.finding import BASELINE, Finding
from exporter.gate.quantities import show

#: The probability of any false alarm, over all figures of a comparison. The gate promises less than
#: 0.01, but times on a busy machine are far from the normal distribution of the test: at 0.01 and
#: 0.005 they gave 0.018 and 0.012 (docs/benchmarks.md).
ALPHA = 0.001
#: The share of the repeats that is trimmed at each end.
_TRIM = 0.2
#: Two processes had the processor alike if their shares of it differ by at most so much, or by the
#: tolerance.
_SHARE = 0.05
#: A time that a clock cannot tell from 0, in milliseconds.
_SHORTEST = 1e-6
_SHARES = ("top1_agreement", "accuracy")


@dataclass(frozen=True)
class Change:
    """How much worse a figure is than the baseline's.

    `now` and `before` are the compared values and `worse` their difference, relative but for shares
    and products; `error` is the part of it that a coarse clock explains. `p` is the probability of
    such a difference between equals, None where there is no noise.
    """

    now: float
    before: float
    worse: float
    error: float = 0.0
    p: float | None = None


def change(now: Figure, before: Figure) -> Change:
    """Compare two figures of one name."""
    if now.kind == UNDELEGATED:
        return Change(now.value, before.value, now.value - before.value)
    if now.kind in _SHARES:
        worse = before.value - now.value
        return Change(now.value, before.value, worse, p=_share(worse, now, before))
    if now.repeats:
        return _of_repeats(now, before)
    worse = _ratio(now.value, before.value) - 1
    if now.error and before.error and now.value > 0 and before.value > 0:  # of a logarithm
        errors = (figure.error / figure.value for figure in (now, before))
        return Change(now.value, before.value, worse, p=_normal(math.log1p(worse), *errors))
    return Change(now.value, before.value, worse)


def _ratio(value: float, other: float) -> float:
    """value / other; infinite for what grew from 0, 1 where both are 0."""
    if other:
        return value / other
    return math.inf if value else 1.0


def _normal(difference: float, *errors: float) -> float:
    """The one-sided p of a difference of two values with these standard errors."""
    error = math.hypot(*errors)
    return float(stats.norm.sf(difference / error)) if error else float(difference <= 0)


def _share(worse: float, now: Figure, before: Figure) -> float:
    """The one-sided p of a share that fell: by the problems that only one of two solved (McNemar's
    exact test) where both results have them, or else by the standard errors."""
    if now.solved and len(now.solved) == len(before.solved):
        pairs = list(zip(now.solved, before.solved, strict=True))
        lost, won = pairs.count((0, 1)), pairs.count((1, 0))
        return float(stats.binom.sf(lost - 1, lost + won, 0.5))
    return _normal(worse, now.error, before.error)


def _of_repeats(now: Figure, before: Figure) -> Change:
    logs = [
        np.log([max(statistics.median(samples), _SHORTEST) for samples in figure.repeats])
        for figure in (now, before)
    ]
    ours, theirs = (float(stats.trim_mean(values, _TRIM)) for values in logs)
    with warnings.catch_warnings():  # that values are nearly equal, as a coarse clock gives them
        warnings.simplefilter("ignore", RuntimeWarning)
        test = stats.ttest_ind(*logs, equal_var=False, trim=_TRIM, alternative="greater")
    p = float(ours <= theirs) if math.isnan(test.pvalue) else float(test.pvalue)
    error = (now.error + before.error) / before.value
    return Change(math.exp(ours), math.exp(theirs), math.expm1(ours - theirs), error, p)


def holm(probabilities: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's method: one at most `ALPHA` is significant."""
    adjusted, highest = [0.0] * len(probabilities), 0.0
    for rank, index in enumerate(sorted(range(len(probabilities)), key=probabilities.__getitem__)):
        highest = max(highest, (len(probabilities) - rank) * probabilities[index])
        adjusted[index] = min(1.0, highest)
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """The findings of a comparison, and what was not compared, each with its reason."""

    findings: Sequence[Finding]
    notes: Sequence[str]


def compare(now: Figures, before: Figures, tolerances: Tolerances) -> Comparison:
    """Compare every figure of the baseline that has a tolerance.

    A figure that the bundle lacks, or that was measured under other conditions, fails. So does a
    tolerance that the budget sets for figures of which the baseline has none.
    """
    findings, notes = list[Finding](), list[str]()
    pairs = list[tuple[Figure, Figure, float]]()
    for old in before.figures:
        tolerance = _tolerance(old, tolerances)
        if tolerance is None:
            continue
        if old.unusable:
            notes.append(f"{_named(old)}: not compared ({old.unusable})")
            continue
        new, problem = _counterpart(old, now)
        if new is None:
            findings.append(_failed(old, problem))
        elif new.repeats and min(len(new.repeats), len(old.repeats)) < FEWEST:
            found = f"{len(new.repeats)} repeats now, {len(old.repeats)} in the baseline"
            findings.append(_failed(old, f"{found}: a comparison needs {FEWEST} of each"))
        elif new.kind == LATENCY and (busy := _busy(new, old, tolerance)):
            findings.append(_failed(old, busy))
        else:
            pairs.append((new, old, tolerance))
    findings += _judged(pairs)
    findings += _vacuous(tolerances, before)
    known = {(old.name, old.target, name) for old in before.figures for name in _devices(old)}
    for new in now.figures:
        keys = {(new.name, new.target, name) for name in _devices(new)}
        if _tolerance(new, tolerances) is not None and not keys & known:
            notes.append(f"{_named(new)}: new, the baseline does not have it")
    return Comparison(findings, notes)


def _tolerance(figure: Figure, tolerances: Tolerances) -> float | None:
    """The tolerance of a figure, None for one that is not compared."""
    if figure.kind == UNDELEGATED:
        return 0.0
    if figure.kind in NOT_COMPARED:
        return None
    tolerance: float | None = getattr(tolerances, figure.kind)
    return tolerance


def _devices(figure: Figure) -> tuple[str | None, ...]:
    return figure.devices or (None,)


def _named(figure: Figure) -> str:
    return ", ".join(part for part in (figure.target, figure.device, figure.name) if part)


def _counterpart(old: Figure, now: Figures) -> tuple[Figure | None, str]:
    """The figure of the bundle that may be compared with one of the baseline, or why there is
    none."""
    same = [
        figure
        for figure in now.figures
        if (figure.name, figure.target) == (old.name, old.target)
        if set(_devices(figure)) & set(_devices(old))
    ]
    if not same:
        reasons = [gap.reason for gap in now.gaps if gap.leaves_out(old)]
        because = f" ({reasons[0]})" if reasons else ""
        return None, f"the baseline has it, and it was not measured now{because}"
    for figure in same:
        if figure.conditions == old.conditions:
            problem = f"not compared: {figure.unusable}"
            return (None, problem) if figure.unusable else (figure, "")
    new = same[-1].conditions
    differing = [
        f"{key} {new.get(key)}, baseline {value}"
        for key, value in old.conditions.items()
        if new.get(key) != value
    ]
    return None, f"not comparable: {'; '.join(differing)}"


def _busy(new: Figure, old: Figure, tolerance: float) -> str:
    """Why times cannot be compared: other programs took the processor from one of them."""
    if not new.cpu_share or not old.cpu_share:
        return ""
    if abs(new.cpu_share / old.cpu_share - 1) <= max(_SHARE, tolerance):
        return ""
    return (
        f"not comparable: its process had {new.cpu_share:.2f} cores on average, the baseline's "
        f"{old.cpu_share:.2f}; measure both while nothing else runs"
    )


def _failed(old: Figure, problem: str) -> Finding:
    return Finding(
        BASELINE, old.name, old.target, old.device, None, None, old.unit, True, False, problem
    )


def _judged(pairs: Sequence[tuple[Figure, Figure, float]]) -> Iterator[Finding]:
    """A finding for each pair of figures and its tolerance: all pairs are one family of tests."""
    changes = [change(new, old) for new, old, _ in pairs]
    noisy = [index for index, found in enumerate(changes) if found.p is not None]
    adjusted = dict(zip(noisy, holm([changes[index].p or 0.0 for index in noisy]), strict=True))
    for index, ((new, old, tolerance), found) in enumerate(zip(pairs, changes, strict=True)):
        allowed = tolerance + found.error
        above = not found.worse <= allowed  # NaN is no pass
        p = adjusted.get(index)
        passed = not above or (p is not None and p > ALPHA)
        notes = [f"baseline {show(found.before, new.unit)}: {_shown(found, new)}"]
        if p is not None and above:
            notes.append(f"p {p:.2g}" + (", may be noise: measure more repeats" if passed else ""))
        notes += _largest_part(new, old) if above else []
        at_most = new.kind not in _SHARES
        limit = found.before - allowed if not at_most else found.before * (1 + allowed)
        if new.kind == UNDELEGATED:
            limit = found.before
        yield Finding(
            BASELINE, new.name, new.target, new.device, found.now, limit, new.unit, at_most,
            passed, "; ".join(notes),
        )  # fmt: skip


def _shown(found: Change, figure: Figure) -> str:
    """A change as text, with its sign: + is worse, but for shares, which fall."""
    if figure.kind == UNDELEGATED:
        return f"{found.worse:+.0f}"
    if figure.kind in _SHARES:
        return f"{100 * (found.now - found.before):+.2f} points"
    return f"{100 * found.worse:+.2f} %"


def _largest_part(new: Figure, old: Figure) -> list[str]:
    """The file or function that grew most."""
    grown = {name: size - old.parts.get(name, 0.0) for name, size in new.parts.items()}
    name = max(grown, key=grown.__getitem__, default="")
    if not name or grown[name] <= 0:
        return []
    known = "" if name in old.parts else ", which the baseline does not have"
    return [f"most in {name}: +{show(grown[name], new.unit)}{known}"]


def _vacuous(tolerances: Tolerances, before: Figures) -> Iterator[Finding]:
    """A finding for each tolerance that the budget sets and that nothing was compared by."""
    for kind in Tolerances.model_fields:
        wanted = kind in tolerances.model_fields_set and getattr(tolerances, kind) is not None
        if wanted and all(old.kind != kind or old.unusable for old in before.figures):
            problem = "the budget sets a tolerance, and the baseline has no such figure: package "
            problem += "the baseline with its measurements, or write ignore"
            yield Finding(BASELINE, kind, None, None, None, None, "", True, False, problem)
