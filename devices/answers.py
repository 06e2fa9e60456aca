"""Reading what a device answers. A device may answer anything: every answer has a limit, and an
answer that is not understood is an error of that device alone."""

import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from devices.errors import DeviceError
from devices.text import printable

#: Limits of JSON: characters, nested lists and objects, and digits of a number.
MOST_JSON, DEEPEST_JSON, MOST_DIGITS = 24 << 20, 32, 40
#: The largest number that any answer may hold: bytes, tokens and milliseconds stay far below it.
LARGEST = 2**62
_log = logging.getLogger("exporter.devices")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@contextmanager
def contained(subject: object, what: str) -> Iterator[None]:
    """Turn every exception of the block into a DeviceError with its type and `what` was read.

    A DeviceError passes unchanged. Also a decorator of functions that parse an answer. The
    traceback is logged, which ``--verbose`` shows: the fault may be one of this program.
    """
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        if _log.isEnabledFor(logging.DEBUG):
            for line in traceback.format_exc().splitlines():
                _log.debug("%s", printable(line))
        problem = f"{what} cannot be used ({type(error).__name__}: {error})"
        raise DeviceError(subject, problem, "Nothing of this answer counts") from error


def parse_json(text: str, subject: object) -> Any:
    """Parse JSON within the limits above. Raises DeviceError; NaN and Infinity are no JSON."""
    if len(text) > MOST_JSON:
        raise DeviceError(subject, f"gives JSON of more than {MOST_JSON >> 20} MiB")
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEEPEST_JSON:
        raise DeviceError(subject, f"gives JSON with {deepest} nested levels of {DEEPEST_JSON}")

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise DeviceError(subject, f"gives a number of {len(digits)} digits of {MOST_DIGITS}")
        return int(digits)

    def refuse(name: str) -> NoReturn:
        raise DeviceError(subject, f"gives {name}, which is no number")

    try:
        return json.loads(text, parse_int=whole, parse_constant=refuse)
    except ValueError as error:
        raise DeviceError(subject, f"gives {text[:60]!r}, which is no JSON ({error})") from error


def is_number(value: object, lowest: float = 0) -> bool:
    """Whether a value of an answer is a number from `lowest` to `LARGEST`; bools are none."""
    return type(value) in (int, float) and lowest <= value <= LARGEST  # type: ignore[operator]


def is_whole(value: object, lowest: int = 0) -> bool:
    """Whether a value of an answer is a whole number from `lowest` to `LARGEST`."""
    return type(value) is int and is_number(value, lowest)
