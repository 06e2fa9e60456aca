"""A profiling session: measure models on one device, in turns, until the medians are precise.

Each repeat is a process of its own, so that the spread includes what differs between processes.
The first repeat warms up the device and does not count. Every raw sample is kept.
"""

import contextlib
import json
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from types import ModuleType

from devices import operators
from devices.answers import contained, is_number, parse_json
from devices.catalogue import find
from devices.cores import parse_cores
from devices.engines import Plan
from devices.errors import BadDeviceError, DeviceError
from devices.execution import (
    SHORT,
    check_cores,
    memory_probe,
    model_folder,
    pinned_to,
    prepare_engine,
    run_plan,
)
from devices.files import cache_folder, sha256
from devices.identity import Identity
from devices.progress import Progress
from devices.resume_log import ResumeLog
from devices.session_state import Job, SessionState, Settings, hash_of, plan_of, summaries
from devices.statistics import FEWEST
from devices.sustained import measure_sustained
from devices.transports import Device, transport_of

#: A trace is taken of so many decode steps.
_TRACE_STEPS = 8


def profile_device(
    device: Device,
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress,
    resume_log: ResumeLog,
) -> list[SessionState]:
    """Profile every job on one device. Whatever the device does, no exception is raised: a failure
    is stored in the session's `error`, so that other sessions go on."""
    sessions = [SessionState(job, device, settings) for job in jobs]
    transport = transport_of(device)
    try:
        with contained(device, "what it tells of itself"):
            _identify(sessions, transport)
    except DeviceError as error:
        for session in sessions:
            session.error = str(error)
        return sessions
    running = [session for session in sessions if _copy_to_device(session, transport, progress)]
    for number in range(settings.max_repeats + 1):
        for session in running:
            if session.error is None:
                with _keep_failure(session, "a repeat"):
                    if number <= FEWEST or not _precise_enough(session):
                        _repeat(session, transport, number, progress, resume_log)
    for session in running:
        if session.error is None:
            with _keep_failure(session, "a sustained run or a trace"):
                measure_sustained(session, transport, _key(session), progress, resume_log)
                _trace_operators(session, transport, progress)
                assert session.identity is not None
                before, after = session.identity, transport.identify(device)
                session.temperatures = {"before": before.temperatures, "after": after.temperatures}
    return sessions


def _identify(sessions: Sequence[SessionState], transport: ModuleType) -> None:
    """Store in each session what the device is and on which cores it runs. Raises DeviceError."""
    device, settings = sessions[0].device, sessions[0].settings
    identity = transport.identify(device)
    cores = parse_cores(settings.cores) if settings.cores else ()
    check_cores(device, transport, identity, cores)
    wanted = settings.threads or _recommended_threads(identity)
    threads = max(1, min(wanted, len(cores or identity.usable) or identity.core_count))
    bandwidth = _bandwidth(device, transport, identity, [*pinned_to(cores)], threads)
    for session in sessions:
        session.identity, session.cores, session.threads = identity, cores, threads
        session.bandwidth = bandwidth


@contextlib.contextmanager
def _keep_failure(session: SessionState, what: str) -> Iterator[None]:
    """Store an error of the block in the session; `what` names the step in its message."""
    try:
        with contained(session.device, what):
            yield
    except DeviceError as error:
        session.error = str(error)


def _copy_to_device(session: SessionState, transport: ModuleType, progress: Progress) -> bool:
    """Whether the session can run: its engine is chosen, and all files are on the device."""
    stage = f"{session.device}: copy {session.job.model.format}"
    progress(stage, 0, 1)
    with _keep_failure(session, "a copy"):
        try:
            session.engine = prepare_engine(session, transport)
            session.available_memory = transport.memory(session.device).available
        except BadDeviceError as error:
            session.skipped = str(error)
    progress(stage, 1, 1)
    return session.error is None and session.skipped is None


