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
    form = PortableAttention if target.attention == "portable" else CustomAttention
    return form(config, target.max_context)


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
class PortableAttention:
    """Core operators update a float32 cache [kv_heads, context, head_dim], XNNPACK attends.

    The next XNNPACK call receives queries, keys, values and mask.
    """

    config: ModelConfig
    context: int

    def buffers(self) -> dict[str, Tensor]:
        size = (self.config.num_key_value_heads, self.context, self.config.head_dim)
        return {"keys": torch.zeros(size), "values": torch.zeros(size)}

    def mask(self, positions: Tensor) -> Tensor:
        """The causal mask [1, 1, seq, context]: 0, or a large negative number where masked."""
        later = torch.arange(self.context)[None] > positions[:, None]
        return (later.to(torch.float32) * _MASKED_SCORE)[None, None]

    def attend(
        self, cache: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, step: Step
    ) -> list[Tensor]:
        assert step.mask is not None
        # Not `keys[:, positions] = ...`, which drops a leading dimension of one: the runtime's
        # index_put_ needs values of the cache's rank.
        for name, new in (("keys", k), ("values", v)):
            torch.ops.aten.index_put_(cache[name], (None, step.positions), new[0].transpose(0, 1))
        return [q, cache["keys"], cache["values"], step.mask]

    def last_token(self, attended: list[Tensor], last: Last) -> list[Tensor]:
        q, keys, values, mask = attended
        return [last(q, 1), keys, values, last(mask, 2)]
