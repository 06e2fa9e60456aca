"""Put a model and its engine on a device, and run the commands of a plan there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from devices import runner, thermal
from devices.answers import is_number, parse_json
from devices.cores import mask_of, show_cores
from devices.engines import Engine, Model, Plan, native, official, python
from devices.engines.records import Record
from devices.errors import BadDeviceError, DeviceError
from devices.files import cache_folder, sha256
from devices.identity import Identity
from devices.session_state import SessionState, hash_of, plan_of
from devices.transports import Device

#: Seconds for a command that measures nothing.
SHORT = 120.0
#: Samples that a thermal log has at most, and the fewest seconds between two.
_MOST_SAMPLES, _FEWEST_SECONDS = 300, 2
_MARK = "@@mobilellm-thermal"


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
    if not session.settings.mmap and "mmap" not in engine.capabilities:
        problem = "has no choice between mapping and reading a model"
        raise BadDeviceError(engine.name, problem, "Leave --no-mmap out")
    if session.settings.packed_cache and "packed_cache" not in engine.capabilities:
        raise BadDeviceError(engine.name, "keeps no packed weights", "Leave --packed-cache out")
    if session.settings.packed_cache and not session.settings.mmap:
        problem = "needs a model that is mapped"
        raise BadDeviceError("--packed-cache", problem, "Leave --no-mmap out")
    files = {f"{folder}/{name}": model.folder / name for name in model.files}
    tokens = cache_folder() / "tokens" / f"{hash_of(model.tokens)}.txt"
    if not tokens.is_file():
        tokens.parent.mkdir(parents=True, exist_ok=True)
        tokens.write_text(" ".join(map(str, model.tokens)))
    files |= engine.files
    files[f"{folder}/tokens.txt"] = tokens
    if probe := memory_probe(session.identity):
        files[f"{workspace}/{probe.name}"] = probe
    for remote, local in files.items():
        transport.push(device, local, remote)
    return engine


def memory_probe(identity: Identity) -> Path | None:
    """The memory probe for a device, or None where none can be built for it."""
    return runner.build_probe(identity.machine) if has_native(identity) else None


def has_native(identity: Identity) -> bool:
    """Whether the native runner and the memory probe can be built for a device."""
    return identity.machine in runner.COMPILERS and not identity.system.startswith("macOS")


def _choose_engine(
    session: SessionState, transport: ModuleType, workspace: str, folder: str
) -> Engine:
    model, device, identity = session.job.model, session.device, session.identity
    assert identity is not None
    android = identity.system.startswith("Android")
    if session.job.program is not None:
        plan = plan_of(session)
        return official.engine(session.job.program, model, workspace, folder, plan, android)
    here = device.transport == "host"
    if model.format == "executorch" and (not here or (model.native and has_native(identity))):
        return native.engine(model, identity, workspace, folder)
    if model.format == "coreml" and device.transport != "mac":
        raise BadDeviceError("coreml", "runs on a Mac only", "Give --device mac there")
    if android:
        programs = official.programs_for(model.format)
        if not programs:
            raise BadDeviceError(f"{model.format} on {device}", "does not run on Android")
        raise BadDeviceError(
            f"{model.format} on {device}", "needs the runtime's own program",
            f"Build {' or '.join(programs)} and give it with --runner",
        )  # fmt: skip
    found = transport.run(device, python.version_command(model, device), SHORT)
    versions = python.read_versions(model, found)
    return python.engine(model, device, workspace, folder, versions)


def pinned_to(cores: tuple[int, ...]) -> list[str]:
    """The beginning of a command that runs on these cores only; with none, on any."""
    return ["taskset", mask_of(cores)] if cores else []


def check_cores(
    device: Device, transport: ModuleType, identity: Identity, cores: tuple[int, ...]
) -> None:
    """Raise DeviceError where a command cannot be run on these cores."""
    if not cores:
        return
    closed = [core for core in cores if core not in identity.usable]
    if closed and identity.usable:
        problem = f"a process may not run on core {show_cores(closed)}"
        usable = show_cores(identity.usable)
        raise DeviceError(device, problem, f"Choose --cores from {usable}")
    done = transport.run(device, [*pinned_to(cores), "true"], SHORT)
    if done.code == 127:
        remedy = "Leave --cores out, or install it there (Debian: util-linux)"
        raise DeviceError(device, "has no taskset, which --cores needs", remedy)
    done.check(f"{device}: --cores {show_cores(cores)}")


def run_plan(
    session: SessionState, transport: ModuleType, plan: Plan
) -> tuple[list[Record], Record]:
    """Run the commands of a plan on the device.

    Gives the records of all commands, and the memory probe's report with the highest peak. Where
    the plan has a sustained run, temperatures are added to `session.thermal`. Raises DeviceError.
    """
    assert session.engine is not None and session.identity is not None
    probe: Record = {}
    wrapper: list[str] = []
    if program := memory_probe(session.identity):
        wrapper = [f"{transport.workspace(session.device)}/{program.name}", "run"]
    wrapper += pinned_to(session.cores)
    sustained = plan.sustained or plan.sustained_steps
    if sustained:
        every = str(max(_FEWEST_SECONDS, plan.sustained // _MOST_SAMPLES))
        log = ["sh", "-c", thermal.LOG_TEMPERATURES, "mobilellm", _MARK, every, thermal.ZONES]
        wrapper = [*log, *wrapper]
    records: list[Record] = []
    for command in session.engine.commands(plan):
        done = transport.run(session.device, [*wrapper, *command.argv], session.settings.timeout)
        seen, stderr = read_probe(done.stderr)
        if sustained:
            session.thermal, stderr = thermal.parse_log(stderr, _MARK)
        probe = seen if seen.get("peak_rss", 0) >= probe.get("peak_rss", 0) else probe
        records += command.records(replace(done, argv=tuple(command.argv), stderr=stderr))
    return records, probe


def read_probe(stderr: bytes) -> tuple[Record, bytes]:
    """The memory probe's report, and the rest of stderr; {} where the report is missing.

    Raises DeviceError where it is something else than numbers.
    """
    lines = stderr.splitlines(keepends=True)
    for index, line in enumerate(lines):
        if line.startswith(b'{"probe":') and line.rstrip().endswith(b"}}"):
            said = parse_json(line.decode("utf-8", "replace"), "the memory probe")
            seen = said.get("probe")
            if not isinstance(seen, Mapping) or not {"peak_rss", "peak_pss"} <= seen.keys():
                raise DeviceError("the memory probe", f"printed {line[:60]!r}")
            if not all(is_number(value, -1) for value in seen.values()):
                raise DeviceError("the memory probe", f"printed {line[:60]!r}")
            known = ("code", "seconds", "peak_rss", "peak_pss", "user_seconds", "system_seconds")
            rest = b"".join(lines[:index] + lines[index + 1 :])
            return {key: seen[key] for key in known if key in seen}, rest
    return {}, stderr
