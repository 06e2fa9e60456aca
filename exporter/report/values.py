"""Values of measurements, which may come from anyone: read with checks, shown with units."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

_SIGNIFICANT = 4
#: No figure is larger, but a number in JSON may be.
_LARGEST = 1e18


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A number that can be drawn, None for anything else."""
    found = values.get(key)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        return None
    return float(found) if abs(found) <= _LARGEST else None


def whole(values: Mapping[str, Any], key: str) -> int | None:
    """A whole number of at least 0, None for anything else."""
    found = values.get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def text(values: Mapping[str, Any], key: str) -> str:
    """A text, '' for anything else."""
    found = values.get(key)
    return found if isinstance(found, str) else ""


def mappings(values: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """The mappings in a list; nothing for anything else."""
    found = values.get(key)
    if isinstance(found, list):
        yield from (item for item in found if isinstance(item, Mapping))


def mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping, an empty one for anything else."""
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def figure(value: float | None, unit: str = "") -> str:
    """A number with 4 significant digits and its unit, a dash for None."""
    if value is None:
        return "–"
    if value and abs(value) < 1e-3:
        shown = f"{value:.{_SIGNIFICANT - 1}g}"
    else:
        digits = _SIGNIFICANT - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        shown = f"{value:,.{max(0, digits)}f}"
    return f"{shown} {unit}" if unit else shown


def share(value: float | None) -> str:
    """A share in percent, a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def megabytes(size: float | None) -> str:
    """Bytes in MB (10^6), a dash for None."""
    return "–" if size is None else f"{size / 1e6:,.2f} MB"


def count(value: float | None) -> str:
    """A whole number with commas, a dash for None."""
    return "–" if value is None else f"{value:,.0f}"
