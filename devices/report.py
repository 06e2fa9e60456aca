"""Profile on several devices, and report the sessions as JSON that follows ``schema.json``."""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from devices.answers import contained
from devices.catalogue import find
from devices.cores import show_cores
from devices.engines.records import Record
from devices.errors import DeviceError
from devices.files import sha256
from devices.instructions import validate as validate_counts
from devices.json_schema import check_schema
from devices.operators import audit
from devices.prediction import Speed, predict_on, predict_speed
from devices.progress import Progress
from devices.resume_log import ResumeLog
from devices.session import profile_device
from devices.session_state import PHASE_NAMES, Job, SessionState, Settings, summaries
from devices.statistics import Summary
from devices.thermal import hottest
from devices.transports import Device

SCHEMA_VERSION = 1
#: A sustained run is divided into so many windows of equal time.
_WINDOWS = 10
_TOO_SHORT = "as short as the runner's clock is coarse: ask for more tokens"


def profile(
    devices: Sequence[Device],
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress,
    resume_path: Path | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Profile every job on every device, on all devices at the same time.

    A device that fails does not affect the others. What a stopped run left in the resume log at
    `resume_path` is not measured again.
    """
    resume_log = ResumeLog(resume_path)
    with ThreadPoolExecutor(max_workers=max(1, len(devices))) as pool:
        futures = [
            pool.submit(profile_device, device, jobs, settings, progress, resume_log)
            for device in devices
        ]
        sessions = [_described(session) for future in futures for session in future.result()]
    report = {
        "schema_version": SCHEMA_VERSION,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": dict(versions or {}),
        "settings": asdict(settings),
        "sessions": sessions,
    }
    plain: dict[str, Any] = json.loads(json.dumps(report))
    return plain


def _described(session: SessionState) -> dict[str, Any]:
    """One session, which follows the schema whatever its device answered."""
    try:
        with contained(session.device, "what it measured"):
            made: dict[str, Any] = json.loads(json.dumps(describe(session), allow_nan=False))
            check_schema(made, {"$ref": "#/$defs/session", "$defs": schema()["$defs"]})
            return made
    except DeviceError as error:
        nothing = SessionState(session.job, session.device, session.settings)
        nothing.error = session.error or str(error)
        return describe(nothing)


def finish(report: Mapping[str, Any], resume_path: Path | None) -> None:
    """Delete the resume log, once the report is written and has no failed session: what was lost
    is then measured again, and nothing else."""
    if all(session["status"] != "failed" for session in report["sessions"]):
        ResumeLog(resume_path).remove()


def schema() -> dict[str, Any]:
    """The JSON schema of a report."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("schema.json").read_text())
    return content


def validate(report: Mapping[str, Any]) -> None:
    """Raise BadDeviceError, with the path in the report, where it does not follow the schema."""
    check_schema(report, schema())
    for counts in report.get("counts", []):
        validate_counts(counts)


def describe(session: SessionState) -> dict[str, Any]:
    """One session as JSON-compatible data."""
    model, identity = session.job.model, session.identity
    paths = {name: model.folder / name for name in model.files}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    files = {name: {"bytes": sizes[name], "sha256": sha256(path)} for name, path in paths.items()}
    found = summaries(session.rounds)
    speeds = {place: times for place, times in found.items() if times.low > 0}
    too_short = {
        PHASE_NAMES[phase].format(n): _TOO_SHORT
        for phase, n in sorted(found.keys() - speeds.keys())
        if phase in PHASE_NAMES
    }
    status = "failed" if session.error else "skipped" if session.skipped else "complete"
    return {
        "device": str(session.device),
        "kind": identity.kind if identity else None,
        "comparable": identity is not None and identity.kind != "emulated",
        "identity": asdict(identity) if identity else None,
        "status": status,
        "problem": session.error or session.skipped,
        "artifact": {"format": model.format, "context": model.context, "files": files},
        "engine": _engine(session),
        "load": _times(found.get(("load", 0)), session.settings),
        "first_load_ms": _first_load(session.first),
        "prefill": [
            {"tokens": place, **_times_and_rates(summary, session.settings, place)}
            for (phase, place), summary in sorted(speeds.items())
            if phase == "prefill"
        ],
        "decode": [
            {"depth": place, **_times_and_rates(summary, session.settings, 1)}
            for (phase, place), summary in sorted(speeds.items())
            if phase == "decode"
        ],
        "execute": _times(found.get(("execute", 0)), session.settings),
        "sustained": _sustained(session),
        "energy": _energy(session),
        "memory": _memory(session, sum(sizes.values())),
        "temperatures": {when: dict(values) for when, values in session.temperatures.items()},
        "bandwidth": session.bandwidth,
        "operators": [asdict(operator) for operator in session.operators],
        "undelegated": audit(session.operators) if _audited(session) else [],
        "predicted": _predicted(session),
        "not_measured": {**session.not_measured, **too_short},
        "samples": {"first": session.first, "rounds": session.rounds, "probes": session.probes,
                    "sustained": session.sustained},
    }  # fmt: skip


def _engine(session: SessionState) -> dict[str, Any] | None:
    if session.engine is None:
        return None
    engine = session.engine
    return {
        "name": engine.name,
        "versions": dict(engine.versions),
        "threads": engine.threads or session.threads,
        "cores": show_cores(session.cores) if session.cores else None,
        "mmap": session.settings.mmap if "mmap" in engine.capabilities else None,
        "packed_cache": session.settings.packed_cache,
        "note": engine.note,
    }


def _audited(session: SessionState) -> bool:
    """Whether products are meant to reach delegates or integer kernels: all but float ONNX. (Of
    llama.cpp and MLX no operators are recorded; they have no delegates either.)"""
    return session.job.model.format != "onnx" or session.job.model.integers


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


def _sustained(session: SessionState) -> dict[str, Any] | None:
    """The speed in equal windows of time, the last one divided by the best, and the temperatures
    meanwhile."""
    times = [ms for record in session.sustained for ms in record["ms"]]
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
        "p90_ms": float(np.quantile(times, 0.9)),
        "thermal": [asdict(sample) for sample in session.thermal],
        "hottest": _hottest(session),
    }


