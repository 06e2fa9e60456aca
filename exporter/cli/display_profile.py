"""Display profiles and devices. Results that are not from a real device are marked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from devices.catalogue import catalogue
from devices.comparison import Comparison
from devices.errors import DeviceError
from devices.instructions import COUNT
from devices.instructions.tools import cpus
from devices.transports import connected_devices
from exporter.cli import display, display_count
from exporter.errors import InputError
from exporter.profiling import Cleaned

#: The number of operators to list.
_TOP = 8
_PLOTS = (".png", ".svg", ".pdf")
#: The CPUs to count on that are named first.
_FIRST_CPUS = ("cortex-a76", "max")


def print_devices(as_json: bool) -> int:
    """Print the connected devices and the catalogue."""
    found, (counting, missing) = connected_devices(), _counting()
    if as_json:
        known = [asdict(device) for device in catalogue().values()]
        return display.print_json({"connected": found, "counting": counting, "known": known})
    display.out.print("Connected: " + escape(", ".join(found) or "none"))
    display.out.print("[dim]and any Linux device, as ssh:USER@HOST[:PORT][/]")
    said = ", ".join(counting) or f"none ({missing})"
    display.wide.print(f"Counting instructions, no times: {escape(said)}\n")
    table = display.table(
        "name", "device", "processor", "memory", "bandwidth", "cores", "threads", title="Known"
    )
    for device in catalogue().values():
        cores = ", ".join(f"{c.count} × {c.name} {c.hertz / 1e9:.2f} GHz" for c in device.cores)
        table.add_row(
            device.key, device.name, device.soc, f"{device.memory_bytes / 1e9:.0f} GB",
            f"{device.bandwidth / 1e9:.0f} GB/s", cores, str(device.threads),
        )  # fmt: skip
    display.wide.print(table)
    return 0


def _counting() -> tuple[list[str], str]:
    """The names of the devices ``count:CPU``, and an error message if counting is not possible."""
    try:
        known = cpus()
    except DeviceError as error:
        return [], str(error)
    first = [cpu for cpu in _FIRST_CPUS if cpu in known]
    return [f"{COUNT}:{cpu}" for cpu in [*first, *sorted({*known} - {*first})]], ""


def print_cleaned(cleaned: Sequence[Cleaned], as_json: bool) -> None:
    """Print what was removed from which device."""
    if as_json:
        display.print_json({"cleaned": [asdict(one) for one in cleaned]})
        return
    for one in cleaned:
        said = escape(one.problem or f"removed {one.folder}")
        display.out.print(
            f"[bold]{escape(one.device)}[/] {'[red]failed[/]: ' if one.problem else ''}{said}"
        )
    if not cleaned:
        display.out.print("No device is connected")


def print_profile(
    report: Mapping[str, Any], comparisons: Sequence[Comparison], as_json: bool
) -> None:
    """Print the sessions of a report, and the comparison with a baseline."""
    if as_json:
        display.print_json({**report, "comparisons": [asdict(row) for row in comparisons]})
    else:
        _print_report(report, comparisons)


def _print_report(report: Mapping[str, Any], comparisons: Sequence[Comparison]) -> None:
    for session in report["sessions"]:
        title = f"{session['device']}: {session['artifact']['format']}"
        if session["status"] != "complete":
            colour = "red" if session["status"] == "failed" else "yellow"
            mark = f"[{colour}]{session['status']}[/]"
            display.out.print(f"[bold]{escape(title)}[/] {mark}: {escape(session['problem'])}\n")
            continue
        display.print_facts(title, dict(_facts(session, report["settings"])))
        _print_speeds(session)
        _print_operators(session)
    for counts in report.get("counts", []):
        display_count.print_counts(counts)
    for one in report.get("not_counted", []):
        colour = "red" if one["status"] == "failed" else "yellow"
        mark = f"[{colour}]{one['status']}[/]"
        title = f"{COUNT}: {one['target']}"
        display.out.print(f"[bold]{escape(title)}[/] {mark}: {escape(one['problem'])}\n")
    if comparisons:
        table = display.table("artifact", "phase", "before", "now", "speedup", title="Baseline")
        for row in comparisons:
            sure = "" if row.clear else " (intervals overlap)"
            table.add_row(
                row.format, row.what, f"{row.before_ms:.3f} ms", f"{row.now_ms:.3f} ms",
                f"{row.ratio:.3f}{sure}",
            )  # fmt: skip
        display.wide.print(table)


def _facts(session: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    identity, engine, memory = session["identity"], session["engine"], session["memory"]
    if session["kind"] != "real":
        what = {"virtual": "virtual", "emulated": "EMULATED, times are meaningless"}
        yield "no real device", f"{what[session['kind']]} ({identity['kind_reason']})"
    cores = ", ".join(f"{core['count']} × {core['name']}" for core in identity["cores"])
    yield "device", f"{identity['name']}, {identity['system']}, {identity['machine']}: {cores}"
    versions = ", ".join(f"{name} {version[:20]}" for name, version in engine["versions"].items())
    yield "engine", f"{engine['name']} ({versions}), {_placement(engine, settings)}"
    if engine["note"]:
        yield "measures", engine["note"]
    if session["load"]:
        how = ", which wrote the packed weights" if _wrote_packed(session) else ""
        first = f"first: {session['first_load_ms']:.1f} ms{how}"
        yield "load", f"{session['load']['p50']:.1f} ms ({first})"
    size = display.megabytes
    peaks = [f"file {size(memory['file_bytes'])}"]
    for phase, seen in memory["phases"].items():
        if seen["peak_rss"] > 0 and phase in ("start", "load", "prefill", "decode"):
            peaks.append(f"{phase} {size(seen['peak_rss'])}")
    yield "peak memory", ", ".join(peaks)
    if memory["phases"].get("decode", {}).get("anonymous", -1) > 0:
        seen = memory["phases"]["decode"]
        yield (
            "decode memory",
            f"anonymous {size(seen['anonymous'])}, mapped files {size(seen['file'])}",
        )
    if session["predicted"]:
        memory_use, source = session["predicted"]["memory"], session["predicted"]["source"]
        yield "predicted", f"{size(memory_use)} of memory; speeds from {source}"
    if session["sustained"]:
        run = session["sustained"]
        first, *_, last = run["tokens_per_second"]
        share = f"{run['last_to_best']:.0%} of the best"
        end = f"{last:.1f} at the end of {run['seconds']:.0f} s ({share})"
        yield "sustained", f"{first:.1f} tokens/s at first, {end}, p90 {run['p90_ms']:.3f} ms"
        if run["hottest"]:
            heat = run["hottest"]
            course = f"{heat['first']:.1f} °C at first, at most {heat['most']:.1f} °C"
            yield "temperature", f"{heat['sensor']}: {course}, {heat['last']:.1f} °C at the end"
    if session["energy"]:
        yield "energy", f"{session['energy']['joules_per_token'] * 1000:.1f} mJ per token"
    for what, why in session["not_measured"].items():
        yield f"no {what}", why


def _placement(engine: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """On how many threads and which cores it ran, and how it loaded the model."""
    parts = [f"{engine['threads']} threads"]
    if settings["threads"] > engine["threads"]:
        parts[0] += f" ({settings['threads']} asked for, more than there are cores)"
    if engine["cores"]:
        parts.append(f"cores {engine['cores']}")
    if engine["mmap"] is not None:
        parts.append("mapped" if engine["mmap"] else "read into memory")
    if engine.get("packed_cache"):
        parts.append("packed weights in a file")
    return ", ".join(parts)


def _wrote_packed(session: Mapping[str, Any]) -> bool:
    """Whether the first load wrote the packed weights, which the others mapped."""
    return any(record.get("packed") == "written" for record in session["samples"]["first"])


def _print_speeds(session: Mapping[str, Any]) -> None:
    mark = {"real": "", "virtual": ", virtual", "emulated": ", EMULATED"}[session["kind"]]
    table = display.table(
        f"phase{mark}", "p50", "p95", "95 % interval of the median", "tokens/s", "predicted", "",
    )  # fmt: skip
    for column in table.columns[1:6]:
        column.justify = "right"
    speeds = session["predicted"]["speeds"] if session["predicted"] else []
    decode = {speed["depth"]: speed["decode"] for speed in speeds}
    prefill = speeds[0]["prefill"] if speeds else None
    rows = [
        (f"first token after {entry['tokens']}", entry, prefill) for entry in session["prefill"]
    ] + [
        (f"decode after {entry['depth']}", entry, decode.get(entry["depth"]))
        for entry in session["decode"]
    ]
    for name, entry, predicted in rows:
        ms, rate = entry["ms"], entry["tokens_per_second"]
        table.add_row(
            name, f"{ms['p50']:.3f} ms", f"{ms['p95']:.3f} ms",
            f"{ms['low']:.3f} to {ms['high']:.3f} ms", f"{rate['p50']:.1f}",
            "" if predicted is None else f"{predicted:.1f}",
            f"{ms['repeats']} repeats" + ("" if ms["narrow"] else ", [yellow]wide interval[/]"),
        )  # fmt: skip
    if session["execute"]:
        ms = session["execute"]
        table.add_row("whole program", f"{ms['p50']:.3f} ms", f"{ms['p95']:.3f} ms")
    display.wide.print(table)


def _print_operators(session: Mapping[str, Any]) -> None:
    if session["operators"]:
        table = display.table("operator", "calls", "share", "delegate")
        for column in table.columns[1:3]:
            column.justify = "right"
        for row in session["operators"][:_TOP]:
            runner = row["delegate"] or "none (runtime kernel)"
            table.add_row(
                escape(row["name"]), str(row["calls"]), f"{row['share']:.1%}", escape(runner)
            )
        rest = session["operators"][_TOP:]
        if rest:
            share = sum(row["share"] for row in rest)
            table.add_row(f"{len(rest)} others", "", f"{share:.1%}", "")
        display.wide.print(table)
    for problem in session["undelegated"]:
        display.out.print(f"[bold red]matrix product without delegate:[/] {escape(problem)}")
    display.out.print("")


def check_plot(path: Path) -> None:
    """Raise InputError for a file type that cannot be plotted."""
    if path.suffix not in _PLOTS:
        raise InputError(f"--plot {path}", f"is none of {', '.join(_PLOTS)}", "Rename it")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write a plot of a report to `path`."""
    from devices.plots import draw

    draw(report, path)
