"""GPTQ over a whole model: each weight is rounded when the calibration text reaches it.

The text runs through one layer after the other, and what has been rounded stays rounded, so a
weight is fitted to the inputs that it will really see.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.model.config import EMBEDDING
from exporter.model.decoder import (
    DecoderLayer,
    FloatWeights,
    attend_causal,
    load_final_norm,
    stream_layers,
)
from exporter.model.rope import rope_tables
from exporter.quantization.coordinate_descent import coordinate_descent
from exporter.quantization.gptq import GptqResult, gptq
from exporter.quantization.rounding import quantize
from exporter.quantization.schemes import FLOAT, Scheme

#: Share of a Hessian's mean diagonal that is added to it.
DAMPING = 0.01
#: The same for the tied embedding: as a lookup table its error counts in every direction.
TIED_DAMPING = 1.0


@torch.inference_mode()
def gptq_weights(
    source: FloatWeights,
    schemes: Mapping[str, Scheme],
    tokens: Tensor,
    products: torch.dtype,
    token_weights: Mapping[str, Tensor],
) -> Iterator[tuple[str, GptqResult]]:
    """Every quantized weight, in the order of computation, the tied embedding last.

    `tokens` [sequences, seq] is the calibration text; `products` is the type of matrix products.
    `token_weights` says by a weight's name what each token counts [sequences * seq]; where it says
    nothing, all count alike.
    """
    config = source.config
    cos, sin = rope_tables(config, tokens.shape[1])
    embedding = source.float_weight(EMBEDDING)
    rounded = embedding
    if schemes[EMBEDDING] != FLOAT:
        quantized = quantize(embedding, schemes[EMBEDDING], "mse")
        rounded = quantized.dequantize()
        if not config.tie_word_embeddings:
            yield EMBEDDING, GptqResult(quantized, embedding)
    x = F.embedding(tokens, rounded)
    with torch.autocast("cpu", products, enabled=products != torch.float32):
        for layer in stream_layers(source):
            done = dict[str, GptqResult]()
            _round_on_arrival(layer, schemes, token_weights, done)
            x = layer(x, cos, sin, attend_causal)
            yield from done.items()
    output = config.output_weight
    if schemes[output] != FLOAT:
        damping = TIED_DAMPING if config.tie_word_embeddings else DAMPING
        hessian = _hessian(load_final_norm(source)(x))
        yield output, _rounded(source.float_weight(output), hessian, schemes[output], damping)


def _rounded(weight: Tensor, hessian: Tensor, scheme: Scheme, damping: float) -> GptqResult:
    with torch.autocast("cpu", enabled=False):
        return coordinate_descent(
            weight, hessian, gptq(weight, hessian, scheme, damping).rounded, damping
        )


def _round_on_arrival(
    layer: DecoderLayer,
    schemes: Mapping[str, Scheme],
    token_weights: Mapping[str, Tensor],
    done: dict[str, GptqResult],
) -> None:
    """Replace each linear weight just before its first product, knowing all of its inputs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def arrive(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            hessian = _hessian(inputs[0], token_weights.get(name))
            done[name] = _rounded(module.weight, hessian, schemes[name], DAMPING)
            module.weight = nn.Parameter(done[name].rounded.dequantize(), requires_grad=False)

        return arrive

    for part, module in layer.named_modules():
        name = f"{layer.prefix}{part}.weight"
        if isinstance(module, nn.Linear) and schemes[name] != FLOAT:
            module.register_forward_pre_hook(hook(name))


def _hessian(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of x xᵀ over all positions of `inputs` [..., features], float32; each counts as
    `weights` [positions] says."""
    flat = inputs.flatten(0, -2).float()
    if weights is not None:
        flat = flat * weights.sqrt()[:, None]
    with torch.autocast("cpu", enabled=False):  # in bfloat16 it would not stay positive definite
        return flat.t() @ flat
