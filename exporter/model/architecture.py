"""Families of decoders as data: what distinguishes `llama4_text`, `llama` and the others.

To add a family whose parts are all known, add an `Architecture` to `ARCHITECTURES`. What it says is
read in three places only: `config` (which keys are refused), `walk` (the order of operations) and
`rope` (which numbers of a head are a pair). No backend reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class QKNorm:
    """The RMS normalization of queries and keys: over each head or over all heads together, with
    a weight or without, before or after RoPE."""

    over: Literal["each head", "all heads"]
    weighted: bool
    after_rope: bool = False


@dataclass(frozen=True)
class Architecture:
    """One family, named by the `model_type` of its ``config.json``.

    The four norms are names of modules in a layer, None where the family has no norm there. A
    pre-norm is applied to the input of attention or MLP, a post-norm to the output, before the
    residual is added. `rope_interleaved` says that RoPE rotates adjacent numbers of a head as a
    pair; otherwise a number and the one half a head further on.

    The rest is about ``config.json``: `intermediate_size` is the key of the MLP's width,
    `head_dim`, `num_key_value_heads`, `rope_theta` and `rms_norm_eps` are transformers' defaults
    for keys that are left out (None: ``hidden_size // num_attention_heads``, and
    `num_attention_heads`), `layers_listed_by` is the key that lists what kind of attention each
    layer has, and `refused` maps the keys of features that no decoder here computes to what is
    supported instead.
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
)
ARCHITECTURES: Mapping[str, Architecture] = {family.model_type: family for family in _FAMILIES}
