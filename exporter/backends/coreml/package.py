"""Read the files of a .mlpackage, and write its manifest with the same bytes each time.

A package is a folder. ``Manifest.json`` names the model, which is a protobuf. The model names
weights in ``weight.bin`` by offset. At that offset a record of 64 bytes holds the offset and size
of the weight's data (source: ``MILBlob/Blob/StorageFormat.hpp`` in coremltools).
"""

import json
import math
import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.backends.coreml import MANIFEST, MODEL, WEIGHTS
from exporter.backends.coreml.toolkit import MIL_pb2, Model_pb2
from exporter.errors import InputError
from exporter.files import read_json

_AUTHOR, _SENTINEL = "com.apple.CoreML", 0xDEADBEEF
_RECORD, _ALIGNMENT = struct.Struct("<IIQQQ"), 64

_LARGEST_MODEL = 2**31 - 1
#: Bytes of a weight file that apps on iOS are reported to load (Anemll/Anemll 28). The Neural
#: Engine of a Mac takes 2 GB (apple/coremltools 2593).
LARGEST_WEIGHTS = 1_000_000_000

#: Declared type → its name in ML Programs, its NumPy dtype (if any), and the bits of a value.
_Kind = MIL_pb2.DataType
TYPES: dict[int, tuple[str, str, int]] = {
    _Kind.Value("BOOL"): ("bool", "?", 8),
    _Kind.Value("FLOAT16"): ("fp16", "<f2", 16),
    _Kind.Value("FLOAT32"): ("fp32", "<f4", 32),
    _Kind.Value("INT8"): ("int8", "i1", 8),
    _Kind.Value("UINT8"): ("uint8", "u1", 8),
    _Kind.Value("INT16"): ("int16", "<i2", 16),
    _Kind.Value("UINT16"): ("uint16", "<u2", 16),
    _Kind.Value("INT32"): ("int32", "<i4", 32),
    _Kind.Value("INT4"): ("int4", "", 4),
    _Kind.Value("UINT4"): ("uint4", "", 4),
    _Kind.Value("UINT3"): ("uint3", "", 3),
    _Kind.Value("UINT6"): ("uint6", "", 6),
    _Kind.Value("UINT2"): ("uint2", "", 2),
    _Kind.Value("UINT1"): ("uint1", "", 1),
    _Kind.Value("STRING"): ("string", "", 0),
}
FLOATS = ("fp16", "fp32")


@dataclass(frozen=True)
class Value:
    """A tensor and its declared type, such as fp16.

    Floats are stored as float32, rounded to that type, and integers in a torch dtype that holds
    all of them.
    """

    data: Tensor
    kind: str


def rounded(data: Tensor, kind: str) -> Value:
    """`data` converted to type `kind`: fp16 overflows to infinity, integers wrap around."""
    if kind == "fp16":
        return Value(data.half().float(), kind)
    if kind == "fp32":
        return Value(data.float(), kind)
    if kind == "bool":
        return Value(data.bool(), kind)
    bits = int(kind.lstrip("uint"))
    low = data.to(torch.int64) & ((1 << bits) - 1)
    if not kind.startswith("u"):
        low = low - ((low >> (bits - 1)) << bits)
    return Value(low.to(_held_in(kind)), kind)


def _held_in(kind: str) -> torch.dtype:
    return {"int8": torch.int8, "uint8": torch.uint8, "int4": torch.int8, "bool": torch.bool}.get(
        kind, torch.int32 if kind in ("int32", "int16", "uint16") else torch.uint8
    )


