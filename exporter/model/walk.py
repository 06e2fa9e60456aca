"""The decoder, written down once: a walk that calls the operations of whoever computes it.

torch, ONNX, Core ML and XNNPACK implement `Operations`. What a value is belongs to them: a tensor,
a name in a graph, or a record of what is still to be written. So an implementation may fuse
operations that follow each other. GGUF-like formats need the names of `ModelConfig` only.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from exporter.model.config import EMBEDDING, FINAL_NORM, LayerWeights, ModelConfig

V = TypeVar("V")


class Operations(Protocol[V]):
    """What a decoder is made of. Hidden states are [batch, seq, width]; weights are given by their
    names in the checkpoint."""

    def embed(self, weight: str) -> V:
        """The rows of the embedding for the tokens that are read."""

    def norm(self, x: V, weight: str) -> V:
        """RMS norm over the last dimension."""

    def linear(self, x: V, *weights: str) -> Sequence[V]:
        """x times the transpose of each weight; they may share one product."""

    def heads(self, x: V, count: int) -> V:
        """[batch, seq, count * head_dim] as [batch, seq, count, head_dim]."""

    def norm_heads(self, x: V, weight: str | None) -> V:
        """RMS norm of each head, with a weight [head_dim] or without."""

    def rotate(self, x: V) -> V:
        """RoPE on each head."""

    def attend(self, layer: int, q: V, k: V, v: V) -> V:
        """Keep keys and values in the layer's cache and attend over it, the heads of q in groups:
        [batch, seq, num_attention_heads * head_dim]."""

    def last_token(self, x: V) -> V:
        """The last position of x, where only that is asked for."""

    def silu_product(self, gate: V, up: V) -> V:
        """SiLU(gate) * up."""

    def add(self, x: V, y: V) -> V:
        """The residual sum."""

    def output(self, x: V, weight: str) -> V:
        """Logits [batch, seq, vocab_size] of normalized hidden states."""


#: ``layer(index, operations, x)``: the hidden states after one layer.
Layer = Callable[[int, Operations[V], V], V]


def walk(config: ModelConfig, ops: Operations[V]) -> V:
    """From tokens to logits."""
    return ops.output(walk_hidden_states(config, ops), config.output_weight)


def walk_hidden_states(config: ModelConfig, ops: Operations[V], layer: Layer[V] | None = None) -> V:
    """From tokens to the normalized hidden states that the output layer reads. `layer` computes
    one layer where the caller has modules of its own for that; it ends in `walk_layer`."""
    x = ops.embed(EMBEDDING)
    for index in range(config.num_hidden_layers):
        x = layer(index, ops, x) if layer else walk_layer(config, index, ops, x)
    return ops.norm(x, FINAL_NORM)


def walk_layer(config: ModelConfig, index: int, ops: Operations[V], x: V) -> V:
    """One layer: attention and MLP, each with its norms and its residual."""
    names = config.layer_weights(index)
    q, k, v = _queries_keys_values(config, names, ops, _norm(ops, x, names.pre_attention_norm))
    attended = ops.attend(index, q, k, v)
    if index == config.num_hidden_layers - 1:
        # Nothing after the last attention looks at another position.
        x, attended = ops.last_token(x), ops.last_token(attended)
    [projected] = ops.linear(attended, names.o_proj)
    x = ops.add(x, _norm(ops, projected, names.post_attention_norm))
    gate, up = ops.linear(_norm(ops, x, names.pre_mlp_norm), names.gate_proj, names.up_proj)
    [down] = ops.linear(ops.silu_product(gate, up), names.down_proj)
    return ops.add(x, _norm(ops, down, names.post_mlp_norm))


def _queries_keys_values(
    config: ModelConfig, names: LayerWeights, ops: Operations[V], x: V
) -> tuple[V, V, V]:
    """The projections of x by head; queries and keys rotated, and normalized where that is so."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = ops.linear(x, names.q_proj, names.k_proj, names.v_proj)
    q = _positioned(config, ops, q, heads, names.q_norm)
    k = _positioned(config, ops, k, kv_heads, names.k_norm)
    return q, k, ops.heads(v, kv_heads)


def _positioned(config: ModelConfig, ops: Operations[V], x: V, heads: int, weight: str | None) -> V:
    """Queries or keys by head after RoPE and, before or after that, their norm."""
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
    """The norm, where the architecture has one here."""
    return ops.norm(x, weight) if weight else x