def _hottest(session: SessionState) -> dict[str, Any] | None:
    found = hottest(session.thermal)
    return found and dict(zip(("sensor", "first", "most", "last"), found, strict=True))


def _energy(session: SessionState) -> dict[str, Any] | None:
    tokens = sum(len(record["ms"]) for record in session.sustained)
    if session.energy is None or not tokens:
        return None
    return {**asdict(session.energy), "joules_per_token": session.energy.joules / tokens}


def _memory(session: SessionState, file_bytes: int) -> dict[str, Any]:
    """The largest peak of each phase over all repeats in bytes, -1 where the system tells none."""
    phases: dict[str, dict[str, int]] = {}
    for records in session.rounds:
        for record in records:
            seen = phases.setdefault(record["phase"], {})
            for key, value in record.get("memory", {}).items():
                seen[key] = max(seen.get(key, -1), int(value))
    return {
        "file_bytes": file_bytes,
        "available_before": session.available_memory,
        "phases": {phase: seen for phase, seen in phases.items() if seen},
        "peak_rss": max((probe["peak_rss"] for probe in session.probes if probe), default=None),
        "peak_pss": max((probe["peak_pss"] for probe in session.probes if probe), default=None),
    }


def _predicted(session: SessionState) -> dict[str, Any] | None:
    """The predicted speeds: of the catalogue's device, or else from the measured bandwidth."""
    workload = session.job.workload
    if workload is None or session.identity is None:
        return None
    known, depths = find(session.identity.name), list(session.settings.depths)
    speeds: list[Speed] = []
    if known is not None:
        speeds = [predict_on(workload, known, depth) for depth in depths]
    elif session.bandwidth:
        speeds = [predict_speed(workload, depth, session.bandwidth) for depth in depths]
    if not speeds:
        return None
    source = f"catalogue: {known.key}" if known else "the bandwidth measured here"
    return {
        "source": source, "memory": workload.memory, "speeds": [asdict(speed) for speed in speeds]
    }  # fmt: skip
