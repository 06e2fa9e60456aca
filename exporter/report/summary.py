"""The summary: what each bundle is, what was checked, and its headline figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from exporter.report.blocks import Table
from exporter.report.counts import counted
from exporter.report.quality import evaluated
from exporter.report.sizes import folder_of
from exporter.report.speed import EMULATED, MACHINES, complete, device_name
from exporter.report.subjects import Subject
from exporter.report.values import (
    count,
    figure,
    mapping,
    mappings,
    megabytes,
    number,
    share,
    text,
    whole,
)

NOT_RUN = "not run"


@dataclass(frozen=True)
class Headline:
    """A headline figure, and how it was got."""

    name: str
    value: str
    how: str


@dataclass(frozen=True)
class Card:
    """The summary of one bundle. `checks` are (whether it was checked for this page, what)."""

    title: str
    facts: Sequence[tuple[str, str]]
    checks: Sequence[tuple[bool, str]]
    headlines: Mapping[str, Sequence[Headline]]


def card(subject: Subject) -> Card:
    """The summary of one bundle."""
    return Card(subject.title, list(_facts(subject)), list(_checks(subject)), headlines(subject))


def _facts(subject: Subject) -> Iterator[tuple[str, str]]:
    manifest = subject.manifest
    model, recipe = manifest.model, manifest.recipe
    yield "Model", str(recipe.get("model") or model.model_type)
    tied = "tied" if model.tied else "untied"
    yield (
        "Architecture",
        f"{model.model_type}: {count(model.parameters)} parameters, {model.layers} "
        f"layers of {count(model.hidden_size)}, vocabulary {count(model.vocab_size)} ({tied})",
    )
    quantization = mapping(recipe, "quantization")
    yield (
        "Weights",
        f"{quantization.get('linear')} (embedding {quantization.get('embedding')}), "
        f"method {quantization.get('method')}",
    )
    yield "Bits per weight", f"{manifest.bits_per_weight():.2f}, scales included"
    yield "Licence", licence(subject)
    yield "Targets", ", ".join(_targets(subject))


def licence(subject: Subject) -> str:
    """The licence of the checkpoint in a line."""
    known = subject.manifest.licence
    if known is None:
        return "not known: the checkpoint names none"
    named = f"{known.id} ({known.name})" if known.name else known.id
    return f"{named}, {known.link}" if known.link else named


def _targets(subject: Subject) -> Iterator[str]:
    settings = {
        text(target, "target"): target for target in mappings(subject.manifest.recipe, "targets")
    }
    for name in subject.manifest.targets:
        context = whole(settings.get(name, {}), "max_context")
        yield name if context is None else f"{name} ({context:,} tokens)"


def _checks(subject: Subject) -> Iterator[tuple[bool, str]]:
    files = len(subject.manifest.files)
    yield True, f"{files} files have the SHA-256 that the bundle lists, and the manifest is theirs."
    yield True, "Every measurement is of files of this bundle."
    yield (
        False,
        "Integers and logits of every artifact. An export checks them before a bundle is finished; "
        "mobilellm verify checks them again.",
    )
    if subject.signatures:
        yield False, "The signature is there; mobilellm verify --key checks it."
    else:
        yield False, "The bundle is not signed."


def headlines(subject: Subject) -> dict[str, list[Headline]]:
    """The headline figures: size, quality, speed and instructions of each target, and the quality
    of the quantized checkpoint."""
    found = {target: list(_of_target(subject, target)) for target in subject.manifest.targets}
    in_torch = list(_qualities(subject, None))
    return {**found, "quantized checkpoint": in_torch} if in_torch else found


def _of_target(subject: Subject, target: str) -> Iterator[Headline]:
    folder = folder_of(subject, target)
    yield Headline("Size", megabytes(folder.model + folder.beside), "exact")
    yield from list(_qualities(subject, target)) or [Headline("Quality", "–", NOT_RUN)]
    yield from list(_speeds(subject, target)) or [Headline("Speed", "–", NOT_RUN)]
    entries = [one for one in counted([subject]) if one.target == target]
    for one in entries:
        name = f"Instructions per token, {one.phase}"
        value = f"{one.content['per_token'] / 1e6:,.2f} M"
        yield Headline(name, value, f"counted, {one.cpu}")
    if not entries:
        yield Headline("Instructions per token", "–", NOT_RUN)


def _qualities(subject: Subject, target: str | None) -> Iterator[Headline]:
    for one in evaluated([subject]):
        values = one.figures
        for key, name, shown in (
            ("kl", "KL to the reference", figure(number(values, "kl"), "nats")),
            ("top1_agreement", "Top-1 agreement", share(number(values, "top1_agreement"))),
            ("perplexity", "Perplexity", figure(number(values, "perplexity"))),
            ("accuracy", "Problems solved", share(number(values, "accuracy"))),
        ):
            if one.target == target and number(values, key) is not None:
                yield Headline(name, shown, one.how)


def _speeds(subject: Subject, target: str) -> Iterator[Headline]:
    """Speed and memory on each device; those of an emulated machine are no headline."""
    for _, session in complete([subject]):
        if session["artifact"]["format"] != target or session["kind"] == EMULATED:
            continue
        how = f"{MACHINES[session['kind']]}, {device_name(session)}"
        for entry in session["prefill"][-1:]:
            name = f"First token, prompt of {entry['tokens']}"
            yield Headline(name, figure(entry["ms"]["p50"], "ms"), how)
        for entry in session["decode"][-1:]:
            name = f"Decoding after {entry['depth']} tokens"
            yield Headline(name, figure(entry["tokens_per_second"]["p50"], "tokens/s"), how)
        peak = number(session["memory"], "peak_rss")
        if peak and peak > 0:
            yield Headline("Peak memory", megabytes(peak), how)


def comparison(subjects: Sequence[Subject]) -> Table:
    """The facts and headline figures of several bundles side by side."""
    facts = [dict(_facts(subject)) for subject in subjects]
    figures = [
        {
            f"{group}: {line.name} ({line.how})": line.value
            for group, lines in headlines(subject).items()
            for line in lines
            if line.how != NOT_RUN
        }
        for subject in subjects
    ]
    names = list(dict.fromkeys(name for one in (*facts, *figures) for name in one))
    merged = [{**fact, **line} for fact, line in zip(facts, figures, strict=True)]
    return Table(
        "The bundles side by side",
        ("what", *(subject.title for subject in subjects)),
        [(name, *(one.get(name, "–") for one in merged)) for name in names],
        1 + len(subjects),
    )
