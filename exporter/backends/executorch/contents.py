"""Read what a .pte holds: the program, its data, and the XNNPACK graphs that it calls.

Nothing here runs a runtime. Whatever a file says is checked against its bytes before it is used,
so damaged and hostile files give an InputError.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from executorch.exir._serialize import _program as pte

from exporter.backends.executorch import flatbuffer
from exporter.errors import InputError
from exporter.foreign import present

#: The name of XNNPACK's delegate in a program.
XNNPACK = "XnnpackBackend"
#: Scalar types of the program → numpy's.
_TYPES = {
    "BYTE": "u1", "CHAR": "i1", "SHORT": "i2", "INT": "i4", "LONG": "i8", "HALF": "f2",
    "FLOAT": "f4", "DOUBLE": "f8", "BOOL": "u1", "BFLOAT16": "u2",
}  # fmt: skip
#: The header of an XNNPACK payload: its mark, and the least size.
_PAYLOAD_MARK, _PAYLOAD_HEADER = b"XH00", 30
#: The most bytes that all graphs of a program may have, without constants. One has some 8 kB.
_LARGEST_GRAPHS = 2 << 20


@dataclass(frozen=True)
class Contents:
    """The bytes of a .pte, its program as plain data, and where its segments begin."""

    path: Path
    data: memoryview
    program: Mapping[str, Any]
    base: int

    def problem(self, text: str) -> InputError:
        return InputError(self.path, text, "Get the file again, or lower the model again")

    def segment(self, index: int) -> memoryview:
        """The bytes of a segment."""
        place = self.entry(self.program["segments"], index, "segment")
        start = self.base + place["offset"]
        end = start + place["size"]
        if end > len(self.data):
            raise self.problem(f"ends before byte {end}, the end of segment {index}")
        return self.data[start:end]

    def entry(self, entries: Any, index: int, kind: str) -> Any:
        """The entry at this index of a list in the file, which may lack it."""
        entries = [] if entries is None else entries
        if not 0 <= index < len(entries):
            raise self.problem(f"has no {kind} {index}, only {len(entries)}")
        return entries[index]

    def named(self) -> dict[str, memoryview]:
        """The data that is stored under names."""
        found = dict[str, memoryview]()
        for entry in self.program["named_data"] or []:
            key = entry["key"]
            if key is None or key in found:
                raise self.problem(f"has data without a name, or twice under the name {key!r}")
            found[key] = self.segment(entry["segment_index"])
        return found

    def plan(self, name: str) -> Mapping[str, Any]:
        """The method of this name."""
        plans = [one for one in self.program["execution_plan"] or [] if one["name"] == name]
        if len(plans) != 1:
            raise self.problem(f"has {len(plans)} methods {name!r}, not one")
        plan: Mapping[str, Any] = plans[0]
        return plan

    def payload(self, delegate: Mapping[str, Any]) -> memoryview:
        """What is handed to a delegate when the program is loaded."""
        place = delegate["processed"]
        if place is None:
            raise self.problem(f"has a call of {delegate['id']!r} without a payload")
        if place["location"] == "SEGMENT":
            return self.segment(place["index"])
        inline = self.entry(self.program["backend_delegate_data"], place["index"], "delegate data")
        data: np.ndarray | None = inline["data"]
        return memoryview(b"") if data is None else data.data

    def content(self, tensor: Mapping[str, Any]) -> np.ndarray | None:
        """The values of a tensor that are in the file: a constant, or an initial state."""
        index = tensor["data_buffer_idx"]
        if not index:
            return None
        sizes = [] if tensor["sizes"] is None else tensor["sizes"].tolist()
        kind = _TYPES.get(tensor["scalar_type"])
        if kind is None or min(sizes, default=0) < 0:
            raise self.problem(f"has a constant of {tensor['scalar_type']} values {sizes}")
        count = math.prod(sizes)
        raw = self._buffer(tensor, index)
        size = count * np.dtype(kind).itemsize
        if size > len(raw):
            raise self.problem(f"ends before the {size} bytes of its constant {index}")
        return np.frombuffer(raw, f"<{kind}", count).reshape(sizes)

    def _buffer(self, tensor: Mapping[str, Any], index: int) -> memoryview:
        """The bytes from the beginning of a tensor's data on."""
        place = self.program["constant_segment"]
        if tensor["allocation_info"] is not None:
            extra = tensor["extra_tensor_info"]
            number = extra["mutable_data_segments_idx"] if extra else 0
            place = self.entry(self.program["mutable_data_segments"], number, "initial state")
        elif place is None or place["offsets"] is None or not len(place["offsets"]):
            inline = self.entry(self.program["constant_buffer"], index, "constant")["storage"]
            return memoryview(inline if inline is not None else b"")
        start = int(self.entry(place["offsets"], index, "constant"))
        segment = self.segment(place["segment_index"])
        if start > len(segment):
            raise self.problem(f"has constant {index} beyond the end of its segment")
        return segment[start:]


