"""Speed and memory by device: raw samples, medians with their intervals, peaks.

Sessions of real, virtual and emulated machines never share a plot.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from exporter.report.blocks import Figure, Missing, Section, Table
from exporter.report.plots import Bar, Strip, Style, Text, bars, listed, strips
from exporter.report.reproduce import profile_command
from exporter.report.subjects import Subject
from exporter.report.values import count, figure, megabytes, number, whole

EMULATED = "emulated"
#: The kinds of machines, and how a figure of each was got.
MACHINES = {
    "real": "run on a device",
    "virtual": "run on a virtual machine",
    EMULATED: "run under emulation: its times say nothing",
}
#: Sessions of a page, and lengths or depths of a plot: more cannot be read.
_MOST_SESSIONS, _MOST_PLACES = 40, 8
#: Dots of one plot: more would make the page large and the plot no clearer.
_DOTS = 1200
_FEWEST_DOTS = 20
_PHASES = {
    "prefill": ("Time to the first token", "tokens", "prompt of {} tokens"),
    "decode": ("Time of one decoded token", "depth", "after {} tokens"),
    "load": ("Time to load", "", "load"),
}

Session = tuple[Subject, Mapping[str, Any]]


def sessions(subjects: Sequence[Subject]) -> list[Session]:
    """Every session of every bundle."""
    return [(subject, session) for subject in subjects for session in subject.sessions()]


def complete(subjects: Sequence[Subject]) -> list[Session]:
    """The sessions that measured something."""
    return [one for one in sessions(subjects) if one[1]["status"] == "complete"][:_MOST_SESSIONS]


def session_label(one: Session) -> str:
    """The target, its bundle, and the device."""
    subject, session = one
    return f"{subject.case(session['artifact']['format'])}, {device_name(session)}"


def device_name(session: Mapping[str, Any]) -> str:
    """The name of a device as it was asked for, and its own name where it has one."""
    identity = session["identity"] or {}
    own = str(identity.get("name", ""))
    named = str(session["device"])
    return named if own in ("", "unknown", named) else f"{named} ({own})"


def style_of(one: Session) -> Style:
    """The look of a session in plots: that of its target."""
    return one[0].style(one[1]["artifact"]["format"])


def speed(subjects: Sequence[Subject]) -> Section:
    """The section: a plot for each phase and kind of machine, and tables of all medians."""
    found = complete(subjects)
    figures, tables = list[Figure](), list[Table]()
    for machine in MACHINES:
        same = [one for one in found if one[1]["kind"] == machine]
        for phase in _PHASES:
            made = _phase_figure(phase, machine, same)
            figures += [made] if made else []
    if found:
        tables += [_speeds(found), _devices(found)]
    notes = [
        "Dots are raw samples; the mark is the median of the repeats, and the bar through it holds "
        "that median with the confidence in the table. Axes begin at zero. Where there are more "
        "samples than a plot can show, those shown are evenly spaced in rank, the smallest and the "
        "largest among them.",
        *_left_out(subjects),
    ]
    return Section(
        "speed", "Latency by device", notes if figures else (), figures, tables,
        missing=[*_failed(subjects), *_unmeasured(subjects)],
    )  # fmt: skip


def _left_out(subjects: Sequence[Subject]) -> list[str]:
    every = [one for one in sessions(subjects) if one[1]["status"] == "complete"]
    number_left = len(every) - len(complete(subjects))
    return [f"{number_left} more sessions are left out."] if number_left else []


def _failed(subjects: Sequence[Subject]) -> Iterator[Missing]:
    for one in sessions(subjects):
        session = one[1]
        if session["status"] != "complete":
            problem = str(session["problem"])
            yield Missing(f"{session_label(one)}: {session['status']}: {problem}", [])


def _unmeasured(subjects: Sequence[Subject]) -> Iterator[Missing]:
    for subject in subjects:
        ran = {s["artifact"]["format"] for s in subject.sessions() if s["status"] == "complete"}
        left = [target for target in subject.manifest.targets if target not in ran]
        if left:
            what = f"{subject.title}: {', '.join(left)} ran on no device."
            yield Missing(what, [profile_command()])


def samples(session: Mapping[str, Any], phase: str, place: int) -> list[float]:
    """The raw samples of one phase at one length or depth, in milliseconds."""
    key = _PHASES[phase][1]
    return [
        float(ms)
        for records in session["samples"]["rounds"]
        for record in records
        if record["phase"] == phase and (not key or whole(record, key) == place)
        for ms in record["ms"]
    ]


def thinned(values: Sequence[float], most: int) -> list[float]:
    """At most `most` of the values, evenly spaced in rank; the smallest and the largest stay."""
    ordered = sorted(values)
    if len(ordered) <= most:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (most - 1))] for index in range(most)]


def _summaries(session: Mapping[str, Any], phase: str) -> dict[int, Mapping[str, Any]]:
    """Milliseconds of one phase by length or depth."""
    if phase == "load":
        return {0: session["load"]} if session["load"] else {}
    return {entry[_PHASES[phase][1]]: entry["ms"] for entry in session[phase]}


def _phase_figure(phase: str, machine: str, found: Sequence[Session]) -> Figure | None:
    title, _, panel_title = _PHASES[phase]
    measured = [(one, _summaries(one[1], phase)) for one in found]
    places = sorted({place for _, values in measured for place in values})[:_MOST_PLACES]
    rows = sum(place in values for _, values in measured for place in places)
    if not rows:
        return None
    most = max(_FEWEST_DOTS, _DOTS // rows)
    panels, cells, left_out = list[tuple[str, list[Strip]]](), list[tuple[str, ...]](), 0
    for place in places:
        drawn = list[Strip]()
        for one, values in measured:
            if place in values:
                raw, ms = samples(one[1], phase, place), values[place]
                shown = thinned(raw, most)
                left_out += len(raw) - len(shown)
                strip = Strip(
                    session_label(one), style_of(one), shown, ms["p50"], ms["low"], ms["high"]
                )
                drawn.append(strip)
                cells.append(
                    (panel_title.format(place), strip.label, count(len(raw)), figure(ms["p50"]),
                     figure(ms["low"]), figure(ms["high"]), figure(ms["p95"]),
                     figure(min(raw, default=None)), figure(max(raw, default=None)))
                )  # fmt: skip
        panels.append((panel_title.format(place), drawn))
    mark = "" if machine == "real" else f" ({machine})"
    title = f"{title}{mark}"
    columns = ("phase", "model and device", "samples", "median", "from", "to", "95th percentile",
               "smallest", "largest")  # fmt: skip
    note = f"{left_out:,} samples are not drawn." if left_out else ""
    table = Table(f"{title}, in ms", columns, cells, 2, note=note)
    about = f"Strips of samples in milliseconds. {MACHINES[machine].capitalize()}."
    text = Text(f"speed-{machine}-{phase}", title, about, "ms")
    return Figure(title, partial(strips, text, panels), table)


def _speeds(found: Sequence[Session]) -> Table:
    rows = []
    for one in found:
        session = one[1]
        how = MACHINES[session["kind"]]
        for phase in ("prefill", "decode"):
            for entry in session[phase]:
                rate, ms = entry["tokens_per_second"], entry["ms"]
                place = _PHASES[phase][2].format(entry[_PHASES[phase][1]])
                rows.append(
                    (session_label(one), f"{phase}, {place}", how, figure(rate["p50"]),
                     figure(rate["low"]), figure(rate["high"]), f"{ms['confidence']:.0%}",
                     count(ms["repeats"]))
                )  # fmt: skip
        run = session["sustained"]
        if run:
            how_long = f"sustained, {figure(run['seconds'])} s"
            last = run["tokens_per_second"][-1] if run["tokens_per_second"] else None
            rows.append((session_label(one), how_long, how, figure(last), "–", "–", "–", "1"))
    columns = ("model and device", "phase", "how", "tokens/s", "from", "to", "confidence",
               "repeats")  # fmt: skip
    return Table("Tokens per second", columns, rows, 3)


def _devices(found: Sequence[Session]) -> Table:
    rows = []
    for one in found:
        identity, engine = one[1]["identity"], one[1]["engine"]
        cores = ", ".join(f"{core['count']} × {core['name']}" for core in identity["cores"])
        versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
        machine = f"{identity['machine']}, {cores}, {identity['system']}"
        where = f"{engine['threads']} threads" + (f" on {engine['cores']}" if engine.get("cores")
                                                  else "")  # fmt: skip
        rows.append(
            (session_label(one), MACHINES[one[1]["kind"]], machine,
             megabytes(identity["memory_bytes"]), f"{engine['name']} ({versions})",
             where)
        )  # fmt: skip
    columns = ("model and device", "how", "machine", "memory", "engine", "threads")
    return Table("Devices and engines", columns, list(dict.fromkeys(rows)), 6)


def memory(subjects: Sequence[Subject]) -> Section:
    """The section: the peak of each phase."""
    found = complete(subjects)
    figures, tables = list[Figure](), list[Table]()
    for machine in MACHINES:
        rows = list[Bar]()
        for one in found:
            peak = number(one[1]["memory"], "peak_rss")
            if one[1]["kind"] == machine and peak and peak > 0:
                part = [(peak / 1e6, style_of(one))]
                rows.append(Bar(session_label(one), part, megabytes(peak)))
        if rows:
            mark = "" if machine == "real" else f" ({machine})"
            text = Text(
                f"memory-{machine}",
                f"Peak memory{mark}",
                f"Bars of the largest resident memory: {listed(rows)}.",
                "MB (million bytes)",
            )
            table = Table(
                f"Peak memory{mark}", ("model and device", "peak"),
                [(row.label, row.shown) for row in rows],
            )  # fmt: skip
            figures.append(Figure(text.title, partial(bars, text, rows), table))
    rows_of_phases = list(_phases(found))
    if rows_of_phases:
        columns = ("model and device", "phase", "peak resident", "anonymous", "mapped files",
                   "proportional (PSS)")  # fmt: skip
        tables.append(Table("Memory of each phase", columns, rows_of_phases, 2))
    notes = ["The largest value over all repeats, of the whole process of the runner."]
    return Section(
        "memory", "Memory by device", notes if figures else (), figures, tables,
        missing=[] if figures else list(_unmeasured(subjects)),
    )  # fmt: skip


def _phases(found: Sequence[Session]) -> Iterator[tuple[str, ...]]:
    for one in found:
        for phase, seen in one[1]["memory"]["phases"].items():
            sizes = [number(seen, key) for key in ("peak_rss", "anonymous", "file", "pss")]
            if sizes[0] is not None and sizes[0] > 0:
                shown = (megabytes(None if size is None or size < 0 else size) for size in sizes)
                yield (session_label(one), phase, *shown)
