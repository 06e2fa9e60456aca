"""The figures of a bundle: sizes from its manifest, and what its measurements say.

Speeds come from the raw samples of a profile. What could not be measured has its reason.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from devices.answers import is_number
from devices.engines.records import check_record
from devices.errors import DeviceError
from devices.session_state import PHASE_NAMES, samples
from exporter.backends import front
from exporter.bundle.bundle import QUANTIZED
from exporter.bundle.manifest import BundleManifest
from exporter.bundle.results import EVALUATION, PROFILE, RESULTS, Result
from exporter.errors import InputError
from exporter.gate.figure import (
    COVERAGE,
    INSTRUCTIONS,
    LATENCY,
    MEMORY,
    SIZE,
    UNDELEGATED,
    Figure,
    Figures,
    Gap,
    counted,
    decode,
    on_data,
    prefill,
)

#: Figures of an evaluation → unit: those on the text, those that need a reference, on problems.
_TEXT = {"tokens": "", "perplexity": ""}
_COMPARED = {"kl": "", "top1_agreement": "%"}
_PROBLEMS = {"problems": "", "accuracy": "%"}
#: The settings of an evaluation that decide each of them.
_TEXT_SETTINGS = ("field", "max_tokens", "sequence_length", "prefill")
_PROBLEM_SETTINGS = ("limit", "max_new_tokens")


def collect(manifest: BundleManifest, results: Mapping[str, Result]) -> Figures:
    """All figures of a bundle and of its measurements. Raises InputError for a measurement with
    values of wrong types; the keys of `results` start its message."""
    figures, sessions = [*_sizes(manifest)], list[Mapping[str, Any]]()
    for subject, result in results.items():
        if result.kind == EVALUATION:
            figures += _qualities(result.content, manifest)
        elif result.kind == PROFILE:
            sessions += _sessions(result.content, subject)
        for counts in result.counts():
            figures += _counts(counts)
    gaps = [gap for session in sessions for gap in _gaps(session)]
    figures += _speeds(session for session in sessions if session["status"] == "complete")
    return Figures(figures, gaps)


def _sizes(manifest: BundleManifest) -> Iterator[Figure]:
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}

    def figure(name: str, target: str | None, chosen: Iterable[str]) -> Figure:
        parts = {part: float(sizes[part]) for part in chosen}
        return Figure(name, SIZE, sum(parts.values()), "bytes", target, parts=parts)

    yield figure("bundle", None, (name for name in sizes if not name.startswith(f"{RESULTS}/")))
    yield figure(
        "quantized checkpoint", None, (name for name in sizes if name.startswith(f"{QUANTIZED}/"))
    )
    for target in manifest.targets:
        inside = [name for name in sizes if name.startswith(f"{target}/")]
        model = {f"{target}/{name}" for name in front(target).FILES}
        yield figure("file", target, (name for name in inside if name in model))
        yield figure("folder", target, inside)


def _qualities(content: Mapping[str, Any], manifest: BundleManifest) -> Iterator[Figure]:
    """The figures of one evaluation."""
    settings, figures = content["settings"], content["figures"]
    simulated = "simulated in torch: not the artifact itself" if settings.get("simulate") else ""
    same = content["reference"] == manifest.source
    other = "" if same else "against another checkpoint than the bundle's"
    for data, units, keys, unusable in (
        (content["data"], _TEXT, _TEXT_SETTINGS, ""),
        (content["data"], _COMPARED, _TEXT_SETTINGS, other),
        (content["task"], _PROBLEMS, _PROBLEM_SETTINGS, ""),
    ):
        for key, unit in units.items() if data else ():
            if figures.get(key) is None:
                continue
            chosen = {name: str(settings.get(name)) for name in keys}
            yield Figure(
                on_data(key, data["file"]),
                COVERAGE if key in ("tokens", "problems") else key,
                figures[key],
                unit,
                content["target"],
                conditions={"data": data["sha256"], **chosen},
                solved=(figures.get("correct") or ()) if key == "accuracy" else (),
                error=_standard_error(key, figures),
                unusable=simulated or unusable,
            )


def _standard_error(key: str, figures: Mapping[str, Any]) -> float:
    """The standard error of a figure on text or problems; 0 if unknown.

    That of a share counts two more successes and two more failures (Agresti and Coull), so that it
    is not 0 for a share of 0 or 1.
    """
    if key in ("top1_agreement", "accuracy"):
        count = figures.get("tokens" if key == "top1_agreement" else "problems") or 0
        share = (figures[key] * count + 2) / (count + 4)
        return math.sqrt(share * (1 - share) / (count + 4))
    return float(figures.get(f"{key}_error") or 0)


def _sessions(content: Mapping[str, Any], subject: str) -> Iterator[Mapping[str, Any]]:
    """The sessions of a profile, each with checked records and the number of decode steps."""
    for session in content["sessions"]:
        try:
            rounds = [
                [check_record(r) for r in records] for records in session["samples"]["rounds"]
            ]
        except DeviceError as error:
            raise InputError(f"{subject}: {error.subject}", error.problem) from error
        yield {**session, "rounds": rounds, "steps": content["settings"]["decode_steps"]}


def _devices(session: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a device: as `profile` was given it, and its model where that is known."""
    identity = session["identity"]
    named = identity is not None and identity["name"] not in ("", "unknown")
    return (session["device"], *([identity["name"]] if named else []))


