"""The float decoder in torch, for the reference, calibration and training.

Parameters have the checkpoint's names, so that a state dict needs no mapping. The caller gives the
attention as a function (`Attend`): training, generation with a cache and calibration differ in it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.model.config import EMBEDDING, FINAL_NORM, ModelConfig
from exporter.model.rope import rope_tables, rotate
from exporter.model.walk import Operations, walk_hidden_states, walk_layer

#: ``attend(layer, q, k, v)``: q [batch, seq, heads, head_dim], k and v [batch, seq, kv_heads,
#: head_dim], all after RoPE and q/k norm, to [batch, seq, heads, head_dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


#: The most queries whose attention scores are in memory at once.
QUERIES_AT_ONCE = 512


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square along the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """RMS norm with a weight [size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalize(x, self.eps) * self.weight


class TorchOperations:
    """The operations of the walk on tensors (see `Operations`).

    `modules` returns the module of a weight by the weight's name. `cos` and `sin` [seq, head_dim //
    2] are the rows of RoPE for the positions of the input. Every position is computed, not only
    the last one.
    """

    def __init__(
        self,
        config: ModelConfig,
        modules: Callable[[str], nn.Module],
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        tokens: Tensor | None = None,
    ) -> None:
        self.config, self._modules, self._tokens = config, modules, tokens
        self.cos, self.sin, self.attention = cos, sin, attend

    def _apply(self, x: Tensor, weight: str) -> Tensor:
        result: Tensor = self._modules(weight)(x)
        return result

    def embed(self, weight: str) -> Tensor:
        assert self._tokens is not None
        return self._apply(self._tokens, weight)

    def norm(self, x: Tensor, weight: str) -> Tensor:
        return self._apply(x, weight)

    def linear(self, x: Tensor, *weights: str) -> list[Tensor]:
        return [self._apply(x, weight) for weight in weights]

    def heads(self, x: Tensor, count: int) -> Tensor:
        by_head: Tensor = x.unflatten(-1, (count, self.config.head_dim))
        return by_head

    def norm_heads(self, x: Tensor, weight: str | None) -> Tensor:
        return self._apply(x, weight) if weight else rms_normalize(x, self.config.rms_norm_eps)

    def rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self.cos, self.sin, self.config.rope_interleaved)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(layer, q, k, v).flatten(-2)

    def last_token(self, x: Tensor) -> Tensor:
        return x

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def output(self, x: Tensor, weight: str) -> Tensor:
        return self._apply(x, weight)


class DecoderLayer(nn.Module):
    """One layer's weights as modules, named as in the checkpoint after ``model.layers.N.``."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.prefix = f"model.layers.{index}."
        self._places = dict[str, tuple[str, str]]()  # weight → its module's parent and name
        for name, shape in config.layer_shapes(index).items():
            path = name.removeprefix(self.prefix).removesuffix(".weight")
            parent, _, child = path.rpartition(".")
            self._places[name] = parent, child
            module = (
                nn.Linear(shape[1], shape[0], bias=False)
                if len(shape) == 2
                else RMSNorm(shape[0], config.rms_norm_eps)
            )
            self._parent(parent).add_module(child, module)

    def _parent(self, path: str) -> nn.Module:
        """The parent module at `path`, created if it does not exist."""
        if path and path not in dict(self.named_children()):
            self.add_module(path, nn.Module())
        return self.get_submodule(path)

    def _module(self, weight: str) -> nn.Module:
        """The module of a weight as it is now: calibration replaces some. `get_submodule` would
        cost more than the smallest products."""
        parent, child = self._places[weight]
        found: nn.Module = getattr(getattr(self, parent) if parent else self, child)
        return found

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [batch, seq, hidden_size] to the same shape, with cos and sin [seq, head_dim // 2]."""

        ops = TorchOperations(self.config, self._module, cos, sin, attend)
        return walk_layer(self.config, self.index, ops, x)


class Backbone(nn.Module):
    """Embedding, layers and final norm: the decoder without its output layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """Token ids to logits in float32, computed as in transformers."""

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

        def module(weight: str) -> nn.Module:
            return self.get_submodule(weight.removesuffix(".weight"))

        def layer(index: int, ops: Operations[Tensor], x: Tensor) -> Tensor:
            # Called as a module, so that its hooks run (FSDP).
            result: Tensor = self.model.layers[index](x, cos, sin, attend)
            return result

        ops = TorchOperations(self.config, module, cos, sin, attend, tokens)
        return walk_hidden_states(self.config, ops, layer)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """tokens [batch, seq] at positions [seq] to logits [batch, seq, vocab_size]."""
        logits: Tensor = self.lm_head(self.hidden_states(tokens, positions, attend))
        return logits

    def score(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab_size] of whole sequences, without a cache."""
        logits: Tensor = self(tokens, torch.arange(tokens.shape[1]), attend_causal)
        return logits


def attend_causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention over the given sequence, without a cache (see `Attend`)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


class StaticCache:
    """Keys and values [layers, batch, kv_heads, context, head_dim] of texts of equal length.

    `start` is the number of positions that are filled.
    """

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
        """Keep only these texts of the batch, in this order."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of new positions from `start` on over all positions so far (see `Attend`)."""
        end = self.start + q.shape[1]
        self.keys[layer, :, :, self.start : end] = k.transpose(1, 2)
        self.values[layer, :, :, self.start : end] = v.transpose(1, 2)
        out = [
            self._attend_part(layer, part, start)
            for start, part in zip(
                range(self.start, end, QUERIES_AT_ONCE), q.split(QUERIES_AT_ONCE, 1), strict=True
            )
        ]
        return torch.cat(out, 1)

    def _attend_part(self, layer: int, q: Tensor, start: int) -> Tensor:
        """As `attend`, for positions from `start` on, whose keys and values are in the cache."""
        end = start + q.shape[1]
        visible = torch.ones(q.shape[1], end, dtype=torch.bool).tril(start)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            self.keys[layer, :, :, :end],
            self.values[layer, :, :, :end],
            attn_mask=visible,
            enable_gqa=True,
        )
        return out.transpose(1, 2)


class FloatWeights(Protocol):
    """A source of float32 weights: a checkpoint or a quantized checkpoint."""

    @property
    def config(self) -> ModelConfig: ...

    def float_weight(self, name: str) -> Tensor: ...


def load_decoder(source: FloatWeights, context: int) -> Decoder:
    """Load the whole model into memory, float32."""
    with torch.device("meta"):
        decoder = Decoder(source.config, context)
    fill_weights(decoder, source, "")
    return decoder.eval()


def stream_layers(source: FloatWeights) -> Iterator[DecoderLayer]:
    """Load the layers one after another, float32.

    Only one is in memory at a time, unless the caller keeps them.
    """
    for index in range(source.config.num_hidden_layers):
        with torch.device("meta"):
            layer = DecoderLayer(source.config, index)
        fill_weights(layer, source, layer.prefix)
        yield layer


def load_final_norm(source: FloatWeights) -> RMSNorm:
    """The norm between the last layer and the output layer."""
    with torch.device("meta"):
        norm = RMSNorm(source.config.hidden_size, source.config.rms_norm_eps)
    fill_weights(norm, source, FINAL_NORM.removesuffix("weight"))
    return norm


def embed(source: FloatWeights, tokens: Tensor) -> Tensor:
    """The rows of the embedding for tokens [batch, seq]: float32 [batch, seq, hidden]."""
    return F.embedding(tokens, source.float_weight(EMBEDDING))


def fill_weights(module: nn.Module, source: FloatWeights, prefix: str) -> None:
    """Load the weights of a module's parameters that are on the meta device."""
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
