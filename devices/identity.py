"""Identify a device from the output of its system. None of that output is ever executed."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from devices.catalogue import core_name
from devices.errors import DeviceError

#: One script for all systems: a section stays empty where the system lacks its source.
IDENTIFY = r"""
each() { for f in "$@"; do [ -r "$f" ] && printf '%s ' "$f" && cat "$f" && echo; done 2>/dev/null; }
cpu=/sys/devices/system/cpu
echo @@kernel; uname -srm
echo @@process; cat "/proc/$$/cmdline" | tr '\0' '\n' | head -n 1
echo @@cpuinfo; cat /proc/cpuinfo
echo @@meminfo; cat /proc/meminfo
echo @@release; cat /etc/os-release 2>/dev/null
echo @@getprop; getprop 2>/dev/null
echo @@frequencies; each $cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq
echo @@governors; each $cpu/cpu[0-9]*/cpufreq/scaling_governor
echo @@thermal; for z in /sys/class/thermal/thermal_zone*; do
  [ -r "$z/temp" ] && echo "$(cat "$z/type") $(cat "$z/temp")"; done 2>/dev/null
echo @@board; cat /proc/device-tree/model 2>/dev/null | tr -d '\0'; echo
cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_name 2>/dev/null
echo @@end
"""

Kind = Literal["real", "virtual", "emulated"]


@dataclass(frozen=True)
class Core:
    """A group of equal cores, and their highest clock in kHz where the system tells it."""

    name: str
    count: int
    max_khz: int | None


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: all of it, and what is available now."""

    total: int
    available: int


@dataclass(frozen=True)
class Identity:
    """What a device is.

    `kind` is emulated where the instructions of another architecture run in software, and virtual
    in a virtual machine; `kind_reason` is the evidence. `features` are those of the CPU,
    `governors` those of its clock. `temperatures` are in degrees Celsius, by sensor.
    """

    name: str
    machine: str
    system: str
    kernel: str
    memory_bytes: int
    kind: Kind
    soc: str = ""
    kind_reason: str = ""
    cores: tuple[Core, ...] = ()
    features: tuple[str, ...] = ()
    governors: tuple[str, ...] = ()
    temperatures: Mapping[str, float] = field(default_factory=dict)

    @property
    def core_count(self) -> int:
        """The number of all cores."""
        return sum(core.count for core in self.cores)


def parse_identity(text: str) -> Identity:
    """Parse the output of `IDENTIFY`. Raises DeviceError where it is cut off."""
    sections = _sections(text)
    if "end" not in sections:
        raise DeviceError("device", "does not identify itself", "Its shell may be restricted")
    properties = dict(re.findall(r"^\[(.+?)\]: \[(.*?)\]$", sections["getprop"], re.MULTILINE))
    release = dict(re.findall(r'^(\w+)="?(.*?)"?$', sections["release"], re.MULTILINE))
    board = [line.strip() for line in sections["board"].splitlines() if line.strip()]
    kernel = sections["kernel"].split()
    kind, reason = _kind(sections, properties, board)
    android = properties.get("ro.build.version.release")
    maker, model = (properties.get(f"ro.product.{n}", "") for n in ("manufacturer", "model"))
    processor = re.search(r"^model name\s*: (.+)$", sections["cpuinfo"], re.MULTILINE)
    soc = properties.get("ro.soc.model") or properties.get("ro.board.platform") or ""
    return Identity(
        name=f"{maker} {model}".strip() or " ".join(board) or "unknown",
        soc=soc or (processor[1].strip() if processor else ""),
        machine=kernel[-1] if kernel else "unknown",
        system=f"Android {android}" if android else release.get("PRETTY_NAME", "Linux"),
        kernel=" ".join(kernel[:-1]),
        cores=_cores(sections["cpuinfo"], sections["frequencies"]),
        features=_features(sections["cpuinfo"]),
        memory_bytes=parse_meminfo(sections["meminfo"]).total,
        governors=tuple(sorted(set(re.findall(r"scaling_governor (\S+)", sections["governors"])))),
        temperatures=_temperatures(sections["thermal"]),
        kind=kind,
        kind_reason=reason,
    )


