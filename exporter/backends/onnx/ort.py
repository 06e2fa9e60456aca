"""Read .ort files, and give one the same bytes whenever it holds the same.

The readers are those that the onnxruntime wheel has for the format. ONNX Runtime itself verifies
every offset of such a file before it reads it.
"""

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import flatbuffers
import numpy as np
import onnxruntime.tools.ort_format_model  # noqa: F401  # makes the readers importable
from flatbuffers.table import Table
from ort_flatbuffers_py import fbs

from exporter.errors import InputError
from exporter.foreign import present

_IDENTIFIER = b"ORTM"
_InferenceSession = fbs.InferenceSession.InferenceSession
#: The number of a type in the one union of the format → its reader.
_UNION = {
    fbs.TypeInfoValue.TypeInfoValue.tensor_type: fbs.TensorTypeAndShape.TensorTypeAndShape,
    fbs.TypeInfoValue.TypeInfoValue.sequence_type: fbs.SequenceType.SequenceType,
    fbs.TypeInfoValue.TypeInfoValue.map_type: fbs.MapType.MapType,
}
#: The most tables and texts that a file may have, and how deep tables may be nested.
_MOST, _DEEPEST = 200_000, 40
#: Entries that record a version and have no effect.
_VERSIONS = ("OrtVersion", "ProducerVersion")


def in_order(data: bytes) -> memoryview:
    """The same model with one table written again: it lists the types of each operator.

    The converter lays out that table by hashes of memory addresses, so its bytes differ from run to
    run. The table is the last part that is written, and a flatbuffer is written from its end: all
    else lies behind it and stays as it is.
    """
    session = _InferenceSession.GetRootAs(data, 0)
    model = session.Model()._tab
    vtable = model.Pos - model.Get(flatbuffers.number_types.SOffsetTFlags, model.Pos)
    tail = memoryview(data)[min(model.Pos, vtable) :]
    builder = flatbuffers.Builder(len(tail) + (1 << 16))
    builder.head -= len(tail)
    builder.Bytes[builder.head :] = tail
    builder.minalign = 8  # the alignment of the tail
    version = builder.CreateString(session.OrtVersion())
    resolver = _write_resolver(builder, session.KernelTypeStrResolver())
    fbs.InferenceSession.Start(builder)
    fbs.InferenceSession.AddOrtVersion(builder, version)
    fbs.InferenceSession.AddModel(builder, len(data) - model.Pos)
    fbs.InferenceSession.AddKernelTypeStrResolver(builder, resolver)
    builder.Finish(fbs.InferenceSession.End(builder), _IDENTIFIER)
    return memoryview(builder.Bytes)[builder.head :]


def _write_resolver(builder: flatbuffers.Builder, resolver: Any) -> int:
    """Write the table of types, whose entries are sorted by operator."""
    operators = []
    for entry in _entries(resolver, "OpKernelTypeStrArgs"):
        kinds = []
        for kind in _entries(entry, "KernelTypeStrArgs"):
            arguments = []
            for argument in _entries(kind, "Args"):
                fbs.ArgTypeAndIndex.Start(builder)
                fbs.ArgTypeAndIndex.AddArgType(builder, argument.ArgType())
                fbs.ArgTypeAndIndex.AddIndex(builder, argument.Index())
                arguments.append(fbs.ArgTypeAndIndex.End(builder))
            vector = _write_vector(builder, arguments)
            name = builder.CreateString(kind.KernelTypeStr())
            fbs.KernelTypeStrArgsEntry.Start(builder)
            fbs.KernelTypeStrArgsEntry.AddKernelTypeStr(builder, name)
            fbs.KernelTypeStrArgsEntry.AddArgs(builder, vector)
            kinds.append(fbs.KernelTypeStrArgsEntry.End(builder))
        vector = _write_vector(builder, kinds)
        name = builder.CreateString(entry.OpId())
        fbs.OpIdKernelTypeStrArgsEntry.Start(builder)
        fbs.OpIdKernelTypeStrArgsEntry.AddOpId(builder, name)
        fbs.OpIdKernelTypeStrArgsEntry.AddKernelTypeStrArgs(builder, vector)
        operators.append(fbs.OpIdKernelTypeStrArgsEntry.End(builder))
    vector = _write_vector(builder, operators)
    fbs.KernelTypeStrResolver.Start(builder)
    fbs.KernelTypeStrResolver.AddOpKernelTypeStrArgs(builder, vector)
    return int(fbs.KernelTypeStrResolver.End(builder))


def _write_vector(builder: flatbuffers.Builder, tables: list[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return int(builder.EndVector())


def _entries(table: Any, name: str) -> Iterator[Any]:
    return (getattr(table, name)(i) for i in range(getattr(table, f"{name}Length")()))


def read(path: Path) -> dict[str, Any]:
    """The content of an .ort file as plain data, without recorded versions. Raises InputError."""
    if not present(path):
        raise InputError(path, "no such file", "Give the whole folder that it belongs to")
    try:
        data = np.memmap(path, np.uint8, "r").data
        if not _InferenceSession.InferenceSessionBufferHasIdentifier(data, 0):
            raise InputError(path, "is not an .ort file", "Lower the model again")
        return _Reader(path).plain(_InferenceSession.GetRootAs(data, 0), 0)
    except (ValueError, TypeError, IndexError, OverflowError, struct.error) as error:
        raise InputError(path, f"cannot be read ({error})", "Lower the model again") from error


class _Reader:
    """Reads the tables of one file, up to a limit."""

    def __init__(self, path: Path) -> None:
        self._path, self._budget = path, _MOST

    def plain(self, table: Any, depth: int) -> dict[str, Any]:
        self._spend(1)
        if depth > _DEEPEST:
            raise InputError(self._path, f"has tables nested deeper than {_DEEPEST} levels")
        found = dict[str, Any]()
        kind: Any = type(table)
        for name, vector in _accessors(kind):
            if name in _VERSIONS:
                continue
            read = getattr(table, name)
            if vector == "values":
                found[name] = np.asarray(getattr(table, f"{name}AsNumpy")())  # 0 if it is absent
            elif vector:
                found[name] = [self._value(table, entry, depth) for entry in _entries(table, name)]
            else:
                found[name] = self._value(table, read(), depth)
        return {"name": found.get("Name") or found.get("OpId"), **found}

    def _spend(self, entries: int) -> None:
        self._budget -= entries
        if self._budget < 0:
            raise InputError(self._path, f"has more than {_MOST} tables and texts")

    def _value(self, owner: Any, value: Any, depth: int) -> Any:
        if isinstance(value, Table):
            kind = _UNION.get(owner.ValueType())
            if kind is None:
                raise InputError(self._path, f"has a type of the unknown kind {owner.ValueType()}")
            member = kind()
            member.Init(value.Bytes, value.Pos)
            return self.plain(member, depth + 1)
        if isinstance(value, bytes):
            self._spend(1 + len(value) // 16)
            return value.decode("utf-8", "backslashreplace")
        return self.plain(value, depth + 1) if hasattr(value, "_tab") else value


@cache
def _accessors(kind: Any) -> tuple[tuple[str, str], ...]:
    """The fields of a reader: name, and whether it is a vector of "values" or of "tables"."""
    functions = (name for name, value in vars(kind).items() if isinstance(value, FunctionType))
    names = [name for name in functions if name != "Init"]
    fields = [name for name in names if not name.endswith(("Length", "IsNone", "AsNumpy"))]
    return tuple(
        (
            name,
            "values" if f"{name}AsNumpy" in names else "tables" if f"{name}Length" in names else "",
        )
        for name in fields
    )
