"""A .pte that was tampered with, checksums aside: what differs from the derived one is named."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from executorch.exir._serialize import _program as pte
from executorch.exir._serialize.generated.executorch_flatbuffer import (
    EValue,
    ExecutionPlan,
    KernelTypes,
    Null,
)
from executorch.exir._serialize.generated.executorch_flatbuffer import Program as FlatProgram
from executorch.exir.schema import Buffer, Int, KernelCall, Tensor
from lowering import MODELS, Lowered, differences, lowered_in
from programs import Parts, read_parts, write_parts

from exporter.backends import _comparison
from exporter.backends.executorch.contents import open_contents, read_graphs
from exporter.errors import InputError
from exporter.verification.integers import check_integers

CONTEXT = 48
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.1.feed_forward.down_proj.weight"
Change = Callable[[Parts], object]
ChangeGraph = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    target = {"target": "executorch", "max_context": CONTEXT}
    schemes = {"linear": "int4-g32", "embedding": "int4-g32"}
    return lowered_in(tmp_path_factory.mktemp("program"), MODELS["llama4_text"], target, schemes)


def changed(lowered: Lowered, change: Change, folder: Path) -> Path:
    parts = read_parts(lowered[1].artifact.path / "model.pte")
    change(parts)
    folder.mkdir(exist_ok=True)
    write_parts(parts, folder / "model.pte")
    return folder / "model.pte"


#: The XNNPACK graphs by their places in the program, where the output layer is loaded first.
OUTPUT, FIRST, SECOND = range(3)


def in_graph(change: ChangeGraph, delegate: int = SECOND) -> Change:
    return lambda parts: parts.change_graph(delegate, change)


def value_of(graph: dict[str, Any], key: str) -> dict[str, Any]:
    """The value whose constant has this name."""
    keys = [entry.get("named_key") for entry in graph["constant_data"]]
    for value in graph["xvalues"]:
        union: dict[str, Any] = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        if tensor["constant_buffer_idx"] == keys.index(key):
            return value
    raise KeyError(key)


def node_of(graph: dict[str, Any], kind: str) -> dict[str, Any]:
    node: dict[str, Any] = next(n for n in graph["xnodes"] if n["xnode_union_type"] == kind)
    return node


def zero_a_rope_frequency(parts: Parts) -> None:
    """The last one, which turns by 8 degrees from the first to the last position."""
    constants = bytearray(parts.segments[0])
    frequencies = [
        value.val
        for value in parts.plan().values
        if isinstance(value.val, Tensor) and value.val.data_buffer_idx and value.val.sizes == [16]
    ]
    assert len(frequencies) == 1
    start = parts.program.constant_segment.offsets[frequencies[0].data_buffer_idx]
    constants[start + 15 * 4 : start + 16 * 4] = bytes(4)
    parts.segments[0] = bytes(constants)


def double_epsilon(parts: Parts) -> None:
    index = parts.index_of("norm.eps")
    parts.segments[index] = (2 * np.frombuffer(parts.segments[index], "<f4")).tobytes()


def exchange_segments(parts: Parts) -> None:
    """Keys of one layer become its values: two weights of the same shape and type."""
    named = {entry.key: entry for entry in parts.program.named_data or []}
    one, other = (named[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "kv")
    one.segment_index, other.segment_index = other.segment_index, one.segment_index


def change_argument(parts: Parts) -> None:
    """The attention reads its keys as values."""
    plan = parts.plan()
    names = [operator.name for operator in plan.operators]
    call = next(
        instruction.instr_args
        for instruction in plan.chains[0].instructions
        if isinstance(instruction.instr_args, KernelCall)
        and names[instruction.instr_args.op_index] == "llama::custom_sdpa"
    )
    call.args[2] = call.args[1]


def change_operator(parts: Parts) -> None:
    next(one for one in parts.plan().operators if one.name == "aten::sin").name = "aten::cos"


def change_end(parts: Parts) -> None:
    """The first token that ends a text."""
    values = parts.plan("get_eos_ids").values
    next(value.val for value in values if isinstance(value.val, Int)).int_val += 1


def hold_a_copy(parts: Parts) -> None:
    """The constants move into the flatbuffer, changed; the segment stays as it is."""
    program = parts.program
    program.constant_buffer = [Buffer(storage=b"")] + [
        Buffer(storage=bytes(len(parts.segments[0]))) for _ in program.constant_segment.offsets[1:]
    ]
    program.constant_segment.offsets = []


def add_ten_thousand(graph: dict[str, Any]) -> None:
    """Before the output layer: its input plus one of the constants, which is changed elsewhere."""
    nodes = graph["xnodes"]
    (*_, last) = (i for i, n in enumerate(nodes) if n["xnode_union_type"] == "XNNStaticReshape")
    union = nodes[last]["xnode_union"]
    value = {**graph["xvalues"][union["input_id"]]}
    number = len(graph["xvalues"])
    value["xvalue_union"] = {**value["xvalue_union"], "id_out": number}
    graph["xvalues"].append(value)
    added = {
        "xnode_union_type": "XNNAdd",
        "xnode_union": {
            "input1_id": union["input_id"], "input2_id": 3, "output_id": number, "flags": 0
        },
        "debug_handle": 0,
    }  # fmt: skip
    union["input_id"] = number
    nodes.insert(last, added)


def set_tensor(key: str, **fields: Any) -> ChangeGraph:
    def change(graph: dict[str, Any]) -> None:
        union = value_of(graph, key)["xvalue_union"]
        union.get("tensor_value", union).update(fields)

    return change


def rename_filter(graph: dict[str, Any]) -> None:
    """The filter of k_proj is read where that of q_proj was."""
    for entry in graph["constant_data"]:
        if entry.get("named_key") == Q_PROJ:
            entry["named_key"] = Q_PROJ.replace("q_proj", "k_proj")


TAMPERINGS: dict[str, tuple[Change, str]] = {
    "RoPE": (
        zero_a_rope_frequency,
        "(RoPE frequencies).Tensor.content: 1 of 16 values differ, first at [15]: 0.0, not ",
    ),
    "epsilon": (double_epsilon, "norm.eps.data: 1 of 1 values differ, first at [0]: 2e-05, not "),
    "segments": (exchange_segments, "model.layers.0.self_attn.k_proj.weight.data: "),
    "argument": (change_argument, "(llama::custom_sdpa::out).KernelCall.args: 1 of 10 values "),
    "operator": (change_operator, "aten::cos::out"),
    "end of text": (change_end, "get_eos_ids.values[0].Int.int_val: is 2, not 1"),
    "constants": (hold_a_copy, "forward.values[0] (embedding).Tensor.content: "),
    "output": (
        lambda parts: parts.plan().outputs.reverse() or parts.plan().outputs.append(0),
        "forward.outputs: has shape [2], not [1]",
    ),
    "memory": (
        lambda parts: parts.plan().non_const_buffer_sizes.__setitem__(1, 1 << 20),
        "forward.non_const_buffer_sizes: 1 of 2 values differ, first at [1]: 1048576",
    ),
    "number of a node": (
        in_graph(lambda graph: node_of(graph, "XNNSigmoid").update(xnode_union_type="XNNTanh")),
        "(XNNSigmoid).name: is 'XNNTanh', not 'XNNSigmoid'",
    ),
    "flags": (
        in_graph(lambda graph: node_of(graph, "XNNAdd")["xnode_union"].update(flags=1)),
        "(XNNAdd).flags: is 1, not 0",
    ),
    "clamp": (
        in_graph(
            lambda graph: node_of(graph, "XNNAdd").update(
                output_min_max={"output_min": -1.0, "output_max": 1.0}
            )
        ),
        "(XNNAdd).output_min_max: is {output_min, output_max…}, not absent",
    ),
    "dims": (
        in_graph(set_tensor(Q_PROJ, dims=[64, 128]), FIRST),
        f"({Q_PROJ}).dims: 2 of 2 values differ, first at [0]: 64, not 128",
    ),
    "datatype": (
        in_graph(set_tensor(Q_PROJ, datatype="xnn_datatype_qcint4"), FIRST),
        f"({Q_PROJ}).datatype: is 'xnn_datatype_qcint4', not 'xnn_datatype_qbint4'",
    ),
    "another filter": (in_graph(rename_filter, FIRST), "named_key: is 'model.layers.0.self_attn."),
    "added node": (in_graph(add_ten_thousand, OUTPUT), "forward.delegates[0].xnodes: has "),
    "order of outputs": (
        in_graph(lambda graph: graph["output_ids"].reverse()),
        "forward.delegates[2].output_ids: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_program_is_named(name: str, lowered: Lowered, tmp_path: Path) -> None:
    change, expected = TAMPERINGS[name]
    found = differences(lowered, changed(lowered, change, tmp_path / "tampered").parent)
    assert any(expected in line for line in found), found[:10]
    assert len(found) <= 10


@pytest.mark.parametrize(
    ("key", "fields", "subject", "note"),
    [
        (Q_PROJ, {"datatype": "xnn_datatype_qcint8"}, Q_PROJ, "with PerChannelGroupQuant"),
        (Q_PROJ, {"dims": [64, 128]}, f"{Q_PROJ} (filter)", "codes have shape [64, 128], not"),
        (Q_PROJ, {"dims": [128, 128]}, Q_PROJ, "has 256 scales, and its shape needs 512"),
        (
            Q_PROJ,
            {"datatype": "xnn_datatype_fp32"},
            Q_PROJ,
            "is read as xnn_datatype_fp32[128, 64]",
        ),
    ],
)
def test_a_filter_is_decoded_as_the_graph_describes_it(
    key: str, fields: dict[str, Any], subject: str, note: str, lowered: Lowered, tmp_path: Path
) -> None:
    changed(lowered, in_graph(set_tensor(key, **fields), FIRST), tmp_path / "tampered")
    found = failed(lowered, tmp_path / "tampered")
    assert any(line.startswith(f"{subject}: ") and note in line for line in found), found
    assert {line.split(" ")[0].rstrip(":") for line in found} == {Q_PROJ}


def failed(lowered: Lowered, folder: Path) -> list[str]:
    """The checks of codes and scales that fail, a line each."""
    finished = replace(lowered[1], artifact=replace(lowered[1].artifact, path=folder))
    checks = check_integers(lowered[0], finished, lambda name: None)
    return [f"{check.subject}: {check.note}" for check in checks if not check.passed]


def test_a_weight_that_no_output_depends_on_is_not_in_the_artifact(
    lowered: Lowered, tmp_path: Path
) -> None:
    """The output layer reads a copy under another name; the weight itself is left to a node whose
    result nobody reads."""

    def wire_in_a_copy(parts: Parts) -> None:
        key = "model.layers.1.self_attn.q_proj.weight"
        named = {entry.key: entry for entry in parts.program.named_data or []}
        copy = replace(named[key], key="copy")
        parts.program.named_data = [*named.values(), copy]
        parts.segments.append(bytes(len(parts.segments[named[key].segment_index])))
        copy.segment_index = len(parts.segments) - 1
        parts.change_graph(SECOND, partial_copy(key))

    changed(lowered, wire_in_a_copy, tmp_path / "tampered")
    found = failed(lowered, tmp_path / "tampered")
    assert "model.layers.1.self_attn.q_proj.weight: is not in the artifact" in found
    assert any("multiplies by 'copy', which is no weight" in line for line in found)
    assert len(found) == 2


def partial_copy(key: str) -> ChangeGraph:
    def change(graph: dict[str, Any]) -> None:
        value = value_of(graph, key)
        tensor = value["xvalue_union"]["tensor_value"]
        node = next(
            node
            for node in graph["xnodes"]
            if node["xnode_union"].get("filter_id") == tensor["id_out"]
        )
        entry = graph["constant_data"][tensor["constant_buffer_idx"]]
        graph["constant_data"].append({**entry, "named_key": "copy"})
        values, union = graph["xvalues"], node["xnode_union"]
        copy = {
            **tensor,
            "id_out": len(values),
            "constant_buffer_idx": len(graph["constant_data"]) - 1,
        }
        values.append({**value, "xvalue_union": {**value["xvalue_union"], "tensor_value": copy}})
        unread = values[union["output_id"]]["xvalue_union"]
        values.append(
            {
                "xvalue_union_type": "XNNTensorValue",
                "xvalue_union": {**unread, "id_out": len(values)},
            }
        )
        graph["xnodes"].append({**node, "xnode_union": {**union, "output_id": len(values) - 1}})
        union["filter_id"] = copy["id_out"]

    return change


def test_two_lowerings_and_a_file_in_another_order_do_not_differ(
    lowered: Lowered, tmp_path: Path
) -> None:
    def reverse(parts: Parts) -> None:
        last = len(parts.segments) - 1
        parts.segments.reverse()
        for entry in (*(parts.program.named_data or []), parts.program.constant_segment):
            entry.segment_index = last - entry.segment_index
        for delegate in parts.plan().delegates:
            delegate.processed.index = last - delegate.processed.index
        parts.program.version += 1

    program = changed(lowered, reverse, tmp_path / "reversed")
    assert program.read_bytes() != (lowered[1].artifact.path / "model.pte").read_bytes()
    assert differences(lowered, program.parent) == []
    assert failed(lowered, program.parent) == []


def places_of_structure(program: Path) -> Iterator[range]:
    """Where the header, the program and the graphs lie in the file."""
    contents = open_contents(program)
    yield range(min(len(contents.data), contents.base))
    payloads = [contents.payload(one) for one in contents.plan("forward")["delegates"]]
    data = bytes(contents.data)
    for payload in payloads:
        start = data.find(bytes(payload))
        yield range(start, start + len(payload))
    assert len(list(read_graphs(contents, contents.plan("forward")))) == len(payloads)


@pytest.mark.parametrize("seed", range(2))
def test_a_flipped_bit_of_the_structure_is_named_refused_or_without_effect(
    seed: int, lowered: Lowered, tmp_path: Path
) -> None:
    rng, original = random.Random(seed), lowered[1].artifact.path / "model.pte"
    data, places = bytearray(original.read_bytes()), list(places_of_structure(original))
    outcomes = {"named": 0, "refused": 0, "without effect": 0}
    for _ in range(40):
        place = rng.choice(places)
        offset, bit = rng.choice(place), rng.randrange(8)
        data[offset] ^= 1 << bit
        (tmp_path / "model.pte").write_bytes(data)
        try:
            outcome = "named" if differences(lowered, tmp_path) else "without effect"
        except InputError:
            outcome = "refused"
        outcomes[outcome] += 1
        data[offset] ^= 1 << bit
    assert outcomes["named"] > 10
    assert outcomes["refused"] > 2


@pytest.mark.parametrize("content", [b"", b"ET12", bytes(4096), b"\xff" * 4096])
def test_what_is_no_program_is_refused(content: bytes, lowered: Lowered, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pte"):
        differences(lowered, tmp_path)


def test_the_difference_of_floats_is_their_bits() -> None:
    assert _comparison.array_difference(np.array([np.nan]), np.array([np.nan])) is None
    assert _comparison.array_difference(np.array([0.0]), np.array([-0.0])) is not None
    assert list(_comparison.differences({"a": 1}, {"a": 1.0})) == [("a", "is 1, not 1.0")]


def test_a_table_that_is_listed_many_times_is_refused(lowered: Lowered, tmp_path: Path) -> None:
    """20,000 values that are one table take four bytes each; as objects they take a kilobyte."""
    builder = flatbuffers.Builder()
    Null.NullStart(builder)
    null = Null.NullEnd(builder)
    EValue.EValueStart(builder)
    EValue.EValueAddValType(builder, KernelTypes.KernelTypes.Null)
    EValue.EValueAddVal(builder, null)
    value = EValue.EValueEnd(builder)
    values = _vector(builder, [value] * 20_000)
    ExecutionPlan.ExecutionPlanStart(builder)
    ExecutionPlan.ExecutionPlanAddValues(builder, values)
    plans = _vector(builder, [ExecutionPlan.ExecutionPlanEnd(builder)])
    FlatProgram.ProgramStart(builder)
    FlatProgram.ProgramAddExecutionPlan(builder, plans)
    builder.Finish(FlatProgram.ProgramEnd(builder), b"ET12")
    program = bytes(builder.Output())
    header = pte._ExtendedHeader(len(program) + 32, 0, 0).to_bytes()
    (tmp_path / "model.pte").write_bytes(
        pte._insert_flatbuffer_header(program, r"ET..", pte.pad_to(header, 32))
    )
    with pytest.raises(InputError, match="more entries than its bytes can hold"):
        differences(lowered, tmp_path)


def _vector(builder: Any, tables: list[int]) -> Any:
    builder.StartVector(4, len(tables), 4)
    for table in tables:
        builder.PrependUOffsetTRelative(table)
    return builder.EndVector()
