"""The bytes of a .pte: store the embedding once, load the output layer first, and find the payload
of a delegate."""

from collections.abc import Iterator
from pathlib import Path

from executorch.exir._serialize import _program as pte
from executorch.exir.schema import DataSegment, DelegateCall, Program

from exporter.backends.executorch.contents import open_contents
from exporter.backends.executorch.graph import scales_name
from exporter.errors import InputError
from exporter.model.config import EMBEDDING

_ALIGNMENT = 128


def store_embedding_once(data: memoryview) -> Iterator[bytes | memoryview]:
    """The same program with the bytes of a tied embedding stored once.

    The lookup table and its scales are constants of the program, and the output layer's filter and
    its scales have segments of their own. A segment whose bytes are those of a constant is replaced
    by one that points to the constant.
    """
    header = pte._get_extended_header(bytes(data[:64]))
    assert header is not None
    program = pte._flatbuffer_to_program(bytes(data[: header.program_size]))
    base = header.segment_base_offset
    segments = [data[base + s.offset : base + s.offset + s.size] for s in program.segments]
    constants = segments[program.constant_segment.segment_index]
    names = {named.key: named.segment_index for named in program.named_data or []}
    inside = dict[int, int]()  # segment → its place in the constants
    for name in (EMBEDDING, scales_name(EMBEDDING)):
        if (index := names.get(name)) is None:
            continue
        for at in program.constant_segment.offsets:
            if constants[at : at + len(segments[index])] == segments[index]:
                inside[index] = at
                break
    kept = [i for i in range(len(segments)) if i not in inside]
    place, offset = dict[int, int](), 0
    for index in kept:
        place[index] = offset
        offset = _aligned(offset + len(segments[index]))
    for index, at in inside.items():
        place[index] = place[program.constant_segment.segment_index] + at
    program.segments = [
        DataSegment(offset=place[i], size=len(segment)) for i, segment in enumerate(segments)
    ]
    _load_last_first(program)
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


def _load_last_first(program: Program) -> None:
    """Make the last delegate of each method the first one that a runtime loads.

    XNNPACK packs weights as it loads a delegate, and needs them twice until it is done. The output
    layer has the largest ones: packed before all others, they are twice there but alone.
    """
    for plan in program.execution_plan:
        count = len(plan.delegates)
        plan.delegates = plan.delegates[-1:] + plan.delegates[:-1]
        for chain in plan.chains:
            for instruction in chain.instructions:
                if isinstance(instruction.instr_args, DelegateCall):
                    call = instruction.instr_args
                    call.delegate_index = (call.delegate_index + 1) % count


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def delegate_payload(path: Path, backend: str) -> memoryview:
    """The payload of the first call of this delegate in a .pte. Raises InputError."""
    contents = open_contents(path)
    delegates = [
        one for plan in contents.program["execution_plan"] or [] for one in plan["delegates"] or []
    ]
    for delegate in delegates:
        if delegate["id"] == backend:
            return contents.payload(delegate)
    raise InputError(path, f"calls no {backend}, but {[one['id'] for one in delegates]}")
