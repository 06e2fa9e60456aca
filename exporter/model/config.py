"""The configuration of a decoder: the keys of ``config.json`` that affect its computation.

Unsupported features are refused with the key's name. Without this check, the artifact would be
wrong without a message.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from exporter.errors import InputError, short
from exporter.model.architecture import ARCHITECTURES, Architecture, QKNorm

EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

#: Keys of unsupported features, for every family. They must be absent, false, 0 or empty.
_REFUSED = dict.fromkeys(
    ("attention_bias", "mlp_bias", "attn_temperature_tuning", "for_llm_compressor"), "false"
)
#: The largest value of each key: far above any small language model, and small enough that its
#: shapes are listed in little memory.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 24,
    "rms_norm_eps": 1,
    "rope_theta": 1e15,
}
_Refuse = Callable[[str, object, str], InputError]


@dataclass(frozen=True)
class LayerWeights:
    """The names of one layer's weights in the order of computation, None for those it lacks."""

    pre_attention_norm: str | None
    q_proj: str
    k_proj: str
    v_proj: str
    q_norm: str | None
    k_norm: str | None
    o_proj: str
    post_attention_norm: str | None
    pre_mlp_norm: str | None
    gate_proj: str
    up_proj: str
    down_proj: str
    post_mlp_norm: str | None


