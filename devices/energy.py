"""Energy from the system's counters: RAPL on PCs, the battery's fuel gauge on phones and boards.

On Android the gauge is mostly closed to adb's shell in sysfs, but the battery service tells it:
``dumpsys battery`` prints the charge counter in microampere-hours and the voltage in millivolts
(frameworks/base, BatteryService).
"""

import re
from dataclasses import dataclass

from devices.answers import contained

#: A shell script that prints "path value" for each counter that can be read.
READ_COUNTERS = r"""
for f in /sys/class/powercap/*/energy_uj /sys/class/power_supply/*/energy_now \
  /sys/class/power_supply/*/charge_counter /sys/class/power_supply/*/charge_now \
  /sys/class/power_supply/*/voltage_now; do
  [ -r "$f" ] && v=$(cat "$f" 2>/dev/null) && echo "$f $v"
done
command -v dumpsys >/dev/null && dumpsys battery 2>/dev/null
true
"""


@dataclass(frozen=True)
class Energy:
    """The energy that was used between two readings, and the counters that it was read from."""

    joules: float
    source: str


#: Names of the battery service's two figures, beside which no other counter is used.
_SERVICE = "dumpsys battery/"


@contained("device", "its energy counters")
def parse_counters(text: str) -> dict[str, int]:
    """The output of `READ_COUNTERS`: path → value in the unit of that counter.

    The battery service's figures are added where sysfs has no fuel gauge.
    """
    lines = re.findall(r"^(/sys/[\w/.:-]{1,200}) (-?\d{1,18})$", text, re.MULTILINE)
    found = {path: int(value) for path, value in lines}
    if any(path.endswith(("/energy_now", "/charge_counter", "/charge_now")) for path in found):
        return found
    charge = re.search(r"^ *Charge counter: (\d{1,12})\r?$", text, re.MULTILINE)
    volts = re.search(r"^ *voltage: (\d{1,7})\r?$", text, re.MULTILINE)
    if charge and volts:
        found[f"{_SERVICE}charge_counter"] = int(charge[1])
        found[f"{_SERVICE}voltage_now"] = int(volts[1]) * 1000
    return found


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
