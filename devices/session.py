"""A profiling session: measure models on one device, in turns, until the medians are precise.

Each repeat is a process of its own, so that the spread includes what differs between processes.
The first repeat warms up the device and does not count. Every raw sample is kept.
"""

import contextlib
import json
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

from devices import energy, operators, runner
from devices.catalogue import find
from devices.engines import Engine, Model, Plan, Record, native, official, python
from devices.errors import BadDeviceError, DeviceError
from devices.files import cache_folder, sha256
from devices.identity import Identity
from devices.progress import Progress
from devices.resume_log import ResumeLog
from devices.session_state import Job, SessionState, Settings, hash_of, plan_of, summaries
from devices.statistics import FEWEST
from devices.transports import Device, transport_of

#: Seconds for a command that measures nothing.
_SHORT = 120.0
#: A trace is taken of so many decode steps.
_TRACE_STEPS = 8


def profile_device(
    device: Device,
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress,
    resume_log: ResumeLog,
) -> list[SessionState]:
    """Profile every job on one device. A DeviceError is stored in the session's `error`, never
    raised, so that other sessions go on."""
    sessions = [SessionState(job, device, settings) for job in jobs]
    transport = transport_of(device)
    try:
        identity = transport.identify(device)
        threads = settings.threads or _recommended_threads(identity)
        for session in sessions:
            session.identity, session.threads = identity, threads
        bandwidth = _bandwidth(device, transport, identity, threads)
        for session in sessions:
            session.bandwidth = bandwidth
    except DeviceError as error:
        for session in sessions:
            session.error = str(error)
        return sessions
    running = [session for session in sessions if _copy_to_device(session, transport, progress)]
    for number in range(settings.max_repeats + 1):
        for session in running:
            if session.error is None and not (number > FEWEST and _precise_enough(session)):
                _repeat(session, transport, number, progress, resume_log)
    for session in running:
        if session.error is None:
            with _keep_failure(session):
                _measure_sustained(session, transport, progress, resume_log)
                _trace_operators(session, transport, progress)
                after = transport.identify(device).temperatures
                session.temperatures = {"before": identity.temperatures, "after": after}
    return sessions


@contextlib.contextmanager
def _keep_failure(session: SessionState) -> Iterator[None]:
    """Store a DeviceError of the block in the session."""
    try:
        yield
    except DeviceError as error:
        session.error = str(error)


def model_folder(transport: ModuleType, device: Device, model: Model) -> str:
    """The folder of a model on the device, named by the hash of its files."""
    digest = hash_of([sha256(model.folder / name) for name in model.files])
    return f"{transport.workspace(device)}/{model.format}-{digest}"


def prepare_engine(session: SessionState, transport: ModuleType) -> Engine:
    """Copy the files of a job and its engine to the device. Raises DeviceError."""
    model, device = session.job.model, session.device
    assert session.identity is not None
    folder, workspace = model_folder(transport, device, model), transport.workspace(device)
    engine = _choose_engine(session, transport, workspace, folder)
    files = {f"{folder}/{name}": model.folder / name for name in model.files}
    tokens = cache_folder() / "tokens" / f"{hash_of(model.tokens)}.txt"
    if not tokens.is_file():
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.write_text(" ".join(map(str, model.tokens)))
    files |= engine.files
    files[f"{folder}/tokens.txt"] = tokens
    if probe := _memory_probe(session.identity):
        files[f"{workspace}/{probe.name}"] = probe
    for remote, local in files.items():
        transport.push(device, local, remote)
    return engine


def _memory_probe(identity: Identity) -> Path | None:
    """The memory probe for a device, or None where none can be built for it."""
    if identity.machine not in runner.COMPILERS or identity.system.startswith("macOS"):
        return None
    return runner.build_probe(identity.machine)


def _choose_engine(
    session: SessionState, transport: ModuleType, workspace: str, folder: str
) -> Engine:
    model, device, identity = session.job.model, session.device, session.identity
    assert identity is not None
    if session.job.program is not None:
        return official.engine(session.job.program, model, workspace, folder)
    if model.format == "executorch" and (model.portable or device.transport != "host"):
        return native.engine(model, identity, workspace, folder)
    if model.format == "coreml" and device.transport != "mac":
        raise BadDeviceError("coreml", "runs on a Mac only", "Give --device mac there")
    if identity.system.startswith("Android"):
        raise BadDeviceError(
            f"{model.format} on {device}", "needs the runtime's own program",
            "Build onnxruntime_perf_test and give it with --runner",
        )  # fmt: skip
    found = transport.run(device, python.version_command(model, device), _SHORT)
    versions = python.read_version(model, found)
    return python.engine(model, device, workspace, folder, versions)


