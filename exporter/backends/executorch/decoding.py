"""Find every weight of a .pte where the program reads it, and decode it as the file says.

The embedding is what the embedding instruction looks up. Every other weight is a constant of an
XNNPACK graph: a filter of a FullyConnected node, or an input of another node. Only nodes that an
output depends on are considered.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.backends.executorch.contents import Contents, Graph, read_graphs
from exporter.backends.executorch.schemes import FILTER, TABLE
from exporter.backends.executorch.segments import exchange_columns, row_orders
from exporter.errors import InputError
from exporter.model.config import EMBEDDING
from exporter.model.equivalent import Source
from exporter.quantization.packing import Packing
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme

Weight = QuantizedTensor | Tensor
#: XNNPACK's datatype of quantized filters → the bits of their codes.
_BITS = {"xnn_datatype_qbint4": 4, "xnn_datatype_qcint4": 4, "xnn_datatype_qcint8": 8}
_FLOAT = "xnn_datatype_fp32"
_FULLY_CONNECTED, _FILTER_INPUT = "XNNFullyConnected", "filter_id"
_NO_ID = 0xFFFFFFFF
#: Embedding operators → bits of the codes, and the type of the table. None: a table of floats.
#: The first two read scales in the type that they have, the variants without ``dtype`` do not.
_EMBEDDINGS: dict[str, tuple[int | None, str]] = {
    "quantized_decomposed::embedding_4bit.dtype_out": (4, "BYTE"),
    "quantized_decomposed::embedding_byte.dtype_out": (8, "CHAR"),
    "aten::embedding.out": (None, "FLOAT"),
}


@dataclass(frozen=True)
class _Place:
    """A constant that a node reads: its value in the graph, and how the node reads it."""

    graph: Graph
    tensor: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    is_filter: bool


def read_weights(
    contents: Contents, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, Weight]]:
    """Every weight: name, place (filter, constant or table), and its codes and scales or floats.

    A tied embedding is given as the lookup table and as the output layer's filter. Raises
    InputError, at the end, for the first weight that cannot be decoded, or for a filter under a
    name that the checkpoint does not have.
    """
    named, plan, problems = contents.named(), contents.plan("forward"), list[InputError]()
    orders = row_orders(quantized.config)
    places = dict[str, list[_Place]]()
    for graph in _called_graphs(contents, plan):
        for name, place in _constants(graph):
            places.setdefault(name, []).append(place)
    for name in quantized.schemes:
        for place in places.pop(name, []):
            try:
                weight = _decode(name, place, named)
            except InputError as error:
                problems.append(error)
                continue
            kind = "filter" if isinstance(weight, QuantizedTensor) else "constant"
            yield name, kind, _as_in_checkpoint(name, weight, orders.get(name))
        if name == EMBEDDING:
            yield EMBEDDING, "table", _embedding_table(contents, plan)
    for name, (place, *_) in places.items():
        if place.tensor["datatype"] != _FLOAT:
            text = f"multiplies by {name!r}, which is no weight of the checkpoint"
            problems.append(contents.problem(text))
    if problems:
        raise problems[0]


def _as_in_checkpoint(name: str, weight: Weight, order: Source | None) -> Weight:
    """The weight with its rows and columns in their original order. Weights of another shape than
    the checkpoint's stay as they are."""
    rows = weight.codes if isinstance(weight, QuantizedTensor) else weight
    if order is not None and (order.rows is None or len(rows) != len(order.rows)):
        order = None
    if not isinstance(weight, QuantizedTensor):
        return weight if order is None else order.restore(weight)
    codes, scales = weight.codes, weight.scales
    if name == EMBEDDING and weight.scheme.bits == 4:
        codes = exchange_columns(codes)
    if order is not None:
        codes, scales = order.restore(codes), order.restore(scales)
    return QuantizedTensor(codes, scales, weight.scheme)


