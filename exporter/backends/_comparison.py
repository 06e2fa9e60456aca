"""Where two structures of plain data differ: the content of a file, and what it should be.

A format reads a file as dictionaries, lists, numpy arrays, texts and numbers. Whatever may change
without an effect (the order of bytes in a file, a recorded version) is left out by its reader.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

#: The keys by which an entry of a list may be known.
_NAMES = ("name", "key")
#: The longest part of a text or of bytes that a message repeats.
_LONGEST = 60


def differences(found: Any, expected: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """How `found` differs from `expected`, as (place, what differs).

    Entries of lists that have names are matched by name, others by position: of lists of unequal
    length, only the first entries that differ are given. Floats are compared as bits, and a value
    never equals one of another type.
    """
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        yield from _of_entries(found, expected, place, ".")
    elif isinstance(found, np.ndarray) and isinstance(expected, np.ndarray):
        if problem := array_difference(found, expected):
            yield place, problem
    elif _is_list(found) and _is_list(expected):
        yield from _of_lists(found, expected, place)
    elif type(found) is not type(expected) or _bits(found) != _bits(expected):
        yield place, f"is {shown(found)}, not {shown(expected)}"


def array_difference(found: np.ndarray, expected: np.ndarray) -> str | None:
    """How many values differ and which is the first, or how type or shape differ; None if equal.

    Values are compared as bits: NaN equals itself, and 0.0 differs from -0.0.
    """
    if found.dtype != expected.dtype:
        return f"has values of type {found.dtype}, not {expected.dtype}"
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)}, not {list(expected.shape)}"
    kind = np.dtype(f"u{expected.dtype.itemsize}")
    flat = np.ascontiguousarray(found).reshape(-1), np.ascontiguousarray(expected).reshape(-1)
    different = flat[0].view(kind) != flat[1].view(kind)
    count = int(np.count_nonzero(different))
    if not count:
        return None
    at = int(different.argmax())
    index = [int(i) for i in np.unravel_index(at, expected.shape)]
    values = ", not ".join(shown(values[at].item()) for values in flat)
    return f"{count} of {different.size} values differ, first at {index}: {values}"


def shown(value: Any) -> str:
    """A value in a message: short, and on one line."""
    if value is None:
        return "absent"
    if isinstance(value, float):
        short = np.float32(value)  # a float32 as a double has 17 digits
        return str(short) if float(short) == value else repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(map(str, list(value)[:3]))}…}}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if _is_list(value):
        return f"a list of {len(value)}"
    text = repr(value[: _LONGEST + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _of_lists(
    found: Sequence[Any], expected: Sequence[Any], place: str
) -> Iterator[tuple[str, str]]:
    one, other = _by_name(found), _by_name(expected)
    if one is not None and other is not None:
        yield from _of_entries(one, other, place, " ")
        common = zip(filter(other.get, one), filter(one.get, other), strict=True)
        if first := next((pair for pair in common if pair[0] != pair[1]), None):
            yield place, f"is in another order: {first[0]} stands where {first[1]} should"
        return
    same_length = len(found) == len(expected)
    if not same_length:
        yield place, f"has {len(found)} entries, not {len(expected)}"
    for index, pair in enumerate(zip(found, expected, strict=False)):
        different = list(differences(*pair, f"{place}[{index}]{_label(pair[1])}"))
        yield from different
        if different and not same_length:
            return  # an entry was added or left out here: all that follow have moved


def _of_entries(
    found: Mapping[str, Any], expected: Mapping[str, Any], place: str, dot: str
) -> Iterator[tuple[str, str]]:
    for name, value in expected.items():
        inside = f"{place}{dot}{name}" if place else name
        if name in found:
            yield from differences(found[name], value, inside)
        elif value is not None:
            yield inside, "is missing"
    for name, value in found.items():
        if name not in expected and value is not None:
            yield f"{place}{dot}{name}" if place else name, "is not in the derived model"


def _by_name(entries: Sequence[Any]) -> dict[str, Any] | None:
    """The entries by their names, or None if one has no name or two have the same."""
    named = {name: entry for entry in entries if (name := _name(entry))}
    return named if len(named) == len(entries) else None


def _name(entry: Any) -> str | None:
    """The `name` or `key` of an entry of a list, or None."""
    if not isinstance(entry, Mapping):
        return None
    names = (entry[key] for key in _NAMES if isinstance(entry.get(key), str))
    return next(filter(None, names), None)


def _label(entry: Any) -> str:
    name = _name(entry)
    return f" ({name})" if name else ""


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _bits(value: Any) -> Any:
    return struct.pack("d", value) if isinstance(value, float) else value
