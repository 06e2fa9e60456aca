"""Read a GGUF file from anywhere, within limits: metadata, and where each tensor lies.

The gguf package reads such files too, but trusts their counts and offsets. Demanded is what
llama.cpp demands: names that are unique, and tensors that follow each other without gaps. See
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from exporter.errors import InputError, short
from exporter.foreign import FILE_BYTES, present

#: Limits: keys, tensors, texts in all arrays together, bytes of a name, of a text, of all metadata.
_KEYS, _TENSORS, _TEXTS = 1 << 12, 1 << 16, 1 << 21
_NAME_BYTES, _TEXT_BYTES, _HEADER_BYTES = 1 << 10, 1 << 22, 1 << 27
_DIMENSIONS = 4
_ALIGNMENT_KEY, _ALIGNMENT, _LARGEST_ALIGNMENT = "general.alignment", 32, 1 << 16
_VERSIONS = (2, 3)
_REMEDY = "Get the file again"
#: The types of numbers, as numpy names them.
_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Value:
    """A value of the metadata with the name of its type, ``STRING`` or ``[INT32]`` for an array.

    A text is a str with surrogates for bytes that are not UTF-8. An array is a list of bytes, or a
    numpy array of numbers.
    """

    type: str
    value: Any


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: its type, its shape with rows first, and its place in the file in bytes."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Contents:
    """The content of a file. `data` is the whole file, mapped into memory."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]
    data: np.ndarray

    @property
    def architecture(self) -> str:
        """The name of the family, '' if it is missing."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A text of the metadata, '' if it is missing or of another type."""
        value = self.metadata.get(key)
        return value.value if value is not None and value.type == "STRING" else ""

    def bytes_of(self, name: str) -> np.ndarray:
        """The data of a tensor, uint8."""
        tensor = self.tensors[name]
        return self.data[tensor.offset : tensor.offset + tensor.bytes]


