"""The decoder as an ONNX graph, in two forms that share one walk (`build`).

``contrib`` uses the fused operators of ONNX Runtime that its mobile builds have too; ``portable``
uses standard operators only (opset 23).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from onnx import TensorProto

from exporter.backends.onnx import Target
from exporter.backends.onnx.graph import CONTRIB, OnnxGraph, float_bytes
from exporter.backends.onnx.layout import (
    block_scales,
    block_size,
    concatenate,
    signed_bytes,
    transposed_bytes,
    unsigned_bytes,
)
from exporter.model.decoder import ModelConfig, rope_tables
from exporter.quantization.quantized_checkpoint import EMBEDDING, OUTPUT, QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor

#: `accuracy_level` of MatMulNBits: how activations may be rounded.
_FLOAT32, _INT8 = 1, 4
CONTRIB_OPSET, PORTABLE_OPSET = 21, 23


class Form(Protocol):
    """How a form spells the parts of the decoder. Values are [1, seq, width]."""

    opset: int

    def embed(self) -> str: ...

    def linear(self, x: str, *names: str) -> list[str]:
        """x times each weight; or one value, with the products side by side."""
        ...

    def norm(self, x: str, name: str) -> str: ...

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """x + y, and that normalized."""
        ...

    def attention(self, qkv: list[str], layer: int) -> str: ...

    def silu(self, x: str) -> str: ...


def build(graph: OnnxGraph, form: Form, config: ModelConfig) -> None:
    """Write the decoder from token ids to the logits of the last token."""
    x = form.embed()
    normal = form.norm(x, "model.layers.0.input_layernorm.weight")
    for layer in range(config.num_hidden_layers):
        prefix, last = f"model.layers.{layer}", layer == config.num_hidden_layers - 1
        mlp = f"{prefix}.{config.mlp_name}"
        qkv = form.linear(normal, *(f"{prefix}.self_attn.{p}_proj.weight" for p in "qkv"))
        attended = form.attention(qkv, layer)
        if last:  # nothing after the last attention looks at another position
            x, attended = (
                graph.op("Gather", value, graph.integers(-1), axis=1) for value in (x, attended)
            )
        attended = form.linear(attended, f"{prefix}.self_attn.o_proj.weight")[0]
        x, normal = form.add_norm(x, attended, f"{prefix}.post_attention_layernorm.weight")
        both = form.linear(normal, f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        gate, up = _apart(graph, both, config.intermediate_size)
        inner = graph.op("Mul", form.silu(gate), up)
        down = form.linear(inner, f"{mlp}.down_proj.weight")[0]
        following = f"model.layers.{layer + 1}.input_layernorm.weight"
        x, normal = form.add_norm(x, down, "model.norm.weight" if last else following)
    graph.rename(
        form.linear(normal, EMBEDDING if config.tie_word_embeddings else OUTPUT)[0], "logits"
    )


def _apart(graph: OnnxGraph, values: list[str], width: int) -> Sequence[str]:
    """Two products of this width, which may lie side by side in one value."""
    if len(values) == 2:
        return values
    outputs = [graph.fresh("part"), graph.fresh("part")]
    return graph.ops("Split", [values[0], graph.integers(width, width)], outputs, axis=-1)


class _Common:
    """Inputs, outputs and constants of both forms."""

    def __init__(self, graph: OnnxGraph, quantized: QuantizedCheckpoint, target: Target) -> None:
        self.g, self.quantized, self.config, self.target = (
            graph,
            quantized,
            quantized.config,
            target,
        )
        half = target.activations == "float16"
        self.kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.tokens = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        vocab_size = self.config.vocab_size
        graph.output("logits", self.kind, ["batch_size", 1, vocab_size])

    def cache(self, layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
        """The names of a layer's past and present keys and values, declared."""
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

    def vector(self, name: str) -> str:
        weight = self.quantized.float_weight(name)
        return self.g.tensor(name, self.kind, weight.shape, float_bytes(weight, self.kind))

    def rope(self) -> tuple[str, str]:
        """Cosines and sines, each [max_context, head_dim / 2]."""
        tables = zip(
            ("rope.cos", "rope.sin"), rope_tables(self.config, self.target.max_context), strict=True
        )
        cos, sin = (
            self.g.tensor(name, self.kind, table.shape, float_bytes(table, self.kind))
            for name, table in tables
        )
        return cos, sin

    def ones(self) -> str:
        """The weight of the weightless q/k norm."""
        size = self.config.head_dim
        return self.g.tensor("ones", self.kind, [size], float_bytes(torch.ones(size), self.kind))

    def float_linear(self, x: str, name: str) -> str:
        """x times the transpose of a weight left in float."""
        weight = self.quantized.float_weight(name).t()
        stored = f"{name}.transposed"
        content = float_bytes(weight.contiguous(), self.kind)
        return self.g.op("MatMul", x, self.g.tensor(stored, self.kind, weight.shape, content))

    def float_embed(self) -> str:
        weight = self.quantized.float_weight(EMBEDDING)
        table = self.g.tensor(EMBEDDING, self.kind, weight.shape, float_bytes(weight, self.kind))
        return self.g.op("Gather", table, self.tokens)


