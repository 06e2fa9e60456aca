"""Plots of a calibration as PNG; the same numbers give the same bytes."""

import io
from collections.abc import Collection, Sequence
from typing import Any

from exporter.calibration.distill import TrainingHistory
from exporter.calibration.sensitivity import Sensitivity

_BLUE, _ORANGE, _GREY = "#1f77b4", "#ff7f0e", "#999999"


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()


def plot_history(history: TrainingHistory) -> bytes:
    """A PNG of the loss of each step, and of KL and top-1 agreement on the held-out text."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    steps = [evaluation.step for evaluation in history.evaluations]
    left.plot(range(1, len(history.losses) + 1), history.losses, color=_GREY, lw=0.7, label="loss")
    kl = [evaluation.kl for evaluation in history.evaluations]
    left.plot(steps, kl, "o-", color=_BLUE, label="held-out KL")
    top1 = [100 * evaluation.top1 for evaluation in history.evaluations]
    right.plot(steps, top1, "s-", color=_ORANGE, label="held-out top-1 agreement")
    left.axvline(history.best.step, color=_GREY, ls=":", lw=1)
    left.set(xlabel="step", ylabel="KL to the float checkpoint (nats)", ylim=(0, None))
    right.set(ylabel="same most likely token (%)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return _png(figure)


def plot_sensitivities(
    sensitivities: Sequence[Sensitivity], int8_weights: Collection[str]
) -> bytes:
    """A PNG of the KL of each weight; those that are stored as int8 are orange."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.16 * len(sensitivities)), layout="constrained")
    axes = figure.subplots()
    colors = [_ORANGE if entry.name in int8_weights else _BLUE for entry in sensitivities]
    names = [entry.name.removeprefix("model.").removesuffix(".weight") for entry in sensitivities]
    axes.barh(range(len(sensitivities)), [entry.kl for entry in sensitivities], color=colors)
    axes.set_yticks(range(len(sensitivities)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"KL in nats; orange: stored wider ({len(int8_weights)})")
    axes.tick_params(axis="x", which="both", labelsize=6)
    axes.margins(y=0.005)
    return _png(figure)
