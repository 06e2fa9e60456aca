"""Build and serialize XNNPACK graphs.

ExecuTorch's own partitioner finds XNNPACK's operators in a traced graph. Its twenty or so passes
trace the graph again and take minutes, though the graph of a decoder is known beforehand. Here the
same serialized graph (``XNNGraph``, a schema of the executorch wheel) is built node by node. The
weights have the names of the checkpoint's tensors, so that they can be read back from the .pte.

Values are integers, as in XNNPACK. Shapes are those of the longest input: XNNPACK reshapes at run
time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    serialize_xnnpack_binary,
)
from executorch.exir._serialize._named_data_store import NamedDataStore

from exporter.backends.executorch.schemes import FILTER
from exporter.quantization.schemes import QuantizedTensor

_TYPES = schema.XNNDatatype
#: Bits of the codes → XNNPACK's datatype of weights with a scale per group, or per row.
_GROUP_TYPES = {4: _TYPES.xnn_datatype_qbint4}
_ROW_TYPES = {4: _TYPES.xnn_datatype_qcint4, 8: _TYPES.xnn_datatype_qcint8}
_NO_ID = 0xFFFFFFFF
_EXTERNAL_INPUT, _EXTERNAL_OUTPUT = 1, 2
_TRANSPOSE_B = 1
_NAMED_OFFSET = 0xFFFFFFFFFFFFFFFF
#: A dimension that XNNPACK infers from the number of elements.
INFERRED = 0
#: As the size of a slice: the whole dimension.
_WHOLE = 0


def filter_bytes(weight: QuantizedTensor) -> bytes:
    """The codes of a weight as XNNPACK reads them."""
    return FILTER.pack(weight.codes, weight.scheme.code_bits).contiguous().numpy().tobytes()


def scales_name(name: str) -> str:
    """The name under which the scales of a weight are stored."""
    return f"{name}.scales"


def stored_scales(weight: QuantizedTensor) -> torch.Tensor:
    """Scales per group as bfloat16, scales per row as float32. Both hold our scales exactly."""
    return weight.scales.to(torch.bfloat16) if weight.scheme.group_size else weight.scales


def scale_bytes(weight: QuantizedTensor) -> bytes:
    """The scales of a weight as XNNPACK reads them."""
    data: bytes = stored_scales(weight).contiguous().view(torch.uint8).numpy().tobytes()
    return data


@dataclass
class XnnpackGraph:
    """An XNNPACK graph. Its inputs and outputs are in the order of `input` and `output` calls."""

    named_data: NamedDataStore
    _nodes: list[schema.XNode] = field(default_factory=list)
    _values: list[schema.XValue] = field(default_factory=list)
    _dims: list[list[int]] = field(default_factory=list)
    _inputs: list[int] = field(default_factory=list)
    _outputs: list[int] = field(default_factory=list)
    _data: list[schema.ConstantDataOffset] = field(
        default_factory=lambda: [schema.ConstantDataOffset(0, 0)]
    )
    _constants: dict[str, int] = field(default_factory=dict)

    def input(self, *dims: int) -> int:
        """A new float32 input."""
        value = self._value(dims, external=len(self._inputs), flags=_EXTERNAL_INPUT)
        self._inputs.append(value)
        return value

    def output(self, value: int) -> None:
        """Make `value` an output. All inputs must have been declared before."""
        tensor = self._tensor(value)
        tensor.external_id = len(self._inputs) + len(self._outputs)
        tensor.flags = _EXTERNAL_OUTPUT
        self._outputs.append(value)

    def constant(self, name: str, tensor: torch.Tensor) -> int:
        """A float32 constant. The program stores one for each name."""
        if name not in self._constants:
            data = self._store(name, tensor.to(torch.float32).contiguous().numpy().tobytes())
            self._constants[name] = self._value(tensor.shape, data=data)
        return self._constants[name]

    def weight(self, name: str, weight: QuantizedTensor) -> int:
        """A quantized weight [out_features, in_features], stored under its checkpoint name."""
        scheme, (rows, groups) = weight.scheme, weight.scales.shape
        data = self._store(name, filter_bytes(weight))
        scales = self._store(scales_name(name), scale_bytes(weight))
        if scheme.group_size:
            kind = _GROUP_TYPES[scheme.code_bits]
            parameters: schema.XNNQuantParams = schema.PerChannelGroupQuant(
                scale=[],
                channel_dim=0,
                group_size=scheme.group_size,
                scale_buffer_idx=scales,
                num_scales=rows * groups,
            )
        else:
            kind = _ROW_TYPES[scheme.code_bits]
            parameters = schema.PerChannelQuant(
                scale=[], channel_dim=0, scale_buffer_idx=scales, num_scales=rows
            )
        return self._value(weight.codes.shape, kind, data=data, quantization=parameters)

    def quantize(self, x: int) -> int:
        """Quantize x to int8 at run time, with one scale and zero point per token."""
        result = self._value(
            self._dims[x],
            schema.XNNDatatype.xnn_datatype_qdint8,
            quantization=schema.PerTokenDynamicQuant(num_nonbatch_dims=1),
        )
        self._node(schema.XNNConvert(input_id=x, output_id=result, flags=0))
        return result

    def linear(self, x: int, weight: int, bias: int = _NO_ID) -> int:
        """x [..., in_features] times the transpose of weight [out_features, in_features], plus
        bias [out_features]."""
        result = self._value([*self._dims[x][:-1], self._dims[weight][0]])
        self._node(
            schema.XNNFullyConnected(
                input1_id=x, filter_id=weight, bias_id=bias, output_id=result, flags=0
            )
        )
        return result

    def multiply(self, a: int, b: int) -> int:
        return self._binary(schema.XNNMultiply, a, b)

    def add(self, a: int, b: int) -> int:
        return self._binary(schema.XNNAdd, a, b)

    def matmul(self, a: int, b: int) -> int:
        """a [batch, m, k] times b [batch, k, n]."""
        return self._matmul(a, b, self._dims[b][2], flags=0)

    def matmul_transposed(self, a: int, b: int) -> int:
        """a [batch, m, k] times the transpose of b [batch, n, k]."""
        return self._matmul(a, b, self._dims[b][1], flags=_TRANSPOSE_B)

    def _matmul(self, a: int, b: int, width: int, flags: int) -> int:
        result = self._value([*self._dims[a][:-1], width])
        self._node(
            schema.XNNBatchMatrixMultiply(input1_id=a, input2_id=b, output_id=result, flags=flags)
        )
        return result

    def sigmoid(self, x: int) -> int:
        return self._unary(schema.XNNSigmoid, x)

    def softmax(self, x: int) -> int:
        return self._unary(schema.XNNSoftmax, x)

    def reciprocal_square_root(self, x: int) -> int:
        return self._unary(schema.XNNReciprocalSquareRoot, x)

    def reshape(self, x: int, *shape: int) -> int:
        """x with another shape, in which at most one dimension is `INFERRED`."""
        elements = int(np.prod(self._dims[x]))
        known = int(np.prod([size for size in shape if size != INFERRED]))
        result = self._value([elements // known if s == INFERRED else s for s in shape])
        self._node(
            schema.XNNStaticReshape(
                num_dims=len(shape), new_shape=list(shape), input_id=x, output_id=result, flags=0
            )
        )
        return result

    def transpose(self, x: int, *order: int) -> int:
        """x with its dimensions in another order."""
        result = self._value([self._dims[x][axis] for axis in order])
        self._node(
            schema.XNNStaticTranspose(
                num_dims=len(order), perm=list(order), input_id=x, output_id=result, flags=0
            )
        )
        return result

    def slice(self, x: int, axis: int, start: int, size: int) -> int:
        """`size` places of x from `start` on, along an axis."""
        dims = list(self._dims[x])
        offsets, sizes = [0] * len(dims), [_WHOLE] * len(dims)
        offsets[axis], sizes[axis], dims[axis] = start, size, size
        result = self._value(dims)
        self._node(
            schema.XNNStaticSlice(
                num_dims=len(dims),
                offsets=offsets,
                sizes=sizes,
                input_id=x,
                output_id=result,
                flags=0,
            )
        )
        return result

    def concatenate(self, a: int, b: int, axis: int) -> int:
        """b after a along an axis."""
        dims = list(self._dims[a])
        dims[axis] += self._dims[b][axis]
        result = self._value(dims)
        self._node(
            schema.XNNConcatenate2(
                axis=axis,
                input1_id=a,
                input2_id=b,
                input3_id=_NO_ID,
                input4_id=_NO_ID,
                input5_id=_NO_ID,
                output_id=result,
                flags=0,
            )
        )
        return result

    def serialize(self) -> bytes:
        """The payload of the delegate. The weights are in `named_data`."""
        graph = schema.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(self._inputs) + len(self._outputs),
            input_ids=self._inputs,
            output_ids=self._outputs,
            constant_data=self._data,
        )
        payload: bytes = serialize_xnnpack_binary(graph, bytearray())
        return payload

    def _unary(self, kind: type, x: int) -> int:
        result = self._value(self._dims[x])
        self._node(kind(input_id=x, output_id=result, flags=0))
        return result

    def _binary(self, kind: type, a: int, b: int) -> int:
        """Elementwise, with NumPy's broadcasting."""
        result = self._value(np.broadcast_shapes(self._dims[a], self._dims[b]))
        self._node(kind(input1_id=a, input2_id=b, output_id=result, flags=0))
        return result

    def _node(self, node: schema.XNodeUnion) -> None:
        self._nodes.append(schema.XNode(xnode_union=node, debug_handle=len(self._nodes)))

    def _value(
        self,
        dims: Sequence[int],
        datatype: schema.XNNDatatype = schema.XNNDatatype.xnn_datatype_fp32,
        *,
        data: int = 0,
        external: int = _NO_ID,
        flags: int = 0,
        quantization: schema.XNNQuantParams | None = None,
    ) -> int:
        number = len(self._values)
        tensor = schema.XNNTensorValue(
            datatype=datatype,
            num_dims=len(dims),
            dims=list(dims),
            constant_buffer_idx=data,
            external_id=external,
            flags=flags,
            id_out=number,
        )
        value = (
            tensor
            if quantization is None
            else (schema.XNNQuantizedTensorValue(tensor_value=tensor, quant_params=quantization))
        )
        self._values.append(schema.XValue(xvalue_union=value))
        self._dims.append(list(dims))
        return number

    def _tensor(self, value: int) -> schema.XNNTensorValue:
        union = self._values[value].xvalue_union
        assert isinstance(union, schema.XNNTensorValue)
        return union

    def _store(self, name: str, data: bytes) -> int:
        self.named_data.add_named_data(name, data, alignment=16)
        self._data.append(schema.ConstantDataOffset(_NAMED_OFFSET, len(data), name))
        return len(self._data) - 1
