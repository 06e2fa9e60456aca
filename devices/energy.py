"""Energy from the system's counters: RAPL on PCs, the battery's fuel gauge on phones and boards."""

import re
from dataclasses import dataclass

#: A shell script that prints "path value" for each counter that can be read.
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
    """The energy that was used between two readings, and the counters that it was read from."""

    joules: float
    source: str


def parse_counters(text: str) -> dict[str, int]:
    """The output of `READ_COUNTERS`: path → value in the unit of that counter."""
    return {path: int(value) for path, value in re.findall(r"^(/sys/\S+) (-?\d+)$", text, re.M)}


def used(before: dict[str, int], after: dict[str, int]) -> Energy | None:
    """The energy used between two readings by `parse_counters`.

    None where there is no counter or none changed: a fuel gauge has coarse steps, and it counts up
    while the battery is charged.
    """
    packages = [p for p in before if re.search(r"/(intel-rapl|amd-rapl)?:?\d*/energy_uj$", p)]
    packages = [p for p in packages if p.count(":") <= 1]  # a whole package, not one of its domains
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