def parse_meminfo(text: str) -> Memory:
    """Parse /proc/meminfo. Raises DeviceError where it has no MemTotal."""
    found = {key: int(value) * 1024 for key, value in re.findall(r"(\w+):\s+(\d+) kB", text)}
    if "MemTotal" not in found:
        raise DeviceError("/proc/meminfo", "has no MemTotal")
    return Memory(found["MemTotal"], found.get("MemAvailable", found.get("MemFree", 0)))


def _sections(text: str) -> dict[str, str]:
    """Name → content of each section of the output of `IDENTIFY`."""
    parts = re.split(r"^@@(\w+)\r?\n", text.replace("\r\n", "\n"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _kind(
    sections: Mapping[str, str], properties: Mapping[str, str], board: list[str]
) -> tuple[Kind, str]:
    """The kind of the device and the evidence for it.

    An emulator of single processes is seen in the program that runs the shell.
    """
    program = sections["process"].strip()
    if "qemu" in program.lower():
        return "emulated", f"its shell is run by {program}"
    x86 = "vendor_id" in sections["cpuinfo"]
    arm = re.search(r"\b(aarch64|armv\w+)\s*$", sections["kernel"]) is not None
    if x86 and arm:
        return "emulated", "an Arm system on an x86 processor"
    for key in ("ro.kernel.qemu", "ro.boot.qemu"):
        if properties.get(key) == "1":
            return "virtual", f"{key} is 1"
    hardware = properties.get("ro.hardware", "")
    if re.fullmatch(r"goldfish|ranchu|cutf_.*", hardware):
        return "virtual", f"ro.hardware is {hardware}"
    if re.search(r"^flags\s*:.*\bhypervisor\b", sections["cpuinfo"], re.MULTILINE):
        return "virtual", "the processor tells of a hypervisor"
    machine = " ".join(board)
    if re.search(r"QEMU|KVM|VMware|VirtualBox|dummy-virt|Virtual Machine", machine):
        return "virtual", f"the board is {machine}"
    return "real", ""


def _cores(cpuinfo: str, frequencies: str) -> tuple[Core, ...]:
    """Groups of equal cores, the fastest first."""
    speeds = {int(n): int(khz) for n, khz in re.findall(r"cpu(\d+)/\S+ (\d+)", frequencies)}
    counted = Counter[tuple[str, int | None]]()
    for block in re.split(r"\n\s*\n", cpuinfo):
        number = re.search(r"^processor\s*: (\d+)", block, re.MULTILINE)
        if number is None:
            continue
        implementer = re.search(r"^CPU implementer\s*: (0x[0-9a-f]+)", block, re.MULTILINE)
        part = re.search(r"^CPU part\s*: (0x[0-9a-f]+)", block, re.MULTILINE)
        model = re.search(r"^model name\s*: (.+)$", block, re.MULTILINE)
        name = model[1].strip() if model else "unknown"
        if implementer and part:
            name = core_name(int(implementer[1], 16), int(part[1], 16))
        counted[name, speeds.get(int(number[1]))] += 1
    cores = [Core(name, count, khz) for (name, khz), count in counted.items()]
    return tuple(sorted(cores, key=lambda core: -(core.max_khz or 0)))


def _features(cpuinfo: str) -> tuple[str, ...]:
    found = re.search(r"^(?:Features|flags)\s*: (.+)$", cpuinfo, re.MULTILINE)
    return tuple(sorted(found[1].split())) if found else ()


def _temperatures(text: str) -> dict[str, float]:
    """Degrees Celsius by sensor, from millidegrees. Values outside 1 to 150 °C are left out."""
    found = re.findall(r"^(\S+) (-?\d+)$", text, re.MULTILINE)
    return {name: int(value) / 1000 for name, value in found if 1000 <= int(value) <= 150_000}