def open_contents(path: Path) -> Contents:
    """Read the header of a file and map its data. Raises InputError."""
    if not present(path, FILE_BYTES):
        raise InputError(path, "no such file", "Give the whole folder that it belongs to")
    if path.stat().st_size < 24:
        raise InputError(path, "is not a GGUF file", _REMEDY)
    cursor = _Cursor(path, np.memmap(path, np.uint8, "r"))
    if cursor.take(4, "the magic bytes").tobytes() != b"GGUF":
        raise InputError(path, "is not a GGUF file", _REMEDY)
    version = cursor.number("<u4", "the version")
    if version not in _VERSIONS:
        raise InputError(path, f"has version {version} of the format, not 2 or 3", _REMEDY)
    tensors = cursor.count("<u8", _TENSORS, "tensors")
    keys = cursor.count("<u8", _KEYS, "keys")
    metadata = cursor.entries(keys, "key", lambda name: _read_value(cursor, name))
    places = cursor.entries(tensors, "tensor", lambda name: _read_place(cursor, name))
    alignment = _alignment(path, metadata)
    stored, start = {}, -(-cursor.at // alignment) * alignment
    end = 0
    for name, (kind, shape, offset) in places.items():
        if offset != end:
            raise InputError(
                f"{path}: {name}", f"lies at offset {offset}, not {end} as llama.cpp wants", _REMEDY
            )
        size = _size(f"{path}: {name}", kind, shape)
        stored[name] = StoredTensor(kind, shape, start + offset, size)
        if start + offset + size > len(cursor.data):
            raise InputError(f"{path}: {name}", "lies beyond the end of the file", _REMEDY)
        end += -(-size // alignment) * alignment
    return Contents(path, version, metadata, stored, cursor.data)


@dataclass
class _Cursor:
    """Reads a file from its beginning; `at` is the next byte, `texts` those left of the limit."""

    path: Path
    data: np.ndarray
    at: int = 0
    texts: int = _TEXTS

    def take(self, size: int, what: str) -> np.ndarray:
        """The next bytes. Raises InputError if there are fewer, or too many were read."""
        end = self.at + size
        if end > min(len(self.data), _HEADER_BYTES):
            limit = end <= len(self.data)
            reason = f"are beyond the limit of {_HEADER_BYTES:,}" if limit else "are missing"
            raise InputError(self.path, f"bytes of {what} {reason}", _REMEDY)
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, kind: str, what: str) -> int:
        """The next number."""
        found: int = self.take(np.dtype(kind).itemsize, what).view(kind)[0].item()
        return found

    def count(self, kind: str, most: int, what: str) -> int:
        """The next number, which counts something. Raises InputError for more than `most`."""
        found = self.number(kind, f"the number of {what}")
        if found > most:
            raise InputError(self.path, f"has {found:,} {what}; the limit is {most:,}", _REMEDY)
        return found

    def text(self, most: int, what: str) -> bytes:
        """The next text: its length, then its bytes."""
        return self.take(self.count("<u8", most, f"bytes in {what}"), what).tobytes()

    def entries(self, count: int, what: str, read: Callable[[str], Any]) -> dict[str, Any]:
        """The next entries with a name each. Raises InputError for a name that is there twice."""
        found = dict[str, Any]()
        for number in range(count):
            name = _decoded(self.text(_NAME_BYTES, f"the name of {what} {number}"))
            if name in found:
                raise InputError(self.path, f"has the {what} {short(name)} twice", _REMEDY)
            found[name] = read(name)
        return found


def _decoded(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


def _read_value(cursor: _Cursor, key: str) -> Value:
    kind = _value_type(cursor, key)
    if kind != GGUFValueType.ARRAY:
        return Value(kind.name, _read_one(cursor, kind, key))
    entries = _value_type(cursor, key)
    name = f"[{entries.name}]"
    if entries in _NUMBERS or entries == GGUFValueType.BOOL:
        dtype = np.dtype(_NUMBERS.get(entries, "<u1"))
        count = cursor.count("<u8", _HEADER_BYTES, f"entries in {key}")
        return Value(name, cursor.take(count * dtype.itemsize, key).view(dtype))
    if entries == GGUFValueType.STRING:
        count = cursor.count("<u8", cursor.texts, f"texts in {key} and before it")
        cursor.texts -= count
        return Value(name, _read_texts(cursor, count, key))
    raise InputError(f"{cursor.path}: {key}", "is an array of arrays", _REMEDY)


def _read_texts(cursor: _Cursor, count: int, key: str) -> list[bytes]:
    """The next texts. A file has hundreds of thousands, so they are not read by numpy."""
    found, at = list[bytes](), cursor.at
    header = cursor.data.data[: min(len(cursor.data), _HEADER_BYTES)]
    for _ in range(count):
        if at + 8 > len(header):
            break
        (size,) = struct.unpack_from("<Q", header, at)
        at += 8 + size
        if at > len(header):
            break
        found.append(bytes(header[at - size : at]))
    cursor.take(at - cursor.at, key)
    if len(found) < count:
        raise InputError(cursor.path, f"bytes of {key} are missing", _REMEDY)
    return found


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    found = cursor.number("<u4", key)
    try:
        return GGUFValueType(found)
    except ValueError as error:
        raise InputError(f"{cursor.path}: {key}", f"has the unknown type {found}") from error


def _read_one(cursor: _Cursor, kind: GGUFValueType, key: str) -> Any:
    if kind == GGUFValueType.STRING:
        return _decoded(cursor.text(_TEXT_BYTES, key))
    if kind == GGUFValueType.BOOL:
        return cursor.number("<u1", key)
    return cursor.number(_NUMBERS[kind], key)


def _read_place(cursor: _Cursor, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    """The type of a tensor, its shape with rows first, and its offset in the data."""
    count = cursor.count("<u4", _DIMENSIONS, f"dimensions of {name}")
    shape = [cursor.count("<u8", FILE_BYTES, f"numbers in a row of {name}") for _ in range(count)]
    kind = cursor.number("<u4", name)
    offset = cursor.number("<u8", name)
    try:
        return GGMLQuantizationType(kind), tuple(reversed(shape)), offset
    except ValueError as error:
        raise InputError(f"{cursor.path}: {name}", f"has the unknown type {kind}") from error


def _size(subject: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor. Raises InputError for rows that are no whole blocks."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % values:
        raise InputError(subject, f"has rows of {shape[-1]}, which are no whole blocks of {values}")
    return math.prod(shape) // values * size


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    given = metadata.get(_ALIGNMENT_KEY)
    if given is None:
        return _ALIGNMENT
    value = given.value
    if given.type != "UINT32" or not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
        problem = f"is {short(value)}, not a power of two up to {_LARGEST_ALIGNMENT}"
        raise InputError(f"{path}: {_ALIGNMENT_KEY}", problem, _REMEDY)
    return int(value)
