"""Compare the reports of two profiles of the same format on the same model of device."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from devices.errors import BadDeviceError

Session = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One phase in two reports; times are medians in milliseconds.

    `ratio` is the time before divided by the time now: above 1 it is faster now. `clear` says
    whether the confidence intervals of the two medians are disjoint.
    """

    format: str
    what: str
    before_ms: float
    now_ms: float
    ratio: float
    clear: bool


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Comparison]:
    """Compare all complete sessions of the same format.

    Raises BadDeviceError where a device is emulated, where kind or model of the devices differ, and
    where `before` has no session of any of the formats.
    """
    rows: list[Comparison] = []
    for ours in _complete(now):
        matching = [theirs for theirs in _complete(before) if _format(theirs) == _format(ours)]
        for theirs in matching:
            _require_comparable(ours, theirs)
            rows += _compare_sessions(ours, theirs)
    if not rows:
        raise BadDeviceError("the baseline", "holds no complete session of the same format")
    return rows


def _complete(report: Mapping[str, Any]) -> Iterator[Session]:
    return (session for session in report["sessions"] if session["status"] == "complete")


def _format(session: Session) -> str:
    return str(session["artifact"]["format"])


def _require_comparable(ours: Session, theirs: Session) -> None:
    for session in (ours, theirs):
        if not session["comparable"] or session["kind"] == "emulated":
            problem = "is emulated: its times mean nothing and are never compared"
            raise BadDeviceError(session["device"], problem, "Measure on a device")
    if ours["kind"] != theirs["kind"]:
        problem = f"is {ours['kind']} and the baseline's {theirs['device']} is {theirs['kind']}"
        raise BadDeviceError(ours["device"], problem, "Compare devices of one kind")
    names = [(s["identity"]["name"], s["identity"]["soc"]) for s in (ours, theirs)]
    if names[0] != names[1]:
        problem = f"is {' '.join(names[0])} and the baseline's is {' '.join(names[1])}"
        raise BadDeviceError(ours["device"], problem, "Give the report of the same device")


def _compare_sessions(ours: Session, theirs: Session) -> Iterator[Comparison]:
    for kind, key in (("prefill", "tokens"), ("decode", "depth")):
        earlier = {entry[key]: entry["ms"] for entry in theirs[kind]}
        for entry in ours[kind]:
            old, new = earlier.get(entry[key]), entry["ms"]
            if old is None:
                continue
            clear = old["low"] > new["high"] or old["high"] < new["low"]
            before, now = old["p50"], new["p50"]
            what = f"{kind} {entry[key]}"
            yield Comparison(_format(ours), what, before, now, before / now, clear)
