"""The torch reference, with which every artifact is compared.

`ReferenceRunner` has the whole model in memory; it generates text and scores it. The function
`score` has one layer in memory at a time; it only scores. Both can simulate the activation
rounding of a runtime.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from exporter.model.decoder import (
    QUERIES_AT_ONCE,
    Attend,
    FloatWeights,
    RMSNorm,
    StaticCache,
    attend_causal,
    embed,
    load_decoder,
    load_final_norm,
    stream_layers,
)
from exporter.model.rope import rope_tables
from exporter.quantization.activations import CacheRounding, Rounding, Roundings

#: ``observe(module, which, values)``: called with values that a module reads or computes.
Observe = Callable[[str, str, Tensor], None]


class ReferenceRunner:
    """A `Runner` in torch, float32. `rounding` rounds the inputs of every product with a weight,
    `cache_rounding` the queries, keys and values.

    `decoder` is the model in memory.
    """

    def __init__(
        self,
        source: FloatWeights,
        context: int,
        rounding: Rounding | None = None,
        cache_rounding: CacheRounding | None = None,
    ) -> None:
        self.decoder = load_decoder(source, context)
        self._cache = StaticCache(source.config, context)
        self._attend = _with_rounding(self._cache.attend, cache_rounding)
        self._attend_causal = _with_rounding(attend_causal, cache_rounding)
        self.context, self.vocab_size = context, source.config.vocab_size
        if rounding:
            _round_inputs(self.decoder.model, rounding)
            _round_single_inputs(self.decoder.lm_head, rounding)

    def prefill(self, tokens: list[int]) -> Tensor:
        self._cache.start = 0
        return self._step(tokens)

    def decode(self, token: int) -> Tensor:
        return self._step([token])

    @torch.inference_mode()
    def score(self, tokens: Sequence[int], first: int, rows: int) -> Iterator[Tensor]:
        """Logits of a text from position `first` on, float32 [up to `rows`, vocab_size] at a time.

        The logits of all positions together may not fit into memory.
        """
        positions = torch.arange(len(tokens))
        ids = torch.tensor([list(tokens)])
        states = self.decoder.hidden_states(ids, positions, self._attend_causal)
        for part in states[0, first:].split(rows):
            yield self.decoder.lm_head(part)

    @torch.inference_mode()
    def _step(self, tokens: list[int]) -> Tensor:
        start = self._cache.start
        positions = torch.arange(start, start + len(tokens))
        states = self.decoder.hidden_states(torch.tensor([tokens]), positions, self._attend)
        self._cache.start += len(tokens)
        logits: Tensor = self.decoder.lm_head(states[0, -1])
        return logits


@torch.inference_mode()
def score(
    source: FloatWeights,
    tokens: Sequence[int],
    positions: Sequence[int],
    rounding: Rounding | None = None,
    observe: Observe | None = None,
    cache_rounding: CacheRounding | None = None,
) -> Tensor:
    """Logits float32 [len(positions), vocab_size] at these positions of one text.

    `rounding` rounds the inputs of every product with a weight, as some runtime does, and
    `cache_rounding` the queries, keys and values. `observe` is called with the input and output of
    each linear layer and each norm, and with the keys, values and scores of each attention.
    """
    roundings = Roundings(rounding, cache_rounding)
    return score_each(source, tokens, positions, [roundings], observe)[0]


@torch.inference_mode()
def score_each(
    source: FloatWeights,
    tokens: Sequence[int],
    positions: Sequence[int],
    roundings: Sequence[Roundings],
    observe: Observe | None = None,
) -> list[Tensor]:
    """The result of `score` for each of the roundings, in one pass over the weights.

    `observe` is called for the first of them only.
    """
    config = source.config
    cos, sin = rope_tables(config, len(tokens))
    x = embed(source, torch.tensor([list(tokens)]))
    states = [x] * len(roundings)
    for layer in stream_layers(source):
        for number, rounding in enumerate(roundings):
            shown = None if number else observe
            with _hooked(layer, layer.prefix.removesuffix("."), rounding.inputs, shown):
                attend = _show_attention(shown) if shown else attend_causal
                attend = _with_rounding(attend, rounding.cache)
                states[number] = layer(states[number], cos, sin, attend)
    norm, output = load_final_norm(source), source.float_weight(config.output_weight)
    logits = []
    for number, rounding in enumerate(roundings):
        with _hooked(norm, "model.norm", None, None if number else observe):
            normal = norm(states[number][0, list(positions)])
        normal = rounding.inputs(normal[:, None])[:, 0] if rounding.inputs else normal
        logits.append(F.linear(normal, output))
    return logits


@contextmanager
def _hooked(
    module: nn.Module, prefix: str, rounding: Rounding | None, observe: Observe | None
) -> Iterator[None]:
    """Round the inputs of the module's products and observe it, while the context is open."""
    hooks = _round_inputs(module, rounding) if rounding else []
    hooks += _show(module, prefix, observe) if observe else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _show(module: nn.Module, prefix: str, observe: Observe) -> list[RemovableHandle]:
    """Call `observe` with the input and output of every linear layer and norm in `module`."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def show(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
            observe(name, "input", given[0])
            observe(name, "output", result)

        return show

    return [
        part.register_forward_hook(hook(f"{prefix}.{name}".removesuffix(".")))
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | RMSNorm)
    ]


def _show_attention(observe: Observe) -> Attend:
    """Causal attention that calls `observe` with keys, values and, part by part, scores.

    The scores include the masked ones, since a runtime computes them too.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        name, group = f"model.layers.{layer}.self_attn", q.shape[2] // k.shape[2]
        keys = k.repeat_interleave(group, 2)
        observe(name, "keys", k)
        observe(name, "values", v)
        for some in q.split(QUERIES_AT_ONCE, 1):
            scores = torch.einsum("bqhd,bkhd->bhqk", some, keys) / q.shape[-1] ** 0.5
            observe(name, "scores", scores)
        return attend_causal(layer, q, k, v)

    return attend


def _with_rounding(attend: Attend, rounding: CacheRounding | None) -> Attend:
    """`attend` on rounded queries, keys and values. Each is rounded when it is new, so that a cache
    keeps rounded ones."""
    if rounding is None:
        return attend
    return lambda layer, q, k, v: attend(layer, *rounding(q, k, v))


def _round_inputs(parent: nn.Module, rounding: Rounding) -> list[RemovableHandle]:
    return [
        module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0]),))
        for module in parent.modules()
        if isinstance(module, nn.Linear)
    ]


def _round_single_inputs(layer: nn.Linear, rounding: Rounding) -> None:
    """Round each row by itself: in a runtime, the output layer reads only the last position."""
    layer.register_forward_pre_hook(
        lambda _, inputs: (rounding(inputs[0].unsqueeze(-2)).squeeze(-2),)
    )