def _copy_to_device(session: SessionState, transport: ModuleType, progress: Progress) -> bool:
    """Whether the session can run: its engine is chosen, and all files are on the device."""
    progress(f"{session.device}: copy {session.job.model.format}", 0, 1)
    try:
        session.engine = prepare_engine(session, transport)
        session.available_memory = transport.memory(session.device).available
    except BadDeviceError as error:
        session.skipped = str(error)
        return False
    except DeviceError as error:
        session.error = str(error)
        return False
    progress(f"{session.device}: copy {session.job.model.format}", 1, 1)
    return True


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
        with _keep_failure(session):
            records, probe = run_plan(session, transport, plan_of(session))
            done = {"records": records, "probe": probe}
            resume_log.add(key, f"round {number}", done)
    if done is None:
        return
    if number == 0:
        session.first = done["records"]
    else:
        session.rounds.append(done["records"])
        session.probes.append(done["probe"])


def run_plan(
    session: SessionState, transport: ModuleType, plan: Plan
) -> tuple[list[Record], Record]:
    """Run the commands of a plan on the device.

    Gives the records of all commands, and the memory probe's report with the highest peak. Raises
    DeviceError.
    """
    assert session.engine is not None and session.identity is not None
    probe: Record = {}
    wrapper: list[str] = []
    if program := _memory_probe(session.identity):
        wrapper = [f"{transport.workspace(session.device)}/{program.name}", "run"]
    records: list[Record] = []
    for command in session.engine.commands(plan):
        done = transport.run(session.device, [*wrapper, *command], session.settings.timeout)
        seen, stderr = _probe_line(done.stderr)
        probe = seen if seen.get("peak_rss", 0) >= probe.get("peak_rss", 0) else probe
        records += session.engine.records(replace(done, argv=tuple(command), stderr=stderr))
    return records, probe


def _probe_line(stderr: bytes) -> tuple[Record, bytes]:
    """The memory probe's report, and the rest of stderr."""
    lines = stderr.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith(b'{"probe":'):
            with contextlib.suppress(json.JSONDecodeError):  # cut off: no report
                seen = dict(json.loads(line)["probe"])
                return seen, b"".join(lines[:index] + lines[index + 1 :])
    return {}, stderr


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


def _measure_sustained(
    session: SessionState, transport: ModuleType, progress: Progress, resume_log: ResumeLog
) -> None:
    """Decode for some seconds without a pause, and read the energy counters before and after."""
    assert session.engine is not None
    seconds = session.settings.sustained_seconds
    if not seconds or "sustained" not in session.engine.capabilities:
        session.not_measured["sustained"] = "not asked for" if not seconds else "not by this engine"
        return
    progress(f"{session.device}: {session.job.model.format} sustained", 0, 1)
    key = _key(session)
    done = resume_log.find(key, "sustained")
    if done is None:
        counters = ["sh", "-c", energy.READ_COUNTERS]
        before = energy.parse_counters(transport.run(session.device, counters, _SHORT).text)
        plan = Plan(threads=session.threads, warmup=3, sustained=seconds)
        records, _ = run_plan(session, transport, plan)
        after = energy.parse_counters(transport.run(session.device, counters, _SHORT).text)
        used = energy.used(before, after)
        done = {"records": records, "energy": None if used is None else asdict(used)}
        resume_log.add(key, "sustained", done)
    session.sustained = [record for record in done["records"] if record["phase"] == "sustained"]
    session.energy = None if done["energy"] is None else energy.Energy(**done["energy"])
    if session.energy is None:
        session.not_measured["energy"] = "the system has no counter that moved"
    progress(f"{session.device}: {session.job.model.format} sustained", 1, 1)


def _trace_operators(session: SessionState, transport: ModuleType, progress: Progress) -> None:
    """Record a trace in a run of its own: recording costs time, so no phase is measured in it."""
    assert session.engine is not None
    if "trace" not in session.engine.capabilities:
        session.not_measured["operators"] = "not by this engine"
        return
    progress(f"{session.device}: {session.job.model.format} operators", 0, 1)
    remote = f"{model_folder(transport, session.device, session.job.model)}/trace"
    depth = min(session.settings.depths, default=0)
    plan = Plan(depths=[depth], steps=_TRACE_STEPS, threads=session.threads, trace=remote)
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
    device: Device, transport: ModuleType, identity: Identity, threads: int
) -> float | None:
    """The measured memory bandwidth in bytes/s; None where the probe does not run, and on an
    emulator, whose own speed it would measure."""
    probe = None if identity.kind == "emulated" else _memory_probe(identity)
    if probe is None:
        return None
    remote = f"{transport.workspace(device)}/{probe.name}"
    transport.push(device, probe, remote)
    done = transport.run(device, [remote, "bandwidth", str(threads)], _SHORT)
    if done.code:
        return None
    value = json.loads(done.text)["bandwidth"]
    return float(value) if math.isfinite(value) else None


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
            dict(session.engine.versions), session.threads, list(session.job.model.tokens),
            {name: sha256(session.job.model.folder / name) for name in session.job.model.files},
            json.loads(json.dumps(asdict(replace(session.settings, timeout=0, max_repeats=0)))),
            platform.node(),
        ]
    )  # fmt: skip
