"""Which weights suffer most from few bits, and which of them a size budget gives more.

Each weight is quantized alone, as the recipe's method rounds it, and all others stay float: the
divergence of the logits is its sensitivity. Only the layers behind it are computed anew.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.calibration.loss import compare
from exporter.errors import InputError
from exporter.model.config import EMBEDDING, OUTPUT, ModelConfig
from exporter.model.decoder import FloatWeights, attend_causal, load_final_norm, stream_layers
from exporter.model.rope import rope_tables
from exporter.progress import OnStep
from exporter.quantization.rounding import quantize
from exporter.quantization.schemes import FLOAT, QuantizedTensor, Scheme

#: What a sensitive weight is stored as instead.
WIDER = Scheme(8)
#: How finely the search divides what a budget leaves.
_SIZES = 1 << 16
#: A weight that seems to cost nothing is still better off wider.
_LEAST = 1e-12


@dataclass(frozen=True)
class Sensitivity:
    """KL in nats that storing this weight alone as `scheme` costs, or as `WIDER`, and its size in
    bits either way."""

    name: str
    scheme: str
    kl: float
    wider_kl: float
    bits: int
    wider_bits: int

    @property
    def saved(self) -> float:
        """The divergence that `WIDER` saves. What any change at all costs, because products are
        rounded to bfloat16 behind it, cancels out."""
        return max(self.kl - self.wider_kl, _LEAST)


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
    """The weights that become `WIDER`, in the order given: of all choices within the budget, the
    one that saves most divergence, as if what single weights cost added up.

    `used` is what all weights take before. Raises InputError where that is more than the budget.
    """
    check_budget(used, budget, subject)
    room = budget - used
    # Sizes in whole units, rounded up: the least room left unused, and never too much taken.
    unit = max(1, room // _SIZES)
    sizes = [-(-(one.wider_bits - one.bits) // unit) for one in sensitivities]
    saved = torch.zeros(room // unit + 1, dtype=torch.float64)
    taken = list[Tensor]()
    for one, size in zip(sensitivities, sizes, strict=True):
        with_it = saved.clone()
        if size < len(saved):
            with_it[size:] = saved[: len(saved) - size] + one.saved
        taken.append(with_it > saved)
        saved = torch.maximum(saved, with_it)
    chosen, place = list[str](), len(saved) - 1
    for one, size, better in reversed(list(zip(sensitivities, sizes, taken, strict=True))):
        if better[place]:
            chosen.append(one.name)
            place -= size
    return tuple(reversed(chosen))


@torch.inference_mode()
def sensitivities(
    source: FloatWeights,
    rounded: Mapping[str, QuantizedTensor],
    tokens: Tensor,
    precision: torch.dtype,
    on_step: OnStep,
) -> list[Sensitivity]:
    """Of every weight of `rounded` that could be stored wider, in the order of the model.

    `tokens` [sequences, seq] is the text that is tried.
    """
    shapes = source.config.parameter_shapes()
    candidates = {
        name: one
        for name, one in rounded.items()
        if stored_bits(one.scheme, shapes[name]) < stored_bits(WIDER, shapes[name])
    }
    found = list[Sensitivity]()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for name, kl, wider_kl in _costs(source, candidates, tokens):
            scheme, shape = rounded[name].scheme, shapes[name]
            bits, wider_bits = stored_bits(scheme, shape), stored_bits(WIDER, shape)
            found.append(Sensitivity(name, str(scheme), kl, wider_kl, bits, wider_bits))
            on_step(len(found), len(candidates), f"{name} {kl:.2g}")
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(found, key=lambda one: order[one.name])


def _costs(
    source: FloatWeights, rounded: Mapping[str, QuantizedTensor], tokens: Tensor
) -> Iterator[tuple[str, float, float]]:
    """Each name, and the KL of storing this weight alone as it is rounded, and as `WIDER`."""
    config = source.config
    tables = rope_tables(config, tokens.shape[1])
    layers, norm = list(stream_layers(source)), load_final_norm(source)
    embedding, tied = source.float_weight(EMBEDDING), config.tie_word_embeddings
    output = embedding if tied else source.float_weight(config.output_weight)

    def run(x: Tensor, first: int) -> Iterator[Tensor]:
        """The inputs of each layer from `first` on, then the last normalized states."""
        for layer in layers[first:]:
            yield x
            x = layer(x, *tables, attend_causal)
        yield norm(x).flatten(0, 1)

    *inputs, states = run(F.embedding(tokens, embedding), 0)

    def divergence(found: Tensor, weight: Tensor) -> float:
        return compare(states, output, found, weight)[0] / tokens.numel()

    def cost(name: str, weight: Tensor) -> float:
        if name == OUTPUT:
            return divergence(states, weight)
        if name == EMBEDDING:
            *_, last = run(F.embedding(tokens, weight), 0)
            return divergence(last, weight if tied else output)
        index = int(name.split(".")[2])
        part = layers[index].get_submodule(name.split(".", 3)[3].removesuffix(".weight"))
        assert isinstance(part, nn.Linear)
        exact, part.weight = part.weight, nn.Parameter(weight, requires_grad=False)
        *_, last = run(inputs[index], index)
        part.weight = exact
        return divergence(last, output)

    for name, one in rounded.items():
        wider = quantize(source.float_weight(name), WIDER, "mse")
        yield name, cost(name, one.dequantize()), cost(name, wider.dequantize())
