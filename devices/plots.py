"""Plot a report: speed by depth, time to the first token, memory, and speed over time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices.files import replacing


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot to `path`, in the format of its suffix. Incomplete sessions are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (decode, prefill), (memory, sustained) = figure.subplots(2, 2)
    sessions = [session for session in report["sessions"] if session["status"] == "complete"]
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
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), metadata={})


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
