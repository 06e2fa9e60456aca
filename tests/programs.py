"""Write a .pte again with changes, as someone would who tampers with it consistently."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.backends.xnnpack import serialization
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
from executorch.exir._serialize import _flatbuffer
from executorch.exir._serialize import _program as pte
from executorch.exir.schema import DataSegment, Program

_ALIGNMENT = 128


@dataclass
class Parts:
    """A program and the bytes of its segments. Both may be changed."""

    program: Program
    segments: list[bytes]

    def plan(self, name: str = "forward") -> Any:
        return next(plan for plan in self.program.execution_plan if plan.name == name)

    def index_of(self, key: str) -> int:
        """The segment of the data with this name."""
        return next(
            named.segment_index for named in self.program.named_data or [] if named.key == key
        )

    def change_graph(self, delegate: int, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the XNNPACK graph of a delegate: its fields as the schema names them."""
        index = self.plan().delegates[delegate].processed.index
        self.segments[index] = changed_graph(self.segments[index], change)


def read_parts(path: Path) -> Parts:
    """The program of a .pte and the bytes of its segments."""
    data = path.read_bytes()
    header = pte._get_extended_header(data[:64])
    assert header is not None
    program, base = (
        pte._flatbuffer_to_program(data[: header.program_size]),
        header.segment_base_offset,
    )
    segments = [data[base + s.offset : base + s.offset + s.size] for s in program.segments]
    return Parts(program, segments)


def write_parts(parts: Parts, path: Path) -> None:
    """Write a .pte with its segments in their order."""
    places, content = list[DataSegment](), b""
    for segment in parts.segments:
        places.append(DataSegment(offset=len(content), size=len(segment)))
        content += segment + bytes(-len(segment) % _ALIGNMENT)
    parts.program.segments = places
    flatbuffer = pte._program_to_flatbuffer(parts.program, constant_tensor_alignment=16)
    size = pte.aligned_size(pte._ExtendedHeader.EXPECTED_LENGTH, flatbuffer.max_alignment)
    end = size + len(flatbuffer.data)
    base = end + -end % _ALIGNMENT
    header = pte._ExtendedHeader(end, base, len(content))
    head = pte._insert_flatbuffer_header(
        flatbuffer_data=flatbuffer.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=pte.pad_to(header.to_bytes(), size),
    )
    path.write_bytes(head + bytes(base - len(head)) + content)


def changed_graph(payload: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The payload of an XNNPACK graph after a change of its fields."""
    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start, size = header.flatbuffer_offset, header.flatbuffer_size
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes((Path(serialization.__path__[0]) / "schema.fbs").read_bytes())
        binary.write_bytes(payload[start : start + size])
        options = ["--json", "--strict-json", "--raw-binary", "--defaults-json", "-o", folder]
        _flatbuffer._run_flatc([*options, str(schema), "--", str(binary)])
        text = Path(folder) / "graph.json"
        graph = json.loads(text.read_text())
        change(graph)
        text.write_text(json.dumps(graph))
        _flatbuffer._flatc_compile(folder, str(schema), str(text))
        changed = binary.read_bytes()
    padded = len(changed) + -len(changed) % 16
    new = XNNHeader(start, len(changed), start + padded, 0)
    return (
        new.to_bytes()
        + bytes(start - header.EXPECTED_LENGTH)
        + changed
        + bytes(padded - len(changed))
    )
