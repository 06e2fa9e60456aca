"""Identify a device from the output of its system. None of that output is ever executed."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from devices.answers import contained
from devices.catalogue import core_name
from devices.cores import parse_cores
from devices.errors import DeviceError
from devices.text import printable
from devices.thermal import READ_TEMPERATURES, parse_temperatures

#: One script for all systems: a section stays empty where the system lacks its source. $1 is the
#: folder of the thermal zones.
IDENTIFY = (
    r"""
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
echo @@usable; grep Cpus_allowed_list /proc/self/status
echo @@board; cat /proc/device-tree/model 2>/dev/null | tr -d '\0'; echo
cat /sys/class/dmi/id/sys_vendor /sys/class/dmi/id/product_name 2>/dev/null
echo @@thermal
"""
    + READ_TEMPERATURES
    + "\necho @@end\n"
)
#: Every section of its output, and characters of the whole and of a line.
_SECTIONS = tuple(re.findall(r"echo @@(\w+)", IDENTIFY))
_MOST_TEXT, _MOST_LINE = 4 << 20, 1 << 14

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
    `governors` those of its clock. `usable` are the numbers of the cores on which a process may
    run. `temperatures` are in degrees Celsius, by sensor.
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
    usable: tuple[int, ...] = ()
    temperatures: Mapping[str, float] = field(default_factory=dict)

    @property
    def core_count(self) -> int:
        """The number of all cores."""
        return sum(core.count for core in self.cores)


@contained("device", "its identity")
def parse_identity(text: str) -> Identity:
    """Parse the output of `IDENTIFY`. Raises DeviceError where it is cut off or is something else.

    The texts in it are printable, and no longer than names are.
    """
    if len(text) > _MOST_TEXT:
        raise DeviceError("device", f"identifies itself with more than {_MOST_TEXT >> 20} MiB")
    sections = _sections(text)
    missing = [name for name in _SECTIONS if name not in sections]
    if missing:
        problem = f"does not identify itself: {', '.join(missing)} is missing"
        raise DeviceError("device", problem, "Its shell may be restricted")
    properties = _properties(sections["getprop"])
    release = dict(re.findall(r'^(\w{1,99})="?(.*?)"?$', sections["release"], re.MULTILINE))
    board = [line.strip() for line in sections["board"].splitlines() if line.strip()]
    kernel = sections["kernel"].split()
    kind, reason = _kind(sections, properties, board)
    android = properties.get("ro.build.version.release")
    maker, model = (properties.get(f"ro.product.{n}", "") for n in ("manufacturer", "model"))
    processor = re.search(r"^model name\s*: (.+)$", sections["cpuinfo"], re.MULTILINE)
    soc = properties.get("ro.soc.model") or properties.get("ro.board.platform") or ""
    cores = _cores(sections["cpuinfo"], sections["frequencies"])
    return Identity(
        name=_short(f"{maker} {model}".strip() or " ".join(board) or "unknown"),
        soc=_short(soc or (processor[1].strip() if processor else "")),
        machine=_short(kernel[-1] if kernel else "unknown"),
        system=_short(f"Android {android}" if android else release.get("PRETTY_NAME", "Linux")),
        kernel=_short(" ".join(kernel[:-1])),
        cores=cores,
        features=_features(sections["cpuinfo"]),
        memory_bytes=parse_meminfo(sections["meminfo"]).total,
        governors=tuple(
            sorted(set(map(_short, re.findall(r"governor (\S+)", sections["governors"]))))
        ),
        usable=_usable(sections["usable"], sum(core.count for core in cores)),
        temperatures=parse_temperatures(sections["thermal"]),
        kind=kind,
        kind_reason=_short(reason),
    )


@contained("device", "/proc/meminfo")
def parse_meminfo(text: str) -> Memory:
    """Parse /proc/meminfo. Raises DeviceError where it has no MemTotal."""
    lines = re.findall(r"^(\w{1,99}):[ \t]*(\d{1,15}) kB", text, re.MULTILINE)
    found = {key: int(value) * 1024 for key, value in lines}
    if not found.get("MemTotal"):
        raise DeviceError("/proc/meminfo", "has no MemTotal")
    return Memory(found["MemTotal"], found.get("MemAvailable", found.get("MemFree", 0)))


def _short(text: str) -> str:
    return printable(text, 120)


def _sections(text: str) -> dict[str, str]:
    """Name → content of each section of the output of `IDENTIFY`, in printable lines."""
    lines = (
        printable(line.replace("\t", " "), _MOST_LINE)
        for line in text.replace("\r\n", "\n").split("\n")
    )
    parts = re.split(r"^@@(\w{1,20})$\n?", "\n".join(lines), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _properties(text: str) -> dict[str, str]:
    """The lines ``[name]: [value]`` of Android's getprop."""
    found = {}
    for line in text.splitlines():
        name, mark, value = line.partition("]: [")
        if mark and name.startswith("[") and value.endswith("]"):
            found[name[1:]] = value[:-1]
    return found


def _usable(text: str, count: int) -> tuple[int, ...]:
    """The cores of Cpus_allowed_list; all of them where it is not told."""
    listed = re.search(r"Cpus_allowed_list: *([\d,-]{1,999})", text)
    return parse_cores(listed[1], "Cpus_allowed_list") if listed else tuple(range(count))


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
    told = re.findall(
        r"^\S{1,60}/cpu(\d{1,4})/cpufreq/\w{1,60} (\d{1,12})$", frequencies, re.MULTILINE
    )
    speeds = {int(n): int(khz) for n, khz in told}
    counted = Counter[tuple[str, int | None]]()
    for block in re.split(r"\n\s*\n", cpuinfo):
        number = re.search(r"^processor\s*: (\d{1,6})$", block, re.MULTILINE)
        if number is None:
            continue
        implementer = re.search(r"^CPU implementer\s*: (0x[0-9a-f]{1,8})$", block, re.MULTILINE)
        part = re.search(r"^CPU part\s*: (0x[0-9a-f]{1,8})$", block, re.MULTILINE)
        model = re.search(r"^model name\s*: (.+)$", block, re.MULTILINE)
        name = _short(model[1].strip()) if model else "unknown"
        if implementer and part:
            name = core_name(int(implementer[1], 16), int(part[1], 16))
        counted[name, speeds.get(int(number[1]))] += 1
    cores = [Core(name, count, khz) for (name, khz), count in counted.items()]
    return tuple(sorted(cores, key=lambda core: -(core.max_khz or 0)))


def _features(cpuinfo: str) -> tuple[str, ...]:
    found = re.search(r"^(?:Features|flags)\s*: (.+)$", cpuinfo, re.MULTILINE)
    return tuple(sorted(set(map(_short, found[1].split())))) if found else ()
