"""A weight with a Hessian for tests of rounding, and the error of a rounding."""

import pytest
import torch
from torch import Tensor

from exporter.quantization.schemes import CODE_RANGE, QuantizedTensor, Scheme

SCHEMES = [Scheme(4, 32), Scheme(8, 64), Scheme(4), Scheme(8)]
EVERY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
#: More columns than are updated at once.
FEATURES = 192


def random_weight(rows: int = 24) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(1))


def correlated_hessian() -> Tensor:
    """Of inputs that share few directions, as those of a model do."""
    generator = torch.Generator().manual_seed(2)
    mixture = torch.randn(FEATURES // 4, FEATURES, generator=generator)
    inputs = torch.randn(1024, FEATURES // 4, generator=generator) @ mixture
    inputs += 0.3 * torch.randn(1024, FEATURES, generator=generator)
    return inputs.t() @ inputs


def error(weight: Tensor, rounded: QuantizedTensor, hessian: Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ): the squared error of the products."""
    difference = (weight - rounded.dequantize()).double()
    return float((difference @ hessian.double() * difference).sum())


def plainly_rounded(weight: Tensor, rounded: QuantizedTensor) -> Tensor:
    """The codes of rounding `weight` alone to the scales of `rounded`."""
    assert rounded.scheme.bits is not None
    grouped = weight.unflatten(1, (rounded.scales.shape[1], -1))
    codes = (grouped / rounded.scales[..., None]).round().clamp(*CODE_RANGE[rounded.scheme.bits])
    return codes.flatten(1).to(torch.int8)
