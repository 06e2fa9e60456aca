"""Coordinate descent after GPTQ: scales and codes are improved in turn, all others being fixed.

GPTQ chooses scales before codes, and rounds a column without knowledge of the columns after it.
Here the scales of a row are the solution of a linear system, and each code is the best one for all
other codes (compare QuantEase, arXiv 2309.01885). Neither step increases the error of the product.
"""

import torch
from torch import Tensor

from exporter.quantization.gptq import COLUMNS_AT_ONCE, GptqResult, damped
from exporter.quantization.rounding import to_scale_grid
from exporter.quantization.schemes import QuantizedTensor

_ROUNDS = 3
_ROWS_AT_ONCE_VALUES = 1 << 22
#: Share of its diagonal that is added to the system of equations, which may be singular.
_RIDGE = 1e-4
#: Largest distance of the returned weight from its code, in codes, so that it rounds to that code.
_LARGEST_OFFSET = 0.499


def coordinate_descent(
    weight: Tensor, hessian: Tensor, start: QuantizedTensor, damping: float = 0.01
) -> GptqResult:
    """Improve `start`, a rounding of `weight` [out_features, in_features].

    `hessian` [in_features, in_features] and `damping` are those of `gptq`. Each value of the
    returned float weight is the optimum for all other codes before rounding, limited to the range
    that rounds to its code.
    """
    weight, hessian = weight.float(), damped(hessian, damping)
    codes, scales = start.codes.float(), start.scales
    for _ in range(_ROUNDS):
        scales = _best_scales(weight, hessian, codes, scales)
        codes = _better_codes(weight, hessian, codes, scales, *start.scheme.code_range)
    by_column = scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    offset = ((codes * by_column - weight) @ hessian) / hessian.diagonal() / by_column
    unrounded = (codes - offset.clamp_(-_LARGEST_OFFSET, _LARGEST_OFFSET)) * by_column
    return GptqResult(QuantizedTensor(codes.to(torch.int8), scales, start.scheme), unrounded)


def _best_scales(weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The portable scales [out_features, groups] of least error for these codes. A row keeps its
    scales if the new ones, rounded to the portable grid, do not lower its error."""
    groups = scales.shape[1]
    by_group = hessian.unflatten(0, (groups, -1))
    result = torch.empty_like(scales)
    rows_at_once = max(1, _ROWS_AT_ONCE_VALUES // (groups * weight.shape[1]))
    for start in range(0, len(weight), rows_at_once):
        rows = slice(start, start + rows_at_once)
        grouped = codes[rows].unflatten(1, (groups, -1))
        # [groups, rows, in_features]: the codes of each group times the Hessian
        products = grouped.transpose(0, 1) @ by_group
        matrix = (products.unflatten(2, (groups, -1)) * grouped).sum(-1).transpose(0, 1)
        old = scales[rows]
        error = (weight[rows] - (grouped * old[..., None]).flatten(1)) @ hessian
        right = (grouped * error.unflatten(1, (groups, -1))).sum(-1)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        ridge = torch.where(
            diagonal > 0, _RIDGE * diagonal, 1.0
        )  # a group of zero codes has diagonal 0
        change = torch.linalg.solve((matrix + ridge.diag_embed()).double(), right.double())
        new = to_scale_grid(old + change.float())
        # The decrease of the squared error of each row.
        change = new - old
        gain = (change * (2 * right - (matrix @ change[..., None])[..., 0])).sum(1)
        result[rows] = torch.where((gain > 0)[:, None], new, old)
    return result


def _better_codes(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, lowest: int, highest: int
) -> Tensor:
    """Update every code once, in descending order of the norms of their inputs."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    group = order // (weight.shape[1] // scales.shape[1])
    # Transposed, so that a column of the weight is contiguous.
    scale, result = scales.t().contiguous(), codes.t()[order].contiguous()
    gradient = hessian @ (result * scale[group] - weight.t()[order])
    for start in range(0, len(result), COLUMNS_AT_ONCE):
        block = slice(start, min(start + COLUMNS_AT_ONCE, len(result)))
        changes = torch.empty_like(result[block])
        for column in range(block.start, block.stop):
            step = scale[group[column]]
            best = result[column] - gradient[column] / (hessian[column, column] * step)
            best = best.round_().clamp_(lowest, highest)
            change = (best - result[column]).mul_(step)
            result[column], changes[column - start] = best, change
            later = slice(column + 1, block.stop)
            gradient[later].addr_(hessian[later, column], change)
        gradient[block.stop :].addmm_(hessian[block.stop :, block], changes)
    return result[order.argsort()].t().contiguous()