def _gaps(session: Mapping[str, Any]) -> Iterator[Gap]:
    target, devices = session["artifact"]["format"], _devices(session)
    if session["status"] != "complete":
        yield Gap(target, devices, "", f"{session['status']}: {session['problem']}")
        return
    for name, reason in session["not_measured"].items():
        yield Gap(target, devices, UNDELEGATED if name == "operators" else name, reason)


def _speeds(sessions: Iterable[Mapping[str, Any]]) -> Iterator[Figure]:
    """The figures of all sessions. Those of one artifact on one device under the same conditions
    are pooled."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for session in sessions:
        key = session["artifact"]["format"], _devices(session), _conditions(session)
        groups.setdefault((*key[:2], *key[2].items()), []).append(session)
    for group in groups.values():
        yield from _of_device(group)


def _conditions(session: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same for times to be compared; versions of the engine need not."""
    identity, engine = session["identity"], session["engine"]
    return {
        "kind of device": session["kind"],
        "device": f"{identity['name']} {identity['soc']}",
        "engine": engine["name"],
        "threads": str(engine["threads"]),
        "cores": engine.get("cores") or "all",
        "mapped": str(engine.get("mmap")),
        "packed weights": "kept" if engine.get("packed_cache") else "not kept",
        "decode steps": str(session["steps"]),
    }


def _of_device(group: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    target, devices = group[0]["artifact"]["format"], _devices(group[0])
    conditions, emulated = _conditions(group[0]), group[0]["kind"] == "emulated"
    rounds = [records for session in group for records in session["rounds"]]
    share = _cpu_share(group)
    for (phase, place), found in sorted(samples(rounds).items()):
        value = statistics.median(map(statistics.median, found.repeats))
        unusable = "emulated: its times mean nothing" if emulated else ""
        if value <= found.clock_error:
            unusable = unusable or "as short as the runner's clock is coarse"
        if phase != "execute":
            yield Figure(
                PHASE_NAMES.get(phase, phase).format(place),
                LATENCY,
                value,
                "ms",
                target,
                devices,
                conditions,
                found.repeats,
                error=found.clock_error,
                cpu_share=share,
                tokens={"prefill": place, "decode": 1}.get(phase, 0),
                unusable=unusable,
            )
    peaks = [peak for session in group for peak in _peaks(session)]
    if peaks:
        yield Figure(
            MEMORY, MEMORY, max(peaks), "bytes", target, devices, conditions,
            [[peak] for peak in peaks],
            unusable="emulated: its memory is also the emulator's" if emulated else "",
        )  # fmt: skip
    traced = [session for session in group if session["operators"]]
    if traced:
        products = dict.fromkeys((p for session in traced for p in session["undelegated"]), 1.0)
        yield Figure(
            UNDELEGATED, UNDELEGATED, sum(products.values()), "", target, devices, conditions,
            parts=products,
        )  # fmt: skip


def _cpu_share(group: Sequence[Mapping[str, Any]]) -> float:
    """The cores that the repeats had on average: seconds of their processes on a processor, for
    each second that passed. 0 if unknown."""
    shares = list[float]()
    for probe in (probe for session in group for probe in session["samples"]["probes"]):
        keys = "user_seconds", "system_seconds", "seconds"
        used, system, passed = (probe.get(key) for key in keys)
        if is_number(used) and is_number(system) and is_number(passed) and passed > 0:
            shares.append((used + system) / passed)
    return statistics.median(shares) if shares else 0.0


def _peaks(session: Mapping[str, Any]) -> Iterator[float]:
    """The peak memory of each repeat in bytes: the runner's own figure, or else the probe's."""
    probes = [probe.get("peak_rss") for probe in session["samples"]["probes"]]
    for number, records in enumerate(session["rounds"]):
        own = [record.get("memory", {}).get("peak_rss", -1) for record in records]
        probe = probes[number] if number < len(probes) else None
        seen = max(own, default=-1)
        if seen <= 0 and is_number(probe):
            seen = probe
        if seen > 0:
            yield float(seen)


def _counts(content: Mapping[str, Any]) -> Iterator[Figure]:
    """The instructions of each token, by CPU."""
    for count in content["counts"]:
        # Another emulator may give the CPU other features, and then other kernels are chosen.
        conditions = {
            "CPU": count["cpu"],
            "runner": content["runner"]["name"],
            "emulator": content["emulator"],
        }
        entries = [(prefill(entry["to"]), entry["from"], entry) for entry in count["prefill"]]
        entries += [(decode(entry["depth"]), 0, entry) for entry in count["decode"]]
        for name, first, entry in entries:
            parts = dict[str, float]()
            for function in entry["functions"]:
                near = "near " if function["near"] else ""
                key = f"{near}{function['function']} in {function['library']}"
                parts[key] = parts.get(key, 0.0) + function["per_token"]
            yield Figure(
                counted(name), INSTRUCTIONS, entry["per_token"], "instructions",
                content["target"], (count["cpu"],), {**conditions, "from": str(first)},
                parts=parts,
            )  # fmt: skip