@dataclass(frozen=True)
class Package:
    """An open package: its path, its protobuf, and the folder of its weight files."""

    path: Path
    spec: Any
    weights: Path

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the functions in alphabetical order."""
        return tuple(sorted(self.spec.mlProgram.functions))

    def block(self, function: str) -> Any:
        """The operations of a function."""
        declared = self.spec.mlProgram.functions[function]
        return declared.block_specializations[declared.opset]

    @property
    def has_float32(self) -> bool:
        """Whether an operation of any function has a float32 result."""
        return any(
            output.type.tensorType.dataType == _Kind.Value("FLOAT32")
            for function in self.functions
            for operation in self.block(function).operations
            for output in operation.outputs
        )

    def value(self, value: Any) -> Any:
        """A constant: a `Value`, a string, or a list of these. Raises InputError if damaged."""
        if place_of(value) is not None:
            return _decode(self.blob(value).content.tobytes(), value.type.tensorType)
        kind = value.type.WhichOneof("type")
        if kind == "tupleType":
            return [self.value(item) for item in value.immediateValue.tuple.values]
        if kind == "listType":
            return [self.value(item) for item in value.immediateValue.list.values]
        try:
            return _immediate(value)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise InputError("a constant", f"does not fill its type ({error})") from error

    def blob(self, value: Any) -> "Blob":
        """The record and the data of a constant in a weight file, which is mapped, not read.

        Raises InputError for an invalid record.
        """
        name, offset = place_of(value) or ("", 0)
        declared = value.type.tensorType
        path = (self.weights / name.removeprefix("@model_path/")).resolve()
        if not path.is_relative_to(self.path.resolve()):
            raise InputError(self.path, f"names a weight file outside of itself ({name})")
        if not path.is_file():
            raise InputError(path, "no such file", "Get the whole package again")
        empty = path.stat().st_size == 0  # an empty file cannot be mapped
        content = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        subject = f"{path.name} at {offset}"
        if offset + _RECORD.size > content.size:
            raise InputError(subject, f"lies beyond its {content.size} bytes")
        record = _RECORD.unpack(content[offset : offset + _RECORD.size].tobytes())
        sentinel, kind, size, start, padding = record
        if sentinel != _SENTINEL:
            raise InputError(subject, "is not the record of a weight")
        shape = shape_of(declared)
        bits = type_of(declared)[2]
        if size != -(-math.prod(shape) * bits // 8):
            raise InputError(subject, f"holds {size} bytes, which do not fill the shape {shape}")
        if start + size > content.size:
            raise InputError(subject, f"ends beyond the {content.size} bytes of the file")
        return Blob(path, kind, padding, content[start : start + size])


@dataclass(frozen=True)
class Blob:
    """A constant in a weight file: its type and unused bits by its record, and its bytes."""

    path: Path
    kind: int
    padding: int
    content: np.ndarray


def weight_file_rest(path: Path, used: Mapping[int, int]) -> tuple[int, int, int]:
    """What is in a weight file besides its records in use: records, bytes, and its version.

    `used` maps the offset of a record to the bytes of its data. The file begins with a header;
    header, records and data each fill a multiple of 64 bytes.
    """
    with path.open("rb") as file:
        records, version = struct.unpack("<II", file.read(8))
    aligned = sum(_ALIGNMENT + -(-size // _ALIGNMENT) * _ALIGNMENT for size in used.values())
    end = -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT
    return records - len(used), end - _ALIGNMENT - aligned, version


def open_package(path: Path) -> Package:
    """Open a .mlpackage folder of an ML Program. Raises InputError."""
    manifest = read_json(path / MANIFEST)
    items, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
    entry = items.get(root) if isinstance(items, dict) else None
    name = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise InputError(path / MANIFEST, "does not name the model of the package")
    file = (path / "Data" / name).resolve()
    if not file.is_relative_to(path.resolve()) or not file.is_file():
        raise InputError(path / MANIFEST, f"names the model {name!r}, which is not in the package")
    if file.stat().st_size > _LARGEST_MODEL:
        raise InputError(file, f"has {file.stat().st_size} bytes, more than a protobuf can")
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(file.read_bytes())
    except Exception as error:  # DecodeError; its module depends on protobuf's build
        raise InputError(file, f"is not a Core ML model ({error})", "Get it again") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise InputError(file, f"is a {spec.WhichOneof('Type')}, not an ML Program")
    return Package(path, spec, file.parent)


def weights_warning(folder: Path) -> str:
    """A warning of a weight file that iOS may refuse; empty for any other package."""
    path = folder / WEIGHTS
    size = path.stat().st_size if path.is_file() else 0
    if size <= LARGEST_WEIGHTS:
        return ""
    return (
        f"{path.name} has {size / 1e9:.1f} GB; apps on iOS are reported to fail with more than "
        f"{LARGEST_WEIGHTS / 1e9:.1f} GB: use a scheme of fewer bits, or a smaller model"
    )


def write_manifest(folder: Path) -> None:
    """Write ``Manifest.json`` as Core ML does, but with identifiers derived from the names.

    coremltools writes it again whenever it opens a package, with these very bytes.
    """
    entries = {
        _identifier(path): {
            "author": _AUTHOR,
            "description": description,
            "name": path.rpartition("/")[2],
            "path": path.removeprefix("Data/"),
        }
        for path, description in (
            (MODEL, "CoreML Model Specification"),
            (WEIGHTS.rpartition("/")[0], "CoreML Model Weights"),
        )
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": _identifier(MODEL),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def _identifier(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()


def place_of(value: Any) -> tuple[str, int] | None:
    """File and offset of a constant in a weight file, or None if it is in the protobuf."""
    if value.WhichOneof("value") != "blobFileValue":
        return None
    return value.blobFileValue.fileName, value.blobFileValue.offset


def type_of(declared: Any) -> tuple[str, str, int]:
    """The entry of `TYPES` for a constant. Raises InputError for a type that is not in it."""
    if declared.dataType not in TYPES:
        raise InputError("a constant", f"has the unknown type {declared.dataType}")
    return TYPES[declared.dataType]


def shape_of(declared: Any) -> list[int]:
    """The shape of a constant."""
    return [int(dimension.constant.size) for dimension in declared.dimensions]


def open_shape_of(declared: Any) -> list[int | None]:
    """The shape of a declared tensor, with None for a flexible dimension."""
    return [
        int(dimension.constant.size) if dimension.HasField("constant") else None
        for dimension in declared.dimensions
    ]


def _immediate(value: Any) -> Any:
    """A constant stored in the protobuf."""
    declared, tensor = value.type.tensorType, value.immediateValue.tensor
    field_name = tensor.WhichOneof("value")
    content = getattr(tensor, field_name).values
    kind = type_of(declared)[0]
    if kind == "string":
        return content[0]
    if field_name == "bytes":
        return _decode(content, declared)
    dtype = torch.float64 if kind in FLOATS else torch.int64
    data = torch.tensor(list(content), dtype=dtype).reshape(shape_of(declared))
    return rounded(data, kind)


def _decode(content: bytes, declared: Any) -> Value:
    """The bytes of a constant as a value of the declared type and shape."""
    kind, numpy_kind, bits = type_of(declared)
    shape = shape_of(declared)
    if numpy_kind:
        array = np.frombuffer(content, numpy_kind).reshape(shape)
        wide = np.float32 if kind in FLOATS else np.int32 if kind == "uint16" else numpy_kind
        return Value(torch.from_numpy(array.astype(wide)), kind)
    # Less than a byte: values are packed from the lowest bit up.
    count = math.prod(shape)
    flat = np.unpackbits(np.frombuffer(content, np.uint8), count=count * bits, bitorder="little")
    places = np.left_shift(1, np.arange(bits)).astype(np.uint8)
    codes = flat.reshape(count, bits) @ places
    if kind == "int4":
        codes = ((codes ^ 8).astype(np.int8) - 8).astype(np.int8)
    return Value(torch.from_numpy(codes).reshape(shape), kind)
