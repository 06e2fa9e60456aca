"""GPTQ: round a weight column by column; later columns compensate the error of each one.

Source: Frantar et al., arXiv 2210.17323, with static groups: scales are chosen before rounding, so
the columns can be processed in any order (``act-order``) while each stays in its own group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.quantization.rounding import least_squared_error_scales
from exporter.quantization.schemes import QuantizedTensor, Scheme

COLUMNS_AT_ONCE = 128


@dataclass(frozen=True)
class GptqResult:
    """`rounded` is the quantized weight. `weight`, float32 [out_features, in_features], has the
    values before rounding, with the errors of other columns compensated."""

    rounded: QuantizedTensor
    weight: Tensor


def gptq(weight: Tensor, hessian: Tensor, scheme: Scheme, damping: float = 0.01) -> GptqResult:
    """Round `weight` [out_features, in_features] with the least squared error of its products.

    `hessian` [in_features, in_features] is the sum of x xᵀ over calibration inputs x; `damping` is
    the share of its mean diagonal that is added to its diagonal. Columns are rounded in descending
    order of the norms of their inputs.
    """
    lowest, highest = scheme.code_range
    weight = weight.float()
    hessian = damped(hessian, damping)
    scales = least_squared_error_scales(weight, scheme, hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True, stable=True)
    inverse = _inverse_factor(hessian[order][:, order])
    # Transposed, so that a column of the weight is contiguous.
    remaining = weight.t()[order].contiguous()
    group = order // (weight.shape[1] // scales.shape[1])
    scale = scales.t().contiguous()
    codes = torch.empty_like(remaining)
    for start in range(0, len(remaining), COLUMNS_AT_ONCE):
        end = min(start + COLUMNS_AT_ONCE, len(remaining))
        errors = torch.empty_like(remaining[start:end])
        for column in range(start, end):
            step = scale[group[column]]
            code = (remaining[column] / step).round_().clamp_(lowest, highest)
            error = (remaining[column] - code * step).div_(inverse[column, column])
            codes[column], errors[column - start] = code, error
            later = slice(column + 1, end)
            remaining[later].addr_(inverse[column, later], error, alpha=-1)
        remaining[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
    back = order.argsort()
    rounded = QuantizedTensor(codes[back].t().to(torch.int8).contiguous(), scales, scheme)
    return GptqResult(rounded, remaining[back].t().contiguous())


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with `damping` times its mean diagonal added to each diagonal entry."""
    mean = float(hessian.diagonal().mean()) or 1.0  # all inputs are zero
    return hessian + torch.eye(len(hessian)) * (damping * mean)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, in float64 because it is ill-conditioned."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
