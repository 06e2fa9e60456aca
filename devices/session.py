"""A profiling session: models on one device, measured in turns until the medians are sure.

Each repeat is a process of its own, so that what differs from start to start is part of the
spread. The first one warms up the device and does not count. Every raw sample is kept.
"""

import contextlib
import json
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
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

_SHORT = 120.0
#: What a trace is taken of: a step is what the time of a text is made of.
_TRACE_STEPS = 8


def profile_device(
    device: Device,
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress,
    resume_log: ResumeLog,
) -> list[SessionState]:
    """Every job on one device. What goes wrong is told in `error`, never raised: another device's
    session goes on."""
    measured = [SessionState(job, device, settings) for job in jobs]
    transport = transport_of(device)
    try:
        identity = transport.identify(device)
        threads = settings.threads or _recommended_threads(identity)
        for one in measured:
            one.identity, one.threads = identity, threads
        bandwidth = _bandwidth(device, transport, identity, threads)
        for one in measured:
            one.bandwidth = bandwidth
    except DeviceError as error:
        for one in measured:
            one.error = str(error)
        return measured
    running = [one for one in measured if _prepare(one, transport, progress)]
    for number in range(settings.max_repeats + 1):
        for one in running:
            if one.error is None and not (number > FEWEST and _sure(one)):
                _repeat(one, transport, number, progress, resume_log)
    for one in running:
        if one.error is None:
            with _failure_of(one):
                _sustain(one, transport, progress, resume_log)
                _trace(one, transport, progress)
                after = transport.identify(device).temperatures
                one.temperatures = {"before": identity.temperatures, "after": after}
    return measured


@contextlib.contextmanager
def _failure_of(one: SessionState) -> Iterator[None]:
    try:
        yield
    except DeviceError as error:
        one.error = str(error)


def place_of(transport: ModuleType, device: Device, model: Model) -> str:
    """The folder of a model on the device, named by its content."""
    digest = hash_of([sha256(model.folder / name) for name in model.files])
    return f"{transport.workspace(device)}/{model.format}-{digest}"


def prepare_engine(one: SessionState, transport: ModuleType) -> Engine:
    """The engine of a job, with its files and the model's on the device. Raises DeviceError."""
    model, device = one.job.model, one.device
    assert one.identity is not None
    place, workspace = place_of(transport, device, model), transport.workspace(device)
    engine = _choose(one, transport, workspace, place)
    files = {f"{place}/{name}": model.folder / name for name in model.files}
    tokens = cache_folder() / "tokens" / f"{hash_of(model.tokens)}.txt"
    if not tokens.is_file():
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.write_text(" ".join(map(str, model.tokens)))
    files |= engine.files
    files[f"{place}/tokens.txt"] = tokens
    if one.identity.machine in runner.COMPILERS and not one.identity.system.startswith("macOS"):
        probe = runner.build_probe(one.identity.machine)
        files[f"{workspace}/{probe.name}"] = probe
    for remote, local in files.items():
        transport.push(device, local, remote)
    return engine


def _choose(one: SessionState, transport: ModuleType, workspace: str, place: str) -> Engine:
    model, device, identity = one.job.model, one.device, one.identity
    assert identity is not None
    if one.job.program is not None:
        return official.engine(one.job.program, model, workspace, place)
    if model.format == "executorch" and (model.portable or device.transport != "host"):
        return native.engine(model, identity, workspace, place)
    if model.format == "coreml" and device.transport != "mac":
        raise BadDeviceError("coreml", "runs on a Mac only", "Give --device mac there")
    if identity.system.startswith("Android"):
        raise BadDeviceError(
            f"{model.format} on {device}", "needs the runtime's own program",
            "Build onnxruntime_perf_test and give it with --runner",
        )  # fmt: skip
    found = transport.run(device, python.version_command(model, device), _SHORT)
    versions = python.read_version(model, found)
    return python.engine(model, device, workspace, place, versions)


def _prepare(one: SessionState, transport: ModuleType, progress: Progress) -> bool:
    progress(f"{one.device}: copy {one.job.model.format}", 0, 1)
    try:
        one.engine = prepare_engine(one, transport)
        one.available_memory = transport.memory(one.device).available
    except BadDeviceError as error:
        one.skipped = str(error)
        return False
    except DeviceError as error:
        one.error = str(error)
        return False
    progress(f"{one.device}: copy {one.job.model.format}", 1, 1)
    return True


def _repeat(
    one: SessionState, transport: ModuleType, number: int, progress: Progress, resume_log: ResumeLog
) -> None:
    stage = f"{one.device}: {one.job.model.format}"
    progress(stage, number, one.settings.max_repeats + 1, _note(one))
    key = _key(one)
    done = resume_log.find(key, f"round {number}")
    if done is None:
        with _failure_of(one):
            records, probe = run_plan(one, transport, plan_of(one))
            done = {"records": records, "probe": probe}
            resume_log.add(key, f"round {number}", done)
    if done is None:
        return
    if number == 0:
        one.first = done["records"]
    else:
        one.rounds.append(done["records"])
        one.probes.append(done["probe"])


def run_plan(one: SessionState, transport: ModuleType, plan: Plan) -> tuple[list[Record], Record]:
    """The records of all commands of a plan, and the larger of what the probe saw of each.
    Raises DeviceError."""
    assert one.engine is not None and one.identity is not None
    probe: Record = {}
    wrapper: list[str] = []
    if one.identity.machine in runner.COMPILERS and not one.identity.system.startswith("macOS"):
        name = runner.build_probe(one.identity.machine).name
        wrapper = [f"{transport.workspace(one.device)}/{name}", "run"]
    records: list[Record] = []
    for command in one.engine.commands(plan):
        done = transport.run(one.device, [*wrapper, *command], one.settings.timeout)
        seen, stderr = _probe_line(done.stderr)
        probe = seen if seen.get("peak_rss", 0) >= probe.get("peak_rss", 0) else probe
        records += one.engine.records(replace(done, argv=tuple(command), stderr=stderr))
    return records, probe


