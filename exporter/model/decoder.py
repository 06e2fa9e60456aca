"""The decoder of MobileLLM-R1 (``llama4_text``, dense) and of Llama, in real arithmetic.

Parameter names are those of the checkpoint, so a state dict needs no mapping. Attention is a
function given by the caller (``attend``): training, cached generation and every mobile format
attend in their own way over the same projections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: ``attend(layer, q, k, v)``: q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads,
#: head_dim], all after RoPE and q/k norm, to [batch, seq, heads, head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """What of ``config.json`` decides the arithmetic; names as in Hugging Face."""

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

    @property
    def rope_interleaved(self) -> bool:
        """Llama 4 rotates adjacent pairs; Llama rotates the two halves of a head."""
        return self.model_type == "llama4_text"

    @property
    def mlp_name(self) -> str:
        return "feed_forward" if self.model_type == "llama4_text" else "mlp"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a checkpoint of this model holds, in the order of computation."""
        hidden, heads = self.hidden_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            mlp = f"{prefix}.{self.mlp_name}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (hidden,),
                f"{prefix}.self_attn.q_proj.weight": (heads, hidden),
                f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
                f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
                f"{prefix}.self_attn.o_proj.weight": (hidden, heads),
                f"{prefix}.post_attention_layernorm.weight": (hidden,),
                f"{mlp}.gate_proj.weight": (self.intermediate_size, hidden),
                f"{mlp}.up_proj.weight": (self.intermediate_size, hidden),
                f"{mlp}.down_proj.weight": (hidden, self.intermediate_size),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def kv_cache_bytes(self, context: int, bytes_per_value: int) -> int:
        """Keys and values of every layer for ``context`` positions."""
        per_position = 2 * self.num_key_value_heads * self.head_dim * self.num_hidden_layers
        return per_position * context * bytes_per_value


def rope_tables(config: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [context, head_dim // 2].

    Computed in float32 as transformers does, so that large positions agree to the last bit.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.outer(
        torch.arange(context, dtype=torch.float32), 1.0 / (config.rope_theta**exponents)
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE on x [batch, seq, heads, head_dim] with cos and sin [seq, head_dim // 2]."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, low * sin + high * cos), -1)


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square along the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, heads, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(heads, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        config = self.config
        by_head = (-1, config.head_dim)
        q = self.q_proj(x).unflatten(-1, by_head)
        k = self.k_proj(x).unflatten(-1, by_head)
        v = self.v_proj(x).unflatten(-1, by_head)
        q = rotate(q, cos, sin, config.rope_interleaved)
        k = rotate(k, cos, sin, config.rope_interleaved)
        if config.use_qk_norm:
            q, k = rms_normalize(q, config.rms_norm_eps), rms_normalize(k, config.rms_norm_eps)
        out: Tensor = self.o_proj(attend(self.layer, q, k, v).flatten(-2))
        return out


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_name = config.mlp_name
        self.add_module(config.mlp_name, FeedForward(config))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        out: Tensor = x + self.get_submodule(self.mlp_name)(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """Everything below the output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Token ids to logits; the same arithmetic as transformers' Llama4 and Llama, float32."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        with torch.device("cpu"):
            cos, sin = rope_tables(config, context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens [batch, seq] at positions [seq] to normalized states [batch, seq, hidden]."""
        cos, sin = self.get_buffer("cos")[positions], self.get_buffer("sin")[positions]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens [batch, seq] at positions [seq] to logits [batch, seq, vocab_size]."""
        logits: Tensor = self.lm_head(self.hidden_states(tokens, positions, attend))
        return logits

    def score(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab_size] of whole sequences, without a cache."""
        logits: Tensor = self(tokens, torch.arange(tokens.shape[1]), attend_causal)
        return logits


def attend_causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention over the sequence at hand (see `Attend`)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class StaticCache:
    """Keys and values [layers, batch, kv_heads, context, head_dim] of texts that run in step."""

    def __init__(
        self,
        config: ModelConfig,
        context: int,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        size = (layers, batch, heads, context, config.head_dim)
        self.keys, self.values = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        self.start = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Leave only these of the texts, in this order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new positions, from `start`, over all before them (see `Attend`)."""
        end = self.start + q.shape[1]
        self.keys[layer, :, :, self.start : end] = k.transpose(1, 2)
        self.values[layer, :, :, self.start : end] = v.transpose(1, 2)
        visible = torch.ones(q.shape[1], end, dtype=torch.bool).tril(self.start)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            self.keys[layer, :, :, :end],
            self.values[layer, :, :, :end],
            attn_mask=visible,
            enable_gqa=True,
        )
        return out.transpose(1, 2)


class FloatWeights(Protocol):
    """A checkpoint or a quantized checkpoint, as a source of float32 weights."""

    @property
    def config(self) -> ModelConfig: ...

    def float_weight(self, name: str) -> Tensor: ...


def load_decoder(source: FloatWeights, context: int) -> Decoder:
    """The whole model in memory, float32."""
    with torch.device("meta"):
        decoder = Decoder(source.config, context)
    fill_weights(decoder, source, "")
    return decoder.eval()


def fill_weights(module: nn.Module, source: FloatWeights, prefix: str) -> None:
    """Give every parameter of a module that is still on the meta device its weight."""
    tied = source.config.tie_word_embeddings
    names = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    weights = {name: source.float_weight(prefix + name) for name in names}
    module.load_state_dict(weights, assign=True, strict=False)
    if isinstance(module, Decoder):
        if tied and isinstance(module.lm_head, nn.Linear):
            module.lm_head.weight = module.model.embed_tokens.weight
        cos, sin = rope_tables(module.config, module.context)
        module.register_buffer("cos", cos, persistent=False)
        module.register_buffer("sin", sin, persistent=False)
    module.requires_grad_(False)