def _called_graphs(contents: Contents, plan: Mapping[str, Any]) -> Iterator[Graph]:
    """The graph of each delegate that an instruction calls."""
    graphs = {index: graph for _, index, graph in read_graphs(contents, plan)}
    called = dict.fromkeys(
        call["DelegateCall"]["delegate_index"]
        for call in _instructions(plan)
        if "DelegateCall" in call
    )
    for index in called:
        if index not in graphs:
            raise contents.problem(f"calls delegate {index}, which is no XNNPACK graph")
        yield graphs[index]


def _instructions(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for chain in plan["chains"] or []:
        for instruction in chain["instructions"] or []:
            yield instruction["instr_args"] or {}


def _constants(graph: Graph) -> Iterator[tuple[str, _Place]]:
    """Every constant that the outputs depend on, with its name; once for each way to read it."""
    values, seen = graph.values(), set[tuple[int, bool]]()
    for kind, fields in _needed(graph):
        for name, identifier in _inputs(fields):
            if identifier not in values:
                raise graph.problem(f"has a {kind} whose {name} is {identifier}, which is no value")
            tensor, quantization = values[identifier]
            is_filter = kind == _FULLY_CONNECTED and name == _FILTER_INPUT
            if not tensor["constant_buffer_idx"] or (identifier, is_filter) in seen:
                continue
            seen.add((identifier, is_filter))
            key = graph.constant(tensor["constant_buffer_idx"])["named_key"]
            if not key:
                raise graph.problem(f"has a {kind} that reads a constant without a name")
            yield key, _Place(graph, tensor, quantization, is_filter)


def _needed(graph: Graph) -> list[tuple[str, Mapping[str, Any]]]:
    """The nodes that an output depends on."""
    outputs = graph.fields["output_ids"]
    needed, found = set[int]([] if outputs is None else outputs.tolist()), []
    for kind, fields in reversed(list(graph.nodes())):
        if any(fields[name] in needed for name in fields if _is_output(name)):
            needed.update(identifier for _, identifier in _inputs(fields))
            found.append((kind, fields))
    return found[::-1]


def _inputs(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in fields.items():
        if name.endswith("_id") and not _is_output(name) and value != _NO_ID:
            yield name, value


def _is_output(name: str) -> bool:
    return name.startswith("output_") and name.endswith("_id")


def _decode(name: str, place: _Place, named: Mapping[str, memoryview]) -> Weight:
    """The weight as its value in the graph describes it. Raises InputError."""
    kind, dims = place.tensor["datatype"], tuple(_list(place.tensor["dims"]))

    def data(index: int, dtype: str, count: int) -> np.ndarray:
        entry = place.graph.constant(index)
        content = named.get(entry["named_key"] or "")
        size = count * np.dtype(dtype).itemsize
        if content is None or len(content) < size or entry["size"] != size:
            stored = "is not in the file" if content is None else f"has {len(content)} bytes"
            raise InputError(
                name, f"{entry['named_key']} {stored}; {kind}{list(dims)} needs {size}"
            )
        values: np.ndarray = np.frombuffer(content, dtype, count).copy()
        return values

    index = place.tensor["constant_buffer_idx"]
    if kind == _FLOAT and place.quantization is None:
        return torch.from_numpy(data(index, "<f4", math.prod(dims)).reshape(dims))
    matrix = len(dims) == 2 and min(dims) > 0
    if kind not in _BITS or not matrix or not place.quantization or not place.is_filter:
        raise InputError(name, f"is read as {kind}{list(dims)}, which is no weight's form")
    [(parameters, fields)] = place.quantization.items()
    grouped = parameters == "PerChannelGroupQuant"
    if fields.get("channel_dim") != 0 or grouped != (kind == "xnn_datatype_qbint4"):
        raise InputError(name, f"is read as {kind} with {parameters} along another dimension")
    group = fields["group_size"] if grouped else dims[1]
    bits = _BITS[kind]
    if group < 1 or dims[1] % group or dims[1] * bits % 8:
        raise InputError(name, f"is read in groups of {group}, which do not divide {dims[1]}")
    count = dims[0] * (dims[1] // group)
    if _list(fields["scale"]) or fields["num_scales"] != count:
        raise InputError(name, f"has {fields['num_scales']} scales, and its shape needs {count}")
    codes = data(index, "u1", math.prod(dims) * bits // 8)
    if grouped:
        scales = _from_bfloat16(data(fields["scale_buffer_idx"], "<i2", count))
    else:
        scales = torch.from_numpy(data(fields["scale_buffer_idx"], "<f4", count))
    scheme = Scheme(bits, group if grouped else None)
    return _unpacked(codes.reshape(dims[0], -1), scales, scheme, FILTER)


def _unpacked(codes: np.ndarray, scales: Tensor, scheme: Scheme, packing: Packing) -> Weight:
    rows = len(codes)
    values = packing.unpack(torch.from_numpy(codes.view(np.uint8)), scheme.code_bits)
    return QuantizedTensor(values, scales.reshape(rows, -1), scheme)


def _from_bfloat16(values: np.ndarray) -> Tensor:
    """Floats from the bits of bfloat16 numbers."""
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).to(torch.float32)


def _embedding_table(contents: Contents, plan: Mapping[str, Any]) -> Weight:
    """The lookup table, as the arguments of the one embedding instruction describe it.

    As in a filter, scales per group are bfloat16, and scales per row are float32.
    """
    operators = [f"{one['name']}.{one['overload']}" for one in plan["operators"] or []]
    lookups = [
        (operators[call["KernelCall"]["op_index"]], _list(call["KernelCall"]["args"]))
        for call in _instructions(plan)
        if "KernelCall" in call
        and 0 <= call["KernelCall"]["op_index"] < len(operators)
        and "embedding" in operators[call["KernelCall"]["op_index"]]
    ]
    if len(lookups) != 1 or lookups[0][0] not in _EMBEDDINGS or len(lookups[0][1]) < 5:
        raise InputError(EMBEDDING, f"is looked up by {[name for name, _ in lookups]}")
    operator, arguments = lookups[0]

    def value(index: int) -> Any:
        return contents.entry(plan["values"], arguments[index], "value")["val"]

    bits, kind = _EMBEDDINGS[operator]
    table = _constant(contents, value(0), kind)
    if bits is None:
        return torch.from_numpy(table.astype(np.float32))
    lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
    limits = [(value(index) or {}).get("Int", {}).get("int_val") for index in (3, 4)]
    if limits != [lowest, highest] or (value(2) or {"Null": {}}) != {"Null": {}}:
        raise InputError(
            EMBEDDING,
            f"is looked up with codes from {limits[0]} to {limits[1]}, or with zero points",
        )
    grouped = _scalar_type(value(1)) == "BFLOAT16"
    numbers = _constant(contents, value(1), "BFLOAT16" if grouped else "FLOAT").copy()
    scales = _from_bfloat16(numbers) if grouped else torch.from_numpy(numbers)
    rows, columns = len(table), table.size // max(1, len(table)) * 8 // bits
    groups = scales.numel() // max(1, rows)
    if table.ndim != 2 or scales.shape[:1] != (rows,) or not groups or columns % groups:
        raise InputError(
            EMBEDDING, f"has {list(scales.shape)} scales for codes [{rows}, {columns}]"
        )
    if not grouped and groups > 1:
        raise InputError(EMBEDDING, "has scales per group that are not bfloat16")
    scheme = Scheme(bits, columns // groups if grouped else None)
    return _unpacked(table.copy(), scales, scheme, TABLE)


def _scalar_type(value: Any) -> str | None:
    tensor = (value or {}).get("Tensor")
    return None if tensor is None else tensor["scalar_type"]


def _constant(contents: Contents, value: Any, kind: str) -> np.ndarray:
    tensor = (value or {}).get("Tensor")
    content = None if tensor is None else contents.content(tensor)
    if (
        tensor is None
        or tensor["scalar_type"] != kind
        or content is None
        or content.ndim not in (1, 2)
    ):
        raise InputError(EMBEDDING, f"is looked up in what is no constant of type {kind}")
    if _list(tensor["dim_order"]) != list(range(content.ndim)) or tensor["storage_offset"]:
        raise InputError(EMBEDDING, "is looked up in a table of another memory layout")
    return content


def _list(array: Any) -> list[int]:
    return [] if array is None else array.tolist()
