"""Build an ONNX graph node by node, and write its data file.

Large tensors go to one external data file, at offsets that a runtime can memory-map. Two tensors
may share bytes there: this is how a tied embedding is stored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

#: Offsets of external tensors are multiples of the page size, for memory mapping.
PAGE = 4096
#: Tensors with fewer bytes are stored in the graph itself.
_INLINE_BYTES = 16384
#: The domain of ONNX Runtime's own operators.
CONTRIB = "com.microsoft"

#: Element type → bits of a value.
_SIZES: dict[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.FLOAT16: 16,
    TensorProto.INT64: 64,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.INT4: 4,
}


@dataclass
class OnnxGraph:
    """A graph under construction. External tensors go to `data`, a file named `location`."""

    location: str
    data: BinaryIO
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _initializers: dict[str, TensorProto] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)
    _widened: set[str] = field(default_factory=set)
    _offset: int = 0

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare an input of element type `kind`. Returns its name."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """Declare an output of element type `kind`. Returns its name."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output. Returns the output's name."""
        return self.ops(kind, inputs, [self.fresh(kind)], domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[str]:
        """Add a node with named outputs, '' for one that is not used. Returns the names."""
        name = next(output for output in outputs if output)
        self._nodes.append(
            helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def rename(self, value: str, name: str) -> None:
        """Rename an output of the last node."""
        outputs = self._nodes[-1].output
        outputs[list(outputs).index(value)] = name

    def integers(self, *values: int) -> str:
        """A constant int64 vector. Equal vectors are stored once."""
        name = f"integers_{'_'.join(map(str, values))}"
        if name not in self._initializers:
            self._add(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def scalar(self, value: int, kind: int = TensorProto.INT64) -> str:
        """A constant scalar. Equal scalars are stored once."""
        name = f"scalar_{value}_{kind}"
        if name not in self._initializers:
            self._add(helper.make_tensor(name, kind, [], [value]))
        return name

    def tensor(self, name: str, kind: int, dims: Sequence[int], content: bytes) -> str:
        """A constant of element type `kind`. `content` is its little-endian bytes."""
        if name in self._initializers:
            return name
        assert len(content) * 8 == int(np.prod(dims)) * _SIZES[kind], name
        if len(content) < _INLINE_BYTES:
            self._add(TensorProto(name=name, data_type=kind, dims=dims, raw_data=content))
            return name
        padding = -self._offset % PAGE
        self.data.write(b"\0" * padding)
        self._offset += padding
        self._add_external(name, kind, dims, self._offset, len(content))
        self.data.write(content)
        self._offset += len(content)
        return name

    def alias(self, name: str, of: str, kind: int, dims: Sequence[int]) -> str:
        """A constant with the same bytes as the constant `of`."""
        if name in self._initializers:
            return name
        source = self._initializers[of]
        if source.data_location != TensorProto.EXTERNAL:
            self._add(TensorProto(name=name, data_type=kind, dims=dims, raw_data=source.raw_data))
            return name
        place = {entry.key: entry.value for entry in source.external_data}
        self._add_external(name, kind, dims, int(place["offset"]), int(place["length"]))
        return name

    def widened(self, name: str) -> str:
        """The FLOAT16 constant `name` as FLOAT. Returns the name of that value.

        However often it is asked for, one node converts the constant. A runtime does so once, when
        it loads the model, and drops the float16 values.
        """
        value = f"{name}.float"
        if value not in self._widened:
            self._widened.add(value)
            self.ops("Cast", [name], [value], to=TensorProto.FLOAT)
        return value

    def model(self, opset: int, metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished model, with its metadata and the constants that a node reads."""
        read = {name for node in self._nodes for name in node.input}
        initializers = [one for one in self._initializers.values() if one.name in read]
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, initializers)
        domains = [helper.make_opsetid("", opset)]
        if any(node.domain == CONTRIB for node in self._nodes):
            domains.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph,
            opset_imports=domains,
            ir_version=helper.find_min_ir_version_for(domains, ignore_unknown=True),
            producer_name="mobilellm-exporter",
        )
        helper.set_model_props(model, metadata)
        return model

    def _add(self, tensor: TensorProto) -> None:
        self._initializers[tensor.name] = tensor

    def _add_external(
        self, name: str, kind: int, dims: Sequence[int], offset: int, length: int
    ) -> None:
        tensor = TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self._add(tensor)

    def fresh(self, stem: str) -> str:
        """A new name that begins with `stem`."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return f"{stem}_{count}"


def float_bytes(x: Tensor, kind: int) -> bytes:
    """x as FLOAT or FLOAT16 bytes."""
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    content: bytes = x.float().numpy().astype(dtype).tobytes()
    return content
