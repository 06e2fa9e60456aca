"""The KV cache and the attention over it, in each form that a program may have.

A form has the buffers of a layer's cache, the operators that update it, and what the next XNNPACK
call receives. `attention_form` chooses it by the options of the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from executorch.extension.llm.custom_ops import custom_ops as _custom_ops  # noqa: F401
from torch import Tensor
from torch.ao.quantization.fx import _decomposed as _quantize_operators  # noqa: F401

from exporter.backends.executorch import Target
from exporter.model.config import ModelConfig

#: ``last(x, dim)``: the positions of x along `dim` whose logits a call gives.
Last = Callable[[Tensor, int], Tensor]

#: Added to the attention score of a masked position.
_MASKED_SCORE = -1e9


@dataclass(frozen=True)
class Step:
    """The positions of a call: the first one as a number, all as int64 [seq], and the `mask` of
    the form, if it has one."""

    position: Any
    positions: Tensor
    mask: Tensor | None


class AttentionForm(Protocol):
    """One way to keep keys and values and to attend over them."""

    def buffers(self) -> dict[str, Tensor]:
        """The empty cache of one layer."""

    def mask(self, positions: Tensor) -> Tensor | None:
        """The mask that all layers share, for the positions [seq] of a call."""

    def attend(
        self, cache: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> list[Tensor]:
        """Update the cache of a layer. Returns the inputs of the next XNNPACK call.

        q [1, seq, heads, head_dim], k and v [1, seq, kv_heads, head_dim].
        """

    def last_token(self, attended: list[Tensor], last: Last) -> list[Tensor]:
        """The result of `attend` for the last position or positions only."""


def attention_form(config: ModelConfig, target: Target) -> AttentionForm:
    """The form that the target asks for."""
    forms: dict[str, type[PortableAttention | CustomAttention | Int8Attention]] = {
        "portable": PortableAttention,
        "custom_sdpa": Int8Attention if target.kv_cache == "int8" else CustomAttention,
    }
    return forms[target.attention](config, target.max_context)


@dataclass(frozen=True)
class CustomAttention:
    """ExecuTorch's custom operators over a float32 cache [1, context, kv_heads, head_dim].

    The next XNNPACK call receives the attention's output.
    """

    config: ModelConfig
    context: int

    def buffers(self) -> dict[str, Tensor]:
        size = (1, self.context, self.config.num_key_value_heads, self.config.head_dim)
        return {"keys": torch.zeros(size), "values": torch.zeros(size)}

    def mask(self, positions: Tensor) -> None:
        """None: custom_sdpa is causal by itself."""

    def attend(
        self, cache: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> list[Tensor]:
        ops = torch.ops.llama
        ops.update_cache(k, cache["keys"], step.position)
        ops.update_cache(v, cache["values"], step.position)
        return [ops.custom_sdpa(q, cache["keys"], cache["values"], step.position, None, 0.0, True)]

    def last_token(self, attended: list[Tensor], last: Last) -> list[Tensor]:
        return [last(attended[0], 1)]


@dataclass(frozen=True)
class Int8Attention:
    """ExecuTorch's custom operators over an int8 cache [1, context, kv_heads, head_dim].

    Each head of each position has a scale (float32) and a zero point (int8), in caches of their
    own. ExecuTorch's ``custom_quantized_sdpa`` needs queries in int8 too: it multiplies their codes
    with those of the keys. The softmax and its product with the values are in float32.
    """

    config: ModelConfig
    context: int

    def buffers(self) -> dict[str, Tensor]:
        heads = (1, self.context, self.config.num_key_value_heads)
        cache = dict[str, Tensor]()
        for name in ("keys", "values"):
            cache[name] = torch.zeros((*heads, self.config.head_dim), dtype=torch.int8)
            cache[f"{name}_scales"] = torch.zeros((*heads, 1))
            cache[f"{name}_zero_points"] = torch.zeros((*heads, 1), dtype=torch.int8)
        return cache

    def mask(self, positions: Tensor) -> None:
        """None: custom_quantized_sdpa is causal by itself."""

    def attend(
        self, cache: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> list[Tensor]:
        ops = torch.ops.llama
        for name, new in (("keys", k), ("values", v)):
            codes, scales, zero_points = _quantize(new)
            ops.update_cache(codes, cache[name], step.position)
            ops.update_cache(scales, cache[f"{name}_scales"], step.position)
            ops.update_cache(zero_points, cache[f"{name}_zero_points"], step.position)
        queries, scales, zero_points = _quantize(q)
        attended = ops.custom_quantized_sdpa(
            queries,
            cache["keys"],
            cache["values"],
            step.position,
            None,
            0.0,
            True,
            None,
            zero_points,
            scales,
            cache["keys_zero_points"],
            cache["keys_scales"],
            cache["values_zero_points"],
            cache["values_scales"],
        )
        return [attended]

    def last_token(self, attended: list[Tensor], last: Last) -> list[Tensor]:
        return [last(attended[0], 1)]


def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., head_dim] as int8 codes of this shape, float32 scales and int8 zero points [..., 1].

    The range of each head includes zero, as in `round_rows_to_int8`.
    """
    ops = torch.ops.quantized_decomposed
    scales, zero_points = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = ops.quantize_per_token(x, scales, zero_points, -128, 127, torch.int8)
    return codes, scales.to(torch.float32), zero_points.to(torch.int8)


@dataclass(frozen=True)
class PortableAttention:
    """Core operators update a float32 cache [kv_heads, context, head_dim], XNNPACK attends.

    The next XNNPACK call receives queries, and keys, values and a mask of the filled positions: a
    step costs what the text costs, not what the context could hold.
    """

    config: ModelConfig
    context: int

    def buffers(self) -> dict[str, Tensor]:
        size = (self.config.num_key_value_heads, self.context, self.config.head_dim)
        return {"keys": torch.zeros(size), "values": torch.zeros(size)}

    def mask(self, positions: Tensor) -> Tensor:
        """The causal mask [group * seq, filled]: 0, or a large negative number where masked.

        Its rows are those of the queries that share a k/v head, one query head after the other.
        """
        # A number of its own, so that the largest memory it can need is that of the context.
        filled = (positions[-1] + 1).item()
        torch._check(filled >= 1)
        torch._check(filled <= self.context)
        later = torch.arange(filled)[None] > positions[:, None]
        return (later.to(torch.float32) * _MASKED_SCORE).repeat(self._group, 1)

    def attend(
        self, cache: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> list[Tensor]:
        assert step.mask is not None
        filled = step.mask.shape[1]
        # Not `keys[:, positions] = ...`, which drops a leading dimension of one: the runtime's
        # index_put_ needs values of the cache's rank.
        for name, new in (("keys", k), ("values", v)):
            torch.ops.aten.index_put_(cache[name], (None, step.positions), new[0].transpose(0, 1))
        return [q, *(cache[name].narrow(1, 0, filled) for name in ("keys", "values")), step.mask]

    def last_token(self, attended: list[Tensor], last: Last) -> list[Tensor]:
        q, keys, values, mask = attended
        of_one_head = last(mask.narrow(0, 0, q.shape[1]), 0)
        return [last(q, 1), keys, values, of_one_head.repeat(self._group, 1)]

    @property
    def _group(self) -> int:
        return self.config.num_attention_heads // self.config.num_key_value_heads
