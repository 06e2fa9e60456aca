"""Read what an ONNX model and its data file hold, as plain data. Needs no runtime.

Whatever the files say is checked against their bytes before it is used, so damaged and hostile
files give an InputError.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from exporter.backends.onnx import DATA
from exporter.errors import InputError
from exporter.foreign import present, read_bytes

#: The largest graph that is read, in bytes, and the most entries of any kind that it may have. An
#: empty entry of two bytes takes 160 bytes in memory.
_LARGEST, _MOST = 6 << 20, 200_000
#: Element type → numpy's type, and the field for values that are not stored as bytes. Two values
#: of a 4-bit type are in one byte.
_TYPES: dict[int, tuple[str, str]] = {
    TensorProto.FLOAT: ("<f4", "float_data"),
    TensorProto.DOUBLE: ("<f8", "double_data"),
    TensorProto.FLOAT16: ("<f2", "int32_data"),
    TensorProto.BFLOAT16: ("<u2", "int32_data"),
    TensorProto.INT64: ("<i8", "int64_data"),
    TensorProto.INT32: ("<i4", "int32_data"),
    TensorProto.INT8: ("i1", "int32_data"),
    TensorProto.UINT8: ("u1", "int32_data"),
    TensorProto.BOOL: ("u1", "int32_data"),
    TensorProto.INT4: ("u1", "int32_data"),
    TensorProto.UINT4: ("u1", "int32_data"),
}
_HALF_BYTES = (TensorProto.INT4, TensorProto.UINT4)
_STORAGE = (
    "raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data",
    "string_data", "external_data", "data_location",
)  # fmt: skip
#: Attribute type → the field that holds the value.
_VALUES = {
    AttributeProto.FLOAT: "f", AttributeProto.INT: "i", AttributeProto.STRING: "s",
    AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints", AttributeProto.STRINGS: "strings",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The model, and the bytes of the data file."""

    path: Path
    model: onnx.ModelProto
    data: np.ndarray

    @property
    def data_name(self) -> str:
        """The name of the data file, which lies beside the model."""
        return f"{self.path.name}{DATA}"

    def _too_many(self) -> InputError:
        return _problem(self.path, f"has more than {_MOST} entries")

    def values(self, tensor: TensorProto) -> np.ndarray:
        """The values of a tensor, wherever they are stored, in its shape.

        4-bit values are given as the bytes that hold them, without a shape. Raises InputError.
        """
        if tensor.data_type not in _TYPES or tensor.HasField("segment"):
            raise _problem(tensor.name, f"has values of type {tensor.data_type}, or a part of them")
        kind, _ = _TYPES[tensor.data_type]
        if min(tensor.dims, default=0) < 0:
            raise _problem(tensor.name, f"has shape {list(tensor.dims)}")
        elements = math.prod(tensor.dims)
        packed = tensor.data_type in _HALF_BYTES
        size = (elements + 1) // 2 if packed else elements * np.dtype(kind).itemsize
        raw = self._bytes(tensor, kind)
        if len(raw) != size:
            shape = f"its shape {list(tensor.dims)} needs {size}"
            raise _problem(tensor.name, f"has {len(raw)} bytes, and {shape}")
        values = raw.view(kind) if size else np.zeros(0, kind)
        return values if packed else values.reshape(tuple(tensor.dims))

    def _bytes(self, tensor: TensorProto, kind: str) -> np.ndarray:
        """The bytes of a tensor. They must be stored in one way."""
        stored = [name for name in _STORAGE[:-2] if len(getattr(tensor, name))]
        external = tensor.data_location == TensorProto.EXTERNAL
        if len(stored) + external > 1 or (
            stored and stored[0] not in ("raw_data", _TYPES[tensor.data_type][1])
        ):
            raise _problem(tensor.name, f"holds its values as {', '.join(stored)}")
        if external:
            return self._external(tensor)
        if tensor.external_data:
            raise _problem(tensor.name, "names a data file, and holds its values itself")
        if not stored or stored == ["raw_data"]:
            return np.frombuffer(tensor.raw_data, np.uint8)
        values = np.array(getattr(tensor, stored[0]))
        unsigned = f"<u{np.dtype(kind).itemsize}"
        cast = values.astype(unsigned) if stored == ["int32_data"] else values.astype(kind)
        return cast.view(np.uint8)

    def _external(self, tensor: TensorProto) -> np.ndarray:
        place = unique(((entry.key, entry.value) for entry in tensor.external_data), tensor.name)
        if place.get("location") != self.data_name:
            stored = f"is stored in {place.get('location')!r}, not in {self.data_name}"
            raise InputError(tensor.name, stored)
        numbers = [place.get(key, "") for key in ("offset", "length")]
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in numbers):
            raise _problem(tensor.name, "has no offset and length in its data file")
        start, length = map(int, numbers)
        if start + length > len(self.data):
            raise InputError(tensor.name, f"ends beyond the end of {self.data_name}")
        return self.data[start : start + length]

    def plain(self, message: Message) -> Any:
        """A message as dictionaries, lists and values.

        Initializers and attributes are dictionaries by their names, which must be unique. Tensors
        have their values instead of the place of these.
        """
        return self._plain(message, count())

    def _plain(self, message: Message, number: Iterator[int]) -> Any:
        """As `plain`; `number` counts the messages."""
        if next(number) > _MOST:
            raise self._too_many()
        found = dict[str, Any]()
        for field, value in message.ListFields():
            if isinstance(message, TensorProto) and field.name in _STORAGE:
                continue
            if field.message_type is None:
                if field.is_repeated and len(value) > _MOST:
                    raise self._too_many()
                found[field.name] = list(value) if field.is_repeated else value
            elif not field.is_repeated:
                found[field.name] = self._plain(value, number)
            elif name := _BY_NAME.get((type(message), field.name)):
                entries = ((name(one), self._plain(one, number)) for one in value)
                found[field.name] = unique(entries, field.name)
            else:
                found[field.name] = [self._plain(one, number) for one in value]
        for unknown in UnknownFieldSet(message):
            found[f"unknown field {unknown.field_number}"] = True
        if isinstance(message, TensorProto):
            found["values"] = self.values(message)
        if isinstance(message, AttributeProto):
            return _attribute(found, message)
        return found


