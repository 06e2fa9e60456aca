"""What a session is asked for, and what comes of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from devices.energy import Energy
from devices.engines import Engine, Model, Plan, Record
from devices.identity import Identity
from devices.operators import Operator
from devices.prediction import Workload
from devices.statistics import Summary, summarize
from devices.transports import Device

#: What has a speed, and how it is called in `not_measured`.
PLACES = {"prefill": "prefill {}", "decode": "decode after {}"}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how surely. Lengths and depths in tokens, times in seconds.

    `precision` is the half width of the median's interval, relative to it. `threads` 0 takes what
    the catalogue recommends, or the number of fast cores.
    """

    prompt_lengths: tuple[int, ...] = (64, 512)
    depths: tuple[int, ...] = (0, 512, 2048)
    decode_steps: int = 32
    sustained_seconds: int = 20
    precision: float = 0.05
    max_repeats: int = 20
    threads: int = 0
    timeout: float = 1800.0


@dataclass(frozen=True)
class Job:
    """One model for a session, with the user's own runner where one is given."""

    model: Model
    workload: Workload | None = None
    program: Path | None = None


@dataclass
class SessionState:
    """What came of one job. Records are those of the runners; `rounds` are the repeats."""

    job: Job
    device: Device
    settings: Settings
    identity: Identity | None = None
    engine: Engine | None = None
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
    not_measured: dict[str, str] = field(default_factory=dict)


def plan_of(one: SessionState) -> Plan:
    """What fits into the model's context; the rest is told in `not_measured`."""
    settings, context = one.settings, one.job.model.context
    prompts = [length for length in settings.prompt_lengths if length <= context]
    depths = [depth for depth in settings.depths if depth + settings.decode_steps <= context]
    for length in settings.prompt_lengths:
        if length not in prompts:
            one.not_measured[PLACES["prefill"].format(length)] = f"the context is {context}"
    for depth in settings.depths:
        if depth not in depths:
            one.not_measured[PLACES["decode"].format(depth)] = f"the context is {context}"
    return Plan(prompts, depths, settings.decode_steps, warmup=3, threads=one.threads)


def summaries(rounds: Sequence[Sequence[Record]]) -> dict[tuple[str, int], Summary]:
    """(phase, tokens or depth) → milliseconds over all rounds."""
    samples: dict[tuple[str, int], list[list[float]]] = {}
    within: dict[tuple[str, int], float] = {}
    for records in rounds:
        for record in records:
            if record["phase"] in ("load", "prefill", "decode", "execute") and record["ms"]:
                place = record["phase"], int(record.get("tokens", 0) or record.get("depth", 0))
                samples.setdefault(place, []).append(record["ms"])
                within[place] = max(within.get(place, 0.0), float(record.get("within_ms", 0)))
    return {
        place: summarize(repeats).read_within(within[place]) for place, repeats in samples.items()
    }


def hash_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
