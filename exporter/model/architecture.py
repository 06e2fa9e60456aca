"""Model families as data: the differences between `llama4_text`, `llama` and the others.

A family whose operations all exist needs only an entry in `_FAMILIES`. Three modules read it:
`config` (defaults and refused keys), `walk` (the order of operations) and `rope` (the pairs of
numbers that RoPE rotates).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class QKNorm:
    """RMS norm of queries and keys: over each head or over all heads together, with a weight or
    without, before or after RoPE."""

    over: Literal["each head", "all heads"]
    weighted: bool
    after_rope: bool = False


@dataclass(frozen=True)
class Architecture:
    """One family, named by the `model_type` of its ``config.json``.

    The fields of the layer: `mlp` and the four norms are names of its modules. A norm is None if
    the family does not have it. A pre-norm is applied to the input of attention or MLP, and a
    post-norm to the output before the residual sum. With `rope_interleaved`, RoPE rotates pairs of
    adjacent numbers of a head; otherwise the numbers of a pair are half a head apart.

    The fields for ``config.json``: `intermediate_size` is the key of the MLP's width. `head_dim`,
    `num_key_value_heads`, `rope_theta` and `rms_norm_eps` are transformers' defaults for missing
    keys; None stands for ``hidden_size // num_attention_heads`` and for `num_attention_heads`.
    `layers_listed_by` is the key with the kind of attention of each layer. `refused` maps keys of
    unsupported features to the supported values, for the error message.
    """

    model_type: str
    description: str
    mlp: str = "mlp"
    pre_attention_norm: str | None = "input_layernorm"
    post_attention_norm: str | None = None
    pre_mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    qk_norm: QKNorm | None = None
    rope_interleaved: bool = False
    intermediate_size: str = "intermediate_size"
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    layers_listed_by: Literal["layer_types", "no_rope_layers"] = "layer_types"
    refused: Mapping[str, str] = field(default_factory=dict)


_FAMILIES = (
    Architecture(
        model_type="llama4_text",
        description="MobileLLM-R1",
        mlp="feed_forward",
        qk_norm=QKNorm(over="each head", weighted=False, after_rope=True),
        rope_interleaved=True,
        intermediate_size="intermediate_size_mlp",
        head_dim=128,
        num_key_value_heads=8,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        layers_listed_by="no_rope_layers",
        refused={
            "moe_layers": "dense layers only (empty list, step 0)",
            "interleave_moe_layer_step": "dense layers only (empty list, step 0)",
            "num_local_experts": "dense layers only (0)",
            "num_experts_per_tok": "dense layers only (0)",
        },
    ),
    Architecture(model_type="llama", description="Llama, SmolLM2"),
    Architecture(
        model_type="qwen3",
        description="Qwen3, dense",
        qk_norm=QKNorm(over="each head", weighted=True),
        head_dim=128,
        num_key_value_heads=32,
        refused={"use_sliding_window": "full attention (false)"},
    ),
    Architecture(
        model_type="olmo2",
        description="OLMo-2",
        pre_attention_norm=None,
        post_attention_norm="post_attention_layernorm",
        pre_mlp_norm=None,
        post_mlp_norm="post_feedforward_layernorm",
        qk_norm=QKNorm(over="all heads", weighted=True),
        rms_norm_eps=1e-5,
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {family.model_type: family for family in _FAMILIES}
