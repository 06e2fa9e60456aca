"""Settings, jobs and the state of a session."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from devices.energy import Energy
from devices.engines import Engine, Model, Plan
from devices.engines.records import Record
from devices.identity import Identity
from devices.operators import Operator
from devices.prediction import Workload
from devices.statistics import Summary, summarize
from devices.thermal import ThermalSample
from devices.transports import Device

#: The phases that have a speed, and their names in `not_measured`.
PHASE_NAMES = {"prefill": "prefill {}", "decode": "decode after {}"}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how precisely. Lengths and depths are in tokens, times in seconds.

    A session repeats until both ends of each median's confidence interval are within `precision`
    of the median, relative to it, or `max_repeats` are done. The sustained run lasts until both its
    seconds are over and its tokens are decoded, `cooldown_seconds` after everything else.
    `threads` 0 stands for the number that the catalogue recommends, or else the number of fast
    cores; in any case it is at most the number of cores that may be used. `cores` lists those to
    use (``4-7``, '' for all). `mmap` says whether the model is mapped or read. With `packed_cache`,
    the first load packs the weights into a file, and the others map it.
    """

    prompt_lengths: tuple[int, ...] = (64, 512)
    depths: tuple[int, ...] = (0, 512, 2048)
    decode_steps: int = 32
    sustained_seconds: int = 20
    sustained_tokens: int = 0
    cooldown_seconds: int = 0
    precision: float = 0.05
    max_repeats: int = 20
    threads: int = 0
    cores: str = ""
    mmap: bool = True
    packed_cache: bool = False
    timeout: float = 1800.0


@dataclass(frozen=True)
class Job:
    """A model to profile, with the user's own runner program where one is given."""

    model: Model
    workload: Workload | None = None
    program: Path | None = None


@dataclass
class SessionState:
    """One job on one device, and its results so far.

    `error` is why it failed, `skipped` why this device cannot run it. Records are those of the
    runners: `first` has the warm-up, `rounds` has a list for each repeat. `probes` has what the
    memory probe saw of each repeat. `bandwidth` is in bytes/s, `available_memory` in bytes.
    `temperatures` are in degrees Celsius, by sensor, before and after; `thermal` has those during
    the sustained run. With `cores`, commands run on these only.
    """

    job: Job
    device: Device
    settings: Settings
    identity: Identity | None = None
    engine: Engine | None = None
    cores: tuple[int, ...] = ()
    threads: int = 0
    error: str | None = None
    skipped: str | None = None
    first: list[Record] = field(default_factory=list)
    rounds: list[list[Record]] = field(default_factory=list)
    probes: list[Record] = field(default_factory=list)
    sustained: list[Record] = field(default_factory=list)
    energy: Energy | None = None
    operators: list[Operator] = field(default_factory=list)
    bandwidth: float | None = None
    available_memory: int | None = None
    temperatures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    thermal: list[ThermalSample] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)


def plan_of(session: SessionState) -> Plan:
    """The plan of one repeat: the prompts and depths that fit into the model's context.

    The others are added to `session.not_measured`.
    """
    settings, context = session.settings, session.job.model.context
    prompts = [length for length in settings.prompt_lengths if length <= context]
    depths = [depth for depth in settings.depths if depth + settings.decode_steps <= context]
    for length in settings.prompt_lengths:
        if length not in prompts:
            session.not_measured[PHASE_NAMES["prefill"].format(length)] = (
                f"the context is {context}"
            )
    for depth in settings.depths:
        if depth not in depths:
            session.not_measured[PHASE_NAMES["decode"].format(depth)] = f"the context is {context}"
    return Plan(
        prompts, depths, settings.decode_steps, warmup=3, threads=session.threads,
        mmap=settings.mmap, packed_cache=settings.packed_cache,
    )  # fmt: skip


@dataclass
class Samples:
    """The samples of one phase in milliseconds, a list for each repeat, and the largest error of
    the clock that timed them."""

    repeats: list[list[float]] = field(default_factory=list)
    clock_error: float = 0.0


def samples(rounds: Sequence[Sequence[Record]]) -> dict[tuple[str, int], Samples]:
    """The samples of all rounds, by (phase, tokens or depth); 0 for a phase without either."""
    found: dict[tuple[str, int], Samples] = {}
    for records in rounds:
        for record in records:
            if record["phase"] in ("load", "prefill", "decode", "execute") and record["ms"]:
                key = record["phase"], int(record.get("tokens", 0) or record.get("depth", 0))
                of_phase = found.setdefault(key, Samples())
                of_phase.repeats.append(record["ms"])
                error = float(record.get("within_ms", 0))
                of_phase.clock_error = max(of_phase.clock_error, error)
    return found


def summaries(rounds: Sequence[Sequence[Record]]) -> dict[tuple[str, int], Summary]:
    """Milliseconds over all rounds, by the keys of `samples`."""
    return {
        key: summarize(phase.repeats).widened(phase.clock_error)
        for key, phase in samples(rounds).items()
    }


def hash_of(content: object) -> str:
    """16 hexadecimal digits of the sha256 of `content` as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
