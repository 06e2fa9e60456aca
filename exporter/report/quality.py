"""Quality: against bits per weight, by layer, and by position in the text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from exporter.report.blocks import Figure, Missing, Section, Table
from exporter.report.plots import Axes, Line, Measure, Point, Style, Text, label, lines, trade_off
from exporter.report.reproduce import evaluate_command
from exporter.report.subjects import Subject
from exporter.report.values import count, figure, mapping, mappings, number, share, text, whole

#: Measurements, and layers or bands of one, that a plot can show.
_MOST, _MOST_POINTS = 100, 200
#: The end of an axis of shares: 100, and room for a mark.
_PERCENT = 101


@dataclass(frozen=True)
class Evaluated:
    """One measurement of quality."""

    subject: Subject
    content: Mapping[str, Any]

    @property
    def figures(self) -> Mapping[str, Any]:
        """The figures, whatever the file has there."""
        return mapping(self.content, "figures")

    @property
    def target(self) -> str | None:
        """The target; None for the quantized checkpoint."""
        target = self.content["target"]
        return target if target is None else str(target)

    @property
    def label(self) -> str:
        """What was measured."""
        return self.subject.case(self.target)

    @property
    def style(self) -> Style:
        """The look in plots."""
        return self.subject.style(self.target)

    def source(self, kind: "_Quality") -> tuple[str, ...]:
        """What a figure depends on beside the weights: whether the artifact itself ran, hashes of
        its file, of the tokenizer and of the reference, and the settings. Figures of different ones
        share no plot."""
        settings = mapping(self.content, "settings")
        chosen = [str(settings.get(key)) for key in _SETTINGS[kind.file]]
        chosen.append(str(self.how.startswith("run")))
        if kind.file == "data":
            chosen.append(str(self.content["files"].get("tokenizer.json")))
        if kind.key == "kl":
            chosen.append(str(self.content["reference"]))
        return text(mapping(self.content, kind.file), "sha256"), *chosen

    @property
    def how(self) -> str:
        """How the figures were got."""
        if mapping(self.content, "settings").get("simulate"):
            return "simulated in torch"
        if self.target is None:
            return "run in torch"
        return "interpreted" if "interpreted" in text(self.figures, "kind") else "run"


def evaluated(subjects: Sequence[Subject]) -> list[Evaluated]:
    """The measurements of quality of these bundles, in the order of their targets."""
    found = [
        Evaluated(one, content)
        for one in subjects
        for target in (*one.manifest.targets, None)
        for content in one.evaluations()
        if content["target"] == target
    ]
    return found[:_MOST]


@dataclass(frozen=True)
class _Quality:
    """A figure of quality: its key, its name, the key of the reference, how it is shown."""

    key: str
    name: str
    short: str
    reference: str
    unit: str
    less_is_better: bool
    percent: bool = False
    file: str = "data"


#: The settings that a figure depends on, by the file that it is measured on.
_SETTINGS = {
    "data": ("max_tokens", "sequence_length", "prefill"),
    "task": ("limit", "max_new_tokens"),
}
_KL = _Quality("kl", "KL to the reference", "KL", "", "nats", True)
_QUALITIES = (
    _KL,
    _Quality("perplexity", "Perplexity", "perplexity", "reference_perplexity", "", True),
    _Quality(
        "accuracy", "Problems solved", "problems solved", "", "", False, percent=True, file="task"
    ),
)


def quality(subjects: Sequence[Subject]) -> Section:
    """The section: every quality against the bits per weight."""
    found = evaluated(subjects)
    figures = list[Figure]()
    for kind in _QUALITIES:
        for same in _by_source(found, kind):
            made = _trade_off(kind, same, len(figures))
            figures += [made] if made else []
    notes = [
        "Each model is a point: fewer bits are further left. A dotted line joins the models that "
        "no other beats in both. Only figures of the same text and settings share a plot, and none "
        "of a runtime and of an interpreter."
    ]
    return Section(
        "quality",
        "Quality against bits per weight",
        notes if figures else (),
        figures,
        [_table(found)] if found else [],
        missing=_unmeasured(subjects),
    )


def _unmeasured(subjects: Sequence[Subject]) -> list[Missing]:
    found = list[Missing]()
    for subject in subjects:
        measured = {content["target"] for content in subject.evaluations()}
        left = [target for target in subject.manifest.targets if target not in measured]
        if left:
            what = f"{subject.title}: the quality of {', '.join(left)} is not measured."
            found.append(Missing(what, [evaluate_command(target) for target in left]))
    return found


def _trade_off(kind: _Quality, found: Sequence[Evaluated], index: int) -> Figure | None:
    scale = 100 if kind.percent else 1
    measured = [(one, number(one.figures, kind.key)) for one in found]
    points = [
        Point(one.label, one.style, one.subject.manifest.bits_per_weight(), value * scale)
        for one, value in measured
        if value is not None
    ]
    if not points:
        return None
    references = {number(one.figures, kind.reference) for one in found} - {None}
    reference = references.pop() if len(references) == 1 else None
    unit = "%" if kind.percent else kind.unit
    y = f"{kind.short} ({unit})" if unit else kind.short
    better = "lower is better" if kind.less_is_better else "higher is better"
    about = "; ".join(f"{label(p.label)}: {figure(p.x)} bits, {figure(p.y, unit)}" for p in points)
    words = Text(
        f"quality-{index}-{kind.key.replace('_', '-')}",
        f"{kind.name} against bits per weight {_measured_on(found[0], kind.file)}",
        f"Points, {better}. {about}.",
        "bits per weight, scales included",
    )
    most = _PERCENT if kind.percent else None
    measure = Measure(f"{y}, {better}", kind.less_is_better, kind.key == "kl", reference, most)
    table = Table(
        words.title,
        ("model", "bits per weight", y),
        [(p.label, figure(p.x), figure(p.y)) for p in points]
        + ([("reference, not quantized", "–", figure(reference))] if reference else []),
    )
    return Figure(words.title, partial(trade_off, words, points, measure), table)


def _measured_on(one: Evaluated, kind: str) -> str:
    """The file, how much of it was measured, and whether another runtime stood in."""
    key, unit = ("tokens", "predictions") if kind == "data" else ("problems", "problems")
    amount = f", {count(whole(one.figures, key))} {unit}"
    return f"on {_file(one, kind)}{amount}" + ("" if one.how.startswith("run") else f", {one.how}")


def _by_source(found: Sequence[Evaluated], kind: _Quality) -> Iterator[list[Evaluated]]:
    """The measurements that can share a plot."""
    for source in dict.fromkeys(one.source(kind) for one in found):
        yield [one for one in found if one.source(kind) == source]


def _file(one: Evaluated, *kinds: str) -> str:
    names = [text(mapping(one.content, kind), "file") for kind in kinds]
    return " and ".join(dict.fromkeys(name for name in names if name)) or "unnamed data"


def _table(found: Sequence[Evaluated]) -> Table:
    rows = []
    for one in found:
        values = one.figures
        perplexity, error = number(values, "perplexity"), number(values, "perplexity_error")
        shown = figure(perplexity) + (f" ± {error:.2g}" if error is not None else "")
        rows.append(
            (
                one.label, one.how, _file(one, *_SETTINGS), shown,
                figure(number(values, "reference_perplexity")), figure(number(values, "kl")),
                share(number(values, "top1_agreement")), share(number(values, "accuracy")),
                share(number(values, "never_ended")), count(whole(values, "tokens")),
                count(whole(values, "problems")),
            )
        )  # fmt: skip
    columns = (
        "model", "how", "data", "perplexity", "perplexity of the reference", "KL (nats)",
        "top-1 agreement", "problems solved", "never ended", "predictions", "problems",
    )  # fmt: skip
    return Table("Quality of each model", columns, rows, 3)


def by_layer(subjects: Sequence[Subject]) -> Section:
    """The section: how much each layer alone changes the predictions."""
    found = [one for one in evaluated(subjects) if any(_layers(one))]
    figures = [_layer_figure(same, n) for n, same in enumerate(_by_source(found, _KL))]
    missing = list[Missing]()
    measured = {id(one.subject) for one in found}
    for subject in subjects:
        if id(subject) not in measured:
            missing.append(
                Missing(
                    f"{subject.title}: the KL of each layer is not measured.",
                    [evaluate_command(None, layers=True)],
                )
            )
    notes = ["The KL that each layer causes alone, with every other layer in float."]
    return Section("layers", "KL by layer", notes if figures else (), figures, missing=missing)


def _layer_figure(found: Sequence[Evaluated], index: int) -> Figure:
    series = [(one, dict(_layers(one))) for one in found]
    names = list(dict.fromkeys(name for _, layers in series for name in layers))
    places = {name: place for place, name in enumerate(names)}
    words = Text(
        f"layers-{index}",
        f"KL by layer {_measured_on(found[0], 'data')}",
        f"A line for each model, with the KL in nats of each of {len(names)} layers.",
        "layer",
    )
    drawn = [
        Line(one.label, one.style, [(places[name], value) for name, value in layers.items()])
        for one, layers in series
    ]
    step = max(1, -(-len(names) // 10))
    ticks = [(places[name], _short(name)) for name in names[::step]]
    table = Table(
        f"{words.title} (nats)",
        ("layer", *(one.label for one, _ in series)),
        [(name, *(figure(layers.get(name)) for _, layers in series)) for name in names],
    )
    return Figure(words.title, partial(lines, words, drawn, Axes("KL (nats)", ticks)), table)


def _layers(one: Evaluated) -> Iterator[tuple[str, float]]:
    for entry in islice(mappings(one.figures, "kl_by_layer"), _MOST_POINTS):
        value = number(entry, "kl")
        if value is not None and text(entry, "layer"):
            yield text(entry, "layer"), value


def _short(name: str) -> str:
    """``model.layers.3`` → 3, ``model.embed_tokens`` → emb, ``lm_head`` → head."""
    last = name.rsplit(".", 1)[-1]
    known = {"embed_tokens": "emb", "lm_head": "head"}
    return last if last.isdigit() else known.get(last, last[:6])


def by_position(subjects: Sequence[Subject]) -> Section:
    """The section: agreement and KL at early and late positions of the text."""
    found = [one for one in evaluated(subjects) if any(_bands(one))]
    figures = list[Figure]()
    for key, name, unit in (("top1_agreement", "Top-1 agreement", "%"), ("kl", "KL", "nats")):
        for same in _by_source(found, _KL):
            made = _position_figure(same, key, (name, unit), len(figures))
            figures += [made] if made else []
    missing = [
        Missing(
            f"{subject.title}: agreement by position is not measured.",
            [evaluate_command(subject.manifest.targets[0])],
        )
        for subject in subjects
        if all(one.subject is not subject for one in found)
    ]
    notes = [
        "Whether quantization errors grow with the length of the text. Each band has as many "
        "positions as all bands before it."
    ]
    return Section(
        "positions", "Agreement by position", notes if figures else (), figures, missing=missing
    )


def _bands(one: Evaluated) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for band in islice(mappings(one.figures, "agreement_by_position"), _MOST_POINTS):
        first, last = whole(band, "first"), whole(band, "last")
        if first is not None and last is not None and number(band, "kl") is not None:
            yield f"{first}–{last}", band


def _position_figure(
    found: Sequence[Evaluated], key: str, named: tuple[str, str], index: int
) -> Figure | None:
    name, unit = named
    scale = 100 if unit == "%" else 1
    series = list[tuple[Evaluated, dict[str, float]]]()
    for one in found:
        values = {band: number(figures, key) for band, figures in _bands(one)}
        series.append((one, {b: value * scale for b, value in values.items() if value is not None}))
    series = [(one, values) for one, values in series if values]
    if not series:
        return None
    bands = sorted({band for _, values in series for band in values}, key=_first_of)
    places = {band: place for place, band in enumerate(bands)}
    words = Text(
        f"positions-{index}-{key.replace('_', '-')}",
        f"{name} by position {_measured_on(found[0], 'data')}",
        f"A line for each model over {len(bands)} bands of positions, in {unit}.",
        "positions in the text",
    )
    drawn = [
        Line(one.label, one.style, [(places[band], value) for band, value in values.items()])
        for one, values in series
    ]
    axes = Axes(
        f"{name} ({unit})", [(place, band.split("–")[0] + "–") for band, place in places.items()],
        zero=unit != "%", most=_PERCENT if unit == "%" else None,
    )  # fmt: skip
    table = Table(
        f"{words.title} ({unit})",
        ("positions", *(one.label for one, _ in series)),
        [(band, *(figure(values.get(band)) for _, values in series)) for band in bands],
    )
    return Figure(words.title, partial(lines, words, drawn, axes), table)


def _first_of(band: str) -> tuple[int, int]:
    first, _, last = band.partition("–")
    return int(first), int(last)
