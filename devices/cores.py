"""Lists of CPU cores, such as ``0,4-7``: chosen by the user, and told by a device."""

import re
from collections.abc import Sequence

from devices.errors import BadDeviceError

#: Larger than the number of any core of a phone or a server.
_MOST = 4096


def parse_cores(text: str, subject: str = "--cores") -> tuple[int, ...]:
    """The numbers in a list such as ``0,4-7``, in ascending order. Raises BadDeviceError."""
    found = set[int]()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST:
            problem = f"{text[:40]!r} is not a list of cores"
            raise BadDeviceError(subject, problem, "Write numbers and ranges, as 0,4-7")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def show_cores(cores: Sequence[int]) -> str:
    """The shortest list: (0, 4, 5, 6) → ``0,4-6``."""
    ranges: list[list[int]] = []
    for core in sorted(cores):
        if ranges and ranges[-1][1] == core - 1:
            ranges[-1][1] = core
        else:
            ranges.append([core, core])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in ranges)


def mask_of(cores: Sequence[int]) -> str:
    """The mask that `taskset` takes on Android (toybox) and on Linux: hexadecimal, without 0x."""
    return f"{sum(1 << core for core in set(cores)):x}"
