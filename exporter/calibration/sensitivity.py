"""The sensitivity search: which weights a size budget stores as int8 (mixed precision).

The sensitivity of a weight is the KL of the logits when this weight alone is quantized, by the
recipe's method, and all others stay float. Only the layers from that weight on are computed again.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.calibration.loss import compare
from exporter.errors import InputError
from exporter.model.changed_weights import run_float, run_with
from exporter.model.config import ModelConfig
from exporter.model.decoder import FloatWeights, load_decoder
from exporter.progress import OnStep
from exporter.quantization.rounding import quantize
from exporter.quantization.schemes import FLOAT, QuantizedTensor, Scheme

#: The scheme of sensitive weights.
INT8 = Scheme(8)
#: Into how many units the search divides the bits that the budget leaves.
_BUDGET_UNITS = 1 << 16
#: Lower limit of a KL reduction, so that a budget is used even where int8 gains nothing measurable.
_SMALLEST_REDUCTION = 1e-12


@dataclass(frozen=True)
class Sensitivity:
    """The cost of one weight: KL in nats and size in bits, as `scheme` (`kl`, `bits`) and as int8
    (`wider_kl`, `wider_bits`). The field names are keys of ``sensitivity.json``."""

    name: str
    scheme: str
    kl: float
    wider_kl: float
    bits: int
    wider_bits: int

    @property
    def kl_reduction(self) -> float:
        """By how many nats int8 lowers the KL. The bfloat16 noise floor is in both terms and
        cancels."""
        return max(self.kl - self.wider_kl, _SMALLEST_REDUCTION)


def parse_budget(text: str, subject: str, config: ModelConfig) -> int:
    """The bits of ``5.3 bits`` (the mean per weight) or ``90 MB``. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(bits?|bpw|MB)\s*", text)
    if not match:
        raise InputError(subject, f"{text!r} is not a budget", "Write '5.3 bits' or '90 MB'")
    number = float(match[1])
    return round(number * 8e6 if match[2] == "MB" else number * parameter_count(config))


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters of a model; a tied embedding counts once."""
    return sum(torch.Size(shape).numel() for shape in config.parameter_shapes().values())


def stored_bits(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """The bits of the codes and scales of one weight; a float weight counts 16 bits per value."""
    if scheme == FLOAT:
        return 16 * torch.Size(shape).numel()
    return 8 * scheme.stored_bytes(shape)


def model_bits(schemes: Mapping[str, Scheme], config: ModelConfig) -> int:
    """The bits of all weights of a model with these schemes."""
    return sum(
        stored_bits(schemes[name], shape) for name, shape in config.parameter_shapes().items()
    )


def check_budget(used: int, budget: int, subject: str) -> None:
    """Refuse a budget (bits) smaller than the recipe's own schemes need. Raises InputError."""
    if used > budget:
        raise InputError(
            subject,
            f"holds {budget / 8e6:.1f} MB, and the recipe needs at least {used / 8e6:.1f} MB",
            "Raise the budget, or choose smaller schemes",
        )


def choose_int8_weights(
    sensitivities: Sequence[Sensitivity], used: int, budget: int, subject: str
) -> tuple[str, ...]:
    """The weights to store as int8, in the order given: the choice within the budget that lowers
    the KL most, on the assumption that the KL of single weights adds up (a knapsack problem).

    `used` is the size of the model in bits before. Raises InputError if it exceeds `budget`.
    """
    check_budget(used, budget, subject)
    free = budget - used
    # Sizes are rounded up to whole units, so the budget is never exceeded.
    unit = max(1, free // _BUDGET_UNITS)
    sizes = [-(-(entry.wider_bits - entry.bits) // unit) for entry in sensitivities]
    # best[n]: the largest KL reduction that n units allow with the weights seen so far
    best = torch.zeros(free // unit + 1, dtype=torch.float64)
    taken = list[Tensor]()
    for entry, size in zip(sensitivities, sizes, strict=True):
        with_entry = best.clone()
        if size < len(best):
            with_entry[size:] = best[: len(best) - size] + entry.kl_reduction
        taken.append(with_entry > best)
        best = torch.maximum(best, with_entry)
    chosen, units = list[str](), len(best) - 1
    for entry, size, is_taken in reversed(list(zip(sensitivities, sizes, taken, strict=True))):
        if is_taken[units]:
            chosen.append(entry.name)
            units -= size
    return tuple(reversed(chosen))


@torch.inference_mode()
def sensitivities(
    source: FloatWeights,
    rounded: Mapping[str, QuantizedTensor],
    tokens: Tensor,
    precision: torch.dtype,
    on_step: OnStep,
) -> list[Sensitivity]:
    """The sensitivity of every weight of `rounded` that is smaller than int8, in the order of the
    model.

    The KL is measured on `tokens` [sequences, seq]; matrix products are of type `precision`.
    """
    shapes = source.config.parameter_shapes()
    candidates = {
        name: weight
        for name, weight in rounded.items()
        if stored_bits(weight.scheme, shapes[name]) < stored_bits(INT8, shapes[name])
    }
    measured = list[Sensitivity]()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for name, kl, wider_kl in _measure(source, candidates, tokens):
            scheme, shape = rounded[name].scheme, shapes[name]
            bits, wider_bits = stored_bits(scheme, shape), stored_bits(INT8, shape)
            measured.append(Sensitivity(name, str(scheme), kl, wider_kl, bits, wider_bits))
            on_step(len(measured), len(candidates), f"{name} {kl:.2g}")
    order = {name: index for index, name in enumerate(shapes)}
    return sorted(measured, key=lambda entry: order[entry.name])


def _measure(
    source: FloatWeights, rounded: Mapping[str, QuantizedTensor], tokens: Tensor
) -> Iterator[tuple[str, float, float]]:
    """Yield each name with the KL of quantizing this weight alone: as given, and as int8."""
    decoder = load_decoder(source, tokens.shape[1])
    run = run_float(decoder, tokens)
    original = run.states.flatten(0, 1), decoder.lm_head.weight

    def kl_with(name: str, weight: Tensor) -> float:
        states, output = run_with(run, {name: weight})
        return compare(*original, states.flatten(0, 1), output)[0] / tokens.numel()

    for name, weight in rounded.items():
        as_int8 = quantize(source.float_weight(name), INT8, "mse")
        yield name, kl_with(name, weight.dequantize()), kl_with(name, as_int8.dequantize())
