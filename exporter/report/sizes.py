"""Size by component: which part of a bundle the bytes belong to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from exporter.backends import front
from exporter.bundle.manifest import WeightEntry
from exporter.model.config import EMBEDDING, OUTPUT
from exporter.report.blocks import Figure, Section, Table
from exporter.report.plots import Bar, Style, Text, bars, listed
from exporter.report.subjects import Subject
from exporter.report.values import count, figure, megabytes

#: The kinds of weights, by a part of their names; a vector is always a norm.
_ATTENTION, _MLP = ("self_attn.",), ("mlp.", "feed_forward.")
EMBEDDINGS, ATTENTION, MLP, NORMS, HEAD, OTHER = (
    "embedding", "attention", "MLP", "norms", "output layer", "other weights",
)  # fmt: skip
COMPONENTS = (EMBEDDINGS, ATTENTION, MLP, NORMS, HEAD, OTHER)
GRAPH, TOKENIZER = "graph and packing", "tokenizer and settings"


def component(name: str, entry: WeightEntry) -> str:
    """The component that a weight belongs to."""
    if len(entry.shape) < 2:
        return NORMS
    if name in (EMBEDDING, OUTPUT):
        return EMBEDDINGS if name == EMBEDDING else HEAD
    kinds = ((ATTENTION, _ATTENTION), (MLP, _MLP))
    return next((kind for kind, parts in kinds if any(p in name for p in parts)), OTHER)


def stored(subject: Subject) -> dict[str, int]:
    """The bytes of each component in the quantized checkpoint, without those that have none."""
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, entry in subject.manifest.weights.items():
        sizes[component(name, entry)] += entry.bytes
    return {kind: size for kind, size in sizes.items() if size}


@dataclass(frozen=True)
class Folder:
    """The bytes of an artifact: of its model, and of the files beside it."""

    model: int
    beside: int


def folder_of(subject: Subject, target: str) -> Folder:
    """The sizes of the files of one target."""
    model, beside = 0, 0
    for name, entry in subject.manifest.files.items():
        if name.startswith(f"{target}/"):
            if name.removeprefix(f"{target}/") in front(target).FILES:
                model += entry.bytes
            else:
                beside += entry.bytes
    return Folder(model, beside)


def sizes(subjects: Sequence[Subject]) -> Section:
    """The section: a plot for each bundle, and the bits of each scheme."""
    notes = [
        "Bytes of files, not memory in use. Weights are counted as they are stored in the "
        "quantized checkpoint; what a model file has beyond them is its graph and its packing. A "
        "format that stores norms or scales in a shorter type can have less than that."
    ]
    return Section(
        "size",
        "Size by component",
        notes,
        [_figure(subject) for subject in subjects],
        [_schemes(subject) for subject in subjects],
    )


def _figure(subject: Subject) -> Figure:
    weights = stored(subject)
    used = [kind for kind in (*COMPONENTS, GRAPH, TOKENIZER) if kind in weights or
            kind in (GRAPH, TOKENIZER)]  # fmt: skip
    styles = {kind: Style(number) for number, kind in enumerate(used)}
    rows, cells = list[Bar](), dict[str, dict[str, int]]()
    for target in subject.manifest.targets:
        folder = folder_of(subject, target)
        extra = folder.model - sum(weights.values())
        parts: Mapping[str, int] = {**weights, GRAPH: extra, TOKENIZER: folder.beside}
        cells[target] = dict(parts)
        shown = [(size / 1e6, styles[kind]) for kind, size in parts.items() if size > 0]
        rows.append(Bar(target, shown, megabytes(folder.model + folder.beside)))
    table = Table(
        f"Bytes by component, {subject.title}",
        ("component", *cells),
        [
            *((kind, *(count(parts[kind]) for parts in cells.values())) for kind in used),
            ("sum", *(count(sum(parts.values())) for parts in cells.values())),
        ],
    )
    text = Text(
        f"size-{subject.letter or 'a'}",
        f"Size of each target, {subject.title}",
        f"Stacked bars of megabytes: {listed(rows)}.",
        "MB (million bytes)",
    )
    return Figure(text.title, partial(bars, text, rows, list(styles.items())), table)


def _schemes(subject: Subject) -> Table:
    """How many weights each scheme stores, in how many bits."""
    groups = dict[tuple[str, str], list[WeightEntry]]()
    for name, entry in subject.manifest.weights.items():
        groups.setdefault((component(name, entry), entry.scheme), []).append(entry)
    rows = []
    for kind in COMPONENTS:
        for (own, scheme), entries in groups.items():
            if own == kind:
                rows.append((kind, scheme, *_amounts(entries)))
    every = list(subject.manifest.weights.values())
    rows.append(("all", "", *_amounts(every)))
    return Table(
        f"Schemes of the weights, {subject.title}",
        ("component", "scheme", "weights", "parameters", "MB", "bits per parameter"),
        rows,
        2,
    )


def _amounts(entries: list[WeightEntry]) -> tuple[str, str, str, str]:
    parameters = sum(math.prod(entry.shape) for entry in entries)
    size = sum(entry.bytes for entry in entries)
    bits = 8 * size / parameters if parameters else None
    return count(len(entries)), count(parameters), figure(size / 1e6), figure(bits)
