"""Profiles and counted instructions of a bundle as Markdown.

Times of an emulated device mean nothing and are left out. Instructions are counts, and stand in a
table of their own.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from exporter.bundle.markdown import code, megabytes, number, table
from exporter.bundle.results import PROFILE, Result


def speed_sections(results: Mapping[str, Result]) -> Iterator[str]:
    """The section on speed, in paragraphs."""
    profiles = [one.content for _, one in sorted(results.items()) if one.kind == PROFILE]
    counts = [counts for _, one in sorted(results.items()) for counts in one.counts()]
    yield "## Speed"
    if not profiles and not counts:
        yield ("Not measured. `mobilellm profile` measures it, and `mobilellm package` adds it.")
    for content in profiles:
        if content["sessions"]:
            yield from _profile(content)
    for content in counts:
        yield from _instructions(content)


def _profile(content: Mapping[str, Any]) -> Iterator[str]:
    settings, rows, notes = content["settings"], [], []
    for session in content["sessions"]:
        device, target = code(session["device"]), code(session["artifact"]["format"])
        if session["status"] != "complete":
            notes.append(f"- {device}, {target}: {session['status']}: {code(session['problem'])}")
            continue
        if session["kind"] == "emulated":
            notes.append(f"- {device}, {target}: emulated, so that its times mean nothing")
            continue
        engine, identity = session["engine"], session["identity"]
        versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
        notes.append(
            f"- {device} is {code(identity['name'])} ({session['kind']}: "
            f"{code(identity['kind_reason'])}), {code(identity['system'])}; {target} ran in "
            f"{code(engine['name'])} ({code(versions)}) on {engine['threads']} threads"
        )
        peak = session["memory"]["peak_rss"]
        for phase, entries, at in (
            ("first token after", session["prefill"], "tokens"),
            ("decode after", session["decode"], "depth"),
        ):
            rows += [
                [
                    device, target, f"{phase} {number(entry[at])} tokens",
                    f"{number(entry['ms']['p50'], 3)} ({number(entry['ms']['low'], 3)} to "
                    f"{number(entry['ms']['high'], 3)})",
                    number(entry["tokens_per_second"]["p50"], 1),
                    megabytes(peak) if peak else "–",
                ]
                for entry in entries
            ]  # fmt: skip
    if rows:
        columns = ["device", "model", "phase", "ms (median, 95 % interval)", "tokens/s", "peak RSS"]
        yield table(columns, rows)
    limits = f"±{number(100 * settings['precision'], 1)} % or {number(settings['max_repeats'])}"
    yield f"`mobilellm profile` measured it, each phase until {limits} repeats:"
    yield "\n".join(notes)


def _instructions(content: Mapping[str, Any]) -> Iterator[str]:
    target = code(content["target"])
    rows = [
        [target, code(count["cpu"]), phase, number(entry["per_token"]), *_bytes(entry)]
        for count in content["counts"]
        for phase, entry in (
            *((f"prefill, {e['from']:,} to {e['to']:,} tokens", e) for e in count["prefill"]),
            *((f"decode after {e['depth']:,} tokens", e) for e in count["decode"]),
        )
    ]
    columns = ["model", "Arm CPU", "phase", "instructions for each token", "loaded", "stored"]
    yield table(columns, rows)
    runner = content["runner"]
    yield (
        f"These are counts, not times: {code(runner['name'])} ran in {code(content['emulator'])}, "
        f"with a cache of {number(content['context'])} tokens."
    )


def _bytes(entry: Mapping[str, Any]) -> list[str]:
    """What a token loads and stores; accesses of unknown size make it a lower limit."""
    if "bytes" not in entry:  # of a file of an earlier version
        return ["–", "–"]
    least = "at least " if entry["bytes"]["unsized"] else ""
    return [f"{least}{megabytes(entry['bytes'][way])}" for way in ("loaded", "stored")]
