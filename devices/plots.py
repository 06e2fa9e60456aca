"""Plot a report: speed by depth, time to the first token, memory, and speed over time. What was
counted has axes of its own, below."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devices.files import replacing


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot to `path`, in the format of its suffix. Incomplete sessions are left out."""
    from matplotlib.figure import Figure

    sessions = [session for session in report["sessions"] if session["status"] == "complete"]
    counts = report.get("counts", [])
    figure = Figure(figsize=(11, 8 if not counts or not sessions else 12), layout="constrained")
    if not counts:
        _draw_sessions(figure, sessions)
    elif not sessions:
        _draw_counts(figure, counts)
    else:
        parts: Any = figure.subfigures(2, 1, height_ratios=[2, 1])
        _draw_sessions(parts[0], sessions)
        _draw_counts(parts[1], counts)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), metadata={})


def _draw_sessions(figure: Any, sessions: Sequence[Mapping[str, Any]]) -> None:
    (decode, prefill), (memory, sustained) = figure.subplots(2, 2)
    for session in sessions:
        label = _label(session)
        rates = [(e["depth"], e["tokens_per_second"]) for e in session["decode"]]
        _line(decode, rates, label)
        _line(prefill, [(e["tokens"], e["ms"]) for e in session["prefill"]], label)
        if session["sustained"]:
            speeds = session["sustained"]["tokens_per_second"]
            window = session["sustained"]["seconds"] / len(speeds)
            times = [(index + 0.5) * window for index in range(len(speeds))]
            sustained.plot(times, speeds, label=label)
        phases = {
            phase: seen["peak_rss"] / 1e6
            for phase, seen in session["memory"]["phases"].items()
            if seen["peak_rss"] > 0
        }
        memory.plot(list(phases), list(phases.values()), "o", label=label)
    for axes, title, x, y in (
        (decode, "Decode", "tokens in the cache", "tokens/s"),
        (prefill, "Time to the first token", "tokens of the prompt", "ms"),
        (memory, "Peak memory", "", "MB"),
        (sustained, "Sustained decoding", "s", "tokens/s"),
    ):
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if sessions:
        decode.legend()


def _draw_counts(figure: Any, counts: Sequence[Mapping[str, Any]]) -> None:
    """Bars of instructions and of bytes, a row for each phase."""
    phases = [
        (f"{one['target']}, {cpu['cpu']}, {name}", entry)
        for one in counts
        for cpu in one["counts"]
        for name, entry in (
            *((f"prefill {entry['from']} → {entry['to']}", entry) for entry in cpu["prefill"]),
            *((f"decode at {entry['depth']}", entry) for entry in cpu["decode"]),
        )
    ]
    rows = [name for name, _ in phases]
    unsized = any(entry["bytes"]["unsized"] for _, entry in phases)
    missing = ", without those of SVE and SME" if unsized else ""
    instructions, bytes_ = figure.subplots(1, 2, sharey=True)
    instructions.barh(rows, [entry["per_token"] / 1e6 for _, entry in phases])
    start = [0.0] * len(rows)
    for way in ("loaded", "stored"):
        sizes = [entry["bytes"][way] / 1e6 for _, entry in phases]
        bytes_.barh(rows, sizes, left=start, label=way)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    for axes, title, x in (
        (instructions, "Instructions (counted, no times)", "million a token"),
        (bytes_, "Bytes of loads and stores (counted)", f"MB a token{missing}"),
    ):
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3, axis="x")
    instructions.invert_yaxis()
    bytes_.legend()


def _label(session: Mapping[str, Any]) -> str:
    mark = "" if session["kind"] == "real" else f" ({session['kind'].upper()})"
    return f"{session['artifact']['format']} on {session['device']}{mark}"


def _line(axes: Any, points: list[tuple[int, Mapping[str, float]]], label: str) -> None:
    """Plot medians with their confidence intervals: (x, summary) for each point."""
    places = [place for place, _ in points]
    middle = [summary["p50"] for _, summary in points]
    errors = [
        [summary["p50"] - summary["low"] for _, summary in points],
        [summary["high"] - summary["p50"] for _, summary in points],
    ]
    axes.errorbar(places, middle, yerr=errors, marker="o", capsize=3, label=label)