def open_contents(path: Path) -> Contents:
    """Map a .pte and read its program. Raises InputError."""
    if not present(path):
        raise InputError(path, "no such file", "Give the whole folder that it belongs to")
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:
        raise InputError(path, "is empty", "Get the file again") from error
    header = pte._get_extended_header(bytes(data[:64]))
    if header is None or header.program_size > len(data):
        raise InputError(path, "is not a whole ExecuTorch program with segments")
    program = flatbuffer.read(
        data[: header.program_size], _program_schema(), "Program", (b"ET12",), path
    )
    return Contents(path, data, program, header.segment_base_offset)


@dataclass(frozen=True)
class Graph:
    """An XNNPACK graph as plain data, and the constants that its payload holds itself."""

    fields: Mapping[str, Any]
    constants: memoryview
    subject: str

    def problem(self, text: str) -> InputError:
        return InputError(self.subject, text, "Get the file again, or lower the model again")

    def nodes(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The operator and the fields of each node."""
        for node in self.fields["xnodes"] or []:
            if node["xnode_union"] is None:
                raise self.problem("has a node without an operator")
            yield from node["xnode_union"].items()

    def values(self) -> dict[int, tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
        """The values by their ids: tensor, and how it is quantized."""
        found = dict[int, tuple[Mapping[str, Any], Mapping[str, Any] | None]]()
        for value in self.fields["xvalues"] or []:
            [(kind, union)] = (value["xvalue_union"] or {"nothing": {}}).items()
            quantized = kind == "XNNQuantizedTensorValue"
            tensor = union.get("tensor_value") if quantized else union
            if not tensor or tensor["id_out"] in found:
                raise self.problem("has a value without a tensor, or two values of one id")
            found[tensor["id_out"]] = tensor, union["quant_params"] if quantized else None
        return found

    def constant(self, index: int) -> Mapping[str, Any]:
        """The entry of a constant: its name and its size."""
        entries = self.fields["constant_data"] or []
        if not 0 < index < len(entries):
            raise self.problem(f"has no constant {index}")
        entry: Mapping[str, Any] = entries[index]
        return entry

    def inline(self, entry: Mapping[str, Any]) -> memoryview | None:
        """The bytes of a constant that the payload holds itself; None for one with a name."""
        start, size = entry["offset"], entry["size"]
        if entry["named_key"] is not None or not size:
            return None
        if start + size > len(self.constants):
            raise self.problem(f"ends before byte {start + size} of its constants")
        return self.constants[start : start + size]


def read_graphs(contents: Contents, *plans: Mapping[str, Any]) -> Iterator[tuple[str, int, Graph]]:
    """The XNNPACK graphs that these methods may call: method, index, graph. Raises InputError."""
    total = 0
    for plan in plans:
        for index, delegate in enumerate(plan["delegates"] or []):
            if delegate["id"] == XNNPACK:
                subject = f"{contents.path}: {plan['name']}.delegates[{index}]"
                graph, size = _read_graph(contents.payload(delegate), subject)
                total += size
                if total > _LARGEST_GRAPHS:
                    raise contents.problem(f"has graphs of more than {_LARGEST_GRAPHS} bytes")
                yield plan["name"], index, graph


def _read_graph(payload: memoryview, subject: str) -> tuple[Graph, int]:
    """The graph in a payload of XNNPACK's delegate, and its size. Raises InputError."""
    if len(payload) < _PAYLOAD_HEADER or bytes(payload[4:8]) != _PAYLOAD_MARK:
        raise InputError(subject, "is not an XNNPACK graph with a header", "Lower the model again")

    def number(at: int, size: int) -> int:
        return int.from_bytes(payload[at : at + size], "little")

    start, size, constants, length = number(10, 4), number(14, 4), number(18, 4), number(22, 8)
    if start + size > len(payload) or constants + length > len(payload):
        raise InputError(subject, "ends before its graph or its constants", "Lower the model again")
    if size > _LARGEST_GRAPHS:
        raise InputError(subject, f"is a graph of {size} bytes, more than {_LARGEST_GRAPHS}")
    fields = flatbuffer.read(
        payload[start : start + size], _graph_schema(), "XNNGraph", (b"XN00", b"XN01"), subject
    )
    return Graph(fields, payload[constants : constants + length], subject), size


@cache
def _program_schema() -> flatbuffer.Schema:
    folder = resources.files("executorch.exir._serialize")
    texts = [(folder / name).read_text() for name in ("scalar_type.fbs", "program.fbs")]
    return flatbuffer.parse_schema("\n".join(texts))


@cache
def _graph_schema() -> flatbuffer.Schema:
    """The schema that the runtime has. It knows fields that the writer's schema has dropped."""
    folder = resources.files("executorch.backends.xnnpack.serialization")
    return flatbuffer.parse_schema((folder / "runtime_schema.fbs").read_text())
