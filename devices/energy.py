"""What the system counts of energy: RAPL on PCs, the battery's gauge on phones and boards."""

import re
from dataclasses import dataclass

#: Prints "path value" for each counter that can be read.
READ_COUNTERS = r"""
for f in /sys/class/powercap/*/energy_uj /sys/class/power_supply/*/energy_now \
  /sys/class/power_supply/*/charge_counter /sys/class/power_supply/*/charge_now \
  /sys/class/power_supply/*/voltage_now; do
  [ -r "$f" ] && v=$(cat "$f" 2>/dev/null) && echo "$f $v"
done
true
"""


@dataclass(frozen=True)
class Energy:
    """What was used between two readings, and the counter that says so."""

    joules: float
    source: str


def parse_counters(text: str) -> dict[str, int]:
    return {path: int(value) for path, value in re.findall(r"^(/sys/\S+) (-?\d+)$", text, re.M)}


def used(before: dict[str, int], after: dict[str, int]) -> Energy | None:
    """None where there is no counter, or it did not move: a battery's gauge is coarse, and on
    mains it counts up."""
    packages = [p for p in before if re.search(r"/(intel-rapl|amd-rapl)?:?\d*/energy_uj$", p)]
    packages = [p for p in packages if p.count(":") <= 1]  # not a part of another
    if packages:
        micro = sum(after.get(path, before[path]) - before[path] for path in packages)
        return Energy(micro / 1e6, ", ".join(sorted(packages))) if micro > 0 else None
    for path, start in before.items():
        drop = start - after.get(path, start)
        if drop <= 0:
            continue
        if path.endswith("/energy_now"):  # microwatt-hours
            return Energy(drop * 3600 / 1e6, path)
        if path.endswith(("/charge_counter", "/charge_now")):  # microampere-hours
            volts = before.get(path.rsplit("/", 1)[0] + "/voltage_now", 0) / 1e6
            if volts:
                return Energy(drop * 3600 / 1e6 * volts, path)
    return None
