"""GPTQ over a whole model: the calibration text runs through the layers in order.

Each weight is replaced by its rounding before its first product, so every later weight is fitted to
the inputs of the quantized model.
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

#: Share of a Hessian's mean diagonal that is added to its diagonal.
DAMPING = 0.01
#: For the tied embedding, which is a lookup table too: an error in any direction of a row counts.
TIED_DAMPING = 1.0


@torch.inference_mode()
def gptq_weights(
    source: FloatWeights,
    schemes: Mapping[str, Scheme],
    tokens: Tensor,
    products: torch.dtype,
    token_weights: Mapping[str, Tensor],
) -> Iterator[tuple[str, GptqResult]]:
    """Yield the name and rounding of every quantized weight, in the order of computation; a tied
    embedding is last.

    `tokens` [sequences, seq] is the calibration text; `products` is the type of matrix products.
    `token_weights` maps the name of a weight to the weights of the tokens in its Hessian
    [sequences * seq]; a layer that it does not name weights all tokens equally.
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
            results = dict[str, GptqResult]()
            _round_before_first_product(layer, schemes, token_weights, results)
            x = layer(x, cos, sin, attend_causal)
            yield from results.items()
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


def _round_before_first_product(
    layer: DecoderLayer,
    schemes: Mapping[str, Scheme],
    token_weights: Mapping[str, Tensor],
    results: dict[str, GptqResult],
) -> None:
    """Register hooks that replace each linear weight of `layer` by its rounding, fitted to the
    inputs of its first product, and store it in `results`."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def round_weight(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Linear)
            hessian = _hessian(inputs[0], token_weights.get(name))
            results[name] = _rounded(module.weight, hessian, schemes[name], DAMPING)
            module.weight = nn.Parameter(results[name].rounded.dequantize(), requires_grad=False)

        return round_weight

    for part, module in layer.named_modules():
        name = f"{layer.prefix}{part}.weight"
        if isinstance(module, nn.Linear) and schemes[name] != FLOAT:
            module.register_forward_pre_hook(hook(name))


def _hessian(inputs: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of x xᵀ over all positions of `inputs` [..., features], weighted by `weights`
    [positions]: float32 [features, features]."""
    flat = inputs.flatten(0, -2).float()
    if weights is not None:
        flat = flat * weights.sqrt()[:, None]
    with torch.autocast("cpu", enabled=False):  # bfloat16 sums may not be positive definite
        return flat.t() @ flat