@dataclass(frozen=True)
class ModelConfig:
    """The values of ``config.json`` that affect the computation, with the names of transformers."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    use_qk_norm: bool
    tie_word_embeddings: bool

    @cached_property
    def architecture(self) -> Architecture:
        """The model family."""
        return ARCHITECTURES[self.model_type]

    @cached_property
    def qk_norm(self) -> QKNorm | None:
        """The norm of queries and keys, or None."""
        return self.architecture.qk_norm if self.use_qk_norm else None

    @cached_property
    def rope_interleaved(self) -> bool:
        """Whether RoPE pairs adjacent numbers of a head instead of its two halves."""
        return self.architecture.rope_interleaved

    @cached_property
    def output_weight(self) -> str:
        """The name of the output layer's weight: the embedding, if both are tied."""
        return EMBEDDING if self.tie_word_embeddings else OUTPUT

    def is_multiplied(self, name: str) -> bool:
        """Whether the weight is a factor of a matrix product.

        The weight of a norm is not, and neither is an untied embedding, which is a lookup table.
        """
        only_looked_up = name == EMBEDDING and name != self.output_weight
        return len(self._shapes[name]) == 2 and not only_looked_up

    def layer_weights(self, layer: int) -> LayerWeights:
        """The names of the weights of layer `layer`, counted from 0."""
        return self._layer_weights[layer]

    @cached_property
    def _layer_weights(self) -> tuple[LayerWeights, ...]:
        return tuple(map(self._weights_of, range(self.num_hidden_layers)))

    def _weights_of(self, layer: int) -> LayerWeights:
        family, qk_norm = self.architecture, self.qk_norm
        prefix = f"model.layers.{layer}"

        def optional(module: str | None) -> str | None:
            return f"{prefix}.{module}.weight" if module else None

        def attention(part: str) -> str:
            return f"{prefix}.self_attn.{part}.weight"

        def mlp(part: str) -> str:
            return f"{prefix}.{family.mlp}.{part}.weight"

        weighted = qk_norm is not None and qk_norm.weighted
        return LayerWeights(
            pre_attention_norm=optional(family.pre_attention_norm),
            q_proj=attention("q_proj"),
            k_proj=attention("k_proj"),
            v_proj=attention("v_proj"),
            q_norm=attention("q_norm") if weighted else None,
            k_norm=attention("k_norm") if weighted else None,
            o_proj=attention("o_proj"),
            post_attention_norm=optional(family.post_attention_norm),
            pre_mlp_norm=optional(family.pre_mlp_norm),
            gate_proj=mlp("gate_proj"),
            up_proj=mlp("up_proj"),
            down_proj=mlp("down_proj"),
            post_mlp_norm=optional(family.post_mlp_norm),
        )

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of one layer by name, in the order of computation."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads = self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        by_head = self.qk_norm is not None and self.qk_norm.over == "each head"
        names = self.layer_weights(layer)
        shapes: list[tuple[str | None, tuple[int, ...]]] = [
            (names.pre_attention_norm, (hidden,)),
            (names.q_proj, (heads, hidden)),
            (names.k_proj, (kv, hidden)),
            (names.v_proj, (kv, hidden)),
            (names.q_norm, (self.head_dim if by_head else heads,)),
            (names.k_norm, (self.head_dim if by_head else kv,)),
            (names.o_proj, (hidden, heads)),
            (names.post_attention_norm, (hidden,)),
            (names.pre_mlp_norm, (hidden,)),
            (names.gate_proj, (inner, hidden)),
            (names.up_proj, (inner, hidden)),
            (names.down_proj, (hidden, inner)),
            (names.post_mlp_norm, (hidden,)),
        ]
        return {name: shape for name, shape in shapes if name}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the checkpoint by name, in the order of computation."""
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            shapes |= self.layer_shapes(layer)
        shapes[FINAL_NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes[OUTPUT] = (self.vocab_size, self.hidden_size)
        return shapes

    def kv_cache_bytes(self, context: int, bytes_per_value: int, bytes_per_head: int = 0) -> int:
        """The bytes of keys and values of all layers for `context` positions. Each head of a
        position has `bytes_per_head` more, such as a scale."""
        heads = 2 * self.num_key_value_heads * self.num_hidden_layers
        return heads * context * (self.head_dim * bytes_per_value + bytes_per_head)


def parse_config(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    """Parse a ``config.json``. Missing keys have the defaults of transformers.

    Raises InputError with the key, its value and the supported values.
    """

    def refuse(key: str, value: object, supported: str) -> InputError:
        return InputError(
            f"{path}: {key}", f"{short(value)} is not supported", f"This tool supports {supported}"
        )

    def positive(key: str, default: object = None) -> Any:
        value = raw.get(key, default)
        if not _is_number(value) or value <= 0:
            raise refuse(key, value, "a number greater than zero here")
        largest = _LARGEST["intermediate_size" if key == inner else key]
        if value > largest:
            raise refuse(key, value, f"up to {largest:,} here")
        return value

    def size(key: str, default: object = None) -> int:
        value = positive(key, default)
        if int(value) != value:
            raise refuse(key, value, "a whole number here")
        return int(value)

    model_type = raw.get("model_type")
    family = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = [f"{name!r} ({one.description})" for name, one in ARCHITECTURES.items()]
        raise refuse("model_type", model_type, " and ".join((", ".join(known[:-1]), known[-1])))
    inner = family.intermediate_size
    layers = size("num_hidden_layers")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads = size("num_key_value_heads", family.num_key_value_heads or heads)
    context = size("max_position_embeddings")
    if heads % kv_heads:
        raise refuse("num_key_value_heads", kv_heads, f"a divisor of {heads} attention heads")
    head_dim = size("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise refuse("head_dim", head_dim, "an even head_dim (RoPE rotates pairs)")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise refuse("tie_word_embeddings", tied, "true or false")
    _refuse_unsupported(raw, family, refuse)
    theta = _rope_theta(raw, family.rope_theta, refuse)
    _check_layers(raw, family, layers, context, refuse)
    return ModelConfig(
        model_type=family.model_type,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(inner if inner in raw else "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=float(positive("rms_norm_eps", family.rms_norm_eps)),
        rope_theta=theta,
        use_qk_norm=family.qk_norm is not None and bool(raw.get("use_qk_norm", True)),
        tie_word_embeddings=tied,
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is a finite number. bool is not a number here, although it is an int."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unsupported(raw: Mapping[str, Any], family: Architecture, refuse: _Refuse) -> None:
    """Refuse features that would change the computation of every layer."""
    activation = raw.get("hidden_act", raw.get("hidden_activation"))
    if activation != "silu":
        raise refuse("hidden_act", activation, "'silu'")
    refused = {**_REFUSED, **family.refused}
    for key, supported in refused.items():
        if raw.get(key):
            raise refuse(key, raw[key], supported)
    absent = ["quantization_config"]
    if (
        "use_sliding_window" not in refused
    ):  # with this key, sliding_window has no effect of its own
        absent.append("sliding_window")
    for key in absent:
        if raw.get(key) is not None:
            raise refuse(key, raw[key], "float checkpoints with full attention (key absent)")


def _rope_theta(raw: Mapping[str, Any], default: float, refuse: _Refuse) -> float:
    """The base of RoPE, from either key: transformers 5 moves it into ``rope_parameters``."""
    if raw.get("rope_scaling") is not None:
        kind = raw["rope_scaling"]
        if not isinstance(kind, dict) or kind.get("rope_type", kind.get("type")) != "default":
            raise refuse("rope_scaling", kind, "null")
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise refuse("rope_parameters", parameters, "an object with rope_theta")
    if parameters.get("rope_type", "default") != "default":
        raise refuse("rope_parameters.rope_type", parameters["rope_type"], "'default'")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(
            "rope_parameters.partial_rotary_factor", parameters["partial_rotary_factor"], "1.0"
        )
    theta = raw.get("rope_theta", parameters.get("rope_theta", default))
    if not _is_number(theta) or not 1 < theta <= _LARGEST["rope_theta"]:
        supported = f"a number greater than one, up to {_LARGEST['rope_theta']:g}"
        raise refuse("rope_theta", theta, supported)
    return float(theta)


def _check_layers(
    raw: Mapping[str, Any], family: Architecture, layers: int, context: int, refuse: _Refuse
) -> None:
    """Every layer must have RoPE and attend over the whole context."""
    if family.layers_listed_by == "layer_types":
        kinds = raw.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * layers:
            raise refuse("layer_types", kinds, f"full attention ({layers} times 'full_attention')")
        return
    uses_rope = raw.get("no_rope_layers")
    # Despite the key's name, 1 means that the layer uses RoPE. Without the list, transformers uses
    # no RoPE in every fourth layer.
    listed = uses_rope[:layers] if isinstance(uses_rope, list) else []
    if len(listed) < layers or any(flag != 1 for flag in listed):
        raise refuse("no_rope_layers", uses_rope, f"RoPE in every layer ({layers} times 1)")
    chunk = raw.get("attention_chunk_size", 8192)
    if chunk is not None and not (_is_number(chunk) and chunk >= context):
        raise refuse(
            "attention_chunk_size", chunk, f"chunks of at least max_position_embeddings ({context})"
        )
