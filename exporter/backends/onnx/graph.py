"""An ONNX graph and its data file, written down node by node.

Large tensors go to one external file at offsets that a runtime can map; two tensors may be the
same bytes there, which is how the tied embedding is stored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import Tensor

#: Pages are mapped whole: offsets of external tensors are multiples of this.
PAGE = 4096
#: Tensors below this many bytes stay in the graph itself.
_INLINE_BYTES = 16384
CONTRIB = "com.microsoft"

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
    """A graph under construction; `data` receives the external tensors, named `location`."""

    location: str
    data: BinaryIO
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _initializers: dict[str, TensorProto] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)
    _offset: int = 0

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output, which is returned."""
        return self.ops(kind, inputs, [self.fresh(kind)], domain, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[str]:
        """A node with named outputs; '' leaves an output out."""
        name = next(output for output in outputs if output)
        self._nodes.append(
            helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def rename(self, value: str, name: str) -> None:
        """Give the output of the last node its final name."""
        outputs = self._nodes[-1].output
        outputs[list(outputs).index(value)] = name

    def integers(self, *values: int) -> str:
        """A constant vector of int64; the same for the same values."""
        name = f"integers_{'_'.join(map(str, values))}"
        if name not in self._initializers:
            self._add(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def scalar(self, value: int, kind: int = TensorProto.INT64) -> str:
        name = f"scalar_{value}_{kind}"
        if name not in self._initializers:
            self._add(helper.make_tensor(name, kind, [], [value]))
        return name

    def tensor(self, name: str, kind: int, dims: Sequence[int], content: bytes) -> str:
        """A constant: `content` is its little-endian bytes."""
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
        """Another constant made of the same bytes as `of`."""
        if name in self._initializers:
            return name
        source = self._initializers[of]
        if source.data_location != TensorProto.EXTERNAL:
            self._add(TensorProto(name=name, data_type=kind, dims=dims, raw_data=source.raw_data))
            return name
        place = {entry.key: entry.value for entry in source.external_data}
        self._add_external(name, kind, dims, int(place["offset"]), int(place["length"]))
        return name

    def model(self, opset: int, metadata: dict[str, str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._initializers.values())
        )
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
        """A name that no other value has."""
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return f"{stem}_{count}"


def float_bytes(x: Tensor, kind: int) -> bytes:
    """x as FLOAT or FLOAT16 bytes."""
    dtype = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    content: bytes = x.float().numpy().astype(dtype).tobytes()
    return content
