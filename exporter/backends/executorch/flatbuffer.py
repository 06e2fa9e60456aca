"""Read flatbuffers by their schema, strictly: the program of a .pte and the graphs inside it.

ExecuTorch's runtime reads offsets without checking them. Here each one must lie inside the buffer,
and a text must end with its terminator, because the runtime reads up to it. So what is read here is
what the runtime reads. The schemas are files of the executorch wheel.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporter.errors import InputError

#: Scalar types of a schema → their format in `struct`, which numpy shares.
_SCALARS = {
    "bool": "?", "byte": "b", "ubyte": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I",
    "long": "q", "ulong": "Q", "float": "f", "double": "d",
    "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I",
    "int64": "q", "uint64": "Q",
}  # fmt: skip
_COMMENT = re.compile(r"//[^\n]*")
_BLOCK = re.compile(r"\b(table|enum|union)\s+(\w+)\s*(?::\s*(\w+)\s*)?(?:\([^)]*\)\s*)?\{([^}]*)\}")
_FIELD = re.compile(r"(\w+)\s*:\s*(\[?)\s*(\w+)\s*\]?\s*(?:=\s*([\w.+-]+)\s*)?(?:\(([^)]*)\)\s*)?;")


#: The most entries that a buffer may have: tables, vectors and texts. A model of 100 layers has
#: some 100,000.
_MOST = 200_000


@dataclass(frozen=True)
class _Field:
    """A field of a table: its type, or that of its elements if it is a vector."""

    name: str
    kind: str
    vector: bool
    slot: int
    default: str
    deprecated: bool


@dataclass(frozen=True)
class Schema:
    """The tables, enumerations (type and names of values) and unions (types by number)."""

    tables: Mapping[str, tuple[_Field, ...]]
    enums: Mapping[str, tuple[str, Mapping[int, str]]]
    unions: Mapping[str, Mapping[int, tuple[str, str]]]


def parse_schema(text: str) -> Schema:
    """The schema in the text of one or more .fbs files."""
    blocks = _BLOCK.findall(_COMMENT.sub("", text))
    enums = {
        name: (kind, {number: label for label, number in _numbered(body)})
        for word, name, kind, body in blocks
        if word == "enum"
    }
    unions = {name: _union(body) for word, name, _, body in blocks if word == "union"}
    tables = dict[str, tuple[_Field, ...]]()
    for word, name, _, body in blocks:
        if word != "table":
            continue
        fields, slot = list[_Field](), 0
        for label, bracket, kind, default, attributes in _FIELD.findall(body):
            slot += kind in unions  # the number of its type is a field before it
            fields.append(
                _Field(label, kind, bool(bracket), slot, default, "deprecated" in attributes)
            )
            slot += 1
        tables[name] = tuple(fields)
    return Schema(tables, enums, unions)


def _numbered(body: str) -> list[tuple[str, int]]:
    """The names of an enumeration with their numbers."""
    found, number = list[tuple[str, int]](), -1
    for entry in filter(None, (part.strip() for part in body.split(","))):
        label, _, given = (part.strip() for part in entry.partition("="))
        number = int(given) if given else number + 1
        found.append((label, number))
    return found


def _union(body: str) -> dict[int, tuple[str, str]]:
    """The number of each type of a union → its name and its table."""
    found = dict[int, tuple[str, str]]()
    for number, entry in enumerate(filter(None, (part.strip() for part in body.split(","))), 1):
        label, _, table = (part.strip() for part in entry.partition(":"))
        found[number] = label, table or label
    return found


def read(
    data: memoryview, schema: Schema, root: str, identifiers: tuple[bytes, ...], subject: object
) -> dict[str, Any]:
    """The root table of a buffer as plain data.

    Tables are dictionaries with an entry for each field of the schema (None if it is absent and has
    no default), a union is a dictionary of one entry, vectors of scalars are arrays, and values of
    an enumeration are their names. Raises InputError for a buffer that is not valid.
    """
    reader = _Reader(data, schema, subject)
    if len(data) < 8 or bytes(data[4:8]) not in identifiers:
        known = " or ".join(name.decode() for name in identifiers)
        raise reader.problem(f"does not begin as a flatbuffer with the identifier {known}")
    return reader.table(reader.offset(0), root)


@dataclass
class _Reader:
    data: memoryview
    schema: Schema
    subject: object
    #: How many tables and texts may still be read. Each takes four bytes, if none is given twice.
    budget: int = field(init=False)

    def __post_init__(self) -> None:
        self.budget = min(len(self.data) // 4, _MOST)

    def problem(self, text: str) -> InputError:
        return InputError(self.subject, text, "Get the file again, or lower the model again")

    def scalar(self, kind: str, at: int) -> Any:
        layout = f"<{_SCALARS[kind]}"
        if not 0 <= at <= len(self.data) - struct.calcsize(layout):
            raise self.problem(f"refers to byte {at} of a flatbuffer of {len(self.data)} bytes")
        return struct.unpack_from(layout, self.data, at)[0]

    def offset(self, at: int) -> int:
        """The place that the offset at `at` refers to."""
        return at + int(self.scalar("uint", at))

    def spend(self, entries: int = 1) -> None:
        self.budget -= entries
        if self.budget < 0:
            raise self.problem("has more entries than its bytes can hold")

    def table(self, at: int, kind: str) -> dict[str, Any]:
        self.spend()
        fields = self.schema.tables[kind]
        vtable = at - int(self.scalar("int", at))
        slots = max(0, int(self.scalar("ushort", vtable)) - 4) // 2
        known = max((one.slot + 1 for one in fields), default=0)
        places = [int(self.scalar("ushort", vtable + 4 + 2 * i)) for i in range(min(slots, known))]
        places += [0] * (known - len(places))
        found = {one.name: self._value(one, at, places) for one in fields if not one.deprecated}
        return found if slots <= known else {**found, "fields outside the schema": slots - known}

    def _value(self, one: _Field, at: int, places: list[int]) -> Any:
        """The value of a field of the table at `at`. A place is 0 for a field that is absent."""
        place = places[one.slot]
        if one.kind in self.schema.unions:
            number = places[one.slot - 1]
            return self._member(one, at + number if number else None, at + place if place else None)
        scalar = one.kind in _SCALARS or one.kind in self.schema.enums
        if scalar and not one.vector:
            return self._scalar(one, at + place if place else None)
        if not place:
            return None
        start = self.offset(at + place)
        if not one.vector:
            return self.text(start) if one.kind == "string" else self.table(start, one.kind)
        count = int(self.scalar("uint", start))
        if scalar:
            kind = self.schema.enums[one.kind][0] if one.kind in self.schema.enums else one.kind
            return self._array(kind, start + 4, count)
        read = self.text if one.kind == "string" else lambda at: self.table(at, one.kind)
        return [read(self.offset(start + 4 + 4 * index)) for index in range(count)]

    def _scalar(self, one: _Field, at: int | None) -> Any:
        if one.kind in self.schema.enums:
            kind, names = self.schema.enums[one.kind]
            if at is None and one.default:
                return one.default
            number = 0 if at is None else self.scalar(kind, at)
            return names.get(number, number)
        if at is not None:
            return self.scalar(one.kind, at)
        if _SCALARS[one.kind] in "fd":
            return float(one.default or 0)
        return bool(one.default == "true") if one.kind == "bool" else int(one.default or 0)

    def _member(self, one: _Field, number: int | None, value: int | None) -> Any:
        kind = 0 if number is None else int(self.scalar("ubyte", number))
        if kind == 0 or value is None:
            return None
        if kind not in self.schema.unions[one.kind]:
            raise self.problem(f"has a {one.kind} of type {kind}, which the schema does not have")
        label, table = self.schema.unions[one.kind][kind]
        return {label: self.table(self.offset(value), table)}

    def _array(self, kind: str, at: int, count: int) -> np.ndarray:
        layout = np.dtype(f"<{_SCALARS[kind]}")
        if layout.itemsize > 1:  # not bytes of data, of which no copy is made
            self.spend(1 + count // 16)
        if at + count * layout.itemsize > len(self.data):
            raise self.problem(f"has a vector of {count} values that ends beyond its bytes")
        return np.frombuffer(self.data, layout, count, at)

    def text(self, at: int) -> str:
        size = int(self.scalar("uint", at))
        self.spend(1 + size // 4)
        end = at + 4 + size
        if end >= len(self.data):
            raise self.problem("has a text that ends beyond its bytes")
        content = bytes(self.data[at + 4 : end + 1])
        if content.find(b"\0") != size:
            raise self.problem(f"has a text {content[:20]!r} that does not end where it says")
        try:
            return content[:-1].decode()
        except UnicodeDecodeError as error:
            raise self.problem(f"has a text {content[:20]!r} that is not UTF-8") from error