def _repeat(
    session: SessionState,
    transport: ModuleType,
    number: int,
    progress: Progress,
    resume_log: ResumeLog,
) -> None:
    """Measure repeat `number`, or take it from the resume log. Repeat 0 is the warm-up."""
    stage = f"{session.device}: {session.job.model.format}"
    progress(stage, number, session.settings.max_repeats + 1, _speed_note(session))
    key = _key(session)
    done = resume_log.find(key, f"round {number}")
    if done is None:
        records, probe = run_plan(session, transport, plan_of(session))
        done = {"records": records, "probe": probe}
        resume_log.add(key, f"round {number}", done)
    if number == 0:
        session.first = done["records"]
    else:
        session.rounds.append(done["records"])
        session.probes.append(done["probe"])


def _precise_enough(session: SessionState) -> bool:
    """Whether the interval of every median is narrow enough, apart from the load's."""
    wanted = [s for (phase, _), s in summaries(session.rounds).items() if phase != "load"]
    return bool(wanted) and all(summary.narrow(session.settings.precision) for summary in wanted)


def _speed_note(session: SessionState) -> str:
    """The latest decode speed, for display."""
    if not session.rounds:
        return "warming up"
    decode = [record["ms"] for record in session.rounds[-1] if record["phase"] == "decode"]
    ms = statistics.median(decode[0]) if decode else 0.0
    if not ms:
        return ""
    mark = "" if session.identity and session.identity.kind == "real" else " (not a real device)"
    return f"{1000 / ms:.1f} tokens/s{mark}"


def _trace_operators(session: SessionState, transport: ModuleType, progress: Progress) -> None:
    """Record a trace in a run of its own: recording costs time, so no phase is measured in it."""
    assert session.engine is not None
    if "trace" not in session.engine.capabilities:
        session.not_measured["operators"] = "not by this engine"
        return
    progress(f"{session.device}: {session.job.model.format} operators", 0, 1)
    remote = f"{model_folder(transport, session.device, session.job.model)}/trace"
    depth = min(session.settings.depths, default=0)
    plan = Plan(
        depths=[depth], steps=_TRACE_STEPS, threads=session.threads, trace=remote,
        mmap=session.settings.mmap, packed_cache=session.settings.packed_cache,
    )  # fmt: skip
    run_plan(session, transport, plan)
    name = f"trace-{hash_of([str(session.device), _key(session)])}"
    local = cache_folder() / "traces" / name
    try:
        transport.pull(session.device, remote, local)
        transport.remove(session.device, remote)
        session.operators = operators.read_trace(session.job.model.format, local)
    finally:
        local.unlink(missing_ok=True)
    progress(f"{session.device}: {session.job.model.format} operators", 1, 1)


def _bandwidth(
    device: Device, transport: ModuleType, identity: Identity, pinned: list[str], threads: int
) -> float | None:
    """The measured memory bandwidth in bytes/s; None where the probe does not run, and on an
    emulator, whose own speed it would measure."""
    probe = None if identity.kind == "emulated" else memory_probe(identity)
    if probe is None:
        return None
    remote = f"{transport.workspace(device)}/{probe.name}"
    transport.push(device, probe, remote)
    done = transport.run(device, [*pinned, remote, "bandwidth", str(threads)], SHORT)
    if done.code:
        return None
    value = parse_json(done.text, "the memory probe")["bandwidth"]
    return float(value) if is_number(value) else None


def _recommended_threads(identity: Identity) -> int:
    """What the catalogue recommends, or else the number of fast cores, from 1 to 4."""
    known = find(identity.name)
    if known is not None:
        return known.threads
    fastest = max((core.max_khz or 0 for core in identity.cores), default=0)
    fast = sum(core.count for core in identity.cores if (core.max_khz or 0) >= 0.7 * fastest)
    return max(1, min(4, fast or identity.core_count))


def _key(session: SessionState) -> str:
    """The key of a stored repeat: a hash of the device, model, engine and settings."""
    assert session.engine is not None and session.identity is not None
    identity = replace(session.identity, temperatures={}, governors=())
    return hash_of(
        [
            str(session.device), json.loads(json.dumps(asdict(identity))), session.engine.name,
            dict(session.engine.versions), session.threads, session.cores,
            list(session.job.model.tokens),
            {name: sha256(session.job.model.folder / name) for name in session.job.model.files},
            json.loads(json.dumps(asdict(replace(session.settings, timeout=0, max_repeats=0)))),
            platform.node(),
        ]
    )  # fmt: skip