#: Lists whose order has no effect, and how their entries are named.
_BY_NAME: Mapping[tuple[type, str], Callable[[Any], str]] = {
    (NodeProto, "attribute"): lambda entry: str(entry.name),
    (GraphProto, "initializer"): lambda entry: str(entry.name),
    (onnx.ModelProto, "metadata_props"): lambda entry: str(entry.key),
    (onnx.ModelProto, "opset_import"): lambda entry: str(entry.domain or "ai.onnx"),
}


def _attribute(found: Mapping[str, Any], message: AttributeProto) -> Any:
    """The value of an attribute, if that is all it has."""
    value = _VALUES.get(message.type)
    return found[value] if value and set(found) == {"name", "type", value} else found


def unique(entries: Iterable[tuple[str, Any]], subject: str) -> dict[str, Any]:
    """A dictionary of entries whose names differ. Raises InputError."""
    found = dict[str, Any]()
    for name, value in entries:
        if name in found:
            raise _problem(subject, f"has two entries of the name {name!r}")
        found[name] = value
    return found


def open_contents(path: Path) -> Contents:
    """Read a model, and map its data file. Raises InputError."""
    data = path.with_name(f"{path.name}{DATA}")
    for one, limit in ((path, _LARGEST), (data, None)):
        if not present(one, limit):
            raise InputError(one, "no such file", "Give the whole folder that it belongs to")
    try:
        model = onnx.ModelProto.FromString(read_bytes(path, _LARGEST))
    except DecodeError as error:
        raise _problem(path, f"is no ONNX model ({error})") from error
    mapped = np.memmap(data, np.uint8, "r") if data.stat().st_size else np.zeros(0, np.uint8)
    contents = Contents(path, model, mapped)
    if len(model.graph.node) + len(model.graph.initializer) > _MOST:
        raise contents._too_many()
    return contents


def _problem(subject: object, text: str) -> InputError:
    return InputError(subject, text, "Get the file again, or lower the model again")
