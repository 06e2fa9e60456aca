"""The XNNPACK graphs of a decoder: everything of it but embedding, cache and attention.

One graph reaches from one attention to the next: it closes a layer (output projection, feed
forward) and opens the one after it (normalization, q, k, v, RoPE).
"""

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from torch import Tensor

from exporter.backends.executorch import Target
from exporter.backends.executorch.graph import INFERRED, XnnpackGraph
from exporter.model.decoder import ModelConfig
from exporter.quantization.quantized_checkpoint import EMBEDDING, OUTPUT, QuantizedCheckpoint
from exporter.quantization.schemes import QuantizedTensor


class LayerGraphs:
    """The XNNPACK graph of each segment, from the quantized checkpoint's tensors."""

    def __init__(self, quantized: QuantizedCheckpoint, target: Target) -> None:
        self.quantized, self.config, self.context = quantized, quantized.config, target.max_context
        self.portable = target.attention == "portable"
        self.named_data = NamedDataStore()

    def graph(self, kind: str, layer: int) -> XnnpackGraph:
        """`enter` opens layer 0; `cross` closes layer - 1 and opens `layer`; `leave` closes."""
        graph, config = XnnpackGraph(self.named_data), self.config
        length = 1 if kind == "leave" else self.context
        x = graph.input(1, length, config.hidden_size)
        attention = self._attention_inputs(graph, length) if kind != "enter" else []
        if kind == "leave":
            x = self._close_layer(graph, x, attention, layer)
            graph.output(self._output_layer(graph, x))
            return graph
        cos = graph.input(1, length, 1, config.head_dim)
        sin = graph.input(1, length, 1, config.head_dim)
        if kind == "cross":
            x = self._close_layer(graph, x, attention, layer - 1)
            graph.output(x)
        for value in self._open_layer(graph, x, cos, sin, layer):
            graph.output(value)
        return graph

    def _open_layer(self, g: XnnpackGraph, x: int, cos: int, sin: int, layer: int) -> list[int]:
        """The layer's q, k and v, each [1, seq, heads, head_dim], rotated and normalized."""
        config, prefix = self.config, f"model.layers.{layer}"
        normal = self._norm(g, x, f"{prefix}.input_layernorm.weight")
        names = [f"{prefix}.self_attn.{p}_proj.weight" for p in "qkv"]
        q, k, v = self._linear(g, normal, *names)
        heads = config.num_attention_heads, config.num_key_value_heads
        q, k = (
            self._rotate(g, g.reshape(value, 1, INFERRED, n, config.head_dim), cos, sin)
            for value, n in zip((q, k), heads, strict=True)
        )
        return [q, k, g.reshape(v, 1, INFERRED, heads[1], config.head_dim)]

    def _rotate(self, g: XnnpackGraph, x: int, cos: int, sin: int) -> int:
        """RoPE as x * cos + (x R) * sin, R being the quarter turn of every pair."""
        turned = g.linear(x, g.constant("rope.quarter_turn", _quarter_turn(self.config)))
        x = g.add(g.multiply(x, cos), g.multiply(turned, sin))
        return self._normalize(g, x, self.config.head_dim) if self.config.use_qk_norm else x

    def _close_layer(self, g: XnnpackGraph, x: int, attention: list[int], layer: int) -> int:
        config, prefix = self.config, f"model.layers.{layer}"
        width = config.num_attention_heads * config.head_dim
        attended = self._portable_attention(g, *attention) if self.portable else attention[0]
        attended = g.reshape(attended, 1, INFERRED, width)
        x = g.add(x, self._linear(g, attended, f"{prefix}.self_attn.o_proj.weight")[0])
        normal = self._norm(g, x, f"{prefix}.post_attention_layernorm.weight")
        mlp = f"{prefix}.{config.mlp_name}"
        gate, up = self._linear(g, normal, f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        inner = g.multiply(g.multiply(gate, g.sigmoid(gate)), up)
        return g.add(x, self._linear(g, inner, f"{mlp}.down_proj.weight")[0])

    def _output_layer(self, g: XnnpackGraph, x: int) -> int:
        config = self.config
        x = self._norm(g, x, "model.norm.weight")
        if not config.tie_word_embeddings:
            return g.reshape(self._linear(g, x, OUTPUT)[0], 1, config.vocab_size)
        tied = self.quantized.read(EMBEDDING)
        if isinstance(tied, QuantizedTensor) and tied.scheme.bits == 4:
            # The embedding kernel reads nibbles in the other order than XNNPACK. With every two
            # neighbouring columns exchanged both read the same bytes, which are stored once.
            swap = g.constant("output.exchange", torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
            pairs = g.linear(g.reshape(x, 1, 1, config.hidden_size // 2, 2), swap)
            x = g.reshape(pairs, 1, 1, config.hidden_size)
            tied = QuantizedTensor(exchange_columns(tied.codes), tied.scales, tied.scheme)
        logits = self._multiply_by(g, x, {EMBEDDING: tied})[0]
        return g.reshape(logits, 1, config.vocab_size)

    def _linear(self, g: XnnpackGraph, x: int, *names: str) -> list[int]:
        return self._multiply_by(g, x, {name: self.quantized.read(name) for name in names})

    def _multiply_by(
        self, g: XnnpackGraph, x: int, weights: dict[str, QuantizedTensor | Tensor]
    ) -> list[int]:
        """x times each weight; the quantized ones share one quantization of x."""
        quantized = None
        results = []
        for name, weight in weights.items():
            if isinstance(weight, QuantizedTensor):
                quantized = g.quantize(x) if quantized is None else quantized
                results.append(g.linear(quantized, g.weight(name, weight)))
            else:
                results.append(g.linear(x, g.constant(name, weight)))
        return results

    def _norm(self, g: XnnpackGraph, x: int, name: str) -> int:
        normal = self._normalize(g, x, self.config.hidden_size)
        return g.multiply(normal, g.constant(name, self.quantized.float_weight(name)))

    def _normalize(self, g: XnnpackGraph, x: int, width: int) -> int:
        """x over its root mean square; the mean is a product with a row of 1 / width."""
        row = g.constant(f"norm.mean_{width}", torch.full((1, width), 1 / width))
        eps = g.constant("norm.eps", torch.tensor([self.config.rms_norm_eps]))
        mean = g.linear(g.multiply(x, x), row)
        return g.multiply(x, g.reciprocal_square_root(g.add(mean, eps)))

    def _attention_inputs(self, g: XnnpackGraph, length: int) -> list[int]:
        config, context = self.config, self.context
        q = g.input(1, length, config.num_attention_heads, config.head_dim)
        if not self.portable:
            return [q]
        kv_heads = config.num_key_value_heads
        keys = g.input(kv_heads, context, config.head_dim)
        values = g.input(kv_heads, context, config.head_dim)
        return [q, keys, values, g.input(1, 1, length, context)]

    def _portable_attention(
        self, g: XnnpackGraph, q: int, keys: int, values: int, mask: int
    ) -> int:
        """Attention over the whole cache; the heads of one k/v head are stacked as rows."""
        config = self.config
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // kv_heads
        scale = g.constant("attention.scale", torch.tensor([head_dim**-0.5]))
        q = g.reshape(g.multiply(q, scale), INFERRED, kv_heads, group, head_dim)
        q = g.reshape(g.transpose(q, 1, 2, 0, 3), kv_heads, INFERRED, head_dim)
        scores = g.reshape(g.matmul_transposed(q, keys), kv_heads, group, INFERRED, self.context)
        shares = g.reshape(g.softmax(g.add(scores, mask)), kv_heads, INFERRED, self.context)
        mixed = g.reshape(g.matmul(shares, values), kv_heads, group, INFERRED, head_dim)
        return g.transpose(mixed, 2, 0, 1, 3)


def _quarter_turn(config: ModelConfig) -> Tensor:
    """R [head_dim, head_dim] of x R^T: the pair (a, b) becomes (-b, a)."""
    size = config.head_dim
    first = torch.arange(0, size, 2) if config.rope_interleaved else torch.arange(size // 2)
    second = first + (1 if config.rope_interleaved else size // 2)
    turn = torch.zeros(size, size)
    turn[first, second] = -1
    turn[second, first] = 1
    return turn


def exchange_columns(codes: Tensor) -> Tensor:
    exchanged: Tensor = codes.unflatten(1, (-1, 2)).flip(-1).flatten(1).contiguous()
    return exchanged
