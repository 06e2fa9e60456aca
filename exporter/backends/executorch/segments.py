"""The decoder's operations as XNNPACK graphs, all except embedding, KV cache and attention.

A segment is one graph. It extends from one attention to the next: it ends a layer (output
projection, MLP) and begins the next one (normalization, q, k, v, RoPE). Its inputs are the values
of earlier segments that its operations use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch import Tensor

from exporter.backends.executorch import Target
from exporter.backends.executorch.graph import INFERRED, XnnpackGraph
from exporter.model.config import EMBEDDING, ModelConfig
from exporter.model.equivalent import Source, equivalent
from exporter.model.walk import walk
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: The axis of a head's numbers in [1, seq, heads, head_dim].
_IN_HEAD = 3


@dataclass(eq=False)
class Value:
    """A value of the walk, and the index of the segment that computes it (-1: the embedding)."""

    segment: int


@dataclass
class _Node:
    """A recorded operation. `write(graph, *inputs)` adds it to a graph and returns its outputs."""

    write: Callable[..., list[int]]
    inputs: list[Value]
    outputs: list[Value]


@dataclass
class Segment:
    """The operations of one graph, with its inputs and outputs in order.

    Inputs are the hidden states `carried` over from earlier segments [1, seq, hidden_size], the
    result of the attention before it (`attended`), and the rows of RoPE if it `rotates`. With
    `last_token`, they have only the positions whose logits a call gives. Outputs are the hidden
    states `kept` for later segments, and then the `queries_keys_values` of the next attention or
    the `logits`.
    """

    index: int
    attended: Value | None = None
    nodes: list[_Node] = field(default_factory=list)
    carried: list[Value] = field(default_factory=list)
    kept: list[Value] = field(default_factory=list)
    queries_keys_values: list[Value] = field(default_factory=list)
    logits: list[Value] = field(default_factory=list)
    rotates: bool = False
    last_token: bool = False


class Segments:
    """The operations of the walk. They record `segments`, which `graph` turns into graphs."""

    def __init__(self, quantized: QuantizedCheckpoint, target: Target) -> None:
        self.quantized, self.config, self.context = quantized, quantized.config, target.max_context
        self.orders = row_orders(quantized.config)
        self.portable, self.logits = target.attention == "portable", target.logits
        self.named_data = NamedDataStore()
        self.segments = [Segment(0)]
        self.embedded = Value(-1)
        walk(self.config, self)

    def graph(self, index: int) -> XnnpackGraph:
        """The graph of a segment. Its weights are added to `named_data`."""
        segment, config = self.segments[index], self.config
        g, ids = XnnpackGraph(self.named_data), dict[Value, int]()
        length = 1  # a call's may be greater: XNNPACK's memory grows with it, and never shrinks
        for value in segment.carried:
            ids[value] = g.input(1, length, config.hidden_size)
        attention = self._attention_inputs(g, length) if segment.attended else []
        if segment.rotates:
            self._cos, self._sin = (g.input(1, length, 1, config.head_dim) for _ in range(2))
        if segment.attended:
            width = config.num_attention_heads * config.head_dim
            attended = self._portable_attention(g, *attention) if self.portable else attention[0]
            ids[segment.attended] = g.reshape(attended, 1, INFERRED, width)
        for node in segment.nodes:
            results = node.write(g, *(ids[value] for value in node.inputs))
            ids.update(zip(node.outputs, results, strict=True))
        for value in (*segment.kept, *segment.queries_keys_values, *segment.logits):
            g.output(ids[value])
        return g

    def _record(
        self, write: Callable[..., list[int]], *inputs: Value, outputs: int = 1
    ) -> list[Value]:
        """Record an operation of the current segment. Returns its results."""
        segment = self.segments[-1]
        for value in inputs:
            if value.segment < segment.index and value not in segment.carried:
                segment.carried.append(value)
                if value is not self.embedded:
                    self._keep(value)
        results = [Value(segment.index) for _ in range(outputs)]
        segment.nodes.append(_Node(write, list(inputs), results))
        return results

    def _keep(self, value: Value) -> None:
        """Make a value an output of the segment that computes it."""
        kept = self.segments[value.segment].kept
        if value not in kept:
            kept.append(value)

    def embed(self, weight: str) -> Value:
        """The program looks up the rows before the first segment."""
        return self.embedded

    def linear(self, x: Value, *weights: str) -> list[Value]:
        return self._record(lambda g, x: self._multiply_by(g, x, weights), x, outputs=len(weights))

    def norm(self, x: Value, weight: str) -> Value:
        return self._record(lambda g, x: [self._norm(g, x, weight)], x)[0]

    def heads(self, x: Value, count: int) -> Value:
        shape = 1, INFERRED, count, self.config.head_dim
        return self._record(lambda g, x: [g.reshape(x, *shape)], x)[0]

    def norm_heads(self, x: Value, weight: str | None) -> Value:
        return self._record(lambda g, x: [self._norm(g, x, weight)], x)[0]

    def rotate(self, x: Value) -> Value:
        """RoPE as x * cos + (x with exchanged halves) * sin, with the rows of the program.

        In every architecture it rotates the halves of a head: see `row_orders`.
        """

        def write(g: XnnpackGraph, x: int) -> list[int]:
            half = self.config.head_dim // 2
            low, high = (g.slice(x, _IN_HEAD, start, half) for start in (0, half))
            exchanged = g.concatenate(high, low, _IN_HEAD)
            return [g.add(g.multiply(x, self._cos), g.multiply(exchanged, self._sin))]

        self.segments[-1].rotates = True
        return self._record(write, x)[0]

    def attend(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        """End the segment. The next one begins with the result of the program's attention."""
        self.segments[-1].queries_keys_values = [q, k, v]
        attended = Value(len(self.segments))
        self.segments.append(Segment(attended.segment, attended))
        return attended

    def last_token(self, x: Value) -> Value:
        """The program slices the inputs of the segment, which has no operations yet."""
        segment = self.segments[-1]
        assert not segment.nodes
        segment.last_token = True
        return x

    def silu_product(self, gate: Value, up: Value) -> Value:
        def write(g: XnnpackGraph, gate: int, up: int) -> list[int]:
            return [g.multiply(g.multiply(gate, g.sigmoid(gate)), up)]

        return self._record(write, gate, up)[0]

    def add(self, x: Value, y: Value) -> Value:
        return self._record(lambda g, x, y: [g.add(x, y)], x, y)[0]

    def output(self, x: Value, weight: str) -> Value:
        [logits] = self._record(lambda g, x: [self._output_layer(g, x, weight)], x)
        self.segments[-1].logits = [logits]
        return logits

    def _output_layer(self, g: XnnpackGraph, x: int, weight: str) -> int:
        config, stored = self.config, self.quantized.read(weight)
        rows: tuple[int, ...] = (1,) if self.logits == 1 else (1, INFERRED)
        tied = weight == EMBEDDING
        if tied and isinstance(stored, QuantizedTensor) and stored.scheme.bits == 4:
            # The embedding kernel and XNNPACK read nibbles in opposite order. If adjacent columns
            # of the filter are swapped, both read the same bytes, and these are stored once.
            swap = g.constant("output.exchange", torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
            x = g.linear(g.reshape(x, 1, rows[-1], config.hidden_size // 2, 2), swap)
            stored = QuantizedTensor(exchange_columns(stored.codes), stored.scales, stored.scheme)
        # Not the logits are reshaped: these are many times as many, and XNNPACK would copy them.
        x = g.reshape(x, *rows, config.hidden_size)
        return self._products(g, x, {weight: stored})[0]

    def _multiply_by(self, g: XnnpackGraph, x: int, names: Sequence[str]) -> list[int]:
        """x times each weight, with its rows in the order of the graphs."""
        weights = {name: self.quantized.read(name) for name in names}
        for name in self.orders.keys() & weights:
            weights[name] = reorder(self.orders[name], weights[name])
        return self._products(g, x, weights)

    def _products(
        self, g: XnnpackGraph, x: int, weights: Mapping[str, QuantizedTensor | Tensor]
    ) -> list[int]:
        """x times each weight. x is quantized once for all quantized weights.

        The products are not merged into one, such as q, k and v: on x86 a prompt is then read 2 to
        4 % slower, since XNNPACK copies the parts, and decoding is not faster.
        """
        quantized = None
        results = []
        for name, weight in weights.items():
            if isinstance(weight, QuantizedTensor):
                quantized = g.quantize(x) if quantized is None else quantized
                results.append(g.linear(quantized, g.weight(name, weight)))
            else:
                results.append(g.linear(x, g.constant(name, weight)))
        return results

    def _norm(self, g: XnnpackGraph, x: int, name: str | None) -> int:
        """RMS norm, with a weight if `name` is given. A linear layer computes the mean of the
        squares: its weights are 1 / width, and its bias is epsilon.

        XNNPACK's own mean needs two more nodes, and takes more instructions on Arm.
        """
        weight = self.quantized.float_weight(name) if name else None
        width = self.config.head_dim if weight is None else len(weight)
        row = g.constant(f"norm.mean_{width}", torch.full((1, width), 1 / width))
        eps = g.constant("norm.eps", torch.tensor([self.config.rms_norm_eps]))
        mean = g.linear(g.multiply(x, x), row, eps)
        normal = g.multiply(x, g.reciprocal_square_root(mean))
        return normal if weight is None else g.multiply(normal, g.constant(name or "", weight))

    def _attention_inputs(self, g: XnnpackGraph, length: int) -> list[int]:
        config, context = self.config, self.context
        q = g.input(1, length, config.num_attention_heads, config.head_dim)
        if not self.portable:
            return [q]
        kv_heads = config.num_key_value_heads
        group = config.num_attention_heads // kv_heads
        keys = g.input(kv_heads, context, config.head_dim)
        values = g.input(kv_heads, context, config.head_dim)
        return [q, keys, values, g.input(group * length, context)]

    def _portable_attention(
        self, g: XnnpackGraph, q: int, keys: int, values: int, mask: int
    ) -> int:
        """Attention over these keys. Query heads that share a k/v head are stacked as rows."""
        config = self.config
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // kv_heads
        scale = g.constant("attention.scale", torch.tensor([head_dim**-0.5]))
        q = g.reshape(g.multiply(q, scale), INFERRED, kv_heads, group, head_dim)
        q = g.reshape(g.transpose(q, 1, 2, 0, 3), kv_heads, INFERRED, head_dim)
        probabilities = g.softmax(g.add(g.matmul_transposed(q, keys), mask))
        mixed = g.reshape(g.matmul(probabilities, values), kv_heads, group, INFERRED, head_dim)
        return g.transpose(mixed, 2, 0, 1, 3)


def row_orders(config: ModelConfig) -> Mapping[str, Source]:
    """The weights of queries and keys whose rows are in another order in the graphs.

    Where RoPE rotates adjacent numbers of a head, the rows of each head are reordered, so that it
    rotates halves, which are cheap to exchange. Scores q·k do not change if q and k are permuted
    alike (`exporter.model.equivalent`).
    """
    sources = equivalent(config, rope_interleaved=False).sources.values()
    return {one.name: one for one in sources if one.name and one.rows is not None}


def reorder(order: Source, weight: QuantizedTensor | Tensor) -> QuantizedTensor | Tensor:
    """A weight with its rows in the order of the graphs."""
    if isinstance(weight, Tensor):
        return order.reorder(weight)
    codes, scales = order.reorder(weight.codes), order.reorder(weight.scales)
    return replace(weight, codes=codes, scales=scales)


def exchange_columns(codes: Tensor) -> Tensor:
    """Swap each pair of adjacent columns of codes [rows, columns]."""
    exchanged: Tensor = codes.unflatten(1, (-1, 2)).flip(-1).flatten(1).contiguous()
    return exchanged
