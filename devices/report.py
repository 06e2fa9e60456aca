"""Sessions as one JSON object that follows ``schema.json``."""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from devices.catalogue import find
from devices.engines import Record
from devices.errors import BadDeviceError
from devices.files import sha256
from devices.operators import audit
from devices.prediction import Speed, predict_on, predict_speed
from devices.progress import Progress
from devices.resume_log import ResumeLog
from devices.session import profile_device
from devices.session_state import PLACES, Job, SessionState, Settings, summaries
from devices.statistics import Summary
from devices.transports import Device

SCHEMA_VERSION = 1
#: Windows of a sustained run.
_WINDOWS = 10
_TOO_SHORT = "as short as the runner's clock is coarse: ask for more tokens"


def profile(
    devices: Sequence[Device],
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress,
    journal_path: Path | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Profile on all devices at the same time; one that fails does not spoil the others. What a
    stopped run left in the resume log is not measured again."""
    resume_log = ResumeLog(journal_path)
    with ThreadPoolExecutor(max_workers=max(1, len(devices))) as pool:
        futures = [
            pool.submit(profile_device, device, jobs, settings, progress, resume_log)
            for device in devices
        ]
        sessions = [describe(one) for future in futures for one in future.result()]
    report = {
        "schema_version": SCHEMA_VERSION,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": dict(versions or {}),
        "settings": asdict(settings),
        "sessions": sessions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(report))
    return plain


def finish(journal_path: Path | None) -> None:
    """The result is written: the resume log is of no more use."""
    ResumeLog(journal_path).remove()


def schema() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text())
    return content


def validate(report: Mapping[str, Any]) -> None:
    """Raises BadDeviceError with the place that does not follow the schema."""
    import jsonschema

    try:
        jsonschema.validate(report, schema(), format_checker=jsonschema.FormatChecker())
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "the report"
        raise BadDeviceError(place, f"does not follow the schema ({error.message})") from error


def describe(one: SessionState) -> dict[str, Any]:
    """One session as plain data."""
    model, identity = one.job.model, one.identity
    paths = {name: model.folder / name for name in model.files}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    files = {name: {"bytes": sizes[name], "sha256": sha256(path)} for name, path in paths.items()}
    found = summaries(one.rounds)
    speeds = {place: times for place, times in found.items() if times.low > 0}
    too_short = {
        PLACES[phase].format(n): _TOO_SHORT
        for phase, n in sorted(found.keys() - speeds.keys())
        if phase in PLACES
    }
    status = "failed" if one.error else "skipped" if one.skipped else "complete"
    return {
        "device": str(one.device),
        "kind": identity.kind if identity else None,
        "comparable": identity is not None and identity.kind != "emulated",
        "identity": asdict(identity) if identity else None,
        "status": status,
        "problem": one.error or one.skipped,
        "artifact": {"format": model.format, "context": model.context, "files": files},
        "engine": {
            "name": one.engine.name, "versions": dict(one.engine.versions), "threads": one.threads,
        } if one.engine else None,
        "load": _times(found.get(("load", 0)), one.settings),
        "first_load_ms": _first_load(one.first),
        "prefill": [
            {"tokens": place, **_times_and_rates(summary, one.settings, place)}
            for (phase, place), summary in sorted(speeds.items())
            if phase == "prefill"
        ],
        "decode": [
            {"depth": place, **_times_and_rates(summary, one.settings, 1)}
            for (phase, place), summary in sorted(speeds.items())
            if phase == "decode"
        ],
        "execute": _times(found.get(("execute", 0)), one.settings),
        "sustained": _sustained(one),
        "energy": _energy(one),
        "memory": _memory(one, sum(sizes.values())),
        "temperatures": {when: dict(values) for when, values in one.temperatures.items()},
        "bandwidth": one.bandwidth,
        "operators": [asdict(operator) for operator in one.operators],
        "undelegated": audit(one.operators) if _audited(one) else [],
        "predicted": _predicted(one),
        "not_measured": {**one.not_measured, **too_short},
        "samples": {"first": one.first, "rounds": one.rounds, "probes": one.probes,
                    "sustained": one.sustained},
    }  # fmt: skip


def _audited(one: SessionState) -> bool:
    return one.job.model.format != "onnx" or one.job.model.integers


def _times(summary: Summary | None, settings: Settings) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {**asdict(summary), "narrow": summary.narrow(settings.precision)}


def _times_and_rates(summary: Summary, settings: Settings, tokens: int) -> dict[str, Any]:
    return {
        "ms": _times(summary, settings),
        "tokens_per_second": asdict(summary.inverse(1000.0 * tokens)),
    }


def _first_load(records: Sequence[Record]) -> float | None:
    loads = [record["ms"][0] for record in records if record["phase"] == "load" and record["ms"]]
    return loads[0] if loads else None


def _sustained(one: SessionState) -> dict[str, Any] | None:
    """The speed in equal windows of time, and the last in relation to the best."""
    times = [ms for record in one.sustained for ms in record["ms"]]
    if not times:
        return None
    total = sum(times)
    counts, elapsed = [0] * _WINDOWS, 0.0
    for ms in times:
        counts[min(_WINDOWS - 1, int(elapsed / total * _WINDOWS))] += 1
        elapsed += ms
    rates = [count / (total / _WINDOWS / 1000) for count in counts]
    return {
        "seconds": total / 1000,
        "tokens": len(times),
        "tokens_per_second": rates,
        "last_to_best": rates[-1] / max(rates),
    }


def _energy(one: SessionState) -> dict[str, Any] | None:
    tokens = sum(len(record["ms"]) for record in one.sustained)
    if one.energy is None or not tokens:
        return None
    return {**asdict(one.energy), "joules_per_token": one.energy.joules / tokens}


def _memory(one: SessionState, file_bytes: int) -> dict[str, Any]:
    """The largest peak of each phase over all repeats; bytes, -1 where the system does not tell."""
    phases: dict[str, dict[str, int]] = {}
    for records in one.rounds:
        for record in records:
            seen = phases.setdefault(record["phase"], {})
            for key, value in record.get("memory", {}).items():
                seen[key] = max(seen.get(key, -1), int(value))
    return {
        "file_bytes": file_bytes,
        "available_before": one.available_memory,
        "phases": {phase: seen for phase, seen in phases.items() if seen},
        "peak_rss": max((probe["peak_rss"] for probe in one.probes if probe), default=None),
        "peak_pss": max((probe["peak_pss"] for probe in one.probes if probe), default=None),
    }


def _predicted(one: SessionState) -> dict[str, Any] | None:
    """Of the catalogue's device, or else from the bandwidth that was measured."""
    workload = one.job.workload
    if workload is None or one.identity is None:
        return None
    known, depths = find(one.identity.name), list(one.settings.depths)
    speeds: list[Speed] = []
    if known is not None:
        speeds = [predict_on(workload, known, depth) for depth in depths]
    elif one.bandwidth:
        speeds = [predict_speed(workload, depth, one.bandwidth) for depth in depths]
    if not speeds:
        return None
    source = f"catalogue: {known.key}" if known else "the bandwidth measured here"
    return {
        "source": source, "memory": workload.memory, "speeds": [asdict(speed) for speed in speeds]
    }  # fmt: skip
