"""The bytes of a .pte: store the tied embedding once, and read every weight back."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from executorch.exir._serialize import _program as pte
from executorch.exir.schema import DataLocation, DataSegment
from torch import Tensor

from exporter.backends.executorch.graph import decode_filter
from exporter.backends.executorch.schemes import TABLE
from exporter.backends.executorch.segments import exchange_columns
from exporter.errors import InputError
from exporter.model.config import EMBEDDING
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import FLOAT, QuantizedTensor

_ALIGNMENT = 128


def store_embedding_once(data: memoryview) -> Iterator[bytes | memoryview]:
    """The same program with the bytes of a tied embedding stored once.

    The lookup table is one of the program's constants, and the output layer's filter has a segment
    of its own. If their bytes are equal, the segment is replaced by one that points to the table.
    """
    header = pte._get_extended_header(bytes(data[:64]))
    assert header is not None
    program = pte._flatbuffer_to_program(bytes(data[: header.program_size]))
    base = header.segment_base_offset
    segments = [data[base + s.offset : base + s.offset + s.size] for s in program.segments]
    constants = segments[program.constant_segment.segment_index]
    names = {named.key: named.segment_index for named in program.named_data or []}
    shared = names.get(EMBEDDING)
    inside = None
    if shared is not None:
        size = len(segments[shared])
        inside = next(
            (
                at
                for at in program.constant_segment.offsets
                if constants[at : at + size] == segments[shared]
            ),
            None,
        )
    kept = [i for i in range(len(segments)) if i != shared or inside is None]
    place, offset = dict[int, int](), 0
    for index in kept:
        place[index] = offset
        offset = _aligned(offset + len(segments[index]))
    if shared is not None and inside is not None:
        place[shared] = place[program.constant_segment.segment_index] + inside
    program.segments = [
        DataSegment(offset=place[i], size=len(segment)) for i, segment in enumerate(segments)
    ]
    flatbuffer = pte._program_to_flatbuffer(program, constant_tensor_alignment=16)
    header_size = pte.aligned_size(pte._ExtendedHeader.EXPECTED_LENGTH, flatbuffer.max_alignment)
    program_size = header_size + len(flatbuffer.data)
    end = place[kept[-1]] + len(segments[kept[-1]])
    new_header = pte._ExtendedHeader(
        program_size=program_size,
        segment_base_offset=_aligned(program_size),
        segment_data_size=end,
    )
    head = pte._insert_flatbuffer_header(
        flatbuffer_data=flatbuffer.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=pte.pad_to(new_header.to_bytes(), header_size),
    )
    yield head + b"\0" * (_aligned(len(head)) - len(head))
    for index in kept:
        yield segments[index]
        if index != kept[-1]:
            yield b"\0" * (_aligned(len(segments[index])) - len(segments[index]))


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def delegate_payload(path: Path, backend: str) -> memoryview:
    """The payload of the first call of this delegate in a .pte. Raises InputError."""
    data = memoryview(path.read_bytes())
    header = pte._get_extended_header(bytes(data[:64]))
    if header is None:
        raise InputError(path, "is not an ExecuTorch program with segments")
    program = pte._flatbuffer_to_program(bytes(data[: header.program_size]))
    delegates = [one for plan in program.execution_plan for one in plan.delegates]
    for delegate in delegates:
        if delegate.id == backend and delegate.processed.location == DataLocation.SEGMENT:
            place = program.segments[delegate.processed.index]
            start = header.segment_base_offset + place.offset
            if start + place.size > len(data):
                raise InputError(path, f"ends before byte {start + place.size} of its delegate")
            return data[start : start + place.size]
    raise InputError(path, f"calls no {backend}, but {[one.id for one in delegates]}")


def read_weights(
    path: Path, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, QuantizedTensor | Tensor]]:
    """Every weight decoded from the .pte: name, place in the file, codes and scales or floats.

    A tied embedding is given twice: as the lookup table and as the output layer's filter.
    """
    data = memoryview(path.read_bytes())
    header = pte._get_extended_header(bytes(data[:64]))
    if header is None:
        raise InputError(path, "is not an ExecuTorch program with segments")
    program = pte._flatbuffer_to_program(bytes(data[: header.program_size]))
    base = header.segment_base_offset

    def segment(index: int) -> memoryview:
        place = program.segments[index]
        return data[base + place.offset : base + place.offset + place.size]

    named = {entry.key: entry.segment_index for entry in program.named_data or []}
    shapes = quantized.config.parameter_shapes()
    for name, shape in shapes.items():
        if name == EMBEDDING and not quantized.config.is_multiplied(name):
            continue
        if name not in named:
            raise InputError(f"{path}: {name}", "is not in the program")
        scheme = quantized.schemes[name]
        content = bytes(segment(named[name]))
        if scheme == FLOAT:
            yield (
                name,
                "constant",
                torch.frombuffer(bytearray(content), dtype=torch.float32).view(shape),
            )
            continue
        scales = bytes(segment(named[f"{name}.scales"]))
        found = decode_filter(content, scales, (shape[0], shape[1]), scheme)
        if name == EMBEDDING and scheme.bits == 4:
            found = QuantizedTensor(exchange_columns(found.codes), found.scales, found.scheme)
        yield name, "filter", found
    table = _embedding_table(program, segment, quantized)
    yield EMBEDDING, "table", table


def _embedding_table(
    program: Any, segment: Callable[[int], memoryview], quantized: QuantizedCheckpoint
) -> QuantizedTensor | Tensor:
    """The lookup table, located through the arguments of the embedding instruction."""
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    constants = segment(program.constant_segment.segment_index)
    offsets = program.constant_segment.offsets

    def constant(argument: int, size: int) -> bytes:
        start = offsets[plan.values[argument].val.data_buffer_idx]
        return bytes(constants[start : start + size])

    scheme, rows = quantized.schemes[EMBEDDING], quantized.config.vocab_size
    columns = quantized.config.hidden_size
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        op_index = getattr(call, "op_index", None)
        if op_index is None or "embedding" not in plan.operators[op_index].name:
            continue
        if scheme == FLOAT:
            raw = bytearray(constant(call.args[0], rows * columns * 4))
            return torch.frombuffer(raw, dtype=torch.float32).view(rows, columns)
        bits, (_, groups) = scheme.code_bits, scheme.scale_shape((rows, columns))
        packed = torch.frombuffer(
            bytearray(constant(call.args[0], rows * columns * bits // 8)), dtype=torch.uint8
        )
        scales = torch.frombuffer(
            bytearray(constant(call.args[1], rows * groups * 4)), dtype=torch.float32
        )
        codes = TABLE.unpack(packed.view(rows, -1), bits)
        return QuantizedTensor(codes, scales.view(rows, groups), scheme)
    raise InputError("forward", "has no embedding instruction")
