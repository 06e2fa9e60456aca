"""The decoder's forward pass, defined once for all backends.

`walk` calls the methods of an `Operations` object in the order of computation. torch, ONNX, Core ML
and XNNPACK implement `Operations`. The type of a value is up to the implementation: a tensor, a
name in a graph, or an operation that is emitted later. So an implementation can fuse consecutive
operations. A format of weights only, such as GGUF, needs the names in `ModelConfig` but no walk.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from exporter.model.config import EMBEDDING, FINAL_NORM, LayerWeights, ModelConfig

V = TypeVar("V")


class Operations(Protocol[V]):
    """The operations of a decoder on values of type V.

    Hidden states are [batch, seq, hidden_size]. Weights are given by their names in the checkpoint.
    """

    def embed(self, weight: str) -> V:
        """The rows of the embedding for the input tokens."""

    def norm(self, x: V, weight: str) -> V:
        """RMS norm over the last dimension."""

    def linear(self, x: V, *weights: str) -> Sequence[V]:
        """x times the transpose of each weight. An implementation may merge the products."""

    def heads(self, x: V, count: int) -> V:
        """Split [batch, seq, count * head_dim] into [batch, seq, count, head_dim]."""

    def norm_heads(self, x: V, weight: str | None) -> V:
        """RMS norm of each head, with a weight [head_dim] or without."""

    def rotate(self, x: V) -> V:
        """RoPE on each head."""

    def attend(self, layer: int, q: V, k: V, v: V) -> V:
        """Append k and v to the layer's cache, and compute grouped-query attention over it.

        Returns [batch, seq, num_attention_heads * head_dim].
        """

    def last_token(self, x: V) -> V:
        """The last position of x, or x itself if the caller needs every position."""

    def silu_product(self, gate: V, up: V) -> V:
        """SiLU(gate) * up."""

    def add(self, x: V, y: V) -> V:
        """The residual sum x + y."""

    def output(self, x: V, weight: str) -> V:
        """Logits [batch, seq, vocab_size] of normalized hidden states."""


#: ``layer(index, operations, x)``: the hidden states after one layer.
Layer = Callable[[int, Operations[V], V], V]


def walk(config: ModelConfig, ops: Operations[V]) -> V:
    """The whole forward pass, from tokens to logits."""
    return ops.output(walk_hidden_states(config, ops), config.output_weight)


def walk_hidden_states(config: ModelConfig, ops: Operations[V], layer: Layer[V] | None = None) -> V:
    """The forward pass from tokens to the normalized hidden states before the output layer.

    `layer` replaces `walk_layer`, for a caller that wraps each layer in a module of its own.
    """
    x = ops.embed(EMBEDDING)
    for index in range(config.num_hidden_layers):
        x = layer(index, ops, x) if layer else walk_layer(config, index, ops, x)
    return ops.norm(x, FINAL_NORM)


def walk_layer(config: ModelConfig, index: int, ops: Operations[V], x: V) -> V:
    """One layer: attention and MLP, each with its norms and its residual sum."""
    names = config.layer_weights(index)
    q, k, v = _queries_keys_values(config, names, ops, _norm(ops, x, names.pre_attention_norm))
    attended = ops.attend(index, q, k, v)
    if index == config.num_hidden_layers - 1:
        # After the last attention, positions are independent, and only the last one is needed.
        x, attended = ops.last_token(x), ops.last_token(attended)
    [projected] = ops.linear(attended, names.o_proj)
    x = ops.add(x, _norm(ops, projected, names.post_attention_norm))
    gate, up = ops.linear(_norm(ops, x, names.pre_mlp_norm), names.gate_proj, names.up_proj)
    [down] = ops.linear(ops.silu_product(gate, up), names.down_proj)
    return ops.add(x, _norm(ops, down, names.post_mlp_norm))


def _queries_keys_values(
    config: ModelConfig, names: LayerWeights, ops: Operations[V], x: V
) -> tuple[V, V, V]:
    """Project x to heads of queries, keys and values, with RoPE and q/k norm."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = ops.linear(x, names.q_proj, names.k_proj, names.v_proj)
    q = _rotated_heads(config, ops, q, heads, names.q_norm)
    k = _rotated_heads(config, ops, k, kv_heads, names.k_norm)
    return q, k, ops.heads(v, kv_heads)


def _rotated_heads(
    config: ModelConfig, ops: Operations[V], x: V, heads: int, weight: str | None
) -> V:
    """Split queries or keys into heads and apply RoPE, with the q/k norm before or after it."""
    rule = config.qk_norm
    if rule and rule.over == "all heads":
        x = _norm(ops, x, weight)
    x = ops.heads(x, heads)
    if rule and rule.over == "each head" and not rule.after_rope:
        x = ops.norm_heads(x, weight)
    x = ops.rotate(x)
    if rule and rule.over == "each head" and rule.after_rope:
        x = ops.norm_heads(x, weight)
    return x


def _norm(ops: Operations[V], x: V, weight: str | None) -> V:
    """The norm, or x itself if the architecture has no norm here."""
    return ops.norm(x, weight) if weight else x
