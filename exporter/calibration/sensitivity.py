"""Which weights suffer most from few bits, and which of them a size budget gives more.

Each weight is quantized alone, all others stay float: the divergence of the logits is its
sensitivity. Only the layers behind it are computed anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.data import OnStep
from exporter.calibration.loss import compare
from exporter.errors import InputError
from exporter.model import (
    DecoderLayer,
    FloatWeights,
    ModelConfig,
    RMSNorm,
    attend_causal,
    fill_weights,
    rope_tables,
)
from exporter.quantization.integers import FLOAT, Scheme, quantize
from exporter.quantization.waist import EMBEDDING, OUTPUT

#: What a sensitive weight is stored as instead.
WIDER = Scheme(8)


@dataclass(frozen=True)
class Sensitivity:
    """KL in nats that storing this weight alone as `scheme` costs; `bits` is its size so."""

    name: str
    scheme: str
    kl: float
    bits: int
    wider_bits: int


def parse_budget(text: str, subject: str, config: ModelConfig) -> int:
    """``5.3 bits`` (a weight of the whole model) or ``90 MB``, as bits. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bits?|bpw|MB)\s*", text)
    if not match:
        raise InputError(subject, f"{text!r} is not a budget", "Write '5.3 bits' or '90 MB'")
    number = float(match[1])
    return round(number * 8e6 if match[2] == "MB" else number * parameter_count(config))


def parameter_count(config: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in config.parameter_shapes().values())


def stored_bits(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Codes and scales; what stays in float counts 16 bits."""
    if scheme == FLOAT:
        return 16 * torch.Size(shape).numel()
    return 8 * scheme.stored_bytes(shape)


def model_bits(schemes: Mapping[str, Scheme], config: ModelConfig) -> int:
    """All weights of a model, stored so."""
    return sum(
        stored_bits(schemes[name], shape) for name, shape in config.parameter_shapes().items()
    )


def check_budget(used: int, budget: int, subject: str) -> None:
    """Refuse a budget in bits below what the recipe's own schemes use. Raises InputError."""
    if used > budget:
        raise InputError(
            subject,
            f"holds {budget / 8e6:.1f} MB, and the recipe takes {used / 8e6:.1f} MB at the least",
            "Raise the budget, or choose smaller schemes",
        )


def search(
    sensitivities: Sequence[Sensitivity], used: int, budget: int, subject: str
) -> tuple[str, ...]:
    """The weights that become `WIDER`: most divergence saved for each further bit first.

    `used` is what all weights take before. Raises InputError where that is more than the budget.
    """
    check_budget(used, budget, subject)
    worth = sorted(
        sensitivities, key=lambda one: one.kl / (one.wider_bits - one.bits), reverse=True
    )
    chosen = list[str]()
    for one in worth:
        if used + one.wider_bits - one.bits <= budget:
            used += one.wider_bits - one.bits
            chosen.append(one.name)
    return tuple(chosen)


@torch.inference_mode()
def sensitivities(
    source: FloatWeights,
    schemes: Mapping[str, Scheme],
    tokens: Tensor,
    precision: torch.dtype,
    on_step: OnStep,
) -> list[Sensitivity]:
    """Of every weight that could be stored wider, in the order of the model.

    `tokens` [sequences, seq] is the text that is tried.
    """
    config = source.config
    shapes = config.parameter_shapes()
    candidates = [
        name
        for name, scheme in schemes.items()
        if scheme != FLOAT and stored_bits(scheme, shapes[name]) < stored_bits(WIDER, shapes[name])
    ]
    found = list[Sensitivity]()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for name, kl in _costs(source, schemes, candidates, tokens):
            shape = shapes[name]
            found.append(
                Sensitivity(
                    name,
                    str(schemes[name]),
                    kl,
                    stored_bits(schemes[name], shape),
                    stored_bits(WIDER, shape),
                )
            )
            on_step(len(found), len(candidates), f"{name} {kl:.2g}")
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(found, key=lambda one: order[one.name])


def _costs(
    source: FloatWeights, schemes: Mapping[str, Scheme], names: list[str], tokens: Tensor
) -> Iterator[tuple[str, float]]:
    config = source.config
    tables = rope_tables(config, tokens.shape[1])
    layers = [_layer(source, index) for index in range(config.num_hidden_layers)]
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    fill_weights(norm, source, "model.norm.")
    embedding = source.float_weight(EMBEDDING)
    tied = config.tie_word_embeddings
    output = embedding if tied else source.float_weight(OUTPUT)

    def run(x: Tensor, first: int) -> Iterator[Tensor]:
        """The inputs of each layer from `first` on, then the last normalized states."""
        for layer in layers[first:]:
            yield x
            x = layer(x, *tables, attend_causal)
        yield norm(x).flatten(0, 1)

    *inputs, states = run(F.embedding(tokens, embedding), 0)

    def cost(found: Tensor, weight: Tensor) -> float:
        return compare(states, output, found, weight)[0] / tokens.numel()

    def rounded(name: str) -> Tensor:
        return quantize(source.float_weight(name), schemes[name], "mse").dequantize()

    for name in names:
        if name == OUTPUT:
            yield name, cost(states, rounded(name))
        elif name == EMBEDDING:
            table = rounded(name)
            *_, last = run(F.embedding(tokens, table), 0)
            yield name, cost(last, table if tied else output)
        else:
            index = int(name.split(".")[2])
            part = layers[index].get_submodule(name.split(".", 3)[3].removesuffix(".weight"))
            assert isinstance(part, nn.Linear)
            exact, part.weight = part.weight, nn.Parameter(rounded(name), requires_grad=False)
            *_, last = run(inputs[index], index)
            part.weight = exact
            yield name, cost(last, output)


def _layer(source: FloatWeights, index: int) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(source.config, index)
    fill_weights(layer, source, f"model.layers.{index}.")
    return layer
