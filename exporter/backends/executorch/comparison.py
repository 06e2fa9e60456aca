"""How the program of one .pte differs from that of another, by structure and by content.

Compared are the methods with their values, operators and instructions, every constant, the data
under names, and the payload of each delegate: an XNNPACK graph node by node, a Core ML package by
its own comparison. Left out is what has no effect: where in the file data lie and in which order,
and the version numbers of the program and of the graphs.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from exporter.backends import _comparison
from exporter.backends.executorch.contents import Contents, Graph, read_graphs

#: Operators that read a constant → what the constant is.
_ROLES = {
    "aten::mul": "RoPE frequencies",
    "quantized_decomposed::embedding_4bit": "embedding",
    "quantized_decomposed::embedding_byte": "embedding",
    "aten::embedding": "embedding",
}
#: numpy type and shape of data that is stored under a name. "bf16" is the upper half of a float32.
_Type = tuple[str, tuple[int, ...]]


def differences(found: Contents, expected: Contents) -> Iterator[tuple[str, str]]:
    """How `found` differs from `expected`, as (place, what differs). Raises InputError.

    The payloads of other delegates than XNNPACK are not compared.
    """
    graphs = [
        {f"{method}.delegates[{index}]": graph for method, index, graph in read_graphs(one, *plans)}
        for one, plans in ((one, _plans(one).values()) for one in (found, expected))
    ]
    types = dict[str, _Type]()
    for graph in graphs[1].values():
        types.update(_types(graph))
    yield from _comparison.differences(_methods(found), _methods(expected))
    yield from _data_differences(found.named(), expected.named(), types)
    one, other = ({place: _graph(graph) for place, graph in own.items()} for own in graphs)
    yield from _comparison.differences(one, other)


def _plans(contents: Contents) -> dict[str, Mapping[str, Any]]:
    """Every method by its name."""
    plans = contents.program["execution_plan"] or []
    named = {str(plan["name"]): plan for plan in plans}
    if len(named) < len(plans):
        raise contents.problem("has two methods of one name")
    return named


def _methods(contents: Contents) -> dict[str, Any]:
    return {name: _method(contents, plan) for name, plan in _plans(contents).items()}


def _method(contents: Contents, plan: Mapping[str, Any]) -> dict[str, Any]:
    operators = [
        "::".join(filter(None, (one["name"], one["overload"]))) for one in plan["operators"] or []
    ]
    chains = [
        {
            **chain,
            "instructions": [_instruction(one, operators) for one in chain["instructions"] or []],
        }
        for chain in plan["chains"] or []
    ]
    readers = dict[int, str]()
    for chain in chains:
        for one in chain["instructions"]:
            if "KernelCall" in one and one["KernelCall"]["args"] is not None:
                for index in one["KernelCall"]["args"].tolist():
                    readers.setdefault(index, one.get("name", ""))
    values = [
        _value(contents, one["val"], readers.get(index))
        for index, one in enumerate(plan["values"] or [])
    ]
    delegates = [_without(one, "processed") for one in plan["delegates"] or []]
    return {**plan, "values": values, "chains": chains, "delegates": delegates}


def _instruction(instruction: Mapping[str, Any], operators: list[str]) -> dict[str, Any]:
    """An instruction with the name of its operator."""
    arguments = instruction["instr_args"] or {}
    call = arguments.get("KernelCall")
    if call and 0 <= call["op_index"] < len(operators):
        return {"name": operators[call["op_index"]], **arguments}
    return dict(arguments)


def _value(contents: Contents, value: Mapping[str, Any] | None, reader: str | None) -> Any:
    """A value; a tensor has its content instead of the place of it."""
    if not value or "Tensor" not in value:
        return value
    tensor = value["Tensor"]
    content = contents.content(tensor)
    found = {"Tensor": {**_without(tensor, "data_buffer_idx"), "content": content}}
    if content is None:
        return found
    operator = (reader or "").rpartition("::")[0] if (reader or "").count("::") > 1 else reader
    return {"name": _ROLES.get(operator or "", f"constant of {operator}"), **found}


def _data_differences(
    found: Mapping[str, memoryview], expected: Mapping[str, memoryview], types: Mapping[str, _Type]
) -> Iterator[tuple[str, str]]:
    """How data under names differ: in values of their type, if they have the expected size."""
    for name, raw in expected.items():
        same_size = len(found.get(name, b"")) == len(raw)
        if same_size and np.array_equal(np.frombuffer(found[name], "u1"), np.frombuffer(raw, "u1")):
            continue
        known = types.get(name) if same_size else None
        one = {"data": _typed(found[name], known)} if name in found else {}
        yield from _comparison.differences(one, {"data": _typed(raw, known)}, name)
    for name in sorted(found.keys() - expected.keys()):
        yield f"{name}.data", "is not in the derived model"


def _types(graph: Graph) -> Iterator[tuple[str, _Type]]:
    """Type and shape of the constants that a graph reads, by their names."""
    for tensor, quantization in graph.values().values():
        if not tensor["constant_buffer_idx"]:
            continue
        key = graph.constant(tensor["constant_buffer_idx"])["named_key"]
        if tensor["datatype"] == "xnn_datatype_fp32":
            yield key, ("<f4", tuple(tensor["dims"].tolist()))
        for kind, parameters in (quantization or {}).items():
            index = parameters.get("scale_buffer_idx")
            if index:
                scale = "bf16" if kind == "PerChannelGroupQuant" else "<f4"
                yield graph.constant(index)["named_key"], (scale, (int(tensor["dims"][0]), -1))


def _typed(raw: memoryview, known: _Type | None) -> np.ndarray:
    """Data as its values, or as bytes if its type is not known or does not fit."""
    data = np.frombuffer(raw, np.uint8)
    if known is None:
        return data
    kind, shape = known
    if kind == "bf16" and len(data) % 2 == 0:
        data = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    elif kind != "bf16" and len(data) % np.dtype(kind).itemsize == 0:
        data = np.frombuffer(raw, kind)
    try:
        return data.reshape(shape)
    except ValueError:
        return data


def _graph(graph: Graph) -> dict[str, Any]:
    """A graph. A constant that is stored in the payload has its content instead of its place."""
    names = [entry["named_key"] for entry in graph.fields["constant_data"] or []]
    constants = []
    for entry in graph.fields["constant_data"] or []:
        inline = graph.inline(entry)
        held = {} if inline is None else {"offset": None, "content": np.frombuffer(inline, "u1")}
        constants.append({**entry, **held})
    nodes = [
        {"name": kind, **_without(node, "xnode_union"), **fields}
        for node, (kind, fields) in zip(graph.fields["xnodes"] or [], graph.nodes(), strict=True)
    ]
    values = []
    for tensor, quantization in graph.values().values():
        index = tensor["constant_buffer_idx"]
        name = names[index] if 0 < index < len(names) else None
        values.append({"name": name, **tensor, "quantization": quantization})
    fields = _without(graph.fields, "version")
    return {**fields, "constant_data": constants, "xnodes": nodes, "xvalues": values}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
