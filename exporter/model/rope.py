"""Rotary position embeddings (RoPE): tables, and the rotation as formula and as matrix."""

import torch
from torch import Tensor

from exporter.model.config import ModelConfig


def rope_tables(config: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [context, head_dim // 2].

    Computed in float32 like in transformers, so that large positions agree bit for bit.
    """
    angles = torch.outer(torch.arange(context, dtype=torch.float32), rope_frequencies(config))
    return angles.cos(), angles.sin()


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The angle between two positions for each pair of numbers, float32 [head_dim // 2]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / (config.rope_theta**exponents)


def paired_rope_tables(config: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each number's pair, each float32 [context, head_dim].

    With R from `quarter_turn`, RoPE on x is x * cos + (x Rᵀ) * sin.
    """
    cos, sin = rope_tables(config, context)
    if config.rope_interleaved:
        return cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)
    return cos.repeat(1, 2), sin.repeat(1, 2)


def quarter_turn(config: ModelConfig) -> Tensor:
    """The matrix R [head_dim, head_dim] that rotates each pair by 90 degrees.

    x Rᵀ maps each pair (a, b) to (-b, a), like `rotate_half` in transformers.
    """
    size = config.head_dim
    pairs = torch.arange(size)
    if config.rope_interleaved:
        first, second = pairs[0::2], pairs[1::2]
    else:
        first, second = pairs.chunk(2)
    turn = torch.zeros(size, size)
    turn[first, second] = -1
    turn[second, first] = 1
    return turn


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE on x [batch, seq, heads, head_dim] with cos and sin [seq, head_dim // 2]."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, low * sin + high * cos), -1)
