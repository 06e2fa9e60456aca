"""GPTQ: round a weight column by column, and let later columns make up for each error.

Source: Frantar et al., arXiv 2210.17323, with static groups: scales are chosen before, so that the
columns can be taken in any order (``act-order``) while each stays in its own group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.quantization.rounding import least_squared_error_scales
from exporter.quantization.schemes import QuantizedTensor, Scheme

COLUMNS_AT_ONCE = 128


@dataclass(frozen=True)
class GptqResult:
    """`rounded` is the result; `weight` float32 is what was rounded, errors of others included."""

    rounded: QuantizedTensor
    weight: Tensor


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, damping: float = 0.01) -> GptqResult:
    """Round `weight` [out_features, in_features] so that its products change least.

    `hessian` [in_features, in_features] is the sum of x xᵀ over calibration inputs x; `damping` is
    the share of its mean diagonal that is added to it. Inputs of the largest norm come first.
    """
    lowest, highest = scheme.code_range
    weight = weight.float()
    hessian = damped(hessian, damping)
    scales = least_squared_error_scales(weight, scheme, hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order])
    # One row a column of the weight: what is changed together lies together.
    rest = weight.t()[order].contiguous()
    group = order // (weight.shape[1] // scales.shape[1])
    scale = scales.t().contiguous()
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(rest))
        errors = torch.empty_like(rest[start:end])
        for column in range(start, end):
            step = scale[group[column]]
            code = (rest[column] / step).round_().clamp_(lowest, highest)
            error = (rest[column] - code * step).div_(inverse[column, column])
            codes[column], errors[column - start] = code, error
            rest[column + 1 : end].addr_(inverse[column, column + 1 : end], error, alpha=-1)
        rest[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
    back = order.argsort()
    rounded = QuantizedTensor(codes[back].t().to(torch.int8).contiguous(), scales, scheme)
    return GptqResult(rounded, rest[back].t().contiguous())


def damped(hessian: Tensor, damping: float) -> Tensor:
    """With a share of its mean diagonal added to each entry of the diagonal."""
    mean = float(hessian.diagonal().mean()) or 1.0  # no input ever occurs: all count alike
    return hessian + torch.eye(len(hessian)) * (damping * mean)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse; float64, since it is badly conditioned."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