def _probe_line(stderr: bytes) -> tuple[Record, bytes]:
    """What the probe saw, and what the command itself said."""
    lines = stderr.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith(b'{"probe":'):
            with contextlib.suppress(json.JSONDecodeError):  # cut off: then it was not seen
                seen = dict(json.loads(line)["probe"])
                return seen, b"".join(lines[:index] + lines[index + 1 :])
    return {}, stderr


def _sure(one: SessionState) -> bool:
    """Whether every median but the load's, which counts once, is narrow enough."""
    wanted = [s for (phase, _), s in summaries(one.rounds).items() if phase != "load"]
    return bool(wanted) and all(summary.narrow(one.settings.precision) for summary in wanted)


def _note(one: SessionState) -> str:
    """The latest decode speed, for whoever is watching."""
    if not one.rounds:
        return "warming up"
    decode = [record["ms"] for record in one.rounds[-1] if record["phase"] == "decode"]
    ms = statistics.median(decode[0]) if decode else 0.0
    if not ms:
        return ""
    mark = "" if one.identity and one.identity.kind == "real" else " (not a real device)"
    return f"{1000 / ms:.1f} tokens/s{mark}"


def _sustain(
    one: SessionState, transport: ModuleType, progress: Progress, resume_log: ResumeLog
) -> None:
    assert one.engine is not None
    seconds = one.settings.sustained_seconds
    if not seconds or "sustained" not in one.engine.can:
        one.not_measured["sustained"] = "not asked for" if not seconds else "not by this engine"
        return
    progress(f"{one.device}: {one.job.model.format} sustained", 0, 1)
    key = _key(one)
    done = resume_log.find(key, "sustained")
    if done is None:
        counters = ["sh", "-c", energy.READ_COUNTERS]
        before = energy.parse_counters(transport.run(one.device, counters, _SHORT).text)
        plan = Plan(threads=one.threads, warmup=3, sustained=seconds)
        records, _ = run_plan(one, transport, plan)
        after = energy.parse_counters(transport.run(one.device, counters, _SHORT).text)
        used = energy.used(before, after)
        done = {"records": records, "energy": None if used is None else asdict(used)}
        resume_log.add(key, "sustained", done)
    one.sustained = [record for record in done["records"] if record["phase"] == "sustained"]
    one.energy = None if done["energy"] is None else energy.Energy(**done["energy"])
    if one.energy is None:
        one.not_measured["energy"] = "the system has no counter that moved"
    progress(f"{one.device}: {one.job.model.format} sustained", 1, 1)


def _trace(one: SessionState, transport: ModuleType, progress: Progress) -> None:
    """A second short run: recording costs time, so nothing is timed in it."""
    assert one.engine is not None
    if "trace" not in one.engine.can:
        one.not_measured["operators"] = "not by this engine"
        return
    progress(f"{one.device}: {one.job.model.format} operators", 0, 1)
    remote = f"{place_of(transport, one.device, one.job.model)}/trace"
    depth = min(one.settings.depths, default=0)
    plan = Plan(depths=[depth], steps=_TRACE_STEPS, threads=one.threads, trace=remote)
    run_plan(one, transport, plan)
    name = f"trace-{hash_of([str(one.device), _key(one)])}"
    local = cache_folder() / "traces" / name
    try:
        transport.pull(one.device, remote, local)
        transport.remove(one.device, remote)
        one.operators = operators.read_trace(one.job.model.format, local)
    finally:
        local.unlink(missing_ok=True)
    progress(f"{one.device}: {one.job.model.format} operators", 1, 1)


def _bandwidth(
    device: Device, transport: ModuleType, identity: Identity, threads: int
) -> float | None:
    """Bytes/s that the device's memory really gives; None where the probe does not run, or where
    an emulator would only be measured itself."""
    mac = identity.system.startswith("macOS")
    if identity.kind == "emulated" or mac or identity.machine not in runner.COMPILERS:
        return None
    probe = runner.build_probe(identity.machine)
    remote = f"{transport.workspace(device)}/{probe.name}"
    transport.push(device, probe, remote)
    done = transport.run(device, [remote, "bandwidth", str(threads)], _SHORT)
    if done.code:
        return None
    value = json.loads(done.text)["bandwidth"]
    return float(value) if math.isfinite(value) else None


def _recommended_threads(identity: Identity) -> int:
    known = find(identity.name)
    if known is not None:
        return known.threads
    fastest = max((core.max_khz or 0 for core in identity.cores), default=0)
    fast = sum(core.count for core in identity.cores if (core.max_khz or 0) >= 0.7 * fastest)
    return max(1, min(4, fast or identity.core_count))


def _key(one: SessionState) -> str:
    """What a stored repeat belongs to: the same device, model, engine and settings."""
    assert one.engine is not None and one.identity is not None
    identity = replace(one.identity, temperatures={}, governors=())
    return hash_of(
        [
            str(one.device), json.loads(json.dumps(asdict(identity))), one.engine.name,
            dict(one.engine.versions), one.threads, list(one.job.model.tokens),
            {name: sha256(one.job.model.folder / name) for name in one.job.model.files},
            json.loads(json.dumps(asdict(replace(one.settings, timeout=0, max_repeats=0)))),
            platform.node(),
        ]
    )  # fmt: skip