class ContribForm(_Common):
    """Fused operators of ONNX Runtime (domain com.microsoft)."""

    opset = CONTRIB_OPSET

    def __init__(self, graph: OnnxGraph, quantized: QuantizedCheckpoint, target: Target) -> None:
        super().__init__(graph, quantized, target)
        self.accuracy_level = _INT8 if target.products == "int8" else _FLOAT32
        mask = graph.input(
            "attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]
        )
        counts = graph.op("ReduceSum", mask, graph.integers(1), keepdims=0)
        last = graph.op("Sub", counts, graph.scalar(1))
        self.last_positions = graph.op("Cast", last, to=TensorProto.INT32)
        length = graph.op("Gather", graph.op("Shape", mask), graph.scalar(1))
        self.total_length = graph.op("Cast", length, to=TensorProto.INT32)

    def embed(self) -> str:
        weight = self.quantized.read(EMBEDDING)
        if not isinstance(weight, QuantizedTensor):
            return self.float_embed()
        codes, scales = self._blocks(EMBEDDING, weight)
        rows, columns = weight.codes.shape
        bits = weight.scheme.bits or 0
        table = self.g.alias(
            f"{EMBEDDING}.table", codes, TensorProto.UINT8, [rows, columns * bits // 8]
        )
        return self.g.op(
            "GatherBlockQuantized", table, self.tokens, scales, domain=CONTRIB,
            bits=bits, block_size=block_size(weight), gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def linear(self, x: str, *names: str) -> list[str]:
        """Weights of one scheme are one product, which is faster."""
        schemes = {self.quantized.schemes[name] for name in names}
        read = [self.quantized.read(name) for name in names]
        weights = [weight for weight in read if isinstance(weight, QuantizedTensor)]
        if len(schemes) > 1 or not weights:
            return [
                self._product(x, name, weight)
                if isinstance(weight, QuantizedTensor)
                else self.float_linear(x, name)
                for name, weight in zip(names, read, strict=True)
            ]
        return [self._product(x, merged_name(names), concatenate(weights))]

    def _product(self, x: str, name: str, weight: QuantizedTensor) -> str:
        rows, columns = weight.codes.shape
        whole_rows = weight.scheme.bits == 8 and weight.scheme.group_size is None
        # The table of a tied embedding is read as it lies, so it keeps its layout.
        if whole_rows and self.target.products == "int8" and name not in (EMBEDDING, OUTPUT):
            content = transposed_bytes(weight)
            codes = self.g.tensor(f"{name}.transposed", TensorProto.INT8, [columns, rows], content)
            scales = self.g.tensor(
                f"{name}.scales", self.kind, [rows], float_bytes(weight.scales, self.kind)
            )
            return self.g.op("DynamicQuantizeMatMul", x, codes, scales, domain=CONTRIB)
        codes, scales = self._blocks(name, weight)
        return self.g.op(
            "MatMulNBits", x, codes, scales, domain=CONTRIB, K=columns, N=rows,
            bits=weight.scheme.bits, block_size=block_size(weight),
            accuracy_level=self.accuracy_level,
        )  # fmt: skip

    def _blocks(self, name: str, weight: QuantizedTensor) -> tuple[str, str]:
        """Codes [rows, blocks, bytes of a block] and scales [rows, blocks]."""
        rows, columns = weight.codes.shape
        block, bits = block_size(weight), weight.scheme.bits or 0
        dims = [rows, columns // block, block * bits // 8]
        codes = self.g.tensor(name, TensorProto.UINT8, dims, unsigned_bytes(weight))
        content = float_bytes(block_scales(weight), self.kind)
        scales = self.g.tensor(f"{name}.scales", self.kind, [rows, columns // block], content)
        return codes, scales

    def norm(self, x: str, name: str) -> str:
        return self.g.op(
            "SimplifiedLayerNormalization", x, self.vector(name), axis=-1,
            epsilon=self.config.rms_norm_eps, stash_type=1,
        )  # fmt: skip

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        normal, total = self.g.fresh("normal"), self.g.fresh("residual")
        self.g.ops(
            "SkipSimplifiedLayerNormalization", [x, y, self.vector(name)],
            [normal, "", "", total], CONTRIB, epsilon=self.config.rms_norm_eps,
        )  # fmt: skip
        return total, normal

    def attention(self, qkv: list[str], layer: int) -> str:
        """GroupQueryAttention rotates inside. The weightless q/k norm comes before the rotation
        here and after it in the model: a rotation keeps the norm, so that is the same."""
        config = self.config
        past, present = self.cache(layer)
        side_by_side = qkv[0] if len(qkv) == 1 else self.g.op("Concat", *qkv, axis=-1)
        packed = [side_by_side, "", ""]
        if config.use_qk_norm:
            packed = self._normalized(side_by_side)
        output = self.g.fresh("attention")
        self.g.ops(
            "GroupQueryAttention",
            [*packed, *past, self.last_positions, self.total_length, *self.rope()],
            [output, *present],
            CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=int(config.rope_interleaved),
            scale=config.head_dim**-0.5,
        )
        return output

    def _normalized(self, qkv: str) -> list[str]:
        """q, k and v of the product of all three; the heads of q and k normalized together."""
        config, g = self.config, self.g
        heads = config.num_attention_heads + config.num_key_value_heads
        widths = [n * config.head_dim for n in (heads, config.num_key_value_heads)]
        qk, v = g.ops("Split", [qkv, g.integers(*widths)], [g.fresh("qk"), g.fresh("v")], axis=-1)
        normal = g.op(
            "SimplifiedLayerNormalization",
            g.op("Reshape", qk, g.integers(0, 0, heads, config.head_dim)),
            self.ones(),
            axis=-1,
            epsilon=config.rms_norm_eps,
            stash_type=1,
        )
        flat = g.op("Reshape", normal, g.integers(0, 0, widths[0]))
        widths = [
            n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        ]
        q, k = g.ops("Split", [flat, g.integers(*widths)], [g.fresh("q"), g.fresh("k")], axis=-1)
        return [q, k, v]

    def silu(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("Sigmoid", x))


class PortableForm(_Common):
    """Standard operators only."""

    opset = PORTABLE_OPSET

    def __init__(self, graph: OnnxGraph, quantized: QuantizedCheckpoint, target: Target) -> None:
        super().__init__(graph, quantized, target)
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

    def embed(self) -> str:
        """Rows of packed codes are gathered as bytes and taken apart here."""
        weight = self.quantized.read(EMBEDDING)
        if not isinstance(weight, QuantizedTensor):
            return self.float_embed()
        rows, columns = weight.codes.shape
        codes, scales = self._codes(EMBEDDING, weight)
        g, block = self.g, block_size(weight)
        if weight.scheme.bits == 4:
            packed = g.alias(f"{EMBEDDING}.table", codes, TensorProto.UINT8, [rows, columns // 2])
            row = g.op("Gather", packed, self.tokens)
            low = g.op("BitwiseAnd", row, g.scalar(15, TensorProto.UINT8))
            high = g.op("BitShift", row, g.scalar(4, TensorProto.UINT8), direction="RIGHT")
            last = g.integers(-1)
            pairs = g.op(
                "Concat", g.op("Unsqueeze", low, last), g.op("Unsqueeze", high, last), axis=-1
            )
            # Two's complement of four bits: flip the sign bit, then take it away as a number.
            flipped = g.op("BitwiseXor", pairs, g.scalar(8, TensorProto.UINT8))
            eight = g.tensor("eight", self.kind, [], float_bytes(torch.tensor(8.0), self.kind))
            values = g.op("Sub", g.op("Cast", flipped, to=self.kind), eight)
        else:
            values = g.op("Cast", g.op("Gather", codes, self.tokens), to=self.kind)
        grouped = g.op("Reshape", values, g.integers(1, -1, columns // block, block))
        scale = g.op("Unsqueeze", g.op("Gather", scales, self.tokens), g.integers(-1))
        return g.op("Reshape", g.op("Mul", grouped, scale), g.integers(1, -1, columns))

    def linear(self, x: str, *names: str) -> list[str]:
        return [self._linear(x, name) for name in names]

    def _linear(self, x: str, name: str) -> str:
        weight = self.quantized.read(name)
        if not isinstance(weight, QuantizedTensor):
            return self.float_linear(x, name)
        codes, scales = self._codes(name, weight)
        matrix = self.g.op("DequantizeLinear", codes, scales, axis=1, block_size=block_size(weight))
        return self.g.op("MatMul", x, self.g.op("Transpose", matrix, perm=[1, 0]))

    def _codes(self, name: str, weight: QuantizedTensor) -> tuple[str, str]:
        """Codes [rows, columns] as INT4 or INT8 and scales [rows, blocks]."""
        kind = TensorProto.INT4 if weight.scheme.bits == 4 else TensorProto.INT8
        codes = self.g.tensor(name, kind, weight.codes.shape, signed_bytes(weight))
        spread = block_scales(weight)
        content = float_bytes(spread, self.kind)
        return codes, self.g.tensor(f"{name}.scales", self.kind, spread.shape, content)

    def norm(self, x: str, name: str) -> str:
        epsilon = self.config.rms_norm_eps
        return self.g.op("RMSNormalization", x, self.vector(name), axis=-1, epsilon=epsilon)

    def add_norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        total = self.g.op("Add", x, y)
        return total, self.norm(total, name)

    def attention(self, qkv: list[str], layer: int) -> str:
        config, g = self.config, self.g
        heads = config.num_attention_heads, config.num_key_value_heads
        past, present = self.cache(layer)
        q, k = (self._rotated(value, count) for value, count in zip(qkv[:2], heads, strict=True))
        output = g.fresh("attention")
        g.ops(
            "Attention",
            [q, k, qkv[2], self.visible, *past],
            [output, *present],
            q_num_heads=heads[0],
            kv_num_heads=heads[1],
            scale=config.head_dim**-0.5,
        )
        return output

    def _rotated(self, x: str, heads: int) -> str:
        config, g = self.config, self.g
        x = g.op(
            "RotaryEmbedding", x, *self.rope(), self.positions,
            interleaved=int(config.rope_interleaved), num_heads=heads,
        )  # fmt: skip
        if not config.use_qk_norm:
            return x
        by_head = g.op("Reshape", x, g.integers(1, -1, heads, config.head_dim))
        normal = g.op(
            "RMSNormalization", by_head, self.ones(), axis=-1, epsilon=config.rms_norm_eps
        )
        return g.op("Reshape", normal, g.integers(1, -1, heads * config.head_dim))

    def silu(self, x: str) -> str:
        return self.g.op("Mul", x, self.g.op("Sigmoid", x))


def merged_name(names: tuple[str, ...]) -> str:
    """One name for several weights in one product: the parts joined."""
    return "+".join(names)
