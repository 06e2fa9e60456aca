"""Quantities of a budget: numbers with units as text, such as ``4 MB``, ``300 ms`` and ``95 %``.

Sizes are kept in bytes, times in milliseconds, shares from 0 to 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator

from exporter.errors import short
from exporter.settings import refusal

RATE = "tokens/s"
_SIZES = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1 << 10, "MiB": 1 << 20,
          "GiB": 1 << 30}  # fmt: skip
_TIMES = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_COUNTS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
_SHARES = {"": 1.0, "%": 0.01}
_PLAIN = {"": 1.0}
_TEXT = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(\D*)", re.ASCII)
#: The longest text of a quantity, in characters.
_LONGEST = 60
#: The tolerance of figures that are not compared with the baseline.
IGNORE = "ignore"


@dataclass(frozen=True)
class Bound:
    """A limit in `unit` (bytes, ms, tokens/s, instructions, '' for a plain number, % for a share).

    A value may be at most the bound, or, without `at_most`, at least the bound.
    """

    value: float
    unit: str
    at_most: bool = True

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN does not."""
        return value <= self.value if self.at_most else value >= self.value


def show(value: float, unit: str) -> str:
    """A value with 4 significant digits in a readable unit."""
    if unit == "%":
        return f"{100 * value:.4g} %"
    if unit == "bytes":
        return _scaled(value, {"GB": 1e9, "MB": 1e6, "kB": 1e3}, "bytes")
    if unit == "instructions":
        return f"{_scaled(value, {'G': 1e9, 'M': 1e6, 'k': 1e3}, '')} instructions"
    return f"{value:,.0f} {unit}".rstrip() if abs(value) >= 1e4 else f"{value:.4g} {unit}".rstrip()


def _scaled(value: float, units: Mapping[str, float], smallest: str) -> str:
    for unit, size in units.items():
        if abs(value) >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} {smallest}".rstrip()


def _number(value: object, units: Mapping[str, float], example: str) -> tuple[float, str]:
    """The number in a value of a budget, times its unit, and the unit. Raises the error of a
    validator, which ends with `example`."""
    text = value if isinstance(value, str) else str(value) if _is_number(value) else ""
    found = _TEXT.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    unit = found[2].strip() if found else ""
    if found is None or unit not in units:
        named = ", ".join(name for name in units if name)
        problem = f"{short(value)} is not a number" + (f" in one of {named}" if named else "")
        raise refusal(problem, f"Write it as {example}")
    return float(found[1]) * units[unit], unit


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound(unit: str, units: Mapping[str, float], example: str, at_most: bool) -> BeforeValidator:
    return BeforeValidator(lambda value: Bound(_number(value, units, example)[0], unit, at_most))


def _speed(value: object) -> Bound:
    number, unit = _number(value, {**_TIMES, RATE: 1.0}, "4 ms or 250 tokens/s")
    return Bound(number, RATE, at_most=False) if unit == RATE else Bound(number, "ms")


def _share(value: object) -> float:
    number, _ = _number(value, _SHARES, "95 % or 0.95")
    if not 0 <= number <= 1:
        raise refusal(f"{short(value)} is not a share from 0 to 1", "Write it as 95 % or 0.95")
    return number


def _tolerance(value: object) -> float | None:
    return None if value == IGNORE else _share(value)


Size = Annotated[Bound, _bound("bytes", _SIZES, "4 MB", at_most=True)]
Time = Annotated[Bound, _bound("ms", _TIMES, "300 ms", at_most=True)]
#: The time of a prompt or of a token (at most), or tokens a second (at least).
Speed = Annotated[Bound, BeforeValidator(_speed)]
Instructions = Annotated[Bound, _bound("instructions", _COUNTS, "90 M", at_most=True)]
Whole = Annotated[Bound, _bound("", _PLAIN, "0", at_most=True)]
Most = Annotated[Bound, _bound("", _PLAIN, "3.5", at_most=True)]
Fewest = Annotated[Bound, _bound("", _PLAIN, "8000", at_most=False)]
LeastShare = Annotated[Bound, BeforeValidator(lambda value: Bound(_share(value), "%", False))]
#: How much worse a figure may be than the baseline's; None: not compared.
Tolerance = Annotated[float | None, BeforeValidator(_tolerance)]
