"""Temperatures: from the kernel's thermal zones, or on Android from its thermal service.

``dumpsys thermalservice`` and ``dumpsys battery`` answer adb's shell where sysfs is closed. Their
forms are those of Android's ThermalManagerService and BatteryService (frameworks/base).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from devices.answers import contained
from devices.text import printable

Temperatures = dict[str, float]

#: A shell function that prints the temperatures: $1 is the folder of the thermal zones. Reading
#: them runs no program; Android's services are asked only where no zone can be read.
_READ = r"""
temperatures() {
  seen=
  for z in "$1"/thermal_zone*; do
    read -r kind < "$z/type" && read -r degrees < "$z/temp" && echo "zone $degrees $kind" && seen=1
  done 2>/dev/null
  [ -n "$seen" ] || ! command -v dumpsys >/dev/null || {
    dumpsys thermalservice; dumpsys battery; } 2>/dev/null |
    grep -E 'Temperature\{|HAL:| temperature:'
}
"""
ZONES = "/sys/class/thermal"
#: Prints the temperatures once; $1 is the folder of the zones.
READ_TEMPERATURES = _READ + '\ntemperatures "$1"'
#: Runs a command ($4 and its arguments) and prints the temperatures on standard error as long as it
#: runs: $1 the marker of a sample, $2 the seconds between two, $3 the folder of the zones.
LOG_TEMPERATURES = (
    _READ
    + r"""
mark=$1 every=$2 zones=$3
shift 3
( sleeper=
  trap 'kill $sleeper 2>/dev/null; exit' TERM
  while :; do
    read -r up _ < /proc/uptime
    now=$(temperatures "$zones" | while read -r line; do echo "$mark $up $line"; done)
    [ -z "$now" ] || printf '\n%s\n' "$now" >&2
    sleep "$every" 2>/dev/null &
    sleeper=$!
    wait $sleeper
  done ) </dev/null >/dev/null &
sampler=$!
"$@"
code=$?
kill "$sampler" 2>/dev/null
exit $code
"""
)
#: Sensors between these are believed, in degrees Celsius: broken ones tell 0 or -274.
_COLDEST, _HOTTEST = 1.0, 150.0
#: Sensors of one device; more are left out.
_MOST_SENSORS = 256


@dataclass(frozen=True)
class ThermalSample:
    """Temperatures in degrees Celsius by sensor, `seconds` after the first sample."""

    seconds: float
    temperatures: Temperatures


@contained("device", "its temperatures")
def parse_temperatures(text: str) -> Temperatures:
    """Degrees Celsius by sensor, from the output of `READ_TEMPERATURES`.

    Zones give millidegrees. Of Android's thermal service the current values count, or else the
    cached ones; the battery's own temperature is in tenths of a degree.
    """
    found = Temperatures()
    for degrees, name in re.findall(r"^zone (-?\d{1,9}) (\S.*)$", text, re.MULTILINE):
        _add(found, name, int(degrees) / 1000)
    current = text.partition("Current temperatures from HAL:")[2]
    for part in (current, text):
        pattern = (
            r"Temperature\{mValue=(-?\d{1,6}(?:\.\d{1,9})?), mType=-?\d{1,4}, mName=([^,}\n]{1,99})"
        )
        for degrees, name in re.findall(pattern, part):
            _add(found, name, float(degrees))
        if found:
            break
    battery = re.search(r"^ *temperature: (-?\d{1,6})$", text, re.MULTILINE)
    if battery and not any("bat" in name.lower() for name in found):
        _add(found, "battery", int(battery[1]) / 10)
    return found


def _add(found: Temperatures, name: str, degrees: float) -> None:
    if _COLDEST <= degrees <= _HOTTEST and len(found) < _MOST_SENSORS:
        found[printable(name.strip(), 60)] = degrees


@contained("device", "its thermal log")
def parse_log(stderr: bytes, mark: str) -> tuple[list[ThermalSample], bytes]:
    """The samples that `LOG_TEMPERATURES` printed with this marker, and the rest of stderr."""
    lines = stderr.decode("utf-8", "replace").splitlines()
    moments: dict[float, list[str]] = {}
    rest = list[str]()
    for line in lines:
        found = re.match(rf"{re.escape(mark)} (\d{{1,12}}(?:\.\d{{1,6}})?) (.*)$", line)
        if found:
            moments.setdefault(float(found[1]), []).append(found[2])
        else:
            rest.append(line)
    start = min(moments, default=0.0)
    samples = [
        ThermalSample(round(moment - start, 3), parse_temperatures("\n".join(said)))
        for moment, said in sorted(moments.items())
    ]
    return [sample for sample in samples if sample.temperatures], "\n".join(rest).encode()


def hottest(samples: Sequence[ThermalSample]) -> tuple[str, float, float, float] | None:
    """The sensor that became hottest: its name, and its temperature at first, at most, at last."""
    seen = [(degrees, name) for one in samples for name, degrees in one.temperatures.items()]
    if not seen:
        return None
    _, name = max(seen)
    values = [one.temperatures[name] for one in samples if name in one.temperatures]
    return name, values[0], max(values), values[-1]
