"""The sustained run: decode without a pause, and watch energy and temperatures meanwhile."""

import time
from dataclasses import asdict
from types import ModuleType

from devices import energy
from devices.engines import Plan
from devices.execution import SHORT, run_plan
from devices.progress import Progress
from devices.resume_log import ResumeLog
from devices.session_state import SessionState
from devices.thermal import ThermalSample


def measure_sustained(
    session: SessionState,
    transport: ModuleType,
    key: str,
    progress: Progress,
    resume_log: ResumeLog,
) -> None:
    """Decode for the seconds and tokens of the settings, after the time to cool down; or take the
    run from the resume log, where it has one of this `key`. Raises DeviceError."""
    assert session.engine is not None
    settings, name = session.settings, f"{session.device}: {session.job.model.format}"
    wanted = settings.sustained_seconds or settings.sustained_tokens
    if not wanted or "sustained" not in session.engine.capabilities:
        session.not_measured["sustained"] = "not by this engine" if wanted else "not asked for"
        return
    done = resume_log.find(key, "sustained")
    if done is None:
        for second in range(settings.cooldown_seconds):
            progress(f"{name} cool down", second, settings.cooldown_seconds)
            time.sleep(1)
        progress(f"{name} sustained", 0, 1)
        plan = Plan(
            threads=session.threads, warmup=3, sustained=settings.sustained_seconds,
            sustained_steps=settings.sustained_tokens, mmap=settings.mmap,
            packed_cache=settings.packed_cache,
        )  # fmt: skip
        before = _counters(session, transport)
        records, _ = run_plan(session, transport, plan)
        used = energy.used(before, _counters(session, transport))
        done = {
            "records": records,
            "energy": None if used is None else asdict(used),
            "thermal": [asdict(sample) for sample in session.thermal],
        }
        resume_log.add(key, "sustained", done)
    session.sustained = [record for record in done["records"] if record["phase"] == "sustained"]
    session.energy = None if done["energy"] is None else energy.Energy(**done["energy"])
    session.thermal = [ThermalSample(**sample) for sample in done.get("thermal", [])]
    if session.energy is None:
        session.not_measured["energy"] = "the system has no counter that moved"
    if not session.thermal:
        session.not_measured["temperatures"] = "the system shows no sensor"
    progress(f"{name} sustained", 1, 1)


def _counters(session: SessionState, transport: ModuleType) -> dict[str, int]:
    command = ["sh", "-c", energy.READ_COUNTERS]
    return energy.parse_counters(transport.run(session.device, command, SHORT).text)
