"""The inputs of an ONNX model, read from its file, and tensors as ONNX stores them.

Both are protobuf messages of onnx.proto; the numbers here are those of its fields and types.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from devices.answers import contained

FLOAT, INT64, FLOAT16 = 1, 7, 10
#: Bytes of an element.
WIDTHS = {FLOAT: 4, INT64: 8, FLOAT16: 2}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Input:
    """An input of a model: its element type, and its shape with 0 for a size that is free."""

    name: str
    type: int
    shape: tuple[int, ...]


def read_inputs(path: Path) -> list[Input]:
    """The inputs of the model in a file. Raises DeviceError where it is no ONNX model."""
    with contained(path, "its list of inputs"):
        graph = _message(memoryview(path.read_bytes()), 7)
        inputs = [_input(one.content) for one in _fields(graph) if one.number == 11]
        if not inputs:
            raise ValueError("there is none")
        return inputs


def tensor(kind: int, shape: Sequence[int], content: bytes) -> bytes:
    """A TensorProto without a name. `content` has the elements as little-endian bytes."""
    dims = b"".join(b"\x08" + _varint(size) for size in shape)
    return dims + b"\x10" + _varint(kind) + b"\x4a" + _varint(len(content)) + content


def _input(value: memoryview) -> Input:
    """A ValueInfoProto: name, and of the tensor's type the element type and the shape."""
    kind = _message(_message(value, 2), 1)
    element = next(one.value for one in _fields(kind) if one.number == 1)
    sizes = [
        next((size.value for size in _fields(one.content) if size.number == 1), 0)
        for one in _fields(_message(kind, 2))
        if one.number == 1
    ]
    return Input(bytes(_message(value, 1)).decode(), element, tuple(sizes))


@dataclass(frozen=True)
class _Field:
    """A field of a message: its number, and its value or its content."""

    number: int
    value: int = 0
    content: memoryview = field(default_factory=lambda: memoryview(b""))


def _message(data: memoryview, wanted: int) -> memoryview:
    """The content of the first field of this number. Raises KeyError where there is none."""
    for one in _fields(data):
        if one.number == wanted:
            return one.content
    raise KeyError(wanted)


def _fields(data: memoryview) -> Iterator[_Field]:
    """The fields of a message, numbers of fixed size left out."""
    place = 0
    while place < len(data):
        key, place = _read_varint(data, place)
        kind = key & 7
        if kind == _VARINT:
            value, place = _read_varint(data, place)
            yield _Field(key >> 3, value)
        elif kind == _BYTES:
            size, place = _read_varint(data, place)
            if size > len(data) - place:
                raise ValueError("it is cut off")
            yield _Field(key >> 3, content=data[place : place + size])
            place += size
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind}")


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 10 bytes")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
