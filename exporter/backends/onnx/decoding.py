"""Find every weight of an ONNX model where a node reads it, and decode it as the node says.

Only nodes that an output depends on are considered. Bits, block size, shape and zero points are
those of the node and of the tensors that it reads.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from onnx import GraphProto, NodeProto, TensorProto
from torch import Tensor

from exporter.backends.onnx.contents import Contents, unique
from exporter.backends.onnx.graph import CONTRIB
from exporter.backends.onnx.layout import codes_of_bytes
from exporter.backends.onnx.schemes import CODES_OF_BYTES, UNSIGNED
from exporter.errors import InputError
from exporter.quantization.packing import TWOS_COMPLEMENT, Packing
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor, Scheme

Weight = QuantizedTensor | Tensor
#: Endings of names: tables for lookups of columns and of rows, a transposed weight, and scales.
_TABLE, _ROWS, _TRANSPOSED, _SCALES = ".table", ".rows", ".transposed", ".scales"
#: The weight of a norm over heads that has none.
_ONES = "ones"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
#: Element types of codes in standard ONNX → their bits. A lookup table of int4 is one of bytes.
_BITS: dict[int, int] = {TensorProto.INT4: 4, TensorProto.UINT8: 4, TensorProto.INT8: 8}
#: Nodes that may also read other values than constants.
_MAY_READ_OTHERS = (("", "MatMul"), ("", "Gather"))


@dataclass(frozen=True)
class _Stored:
    """A weight, or several that are merged along out_features, as a node reads it.

    `values` are codes int8 [out_features, in_features] with their `bits` and `scales`
    [out_features, blocks], or floats if there are no `bits`.
    """

    place: str
    values: Tensor
    bits: int | None = None
    scales: Tensor | None = None

    def part(self, rows: slice, like: Scheme) -> Weight:
        """The weight in these rows. One scale in all blocks of each row is one scale per row, if
        `like` is such a scheme, since operators with blocks store it in this way."""
        values = self.values[rows]
        if self.bits is None or self.scales is None:
            return values
        scales = self.scales[rows]
        if like.group_size is None and bool((scales == scales[:, :1]).all()):
            return QuantizedTensor(values, scales[:, :1].contiguous(), Scheme(self.bits))
        return QuantizedTensor(
            values, scales, Scheme(self.bits, values.shape[1] // scales.shape[1])
        )


def read_weights(
    contents: Contents, quantized: QuantizedCheckpoint
) -> Iterator[tuple[str, str, Weight]]:
    """Every weight: name, place (filter, float or table), and its codes and scales or floats.

    Merged weights are split again. A tied embedding is given as the output layer's filter and as
    the lookup table. Raises InputError, at the end, for the first weight that cannot be decoded, or
    for a tensor that is read as a weight and has another name.
    """
    shapes, problems = quantized.config.parameter_shapes(), list[InputError]()
    reads = dict[str, list[Callable[[], _Stored]]]()
    for name, node, read in _weights_read(contents):
        if all(one in shapes for one in name.split("+")):
            reads.setdefault(name, []).append(read)
        elif name != _ONES:
            text = f"{node} reads {name!r}, which is no weight of the checkpoint"
            problems.append(InputError(contents.path, text, "Lower the model again"))
    order = {name: index for index, name in enumerate(shapes)}
    for merged in sorted(reads, key=lambda merged: order[merged.split("+")[0]]):
        names = merged.split("+")
        for read in reads[merged]:
            try:
                stored, start = read(), 0
                shape = list(stored.values.shape)
                if shape[:1] != [sum(shapes[name][0] for name in names)]:
                    raise InputError(merged, f"is read as a weight of shape {shape}")
            except InputError as error:
                problems.append(error)
                continue
            for name in names:
                rows = slice(start, start + shapes[name][0])
                start = rows.stop
                yield name, stored.place, stored.part(rows, quantized.schemes[name])
    if problems:
        raise problems[0]


def needed(graph: GraphProto) -> list[NodeProto]:
    """The nodes that an output of the graph depends on, in the order of the graph."""
    nodes = list(graph.node)
    makers = {output: index for index, node in enumerate(nodes) for output in node.output}
    found, wanted = set[int](), [output.name for output in graph.output]
    while wanted:
        index = makers.get(wanted.pop())
        if index is not None and index not in found:
            found.add(index)
            wanted += filter(None, nodes[index].input)
    return [nodes[index] for index in sorted(found)]


def _weights_read(contents: Contents) -> Iterator[tuple[str, str, Callable[[], _Stored]]]:
    """Every weight that a node reads: its name, the node, and a function that decodes it."""
    graph = contents.model.graph
    tensors = unique(((one.name, one) for one in graph.initializer), "initializers")
    used = needed(graph)
    widened = dict(filter(None, (_widened(node, tensors) for node in used)))
    nodes = [_Node(node, contents, tensors, widened) for node in used]
    gathered = {node.input(0) for node in nodes if node.kind == ("", "Gather")}
    for node in nodes:
        if node.kind not in _READERS:
            continue
        index, suffix, read = _READERS[node.kind]
        stored = node.input(index)
        if stored not in tensors and node.kind in _MAY_READ_OTHERS:
            continue
        if node.kind == ("", "Gather") and stored in CODES_OF_BYTES.values():
            _check_codes_of_bytes(node)
            continue
        if stored.endswith(_SCALES) and node.kind == ("", "Gather"):
            table = stored.removesuffix(_SCALES)
            if not {table, table + _ROWS} & gathered:
                raise node.problem(f"reads {stored!r}, the scales of no table")
            continue
        coded = read is _gathered and tensors[stored].data_type in _BITS
        if coded and stored.removesuffix(_ROWS) + _SCALES not in gathered:
            raise node.problem(f"reads {stored!r} without its scales")
        yield stored.removesuffix(suffix).removesuffix(_ROWS), node.name, partial(read, node)


def _widened(node: NodeProto, tensors: Mapping[str, TensorProto]) -> tuple[str, str] | None:
    """The output and the input of a node that converts a tensor of float16 to float32. This is
    exact, so the tensor may be read in place of the output."""
    if node.domain not in ("", "ai.onnx") or node.op_type != "Cast" or len(node.input) != 1:
        return None
    tensor, wanted = tensors.get(node.input[0]), [one.i for one in node.attribute]
    if tensor is None or tensor.data_type != TensorProto.FLOAT16 or wanted != [TensorProto.FLOAT]:
        return None
    return node.output[0], node.input[0]


@dataclass(frozen=True)
class _Node:
    """A node, and the tensors that it may read.

    `widened` has the values that are tensors of float16 converted to float32: value → tensor.
    """

    node: NodeProto
    contents: Contents
    tensors: Mapping[str, TensorProto]
    widened: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.node.name or next(iter(self.node.output)))

    @property
    def kind(self) -> tuple[str, str]:
        domain = self.node.domain
        return "" if domain == "ai.onnx" else domain, self.node.op_type

    def problem(self, text: str) -> InputError:
        return InputError(self.name, text, "Lower the model again")

    def input(self, index: int) -> str:
        """The name of an input, '' for one that is left out. For a tensor that is widened before
        the node reads it, it is the name of that tensor."""
        name = str(self.node.input[index]) if index < len(self.node.input) else ""
        return self.widened.get(name, name)

    def values(self, index: int, *kinds: int) -> np.ndarray:
        """The values of an input, which must be a constant of one of these element types."""
        tensor = self.tensors.get(self.input(index))
        if tensor is None:
            raise self.problem(f"reads {self.input(index)!r} as a weight, which is no constant")
        if tensor.data_type not in kinds:
            name = TensorProto.DataType.Name(tensor.data_type)
            raise self.problem(f"reads {tensor.name!r} as values of type {name}")
        return self.contents.values(tensor)

    def floats(self, index: int) -> Tensor:
        values = self.values(index, *_FLOATS)
        return torch.from_numpy(values.astype(np.float32))

    def attribute(self, name: str, default: int = 0) -> int:
        found = [int(one.i) for one in self.node.attribute if one.name == name]
        return found[0] if len(found) == 1 else default

    def stored(
        self, place: str, codes: Tensor, bits: int, block: int, scales: np.ndarray
    ) -> _Stored:
        """A weight of codes [rows, columns] in blocks. Raises InputError if `scales`, one for each
        row and block in this order, do not fit."""
        rows, columns = codes.shape
        if block < 1 or columns % block or scales.size != rows * (columns // block):
            raise self.problem(
                f"reads {scales.size} scales for {rows} rows of {columns} codes in blocks of "
                f"{block}"
            )
        floats = torch.from_numpy(scales.astype(np.float32))
        return _Stored(place, codes, bits, floats.reshape(rows, -1))

    def unpacked(self, codes: np.ndarray, packing: Packing, bits: int) -> Tensor:
        """Codes [a, b] that are stored as bytes [a, b * bits / 8]. Raises InputError."""
        if bits not in packing.offsets or codes.ndim != 2 or not codes.size:
            raise self.problem(f"reads its weight with {bits} bits in shape {list(codes.shape)}")
        return packing.unpack(torch.from_numpy(codes.view(np.uint8).copy()), bits)


def _multiplied_in_blocks(node: _Node) -> _Stored:
    """MatMulNBits: codes [N, blocks, bytes], scales [N, blocks]."""
    rows, columns = node.attribute("N"), node.attribute("K")
    bits, block = node.attribute("bits", 4), node.attribute("block_size")
    codes = node.values(1, TensorProto.UINT8)
    fits = min(rows, columns) > 0 and codes.size * 8 == rows * columns * bits
    if not fits or any(map(node.input, range(3, 6))):
        raise node.problem(f"reads its weight as [{rows}, {columns}], or with zero points or bias")
    unpacked = node.unpacked(codes.reshape(rows, -1), UNSIGNED, bits)
    return node.stored("filter", unpacked, bits, block, node.values(2, *_FLOATS))


def _check_codes_of_bytes(node: _Node) -> None:
    """A lookup of the codes in bytes must decode them as `unsigned_bytes` packs them."""
    bits = next(bits for bits, name in CODES_OF_BYTES.items() if name == node.input(0))
    found, expected = node.floats(0), codes_of_bytes(bits).float()
    if node.attribute("axis") or not torch.equal(found, expected):
        raise node.problem(f"decodes bytes of codes of {bits} bits in another way")


def _looked_up(node: _Node) -> _Stored:
    """Gather of rows of bytes, whose codes a constant has: codes [rows, bytes], scales [rows,
    blocks]."""
    known = [bits for bits, name in CODES_OF_BYTES.items() if name in node.tensors]
    if node.attribute("axis") or len(known) != 1:
        raise node.problem("looks up along another axis, or codes of unknown bits")
    codes = node.unpacked(node.values(0, TensorProto.UINT8), UNSIGNED, known[0])
    name = node.input(0).removesuffix(_ROWS) + _SCALES
    scales = _Node(NodeProto(input=[name]), node.contents, node.tensors).values(0, *_FLOATS)
    block = codes.shape[1] // max(1, scales.shape[-1] if scales.ndim else 0)
    return node.stored("table", codes, known[0], block, scales)


def _multiplied_by_rows(node: _Node) -> _Stored:
    """DynamicQuantizeMatMul: codes [in_features, out_features], one scale for each column."""
    codes = node.values(1, TensorProto.INT8)
    if any(map(node.input, (3, 4))):
        raise node.problem("reads its weight with zero points or bias")
    rows = node.unpacked(codes, TWOS_COMPLEMENT, 8).t().contiguous()
    return node.stored("filter", rows, 8, rows.shape[1], node.values(2, *_FLOATS))


def _dequantized(node: _Node) -> _Stored:
    """DequantizeLinear: codes [in_features, out_features], scales [blocks, out_features]."""
    codes = node.values(0, TensorProto.INT4, TensorProto.INT8)
    tensor = node.tensors[node.input(0)]
    if node.attribute("axis", 1) != 0 or node.input(2) or len(tensor.dims) != 2:
        raise node.problem("dequantizes along another axis, or with zero points")
    bits = _BITS[tensor.data_type]
    if tensor.dims[1] * bits % 8:
        raise node.problem(f"dequantizes {tensor.dims[1]} columns of codes of {bits} bits")
    stored, block = codes.reshape(tensor.dims[0], -1), node.attribute("block_size")
    return _transposed(node, "filter", stored, bits, block, node.values(1, *_FLOATS))


def _transposed(
    node: _Node, place: str, codes: np.ndarray, bits: int, block: int, scales: np.ndarray
) -> _Stored:
    """A weight from codes [in_features, bytes] and scales [blocks, out_features]."""
    unpacked = node.unpacked(codes, TWOS_COMPLEMENT, bits)
    columns, rows = unpacked.shape
    if scales.ndim != 2 or scales.shape[1] != rows:
        raise node.problem(f"reads scales {list(scales.shape)} for codes [{columns}, {rows}]")
    return node.stored(place, unpacked.t().contiguous(), bits, block, scales.T)


def _gathered(node: _Node) -> _Stored:
    """Gather of rows of a table of floats, or of columns of codes whose scales another Gather looks
    up."""
    name = node.input(0)
    if name.endswith(_ROWS):
        return _looked_up(node)
    bits = _BITS.get(node.tensors[name].data_type)
    if node.attribute("axis") != (0 if bits is None else 1):
        raise node.problem(f"looks up along the axis {node.attribute('axis')}")
    if bits is None:
        return _Stored("float", node.floats(0))
    codes = node.values(0, *_BITS)
    scales = _Node(NodeProto(input=[name + _SCALES]), node.contents, node.tensors)
    found = scales.values(0, *_FLOATS)
    return _transposed(node, "table", codes, bits, len(codes) // max(1, len(found)), found)


def _multiplied_floats(node: _Node) -> _Stored:
    """MatMul by the transpose of a weight."""
    return _Stored("float", node.floats(1).t().contiguous())


def _norm(node: _Node, index: int) -> _Stored:
    return _Stored("float", node.floats(index))


#: Node kind → which input is a weight, the ending of its name, and how it is decoded.
_READERS: dict[tuple[str, str], tuple[int, str, Callable[[_Node], _Stored]]] = {
    (CONTRIB, "MatMulNBits"): (1, "", _multiplied_in_blocks),
    (CONTRIB, "DynamicQuantizeMatMul"): (1, _TRANSPOSED, _multiplied_by_rows),
    ("", "DequantizeLinear"): (0, "", _dequantized),
    ("", "MatMul"): (1, _TRANSPOSED, _multiplied_floats),
    ("", "Gather"): (0, _TABLE, _gathered),
    ("", "SimplifiedLayerNormalization"): (1, "", partial(_norm, index=1)),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): (2, "", partial(_norm, index=2)),
    ("", "RMSNormalization"): (1, "", partial(_norm, index=1)),
}
