"""The gate: judge a bundle by a budget and by a baseline.

mobilellm gate nano.tar.zst --budget budget.yaml --baseline last-release.tar.zst
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devices.statistics import summarize
from exporter.backends import names
from exporter.bundle.archive import opened
from exporter.bundle.bundle import file_problems, is_bundle, open_bundle
from exporter.bundle.manifest import MANIFEST, BundleManifest, read_manifest
from exporter.bundle.results import RESULTS, Result, check_belongs, read_result
from exporter.errors import InputError, short
from exporter.files import differing_files
from exporter.gate.baseline import compare
from exporter.gate.budget import Limit, limits, read_budget
from exporter.gate.figure import (
    ARCHIVE,
    INSTRUCTIONS,
    LATENCY,
    UNDELEGATED,
    Figure,
    Figures,
)
from exporter.gate.figures import collect
from exporter.gate.finding import BUDGET, Finding
from exporter.gate.quantities import RATE
from exporter.progress import Progress, no_progress


@dataclass(frozen=True)
class Verdict:
    """The findings of a gate: first those of the budget, then those against the baseline. `notes`
    say what was not compared."""

    findings: Sequence[Finding]
    notes: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return all(finding.passed for finding in self.findings)


def gate(
    bundle: Path,
    budget: Path,
    baseline: Path | None = None,
    extra: Sequence[Path] = (),
    progress: Progress = no_progress,
) -> Verdict:
    """Judge a bundle, as a folder or an archive, by its own measurements and those in `extra`.

    Raises InputError for a bad budget, for a bundle whose files are damaged, and for a measurement
    of other files.
    """
    wanted = read_budget(budget)
    bounds = limits(wanted)
    if not bounds and baseline is None:
        raise InputError(budget, "sets no limit", "Set one, or give --baseline")
    progress("gate", 0, 2, "read the bundle")
    now = _figures_of(bundle, extra)
    findings = [finding for limit in bounds for finding in judge(limit, now)]
    notes: Sequence[str] = ()
    if baseline is not None:
        progress("gate", 1, 2, "read the baseline")
        compared = compare(now, _figures_of(baseline, whole=False), wanted.baseline)
        findings += compared.findings
        notes = compared.notes
    progress("gate", 2, 2)
    return Verdict(findings, notes)


def _figures_of(path: Path, extra: Sequence[Path] = (), *, whole: bool = True) -> Figures:
    """The figures of a bundle, once the hashes of its files are checked.

    Unless `whole`, a folder with a manifest and measurements is enough.
    """
    with opened(path) as folder:
        partial = not (whole or is_bundle(folder)) and (folder / MANIFEST).is_file()
        manifest = _checked_part(folder) if partial else _checked_bundle(folder)
        found = dict[str, Result]()
        for file in (*(folder / name for name in _measurements(manifest)), *extra):
            result = read_result(file)
            check_belongs(result, manifest, file)
            if result not in found.values():
                found[str(file)] = result
        figures = collect(manifest, found)
    if not path.is_file():
        return figures
    archive = Figure("archive", ARCHIVE, path.stat().st_size, "bytes")
    return Figures([*figures.figures, archive], figures.gaps)


def _measurements(manifest: BundleManifest) -> Sequence[str]:
    return [name for name in manifest.files if name.startswith(f"{RESULTS}/")]


def _checked_bundle(folder: Path) -> BundleManifest:
    manifest = open_bundle(folder).manifest
    _refuse(folder, file_problems(folder))
    return manifest


def _checked_part(folder: Path) -> BundleManifest:
    manifest = read_manifest(folder)
    for target in manifest.targets:
        if target not in names():
            known = f"Known: {', '.join(names())}"
            raise InputError(folder / MANIFEST, f"{short(target)} is not a target", known)
    hashes = {name: manifest.files[name].sha256 for name in _measurements(manifest)}
    _refuse(folder, differing_files(folder, hashes))
    return manifest


def _refuse(folder: Path, problems: Mapping[str, str]) -> None:
    for name, problem in problems.items():
        raise InputError(folder / name, problem, "The bundle is damaged: get or export it again")


def judge(limit: Limit, now: Figures) -> Iterator[Finding]:
    """A finding for each measurement of the limit's figure, or one that says how to measure it."""
    found = [
        figure
        for figure in now.figures
        if (figure.name, figure.target) == (limit.name, limit.target)
        if limit.device is None or limit.device in figure.devices
    ]
    problems = [_problem(limit, figure) for figure in found]
    usable = [figure for figure, problem in zip(found, problems, strict=True) if not problem]
    for figure in usable:
        yield _judged(limit, figure)
    if not usable:
        wanted = Figure(limit.name, "", 0, "", limit.target, (limit.device or "",))
        problems += [gap.reason for gap in now.gaps if gap.leaves_out(wanted)]
        reason = f" ({problems[0]})" if problems else ""
        note = f"not measured{reason}; run: {limit.command}"
        yield _finding(limit, None, passed=False, note=note)


def _problem(limit: Limit, figure: Figure) -> str:
    """Why a figure cannot be judged, or ''."""
    if limit.sha256 and figure.conditions.get("data") != limit.sha256:
        return "on another file of this name"
    return figure.unusable


def _judged(limit: Limit, figure: Figure) -> Finding:
    rate = limit.bound.unit == RATE
    value = 1000 * figure.tokens / figure.value if rate else figure.value
    notes = [_setting(figure)]
    if len(figure.repeats) > 1:
        spread = summarize(figure.repeats).widened(figure.error)
        ends = (spread.low, spread.high) if not rate else (spread.high, spread.low)
        low, high = (1000 * figure.tokens / end if rate else end for end in ends)
        if low <= limit.bound.value <= high:
            notes.append("the limit lies in the 95 % interval of the median")
    notes += ["a count, not a time"] if figure.kind == INSTRUCTIONS else []
    notes += list(figure.parts) if figure.kind == UNDELEGATED else []
    passed = limit.bound.holds(value)
    return _finding(limit, value, passed=passed, note="; ".join(filter(None, notes)))


def _setting(figure: Figure) -> str:
    """The conditions that a reader needs to judge a time."""
    if figure.kind != LATENCY:
        return ""
    kind, threads = figure.conditions["kind of device"], figure.conditions["threads"]
    parts = [figure.conditions["engine"], f"{threads} threads"]
    parts += [f"cores {cores}"] if (cores := figure.conditions["cores"]) != "all" else []
    return ", ".join(parts if kind == "real" else [*parts, f"{kind} device"])


def _finding(limit: Limit, value: float | None, *, passed: bool, note: str) -> Finding:
    bound = limit.bound
    return Finding(
        BUDGET, limit.name, limit.target, limit.device, value, bound.value, bound.unit,
        bound.at_most, passed, note,
    )  # fmt: skip
