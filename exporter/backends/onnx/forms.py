"""The decoder's operations as ONNX nodes, in two forms.

``contrib`` uses fused operators of ONNX Runtime, which its mobile builds have too. ``portable``
uses standard operators only (opset 23).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from onnx import TensorProto

from exporter.backends.onnx import Target
from exporter.backends.onnx.graph import CONTRIB, OnnxGraph, float_bytes
from exporter.backends.onnx.layout import (
    block_scales,
    block_size,
    codes_of_bytes,
    concatenate,
    transposed_bytes,
    unsigned_bytes,
)
from exporter.backends.onnx.schemes import CODES_OF_BYTES, in_whole_rows
from exporter.model.rope import rope_tables
from exporter.quantization.quantized_checkpoint import QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: `accuracy_level` of MatMulNBits: how activations may be rounded.
_FLOAT32, _INT8 = 1, 4
#: Bits of the codes → their element type in standard ONNX.
_CODE_TYPES = {4: TensorProto.INT4, 8: TensorProto.INT8}
CONTRIB_OPSET, PORTABLE_OPSET = 21, 23
LOGITS = "logits"


@dataclass
class Sum:
    """A residual sum x + y, not emitted yet, so that a following norm can be fused with it.

    `total` is the name of the sum once it is emitted.
    """

    x: str
    y: str
    total: str = ""


@dataclass
class MergedProduct:
    """Several products of the same input in one value, concatenated along the last axis.

    `widths` are the sizes of the products. `parts` are their names once a Split is emitted.
    """

    value: str
    widths: tuple[int, ...]
    parts: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """One product of a `MergedProduct`."""

    merged: MergedProduct
    index: int


@dataclass(frozen=True)
class Heads:
    """Queries, keys or values [batch, seq, count * head_dim], for the attention that follows.

    GroupQueryAttention applies RoPE itself, and `rotated` records that it must. `norms` are the
    weights of norms per head to emit before it; None is a norm without a weight.
    """

    value: "Value"
    count: int
    rotated: bool = False
    norms: tuple[str | None, ...] = ()


#: The name of a value in the graph, or an operation that is not emitted yet.
Value = str | Sum | Part | Heads


@dataclass
class _Form:
    """Inputs, outputs, constants, and the operations that are the same in both forms."""

    g: OnnxGraph
    quantized: QuantizedCheckpoint
    target: Target
    kind: int = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.quantized.config
        half = self.target.activations == "float16"
        self.kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.tokens = self.g.input(
            "input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]
        )
        self.g.output(LOGITS, self.kind, ["batch_size", 1, self.config.vocab_size])

    def emit(self, x: Value) -> str:
        """The name of a value. Emits its nodes if they are not emitted yet."""
        if isinstance(x, Sum):
            x.total = x.total or self.g.op("Add", x.x, x.y)
            return x.total
        if isinstance(x, Part):
            if not x.merged.parts:
                x.merged.parts = self._split(x.merged)
            return x.merged.parts[x.index]
        if isinstance(x, Heads):
            assert not x.rotated and not x.norms
            return self.emit(x.value)
        return x

    def _split(self, merged: MergedProduct) -> Sequence[str]:
        outputs = [self.g.fresh("part") for _ in merged.widths]
        inputs = [merged.value, self.g.integers(*merged.widths)]
        return self.g.ops("Split", inputs, outputs, axis=-1)

    def heads(self, x: Value, count: int) -> Value:
        return Heads(x, count)

    def last_token(self, x: Value) -> Value:
        return self.g.op("Gather", self.emit(x), self.g.integers(-1), axis=1)

    def silu_product(self, gate: Value, up: Value) -> Value:
        x = self.emit(gate)
        silu = self.g.op("Mul", x, self.g.op("Sigmoid", x))
        return self.g.op("Mul", silu, self.emit(up))

    def cache(self, layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """Declare the cache of a layer. Returns the names of (past, present) keys and values."""
        names = []
        for prefix, length, declare in (
            ("past_key_values", "past_sequence_length", self.g.input),
            ("present", "total_sequence_length", self.g.output),
        ):
            shape: list[int | str] = [
                "batch_size",
                self.config.num_key_value_heads,
                length,
                self.config.head_dim,
            ]
            names.append(
                tuple(
                    declare(f"{prefix}.{layer}.{part}", self.kind, shape)
                    for part in ("key", "value")
                )
            )
        (past_key, past_value), (key, value) = names
        return (past_key, past_value), (key, value)

    def vector(self, name: str | None) -> str:
        """The weight of a norm, or ones [head_dim] for a norm per head without a weight."""
        weight = self.quantized.float_weight(name) if name else torch.ones(self.config.head_dim)
        content = float_bytes(weight, self.kind)
        return self.g.tensor(name or "ones", self.kind, weight.shape, content)

    def scales(self, weight: str, values: torch.Tensor) -> str:
        """Scales of a weight in the type of the activations, as products want them.

        They are stored in float16, which holds every scale exactly: in half the bytes of float32.
        """
        name, kind = _scales_of(weight), TensorProto.FLOAT16
        half = self.g.tensor(name, kind, values.shape, float_bytes(values, kind))
        return half if self.kind == kind else self.g.widened(half)

    def rope(self) -> tuple[str, str]:
        """The constants of RoPE: cosines and sines, each [max_context, head_dim / 2]."""
        tables = zip(
            ("rope.cos", "rope.sin"), rope_tables(self.config, self.target.max_context), strict=True
        )
        cos, sin = (
            self.g.tensor(name, self.kind, table.shape, float_bytes(table, self.kind))
            for name, table in tables
        )
        return cos, sin

    def float_linear(self, x: str, name: str) -> str:
        """x times the transpose of a float weight."""
        weight = self.quantized.float_weight(name).t()
        stored = f"{name}.transposed"
        content = float_bytes(weight.contiguous(), self.kind)
        return self.g.op("MatMul", x, self.g.tensor(stored, self.kind, weight.shape, content))

    def float_embed(self, name: str) -> str:
        """Rows of a float embedding."""
        weight = self.quantized.float_weight(name)
        table = self.g.tensor(name, self.kind, weight.shape, float_bytes(weight, self.kind))
        return self.g.op("Gather", table, self.tokens)


class ContribForm(_Form):
    """The form with fused operators of ONNX Runtime (domain com.microsoft)."""

    opset = CONTRIB_OPSET

    def __post_init__(self) -> None:
        super().__post_init__()
        graph = self.g
        self.accuracy_level = _INT8 if self.target.products == "int8" else _FLOAT32
        mask = graph.input(
            "attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]
        )
        counts = graph.op("ReduceSum", mask, graph.integers(1), keepdims=0)
        last = graph.op("Sub", counts, graph.scalar(1))
        self.last_positions = graph.op("Cast", last, to=TensorProto.INT32)
        length = graph.op("Gather", graph.op("Shape", mask), graph.scalar(1))
        self.total_length = graph.op("Cast", length, to=TensorProto.INT32)

    def embed(self, weight: str) -> Value:
        """Looks up rows of packed codes, then the codes of each byte, and multiplies by the scales.

        ONNX Runtime's own operator for it, GatherBlockQuantized, is not for the CPU in its
        WebAssembly builds with WebGPU, and transformers.js loads no others.
        """
        stored = self.quantized.read(weight)
        if not isinstance(stored, QuantizedTensor):
            return self.float_embed(weight)
        codes, scales = self._blocks(weight, stored)
        rows, columns = stored.codes.shape
        bits = stored.scheme.code_bits
        g, block = self.g, block_size(stored)
        table = g.alias(f"{weight}.rows", codes, TensorProto.UINT8, [rows, columns * bits // 8])
        row = g.op("Cast", g.op("Gather", table, self.tokens), to=TensorProto.INT32)
        known = codes_of_bytes(bits)
        content = float_bytes(known, self.kind)
        values = g.op(
            "Gather", g.tensor(CODES_OF_BYTES[bits], self.kind, known.shape, content), row
        )
        grouped = g.op("Reshape", values, g.integers(0, 0, columns // block, block))
        scale = g.op("Unsqueeze", g.op("Gather", scales, self.tokens), g.integers(-1))
        return g.op("Reshape", g.op("Mul", grouped, scale), g.integers(0, 0, columns))

    def linear(self, x: Value, *weights: str) -> Sequence[Value]:
        """Weights of the same scheme are merged into one product, which is faster."""
        read = [self.quantized.read(name) for name in weights]
        stored = [weight for weight in read if isinstance(weight, QuantizedTensor)]
        given = self.emit(x)
        if len({self.quantized.schemes[name] for name in weights}) > 1 or not stored:
            return [
                self._product(given, name, weight)
                if isinstance(weight, QuantizedTensor)
                else self.float_linear(given, name)
                for name, weight in zip(weights, read, strict=True)
            ]
        product = self._product(given, merged_name(weights), concatenate(stored))
        if len(weights) == 1:
            return [product]
        merged = MergedProduct(product, tuple(len(weight.codes) for weight in stored))
        return [Part(merged, index) for index in range(len(weights))]

    def _product(self, x: str, name: str, weight: QuantizedTensor) -> str:
        rows, columns = weight.codes.shape
        if in_whole_rows(name, weight.scheme, self.target):
            content = transposed_bytes(weight)
            codes = self.g.tensor(f"{name}.transposed", TensorProto.INT8, [columns, rows], content)
            scales = self.scales(name, weight.scales.reshape(rows))
            return self.g.op("DynamicQuantizeMatMul", x, codes, scales, domain=CONTRIB)
        codes, scales = self._blocks(name, weight)
        return self.g.op(
            "MatMulNBits", x, codes, scales, domain=CONTRIB, K=columns, N=rows,
            bits=weight.scheme.bits, block_size=block_size(weight),
            accuracy_level=self.accuracy_level,
        )  # fmt: skip

    def _blocks(self, name: str, weight: QuantizedTensor) -> tuple[str, str]:
        """Constants for codes [rows, blocks, bytes per block] and scales [rows, blocks]."""
        rows, columns = weight.codes.shape
        block, bits = block_size(weight), weight.scheme.code_bits
        dims = [rows, columns // block, block * bits // 8]
        codes = self.g.tensor(name, TensorProto.UINT8, dims, unsigned_bytes(weight))
        return codes, self.scales(name, block_scales(weight))

    def add(self, x: Value, y: Value) -> Value:
        return Sum(self.emit(x), self.emit(y))

    def norm(self, x: Value, weight: str) -> Value:
        if not isinstance(x, Sum) or x.total:
            return self._norm(self.emit(x), weight)
        normal, x.total = self.g.fresh("normal"), self.g.fresh("residual")
        self.g.ops(
            "SkipSimplifiedLayerNormalization", [x.x, x.y, self.vector(weight)],
            [normal, "", "", x.total], CONTRIB, epsilon=self.config.rms_norm_eps,
        )  # fmt: skip
        return normal

    def _norm(self, x: str, weight: str | None) -> str:
        return self.g.op(
            "SimplifiedLayerNormalization", x, self.vector(weight), axis=-1,
            epsilon=self.config.rms_norm_eps, stash_type=1,
        )  # fmt: skip

    def norm_heads(self, x: Value, weight: str | None) -> Value:
        """Emitted before RoPE, which GroupQueryAttention applies.

        In the model, a norm without a weight may follow RoPE. Its result is the same, since a
        rotation does not change the root mean square of a head.
        """
        assert isinstance(x, Heads)
        assert weight is None or not x.rotated, "GroupQueryAttention rotates after a weighted norm"
        return replace(x, norms=(*x.norms, weight))

    def rotate(self, x: Value) -> Value:
        assert isinstance(x, Heads)
        return replace(x, rotated=True)

    def attend(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        config = self.config
        past, present = self.cache(layer)
        output = self.g.fresh("attention")
        self.g.ops(
            "GroupQueryAttention",
            [
                *self._queries_keys_values(q, k, v),
                *past,
                self.last_positions,
                self.total_length,
                *self.rope(),
            ],
            [output, *present],
            CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=int(config.rope_interleaved),
            scale=config.head_dim**-0.5,
        )
        return output

    def _queries_keys_values(self, q: Value, k: Value, v: Value) -> Sequence[str]:
        """The first three inputs of GroupQueryAttention: q, k and v packed in one, or separate."""
        assert isinstance(q, Heads) and isinstance(k, Heads) and isinstance(v, Heads)
        assert q.rotated and k.rotated
        if q.norms == k.norms == (None,):
            return self._normalized_together(q, k, v)
        if q.norms or k.norms:
            return [self._normalized(q), self._normalized(k), self.emit(v)]
        if isinstance(q.value, Part) or not isinstance(v.value, Part):
            return [self._packed(q, k, v), "", ""]
        # A norm over all heads has split q and k from v.
        return [self.emit(x.value) for x in (q, k, v)]

    def _packed(self, *values: Heads) -> str:
        """q, k and v along the last axis: their merged product, or a concatenation."""
        first = values[0].value
        if isinstance(first, Part):
            return first.merged.value
        return self.g.op("Concat", *(self.emit(x.value) for x in values), axis=-1)

    def _normalized(self, x: Heads) -> str:
        """Emit the norms of queries or keys over each head."""
        head_dim, g = self.config.head_dim, self.g
        value = g.op("Reshape", self.emit(x.value), g.integers(0, 0, x.count, head_dim))
        for weight in x.norms:
            value = self._norm(value, weight)
        return g.op("Reshape", value, g.integers(0, 0, x.count * head_dim))

    def _normalized_together(self, q: Heads, k: Heads, v: Heads) -> Sequence[str]:
        """Emit one norm without a weight for the heads of q and k together."""
        g, head_dim = self.g, self.config.head_dim
        heads = q.count + k.count
        widths = g.integers(heads * head_dim, v.count * head_dim)
        packed = self._packed(q, k, v)
        qk, value = g.ops("Split", [packed, widths], [g.fresh("qk"), g.fresh("v")], axis=-1)
        normal = self._norm(g.op("Reshape", qk, g.integers(0, 0, heads, head_dim)), None)
        flat = g.op("Reshape", normal, g.integers(0, 0, heads * head_dim))
        widths = g.integers(q.count * head_dim, k.count * head_dim)
        outputs = [g.fresh("q"), g.fresh("k")]
        return [*g.ops("Split", [flat, widths], outputs, axis=-1), value]

    def output(self, x: Value, weight: str) -> Value:
        return _as_logits(self.g, self.emit(self.linear(x, weight)[0]))


class PortableForm(_Form):
    """The form with standard operators only."""

    opset = PORTABLE_OPSET

    def __post_init__(self) -> None:
        super().__post_init__()
        graph = self.g
        past = "past_key_values.0.key"
        axis = graph.scalar(2)
        past_length = graph.op("Gather", graph.op("Shape", past), axis)
        length = graph.op("Gather", graph.op("Shape", self.tokens), graph.scalar(1))
        total = graph.op("Add", past_length, length)
        positions = graph.op("Range", past_length, total, graph.scalar(1))
        self.positions = graph.op("Unsqueeze", positions, graph.integers(0))
        column = graph.op("Unsqueeze", positions, graph.integers(1))
        everything = graph.op("Range", graph.scalar(0), total, graph.scalar(1))
        self.visible = graph.op("LessOrEqual", everything, column)

    def embed(self, weight: str) -> Value:
        """Gathers columns of the codes [columns, rows] that a product with the weight would read,
        so that a tied embedding is stored once, and dequantizes them in the graph."""
        stored = self.quantized.read(weight)
        if not isinstance(stored, QuantizedTensor):
            return self.float_embed(weight)
        rows, columns = stored.codes.shape
        block, bits = block_size(stored), stored.scheme.code_bits
        codes, _ = self._codes(weight, stored)
        # Other names of the same bytes: ONNX Runtime makes no MatMulNBits of what a node reads too.
        g, table, byte = self.g, f"{weight}.table", TensorProto.UINT8
        shape, half = [columns // block, rows], TensorProto.FLOAT16
        scales = g.alias(_scales_of(table), _scales_of(weight), half, shape)
        if bits == 4:
            values = self._nibbles(g.alias(table, codes, byte, [columns, rows // 2]))
        else:
            codes = g.alias(table, codes, TensorProto.INT8, [columns, rows])
            values = g.op("Cast", g.op("Gather", codes, self.tokens, axis=1), to=self.kind)
        by_token = g.op("Transpose", values, perm=[1, 2, 0])
        grouped = g.op("Reshape", by_token, g.integers(1, -1, columns // block, block))
        scale = g.op("Transpose", g.op("Gather", scales, self.tokens, axis=1), perm=[1, 2, 0])
        scale = scale if self.kind == half else g.op("Cast", scale, to=self.kind)
        product = g.op("Mul", grouped, g.op("Unsqueeze", scale, g.integers(-1)))
        return g.op("Reshape", product, g.integers(1, -1, columns))

    def _nibbles(self, packed: str) -> str:
        """The int4 codes of the tokens [columns, batch, seq] as floats, from bytes.

        Codes of the tokens 2n and 2n + 1 share a byte, the even one in its lower half.
        """
        g, byte, two = self.g, TensorProto.UINT8, self.g.scalar(2)
        pair = g.op("Gather", packed, g.op("Div", self.tokens, two), axis=1)
        odd = g.op("Cast", g.op("Mod", self.tokens, two), to=byte)
        shifts = g.op("Mul", odd, g.scalar(4, byte))
        code = g.op("BitShift", pair, shifts, direction="RIGHT")
        # Decode 4-bit two's complement: flip the sign bit, then subtract 8.
        flipped = g.op(
            "BitwiseXor", g.op("BitwiseAnd", code, g.scalar(15, byte)), g.scalar(8, byte)
        )
        eight = g.tensor("eight", self.kind, [], float_bytes(torch.tensor(8.0), self.kind))
        return g.op("Sub", g.op("Cast", flipped, to=self.kind), eight)

    def linear(self, x: Value, *weights: str) -> Sequence[str]:
        given = self.emit(x)
        return [self._linear(given, name) for name in weights]

    def _linear(self, x: str, name: str) -> str:
        weight = self.quantized.read(name)
        if not isinstance(weight, QuantizedTensor):
            return self.float_linear(x, name)
        codes, scales = self._codes(name, weight)
        # ONNX Runtime makes one MatMulNBits of both nodes: not with axis 1 and a Transpose.
        matrix = self.g.op("DequantizeLinear", codes, scales, axis=0, block_size=block_size(weight))
        return self.g.op("MatMul", x, matrix)

    def _codes(self, name: str, weight: QuantizedTensor) -> tuple[str, str]:
        """Constants for codes [columns, rows] as INT4 or INT8 and scales [blocks, rows]."""
        rows, columns = weight.codes.shape
        kind = _CODE_TYPES[weight.scheme.code_bits]
        codes = self.g.tensor(name, kind, [columns, rows], transposed_bytes(weight))
        return codes, self.scales(name, block_scales(weight).t().contiguous())

    def add(self, x: Value, y: Value) -> Value:
        return self.g.op("Add", self.emit(x), self.emit(y))

    def norm(self, x: Value, weight: str) -> Value:
        return self._norm(self.emit(x), weight)

    def _norm(self, x: str, weight: str | None) -> str:
        epsilon = self.config.rms_norm_eps
        return self.g.op("RMSNormalization", x, self.vector(weight), axis=-1, epsilon=epsilon)

    def rotate(self, x: Value) -> Value:
        assert isinstance(x, Heads)
        rotated = self.g.op(
            "RotaryEmbedding", self.emit(x), *self.rope(), self.positions,
            interleaved=int(self.config.rope_interleaved), num_heads=x.count,
        )  # fmt: skip
        return Heads(rotated, x.count)

    def norm_heads(self, x: Value, weight: str | None) -> Value:
        assert isinstance(x, Heads)
        g, head_dim = self.g, self.config.head_dim
        by_head = g.op("Reshape", self.emit(x), g.integers(1, -1, x.count, head_dim))
        normal = self._norm(by_head, weight)
        return Heads(g.op("Reshape", normal, g.integers(1, -1, x.count * head_dim)), x.count)

    def attend(self, layer: int, q: Value, k: Value, v: Value) -> Value:
        config, g = self.config, self.g
        past, present = self.cache(layer)
        output = g.fresh("attention")
        g.ops(
            "Attention",
            [*(self.emit(x) for x in (q, k, v)), self.visible, *past],
            [output, *present],
            q_num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=config.head_dim**-0.5,
        )
        return output

    def output(self, x: Value, weight: str) -> Value:
        return _as_logits(self.g, self.linear(x, weight)[0])


def _as_logits(graph: OnnxGraph, value: str) -> str:
    """Give the output of the last node the name of the graph's output."""
    graph.rename(value, LOGITS)
    return LOGITS


def _scales_of(weight: str) -> str:
    """The name of the constant with the scales of a weight."""
    return f"{weight}.scales"


def merged_name(names: Sequence[str]) -> str:
    """The name of the constant for weights merged into one product."""
    return "+".join(names)
